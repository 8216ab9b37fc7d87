"""``op.rebind_encrypted_column`` after a rename, on every database."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table

from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    Keyring,
    RotationError,
    TamperedError,
    set_default_keyring,
    status,
)
from sqlalchemy_lucent.migrations import RebindEncryptedColumnOp, rebind_encrypted_column

OLD = "users.creds"


def users(**options: Any) -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("credentials", EncryptedJSON(redact=False, **options)),
    )


@pytest.fixture
def renamed(engine: Engine) -> Table:
    """Values that were sealed while the column was called ``creds``."""
    table = users(context=OLD)
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "credentials": {"n": n}} for n in range(1, 6)]
        connection.execute(table.insert(), rows)
    return table


def rebind(engine: Engine, **options: Any) -> None:
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        rebind_encrypted_column("users", "credentials", operations=operations, **options)


def read(engine: Engine, table: Table) -> dict[int, Any]:
    with engine.connect() as connection:
        return {row.id: row.credentials for row in connection.execute(table.select()).all()}


def test_values_open_under_the_new_name_and_no_longer_under_the_old(
    engine: Engine, renamed: Table
) -> None:
    values = read(engine, renamed)

    rebind(engine, from_context=OLD)

    assert read(engine, users()) == values
    with pytest.raises(TamperedError):
        read(engine, renamed)


def test_values_that_have_the_new_name_already_stay_as_they_are(
    engine: Engine, renamed: Table
) -> None:
    raw = Table("users", MetaData(), Column("id", Integer), Column("credentials", sa.LargeBinary))
    with engine.begin() as connection:
        connection.execute(users().insert().values(id=9, credentials=[9]))
    before = read(engine, raw)

    rebind(engine, from_context=OLD)
    once = read(engine, raw)
    rebind(engine, from_context=OLD)

    assert once[9] == before[9]
    assert all(once[n] != before[n] for n in range(1, 6))
    assert read(engine, raw) == once


def test_the_reverse_takes_values_back(engine: Engine, renamed: Table) -> None:
    values = read(engine, renamed)
    operation = RebindEncryptedColumnOp("users", "credentials", from_context=OLD)

    for step in (operation, operation.reverse()):
        with engine.connect() as connection:
            Operations(MigrationContext.configure(connection)).invoke(step)

    assert read(engine, renamed) == values


def test_rebinding_seals_under_the_primary_key(
    engine: Engine, renamed: Table, promoted: Keyring
) -> None:
    set_default_keyring(promoted)

    rebind(engine, from_context=OLD)

    assert {row.key_version for row in status(engine, renamed).rows} == {"v2"}


def test_row_bound_values_stay_bound_to_their_rows(engine: Engine) -> None:
    old, new = users(context=OLD, bound_to=["id"]), users(bound_to=["id"])
    old.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(old.insert().values(id=1, credentials=Bound({"a": 1}, row=(1,))))

    rebind(engine, from_context=OLD, bound_to=["id"])

    assert read(engine, new)[1].open(row=(1,)) == {"a": 1}
    with pytest.raises(TamperedError):
        read(engine, new)[1].open(row=(2,))


def test_a_value_of_neither_context_is_named_and_the_others_are_sealed(
    engine: Engine, renamed: Table, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.begin() as connection:
        connection.execute(users(context="elsewhere.x").insert().values(id=9, credentials=[9]))

    with pytest.raises(RotationError, match="1 values"):
        rebind(engine, from_context=OLD)

    assert "primary key (9,) does not open: TamperedError" in caplog.text
    with engine.begin() as connection:
        connection.execute(renamed.delete().where(renamed.c.id == 9))
    assert read(engine, users()) == {n: {"n": n} for n in range(1, 6)}


def test_inside_batch_alter_table(engine: Engine, renamed: Table) -> None:
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("users") as batch:
            batch.rebind_encrypted_column(  # type: ignore[attr-defined]
                "credentials", from_context=OLD
            )

    assert read(engine, users()) == {n: {"n": n} for n in range(1, 6)}


def test_an_empty_table_needs_no_key(engine: Engine) -> None:
    users().metadata.create_all(engine)
    set_default_keyring(lambda: pytest.fail("the keyring was asked for"))

    rebind(engine, from_context=OLD)


def test_rows_of_tables_that_inherit_keep_their_own_values(databases: Any) -> None:
    engine = sa.create_engine(databases.url("postgresql"))
    table = users(context=OLD)
    try:
        table.metadata.create_all(engine)
        child = Table(
            "children",
            MetaData(),
            Column("id", Integer, primary_key=True),
            Column("credentials", EncryptedJSON(context=OLD)),
        )
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE children (PRIMARY KEY (id)) INHERITS (users)"))
            connection.execute(table.insert().values(id=1, credentials="parent"))
            connection.execute(child.insert().values(id=1, credentials="child"))

        rebind(engine, from_context=OLD)

        with engine.connect() as connection:
            found = connection.scalars(sa.select(users().c.credentials)).all()
        assert sorted(found) == ["child", "parent"]
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS children, users"))
        engine.dispose()
