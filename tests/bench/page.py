"""The page of the benchmarks: every number on it comes from the run that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from tests.bench import (
    bench_codec,
    bench_core,
    bench_databases,
    bench_growth,
    bench_import,
    bench_memory,
    bench_orm,
    bench_repository,
    bench_rotation,
    bench_swap,
    bench_toast,
    plots,
)
from tests.bench.machine import description
from tests.bench.measure import Figure, table_of


class Bench(Protocol):
    """What each module of a benchmark has."""

    TITLE: str
    ABOUT: str

    def measure(self, smoke: bool = False) -> Iterable[Figure]:
        """Give the figures."""


BENCHES: dict[str, Bench] = {
    name: cast("Bench", module)
    for name, module in {
        "codec": bench_codec,
        "core": bench_core,
        "orm": bench_orm,
        "databases": bench_databases,
        "repository": bench_repository,
        "rotation": bench_rotation,
        "swap": bench_swap,
        "toast": bench_toast,
        "memory": bench_memory,
        "import": bench_import,
        "growth": bench_growth,
    }.items()
}


class Plot(NamedTuple):
    """A drawing of a benchmark's figures, and what it shows in words."""

    file: str
    shows: str
    draw: Callable[[Sequence[Figure], Path], None]


PLOTS = {
    "codec": Plot("bench-peers.svg", "Microseconds to seal and to open a value", plots.draw_peers),
    "rotation": Plot(
        "bench-rotation.svg", "Rows a second re-encrypted, small documents", plots.draw_rotation
    ),
    "growth": Plot(
        "bench-growth.svg", "Microseconds a row over the size of the table", plots.draw_growth
    ),
}


class Result(NamedTuple):
    """The figures of one benchmark, and the seconds that it took."""

    name: str
    figures: list[Figure]
    seconds: float


INTRODUCTION = """\
# Benchmarks

What encryption costs here, beside the same work without it, beside the bare cipher and beside other
libraries. `make bench` runs all of it and writes this page; `python -m tests.bench.bench_core` runs
one part and prints its tables.

## How it is measured

What is compared runs in turns in one process: A, B, then B, A, and so on, so that both meet the
same machine. Each number is the median of the rounds. A **ratio** is the median of the ratios of
the rounds, which is not quite the ratio of the two medians beside it. It is the time of ours to the
time of theirs, so that less than 1 is quicker, where the goal says "at most"; and how many times
quicker ours is, so that more than 1 is quicker, where it says "at least" (other libraries,
rotation) and in rows a second.

The **floor** is the ratio of the least that could be done, where there is one to compare: the
contract's work (a strict document, sealed for its column, opened by the key of its header, given
back redacted) in one function with one key, as a column type of its own. Where the floor misses a
goal too, no code of ours can meet it on that machine; the distance from the floor to ours is what
the layers of the library and the look-up of the keyring cost. Two profiles take it apart:
*where the rest goes*, for one value, and *Python's calls*, for the repository.

A first round is not counted (three of them for single values). Python's garbage collector is on, as
in an application, and has run before each turn of more than a few milliseconds; what was on the
heap before is frozen (`gc.freeze`), so that nobody's turn pays for looking through it. What is all
done in one thread and waits for nothing (one value, SQLite in memory, imports) is measured in
processor time, everything else in wall time. The keyring has two keys, is the process's default
one, and is looked up for each value. Times belong to the machine below; ratios carry over to others
better, but measure on yours.
"""


def write_page(results: Sequence[Result], folder: Path) -> Path:
    """Write the page and its drawings into `folder`, and return the page's path."""
    drawings = folder / "_static"
    drawings.mkdir(exist_ok=True)
    for result in results:
        if plot := PLOTS.get(result.name):
            plot.draw(result.figures, drawings / plot.file)
    page = folder / "benchmarks.md"
    page.write_text("\n".join(_lines(results)) + "\n", encoding="utf-8")
    return page


def _lines(results: Sequence[Result]) -> Iterator[str]:
    yield INTRODUCTION
    yield from ("| Measured | on |", "|---|---|")
    now = datetime.now(UTC)
    minutes = sum(result.seconds for result in results) / 60
    yield f"| Day | {now:%Y-%m-%d}, {minutes:.0f} minutes in all |"
    for name, value in description().items():
        yield f"| {name} | {value} |"
    yield from _goals(results)
    for result in results:
        bench = BENCHES[result.name]
        yield from ("", f"## {bench.TITLE}", "", bench.ABOUT, "")
        if plot := PLOTS.get(result.name):
            yield from (f"![{plot.shows}](_static/{plot.file})", "")
        yield from table_of(result.figures)


def _goals(results: Sequence[Result]) -> Iterator[str]:
    yield from ("", "## Goals", "")
    yield from (
        "| Part | goals | met | missed by the floor too | furthest from its goal |",
        "|---|--:|--:|--:|---|",
    )
    for result in results:
        missed = {
            figure: figure.goal.distance(figure.ratio)
            for figure in result.figures
            if figure.goal is not None
        }
        title = BENCHES[result.name].TITLE
        met = sum(figure.met is True for figure in missed)
        too = sum(figure.met is False and figure.out_of_reach for figure in missed)
        line = f"| [{title}](#{_anchor(title)}) | {len(missed)} | {met} | {too} |"
        worst = max(missed, key=lambda figure: missed[figure], default=None)
        if worst is not None:
            line += f" {worst.group}: {worst.name} beside {worst.against}, "
            line += f"{worst.form.format(worst.ratio)} ({worst.goal})"
        yield f"{line} |"
    yield from ("", "**Missed, though the floor would meet it, or none is known**", "")
    yield from ("| Part | figure | ratio | floor | goal |", "|---|---|--:|--:|---|")
    for result in results:
        title = BENCHES[result.name].TITLE
        for figure in result.figures:
            if figure.met is False and not figure.out_of_reach:
                floor = "" if figure.floor is None else figure.form.format(figure.floor)
                yield (
                    f"| [{title}](#{_anchor(title)}) "
                    f"| {figure.group}: {figure.name} beside {figure.against} "
                    f"| {figure.form.format(figure.ratio)} | {floor} | {figure.goal} |"
                )


def _anchor(title: str) -> str:
    kept = "".join(each for each in title.lower() if each.isalnum() or each in "_- ")
    return kept.replace(" ", "-")
