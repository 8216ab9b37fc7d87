"""Count values per key, prove that they open, and refuse to retire a key that rows need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from .. import _sql
from ..exceptions import DecryptionError, KeyInUseError
from ..keyring import Keyring, default_keyring
from ._batches import TableWorker, autocommitting
from .engine import DEFAULT_BATCH_SIZE, run_on_connection
from .report import FailedRow, StatusReport, StatusRow, VerifyReport
from .targets import Target, resolve_targets


def status(
    bind: Engine | Connection, targets: Target | Iterable[Target] | None = None
) -> StatusReport:
    """
    Count values per table, column, key version and fingerprint, by SQL alone.

    Needs no key and opens nothing. SQL NULL is not a value and is not counted.

    :raises RotationError: `targets` has no encrypted column.
    """
    rows = []
    if isinstance(bind, Engine):
        with bind.connect() as connection:
            return status(connection, targets)
    for target in resolve_targets(targets):
        for name in target.types:
            value = target.clause.c[name]
            version = _sql.key_version(value).label("version")
            fingerprint = _sql.key_id(value).label("fingerprint")
            counted = (
                select(version, fingerprint)
                .select_from(target.clause)
                .where(value.is_not(None))
                .subquery()
            )
            statement = (
                select(counted.c.version, counted.c.fingerprint, func.count())
                .group_by(counted.c.version, counted.c.fingerprint)
                .order_by(counted.c.version, counted.c.fingerprint)
            )
            rows += [StatusRow(target.name, name, *row) for row in bind.execute(statement)]
    return StatusReport(tuple(rows))


def needs_rotation(
    bind: Connection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | None = None,
) -> bool:
    """Say whether any value is not under the primary key; opens nothing."""
    keyring = keyring or default_keyring()
    return any(
        TableWorker(target, keyring).count_stale(bind) for target in resolve_targets(targets)
    )


def retire_check(
    bind: Engine | Connection, version: str, targets: Target | Iterable[Target] | None = None
) -> None:
    """
    Raise while any value is sealed under `version`, whatever key that was.

    Run it when no process seals under `version` any more: a writer that still has it as primary
    may add a row right after the count.

    :raises KeyInUseError: how many values need the version, per column.
    """
    needing = [row for row in status(bind, targets).rows if row.key_version == version]
    if needing:
        counts = ", ".join(f"{row.count} in {row.table}.{row.column}" for row in needing)
        raise KeyInUseError(
            f"key version {version!r} is still needed: {counts}. "
            "Rotate these values before the key is retired"
        )


def verify(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | None = None,
    sample: int | None = None,
) -> VerifyReport:
    """
    Open every value and report what does not open; nothing is written.

    :param sample: look at the first so many rows of each table only.
    :raises RotationError: `targets` has no encrypted column.
    """
    keyring = keyring or default_keyring()
    opened = 0
    failed: list[FailedRow] = []
    workers = [TableWorker(target, keyring) for target in resolve_targets(targets)]
    with autocommitting(bind) as connection:
        for worker in workers:
            after: tuple[Any, ...] | None = None
            left = sample
            while left is None or left > 0:
                limit = DEFAULT_BATCH_SIZE if left is None else min(left, DEFAULT_BATCH_SIZE)
                rows = worker.read(connection, after, limit, stale_only=False)
                for row in rows:
                    for name in worker.values_in(row):
                        try:
                            worker.open(row, name)
                            opened += 1
                        except DecryptionError as error:
                            failed.append(worker.failure(row, name, error))
                if len(rows) < limit:
                    break
                after = worker.primary_key_of(rows[-1])
                left = None if left is None else left - len(rows)
    return VerifyReport(opened, tuple(failed))


async def averify(
    bind: AsyncEngine | AsyncConnection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | None = None,
    sample: int | None = None,
) -> VerifyReport:
    """Do what :func:`verify` does, over an async engine or connection."""
    report: VerifyReport = await run_on_connection(
        bind, lambda sync: verify(sync, targets, keyring=keyring, sample=sample)
    )
    return report
