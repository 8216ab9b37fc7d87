"""
Rows per second of a rotation, beside the fastest loop that one would write by hand.

    python -m tests.bench.bench_rotation [--rows 20000] [--rounds 3] [sqlite postgresql mysql]

The hand-written loops keep none of the promises: no compare-and-swap, no locks, no rows that do
not open, one integer key. They are run alternately with `rotate` on the same table, in committed
batches of 1,000, and the best of the rounds counts for each.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    insert,
    select,
    update,
)

from sqlalchemy_lucent import EncryptedJSON, Keyring, rotate, set_default_keyring
from tests.databases import drop_everything, own_database

BATCH = 1000
DOCUMENTS = {
    "small": {"api_key": "sk_live_0123456789abcdef", "region": "eu-central-1", "limit": 250},
    "2.2 kB": {"type": "service_account", "private_key": "A" * 2150},
}
KEYS = Keyring({"v1": bytes(range(32)), "v2": bytes(range(32, 64))}, primary="v2")

table = Table(
    "documents",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("payload", EncryptedJSON),
)


def resealer(keyring: Keyring) -> Callable[[bytes], bytes]:
    keys = keyring.for_context("documents.payload")
    return lambda sealed: keys.seal(keys.open(sealed))


def by_hand_sqlite(engine: Engine, keyring: Keyring) -> None:
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    driver.create_function("reseal", 1, resealer(keyring))
    last = -1
    while True:
        (upto,) = driver.execute(
            "SELECT max(id) FROM (SELECT id FROM documents WHERE id > ? ORDER BY id LIMIT ?)",
            (last, BATCH),
        ).fetchone()
        if upto is None:
            break
        driver.execute(
            "UPDATE documents SET payload = reseal(payload) WHERE id > ? AND id <= ?", (last, upto)
        )
        driver.commit()
        last = upto
    connection.close()


def by_hand_postgresql(engine: Engine, keyring: Keyring) -> None:
    reseal = resealer(keyring)
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    last = -1
    with driver.cursor(binary=True) as cursor:
        while True:
            rows = cursor.execute(
                "SELECT id, payload FROM documents WHERE id > %s ORDER BY id LIMIT %s",
                (last, BATCH),
            ).fetchall()
            if not rows:
                break
            last = rows[-1][0]
            cursor.execute(
                "UPDATE documents SET payload = v.payload"
                " FROM unnest(%b::int[], %b::bytea[]) AS v (id, payload)"
                " WHERE documents.id = v.id",
                ([row[0] for row in rows], [reseal(row[1]) for row in rows]),
            )
            driver.commit()
    driver.rollback()
    connection.close()


def by_hand_mysql(engine: Engine, keyring: Keyring) -> None:
    reseal = resealer(keyring)
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    cursor = driver.cursor()
    last = -1
    while True:
        cursor.execute(
            "SELECT id, payload FROM documents WHERE id > %s ORDER BY id LIMIT %s", (last, BATCH)
        )
        rows = cursor.fetchall()
        if not rows:
            break
        last = rows[-1][0]
        cursor.execute(
            "UPDATE documents JOIN (SELECT %s AS id, %s AS payload"
            + " UNION ALL SELECT %s, %s" * (len(rows) - 1)
            + ") AS v ON documents.id = v.id SET documents.payload = v.payload",
            [part for row in rows for part in (row[0], reseal(row[1]))],
        )
        driver.commit()
    cursor.close()
    connection.close()


BY_HAND = {
    "sqlite": by_hand_sqlite,
    "postgresql": by_hand_postgresql,
    "mysql": by_hand_mysql,
}


def utils_tables() -> list[Table]:
    """sqlalchemy-utils' type under the old key and under the new one."""
    encrypted: Any = importlib.import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
    return [
        Table(
            "utils_documents",
            MetaData(),
            Column("id", Integer, primary_key=True, autoincrement=False),
            Column(
                "payload",
                encrypted.StringEncryptedType(
                    String(8000), key, encrypted.AesGcmEngine, length=8000
                ),
            ),
        )
        for key in ("old key", "new key")
    ]


def with_utils(engine: Engine, old: Table, new: Table) -> None:
    """What one does with sqlalchemy-utils: read under one key, write under the other."""
    last = -1
    change = update(new).where(new.c.id == bindparam("key")).values(payload=bindparam("renewed"))
    while True:
        with engine.begin() as connection:
            rows = connection.execute(
                select(old).where(old.c.id > last).order_by(old.c.id).limit(BATCH)
            ).all()
            if not rows:
                return
            connection.execute(change, [{"key": row.id, "renewed": row.payload} for row in rows])
            last = rows[-1].id


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(engine: Engine, kind: str, size: str, rows: int, rounds: int) -> None:
    table.metadata.create_all(engine)
    document = DOCUMENTS[size]
    set_default_keyring(KEYS.with_primary("v1"))
    with engine.begin() as connection:
        for first in range(0, rows, 5000):
            connection.execute(
                insert(table),
                [{"id": n, "payload": document} for n in range(first, min(first + 5000, rows))],
            )
    best: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        best[name] = min(best.get(name, seconds), seconds)

    def run_rotate(keyring: Keyring) -> None:
        report = rotate(engine, table, keyring=keyring, batch_size=BATCH)
        assert (report.ok, report.rotated) == (True, rows)

    keyrings = itertools.cycle([KEYS, KEYS.with_primary("v1")])
    contenders: list[tuple[str, Callable[[Keyring], None]]] = [
        ("by hand", partial(BY_HAND[kind], engine)),
        ("rotate", run_rotate),
    ]
    for _ in range(rounds):
        for name, contender in contenders:
            note(name, timed(partial(contender, next(keyrings))))
        contenders.reverse()  # the second finds a table that was just written to
    try:
        old, new = utils_tables()
    except ImportError:
        pass
    else:
        old.metadata.create_all(engine)
        text = base64.b64encode(os.urandom(3 * len(str(document)) // 4)).decode()
        with engine.begin() as connection:
            connection.execute(insert(old), [{"id": n, "payload": text} for n in range(rows)])
        for _ in range(max(1, rounds // 2)):
            note("utils", timed(partial(with_utils, engine, old, new)))
            old, new = new, old
    rate = {name: rows / seconds for name, seconds in best.items()}
    print(
        f"| {kind} | {size} | {rate['rotate']:,.0f} | {rate['by hand']:,.0f} "
        f"| {rate['rotate'] / rate['by hand']:.2f} "
        + (
            f"| {rate['utils']:,.0f} | {rate['rotate'] / rate['utils']:.1f} |"
            if "utils" in rate
            else "| not installed | |"
        ),
        flush=True,
    )
    drop_everything(engine)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=list(BY_HAND))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    print(
        "| database | documents | rotate, rows/s | by hand, rows/s | ratio "
        "| sqlalchemy-utils, rows/s | ratio |\n|---|---|---|---|---|---|---|"
    )
    for kind in arguments.kinds:
        with (
            tempfile.TemporaryDirectory() as directory,
            own_database(kind, Path(directory)) as url,
        ):
            engine = create_engine(url)
            for size in DOCUMENTS:
                measure(engine, kind, size, arguments.rows, arguments.rounds)
            engine.dispose()


if __name__ == "__main__":
    main()
