"""What each operation on values refuses, and how: the same for all four, on every database."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, Table

from sqlalchemy_lucent import (
    Bound,
    ConfigurationError,
    EncryptedJSON,
    Keyring,
    RotationError,
    set_default_keyring,
    status,
)
from sqlalchemy_lucent.migrations import (
    CreateLucentSecretsOp,
    DecryptColumnOp,
    DropLucentSecretsOp,
    EncryptColumnOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
)
from tests.conftest import KEY_2

CONTEXT = "users.old"
DATA = ["rotate", "encrypt", "decrypt", "rebind"]


def operation(name: str, *where: str, **options: Any) -> Any:
    """One of the operations on values, on column ``users.rotate``, ``users.encrypt`` and so on."""
    table_name, column_name = where or ("users", name)
    match name:
        case "rotate":
            return RotateEncryptedColumnOp(table_name, column_name, context=CONTEXT, **options)
        case "encrypt":
            options["existing_type"] = sa.Text()
            return EncryptColumnOp(table_name, column_name, context=CONTEXT, **options)
        case "decrypt":
            options["existing_type"] = sa.Text()
            return DecryptColumnOp(table_name, column_name, context=CONTEXT, **options)
    return RebindEncryptedColumnOp(table_name, column_name, from_context=CONTEXT, **options)


def invoke(connection: Connection, op: Any) -> None:
    Operations(MigrationContext.configure(connection)).invoke(op)


def contents(engine: Engine) -> tuple[dict[str, Any], list[Any]]:
    """Every table's columns, and every byte of ``users``."""
    inspector = sa.inspect(engine)
    names = inspector.get_table_names()
    found = {
        name: sorted((c["name"], str(c["type"])) for c in inspector.get_columns(name))
        for name in names
    }
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM users ORDER BY id")).all()
    return found, [tuple(row) for row in rows]


@pytest.fixture
def users(engine: Engine) -> Table:
    """A column for each operation, with values that it would change."""
    metadata = MetaData()
    columns = {name: sa.Text() if name == "encrypt" else sealed() for name in DATA}
    Table("keyless", metadata, *(Column(name, type_) for name, type_ in columns.items()))
    table = Table(
        "users",
        metadata,
        Column("id", Integer, primary_key=True),
        *(Column(name, type_) for name, type_ in columns.items()),
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        for n in (1, 2, 3):
            row = {name: '{"a": 1}' if name == "encrypt" else {"n": n} for name in DATA}
            connection.execute(table.insert().values(id=n, **row))
    return table


def sealed() -> EncryptedJSON:
    return EncryptedJSON(context=CONTEXT)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        (lambda name: ("nowhere", name), {}, "there is no table nowhere"),
        (lambda name: ("users", "nothing"), {}, "table users has no column nothing"),
        (lambda name: ("users", name), {"bound_to": ["who"]}, "table users has no column who"),
        (lambda name: ("keyless", name), {}, "table keyless has no primary key"),
        (lambda name: ("users", name), {"batch_size": 0}, "batch_size"),
    ],
    ids=["table", "column", "bound-to", "primary-key", "batch-size"],
)
@pytest.mark.parametrize("name", DATA)
def test_what_is_missing_is_named_and_nothing_is_written(
    engine: Engine,
    users: Table,
    promoted: Keyring,
    name: str,
    where: Callable[[str], tuple[str, str]],
    options: dict[str, Any],
    message: str,
) -> None:
    set_default_keyring(promoted)
    keyless = users.metadata.tables["keyless"]
    with engine.begin() as connection:
        connection.execute(
            keyless.insert().values({n: "{}" if n == "encrypt" else {} for n in DATA})
        )
    before = contents(engine)

    with engine.connect() as connection, pytest.raises(RotationError, match=message):
        invoke(connection, operation(name, *where(name), **options))

    assert contents(engine) == before


@pytest.mark.parametrize("name", DATA)
def test_values_need_a_keyring(engine: Engine, users: Table, name: str) -> None:
    set_default_keyring(None)
    before = contents(engine)

    with engine.connect() as connection, pytest.raises(ConfigurationError, match="LUCENT_SECRETS"):
        invoke(connection, operation(name))

    after = contents(engine)
    # What encryption and decryption added is where they begin when they are run again.
    assert [row[:5] for row in after[1]] == [row[:5] for row in before[1]]


