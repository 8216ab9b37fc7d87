"""Timing in turns, and the figures that come of it."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy_lucent import Keyring

KEYS = Keyring({"v1": bytes(range(32)), "v2": bytes(range(32, 64))}, primary="v2")
"""Every benchmark has two keys, as a process does during a rotation."""


class Goal(NamedTuple):
    """What a ratio should be: at most, or at least, `bound`."""

    at_most: bool
    bound: float

    def met_by(self, ratio: float) -> bool:
        """Say whether `ratio`, rounded as it is printed, meets the goal."""
        ratio = round(ratio, 2)
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def at_most(bound: float) -> Goal:
    return Goal(True, bound)


def at_least(bound: float) -> Goal:
    return Goal(False, bound)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measurement of ours beside one of something else, both in `unit`."""

    group: str
    name: str
    ours: float
    against: str
    reference: float
    unit: str
    ratio: float
    goal: Goal | None = None
    rows: int = 0

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met_by(self.ratio)


class Contender(NamedTuple):
    """Work to time, and what to do before each time."""

    work: Callable[[], object]
    before: Callable[[], object] | None = None


class Turns:
    """The seconds that each contender took in each round."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self._seconds = seconds

    def median(self, name: str) -> float:
        return statistics.median(self._seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median of the ratios of the rounds."""
        pairs = zip(self._seconds[name], self._seconds[to], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def figure(
        self, group: str, name: str, ours: str, against: str, *, per: int, goal: Goal | None = None
    ) -> Figure:
        """Return µs for each of `per` things; the ratio is ours to theirs, so less is quicker."""
        return Figure(
            group=group,
            name=name,
            ours=self.median(ours) * 1e6 / per,
            against=against,
            reference=self.median(against) * 1e6 / per,
            unit="µs",
            ratio=self.ratio(ours, to=against),
            goal=goal,
            rows=per,
        )

    def rate(
        self, group: str, name: str, ours: str, against: str, *, rows: int, goal: Goal | None = None
    ) -> Figure:
        """Return rows a second; the ratio says how many times quicker ours is."""
        return Figure(
            group=group,
            name=name,
            ours=rows / self.median(ours),
            against=against,
            reference=rows / self.median(against),
            unit="rows/s",
            ratio=self.ratio(against, to=ours),
            goal=goal,
            rows=rows,
        )


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Have the garbage collector ignore what is there, as a server does after its start.

    Otherwise a few more objects would decide in whose turn it walks the heap of the process.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def in_turns(
    contenders: Mapping[str, Contender | Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    collect: bool = True,
    warm_up: int = 1,
) -> Turns:
    """Time the contenders one after the other, round by round, every second round backwards.

    `clock` is wall time, or `time.thread_time` for work that never waits and stays in this thread.
    With `collect`, garbage is collected before each turn. Rounds of `warm_up` are not counted. A
    single round is a smoke run, whose times mean nothing.
    """
    is_smoke = rounds == 1
    if is_smoke:
        collect, warm_up = False, 0
    order = [
        (name, each if isinstance(each, Contender) else Contender(each))
        for name, each in contenders.items()
    ]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with nullcontext() if is_smoke else frozen_heap():
        for number in range(-warm_up, rounds):
            for name, contender in order:
                if contender.before is not None:
                    contender.before()
                if collect:
                    gc.collect()
                begin = clock()
                result = contender.work()
                taken = clock() - begin
                del result  # freeing memory is not timed
                if number >= 0:
                    seconds[name].append(taken)
            order.reverse()
    return Turns(seconds)


def table_of(figures: Iterable[Figure]) -> Iterator[str]:
    """Give the figures as the lines of Markdown tables, one for each group."""
    group = None
    for figure in figures:
        if figure.group != group:
            group = figure.group
            yield from ("", f"**{group}**", "")
            yield from ("| | ours | beside | theirs | ratio | goal |", "|---|--:|---|--:|--:|---|")
        goal = f"{figure.goal}: {'met' if figure.met else 'missed'}" if figure.goal else ""
        yield (
            f"| {figure.name} | {number(figure.ours)} {figure.unit} | {figure.against} "
            f"| {number(figure.reference)} {figure.unit} | {figure.ratio:.2f} | {goal} |"
        )


def number(value: float) -> str:
    """Return three significant digits; more would be noise."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def run_alone(measure: Callable[[bool], Iterable[Figure]]) -> None:
    """Run one module's benchmark from the command line, and print its tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    for line in table_of(measure(parser.parse_args().smoke)):
        print(line, flush=True)
