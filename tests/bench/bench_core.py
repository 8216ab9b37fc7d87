"""Bulk inserts and selects in SQLAlchemy Core on SQLite, beside a plain JSON column.

python -m tests.bench.bench_core [--smoke]
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy_lucent import set_default_keyring
from tests.bench.compare import compare_core
from tests.bench.measure import KEYS, Figure, at_most, run_alone
from tests.bench.tables import opened

TITLE = "Core, on SQLite"
ABOUT = """\
One `connection.execute(insert(table), rows)` in a transaction, and one
`connection.execute(select(table)).all()`, against the same table with a `sqlalchemy.JSON` column.
SQLite is in memory, where the database costs least and the difference between the columns shows
most."""

ROWS = {"small": 20_000, "medium": 10_000}
GOALS = {
    ("small", "insert"): at_most(0.97),
    ("small", "select"): at_most(0.90),
    ("medium", "insert"): at_most(0.65),
    ("medium", "select"): at_most(0.75),
}


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    with opened("sqlite://") as database:
        for size, rows in ROWS.items():
            yield from compare_core(
                database,
                size,
                group=f"{rows:,} {size} rows",
                rows=30 if smoke else rows,
                rounds=1 if smoke else 9,
                beside=["JSON"],
                goals=GOALS,
                clock=time.thread_time,
            )


if __name__ == "__main__":
    run_alone(measure)
