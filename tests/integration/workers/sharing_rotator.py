"""Rotate the ledger with two spawned processes; print a line after each range. Argument: a URL."""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

from sqlalchemy import create_engine

from sqlalchemy_lucent import RotationProgress, rotate
from tests.integration.workers import ledger, sharing


def tell(progress: RotationProgress) -> None:
    print(progress.rotated, flush=True)


def main(url: str) -> None:
    engine = create_engine(url)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        report = rotate(
            engine,
            ledger,
            executor=pool,
            ranges=30,
            batch_size=5,
            pause=0.2,  # some seconds in all, for the test to end it before
            connect=sharing.connect,
            on_progress=tell,
        )
    engine.dispose()
    print(json.dumps(report.as_dict()))


# Spawned processes import this module again, under another name.
if __name__ == "__main__":
    main(*sys.argv[1:])
