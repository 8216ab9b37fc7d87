"""Go through a table by ranges of its primary key, each in a short transaction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    String,
    column,
    func,
    inspect,
    select,
)

from .._database.connection import Link
from .._sql import key_version
from ..exceptions import RotationError
from .rows import EVERYWHERE, PrimaryKey, TableWorker, Within
from .targets import TargetColumn, TargetTable

_SECONDS: Final = 0.25
"""What a range should take: SQLite's writers wait for those who read, for 5 seconds by default."""

_FIRST_ROWS: Final = 20_000
_MOST_ROWS: Final = 200_000

_BEARABLE: Final = 2.0
"""Seconds that SQLite's writers may be kept waiting for once."""

_LOOKS: Final = 5
"""Times that a table is counted by ranges while others write to it."""


def ranges_of(link: Link, worker: TableWorker) -> Iterator[Within]:
    """Give the rows of a table, range after range, in which every row has its place.

    A row whose primary key changes meanwhile may be in two of them, or in none.
    """
    rows = _FIRST_ROWS
    after: PrimaryKey | None = None
    more = True
    while more:
        started = time.monotonic()
        bounds = link.read(partial(worker.find_bounds, after=after, limit=rows, most_bytes=None))
        more = bounds is not None and bounds.more
        if after is None:
            if not more:
                yield EVERYWHERE
                return
            yield Within([worker.lost], {})
        # Without a bound at the end: a key of an inexact type may not be found by its own value.
        upto = bounds.last if more and bounds is not None else None
        yield worker.within(after, upto)
        after = upto
        factor = min(max(_SECONDS / max(time.monotonic() - started, 1e-6), 0.5), 2.0)
        rows = max(1000, min(int(rows * factor), _MOST_ROWS))


def count_stale(link: Link, worker: TableWorker) -> int:
    """Count the values that are not under the primary key, and keep nobody waiting for it."""
    if link.dialect.name != "sqlite":
        return link.read(worker.count_stale)  # nobody waits for who reads
    ranges = ranges_of(link, worker)
    return sum(link.read(partial(worker.count_stale, within=within)) for within in ranges)


def count_version(link: Link, target: TargetTable, found: TargetColumn, version: str) -> int:
    """Count the values of a column under `version`, all of one moment.

    An index on the key version answers at once. Only SQLite in rollback-journal mode, where who
    reads keeps those waiting who write, and without an index, counts a large table by ranges.

    :raises RotationError: others wrote all the time, so that a row may have moved between ranges.
    """
    statement = link.read(partial(_asking, target, found, version))
    whole = partial(_number, statement, EVERYWHERE)
    if link.dialect.name != "sqlite" or link.read(partial(_keeps_nobody_waiting, statement)):
        return link.read(whole)
    worker = TableWorker(target, None, link.dialect)
    for _ in range(_LOOKS):
        before, started = link.read(_changes_of_others), time.monotonic()
        ranges = ranges_of(link, worker)
        count = sum(link.read(partial(_number, statement, within)) for within in ranges)
        if count or link.read(_changes_of_others) == before:
            return count
        if time.monotonic() - started < _BEARABLE:
            return link.read(whole)
    raise RotationError(
        f"others write to {target.name} all the time, and a row may move while it is counted. "
        "Index the key version of its sealed column, put the database in WAL mode, or look while "
        "nobody writes"
    )


def _asking(
    target: TargetTable, found: TargetColumn, version: str, connection: Connection
) -> Select[Any]:
    asked: ColumnElement[str] = key_version(target.clause.c[found.name])
    if found.version_column is not None:
        # It is believed if the database computes it, and not if somebody may have written it.
        where = (str(target.clause.name), target.clause.schema)
        columns = inspect(connection).get_columns(*where)
        if any(
            each["name"] == found.version_column
            and found.name in each.get("computed", {"sqltext": ""})["sqltext"]
            for each in columns
        ):
            asked = column(found.version_column, String())
    return select(func.count()).select_from(target.clause).where(asked == version)


def _number(statement: Select[Any], within: Within, connection: Connection) -> int:
    return connection.scalar(statement.where(*within.conditions), within.parameters) or 0


def _keeps_nobody_waiting(statement: Select[Any], connection: Connection) -> bool:
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() in ("wal", "memory", "off"):
        return True
    compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}").all()
    return not any(str(step[-1]).startswith("SCAN") for step in plan)


def _changes_of_others(connection: Connection) -> Any:
    return connection.exec_driver_sql("PRAGMA data_version").scalar()
