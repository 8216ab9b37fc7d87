"""``op.encrypt_column`` and ``op.decrypt_column`` on real columns of every database."""

from __future__ import annotations

import enum
import itertools
import json
import logging
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from cryptography.fernet import Fernet, MultiFernet
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.postgresql import JSONB as POSTGRESQL_JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.types import TypeEngine
from sqlalchemy_utils.types.encrypted.encrypted_type import (
    AesEngine,
    AesGcmEngine,
    EncryptedType,
    FernetEngine,
    StringEncryptedType,
)

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    Keyring,
    LucentError,
    RotationError,
    generate_master_key,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent.migrations import decrypt_column, encrypt_column
from tests.databases import drop_everything

with warnings.catch_warnings():
    # One uses a decorator that SQLAlchemy 2.1 has deprecated; the other is deprecated itself.
    warnings.simplefilter("ignore")
    BINARY_AES = EncryptedType(String, "k" * 32, AesEngine, "pkcs5")
    from advanced_alchemy.types.encrypted_string import (
        EncryptedString,
        EncryptedText,
        FernetBackend,
    )

VALUES: dict[int, Any] = {
    1: {"token": "héllo \U0001f511", "n": [1, 2.5, True, None], "deep": {"a": {"b": []}}},
    2: [],
    3: "text",
    4: {"big": "x" * 100_000},
    5: 12,
    6: False,
}
THROUGH = "credentials__sealed"


def plain_table(type_: TypeEngine[Any], *, nullable: bool = True) -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("credentials", type_, nullable=nullable),
        Column("email", String(50), server_default="nobody"),
    )


def sealed_table(**options: Any) -> Table:
    return plain_table(EncryptedJSON(redact=False, **options))


def fill(engine: Engine, table: Table, values: dict[int, Any]) -> None:
    table.metadata.create_all(engine)
    if values:
        rows = [{"id": n, "credentials": value} for n, value in values.items()]
        with engine.begin() as connection:
            connection.execute(table.insert(), rows)


def read(engine: Engine, table: Table) -> dict[int, Any]:
    with engine.connect() as connection:
        rows = connection.execute(sa.select(table.c.id, table.c.credentials))
        return {row.id: row.credentials for row in rows}


@contextmanager
def operations_on(engine: Engine, **options: Any) -> Iterator[Operations]:
    with engine.connect() as connection:
        yield Operations(MigrationContext.configure(connection, opts=options))


def encrypt(engine: Engine, type_: TypeEngine[Any], **options: Any) -> None:
    with operations_on(engine) as operations:
        encrypt_column(
            "users", "credentials", existing_type=type_, operations=operations, **options
        )


def decrypt(engine: Engine, type_: TypeEngine[Any], **options: Any) -> None:
    with operations_on(engine) as operations:
        decrypt_column(
            "users", "credentials", existing_type=type_, operations=operations, **options
        )


def columns(engine: Engine) -> dict[str, Any]:
    return {column["name"]: column for column in sa.inspect(engine).get_columns("users")}


JSONB = sa.JSON().with_variant(POSTGRESQL_JSONB(), "postgresql")
TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize("type_", [sa.JSON(), JSONB], ids=["json", "jsonb"])
def test_json_comes_back_as_it_was(engine: Engine, type_: TypeEngine[Any], nullable: bool) -> None:
    values = {**VALUES, 7: None}  # JSON null
    plain = plain_table(type_, nullable=nullable)
    fill(engine, plain, values)
    if nullable:
        with engine.begin() as connection:
            connection.execute(plain.insert().values(id=8, credentials=sa.null()))

    encrypt(engine, type_)

    assert read(engine, sealed_table()) == {**values, **({8: None} if nullable else {})}
    assert verify(engine, sealed_table()).opened == 7
    found = columns(engine)
    assert set(found) == {"id", "credentials", "email"}
    assert found["credentials"]["nullable"] is nullable
    if engine.dialect.name == "mysql":
        assert isinstance(found["credentials"]["type"], mysql.LONGBLOB)

    decrypt(engine, type_)

    assert read(engine, plain) == {**values, **({8: None} if nullable else {})}
    found = columns(engine)
    assert set(found) == {"id", "credentials", "email"}
    assert found["credentials"]["nullable"] is nullable
    with engine.connect() as connection:
        nulls = sa.select(plain.c.id).where(plain.c.credentials.is_(sa.null()))
        assert connection.scalars(nulls).all() == ([8] if nullable else [])


