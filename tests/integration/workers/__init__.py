"""Scripts that tests run as processes of their own, and what both sides need to know."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Engine, Integer, MetaData, Table, insert

from sqlalchemy_lucent import Bound, EncryptedJSON, Keyring
from tests.command import Forked
from tests.conftest import KEY_1, KEY_2

ROOT = Path(__file__).resolve().parents[3]

metadata = MetaData()
ledger = Table(
    "ledger",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Without the CHECK constraint: some tests put what is not sealed into it.
    Column("free", EncryptedJSON(lazy=True, create_constraint=False)),
    Column("bound", EncryptedJSON(bound_to=["id"], create_constraint=False)),
)


def fill(engine: Engine, count: int) -> None:
    """Make the table, with `count` rows sealed under the default keyring."""
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(ledger),
            [
                {"id": n, "free": {"seq": 0}, "bound": Bound({"seq": 0}, row=(n,))}
                for n in range(count)
            ],
        )


def contents(engine: Engine, keyring: Keyring) -> dict[int, tuple[Any, Any]]:
    """Open every row."""
    found = {}
    with engine.connect() as connection:
        for row in connection.execute(ledger.select()):
            assert row.id not in found
            found[row.id] = (
                row.free.open(keyring=keyring),
                row.bound.open(row=(row.id,), keyring=keyring),
            )
    return found


def keys(primary: str) -> str:
    """The keyring as the environment has it."""
    texts = {
        version: base64.urlsafe_b64encode(key).decode()
        for version, key in (("v1", KEY_1), ("v2", KEY_2))
    }
    other = "v1" if primary == "v2" else "v2"
    return f"{primary}:{texts[primary]},{other}:{texts[other]}"


def start(script: str, *arguments: object, primary: str = "v2") -> Forked:
    """Start a script of this folder."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "LUCENT_SECRETS_KEYS": keys(primary)}
    return Forked("worker", [script, *map(str, arguments)], environ, ROOT)


def finish(process: Forked, code: int = 0) -> str:
    """Wait for a process and return its output; fail with its errors if it failed."""
    output, errors = process.communicate()
    assert process.returncode == code, errors
    return output


def reap(processes: Sequence[Forked]) -> None:
    """End what is still running, whatever became of the test."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
