"""A table as the database has it: its columns and its primary key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import NullType, TypeEngine

from .._row import type_as_bound
from ..exceptions import RotationError


def dotted(*names: str | None) -> str:
    """Join a schema, table and column into one name, without those that are ``None``."""
    return ".".join(name for name in names if name)


def translated(connection: sa.Connection, schema: str | None) -> str | None:
    """Return the schema that the connection's ``schema_translate_map`` makes of `schema`.

    :raises RotationError: the map would translate the result again.
    """
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    found: str | None = schemas.get(schema, schema)
    if schemas.get(found, found) != found:
        raise RotationError(
            f"schema_translate_map has {found!r} both as a schema and as a translation, so "
            "statements would reach a different schema. Use a connection without the map, and pass "
            "the database's own name as schema="
        )
    return found


def reflect_columns(
    connection: sa.Connection, table_name: str, schema: str | None, needed: Iterable[str]
) -> Mapping[str, Any]:
    """Return the columns of a table by name, as SQLAlchemy's inspector describes them.

    :param needed: the columns that the table must have.
    :raises RotationError: the table or one of these columns is missing.
    """
    inspector = sa.inspect(connection)
    name = dotted(schema, table_name)
    if not inspector.has_table(table_name, schema=schema):
        raise RotationError(f"there is no table {name} in this database")
    columns = {found["name"]: found for found in inspector.get_columns(table_name, schema=schema)}
    missing = set(needed) - columns.keys()
    if missing:
        raise RotationError(f"table {name} has no column {', '.join(sorted(missing))}")
    return columns


def reflect_table(
    connection: sa.Connection,
    table_name: str,
    schema: str | None,
    column_name: str,
    bound_types: Mapping[str, TypeEngine[Any] | None],
) -> tuple[Mapping[str, Any], sa.Table]:
    """Return all columns of a table by name, and the table with those that identify a row.

    :param bound_types: the type of each binding column by name; ``None`` has the database tell it.
    :raises RotationError: the table, its primary key or one of the named columns is missing.
    """
    columns = reflect_columns(connection, table_name, schema, [column_name, *bound_types])
    key = sa.inspect(connection).get_pk_constraint(table_name, schema=schema)["constrained_columns"]
    if not key:
        raise no_primary_key(dotted(schema, table_name))

    def type_of(name: str) -> TypeEngine[Any]:
        type_: TypeEngine[Any] = columns[name]["type"]
        if name in bound_types:
            return type_as_bound(name, bound_types[name], type_)
        # SQLite keeps values of any type in any column, so read a key as it is stored.
        return NullType() if connection.dialect.name == "sqlite" else type_

    identity: list[sa.Column[Any]] = [
        sa.Column(name, type_of(name), primary_key=name in key)
        for name in dict.fromkeys([*key, *bound_types])
    ]
    return columns, sa.Table(table_name, sa.MetaData(), *identity, schema=schema)


def has_row(
    connection: sa.Connection, owner: sa.FromClause, *conditions: sa.ColumnElement[bool]
) -> bool:
    """Say whether a table has a row that meets `conditions`."""
    statement = sa.select(sa.literal(1)).select_from(owner).where(*conditions).limit(1)
    return connection.execute(statement).first() is not None


def no_primary_key(table: str) -> RotationError:
    """Return the error of a table without a primary key, declared or reflected."""
    return RotationError(
        f"table {table} has no primary key, which is needed to go through its rows in order"
    )