def test_text_comes_back_to_the_letter(engine: Engine) -> None:
    documents = {1: '{ "b" : 1.50,\n "a": "\\u00e9" }', 2: "null", 3: '"x"', 4: "[1e2]"}
    fill(engine, plain_table(TEXT), documents)

    encrypt(engine, TEXT)
    assert read(engine, sealed_table()) == {n: json.loads(text) for n, text in documents.items()}

    decrypt(engine, TEXT)
    assert read(engine, plain_table(TEXT)) == documents


def test_text_that_is_not_json_is_read_by_a_reader(engine: Engine) -> None:
    tokens = {1: "sk_live_1", 2: "", 3: "123"}
    fill(engine, plain_table(String(20)), tokens)

    encrypt(engine, String(20), reader=str, writer=str)
    assert read(engine, sealed_table()) == tokens

    decrypt(engine, String(20), reader=str, writer=str)
    assert read(engine, plain_table(String(20))) == tokens


@pytest.mark.parametrize("how", ["json", "text"])
def test_values_that_cannot_be_read_are_named_and_nothing_is_swapped(
    engine: Engine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    stored = {1: '{"a": 1}', 2: "TOP-SECRET", 3: '{"a": NaN}', 4: '{"b": 2}'}
    table = plain_table(TEXT)
    fill(engine, table, stored)
    options: dict[str, Any] = {}
    if how == "json":
        options["reader"] = json.loads

    with pytest.raises(RotationError, match=r"2 values of users\.credentials") as caught:
        encrypt(engine, TEXT, **options)

    assert "primary key (2,)" in caplog.text
    assert "primary key (3,)" in caplog.text
    assert "TOP-SECRET" not in caplog.text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert read(engine, table) == stored
    assert set(columns(engine)) == {"id", "credentials", "email", THROUGH}

    with engine.begin() as connection:
        connection.execute(table.delete().where(table.c.id.in_([2, 3])))
    encrypt(engine, TEXT)
    assert read(engine, sealed_table()) == {1: {"a": 1}, 4: {"b": 2}}


def test_a_second_run_finds_nothing_to_do(engine: Engine) -> None:
    fill(engine, plain_table(sa.JSON()), VALUES)
    encrypt(engine, sa.JSON())
    raw = plain_table(sa.LargeBinary())
    before = read(engine, raw)

    encrypt(engine, sa.JSON())

    assert read(engine, raw) == before


def test_an_empty_table_needs_no_key(engine: Engine) -> None:
    fill(engine, plain_table(sa.JSON()), {})
    set_default_keyring(lambda: pytest.fail("the keyring was asked for"))

    encrypt(engine, sa.JSON())
    decrypt(engine, sa.JSON())
    encrypt(engine, sa.JSON(), swap=False)
    encrypt(engine, sa.JSON())

    assert set(columns(engine)) == {"id", "credentials", "email"}


def test_values_need_a_key(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(engine, plain_table(sa.JSON()), VALUES)
    set_default_keyring(None)

    with pytest.raises(ConfigurationError, match="LUCENT_SECRETS_KEY"):
        encrypt(engine, sa.JSON())

    assert read(engine, plain_table(sa.JSON())) == VALUES
    assert THROUGH not in columns(engine)


def test_what_writers_change_between_filling_and_swapping_is_what_is_sealed(
    engine: Engine,
) -> None:
    plain = plain_table(sa.JSON())
    fill(engine, plain, VALUES)
    encrypt(engine, sa.JSON(), swap=False)
    assert read(engine, plain) == VALUES
    with engine.begin() as connection:
        connection.execute(plain.update().where(plain.c.id == 1).values(credentials={"new": 1}))
        connection.execute(plain.update().where(plain.c.id == 2).values(credentials=sa.null()))
        connection.execute(plain.delete().where(plain.c.id == 3))
        connection.execute(plain.insert().values(id=9, credentials=[9]))

    encrypt(engine, sa.JSON())

    changed = {**VALUES, 1: {"new": 1}, 2: None, 9: [9]}
    del changed[3]
    assert read(engine, sealed_table()) == changed
    assert set(columns(engine)) == {"id", "credentials", "email"}


def test_filling_again_without_swapping_brings_the_second_column_up_to_date(
    engine: Engine,
) -> None:
    plain = plain_table(sa.JSON())
    fill(engine, plain, VALUES)
    encrypt(engine, sa.JSON(), swap=False)
    with engine.begin() as connection:
        connection.execute(plain.update().where(plain.c.id == 1).values(credentials={"new": 1}))

    encrypt(engine, sa.JSON(), swap=False)

    beside = Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column(
            THROUGH, EncryptedJSON(context="users.credentials", redact=False), key="credentials"
        ),
    )
    assert read(engine, beside) == {**VALUES, 1: {"new": 1}}


def test_a_second_column_that_stays_refuses_plaintext_as_the_swapped_one_does(
    engine: Engine,
) -> None:
    fill(engine, plain_table(sa.JSON()), VALUES)

    def constraints_that_refuse(name: str) -> list[str]:
        table = Table("users", MetaData(), Column(name, sa.LargeBinary))
        with engine.begin() as connection, pytest.raises(DBAPIError):
            connection.execute(table.update().values({name: b"plaintext"}))
        found = sa.inspect(engine).get_check_constraints("users")
        return [str(each["name"]) for each in found if "json_valid" not in each["sqltext"]]

    for _ in range(2):
        encrypt(engine, sa.JSON(), swap=False)
        if engine.dialect.name != "mysql":  # where it would keep writers out
            assert len(constraints_that_refuse(THROUGH)) == 1

    encrypt(engine, sa.JSON())
    assert len(constraints_that_refuse("credentials")) == 1
    assert read(engine, sealed_table()) == VALUES


def test_the_plaintext_can_be_kept_and_dropped_later(engine: Engine) -> None:
    plain = plain_table(sa.JSON(), nullable=False)
    fill(engine, plain, VALUES)

    encrypt(engine, sa.JSON(), drop=False)
    encrypt(engine, sa.JSON(), drop=False)  # finds nothing to do

    found = columns(engine)
    assert not found["credentials"]["nullable"]
    assert found[THROUGH]["nullable"]
    assert read(engine, sealed_table()) == VALUES
    with engine.begin() as connection:
        connection.execute(sealed_table().insert().values(id=9, credentials=[9]))
        connection.execute(
            sealed_table().update().where(sa.column("id") == 1).values(credentials={"new": 1})
        )

    encrypt(engine, sa.JSON(), swap=False)  # drops nothing either
    assert THROUGH in columns(engine)
    encrypt(engine, sa.JSON())
    assert set(columns(engine)) == {"id", "credentials", "email"}
    assert read(engine, sealed_table()) == {**VALUES, 1: {"new": 1}, 9: [9]}


def test_the_reverse_of_a_kept_plaintext_takes_the_sealed_values(engine: Engine) -> None:
    plain = plain_table(sa.JSON(), nullable=False)
    fill(engine, plain, VALUES)
    encrypt(engine, sa.JSON(), drop=False)
    with engine.begin() as connection:
        connection.execute(
            sealed_table().update().where(sa.column("id") == 1).values(credentials={"new": 1})
        )

    decrypt(engine, sa.JSON())

    assert read(engine, plain) == {**VALUES, 1: {"new": 1}}
    assert set(columns(engine)) == {"id", "credentials", "email"}
    assert not columns(engine)["credentials"]["nullable"]


def test_the_reverse_of_filling_alone_drops_the_second_column(engine: Engine) -> None:
    plain = plain_table(sa.JSON())
    fill(engine, plain, VALUES)
    encrypt(engine, sa.JSON(), swap=False)

    decrypt(engine, sa.JSON())

    assert read(engine, plain) == VALUES
    assert set(columns(engine)) == {"id", "credentials", "email"}


def test_a_column_that_a_bare_alter_made_binary_is_not_taken_for_sealed(engine: Engine) -> None:
    raw = plain_table(sa.LargeBinary())
    fill(engine, raw, {1: b'{"a": 1}'})

    with pytest.raises(RotationError, match="not sealed"):
        encrypt(engine, sa.JSON())

    encrypt(engine, sa.LargeBinary(), reader=json.loads)
    assert read(engine, sealed_table()) == {1: {"a": 1}}


def test_over_an_async_driver(run_async: Callable[[Any], None]) -> None:
    plain, sealed = plain_table(sa.JSON(), nullable=False), sealed_table()

    def convert(connection: Connection, operation: Any) -> None:
        operations = Operations(MigrationContext.configure(connection))
        operation("users", "credentials", existing_type=sa.JSON(), operations=operations)

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(plain.metadata.create_all)
            rows = [{"id": n, "credentials": value} for n, value in VALUES.items()]
            await connection.execute(plain.insert(), rows)
        for operation, table in ((encrypt_column, sealed), (decrypt_column, plain)):
            async with engine.connect() as connection:
                await connection.run_sync(convert, operation)
            async with engine.connect() as connection:
                stored = await connection.execute(sa.select(table.c.id, table.c.credentials))
                assert {row.id: row.credentials for row in stored} == VALUES

    run_async(work)


def test_inside_batch_alter_table(engine: Engine) -> None:
    fill(engine, plain_table(sa.JSON()), VALUES)

    with operations_on(engine) as operations, operations.batch_alter_table("users") as batch:
        batch.encrypt_column("credentials", existing_type=sa.JSON())  # type: ignore[attr-defined]
    assert read(engine, sealed_table()) == VALUES

    with operations_on(engine) as operations, operations.batch_alter_table("users") as batch:
        batch.decrypt_column("credentials", existing_type=sa.JSON())  # type: ignore[attr-defined]
    assert read(engine, plain_table(sa.JSON())) == VALUES


def test_row_bound_values_open_for_the_types_that_the_application_has(engine: Engine) -> None:
    metadata = MetaData()
    plain = Table(
        "users",
        metadata,
        Column("id", sa.Uuid(), primary_key=True),
        Column("credentials", sa.JSON()),
    )
    sealed = Table(
        "users",
        MetaData(),
        Column("id", sa.Uuid(), primary_key=True),
        Column("credentials", EncryptedJSON(bound_to=["id"])),
    )
    metadata.create_all(engine)
    identifier = uuid.uuid4()
    with engine.begin() as connection:
        connection.execute(plain.insert().values(id=identifier, credentials={"a": 1}))

    encrypt(engine, sa.JSON(), bound_to={"id": sa.Uuid()})

    (found,) = read(engine, sealed).values()
    assert found.open(row=(identifier,)) == {"a": 1}
    decrypt(engine, sa.JSON(), bound_to={"id": sa.Uuid()})
    assert read(engine, plain) == {identifier: {"a": 1}}


class Colour(str, enum.Enum):  # noqa: UP042  (a StrEnum prints its value)
    RED = "red"


@pytest.mark.parametrize(
    "type_, value, stored",
    [
        (sa.Uuid(native_uuid=False), uuid.UUID(int=7), True),
        (sa.CHAR(4), "abcd", True),
        (sa.Enum(Colour, name="colour"), Colour.RED, True),
        (sa.String(9), "a", False),
        (sa.Integer(), 7, False),
    ],
)
def test_binding_column_needs_its_type_where_the_database_does_not_tell_its_values(
    engine: Engine, type_: Any, value: Any, stored: bool
) -> None:
    metadata = MetaData()
    plain = Table(
        "users",
        metadata,
        Column("id", sa.Integer(), primary_key=True),
        Column("owner", type_),
        Column("credentials", sa.JSON()),
    )
    sealed = Table(
        "users",
        MetaData(),
        Column("id", sa.Integer(), primary_key=True),
        Column("owner", type_),
        Column("credentials", EncryptedJSON(bound_to=["owner"])),
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(plain.insert().values(id=1, owner=value, credentials={"a": 1}))
    # SQLite tells of an Enum that it is a VARCHAR, as of any other text.
    if stored and not (engine.dialect.name == "sqlite" and isinstance(type_, sa.Enum)):
        with pytest.raises(LucentError, match="Give the model's type"):
            encrypt(engine, sa.JSON(), bound_to=["owner"])
        with engine.connect() as connection:
            assert connection.scalars(sa.select(plain.c.credentials)).one() == {"a": 1}
        encrypt(engine, sa.JSON(), bound_to={"owner": type_})
    elif stored:
        encrypt(engine, sa.JSON(), bound_to={"owner": type_})
    else:
        encrypt(engine, sa.JSON(), bound_to=["owner"])
    with engine.connect() as connection:
        found = connection.execute(sa.select(sealed.c.owner, sealed.c.credentials)).one()
    assert found.credentials.open(row=(found.owner,)) == {"a": 1}


def test_the_engines_json_functions_are_honoured(engine: Engine) -> None:
    def tagged(value: Any) -> str:
        return json.dumps({"tagged": value})

    def untagged(text: str) -> Any:
        return json.loads(text)["tagged"]

    tagging = create_engine(engine.url, json_serializer=tagged, json_deserializer=untagged)
    plain = plain_table(sa.JSON())
    fill(tagging, plain, VALUES)

    encrypt(tagging, sa.JSON())
    assert read(tagging, sealed_table()) == VALUES
    decrypt(tagging, sa.JSON())
    assert read(tagging, plain) == VALUES
    tagging.dispose()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_batches_reach_every_row(engine: Engine, size: int) -> None:
    values = {n: {"n": n} for n in range(1, 12)}
    fill(engine, plain_table(sa.JSON()), values)

    encrypt(engine, sa.JSON(), batch_size=size)

    assert read(engine, sealed_table()) == values


def test_other_columns_indexes_and_comments_stay(engine: Engine) -> None:
    table = plain_table(sa.JSON(), nullable=False)
    table.c.credentials.comment = "for stripe"
    sa.Index("ix_users_email", table.c.email, unique=True)
    fill(engine, table, {1: {"a": 1}})

    encrypt(engine, sa.JSON())

    (index,) = sa.inspect(engine).get_indexes("users")
    assert (index["name"], bool(index["unique"])) == ("ix_users_email", True)
    assert "nobody" in columns(engine)["email"]["default"]
    if engine.dialect.supports_comments:
        assert columns(engine)["credentials"]["comment"] == "for stripe"


# -- from other libraries --------------------------------------------------------------------------


def aa(type_: Callable[..., TypeEngine[Any]]) -> TypeEngine[Any]:
    return type_(key="k" * 32, backend=FernetBackend)


@pytest.mark.parametrize(
    "type_",
    [
        StringEncryptedType(String, "k" * 32, AesEngine, "pkcs5", length=500),
        StringEncryptedType(String, "k" * 32, AesGcmEngine, length=500),
        StringEncryptedType(String, "k" * 32, FernetEngine, length=500),
        BINARY_AES,
        aa(EncryptedString),
        aa(EncryptedText),
    ],
    ids=["aes", "aes-gcm", "fernet", "binary-aes", "aa-string", "aa-text"],
)
@pytest.mark.filterwarnings("ignore:TypeDecorator EncryptedType")  # in the test's own statements
def test_columns_of_other_libraries_are_taken_over_and_back(
    engine: Engine, type_: TypeEngine[Any]
) -> None:
    tokens = {1: "sk_live_1", 2: "héllo", 3: '{"a": 1}'}
    fill(engine, plain_table(type_), tokens)

    encrypt(engine, type_)
    assert read(engine, sealed_table()) == tokens

    decrypt(engine, type_)
    assert read(engine, plain_table(type_)) == tokens

    # What these libraries hold is often JSON that the application parses.
    with engine.begin() as connection:
        table = plain_table(type_)
        connection.execute(table.update().values(credentials='{"a": 1}'))
    encrypt(engine, type_, reader=json.loads, writer=json.dumps)
    assert read(engine, sealed_table()) == {n: {"a": 1} for n in tokens}


def test_fernet_tokens_are_taken_over_and_back(engine: Engine) -> None:
    old, new = Fernet(Fernet.generate_key()), Fernet(Fernet.generate_key())
    both = MultiFernet([new, old])
    stored = {
        1: old.encrypt(b'{"a": 1}').decode(),
        2: new.encrypt(b'{"a": 2}').decode(),
    }
    fill(engine, plain_table(Text()), stored)

    def from_token(token: str) -> Any:
        return json.loads(both.decrypt(token))

    def to_token(value: Any) -> str:
        return both.encrypt(json.dumps(value).encode()).decode()

    encrypt(engine, Text(), reader=from_token, writer=to_token)
    assert read(engine, sealed_table()) == {1: {"a": 1}, 2: {"a": 2}}

    decrypt(engine, Text(), reader=from_token, writer=to_token)
    tokens = read(engine, plain_table(Text()))
    assert {n: from_token(token) for n, token in tokens.items()} == {1: {"a": 1}, 2: {"a": 2}}


def test_fernet_tokens_that_hold_text_are_taken_over_and_back(engine: Engine) -> None:
    fernet = Fernet(Fernet.generate_key())
    stored = {n: fernet.encrypt(text.encode()).decode() for n, text in {1: "t-1", 2: "12"}.items()}
    fill(engine, plain_table(Text()), stored)

    def from_token(token: str) -> str:
        return fernet.decrypt(token).decode()

    def to_token(value: str) -> str:
        return fernet.encrypt(value.encode()).decode()

    encrypt(engine, Text(), reader=from_token, writer=to_token)
    assert read(engine, sealed_table()) == {1: "t-1", 2: "12"}

    decrypt(engine, Text(), reader=from_token, writer=to_token)
    tokens = read(engine, plain_table(Text()))
    assert {n: from_token(token) for n, token in tokens.items()} == {1: "t-1", 2: "12"}


def test_a_token_of_another_key_is_reported_and_nothing_is_swapped(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    type_ = StringEncryptedType(Text, "k" * 32, FernetEngine)
    plain = plain_table(Text())
    stored = {1: Fernet(Fernet.generate_key()).encrypt(b"1").decode()}
    fill(engine, plain, stored)

    with pytest.raises(RotationError, match="1 values"):
        encrypt(engine, type_)

    assert read(engine, plain) == stored


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table_name", "column_name", "options", "message"),
    [
        ("nowhere", "credentials", {}, "there is no table nowhere"),
        ("users", "nothing", {}, "table users has no column nothing"),
        ("users", "credentials", {"bound_to": ["owner"]}, "table users has no column owner"),
        ("users", "id", {}, "identifies its row"),
        ("users", "email", {}, "users.email is used by index ix_users_email"),
        ("users", "credentials", {"through": "email"}, "both hold plain values"),
        ("users", "credentials", {"batch_size": 0}, "batch_size"),
        ("keyless", "credentials", {}, "table keyless has no primary key"),
    ],
)
def test_bad_input_is_refused_before_the_first_write(
    engine: Engine,
    table_name: str,
    column_name: str,
    options: dict[str, Any],
    message: str,
) -> None:
    plain = plain_table(sa.JSON())
    sa.Index("ix_users_email", plain.c.email)
    Table("keyless", plain.metadata, Column("credentials", sa.JSON))
    fill(engine, plain, VALUES)

    with operations_on(engine) as operations, pytest.raises(RotationError, match=message):
        encrypt_column(
            table_name, column_name, existing_type=sa.JSON(), operations=operations, **options
        )

    assert set(columns(engine)) == {"id", "credentials", "email"}
    assert read(engine, plain) == VALUES


def test_a_name_that_leaves_no_room_for_a_second_column_is_refused(databases: Any) -> None:
    engine = create_engine(databases.url("postgresql"))
    name = "x" * 60
    table = Table("users", MetaData(), Column("id", Integer, primary_key=True), Column(name, Text))
    table.metadata.create_all(engine)
    try:
        with operations_on(engine) as operations, pytest.raises(RotationError, match="too long"):
            encrypt_column("users", name, existing_type=Text(), operations=operations)
        assert set(columns(engine)) == {"id", name}
    finally:
        drop_everything(engine)
        engine.dispose()


def test_a_time_stamp_that_the_database_renews_stays(databases: Any) -> None:
    engine = create_engine(databases.url("mysql"))
    try:
        with engine.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE TABLE users (id INT PRIMARY KEY, credentials TEXT, changed TIMESTAMP"
                    " NOT NULL DEFAULT '2001-01-01 00:00:00' ON UPDATE CURRENT_TIMESTAMP)"
                )
            )
            connection.execute(sa.text("INSERT INTO users (id, credentials) VALUES (1, '[1]')"))
        encrypt(engine, Text())
        with engine.connect() as connection:
            changed = connection.scalar(sa.text("SELECT changed FROM users"))
        assert changed.year == 2001
    finally:
        drop_everything(engine)
        engine.dispose()


def test_a_value_too_long_for_the_plaintext_column_stops_the_swap(engine: Engine) -> None:
    sealed = sealed_table()
    fill(engine, sealed, {1: "x" * 50, 2: "y"})

    with pytest.raises(RotationError, match="1 values"):
        decrypt(engine, String(20))

    assert read(engine, sealed) == {1: "x" * 50, 2: "y"}


def test_a_value_that_does_not_open_stops_the_swap_back(engine: Engine) -> None:
    sealed = sealed_table()
    fill(engine, sealed, {1: "x", 2: "y"})
    set_default_keyring(Keyring({"v9": generate_master_key()}))

    with pytest.raises(RotationError, match="2 values"):
        decrypt(engine, sa.JSON())

    assert {row.count for row in status(engine, sealed).rows} == {2}


# -- SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(databases: Any) -> Iterator[Engine]:
    engine = create_engine(databases.url("sqlite"))
    yield engine
    with engine.begin() as connection:
        for type_, name in connection.execute(
            sa.text(
                "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' "
                "AND type = 'table'"
            )
        ).all():
            connection.exec_driver_sql(f'DROP {type_} "{name}"')
    engine.dispose()


def test_rows_that_refer_to_the_table_stay(sqlite: Engine) -> None:
    @event.listens_for(sqlite, "connect")
    def enforce(connection: Any, _: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")

    plain = plain_table(sa.JSON(), nullable=False)
    posts = Table(
        "posts",
        plain.metadata,
        Column("id", Integer, primary_key=True),
        Column("user_id", sa.ForeignKey("users.id", ondelete="CASCADE")),
    )
    fill(sqlite, plain, VALUES)
    with sqlite.begin() as connection:
        connection.execute(posts.insert().values(id=1, user_id=1))

    encrypt(sqlite, sa.JSON())

    with sqlite.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(posts)) == 1
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    assert not columns(sqlite)["credentials"]["nullable"]


@pytest.mark.parametrize(
    ("clause", "also", "lost"),
    [
        pytest.param(
            "CHECK (id > 0)",
            "",
            "CHECK",
            # Newer releases of Alembic warn of this one.
            marks=pytest.mark.filterwarnings("ignore:Unnamed CHECK constraint"),
        ),
        ("UNIQUE (email) ON CONFLICT IGNORE", "", "ON CONFLICT"),
        (
            "UNIQUE (email)",
            "CREATE TRIGGER t AFTER INSERT ON users BEGIN SELECT 1; END",
            "trigger t",
        ),
    ],
)
def test_what_a_copy_of_the_table_would_lose_is_refused(
    sqlite: Engine, clause: str, also: str, lost: str
) -> None:
    with sqlite.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT, "
            f"credentials JSON NOT NULL, {clause})"
        )
        if also:
            connection.exec_driver_sql(also)
        connection.exec_driver_sql("INSERT INTO users VALUES (1, 'a', '{}')")

    with pytest.raises(RotationError, match=f"would lose: .*{lost}"):
        encrypt(sqlite, sa.JSON())

    assert read(sqlite, plain_table(sa.JSON())) == {1: {}}
    with sqlite.connect() as connection:
        sql = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'users'")
        assert clause in sql.scalar_one()


