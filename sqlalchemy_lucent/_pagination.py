"""Keyset pagination: the order of pages and batches, and the condition for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    Cast,
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    String,
    and_,
    cast,
    func,
    literal_column,
    or_,
    text,
    tuple_,
)
from sqlalchemy.sql.expression import TableClause
from sqlalchemy.types import TypeEngine

from ._sql import is_mysql


def row_after(
    columns: Sequence[ColumnElement[Any]], values: Sequence[ColumnElement[Any]], dialect: Dialect
) -> ColumnElement[bool]:
    """Return ``(a, b) > (x, y)``, the condition of keyset pagination, so that the index serves it.

    MySQL and MariaDB use the index only for ``a > x OR a = x AND b > y``; SQLite and PostgreSQL
    only for the row value.
    """
    if len(columns) > 1 and not is_mysql(dialect):
        return tuple_(*columns) > tuple_(*values)
    return or_(
        *(
            and_(
                *(c == value for c, value in zip(columns[:last], values[:last], strict=True)),
                columns[last] > values[last],
            )
            for last in range(len(columns))
        )
    )


def key_type(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type to read and compare a key column of `type_` with.

    For MySQL's SET it is a string: SQLAlchemy writes the members in any order, and the database
    compares their text.
    """
    return String() if type_.__visit_name__ == "SET" else type_


_ORDERED_BY_POSITION: Final = text(
    "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND data_type IN ('enum', 'set')"
)


def sort_columns(
    connection: Connection, table: TableClause, columns: Sequence[ColumnElement[Any]]
) -> list[ColumnElement[Any]]:
    """Return what to order a table's key by, so that :func:`row_after` finds the rows that follow.

    MySQL and MariaDB sort an ENUM by the position of its values but compare it as text, so an ENUM
    is sorted as text too.
    """
    if not is_mysql(connection.dialect):
        return list(columns)
    names = {"name": str(table.name), "schema": table.schema}
    by_position = {name.lower() for name in connection.scalars(_ORDERED_BY_POSITION, names)}
    return [
        _as_text(column) if str(column.name).lower() in by_position else column
        for column in columns
    ]


def as_sort_value(order: ColumnElement[Any], value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return `value` in the form of `order`, which :func:`sort_columns` returned."""
    return _as_text(value) if isinstance(order, Cast) else value


def _as_text(value: ColumnElement[Any]) -> ColumnElement[Any]:
    # As bytes in one character set, so that no collations have to agree.
    return cast(func.convert(value.op("USING")(literal_column("utf8mb4"))), LargeBinary)
