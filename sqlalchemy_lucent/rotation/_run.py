"""Run a rotation: batch after batch, pass after pass, until nothing stale is left."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from .._database.async_bridge import run_sync, sleep_in_async
from .._database.connection import DEFAULT_RETRIES, Link
from .._database.faults import Fault, refuses_a_row, said
from ..exceptions import RotationError, hide_locals
from ..keyring import Keyring, default_keyring
from ._scan import count_stale
from .report import FailedRow, Failures, RotationProgress, RotationReport
from .rows import Batch, BatchBounds, PrimaryKey, TableWorker
from .targets import Target, TargetTable, resolve_targets, survey
from .throttle import Throttle

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

DEFAULT_BATCH_SIZE: Final = 1000
"""Rows per transaction: small enough to hold locks for milliseconds, large enough that the
commits do not dominate."""

MAX_PASSES: Final = 20
"""Passes over a table. One finds everything, unless rows change meanwhile: a compare-and-swap that
was lost, a row that somebody holds locked, or a process whose primary is still the old key, leaves
stale rows behind the cursor."""

_MOST_REFUSED: Final = 1000
"""Rows that the database may refuse to change one after the other, without any that it lets change
in between. What refuses more is against the rotation, and each row costs ten transactions."""

_FIRST_PAUSE: Final = 0.05  # seconds between passes over a table; doubled at each
_LONGEST_PAUSE: Final = 4.0


@dataclass(frozen=True)
class RotationOptions:
    """The options of :func:`rotate`, checked."""

    batch_size: int = DEFAULT_BATCH_SIZE
    batch_time: float | None = None
    max_rate: float | None = None
    pause: float = 0.0
    retries: int = DEFAULT_RETRIES
    on_error: Literal["report", "raise"] = "report"
    on_progress: Callable[[RotationProgress], object] | None = None
    stop_when: Callable[[RotationProgress], object] | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.batch_size, int) or self.batch_size < 1:
            raise RotationError("batch_size is a whole number of rows, 1 or more")
        if not _is_number(self.retries, int) or self.retries < 0:
            raise RotationError("retries is a whole number, 0 or more")
        if self.batch_time is not None and not (
            _is_number(self.batch_time) and self.batch_time > 0
        ):
            raise RotationError("batch_time is a number of seconds above 0")
        if self.max_rate is not None and not (_is_number(self.max_rate) and self.max_rate >= 1):
            raise RotationError("max_rate is a number of rows per second, 1 or more")
        if not (_is_number(self.pause) and self.pause >= 0):
            raise RotationError("pause is a number of seconds, 0 or more")
        if self.on_error not in ("report", "raise"):
            raise RotationError('on_error is "report" or "raise"')
        if not isinstance(self.dry_run, bool):
            raise RotationError("dry_run is True or False")
        for name in ("on_progress", "stop_when"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise RotationError(f"{name} is a function of the progress")
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
                getattr(function, "__call__", None)  # noqa: B004  (of an object that is called)
            ):
                raise RotationError(
                    f"{name} is a plain function, also for arotate(): nothing would await a "
                    "coroutine"
                )


@hide_locals
def rotate(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    batch_time: float | None = None,
    max_rate: float | None = None,
    pause: float = 0.0,
    retries: int = DEFAULT_RETRIES,
    on_error: Literal["report", "raise"] = "report",
    on_progress: Callable[[RotationProgress], object] | None = None,
    stop_when: Callable[[RotationProgress], object] | None = None,
    dry_run: bool = False,
) -> RotationReport:
    """Re-encrypt every value that is not under the primary key, in batches, online.

    Each batch is a short transaction of its own, so a run may be killed at any instant and the
    next one goes on. A value is replaced only while the row still holds what was read: a
    concurrent writer always wins. A value that does not open is left as it is.

    Several rotators may run at once, in one process or many. Each skips the rows that another has
    locked, so they share the work. On SQLite, which has one writer at a time, they take turns.

    :param bind: an engine, or a connection that is in no transaction. A run on an engine goes on
        with another connection when its own is lost.
    :param targets: what to rotate: a MetaData, registry, Declarative base, mapped class, Table,
        Column or an iterable of them; the metadata of :class:`LucentBase` if left out.
    :param keyring: opens with all its keys, seals with its primary; the default keyring if left
        out. One keyring serves the whole run. May be a function that returns it.
    :param batch_size: rows per transaction at most, 1 or more. A table begins with 100, and a
        batch has 16 MiB of values at most, or one row.
    :param batch_time: seconds that a transaction should take; the number of rows then follows,
        from `batch_size` on.
    :param max_rate: rows per second at most, 1 or more.
    :param pause: seconds to wait after each batch.
    :param retries: further attempts at a batch that failed for a passing reason (a deadlock, a
        lock or statement timeout, a lost connection), each with half the rows.
    :param on_error: ``"report"`` goes on when a value does not open, or the database refuses to
        change its row; ``"raise"`` ends the run with a :exc:`RotationError`, the batch in hand
        rolled back.
    :param on_progress: called after each batch, and before each further pass over a table.
    :param stop_when: called when `on_progress` is; something true ends the run there, and the
        report says what remains.
    :param dry_run: open and seal everything in memory, and write nothing.
    :raises RotationError: nothing to rotate was found, an argument is wrong, the connection is in
        a transaction, the database refuses (the message says what was done until then), or
        (``"raise"``) a value does not open.
    """
    options = RotationOptions(
        batch_size=batch_size,
        batch_time=batch_time,
        max_rate=max_rate,
        pause=pause,
        retries=retries,
        on_error=on_error,
        on_progress=on_progress,
        stop_when=stop_when,
        dry_run=dry_run,
    )
    return _rotate(bind, targets, keyring_of(keyring), options, time.sleep)


@hide_locals
async def arotate(
    bind: AsyncEngine | AsyncConnection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    **options: Any,
) -> RotationReport:
    """Do what :func:`rotate` does, with the same options, over an async engine or connection.

    Between batches, and while the database works, the event loop runs. `on_progress` and
    `stop_when` are ordinary functions.
    """
    unknown = set(options) - {field.name for field in fields(RotationOptions)}
    if unknown:
        raise TypeError(f"arotate() got an unexpected keyword argument {min(unknown)!r}")
    checked = RotationOptions(**options)
    own = keyring_of(keyring)
    return await run_sync(bind, lambda sync: _rotate(sync, targets, own, checked, sleep_in_async))


def keyring_of(keyring: Keyring | Callable[[], Keyring] | None) -> Keyring:
    """Return the keyring that is meant.

    :raises RotationError: it is none, nor a function that returns one.
    """
    if keyring is None:
        return default_keyring()
    if not isinstance(keyring, Keyring) and callable(keyring):
        keyring = keyring()
    if not isinstance(keyring, Keyring):
        raise RotationError(
            f"keyring= is a Keyring or a function that returns one, not a {type(keyring).__name__}"
        )
    return keyring


def _rotate(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None,
    keyring: Keyring,
    options: RotationOptions,
    sleep: Callable[[float], object],
) -> RotationReport:
    link = Link(bind, retries=options.retries, sleep=sleep)
    tables = resolve_targets(targets, bind)
    run = _Run(link, keyring, options, sleep)
    return run.guarded(lambda: run.over(tables))


class Worker(Protocol):
    """What a run drives: the rows of one table, batch by batch."""

    name: str

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if something is missing, or not ours to lock; write nothing."""

    def count_stale(self, connection: Connection) -> int:
        """Count what is left to do."""

    def find_bounds(
        self, connection: Connection, after: PrimaryKey | None, limit: int
    ) -> BatchBounds | None:
        """Return how far the next batch goes; ``None`` at the end."""

    def advanced(self, after: PrimaryKey | None, last: PrimaryKey | None) -> PrimaryKey | None:
        """Return the key to go on behind; fail if it is no other."""

    def work(
        self, connection: Connection, after: PrimaryKey | None, bounds: BatchBounds, limit: int
    ) -> Batch:
        """Do the next `limit` rows behind `after`, as far as `bounds` goes."""

    def refused(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        bounds: BatchBounds,
        error: DBAPIError,
        reason: str,
    ) -> Batch:
        """Return what became of the next row, which the database does not let change."""


