"""Entities added and selected on SQLite, beside a plain JSON column.

python -m tests.bench.bench_orm [--smoke]
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy_lucent import set_default_keyring
from tests.bench.compare import compare_orm
from tests.bench.measure import KEYS, Figure, at_most, run_alone
from tests.bench.tables import opened

TITLE = "ORM, on SQLite"
ABOUT = """\
`session.add_all(entities)` with `session.commit()`, and `session.scalars(select(Model)).all()` in
a new session, against the same model with a `sqlalchemy.JSON` column. The entities are made before
the clock starts. *Lazy* is `EncryptedJSON(lazy=True)`, whose values are left sealed."""

ROWS = 10_000
GOALS = {
    ("small", "add"): at_most(1.02),
    ("small", "select entities"): at_most(1.02),
    ("medium", "add"): at_most(0.95),
    ("medium", "select entities"): at_most(0.95),
    ("medium", "lazy"): at_most(0.60),
}


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    with opened("sqlite://") as database:
        for size in ("small", "medium"):
            yield from compare_orm(
                database,
                size,
                group=f"{ROWS:,} {size} entities",
                rows=30 if smoke else ROWS,
                rounds=1 if smoke else 7,
                beside=["JSON"],
                goals=GOALS,
                clock=time.thread_time,
            )


if __name__ == "__main__":
    run_alone(measure)
