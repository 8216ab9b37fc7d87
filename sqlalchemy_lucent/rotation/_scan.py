"""Go through a table by ranges of its primary key, each in a short transaction."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from ._link import Link
from ._pace import Pace
from ._table import EVERYWHERE, PrimaryKey, Reach, TableWorker, Within

_SECONDS: Final = 0.25
"""What a range should take: SQLite's writers wait for those who read, for 5 seconds by default."""

_FIRST_ROWS: Final = 10_000


def ranges_of(link: Link, worker: TableWorker) -> Iterator[Within]:
    """Give the rows of a table, range after range, in which every row has its place.

    A row whose primary key changes meanwhile may be in two of them, or in none.
    """
    pace = Pace(_FIRST_ROWS, _SECONDS, None, 0, link.sleep)
    after: PrimaryKey | None = None
    more = True
    while more:
        started = time.monotonic()
        reach = _reach(link, worker, after, pace.limit)
        more = reach is not None and reach.more
        if after is None:
            if not more:
                yield EVERYWHERE
                return
            yield Within([worker.lost], {})
        # Without a bound at the end: a key of an inexact type may not be found by its own value.
        upto = reach.last if more and reach is not None else None
        yield worker.within(after, upto)
        after = upto
        if reach is not None:
            pace.after(reach.rows, reach.size, time.monotonic() - started)


def _reach(link: Link, worker: TableWorker, after: PrimaryKey | None, limit: int) -> Reach | None:
    return link.read(lambda connection: worker.reach(connection, after, limit))


def count_stale(link: Link, worker: TableWorker) -> int:
    """Count the values that are not under the primary key, and keep nobody waiting for it."""
    if link.dialect.name != "sqlite":
        return link.read(worker.count_stale)  # nobody waits for who reads
    ranges = ranges_of(link, worker)
    return sum(link.read(partial(worker.count_stale, within=within)) for within in ranges)
