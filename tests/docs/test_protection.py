"""What ``docs/protection.md`` says is protected, and what it says is not, on every database.

The source of the page names the test of each claim in a comment.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import (
    JSON,
    Column,
    Dialect,
    Engine,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    func,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from sqlalchemy_lucent import (
    DecryptionError,
    EncryptedJSON,
    Keyring,
    LucentBase,
    LucentError,
    LucentSecret,
    LucentSecrets,
    NotSealedError,
    PicklingRefusedError,
    Sealed,
    SerializationError,
    TamperedError,
    UnknownKeyVersionError,
    UnsupportedOperationError,
    WrongKeyError,
    generate_master_key,
    migrations,
    rotate,
    row_bound,
    set_default_keyring,
    status,
    verify,
)

from ..databases import create_unguarded
from .pages import ROOT
from .printers import PRINTERS
from .printers import VALUES as PRINTED

MARKER = "PLAINTEXT-MARKER"
VALUE = {"token": MARKER}
KEY = "tenant:tenant_123:stripe:apiKey"
OTHER_KEY = "tenant:tenant_456:stripe:apiKey"


class Base(DeclarativeBase):
    pass


class Picky(TypeDecorator[str]):
    """A type of the user's own, whose bind processor fails."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value == "bad":
            raise ValueError("bad")
        return value


class Integration(Base):
    __tablename__ = "integrations"

    id: Mapped[int] = mapped_column(primary_key=True)
    first: Mapped[Any] = mapped_column(EncryptedJSON)
    second: Mapped[Any] = mapped_column(EncryptedJSON)
    note: Mapped[str | None] = mapped_column(Picky)


class Account(Base):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    first: Mapped[Any] = mapped_column(EncryptedJSON)