def run_workers(
    connection: Connection,
    workers: Sequence[Worker],
    keyring: Keyring,
    *,
    batch_size: int,
    on_progress: Callable[[RotationProgress], object] | None,
    passes: int | None = None,
) -> RotationReport:
    """Drive `workers` as :func:`rotate` drives its own. Internal."""
    options = RotationOptions(batch_size=batch_size, on_progress=on_progress)
    run = _Run(Link(connection), keyring, options, time.sleep, passes=passes)
    return run.guarded(lambda: run.drive(workers))


class _Run:
    """One rotation: its connection, its options, and what it has done so far."""

    def __init__(
        self,
        link: Link,
        keyring: Keyring,
        options: RotationOptions,
        sleep: Callable[[float], object],
        passes: int | None = None,
    ) -> None:
        self._link = link
        self._keyring = keyring
        self._options = options
        self._sleep = sleep
        self._passes = 1 if options.dry_run else passes or MAX_PASSES
        self._throttle = Throttle(
            options.batch_size,
            options.batch_time,
            options.max_rate,
            options.pause,
            sleep,
            has_one_writer=link.dialect.name == "sqlite",
        )
        self._began = time.monotonic()
        self._total = 0
        self._rotated = 0
        self._stopped = False
        self._refused = 0  # since the last value that was written

    def guarded(self, work: Callable[[], RotationReport]) -> RotationReport:
        """Do `work` over the link; say where it stands if the database ends it."""
        return self._link.run(work, self.where_it_stands)

    def over(self, tables: list[TargetTable]) -> RotationReport:
        """Rotate `tables`."""
        known = self._link.read(lambda connection: survey(connection, tables))
        report = self.drive([self._worker(table) for table in known.tables])
        return replace(report, left_out=known.left_out)

    def drive(self, workers: Sequence[Worker]) -> RotationReport:
        """Run `workers`, one after the other, until each is done."""
        # Whatever is missing in any of them shows before the first write.
        for worker in workers:
            self._prepare(worker)
        if self._options.on_progress is not None or self._options.stop_when is not None:
            self._total = sum(map(self._count, workers))
        failures = Failures()
        remaining = 0
        for worker in workers:
            failed, left = self._until_done(worker)
            failures.merge(failed)
            remaining += left
        return RotationReport(
            self._keyring.primary,
            self._rotated,
            tuple(failures.named),
            failures.count,
            remaining,
            self._stopped,
            self._options.dry_run,
        )

    def where_it_stands(self, fault: Fault) -> str:
        """Say what the database refused, what was done until then, and what to do."""
        if self._options.dry_run:
            done = "It was a dry run: nothing was written"
        else:
            done = (
                f"{self._rotated} values were re-encrypted before, and are committed; "
                "the batch in hand was rolled back"
            )
        return f"the database ended the rotation: {fault.said}. {done}. {fault.again()}"

    def _worker(self, table: TargetTable) -> TableWorker:
        return TableWorker(table, self._keyring, self._link.dialect)

    def _count(self, worker: Worker) -> int:
        if isinstance(worker, TableWorker):
            return count_stale(self._link, worker)
        return self._link.read(worker.count_stale)

    def _prepare(self, worker: Worker) -> None:
        self._link.read(partial(worker.prepare, lock=not self._options.dry_run))

    def _until_done(self, worker: Worker) -> tuple[Failures, int]:
        """Pass over the table until a count finds nothing stale but what does not open."""
        failures = Failures()
        remaining = 0
        for number in range(self._passes):
            if number:
                # What is left changes at the pace of those who write it, or hold it locked.
                self._sleep(min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE))
                self._tell(worker, failures)  # no batch may have had a row to tell of
                if self._stopped:
                    break
            before = self._rotated
            failures = self._one_pass(worker)
            remaining = self._count(worker)
            if self._options.dry_run:
                remaining = max(remaining - (self._rotated - before), failures.count)
            if self._stopped or remaining <= failures.count:
                break
        return failures, remaining

    def _one_pass(self, worker: Worker) -> Failures:
        """Go through the rows until their end, or until ``stop_when`` ends it before."""
        failures = Failures()
        self._throttle.begin_table()
        after: PrimaryKey | None = None
        more = not self._stopped
        while more:
            started = time.monotonic()
            batch = self._link.attempt(partial(self._batch, worker, after), self._throttle.limit)
            after = worker.advanced(after, batch.last)
            self._rotated += batch.written
            failures.add(batch.failed)
            more = batch.more
            if batch.rows or more:  # a batch may look at many rows and find none that is stale
                self._tell(worker, failures)
            if batch.rows:
                self._throttle.after(batch.rows, batch.size, time.monotonic() - started)
            more = more and not self._stopped
        return failures

    def _batch(self, worker: Worker, after: PrimaryKey | None, limit: int) -> Batch:
        with self._link.reading() as connection:
            bounds = worker.find_bounds(connection, after, limit)
            if bounds is None:
                return Batch(0, None, more=False, written=0, failed=(), size=0)
            if self._options.dry_run and isinstance(worker, TableWorker):
                batch = worker.rehearse(connection, after, bounds, limit)
                self._raise_if_wanted(batch)
                return batch
        try:
            with self._link.transaction() as connection:
                batch = worker.work(connection, after, bounds, limit)
                self._raise_if_wanted(batch)
        except DBAPIError as error:
            is_refused = refuses_a_row(error, self._link.dialect)
            if self._options.on_error == "raise" or not is_refused:
                raise
            self._link.reconnect()  # if it broke off
            if limit == 1:
                self._refused += 1
                if self._refused > _MOST_REFUSED:
                    raise
                reason = said(error, self._link.dialect)
                with self._link.transaction() as connection:
                    return worker.refused(connection, after, bounds, error, reason)
        else:
            if batch.written:
                self._refused = 0
            return batch
        # One row of it is against the rules of the table, and is found by halves.
        return self._batch(worker, after, max(1, min(limit, bounds.rows) // 2))

    def _raise_if_wanted(self, batch: Batch) -> None:
        if batch.failed and self._options.on_error == "raise":
            raise RotationError(_does_not_open(batch.failed[0]))

    def _tell(self, worker: Worker, failures: Failures) -> None:
        options = self._options
        if options.on_progress is None and options.stop_when is None:
            return
        rate = self._rotated / max(time.monotonic() - self._began, 1e-6)
        left = max(self._total - self._rotated - failures.count, 0)
        progress = RotationProgress(
            table=worker.name,
            rotated=self._rotated,
            failed=failures.count,
            total=self._total,
            rate=rate,
            seconds_left=left / rate if rate else None,
        )
        if options.on_progress is not None:
            options.on_progress(progress)
        if options.stop_when is not None:
            self._stopped = bool(options.stop_when(progress))


def _is_number(value: object, kind: type[int | float] | None = None) -> bool:
    kinds = (int, float) if kind is None else kind
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _does_not_open(failed: FailedRow) -> str:
    return (
        f"the value of {failed.table}.{failed.column} in the row with primary key "
        f"{failed.primary_key!r} does not open ({failed.error}); it was left as it is"
    )
