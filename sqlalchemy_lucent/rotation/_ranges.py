"""Cut a table into ranges of its primary key, with about as many stale rows in each."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, func, select

from ._table import PrimaryKey, TableWorker


class KeyRange(NamedTuple):
    """The rows behind `after` and not behind `upto`; without a bound where it is ``None``."""

    after: PrimaryKey | None = None
    upto: PrimaryKey | None = None


def split(
    connection: Connection, worker: TableWorker, ranges: int, least_rows: int = 1
) -> list[KeyRange]:
    """Return at most `ranges` ranges, which hold every row that there is or will be.

    Reads the table twice, in the database. A range has `least_rows` stale rows or more, so that a
    table with few of them has fewer ranges, or one.
    """
    stale = worker.any_stale()
    rows = connection.scalar(select(func.count()).select_from(worker.target.clause).where(stale))
    ranges = max(1, min(ranges, (rows or 0) // least_rows))
    keys = select(*worker.primary_key).where(stale)
    found: list[KeyRange] = []
    after: PrimaryKey | None = None
    while len(found) < ranges - 1:
        # An offset from the last boundary, not from the beginning: each row is passed once.
        statement = worker.in_order(keys, after, None, 1).offset((rows or 0) // ranges - 1)
        row = connection.execute(statement, worker.parameters(after, None, 1)).first()
        if row is None or tuple(row) == after:
            break  # rows were re-sealed meanwhile, or the key has an inexact type
        found.append(KeyRange(after, tuple(row)))
        after = tuple(row)
    return [*found, KeyRange(after, None)]