def test_a_nullable_column_needs_no_copy_of_the_table(sqlite: Engine) -> None:
    with sqlite.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, credentials JSON, "
            "CHECK (id > 0))"
        )
        connection.exec_driver_sql("INSERT INTO users VALUES (1, '{}')")

    encrypt(sqlite, sa.JSON())

    assert read(sqlite, sealed_table()) == {1: {}}
    with sqlite.connect() as connection:
        sql = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'users'")
        assert "AUTOINCREMENT" in sql.scalar_one()


def test_progress_goes_through_alembics_logging(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    fill(engine, plain_table(sa.JSON()), VALUES)

    with caplog.at_level(logging.INFO, logger="alembic.runtime.migration"):
        encrypt(engine, sa.JSON())

    assert "sealed 6 of 6 values of users.credentials so far" in caplog.text
    assert "0 of 0" not in caplog.text


def test_an_interrupt_is_what_is_raised_and_the_next_run_goes_on(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    values = {n: {"n": n} for n in range(1, 301)}
    fill(engine, plain_table(sa.JSON()), values)
    batches = itertools.count()

    def interrupt(_cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE") and next(batches) == 2:
            raise KeyboardInterrupt

    # Raised in the driver's call, upon which SQLAlchemy gives the connection up.
    calls = ("do_execute", "do_executemany")
    for call in calls:
        event.listen(engine, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        encrypt(engine, sa.JSON(), batch_size=50)
    for call in calls:
        event.remove(engine, call, interrupt)

    assert "interrupted; the current batch is rolled back" in caplog.text
    assert read(engine, plain_table(sa.JSON())) == values
    with engine.connect() as connection:
        through = sa.text(f"SELECT count({THROUGH}) FROM users")
        assert connection.scalar(through) == 100
    encrypt(engine, sa.JSON())
    assert read(engine, sealed_table()) == values


# -- writers meanwhile -----------------------------------------------------------------------------


def test_no_write_that_was_committed_is_lost(engine: Engine) -> None:
    plain = plain_table(sa.JSON(), nullable=False)
    rows = 400
    fill(engine, plain, {n: {"n": 0} for n in range(1, rows + 1)})
    committed: dict[int, int] = dict.fromkeys(range(1, rows + 1), 0)
    started, stop = threading.Event(), threading.Event()

    def write() -> None:
        for turn in itertools.count(1):
            number = turn * 7 % rows + 1
            try:
                with engine.begin() as connection:
                    # A locked table makes the writer wait; one that has been swapped ends it.
                    assert not swapped(connection)
                    connection.execute(
                        plain.update().where(plain.c.id == number).values(credentials={"n": turn})
                    )
                    connection.execute(
                        plain.insert().values(id=rows + turn, credentials={"n": turn})
                    )
            except (DBAPIError, AssertionError):
                if swapped_now(engine) or stop.is_set():
                    return
                continue  # locked for too long: nothing was committed
            committed[number] = committed[rows + turn] = turn
            started.set()
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    assert started.wait(30)
    try:
        encrypt(engine, sa.JSON(), batch_size=20)
    finally:
        stop.set()
        writer.join()

    stored = read(engine, plain_table(sa.LargeBinary()))
    raw = {n: data.encode() if isinstance(data, str) else data for n, data in stored.items()}
    codec = EncryptedJSON(context="users.credentials").column_codec(engine.dialect)
    found = {
        # A write after the swap, on a database that stores text in a binary column.
        n: (json.loads(data) if data.startswith(b"{") else codec.open(data))["n"]
        for n, data in raw.items()
    }
    assert found == committed
    assert max(committed.values()) > 1


LOCKS = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE", "mysql": "LOCK TABLES"}


@contextmanager
def just_before_the_lock(engine: Engine, work: Callable[[], object]) -> Iterator[None]:
    """Do `work` each time that the connection of the migration is about to keep others out."""

    def before(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith(LOCKS[engine.dialect.name]):
            work()

    event.listen(engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", before)


def test_what_is_committed_just_before_the_lock_is_what_is_sealed(engine: Engine) -> None:
    plain = plain_table(sa.JSON())
    fill(engine, plain, VALUES)
    others = create_engine(engine.url)
    turns = itertools.count(1)

    def write() -> None:
        turn = next(turns)
        with others.begin() as connection:
            connection.execute(
                plain.update().where(plain.c.id == 1).values(credentials={"turn": turn})
            )
            connection.execute(plain.update().where(plain.c.id == 2).values(credentials=sa.null()))
            connection.execute(plain.delete().where(plain.c.id == 3))
            connection.execute(plain.insert().values(id=8 + turn, credentials=[turn]))

    with just_before_the_lock(engine, write):
        encrypt(engine, sa.JSON())
    others.dispose()

    last = next(turns) - 1
    written = {1: {"turn": last}, 2: None, **{8 + turn: [turn] for turn in range(1, last + 1)}}
    assert read(engine, sealed_table()) == {n: VALUES[n] for n in (4, 5, 6)} | written
    assert last >= 1


@pytest.fixture
def postgresql(databases: Any) -> Iterator[Engine]:
    engine = create_engine(databases.url("postgresql"))
    yield engine
    drop_everything(engine)
    engine.dispose()


def test_a_transaction_older_than_the_comparison_is_seen_under_the_lock(
    postgresql: Engine,
) -> None:
    plain = plain_table(sa.JSON())
    fill(postgresql, plain, VALUES)
    encrypt(postgresql, sa.JSON(), swap=False)
    others = create_engine(postgresql.url)

    with others.connect() as older:
        older.execute(plain.insert().values(id=9, credentials=[9]))
        with older.begin_nested():  # with a number of its own
            older.execute(plain.insert().values(id=10, credentials=[10]))
        with just_before_the_lock(postgresql, older.commit):
            encrypt(postgresql, sa.JSON())
    others.dispose()

    assert read(postgresql, sealed_table()) == {**VALUES, 9: [9], 10: [10]}


def test_on_postgresql_only_rows_that_changed_are_opened_under_the_lock(
    postgresql: Engine,
) -> None:
    plain = plain_table(Text())
    fill(postgresql, plain, {n: f"t{n}" for n in range(1, 2_000)})
    encrypt(postgresql, Text(), reader=str, swap=False)
    wait_for_older_transactions(postgresql)
    others = create_engine(postgresql.url)
    seen: set[object] = set()

    def change() -> None:
        with others.begin() as connection:
            connection.execute(plain.update().where(plain.c.id == 7).values(credentials="new"))
        seen.clear()

    def reader(value: str) -> str:
        seen.add(value)
        return value

    with just_before_the_lock(postgresql, change):
        encrypt(postgresql, Text(), reader=reader)
    others.dispose()

    assert seen == {"new"}
    assert read(postgresql, sealed_table())[7] == "new"


def wait_for_older_transactions(engine: Engine) -> None:
    """Wait until no transaction on the server is left from before: other tests have some, too."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        current = connection.scalar(sa.text("SELECT CAST(pg_current_xact_id() AS text)"))
        ended = sa.text(
            "SELECT pg_snapshot_xmin(pg_current_snapshot()) > CAST(CAST(:xid AS text) AS xid8)"
        )
        while not connection.scalar(ended, {"xid": current}):
            time.sleep(0.05)


def swapped(connection: Connection) -> bool:
    columns = {column["name"]: column for column in sa.inspect(connection).get_columns("users")}
    return isinstance(columns["credentials"]["type"], sa.types._Binary)


def swapped_now(engine: Engine) -> bool:
    with engine.connect() as connection:
        return swapped(connection)
