"""``rotate`` and ``arotate``: re-encrypt every value under the primary key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from sqlalchemy import Connection, Engine

from .._database.async_bridge import awaited
from .._database.connection import DEFAULT_RETRIES, ManagedConnection
from ..exceptions import hide_locals
from ..keyring import Keyring
from ._options import DEFAULT_BATCH_SIZE, RotationOptions, keyring_of
from ._run import Run
from .report import RotationProgress, RotationReport
from .targets import Target, resolve_targets


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
