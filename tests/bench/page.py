"""The generated parts of ``docs/benchmarks.md``, and the file with every figure."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sqlite3
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, cast

from sqlalchemy import create_engine, text

from tests.bench import (
    bench_check,
    bench_codec,
    bench_columns,
    bench_fence,
    bench_growth,
    bench_import,
    bench_memory,
    bench_repository,
    bench_rotation,
    bench_rotators,
    bench_swap,
    bench_toast,
    plots,
)
from tests.bench.measure import Figure, number, table_of
from tests.bench.servers import bench_database


class Bench(Protocol):
    """What each module of a benchmark has."""

    TITLE: str
    ABOUT: str

    def measure(self, smoke: bool = False) -> Iterable[Figure]:
        """Give the figures."""


BENCHES: dict[str, Bench] = {
    module.__name__.rpartition("bench_")[2]: cast("Bench", module)
    for module in (
        bench_columns,
        bench_repository,
        bench_rotation,
        bench_rotators,
        bench_codec,
        bench_check,
        bench_fence,
        bench_swap,
        bench_toast,
        bench_memory,
        bench_import,
        bench_growth,
    )
}

PLOTS: dict[str, tuple[str, Callable[[Sequence[Figure], Path], None]]] = {
    "codec": ("bench-peers.svg", plots.draw_peers),
    "rotation": ("bench-rotation.svg", plots.draw_rotation),
    "growth": ("bench-growth.svg", plots.draw_growth),
}

Results = Mapping[str, Sequence[Figure]]

LEFT_OUT = "psycopg async"
"""The driver that the page leaves out, because it is as quick as psycopg."""

PACKAGES = (
    *("sqlalchemy-lucent", "SQLAlchemy", "cryptography", "orjson", "msgspec", "ormsgpack"),
    *("psycopg", "asyncpg", "PyMySQL", "asyncmy"),
)


def write_details(results: Results, folder: Path) -> Path:
    """Write every figure, and the drawings, into `folder`; return the file with the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, draw) in PLOTS.items():
        if name in results:
            draw(results[name], folder / file)
    lines = ["# Every figure", "", *machine()]
    for name, figures in results.items():
        lines += ["", f"## {BENCHES[name].TITLE}", "", BENCHES[name].ABOUT, *table_of(figures)]
    details = folder / "figures.md"
    details.write_text("\n".join(lines) + "\n", "utf-8")
    return details


def update_page(page: Path, results: Results) -> None:
    """Replace what stands in `page` between ``<!-- NAME -->`` and ``<!-- end -->``."""
    parts: dict[str, Iterable[str]] = {
        "machine": machine(PACKAGES[:2]),
        "columns": columns_table(results["columns"]),
        "repository": repository_table(results["repository"]),
        "rotation": rotation_table(results["rotation"]),
        "swap": swap_sentence(results["swap"]),
    }
    content = page.read_text("utf-8")
    for name, lines in parts.items():
        before, mark, rest = content.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert mark, name
        short = (textwrap.fill(each, 98) if each[:1] != "|" else each for each in lines)
        content = "\n".join((f"{before}{mark}", *short, "", f"{end}{after}"))
    page.write_text(content, "utf-8")


def columns_table(figures: Sequence[Figure]) -> Iterator[str]:
    """One line for each driver and size: microseconds a row, and the ratio to plain JSON."""
    beside_json = [
        each for each in figures if each.against == "JSON" and LEFT_OUT not in each.group
    ]
    yield from pivot(beside_json, lambda each: f"{number(each.ours)} ({each.ratio:.2f})")
    yield from met(figures)


def repository_table(figures: Sequence[Figure]) -> Iterator[str]:
    """One line for each driver and size: microseconds a call, and the ratio to plain JSON."""
    with_goals = [each for each in figures if each.goal is not None]
    yield from pivot(with_goals, lambda each: f"{number(each.ours)} ({each.ratio:.2f})")
    yield from met(figures)


def rotation_table(figures: Sequence[Figure]) -> Iterator[str]:
    """One line for each database and size: rows a second."""
    yield "| rows per second | `rotate` | fastest by hand | sqlalchemy-utils | MultiFernet |"
    yield "|---|--:|--:|--:|--:|"
    for group in dict.fromkeys(each.group for each in figures):
        quickest, *others = (each for each in figures if each.group == group)
        peers = {each.against: number(each.reference) for each in others}
        yield (
            f"| {group} | {number(quickest.ours)} | {number(quickest.reference)} "
            f"| {peers['sqlalchemy-utils']} | {peers['MultiFernet']} |"
        )
    yield from met(figures)


def pivot(figures: Sequence[Figure], cell: Callable[[Figure], str]) -> Iterator[str]:
    """Give a table with a line for each group and a column for each name."""
    names = list(dict.fromkeys(each.name for each in figures))
    yield f"| µs (ratio) | {' | '.join(names)} |"
    yield f"|---|{'--:|' * len(names)}"
    for group in dict.fromkeys(each.group for each in figures):
        cells = {each.name: cell(each) for each in figures if each.group == group}
        yield f"| {group} | {' | '.join(cells[name] for name in names)} |"


def met(figures: Sequence[Figure]) -> Iterator[str]:
    """Say how many goals were met."""
    goals = [each for each in figures if each.goal is not None]
    yield from ("", f"Goals met: {sum(each.met is True for each in goals)} of {len(goals)}.")


def swap_sentence(figures: Sequence[Figure]) -> Iterator[str]:
    """Say how long `op.encrypt_column` holds its lock, for small and for medium documents."""
    spans: dict[str, list[str]] = {}
    for each in figures:
        spans.setdefault(each.name.partition(",")[0], []).append(number(each.ours))
    held = [f"{' to '.join(span)} on {database}" for database, span in spans.items()]
    yield ""
    yield (
        "`op.encrypt_column` holds its lock for so many microseconds per row, small to medium: "
        f"{', '.join(held)}."
    )


def machine(packages: Iterable[str] = PACKAGES) -> Iterator[str]:
    """Say where and when it was measured, and with which versions."""
    memory = int(_first(r"^MemTotal: *(\d+) kB$", "/proc/meminfo") or 0) / 2**20
    system = _first(r'^PRETTY_NAME="(.*)"$', "/etc/os-release")
    processor = _first(r"^model name\s*: (.*)$", "/proc/cpuinfo")
    yield (
        f"{datetime.now(UTC):%Y-%m-%d}; {processor}, {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"{system}; {', '.join(_versions(packages))}."
    )


def _versions(packages: Iterable[str]) -> Iterator[str]:
    yield f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    yield f"SQLite {sqlite3.sqlite_version}"
    for kind, what in (("postgresql", "SHOW server_version"), ("mysql", "SELECT version()")):
        with bench_database(kind) as url:
            engine = create_engine(url)
            with engine.connect() as connection:
                version = str(connection.execute(text(what)).scalar_one())
            engine.dispose()
        yield version if "Maria" in version else f"{kind.title()} {version}"
    for name in packages:
        yield f"{name} {importlib.metadata.version(name)}"


def _first(pattern: str, file: str) -> str | None:
    path = Path(file)
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else None
