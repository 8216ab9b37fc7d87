"""How many rows several rotators look at for each row that they write.

python -m tests.bench.bench_rotators [--smoke]
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from sqlalchemy import Engine, create_engine, event

from sqlalchemy_lucent import rotate, set_default_keyring
from tests.bench.bench_rotation import LABELS, fill, table
from tests.bench.documents import small
from tests.bench.measure import KEYS, Figure, at_most, run_alone
from tests.bench.servers import bench_database

TITLE = "Several rotators"
ABOUT = """\
N processes start together, and each calls plain `rotate()` on one table of 40,000 small
documents. *Returned* are the rows that their SELECTs on the table return, to lock them or to find
the bounds of a batch. *Searched* are the rows that the server went through for it, including those
that others had locked or done: `seq_tup_read` and `idx_tup_fetch` of PostgreSQL, `Handler_read_*`
of MariaDB, less the rows of each `SELECT count(*)`, which every rotator sends at its end. Both are
for each row written, and hardly depend on the machine. The ratio is to one rotator."""

ROWS = 40_000
ROTATORS = (1, 2, 4, 8)
GOAL = at_most(1.3)
READ = {
    "postgresql": "SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0)"
    " FROM pg_stat_user_tables WHERE relname = 'documents'",
    "mysql": "SHOW SESSION STATUS LIKE 'Handler_read_%'",
}


def rows_read(cursor: Any, kind: str) -> int:
    """Return the rows that were read: of the table so far, or on MariaDB by this session."""
    cursor.execute(READ[kind])
    return sum(int(value) for _, value in cursor.fetchall())


def rotator(url: str, kind: str, primary: str, barrier: Any) -> tuple[int, int, int]:
    """Rotate; return the rows that this process wrote and was returned, and on MariaDB searched.

    On PostgreSQL, return the counted rows in place of the last, to take off what the server read.
    """
    engine = create_engine(url)
    returned = searched = 0

    @event.listens_for(engine, "after_cursor_execute")
    def count(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        nonlocal returned, searched
        if statement.startswith("SELECT count(*) AS count_1 \nFROM documents"):
            searched -= ROWS
        elif statement.startswith("SELECT") and " documents" in statement:
            returned += cursor.rowcount

    @event.listens_for(engine, "close")
    def ask(connection: Any, _: Any) -> None:
        nonlocal searched
        if kind == "mysql":
            searched += rows_read(connection.cursor(), kind)

    barrier.wait()
    report = rotate(engine, table, keyring=KEYS.with_primary(primary))
    engine.dispose()
    assert report.ok
    return report.rotated, returned, searched


def read_so_far(engine: Engine, delay: float) -> int:
    if engine.dialect.name != "postgresql":  # each rotator counts its own
        return 0
    time.sleep(delay)  # PostgreSQL counts late
    with engine.connect() as connection:
        return rows_read(connection.connection.cursor(), "postgresql")


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    spawn = multiprocessing.get_context("spawn")
    delay = 0 if smoke else 2
    for kind in READ:
        alone: dict[str, float] = {}
        primaries = itertools.cycle(["v1", "v2"])  # each run turns the values back
        with bench_database(kind) as url, spawn.Manager() as manager:
            engine = create_engine(url)
            fill(engine, table, "payload", [small(n % 100) for n in range(40 if smoke else ROWS)])

            for number in ROTATORS[1:2] if smoke else ROTATORS:
                before, primary = read_so_far(engine, delay), next(primaries)
                where = url.render_as_string(hide_password=False)
                arguments = where, kind, primary, manager.Barrier(number)
                with ProcessPoolExecutor(number, mp_context=spawn) as pool:
                    started = [pool.submit(rotator, *arguments) for _ in range(number)]
                written, returned, searched = map(
                    sum, zip(*(each.result() for each in started), strict=True)
                )
                searched += read_so_far(engine, delay) - before
                for what, rows in (("returned", returned), ("searched", searched)):
                    each_row = rows / written
                    alone.setdefault(what, each_row or 1)
                    has_goal = what == "returned" and number > 1
                    yield Figure(
                        group=f"{LABELS[kind]}, rows for each row written",
                        name=f"{what}, {number} rotators",
                        ours=each_row,
                        against="one rotator",
                        reference=alone[what],
                        unit="rows",
                        ratio=each_row / alone[what],
                        goal=GOAL if has_goal else None,
                    )
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
