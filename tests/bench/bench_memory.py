"""The memory that a large select takes.

python -m tests.bench.bench_memory [--smoke]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import URL, make_url

from sqlalchemy_lucent import set_default_keyring
from tests.bench.bench_columns import MODELS, insert_rows, opened, select_rows
from tests.bench.documents import small
from tests.bench.measure import KEYS, Figure, at_most, run_alone
from tests.bench.servers import bench_database

TITLE = "Memory"
ABOUT = """\
100,000 small rows are selected at once and kept, in a fresh process for each kind of column: the
peak that the kernel reports (`VmHWM`), less what the process had before the select."""

ROOT = Path(__file__).parents[2]
ROWS = 100_000


def memory(what: str) -> int:
    """Return the bytes that the process has (`VmRSS`) or had at its peak (`VmHWM`)."""
    # Not getrusage(): a process inherits its peak from its parent.
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) << 10


def select_in_child(url: str, name: str) -> None:
    """Print the bytes that a select adds."""
    set_default_keyring(KEYS)
    with opened(make_url(url)) as begin:
        before = memory("VmRSS")
        rows = select_rows(begin, MODELS[name])
        print(memory("VmHWM") - before, flush=True)
        del rows
        os._exit(0)  # leaves the tables


def peak(url: URL, name: str) -> float:
    arguments = ("--child", str(url), name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_memory", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1e6


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    rows = [{"id": n, "payload": small(n)} for n in range(100 if smoke else ROWS)]
    with bench_database("sqlite") as url, opened(url) as begin:
        for name in ("JSON", "ours"):
            insert_rows(begin, MODELS[name], rows)
        ours, plain = peak(url, "ours"), peak(url, "JSON")
    yield Figure(
        group=f"Select of {ROWS:,} small rows",
        name="peak of the process",
        ours=ours,
        against="JSON",
        reference=plain,
        unit="MB",
        ratio=ours / max(plain, 0.001),
        goal=at_most(1.05),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        select_in_child(*sys.argv[2:])
    run_alone(measure)
