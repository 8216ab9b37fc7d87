"""Every benchmark runs on tiny sizes, and the page holds every figure. No time is asserted."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest

# Both are in the dependency group `bench` alone, which the oldest versions are tested without.
pytest.importorskip("matplotlib")
pytest.importorskip("sqlalchemy_encrypted_field")

with warnings.catch_warnings():
    # advanced-alchemy uses what SQLAlchemy 2.1 has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from tests.bench import bench_check, bench_codec, bench_growth, bench_rotation_workers
    from tests.bench.page import BENCHES, PLOTS, Result, write_page

FIGURES = {
    "codec": 2 * 3 * 4 + 3 * 2 * 3 + 2 * 2 * 5,
    "core": 2 * 2,
    "orm": 2 * 3,
    "databases": 2 * 5 * (3 * 2 + 2),
    "repository": 4 * 2 * 4 + 2,
    "rotation": 2 * (3 + 6 + 4 + 3 * 3),
    "swap": 3 * 2,
    "toast": 3,
    "memory": 2 + 2,
    "import": 2 * 2 + 1,
    "growth": 2 * 8,
}
"""How many each gives: on databases, sizes and kinds of work."""


@pytest.mark.slow
def test_every_benchmark_runs_and_the_page_holds_every_figure(tmp_path: Path) -> None:
    results = []
    for name, bench in BENCHES.items():
        figures = list(bench.measure(smoke=True))
        assert len(figures) == FIGURES[name], name
        assert len({(each.group, each.name, each.against) for each in figures}) == len(figures)
        assert all(math.isfinite(each.ours) and math.isfinite(each.ratio) for each in figures)
        results.append(Result(name, figures, seconds=0))
    page = write_page(results, tmp_path).read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 9]
    assert len(rows) == sum(FIGURES.values()) + page.count("| | ours |")
    for bench in BENCHES.values():
        assert f"## {bench.TITLE}\n" in page
    for plot in PLOTS.values():
        assert f"](_static/{plot.file})" in page
        assert (tmp_path / "_static" / plot.file).stat().st_size > 1000


@pytest.mark.slow
def test_the_benchmarks_that_the_page_does_not_have_run() -> None:
    assert len(list(bench_check.measure(smoke=True))) == 3 * 2 * 2
    assert len(list(bench_codec.measure_unusual(smoke=True))) == 3 * 4
    assert len(list(bench_rotation_workers.measure(smoke=True))) == 2 * 2


def test_the_page_in_the_documentation_is_of_these_benchmarks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text("utf-8")
    for bench in BENCHES.values():
        assert f"## {bench.TITLE}\n\n{bench.ABOUT}\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 9]
    grown = (len(bench_growth.SIZES) - 2) * FIGURES["growth"] // 2
    assert len(rows) == sum(FIGURES.values()) + grown + page.count("| | ours |")
