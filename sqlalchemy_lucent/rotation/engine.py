"""Run a rotation: batch after batch, pass after pass, until nothing stale is left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ..exceptions import RotationError
from ..keyring import Keyring, default_keyring
from ._batches import TableWorker, autocommitting, batch
from .report import FailedRow, RotationProgress, RotationReport
from .targets import Target, resolve_targets

DEFAULT_BATCH_SIZE: Final = 1000
"""Rows per transaction: small enough to hold locks for milliseconds, large enough that the
commits do not dominate."""

MAX_PASSES: Final = 20
"""Passes over a table. One finds everything, unless rows change meanwhile: a compare-and-swap that
was lost, or a process whose primary is still the old key, leaves stale rows behind the cursor."""

_MAX_RETRIES: Final = 8
_FIRST_PAUSE: Final = 0.05  # seconds; doubled at each retry of a batch, with jitter

_TRANSIENT_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03"})  # PostgreSQL: appendix A
_TRANSIENT_MYSQL_CODES: Final = frozenset({1205, 1213})  # lock wait timeout, deadlock


def rotate(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    on_error: Literal["report", "raise"] = "report",
    on_progress: Callable[[RotationProgress], object] | None = None,
) -> RotationReport:
    """
    Re-encrypt every value that is not under the primary key, in batches, online.

    Each batch is a short transaction of its own, so a run may be killed at any instant and the
    next one goes on. A value is replaced only while the row still holds what was read: a
    concurrent writer always wins. A value that does not open is left as it is.

    :param bind: an engine, or a connection that is in no transaction.
    :param targets: what to rotate: a MetaData, registry, Declarative base, mapped class, Table,
        Column or an iterable of them; the metadata of :class:`LucentBase` if left out.
    :param keyring: opens with all its keys, seals with its primary; the default keyring if left
        out. One keyring serves the whole run.
    :param batch_size: rows per transaction, 1 or more.
    :param on_error: ``"report"`` goes on when a value does not open; ``"raise"`` ends the run
        with a :exc:`RotationError`, the batch in hand rolled back.
    :param on_progress: called after each batch.
    :raises RotationError: nothing to rotate was found, an argument is wrong, the connection is in
        a transaction, or (``"raise"``) a value does not open.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise RotationError("batch_size is a whole number of rows, 1 or more")
    if on_error not in ("report", "raise"):
        raise RotationError('on_error is "report" or "raise"')
    keyring = keyring or default_keyring()
    workers = [TableWorker(target, keyring) for target in resolve_targets(targets)]
    rotated, remaining, failed = 0, 0, []
    with autocommitting(bind) as connection:
        for worker in workers:
            run = _TableRun(connection, worker, batch_size, on_error, on_progress, rotated)
            run.until_done()
            rotated = run.rotated
            remaining += run.remaining
            failed += run.failed
    return RotationReport(keyring.primary, rotated, tuple(failed), remaining)


async def arotate(
    bind: AsyncEngine | AsyncConnection,
    targets: Target | Iterable[Target] | None = None,
    **options: Any,
) -> RotationReport:
    """Do what :func:`rotate` does, with the same options, over an async engine or connection."""
    report: RotationReport = await run_on_connection(
        bind, lambda sync: rotate(sync, targets, **options)
    )
    return report


async def run_on_connection(
    bind: AsyncEngine | AsyncConnection, work: Callable[[Connection], Any]
) -> Any:
    """Run `work` on the synchronous connection below `bind`."""
    if isinstance(bind, AsyncEngine):
        async with bind.connect() as connection:
            return await connection.run_sync(work)
    if not isinstance(bind, AsyncConnection):
        raise RotationError(
            f"the bind is an AsyncEngine or AsyncConnection, not {type(bind).__name__}"
        )
    return await bind.run_sync(work)


class _TableRun:
    """The rotation of one table."""

    def __init__(
        self,
        connection: Connection,
        worker: TableWorker,
        batch_size: int,
        on_error: str,
        on_progress: Callable[[RotationProgress], object] | None,
        rotated: int,
    ) -> None:
        self._connection = connection
        self._worker = worker
        self._batch_size = batch_size
        self._on_error = on_error
        self._on_progress = on_progress
        self.rotated = rotated
        self.remaining = 0
        self.failed: list[FailedRow] = []

    def until_done(self) -> None:
        """Pass over the table until a count finds nothing stale but what does not open."""
        for _ in range(MAX_PASSES):
            self.failed = []
            self._one_pass()
            self.remaining = self._worker.count_stale(self._connection)
            if self.remaining <= len(self.failed):
                return

    def _one_pass(self) -> None:
        after: tuple[Any, ...] | None = None
        more = True
        while more:
            after, more = self._next_batch(after)

    def _next_batch(self, after: tuple[Any, ...] | None) -> tuple[tuple[Any, ...] | None, bool]:
        limit = self._batch_size
        for attempt in range(_MAX_RETRIES + 1):
            try:
                with batch(self._connection):
                    rows = self._worker.read(self._connection, after, limit, stale_only=True)
                    renewals, failed = self._worker.reseal(rows)
                    if failed and self._on_error == "raise":
                        raise RotationError(_does_not_open(failed[0]))
                    written = self._worker.write(self._connection, renewals)
            except DBAPIError as error:
                if attempt == _MAX_RETRIES or not _is_transient(error):
                    raise
            else:
                break
            # A whole batch may never get through under contention; half of it does sooner.
            limit = max(1, limit // 2)
            time.sleep(_FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1))  # noqa: S311  (jitter)
        self.rotated += written
        self.failed += failed
        if rows and self._on_progress is not None:
            self._on_progress(
                RotationProgress(self._worker.target.name, self.rotated, len(self.failed))
            )
        if len(rows) < limit:
            return after, False
        return self._worker.primary_key_of(rows[-1]), True


def _does_not_open(failed: FailedRow) -> str:
    return (
        f"the value of {failed.table}.{failed.column} in the row with primary key "
        f"{failed.primary_key!r} does not open ({failed.error}); it was left as it is"
    )


def _is_transient(error: DBAPIError) -> bool:
    """Say whether the same batch may succeed if it is tried again."""
    if error.connection_invalidated:
        return True
    original = error.orig
    sqlstate = getattr(original, "sqlstate", None)
    if sqlstate is not None:
        return sqlstate in _TRANSIENT_SQLSTATES
    if getattr(original, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return True
    code = original.args[0] if original is not None and original.args else None
    return code in _TRANSIENT_MYSQL_CODES
