"""A sealed column beside plain ones: the same rows, written and read in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from tests.bench.documents import DOCUMENTS
from tests.bench.measure import Contender, Figure, Goal, in_turns
from tests.bench.tables import (
    MODELS,
    Database,
    Document,
    add_entities,
    empty,
    insert_rows,
    select_entities,
    select_rows,
)

Goals = Mapping[tuple[str, str], Goal]
"""By size of the document, and by what is done."""


def compare_core(
    database: Database,
    size: str,
    *,
    group: str,
    rows: int,
    rounds: int,
    beside: Sequence[str],
    goals: Goals,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Figure]:
    """Insert and select in Core."""
    values = [{"id": n, "payload": DOCUMENTS[size](n)} for n in range(rows)]
    kinds = {name: MODELS[name] for name in (*beside, "floor", "ours")}
    inserts = {
        name: Contender(
            partial(insert_rows, database, kind, values), partial(empty, database, kind)
        )
        for name, kind in kinds.items()
    }
    yield from _timed("insert", inserts, size, group, rows, rounds, goals, clock)
    for kind in kinds.values():
        assert len(select_rows(database, kind)) == rows
    selects = {
        name: Contender(partial(select_rows, database, kind)) for name, kind in kinds.items()
    }
    yield from _timed("select", selects, size, group, rows, rounds, goals, clock)
    for kind in kinds.values():
        empty(database, kind)


def compare_orm(
    database: Database,
    size: str,
    *,
    group: str,
    rows: int,
    rounds: int,
    beside: Sequence[str],
    goals: Goals,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Figure]:
    """Add entities and commit; select them opened, and select them left sealed."""
    documents = [DOCUMENTS[size](n) for n in range(rows)]
    kinds = {name: MODELS[name] for name in (*beside, "floor", "ours", "ours, lazy")}

    def adding(name: str) -> Contender:
        entities: list[Document] = []

        def before() -> None:
            empty(database, kinds[name])
            entities[:] = [kinds[name](id=n, payload=each) for n, each in enumerate(documents)]

        return Contender(lambda: add_entities(database, entities), before)

    adds = {name: adding(name) for name in kinds if name != "ours, lazy"}
    yield from _timed("add", adds, size, group, rows, rounds, goals, clock)
    lazy = adding("ours, lazy")
    assert lazy.before is not None
    lazy.before()
    lazy.work()
    selects = {
        name: Contender(partial(select_entities, database, kind)) for name, kind in kinds.items()
    }
    yield from _timed("select entities", selects, size, group, rows, rounds, goals, clock)
    for kind in kinds.values():
        empty(database, kind)


_WORDS = {
    "insert": "Core insert",
    "select": "Core select",
    "add": "ORM `add_all`, commit",
    "select entities": "ORM select",
    "lazy": "ORM select, lazy",
}


def _timed(
    what: str,
    contenders: Mapping[str, Contender],
    size: str,
    group: str,
    rows: int,
    rounds: int,
    goals: Goals,
    clock: Callable[[], float],
) -> Iterator[Figure]:
    turns = in_turns(contenders, rounds, clock=clock)
    for mine in (name for name in contenders if name.startswith("ours")):
        done = "lazy" if mine == "ours, lazy" else what
        for theirs in (name for name in contenders if name.startswith("JSON")):
            yield Figure(
                group=group,
                name=_WORDS[done],
                ours=turns.median(mine) * 1e6 / rows,
                against=theirs,
                reference=turns.median(theirs) * 1e6 / rows,
                unit="µs a row",
                ratio=turns.ratio(mine, to=theirs),
                # Leaving a value sealed is less than opening it, which is what the floor does.
                floor=None if done == "lazy" else turns.ratio("floor", to=theirs),
                goal=goals.get((size, done)),
                rows=rows,
            )
