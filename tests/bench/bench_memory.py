"""The memory that a large select takes, and that sealing leaves nothing behind.

python -m tests.bench.bench_memory [--smoke]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from sqlalchemy_lucent import set_default_keyring
from tests.bench.documents import small
from tests.bench.measure import KEYS, Figure, at_most, run_alone
from tests.bench.servers import bench_database
from tests.bench.tables import MODELS, insert_rows, opened

TITLE = "Memory"
ABOUT = """\
100,000 small rows are selected at once and kept, in a fresh process for each kind of column. The
peak of the Python objects is `tracemalloc`'s; that of the process is what the kernel says
(`VmHWM`), less what the process had before the select, without `tracemalloc`. Sealing and opening
leave nothing behind: the bytes are what `tracemalloc` counts after 1,000,000 values more than after
the first 1,000."""

ROOT = Path(__file__).parents[2]
ROWS = 100_000
VALUES = 1_000_000


def in_a_process_of_its_own(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.memory_child", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peaks(url: URL, name: str) -> dict[str, float]:
    of_process = in_a_process_of_its_own("select", url, name, "process")
    of_objects = in_a_process_of_its_own("select", url, name, "objects")
    assert of_process["rows"] == of_objects["rows"]
    return {
        "peak of the process": of_process["bytes"] / 1e6,
        "peak of the Python objects": of_objects["bytes"] / 1e6,
    }


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    rows = [{"id": n, "payload": small(n)} for n in range(100 if smoke else ROWS)]
    with bench_database("sqlite") as url:
        with opened(url) as database:
            for name in ("JSON", "ours"):
                insert_rows(database, MODELS[name], rows)
            ours, plain = peaks(url, "ours"), peaks(url, "JSON")
        for what in ours:
            yield Figure(
                group=f"Select of {ROWS:,} small rows",
                name=what,
                ours=ours[what],
                against="JSON",
                reference=plain[what],
                unit="MB",
                ratio=ours[what] / max(plain[what], 0.001),
                goal=at_most(1.0),
            )
    for what in ("seal", "open"):
        kept = in_a_process_of_its_own(what, 2000 if smoke else VALUES)
        yield Figure(
            group=f"Left behind by {VALUES:,} values",
            name=f"{what} and let go",
            ours=kept["at the end"] / 1e3,
            against="after 1,000",
            reference=kept["after 1,000"] / 1e3,
            unit="kB",
            ratio=kept["at the end"] - kept["after 1,000"],
            # tracemalloc and the loop have a few objects of their own.
            goal=at_most(1000),
            form="{:,.0f} bytes more",
        )


if __name__ == "__main__":
    run_alone(measure)
