"""A process that takes one step of a key's life, and is killed before one of its statements.

Prints how many statements and commits the step takes.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from typing import Any

import sqlalchemy as sa

from tests.registries import BOTH, registry

if __name__ == "__main__":
    url, step, moment = sys.argv[1], sys.argv[2], int(sys.argv[3])
    engine = sa.create_engine(url)
    numbers = count(1)
    last = 0

    @sa.event.listens_for(engine, "before_cursor_execute")
    def kill(*_: Any) -> None:
        global last
        last = next(numbers)
        if last == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    own = registry(engine, BOTH)
    arguments = {"register": (), "promote": ("v2",)}.get(step, ("v1",))
    getattr(own, step)(*arguments)
    print(last)
