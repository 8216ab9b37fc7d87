"""Run every benchmark: write ``build/bench`` and the tables of ``docs/benchmarks.md``.

python -m tests.bench [--smoke] [codec columns ...]

With names of benchmarks or ``--smoke``, only ``build/bench`` is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.bench.measure import Figure
from tests.bench.page import BENCHES, PLOTS, update_page, write_details

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "bench"


def run(names: list[str], smoke: bool) -> dict[str, list[Figure]]:
    results = {}
    for name in names:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            results[name] = list(BENCHES[name].measure(smoke))
        except pytest.skip.Exception as missing:  # raised where a server is missing
            sys.exit(f"not run: {missing}")
        print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHES)}; all if left out")
    arguments = parser.parse_args()
    results = run(arguments.names or list(BENCHES), arguments.smoke)
    print(write_details(results, FOLDER))
    if not arguments.names and not arguments.smoke:
        update_page(ROOT / "docs" / "benchmarks.md", results)
        for file, _ in PLOTS.values():
            shutil.copy(FOLDER / file, ROOT / "docs" / "_static" / file)


if __name__ == "__main__":
    main()
