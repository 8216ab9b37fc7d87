"""``rotate`` and other runs: batch after batch, pass after pass, until nothing is left to do.

The core is one batch, :func:`do_batch`: in one short transaction, lock and read rows, compute their
changes, and write these by compare-and-swap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Literal

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from .._database.async_bridge import awaited
from .._database.connection import DEFAULT_RETRIES, ManagedConnection, back_off
from .._database.faults import Fault, describe, refuses_a_row
from ..exceptions import RotationError, hide_locals
from ..keyring import Keyring
from ._ahead import PassOn, ReadAhead
from ._options import DEFAULT_BATCH_SIZE, RotationOptions, keyring_of
from .jobs import Batch, Job, Reseal
from .report import FailedRow, Failures, RotationProgress, RotationReport
from .rows import BatchBounds, PrimaryKey
from .targets import Target, TargetTable, resolve_targets, survey
from .throttle import BATCH_BYTES, Throttle

MAX_PASSES: Final = 20
"""Passes over a table. One finds everything, unless rows change meanwhile: a compare-and-swap that
was lost, a row that somebody holds locked, or a process whose primary is still the old key leaves
stale rows before the cursor."""

_MAX_REFUSED: Final = 1000
"""Consecutive rows that the database may refuse to change. If it refuses more, it refuses the
rotation itself, and each row costs ten transactions."""

_END: Final = Batch(0, 0, 0, (), None)


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
        with another connection when its own is lost. It reads ahead on a second one if the pool
        has one to spare and no other option slows the run down; not on SQLite.
    :param targets: what to rotate: a MetaData, registry, Declarative base, mapped class, Table,
        Column or an iterable of them; the metadata of :class:`LucentBase` if left out.
    :param keyring: opens with all its keys, seals with its primary; the default keyring if left
        out. One keyring serves the whole run. May be a function that returns it.
    :param batch_size: rows per transaction at most, 1 or more. A table begins with 100, and a
        batch has 16 MiB of values at most, or one row.
    :param batch_time: seconds that a transaction should take. The number of rows adapts to it,
        from `batch_size` on.
    :param max_rate: rows per second at most, 1 or more.
    :param pause: seconds to wait after each batch.
    :param retries: further attempts at a batch that failed for a passing reason (a deadlock, a
        lock or statement timeout, a lost connection), each with half the rows.
    :param on_error: ``"report"`` goes on when a value does not open, or the database refuses to
        change its row; ``"raise"`` ends the run with a :exc:`RotationError` and rolls the current
        batch back.
    :param on_progress: called after each batch, and before each further pass over a table.
    :param stop_when: called when `on_progress` is; a true result ends the run there, and the
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
    own = keyring_of(keyring)
    database = ManagedConnection(bind, retries=options.retries)
    tables = resolve_targets(targets, bind)
    run = Run(database, own, options)
    return database.run(lambda: run.rotate_tables(tables), run.describe)


arotate = awaited(rotate)


def run_jobs(
    connection: Connection,
    jobs: Sequence[Job],
    keyring: Keyring,
    *,
    batch_size: int,
    on_progress: Callable[[RotationProgress], object] | None,
    passes: int | None = None,
) -> RotationReport:
    """Run `jobs` over a connection, as :func:`rotate` runs its own."""
    options = RotationOptions(batch_size=batch_size, on_progress=on_progress)
    database = ManagedConnection(connection)
    run = Run(database, keyring, options, passes=passes)
    return database.run(lambda: run.run_jobs(jobs), run.describe)


def run_in_transaction(connection: Connection, job: Job, batch_size: int) -> tuple[int, Failures]:
    """Run one pass of `job` in the caller's transaction, or under the caller's lock.

    Returns how many rows were read, and what failed.
    """
    failures = Failures()
    number = 0
    job.prepare(connection)
    after: PrimaryKey | None = None
    while (bounds := job.rows.find_bounds(connection, after, batch_size)) is not None:
        batch = do_batch(connection, job, bounds)
        number += batch.rows
        failures.add(batch.failed)
        after = batch.next_after
        if after is None:
            break
    return number, failures


def do_batch(
    connection: Connection,
    job: Job,
    bounds: BatchBounds,
    *,
    dry_run: bool = False,
    has_read: PassOn = lambda _: None,
) -> Batch:
    """Do the rows within `bounds`; in a dry run, lock nothing and write nothing.

    :param has_read: called with the key that the next batch begins after, once that is known.
    """
    rows = job.rows.read(connection, bounds, lock=not dry_run, is_batch=True)
    after = job.rows.next_after(bounds, rows)
    has_read(after)
    outcome = job.apply(rows)
    written, failed = (outcome.values, []) if dry_run else job.write(connection, bounds, outcome)
    return Batch(len(rows), outcome.size, written, [*outcome.failed, *failed], after)


class Run:
    """One run: its connection, its options, and what it has done so far."""

    def __init__(
        self,
        database: ManagedConnection,
        keyring: Keyring,
        options: RotationOptions,
        *,
        passes: int | None = None,
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._options = options
        self._may_read_ahead = options.may_read_ahead
        self._passes = 1 if options.dry_run else passes or MAX_PASSES
        self._throttle = Throttle(
            options.batch_size,
            options.batch_time,
            options.max_rate,
            options.pause,
            database.sleep,
            has_one_writer=database.dialect.name == "sqlite",
        )
        self._began = time.monotonic()
        self._total = 0
        self._written = 0
        self._stopped = False
        self._refused = 0  # since the last value that was written

    def rotate_tables(self, tables: Sequence[TargetTable]) -> RotationReport:
        """Rotate those of `tables` that are tables in the database."""
        known = self._database.read(lambda connection: survey(connection, tables))
        dialect = self._database.dialect
        report = self.run_jobs([Reseal(table, self._keyring, dialect) for table in known.tables])
        return replace(report, left_out=known.left_out)

    def run_jobs(self, jobs: Sequence[Job]) -> RotationReport:
        """Run `jobs` one after the other, each until it is done."""
        # Whatever is missing for any of them shows before the first write.
        for job in jobs:
            self._database.read(partial(job.prepare, lock=not self._options.dry_run))
        if self._options.on_progress is not None or self._options.stop_when is not None:
            self._total = sum(job.count_left(self._database.read) for job in jobs)
        failures = Failures()
        remaining = 0
        for job in jobs:
            failed, left = self._run_job(job)
            failures.merge(failed)
            remaining += left
        return RotationReport(
            self._keyring.primary,
            self._written,
            tuple(failures.named),
            failures.count,
            remaining,
            self._stopped,
            self._options.dry_run,
        )

    def describe(self, fault: Fault) -> str:
        """Say what the database refused, what was done until then, and what to do."""
        if self._options.dry_run:
            done = "It was a dry run: nothing was written"
        else:
            done = (
                f"{self._written} values were re-encrypted before, and are committed; "
                "the current batch was rolled back"
            )
        return f"the database ended the rotation: {fault.message}. {done}. {fault.next_step()}"

    def _run_job(self, job: Job) -> tuple[Failures, int]:
        """Pass over the table until a count finds nothing left but what failed."""
        failures = Failures()
        remaining = 0
        for number in range(self._passes):
            if number:
                # What is left changes at the pace of those who write it, or hold it locked.
                self._database.sleep(back_off(number))
                self._report_progress(job, failures)  # a pass without a row has reported nothing
                remaining = job.count_left(self._database.read)  # others may have done it
                if self._stopped or remaining <= failures.count:
                    break
            before = self._written
            failures = self._run_pass(job)
            remaining = job.count_left(self._database.read)
            if self._options.dry_run:
                remaining = max(remaining - (self._written - before), failures.count)
            if self._stopped or remaining <= failures.count:
                break
        return failures, remaining

    def _run_pass(self, job: Job) -> Failures:
        """Go through the table once, unless ``stop_when`` ends the run before."""
        failures = Failures()
        self._throttle.begin_table()
        after: PrimaryKey | None = None
        while not self._stopped:
            started = time.monotonic()
            batch = self._database.retry(partial(self._batch, job, after), self._throttle.limit)
            self._account(job, failures, batch, time.monotonic() - started)
            after = batch.next_after
            if after is not None and not self._stopped:
                after = self._read_ahead(job, failures, after)
            if after is None:
                break
        return failures

    def _account(self, job: Job, failures: Failures, batch: Batch, seconds: float = 0.0) -> bool:
        self._written += batch.written
        failures.add(batch.failed)
        if batch.rows or batch.next_after is not None:  # it may search many rows and find none
            self._report_progress(job, failures)
        if batch.rows:
            self._throttle.after(batch.rows, batch.size, seconds)
        return self._stopped

    def _read_ahead(self, job: Job, failures: Failures, after: PrimaryKey) -> PrimaryKey | None:
        """Go on with a second connection, if the engine has one; return the key to go on after.

        After a fault, that is the key before it: the run meets the fault again and deals with it.
        """
        if not self._may_read_ahead:
            return after
        with self._database.spare() as spare:
            self._may_read_ahead = spare is not None
            if spare is None:
                return after
            do_batch = partial(self._do_batch_in_turn, job)
            ahead = ReadAhead(after, do_batch, partial(self._account, job, failures))
            written = ahead.run(self._database, spare)
        self._written += written  # what failed there is found again
        return ahead.after

    def _do_batch_in_turn(
        self, job: Job, database: ManagedConnection, after: PrimaryKey, pass_on: PassOn
    ) -> Batch:
        def once(limit: int) -> Batch:
            with database.reading() as connection:
                bounds = job.rows.find_bounds(connection, after, limit, BATCH_BYTES // 2)
            if bounds is None:
                pass_on(None)
                return _END
            return self._do_batch(database, job, bounds, pass_on)

        return database.retry(once, self._throttle.limit, retries=0)

    def _batch(self, job: Job, after: PrimaryKey | None, limit: int) -> Batch:
        """Do the next `limit` rows. If the database refuses to change a row, single it out."""
        with self._database.reading() as connection:
            bounds = job.rows.find_bounds(connection, after, limit)
        if bounds is None:
            return _END
        try:
            batch = self._do_batch(self._database, job, bounds)
        except DBAPIError as error:
            is_refused = refuses_a_row(error, self._database.dialect)
            if self._options.on_error == "raise" or not is_refused:
                raise
            self._database.reconnect()  # if it broke off
            if limit == 1:
                return self._refuse_row(job, bounds, error)
        else:
            if batch.written:
                self._refused = 0
            return batch
        # One row of the batch breaks a rule of the table. Halving the batch finds it.
        return self._batch(job, after, max(1, min(limit, bounds.rows) // 2))

    def _do_batch(
        self,
        database: ManagedConnection,
        job: Job,
        bounds: BatchBounds,
        has_read: PassOn = lambda _: None,
    ) -> Batch:
        dry_run = self._options.dry_run
        with database.reading() if dry_run else database.transaction() as connection:
            batch = do_batch(connection, job, bounds, dry_run=dry_run, has_read=has_read)
            if batch.failed and self._options.on_error == "raise":
                raise RotationError(_fault_of(batch.failed[0]))
        return batch

    def _refuse_row(self, job: Job, bounds: BatchBounds, error: DBAPIError) -> Batch:
        self._refused += 1
        if self._refused > _MAX_REFUSED:
            raise error
        reason = describe(error, self._database.dialect)
        with self._database.transaction() as connection:
            rows, failed = job.refused(connection, bounds, error, reason)
        return Batch(len(rows), 0, 0, failed, job.rows.next_after(bounds, rows))

    def _report_progress(self, job: Job, failures: Failures) -> None:
        options = self._options
        if options.on_progress is None and options.stop_when is None:
            return
        rate = self._written / max(time.monotonic() - self._began, 1e-6)
        left = max(self._total - self._written - failures.count, 0)
        progress = RotationProgress(
            table=job.name,
            rotated=self._written,
            failed=failures.count,
            total=self._total,
            rate=rate,
            seconds_left=left / rate if rate else None,
        )
        if options.on_progress is not None:
            options.on_progress(progress)
        if options.stop_when is not None and not self._stopped:
            self._stopped = bool(options.stop_when(progress))


def _fault_of(failed: FailedRow) -> str:
    value = (
        f"the value of {failed.table}.{failed.column} in the row with primary key "
        f"{failed.primary_key!r}"
    )
    if failed.error == RotationError.__name__:
        return f"{value} was not replaced: {failed.reason}"
    return f"{value} does not open ({failed.error}); it was left as it is"