@pytest.mark.parametrize("name", ["rotate", "decrypt", "rebind"])
def test_values_of_a_version_that_the_keyring_lacks_are_named_and_left(
    engine: Engine, users: Table, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    set_default_keyring(Keyring({"v2": KEY_2}))
    before = contents(engine)

    with engine.connect() as connection, pytest.raises(RotationError, match="3 values of users"):
        invoke(connection, operation(name))

    for n in (1, 2, 3):
        assert f"primary key ({n},)" in caplog.text
    assert "UnknownKeyVersionError" in caplog.text
    assert [row[:5] for row in contents(engine)[1]] == [row[:5] for row in before[1]]


@pytest.mark.parametrize("name", ["rotate", "rebind"])
@pytest.mark.parametrize("type_", [sa.Integer(), sa.Text(), sa.JSON()])
def test_a_column_that_is_not_encrypted_is_refused_at_once(
    engine: Engine,
    promoted: Keyring,
    name: str,
    type_: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_default_keyring(promoted)
    plain = Table(
        "plain", MetaData(), Column("id", Integer, primary_key=True), Column("value", type_)
    )
    plain.create(engine)
    with engine.begin() as connection:
        connection.execute(plain.insert().values(value=1 if name == "rotate" else 2))

    with (
        engine.connect() as connection,
        pytest.raises(
            RotationError, match=r"plain\.value is a column of the type \w+, .* op\.encrypt_column"
        ),
    ):
        invoke(connection, operation(name, "plain", "value"))

    assert not [record for record in caplog.records if record.name.endswith(".lucent")]


def test_sealed_values_in_a_column_of_another_type_are_rotated_on_sqlite(
    tmp_path: Path, promoted: Keyring
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/declared.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE users (id INTEGER PRIMARY KEY, rotate VARBINARY)")
    with engine.connect() as connection:
        invoke(connection, operation("rotate"))  # a database made anew
    users = Table(
        "users", MetaData(), Column("id", Integer, primary_key=True), Column("rotate", sealed())
    )
    with engine.begin() as connection:
        connection.execute(users.insert().values(id=1, rotate=1))
    set_default_keyring(promoted)
    with engine.connect() as connection:
        invoke(connection, operation("rotate"))
    assert [row.key_version for row in status(engine, users.c.rotate).rows] == ["v2"]
    engine.dispose()


def test_a_row_bound_column_without_its_binding_is_told_in_the_error(
    engine: Engine, promoted: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    bound = Table(
        "bound",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("value", EncryptedJSON(bound_to=["id"])),
    )
    bound.create(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "value": Bound({"n": n}, row=(n,))} for n in range(30)]
        connection.execute(bound.insert(), rows)
    set_default_keyring(promoted)
    rotation = RotateEncryptedColumnOp("bound", "value")

    with (
        engine.connect() as connection,
        pytest.raises(RotationError, match=r"30 values .* none of the column opens.*bound_to="),
    ):
        invoke(connection, rotation)

    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 21
    assert "primary key (19,) does not open: TamperedError" in errors[19]
    assert errors[20] == "bound.value: 10 more values, not logged"

    # One value that opens, and it is not the binding of them all.
    with engine.begin() as connection:
        free = EncryptedJSON(context="bound.value")
        free_table = Table("bound", MetaData(), Column("id", Integer), Column("value", free))
        connection.execute(free_table.update().where(free_table.c.id == 7).values(value=1))
    for _ in range(2):
        with (
            engine.connect() as connection,
            pytest.raises(RotationError, match=r"29 values .* \(the first were logged") as caught,
        ):
            invoke(connection, rotation)
        assert "bound_to" not in str(caught.value)


@pytest.mark.parametrize("name", DATA)
def test_a_transaction_that_somebody_else_began_is_refused(
    engine: Engine, users: Table, promoted: Keyring, name: str
) -> None:
    set_default_keyring(promoted)
    before = contents(engine)

    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        with pytest.raises(RotationError, match="begun outside of Alembic"):
            invoke(connection, operation(name))

    assert contents(engine) == before


@pytest.mark.parametrize("name", DATA)
def test_a_second_run_writes_nothing(
    engine: Engine, users: Table, promoted: Keyring, name: str
) -> None:
    set_default_keyring(promoted)
    with engine.connect() as connection:
        invoke(connection, operation(name))
    before = contents(engine)

    with engine.connect() as connection:
        invoke(connection, operation(name))

    assert contents(engine) == before


@pytest.mark.parametrize("name", DATA)
def test_a_batch_with_other_changes_of_the_table(
    engine: Engine, users: Table, promoted: Keyring, name: str
) -> None:
    set_default_keyring(promoted)
    options: dict[str, Any] = {"context": CONTEXT}
    if name in ("encrypt", "decrypt"):
        options["existing_type"] = sa.Text()
    elif name == "rebind":
        options = {"from_context": CONTEXT}
    method = f"{name}_column" if name in ("encrypt", "decrypt") else f"{name}_encrypted_column"

    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("users") as batch:
            batch.add_column(Column("phone", sa.String(20)))
            getattr(batch, method)(name, **options)
        connection.commit()

    # A second run of the same finds that it is done.
    before = contents(engine)
    with engine.connect() as connection:
        invoke(connection, operation(name))
    assert contents(engine) == before
    assert "phone" in {column for column, _ in before[0]["users"]}


# -- offline ---------------------------------------------------------------------------------------


def offline(dialect: str, op: Any) -> str:
    written = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect, opts={"as_sql": True, "output_buffer": written}
    )
    Operations(context).invoke(op)
    return written.getvalue()


DIALECTS = ["sqlite", "postgresql", "mysql", "mariadb"]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_offline_operations_on_values_are_refused(dialect: str, name: str) -> None:
    with pytest.raises(RotationError, match=r"of users\.\w+ cannot be written as SQL.*online"):
        offline(dialect, operation(name))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_offline_the_operations_on_the_schema_are_written(dialect: str) -> None:
    assert "CREATE TABLE lucent_secrets" in offline(dialect, CreateLucentSecretsOp())
    assert "DROP TABLE lucent_secrets" in offline(dialect, DropLucentSecretsOp(force=True))
    with pytest.raises(RotationError, match="force=True"):
        offline(dialect, DropLucentSecretsOp())
