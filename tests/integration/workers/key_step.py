"""A process that takes one step of a key's life, and is killed before one of its statements."""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from typing import Any

import sqlalchemy as sa

from tests.registries import registry, take

if __name__ == "__main__":
    url, step, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
    engine = sa.create_engine(url)
    numbers = count(1)

    @sa.event.listens_for(engine, "before_cursor_execute")
    def kill(*_: Any) -> None:
        if next(numbers) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    take(registry(engine), step)
