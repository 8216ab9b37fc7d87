"""Keyset pagination: the one condition that pages of secrets and batches of rows go on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Dialect, and_, or_, tuple_

from ._dialects import is_mysql


def is_behind(
    columns: Sequence[ColumnElement[Any]], values: Sequence[ColumnElement[Any]], dialect: Dialect
) -> ColumnElement[bool]:
    """Return ``(a, b) > (x, y)``, the condition of keyset pagination, as the index serves it.

    MySQL and MariaDB find no place in the index for a row value, only for each of its cases;
    SQLite and PostgreSQL do not for the cases.
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
