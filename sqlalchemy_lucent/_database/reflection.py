"""A table as the database has it: its columns and its primary key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, inspect
from sqlalchemy.types import NullType, TypeEngine

from .._row import type_as_bound
from ..exceptions import RotationError

BoundTypes = Mapping[str, TypeEngine[Any] | None]
"""The type of each binding column by its name; ``None`` has the database tell it."""


def dotted(*names: str | None) -> str:
    """Join a schema, table and column into one name, without those that are ``None``."""
    return ".".join(name for name in names if name)


def translated(connection: Connection, schema: str | None) -> str | None:
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


class ReflectedTable(NamedTuple):
    """A table's columns by name, as SQLAlchemy's inspector describes them, and its primary key."""

    columns: Mapping[str, Any]
    primary_key: list[str]

    def identity(self, connection: Connection, bound_types: BoundTypes) -> list[Column[Any]]:
        """Return the columns that identify a row: the primary key and the binding columns."""
        return [
            Column(
                name,
                self._type(connection, name, bound_types),
                primary_key=name in self.primary_key,
            )
            for name in dict.fromkeys([*self.primary_key, *bound_types])
        ]

    def _type(self, connection: Connection, name: str, bound_types: BoundTypes) -> TypeEngine[Any]:
        type_: TypeEngine[Any] = self.columns[name]["type"]
        if name in bound_types:
            return type_as_bound(name, bound_types[name], type_)
        # SQLite keeps values of any type in any column, so read a key as it is stored.
        return NullType() if connection.dialect.name == "sqlite" else type_


def reflect_columns(
    connection: Connection, table_name: str, schema: str | None, needed: Iterable[str]
) -> Mapping[str, Any]:
    """Return the columns of a table by name.

    :param needed: the columns that the table must have.
    :raises RotationError: the table or one of these columns is missing.
    """
    inspector = inspect(connection)
    name = dotted(schema, table_name)
    if not inspector.has_table(table_name, schema=schema):
        raise RotationError(f"there is no table {name} in this database")
    columns = {found["name"]: found for found in inspector.get_columns(table_name, schema=schema)}
    missing = set(needed) - columns.keys()
    if missing:
        raise RotationError(f"table {name} has no column {', '.join(sorted(missing))}")
    return columns


def reflect_table(
    connection: Connection, table_name: str, schema: str | None, needed: Iterable[str]
) -> ReflectedTable:
    """Return the columns and the primary key of a table.

    :raises RotationError: as for :func:`reflect_columns`, or it has no primary key.
    """
    columns = reflect_columns(connection, table_name, schema, needed)
    key = inspect(connection).get_pk_constraint(table_name, schema=schema)["constrained_columns"]
    if not key:
        raise no_primary_key(dotted(schema, table_name))
    return ReflectedTable(columns, key)


def no_primary_key(table: str) -> RotationError:
    """Return the error of a table without a primary key, declared or reflected."""
    return RotationError(
        f"table {table} has no primary key, which is needed to go through its rows in order"
    )
