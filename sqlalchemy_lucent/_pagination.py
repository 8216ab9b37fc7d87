"""Keyset pagination: the order of pages and batches, and the condition for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.sql.expression import TableClause
from sqlalchemy.types import TypeEngine

from ._sql import is_mysql


def row_after(
    columns: Sequence[sa.ColumnElement[Any]],
    values: Sequence[sa.ColumnElement[Any]],
    dialect: sa.Dialect,
) -> sa.ColumnElement[bool]:
    """Return ``(a, b) > (x, y)``, the condition of keyset pagination, so that the index serves it.

    MySQL and MariaDB use the index only for ``a > x OR a = x AND b > y``; SQLite and PostgreSQL
    only for the row value.
    """
    if len(columns) > 1 and not is_mysql(dialect):
        return sa.tuple_(*columns) > sa.tuple_(*values)
    return sa.or_(
        *(
            sa.and_(
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
    return sa.String() if type_.__visit_name__ == "SET" else type_


_ORDERED_BY_POSITION: Final = sa.text(
    "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND data_type IN ('enum', 'set')"
)


def sort_columns(
    connection: sa.Connection, table: TableClause, columns: Sequence[sa.ColumnElement[Any]]
) -> list[sa.ColumnElement[Any]]:
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


def as_sort_value(
    order: sa.ColumnElement[Any], value: sa.ColumnElement[Any]
) -> sa.ColumnElement[Any]:
    """Return `value` in the form of `order`, which :func:`sort_columns` returned."""
    return _as_text(value) if isinstance(order, sa.Cast) else value


def _as_text(value: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    # As bytes in one character set, so that no collations have to agree.
    return sa.cast(sa.func.convert(value.op("USING")(sa.literal_column("utf8mb4"))), sa.LargeBinary)
