"""Time per row of a table that grows from 10 thousand rows to a million.

python -m tests.bench.bench_growth [--smoke]
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from sqlalchemy import URL, Engine, Table, create_engine, insert, select
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    LucentBase,
    LucentSecrets,
    SecretKey,
    rotate,
    set_default_keyring,
    status,
)
from tests.bench.bench_columns import MODELS, Base, table
from tests.bench.documents import small
from tests.bench.measure import KEYS, Figure, at_most, frozen_heap, run_alone
from tests.bench.servers import bench_database

TITLE = "Growth"
ABOUT = """\
On SQLite in a file, with small documents. Rows are inserted 10,000 at a time and selected as a
stream; secrets are stored with `set_many`, 1,000 at a time, and listed with `list(limit=100)` at
100 places of the table; `rotate` and `status` go over the whole table. The ratio is the time per
row to the time per row at 10,000 rows, so 1 is flat. A plain JSON column grows beside it."""

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
FLAT = at_most(1.25)
AT_ONCE = 10_000
PLAIN_JSON = "plain JSON: "
PAGE = 100
PAGES = 100
DISTINCT = [small(number) for number in range(1000)]


def key(number: int) -> SecretKey:
    return SecretKey("tenant", f"tenant_{number:08}", "stripe", "apiKey")


def insert_all(engine: Engine, into: Table, rows: int) -> None:
    for first in range(0, rows, AT_ONCE):
        values = [
            {"id": n, "payload": DISTINCT[n % 1000]}
            for n in range(first, min(first + AT_ONCE, rows))
        ]
        with engine.begin() as connection:
            connection.execute(insert(into), values)


def stream(engine: Engine, of: Table) -> int:
    with engine.connect() as connection:
        result = connection.execution_options(yield_per=AT_ONCE).execute(select(of))
        return sum(len(part) for part in result.partitions())


def set_all(engine: Engine, rows: int) -> None:
    for first in range(0, rows, 1000):
        values = {key(n): DISTINCT[n % 1000] for n in range(first, min(first + 1000, rows))}
        with Session(engine) as session, session.begin():
            LucentSecrets(session).set_many(values)


def list_pages(engine: Engine, rows: int) -> None:
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        for page in range(PAGES):
            after = key(page * (rows // PAGES))
            assert secrets.list(limit=PAGE, after=after)


def timed(work: Callable[[], object]) -> float:
    gc.collect()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure_at(url: URL, rows: int, repeats: int) -> dict[str, float]:
    """Return the seconds per row of everything, on tables of `rows` rows."""
    engine = create_engine(url)
    sealed, plain = (table(MODELS[name]) for name in ("ours", "JSON"))
    taken: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object], per: int = rows) -> None:
        engine.dispose()  # a new connection, whose cache is empty
        taken.setdefault(name, []).append(timed(work) / per)

    def rotate_all(keyring: Any) -> None:
        assert rotate(engine, sealed, keyring=keyring).rotated == rows

    def one_by_one() -> None:
        for metadata in (Base.metadata, LucentBase.metadata):
            metadata.drop_all(engine)
            metadata.create_all(engine)
        note("insert", lambda: insert_all(engine, sealed, rows))
        note(f"{PLAIN_JSON}insert", lambda: insert_all(engine, plain, rows))
        note("select", lambda: stream(engine, sealed))
        note(f"{PLAIN_JSON}select", lambda: stream(engine, plain))
        note("set_many", lambda: set_all(engine, rows))
        note("list, a page of 100", lambda: list_pages(engine, rows), PAGES * PAGE)
        note("rotate", lambda: rotate_all(KEYS.with_primary("v1")))
        note("status", lambda: status(engine, sealed))

    with frozen_heap() if rows > 1000 else nullcontext():
        for _ in range(repeats):
            one_by_one()
    engine.dispose()
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    sizes = (200, 400) if smoke else SIZES
    taken: dict[int, dict[str, float]] = {}
    for rows in sizes:
        with bench_database("sqlite") as url:
            taken[rows] = measure_at(url, rows, 1 if smoke else max(1, 100_000 // rows))
    first = taken[sizes[0]]
    for name, at_first in first.items():
        for rows in sizes:
            yield Figure(
                group=name,
                name=f"{rows:,} rows",
                ours=taken[rows][name] * 1e6,
                against=f"{sizes[0]:,} rows",
                reference=at_first * 1e6,
                unit="µs",
                ratio=taken[rows][name] / at_first,
                goal=None if rows == sizes[0] or name.startswith(PLAIN_JSON) else FLAT,
                rows=rows,
            )


if __name__ == "__main__":
    run_alone(measure)
