"""
Rotate or verify the ledger; print the peak of this process's memory after a quarter and at the end.

Arguments: URL, ``rotate`` or ``verify``, rows.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from sqlalchemy import Engine, create_engine

from sqlalchemy_lucent import RotationProgress, rotate, verify
from tests.integration.workers import ledger


def peak() -> int:
    # Not getrusage(): its peak is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) << 10


def rotated(engine: Engine, rows: int) -> tuple[int, int]:
    """Return how many values were done, and the peak after a quarter of them."""
    peaks: list[int] = []

    def watch(progress: RotationProgress) -> None:
        if not peaks and progress.rotated >= rows / 4:
            peaks.append(peak())

    return rotate(engine, ledger, on_progress=watch).rotated, peaks[0]


def verified(engine: Engine, rows: int) -> tuple[int, int]:
    """Return the same of a verification, which tells no progress: the quarter is one by itself."""
    verify(engine, ledger, sample=rows // 4)
    quarter = peak()
    return verify(engine, ledger).opened, quarter


def main(url: str, what: str, rows: str) -> None:
    engine = create_engine(url)
    done, quarter = (rotated if what == "rotate" else verified)(engine, int(rows))
    engine.dispose()
    print(json.dumps({"done": done, "quarter": quarter, "end": peak()}))


main(*sys.argv[1:])
