"""A process that writes under its own primary until it is told to stop.

Prints ``stored N`` after each commit and ``refused N`` for each write that raised.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from tests.registries import documents

if __name__ == "__main__":
    url, first, stop = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    engine = sa.create_engine(url)
    number = first
    while not stop.exists():
        number += 1
        time.sleep(random.uniform(0, 0.4))
        try:
            with engine.begin() as connection:
                connection.execute(
                    sa.insert(documents), {"id": number, "body": {"token": f"written-{number}"}}
                )
        except DBAPIError as error:
            busy = engine.dialect.name == "sqlite" and isinstance(error, OperationalError)
            outcome = "busy" if busy else "refused"
        else:
            outcome = "stored"
        print(outcome, number, flush=True)
