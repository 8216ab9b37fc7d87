"""Rows per second of a rotation on PostgreSQL by two spawned workers, beside one and beside none.

python -m tests.bench.bench_rotation_workers [--smoke]

What a worker does for each range (a task to unpickle, a connection, the compiling of its
statements) is measured with it, and so are the statements that cut the table and the count that
ends a run.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial

from sqlalchemy import URL, Engine, create_engine

from sqlalchemy_lucent import Keyring, RotationReport, rotate, set_default_keyring
from tests.bench.bench_rotation import BY_HAND, KEY_RANGE, fill, table
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_least, in_turns, run_alone
from tests.bench.servers import bench_database, tidy_up
from tests.databases import drop_everything

TITLE = "Rotation: two workers"
ABOUT = """\
`rotate` on PostgreSQL with `executor=` a `ProcessPoolExecutor` of two spawned processes. *One
worker* is an executor of one process, which does the same as each of the two; *alone* is `rotate`
without an executor. They run in turns on one table, with the default batches and ranges, and
before each turn the table is vacuumed. The processes live for all of the rounds, so that their
start is not in the figures. The server runs on the same cores as the workers, and all of them write
one log: how much two may gain is shown by the hand-written loop (*unnest and the key range*, above)
over the halves of the table in the same two processes, beside the same loop over all of it in one.
What an executor costs beside none is the look for where to cut the table, a connection for each
range, and its statements to be compiled. The figures are rows a second."""

ROWS = {"small": 320_000, "medium": 120_000}
WORKERS = {"one worker": 1, "two workers": 2}
VARIABLE = "LUCENT_BENCH_URL"


def start_worker(url: str) -> None:
    os.environ[VARIABLE] = url


def connect() -> Engine:
    return create_engine(os.environ[VARIABLE])


def to_v1() -> Keyring:
    return KEYS.with_primary("v1")


def to_v2() -> Keyring:
    return KEYS


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
    # Each run turns the values back under the other key.
    keyrings = itertools.cycle([to_v1, to_v2])

    def run(rotation: Callable[..., RotationReport]) -> None:
        report = rotation(engine, table, keyring=next(keyrings))
        assert (report.ok, report.rotated, report.taken_over) == (True, rows, ())

    rotations: dict[str, Callable[..., RotationReport]] = {"alone": rotate}
    for name, executor in executors.items():
        # So few rows would be one range, which no worker gets.
        ranges = 2 if smoke else None
        rotations[name] = partial(rotate, executor=executor, connect=connect, ranges=ranges)

    def run_by_hand(workers: str) -> None:
        primary = next(keyrings)().primary
        step = rows // WORKERS[workers]
        halves = [
            executors[workers].submit(by_hand, first, first + step, primary)
            for first in range(0, rows, step)
        ]
        for half in halves:
            half.result()

    work = {name: partial(run, rotation) for name, rotation in rotations.items()}
    work |= {f"by hand, {name}": partial(run_by_hand, name) for name in WORKERS}
    turns = in_turns(
        {name: Contender(each, partial(tidy_up, engine)) for name, each in work.items()}, rounds
    )
    for name, against, goal in (
        ("two workers", "one worker", at_least(1.4)),
        ("two workers", "alone", None),
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
