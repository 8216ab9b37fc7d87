"""
Keep changing random rows of the ledger, and print each change once it is committed.

Arguments: URL, number of this writer, number of writers, rows. A writer changes its own rows only,
so that the last value of each row is known. It goes on until its standard input has a line.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time

from sqlalchemy import Engine, create_engine, update
from sqlalchemy.exc import OperationalError

from sqlalchemy_lucent import Bound
from tests.integration.workers import ledger


def change(engine: Engine, row: int, seq: int) -> None:
    statement = (
        update(ledger)
        .where(ledger.c.id == row)
        .values(free={"seq": seq}, bound=Bound({"seq": seq}, row=(row,)))
    )
    while True:
        try:
            with engine.begin() as connection:
                connection.execute(statement)
                if seq % 5 == 0:
                    time.sleep(0.005)  # some transactions are slow
        except OperationalError:
            continue  # a deadlock, or SQLite's "database is locked": rolled back
        return


def main(url: str, number: str, writers: str, rows: str) -> None:
    engine = create_engine(url)
    own = range(int(number), int(rows), int(writers))
    waiting = threading.Thread(target=sys.stdin.readline, daemon=True)
    waiting.start()
    for seq in itertools.count(1):
        if not waiting.is_alive():
            break
        row = random.choice(own)
        change(engine, row, seq)
        print(row, seq, flush=True)
        time.sleep(random.uniform(0, 0.01))  # or SQLite's only lock would seldom be free
    engine.dispose()


main(*sys.argv[1:])
