"""The fence: the database refuses values under a key version that was rotated away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateSchema

from sqlalchemy_lucent import (
    EncryptedJSON,
    KeyInUseError,
    Keyring,
    RotationError,
    _sql,
    rotate,
    set_default_keyring,
)
from sqlalchemy_lucent.migrations.fence import Fence
from sqlalchemy_lucent.rotation.targets import TargetTable, resolve_targets

VALUE = {"token": "MARKER-plaintext"}


def users(*names: str, table: str = "users", schema: str | None = None) -> Table:
    """A table with sealed columns."""
    return Table(
        table,
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("email", String(50)),
        *(Column(name, EncryptedJSON()) for name in names or ("creds",)),
        schema=schema,
    )


def target_of(table: Table, bind: Engine) -> TargetTable:
    (target,) = resolve_targets(table, bind)
    return target


def fence_of(table: Table, engine: Engine, version: str = "v1") -> Fence:
    return Fence(target_of(table, engine), version)


def put(engine: Engine, table: Table, keyring: Keyring, **values: Any) -> None:
    """Insert a row as a process with that keyring does."""
    set_default_keyring(keyring)
    with engine.begin() as connection:
        connection.execute(table.insert(), values or {"creds": VALUE})


def refuses(engine: Engine, table: Table, keyring: Keyring, column: str = "creds") -> bool:
    """Whether the database refuses an insert and an update by a process with that keyring."""
    set_default_keyring(keyring)
    refused = []
    for statement in (table.insert(), table.update()):
        try:
            with engine.begin() as connection:
                connection.execute(statement, {column: VALUE})
                connection.rollback()
        except DBAPIError:
            refused.append(True)
        else:
            refused.append(False)
    assert refused in ([True, True], [False, False])
    return refused[0]


def test_it_refuses_the_old_version_and_takes_the_new_one(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, promoted)
    fence = fence_of(table, engine)
    assert not fence.exists(engine)
    fence.add(engine)
    assert fence.exists(engine)
    assert not fence_of(table, engine, "v2").exists(engine)
    fence.validate(engine)
    fence.validate(engine)
    fence.add(engine)
    assert refuses(engine, table, keyring)
    assert not refuses(engine, table, promoted)
    fence.drop(engine)
    fence.drop(engine)
    assert not fence.exists(engine)
    assert not refuses(engine, table, keyring)
