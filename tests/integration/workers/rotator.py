"""Rotate the ledger; print a line at the start and after each batch.

Arguments: URL, batch size, pause.
"""

from __future__ import annotations

import json
import sys

from sqlalchemy import create_engine

from sqlalchemy_lucent import RotationProgress, rotate
from tests.integration.workers import ledger


def tell(progress: RotationProgress) -> None:
    print(progress.rotated, flush=True)


def main(url: str, batch_size: str, pause: str) -> None:
    engine = create_engine(url)
    print(0, flush=True)
    report = rotate(
        engine, ledger, batch_size=int(batch_size), pause=float(pause), on_progress=tell
    )
    engine.dispose()
    print(json.dumps(report.as_dict()))


main(*sys.argv[1:])
