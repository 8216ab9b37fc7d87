"""Every benchmark runs on tiny sizes, and the page holds its tables. No time is asserted."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest

# Both are in the dependency group `bench` only, which the tests of the oldest versions lack.
pytest.importorskip("matplotlib")
pytest.importorskip("sqlalchemy_encrypted_field")

with warnings.catch_warnings():
    # advanced-alchemy uses what SQLAlchemy 2.1 has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from tests.bench.page import BENCHES, PLOTS, update_page, write_details

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"

FIGURES = {
    "columns": 2 * (5 + 3 * 10 + 3 * 5),
    "repository": 4 * 2 * 5,
    "rotation": 2 * 3 * 5,
    "rotators": 2 * 2,
    "codec": 3 * 2 * 2 + 2 * 2 * 5 + 3 * 4,
    "check": 3 * 2,
    "fence": 3 * 2 * 2,
    "swap": 3 * 2,
    "toast": 3,
    "memory": 1,
    "import": 2,
    "growth": 2 * 8,
}
"""How many each gives: on databases, sizes and kinds of work."""


@pytest.mark.slow
def test_every_benchmark_runs_and_its_figures_are_written(tmp_path: Path) -> None:
    results = {}
    for name, bench in BENCHES.items():
        figures = results[name] = list(bench.measure(smoke=True))
        assert len(figures) == FIGURES[name], name
        assert len({(each.group, each.name, each.against) for each in figures}) == len(figures)
        assert all(math.isfinite(each.ours) and math.isfinite(each.ratio) for each in figures)
    details = write_details(results, tmp_path).read_text("utf-8")
    rows = [line for line in details.splitlines() if line.startswith("| ")]
    assert len(rows) == sum(FIGURES.values()) + details.count("| | ours |")
    for file, _ in PLOTS.values():
        assert (tmp_path / file).stat().st_size > 1000

    page = tmp_path / "benchmarks.md"
    page.write_text(PAGE.read_text("utf-8"), "utf-8")
    update_page(page, results)

    def rows_of(path: Path) -> list[str]:
        lines = path.read_text("utf-8").splitlines()
        return [line.partition(" | ")[0] for line in lines if line.startswith("|")]

    # The page in the documentation has the same tables, of a whole run.
    assert rows_of(page) == rows_of(PAGE)
    for file, _ in PLOTS.values():
        assert f"](_static/{file})" in PAGE.read_text("utf-8")
