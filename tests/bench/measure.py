"""Timing in turns, and the figures that come of it."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy_lucent import Keyring

KEYS = Keyring({"v1": bytes(range(32)), "v2": bytes(range(32, 64))}, primary="v2")
"""Every benchmark has two keys, as a process does while a rotation is on its way."""


class Goal(NamedTuple):
    """What a ratio should be: at most, or at least, `bound`."""

    at_most: bool
    bound: float

    def met_by(self, ratio: float) -> bool:
        """Say whether `ratio` meets the goal, with the two digits that both are given with."""
        ratio = round(ratio, 2)
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def distance(self, ratio: float) -> float:
        """How many times the bound is missed; below 1 it is met with something to spare."""
        return (ratio + 1e-9) / (self.bound + 1e-9) if self.at_most else self.bound / ratio

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def at_most(bound: float) -> Goal:
    return Goal(True, bound)


def at_least(bound: float) -> Goal:
    return Goal(False, bound)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measurement of ours beside one of something else.

    `ours` and `reference` are in `unit`. `ratio` is what the goal is about, and `form` prints it.
    `floor` is the ratio of the floor to the same reference: what cannot be done for less.
    """

    group: str
    name: str
    ours: float
    against: str
    reference: float
    unit: str
    ratio: float
    floor: float | None = None
    goal: Goal | None = None
    form: str = "{:.2f}"
    rows: int = 0

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met_by(self.ratio)

    @property
    def out_of_reach(self) -> bool:
        """Whether the floor misses the goal too."""
        return self.goal is not None and self.floor is not None and not self.goal.met_by(self.floor)


class Contender(NamedTuple):
    """Work to be timed, and what must be done before each time."""

    work: Callable[[], object]
    before: Callable[[], object] | None = None


class Turns:
    """The seconds that each contender took in each round."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self._seconds = seconds
        self.names = tuple(seconds)

    def median(self, name: str) -> float:
        return statistics.median(self._seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median of the ratios of the rounds."""
        return statistics.median(
            mine / theirs
            for mine, theirs in zip(self._seconds[name], self._seconds[to], strict=True)
        )

    def difference(self, name: str, to: str) -> float:
        """The median of the differences of the rounds, in seconds."""
        return statistics.median(
            mine - theirs
            for mine, theirs in zip(self._seconds[name], self._seconds[to], strict=True)
        )


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Have the garbage collector leave alone what is there, as a server does after its start.

    Else a few objects more would decide whether it looks through the whole heap of the process,
    with all of its modules, once more in a contender's turn.
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
    """Time the contenders one after the other, round by round.

    `clock` is wall time, or `time.thread_time` for work that waits for nothing and is all done in
    this thread: what else the machine does then does not count.

    Every second round goes backwards, so that none always follows the same other one. The garbage
    collector is on, as it is in an application; with `collect` it has run before each turn, so that
    none pays for another's garbage. Rounds of `warm_up` are not counted. A single round is a smoke
    run, whose times mean nothing: nothing is warmed up or collected.
    """
    if rounds == 1:
        collect, warm_up = False, 0
    order = [
        (name, each if isinstance(each, Contender) else Contender(each))
        for name, each in contenders.items()
    ]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with frozen_heap():
        for number in range(-warm_up, rounds):
            for name, contender in order:
                if contender.before is not None:
                    contender.before()
                if collect:
                    gc.collect()
                begin = clock()
                result = contender.work()
                taken = clock() - begin
                del result  # giving memory back is not timed
                if number >= 0:
                    seconds[name].append(taken)
            order.reverse()
    return Turns(seconds)


_MET = {None: "", True: "yes", False: "no"}


def table_of(figures: Iterable[Figure]) -> list[str]:
    """Return the figures as the lines of Markdown tables, one for each group."""
    lines: list[str] = []
    group = None
    for figure in figures:
        if figure.group != group:
            group = figure.group
            lines += [
                *([""] if lines else []),
                f"**{group}**",
                "",
                "| | ours | beside | theirs | ratio | floor | goal | met |",
                "|---|--:|---|--:|--:|--:|---|---|",
            ]
        lines.append(
            f"| {figure.name} | {_number(figure.ours)} {figure.unit} | {figure.against} "
            f"| {_number(figure.reference)} {figure.unit} | {figure.form.format(figure.ratio)} "
            f"| {'' if figure.floor is None else figure.form.format(figure.floor)} "
            f"| {figure.goal or ''} | {_MET[figure.met]} |"
        )
    return lines


def _number(value: float) -> str:
    # Three digits that count; more would be noise.
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def run_alone(measure: Callable[[bool], Iterable[Figure]]) -> None:
    """Run one module's benchmark from the command line, and print its tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    print("\n".join(table_of(measure(parser.parse_args().smoke))))