class Bound(Base):
    __tablename__ = "bound"

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    first: Mapped[Any] = row_bound("id")
    note: Mapped[str | None] = mapped_column(Picky)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session over the tables, with two rows in each."""
    for metadata in (Base.metadata, LucentBase.metadata):
        metadata.create_all(engine)
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        for key in (KEY, OTHER_KEY):
            secrets.set(key, VALUE)
            secrets.stage(key, VALUE)
        session.add_all([Integration(id=n, first=VALUE, second=VALUE) for n in (1, 2)])
        session.add_all([Account(id=n, first=VALUE) for n in (1, 2)])
        session.add_all([Bound(id=f"row {n}", first=VALUE) for n in (1, 2)])
        session.commit()
        yield session


def stored(session: Session, table: str, column: str) -> list[bytes]:
    """What the database holds in a column, in the order of the primary key."""
    order = "owner_id" if table == "lucent_secrets" else "id"
    rows = session.scalars(text(f"SELECT {column} FROM {table} ORDER BY {order}"))
    return [bytes(value) for value in rows]


def overwrite(session: Session, table: str, column: str, value: bytes | None) -> None:
    """Do what somebody does who can write to the database."""
    session.execute(text(f"UPDATE {table} SET {column} = :value"), {"value": value})
    session.expire_all()


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# -- Somebody reads the database -------------------------------------------------------------------


def test_a_dump_shows_no_value(session: Session) -> None:
    for metadata in (Base.metadata, LucentBase.metadata):
        for table in metadata.tables:
            rows = session.execute(text(f"SELECT * FROM {table}")).all()
            assert rows
            assert MARKER not in repr([[_plain(value) for value in row] for row in rows])
    database = session.get_bind().engine.url.database
    if session.get_bind().dialect.name == "sqlite":
        assert database is not None
        assert MARKER.encode() not in Path(database).read_bytes()


def _plain(value: object) -> object:
    return bytes(value) if isinstance(value, memoryview) else value


def test_equal_values_are_stored_as_different_bytes(session: Session) -> None:
    payloads = stored(session, "integrations", "first") + stored(session, "integrations", "second")
    assert len(set(payloads)) == 4


def test_key_parts_and_key_versions_are_in_clear(session: Session) -> None:
    row = session.execute(
        text("SELECT scope, owner_id, provider, name, key_version FROM lucent_secrets")
    ).first()
    assert row is not None
    assert tuple(row) == ("tenant", "tenant_123", "stripe", "apiKey", "v1")


def test_the_size_of_a_value_is_in_clear(session: Session) -> None:
    document = json.dumps(VALUE, separators=(",", ":"))
    assert len(stored(session, "accounts", "first")[0]) == len(document) + 34 + len("v1")


# -- Somebody writes to the database ---------------------------------------------------------------


def test_a_changed_byte_anywhere_does_not_open(session: Session) -> None:
    secrets = LucentSecrets(session)
    (original, _) = stored(session, "lucent_secrets", "payload")

    def read_changed(position: int) -> None:
        changed = bytearray(original)
        changed[position] ^= 1
        with session.begin_nested():
            overwrite(session, "lucent_secrets", "payload", bytes(changed))
            secrets.get(KEY)

    for position in range(len(original)):
        # In the header, the database refuses some of them itself.
        with pytest.raises((DecryptionError, DBAPIError)):
            read_changed(position)


def test_bytes_of_another_secret_do_not_open(session: Session) -> None:
    (_, other) = stored(session, "lucent_secrets", "payload")
    overwrite(session, "lucent_secrets", "payload", other)
    assert LucentSecrets(session).get(OTHER_KEY) == VALUE
    with pytest.raises(TamperedError):
        LucentSecrets(session).get(KEY)


def test_bytes_of_another_row_do_not_open_in_a_row_bound_column(session: Session) -> None:
    (_, other) = stored(session, "bound", "first")
    overwrite(session, "bound", "first", other)
    with pytest.raises(TamperedError):
        _ = session.get_one(Bound, "row 1").first


@pytest.mark.parametrize("source", [("integrations", "second"), ("accounts", "first")])
def test_bytes_of_another_column_or_table_do_not_open(
    session: Session, source: tuple[str, str]
) -> None:
    overwrite(session, "integrations", "first", stored(session, *source)[0])
    with pytest.raises(TamperedError):
        session.get_one(Integration, 1)


def test_a_row_whose_binding_columns_were_changed_does_not_open(session: Session) -> None:
    session.execute(text("UPDATE bound SET id = 'row 3' WHERE id = 'row 1'"))
    with pytest.raises(TamperedError):
        _ = session.get_one(Bound, "row 3").first


def test_plaintext_is_refused_by_the_database(session: Session) -> None:
    word = "planted"  # by name, because a traceback shows lines of code
    plaintext = f'{{"token": "{word}"}}'.encode()
    for table, column in (("integrations", "first"), ("lucent_secrets", "payload")):
        with pytest.raises(DBAPIError) as refused, session.begin_nested():
            overwrite(session, table, column, plaintext)
        assert f'"{word}"' not in shown(refused.value).replace(f'word = "{word}"', "")
        assert word.encode().hex() not in shown(refused.value)


def test_plaintext_in_the_column_is_not_taken_for_a_value(engine: Engine) -> None:
    create_unguarded(Base.metadata, engine)
    with Session(engine) as session:
        session.add(Integration(id=1, first=VALUE, second=VALUE))
        session.commit()
        overwrite(session, "integrations", "first", b'{"token": "planted"}')
        with pytest.raises(NotSealedError):
            session.get_one(Integration, 1)


def test_plaintext_behind_a_format_byte_is_found_by_verify_alone(session: Session) -> None:
    overwrite(session, "integrations", "first", b"v1:\x01" + b"planted " * 8)
    session.commit()
    engine = session.get_bind()
    assert isinstance(engine, Engine)
    assert all(row.key_version for row in status(engine, Integration).rows)
    failed = verify(engine, Integration).failed
    assert [row.column for row in failed] == ["first", "first"]


def test_bytes_of_another_row_open_in_a_plain_column(session: Session) -> None:
    session.get_one(Integration, 2).first = {"token": "of row 2"}
    session.commit()
    (_, other) = stored(session, "integrations", "first")
    overwrite(session, "integrations", "first", other)
    assert session.get_one(Integration, 1).first == {"token": "of row 2"}


def test_an_older_value_of_the_same_row_opens(session: Session) -> None:
    (old, _) = stored(session, "lucent_secrets", "payload")
    LucentSecrets(session).set(KEY, {"token": "new"})
    overwrite(session, "lucent_secrets", "payload", old)
    assert LucentSecrets(session).get(KEY) == VALUE


def test_a_deleted_row_is_not_missed(session: Session, engine: Engine) -> None:
    session.execute(delete(Integration).where(Integration.id == 1))
    session.commit()
    assert verify(engine, Base).ok


def test_the_same_place_in_another_database_opens(session: Session) -> None:
    (original, _) = stored(session, "lucent_secrets", "payload")
    engine = create_engine("sqlite://")
    LucentBase.metadata.create_all(engine)
    with Session(engine) as elsewhere:
        LucentSecrets(elsewhere).set(KEY, {"token": "its own"})
        overwrite(elsewhere, "lucent_secrets", "payload", original)
        assert LucentSecrets(elsewhere).get(KEY) == VALUE
    engine.dispose()


# -- A key is lost, wrong or leaked ----------------------------------------------------------------


def test_without_its_key_a_value_does_not_open(session: Session) -> None:
    for keyring, error in (
        (Keyring({"v2": generate_master_key()}), UnknownKeyVersionError),
        (Keyring({"v1": generate_master_key()}), WrongKeyError),
    ):
        with pytest.raises(error):
            LucentSecrets(session, keyring=keyring).get(KEY)


def test_after_a_rotation_the_leaked_key_opens_no_row(
    session: Session, engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    session.commit()
    assert rotate(engine, keyring=promoted).ok
    with pytest.raises(UnknownKeyVersionError):
        LucentSecrets(session, keyring=keyring).get(KEY)


def test_an_old_backup_opens_with_the_leaked_key(
    session: Session, engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    (backup, _) = stored(session, "lucent_secrets", "payload")
    session.commit()
    assert rotate(engine, keyring=promoted).ok
    overwrite(session, "lucent_secrets", "payload", backup)
    assert LucentSecrets(session, keyring=keyring).get(KEY) == VALUE


def test_a_leaked_key_that_the_keyring_still_has_can_plant_values(
    session: Session, keyring: Keyring, promoted: Keyring
) -> None:
    LucentSecrets(session, keyring=keyring).set(KEY, {"token": "planted"})
    assert LucentSecrets(session, keyring=promoted).get(KEY) == {"token": "planted"}


def test_tables_counts_and_lists_need_no_key(session: Session, engine: Engine) -> None:
    session.commit()

    def no_keyring() -> Keyring:
        pytest.fail("the keyring was asked for")

    set_default_keyring(no_keyring)
    LucentBase.metadata.create_all(engine)
    assert {row.count for row in status(engine).rows} == {2}
    assert [str(info.key) for info in LucentSecrets(session).list()] == [KEY, OTHER_KEY]


# -- Somebody reads logs, tracebacks, pickles or migrations ----------------------------------------


def test_no_error_shows_a_value(session: Session) -> None:
    (original, _) = stored(session, "lucent_secrets", "payload")
    overwrite(session, "lucent_secrets", "payload", original[:-1])
    column = Integration.first
    refused: list[Callable[[], object]] = [
        lambda: LucentSecrets(session).get(KEY),
        lambda: LucentSecrets(session).set(KEY, {"a": [MARKER, object()]}),
        lambda: LucentSecrets(session).set(KEY, {MARKER + "\ud800": 1}),
        lambda: session.execute(insert(Account), {"first": {"a": MARKER, "b": float("nan")}}),
        lambda: session.execute(insert(Account), {"first": [{"a": {MARKER: float("nan")}}]}),
        lambda: session.execute(
            insert(Account), [{"first": {MARKER: 1}}, {"first": {MARKER: {1}}}]
        ),
        lambda: LucentSecrets(session).set_many({KEY: {MARKER: {MARKER: ()}}}),
        lambda: LucentSecrets(session).set(KEY, {MARKER: 10**5000}),
        lambda: column == VALUE,
    ]
    for refusal in refused:
        with pytest.raises(LucentError) as caught:
            refusal()
        assert MARKER not in str(caught.value)
        assert caught.value.__context__ is None


def test_a_database_error_shows_no_value(session: Session) -> None:
    with pytest.raises(IntegrityError) as caught:
        session.execute(insert(Integration), {"id": 1, "first": VALUE, "second": VALUE})
    assert MARKER not in shown(caught.value)


@pytest.mark.parametrize(("column", "value"), [("payload", b"planted"), ("created_at", None)])
def test_the_error_of_a_refused_row_shows_no_value(
    session: Session, column: str, value: bytes | None
) -> None:
    (original, _) = stored(session, "lucent_secrets", "payload")
    with pytest.raises(DBAPIError) as refused, session.begin_nested():
        overwrite(session, "lucent_secrets", column, value)
    for text_shown in (shown(refused.value), repr(refused.value.orig)):
        assert "planted" not in text_shown
        assert b"planted".hex() not in text_shown
        assert original.hex()[:40] not in text_shown
    assert "tenant_123" not in repr(refused.value.orig)


@pytest.mark.parametrize(
    "new",
    [
        lambda: Integration(id=3, first=VALUE, second=VALUE, note="bad"),
        lambda: Bound(id="row 3", first=VALUE, note="bad"),
    ],
    ids=["plain", "row-bound"],
)
def test_an_error_of_another_column_shows_no_value(
    session: Session, new: Callable[[], object]
) -> None:
    # Raised while parameters are bound, when some of them are not sealed yet.
    session.add(new())
    with pytest.raises(StatementError) as caught:
        session.flush()
    assert MARKER not in shown(caught.value)


def test_sqlalchemy_logs_no_value(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="sqlalchemy"):
        session.execute(insert(Account), {"id": 3, "first": VALUE})
        assert session.scalars(select(Account.first).where(Account.id == 3)).one() == VALUE
        LucentSecrets(session).set(KEY, VALUE)
        assert LucentSecrets(session).get(KEY) == VALUE
    assert "INSERT INTO accounts" in caplog.text
    assert "Row (<redacted dict>,)" in caplog.text
    assert MARKER not in caplog.text


def test_an_opened_value_does_not_print_itself(session: Session) -> None:
    value = session.get_one(Integration, 1).first
    assert value == VALUE
    assert MARKER not in f"{value} {value!r} {[value]}"


@pytest.mark.parametrize("kind", list(PRINTED))
def test_the_table_says_what_hides(kind: str) -> None:
    page = (ROOT / "docs/admin-and-logs.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (hidden|shown) \| (hidden|shown) \|$", page, re.MULTILINE)
    assert [where for where, *_ in rows] == list(PRINTERS)
    engine = create_engine("sqlite://")
    table = Base.metadata.tables["accounts"]
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), {"id": 1, "first": PRINTED[kind]})
        value = connection.scalar(select(table.c.first))
    engine.dispose()
    for where, of_documents, of_texts in rows:
        for printer in PRINTERS[where]:
            shows = f"MARK-{kind}" in printer(value)
            assert shows is ((of_texts if kind == "str" else of_documents) == "shown"), where


def test_what_a_value_prints_is_not_stored(session: Session) -> None:
    secrets = LucentSecrets(session)
    with pytest.raises(SerializationError):
        secrets.set(KEY, str(secrets.get(KEY)))
    account = session.get_one(Account, 1)
    account.first = {"a": [str(account.first)]}
    with pytest.raises(SerializationError):
        session.flush()
    session.rollback()
    assert secrets.get(KEY) == VALUE


def test_a_part_of_an_opened_value_prints_itself(session: Session) -> None:
    value = session.get_one(Integration, 1).first
    assert MARKER in repr(value["token"])
    assert MARKER in json.dumps(value)


def test_keyrings_show_and_pickle_no_key() -> None:
    key = generate_master_key()
    keyring = Keyring({"v1": key})
    assert key not in repr(keyring)
    with pytest.raises(PicklingRefusedError):
        pickle.dumps(keyring)


def test_a_value_that_was_not_opened_pickles_as_ciphertext(session: Session) -> None:
    sealed = session.scalars(select(LucentSecret.payload)).first()
    assert isinstance(sealed, Sealed)
    assert MARKER.encode() not in pickle.dumps(sealed)


def test_a_pickle_of_an_opened_value_holds_it(session: Session) -> None:
    assert MARKER.encode() in pickle.dumps(session.get_one(Integration, 1))


def test_a_value_is_not_rendered_into_sql(session: Session) -> None:
    statement = update(Integration).values(first=VALUE)
    with pytest.raises(UnsupportedOperationError) as caught:
        statement.compile(session.get_bind(), compile_kwargs={"literal_binds": True})
    assert MARKER not in shown(caught.value)


def test_a_value_that_goes_around_the_type_is_refused(session: Session) -> None:
    for value in (
        bindparam("p", VALUE, type_=JSON),
        literal(MARKER),
        text(f"'{MARKER}'"),
        func.lower(MARKER),
        Integration.second,
    ):
        with pytest.raises(UnsupportedOperationError) as caught:
            session.execute(update(Integration).values(first=value))
        assert MARKER not in shown(caught.value)
        session.rollback()


def test_a_server_default_that_is_not_null_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError):
        Table("t", MetaData(), Column("c", EncryptedJSON, server_default=text("'{}'")))


def test_the_parameters_of_a_compiled_statement_show_the_value() -> None:
    assert MARKER in str(update(Integration).values(first=VALUE).compile().params)


def test_a_generated_migration_carries_no_key(engine: Engine) -> None:
    key = generate_master_key()
    set_default_keyring(Keyring({"v1": key}))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"render_item": migrations.render_item}
        )
        operations = produce_migrations(context, Base.metadata).upgrade_ops
    assert operations is not None
    rendered = render_python_code(operations, render_item=migrations.render_item)
    assert "EncryptedJSON()" in rendered
    assert key not in rendered
