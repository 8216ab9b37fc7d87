"""The operations in a schema, and where ``schema_translate_map`` says which one is meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, event, inspect

from sqlalchemy_lucent import EncryptedJSON, Keyring, RotationError, migrations, set_default_keyring
from sqlalchemy_lucent import status as status_of

ROWS = [{"id": n, "data": {"n": n}} for n in (1, 2, 3)]


@pytest.fixture
def actual(engine: Engine, tmp_path: Path) -> Iterator[str]:
    """The name of a second schema in the database."""
    name = f"{engine.url.database}_actual" if engine.dialect.name == "mysql" else "actual"
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def attach(connection: Any, _: object) -> None:
            connection.execute(f"ATTACH '{tmp_path}/other.db' AS actual")

        yield name
        return
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    yield name
    with engine.begin() as connection:
        cascade = " CASCADE" if engine.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP SCHEMA {name}{cascade}")


def table_of(type_: Any, schema: str | None) -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("data", type_, nullable=False),
        schema=schema,
    )


@pytest.mark.parametrize("schema", ["tenant", None])
def test_a_translated_schema_is_the_one_that_is_meant(
    engine: Engine, actual: str, schema: str | None, promoted: Keyring
) -> None:
    translated = engine.execution_options(schema_translate_map={schema: actual})
    plain, sealed = table_of(sa.JSON(), actual), table_of(EncryptedJSON(redact=False), actual)
    decoy = table_of(sa.JSON(), None)
    for table in (plain, decoy):
        table.metadata.create_all(engine)
        with engine.begin() as connection:
            connection.execute(table.insert(), ROWS)

    def do(name: str, *args: Any, **options: Any) -> None:
        with translated.connect() as connection:
            operations = Operations(MigrationContext.configure(connection))
            operation = getattr(migrations, name)
            operation(*args, schema=schema, operations=operations, **options)
            connection.commit()

    def read(table: Table) -> list[Any]:
        with engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(sa.select(table))]

    do("encrypt_column", "users", "data", existing_type=sa.JSON())
    assert read(sealed) == ROWS
    set_default_keyring(promoted)
    do("rotate_encrypted_column", "users", "data")
    assert {row.key_version for row in status_of(engine, sealed).rows} == {"v2"}
    do("rebind_encrypted_column", "users", "data", from_context="users.data", context="u.d")
    do("rebind_encrypted_column", "users", "data", from_context="u.d")
    assert read(sealed) == ROWS
    do("decrypt_column", "users", "data", existing_type=sa.JSON())
    assert read(plain) == ROWS
    assert read(decoy) == ROWS

    do("create_lucent_secrets")
    assert inspect(engine).has_table("lucent_secrets", schema=actual)
    assert not inspect(engine).has_table("lucent_secrets")
    do("drop_lucent_secrets")
    assert not inspect(engine).has_table("lucent_secrets", schema=actual)
    plain.metadata.drop_all(engine)


def test_a_map_that_leads_on_and_on_is_refused(engine: Engine) -> None:
    table = table_of(sa.JSON(), None)
    table.metadata.create_all(engine)
    chained = engine.execution_options(schema_translate_map={"one": "two", "two": "three"})
    for name, options in (
        ("encrypt_column", {"existing_type": sa.JSON()}),
        ("rotate_encrypted_column", {}),
    ):
        with chained.connect() as connection:
            operations = Operations(MigrationContext.configure(connection))
            with pytest.raises(RotationError, match="schema_translate_map"):
                getattr(migrations, name)(
                    "users", "data", schema="one", operations=operations, **options
                )
