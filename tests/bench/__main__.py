"""Run every benchmark and write ``docs/benchmarks.md``.

python -m tests.bench [--smoke] [codec core ...]

With names of benchmarks or ``--smoke`` the page goes into a temporary folder instead: it is not the
page of a whole run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.bench.page import BENCHES, Result, write_page

DOCS = Path(__file__).parents[2] / "docs"


def run(names: list[str], smoke: bool) -> list[Result]:
    results = []
    for name in names:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            figures = list(BENCHES[name].measure(smoke))
        except pytest.skip.Exception as missing:  # what a server that is not there is to the tests
            sys.exit(f"not run: {missing}")
        taken = time.perf_counter() - begin
        print(f"{len(figures)} figures in {taken:.0f} s", file=sys.stderr, flush=True)
        results.append(Result(name, figures, taken))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHES)}; all if left out")
    arguments = parser.parse_args()
    whole = not arguments.names and not arguments.smoke
    folder = DOCS if whole else Path(tempfile.mkdtemp(prefix="lucent-bench-"))
    results = run(arguments.names or list(BENCHES), arguments.smoke)
    print(write_page(results, folder))


if __name__ == "__main__":
    main()
