"""Rows per second of a rotation on PostgreSQL by two processes, beside one.

python -m tests.bench.bench_rotation_workers [--smoke]
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial

from sqlalchemy import URL, Engine, create_engine

from sqlalchemy_lucent import rotate, set_default_keyring
from tests.bench.bench_rotation import BY_HAND, KEY_RANGE, fill, table
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_least, in_turns, run_alone
from tests.bench.servers import bench_database, tidy_up
from tests.databases import drop_everything

TITLE = "Rotation: two workers"
ABOUT = """\
Two processes that each call plain `rotate` on one table of PostgreSQL, beside one that does. They
run in turns, and before each turn the table is vacuumed. The processes live for all of the rounds,
so that their start is not in the figures. The server runs on the same cores as the workers, and all
of them write one log: how much two may gain is shown by the hand-written loop (*unnest and the key
range*, above) over the halves of the table in the same two processes, beside the same loop over all
of it in one. The figures are rows a second."""

ROWS = {"small": 320_000, "medium": 120_000}
WORKERS = {"one worker": 1, "two workers": 2}
VARIABLE = "LUCENT_BENCH_URL"


def start_worker(url: str) -> None:
    os.environ[VARIABLE] = url


def connect() -> Engine:
    return create_engine(os.environ[VARIABLE])


def rotator(primary: str) -> int:
    """Rotate as far as others leave something, in a worker; return how much that was."""
    engine = connect()
    report = rotate(engine, table, keyring=KEYS.with_primary(primary))
    engine.dispose()
    assert report.ok
    return report.rotated


def by_hand(first: int, end: int, primary: str) -> None:
    """Re-seal the rows from `first` to before `end`, in a worker."""
    engine = connect()
    BY_HAND["postgresql"][KEY_RANGE](engine, KEYS.with_primary(primary), first, end)
    engine.dispose()


def measure_on(
    engine: Engine, executors: dict[str, Executor], size: str, smoke: bool
) -> Iterator[Figure]:
    rows, rounds = (20, 1) if smoke else (ROWS[size], 3)
    fill(engine, table, "payload", [DOCUMENTS[size](n % 100) for n in range(rows)])
    primaries = itertools.cycle(["v1", "v2"])  # each run turns the values back

    def run(workers: str) -> None:
        primary = next(primaries)
        futures = [executors[workers].submit(rotator, primary) for _ in range(WORKERS[workers])]
        assert sum(future.result() for future in futures) == rows

    def run_by_hand(workers: str) -> None:
        primary = next(primaries)
        step = rows // WORKERS[workers]
        halves = [
            executors[workers].submit(by_hand, first, first + step, primary)
            for first in range(0, rows, step)
        ]
        for half in halves:
            half.result()

    work = {name: partial(run, name) for name in WORKERS}
    work |= {f"by hand, {name}": partial(run_by_hand, name) for name in WORKERS}
    turns = in_turns(
        {name: Contender(each, partial(tidy_up, engine)) for name, each in work.items()}, rounds
    )
    for name, against, goal in (
        ("two workers", "one worker", at_least(1.4)),
        ("by hand, two workers", "by hand, one worker", None),
    ):
        yield Figure(
            group=f"PostgreSQL, {rows:,} {size} documents",
            name=name,
            ours=rows / turns.median(name),
            against=against,
            reference=rows / turns.median(against),
            unit="rows/s",
            ratio=turns.ratio(against, to=name),
            goal=goal,
        )
    drop_everything(engine)


def spawned(workers: int, url: URL) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(url.render_as_string(hide_password=False),),
    )


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    with bench_database("postgresql") as url, ExitStack() as stack:
        executors: dict[str, Executor] = {
            name: stack.enter_context(spawned(workers, url)) for name, workers in WORKERS.items()
        }
        engine = create_engine(url)
        for size in ROWS:
            yield from measure_on(engine, executors, size, smoke)
        engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
