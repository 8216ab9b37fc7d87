"""Rotate the ledger; print the peak of this process's memory after a quarter and at the end."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from sqlalchemy import create_engine

from sqlalchemy_lucent import RotationProgress, rotate
from tests.integration.workers import ledger

peaks: dict[str, int] = {}


def peak() -> int:
    # Not getrusage(): its peak is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kibibytes) << 10


def watch(progress: RotationProgress) -> None:
    if progress.rotated >= progress.total / 4:
        peaks.setdefault("quarter", peak())


def main(url: str) -> None:
    engine = create_engine(url)
    report = rotate(engine, ledger, on_progress=watch)
    peaks.update(end=peak(), rotated=report.rotated)
    engine.dispose()
    print(json.dumps(peaks))


main(*sys.argv[1:])
