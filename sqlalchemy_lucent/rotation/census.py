"""Count values per key, prove that they open, and refuse to retire a key that rows need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, func, select

from .. import _sql
from .._envelope import VERSION_PATTERN
from ..exceptions import ConfigurationError, KeyInUseError, RotationError
from ..keyring import Keyring, default_keyring
from ._async import run_sync, sleep_in_async
from ._link import OUTSIDE_OF_TRANSACTIONS, not_a_bind
from ._table import PrimaryKey, TableWorker
from ._visible import refuse_hidden_rows, require_primary
from .engine import DEFAULT_BATCH_SIZE, keyring_of
from .report import Failures, StatusReport, StatusRow, VerifyReport
from .targets import Target, TargetTable, refuse_left_out, resolve_targets, survey

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


def status(
    bind: Engine | Connection, targets: Target | Iterable[Target] | None = None
) -> StatusReport:
    """Count values per table, column, key version and fingerprint, by SQL alone.

    Needs no key and opens nothing. SQL NULL is not a value and is not counted.

    :param bind: an engine or a connection.
    :param targets: as for :func:`rotate`.
    :raises RotationError: `targets` has no encrypted column.
    """
    with _connected(bind) as connection:
        known = survey(connection, resolve_targets(targets, connection))
        rows = tuple(row for table in known.tables for row in _count(connection, table))
        return StatusReport(rows, known.left_out)


async def astatus(
    bind: AsyncEngine | AsyncConnection, targets: Target | Iterable[Target] | None = None
) -> StatusReport:
    """Do what :func:`status` does, over an async engine or connection."""
    return await run_sync(bind, lambda sync: status(sync, targets))


def _count(connection: Connection, target: TargetTable) -> Iterator[StatusRow]:
    refuse_hidden_rows(connection, target.clause.name, target.clause.schema)
    for column in target.columns:
        value = target.clause.c[column.name]
        counted = (
            select(
                _sql.key_version(value).label("version"),
                _sql.key_id(value).label("fingerprint"),
            )
            .select_from(target.clause)
            .where(value.is_not(None))
            .subquery()
        )
        statement = (
            select(counted.c.version, counted.c.fingerprint, func.count())
            .group_by(counted.c.version, counted.c.fingerprint)
            .order_by(counted.c.version, counted.c.fingerprint)
        )
        for row in connection.execute(statement):
            yield StatusRow(target.name, column.name, *row)


def needs_rotation(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | Callable[[], Keyring] | None = None,
) -> bool:
    """Say whether any value is not under the primary key; opens nothing.

    :param bind: an engine or a connection.
    :param targets: as for :func:`rotate`.
    :param keyring: the keyring whose primary is meant, or a function that returns it; the default
        one if left out.
    :raises RotationError: `targets` has no encrypted column.
    """
    keyring = keyring_of(keyring)
    with _connected(bind) as connection:
        for target in survey(connection, resolve_targets(targets, connection)).tables:
            refuse_hidden_rows(connection, target.clause.name, target.clause.schema)
            if TableWorker(target, keyring, connection.dialect).count_stale(connection):
                return True
    return False


def retire_check(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None = None,
    *,
    settle: float = 0.0,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    exclude: Iterable[str] = (),
) -> None:
    """Raise while any value is sealed under `version`, whatever key that was.

    It counts the versions that values name, and opens none: who may write to the database may
    write another version in front of a value, which then does not open. With `keyring`, it opens
    every value too, without the key of `version`.

    A count sees what is committed. A transaction that is open meanwhile may have sealed a value
    under `version` and commit it right afterwards: with `settle`, it looks, waits, and looks
    again. Choose it longer than the longest transaction of a process that had `version` as its
    primary, and run the check when no process has.

    :param bind: an engine, or a connection that is in no transaction; of the primary server.
    :param version: the key version that is to go. The keyring has it (`keyring`, or else the
        default one), unless a value does: one that nobody knows is misspelt.
    :param targets: as for :func:`rotate`. A column that is not among them is not looked at: name
        every MetaData that the key was used for.
    :param settle: seconds between two looks; 0 looks once.
    :param keyring: the keyring to open with, or a function that returns it. `version` is not its
        primary.
    :param exclude: names of views and foreign tables among `targets`, as ``left_out`` of a report
        has them, that show no value sealed under `version`. Otherwise the check passes over a view
        only if every binary column of the tables that it reads is a target.
    :raises KeyInUseError: how many values need the version, per column, or (with `keyring`) do not
        open without it.
    :raises RotationError: `targets` has no encrypted column, one of its tables is missing or may
        show less than there is, the server is a replica or read-only, nothing knows `version`, or
        an argument is wrong.
    """
    _retire_check(bind, version, targets, settle, keyring, exclude, time.sleep)


async def aretire_check(
    bind: AsyncEngine | AsyncConnection,
    version: str,
    targets: Target | Iterable[Target] | None = None,
    *,
    settle: float = 0.0,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    exclude: Iterable[str] = (),
) -> None:
    """Do what :func:`retire_check` does, over an async engine or connection.

    While it waits, the event loop runs.
    """
    await run_sync(
        bind,
        lambda sync: _retire_check(
            sync, version, targets, settle, keyring, exclude, sleep_in_async
        ),
    )


def _retire_check(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None,
    settle: float,
    keyring: Keyring | Callable[[], Keyring] | None,
    exclude: Iterable[str],
    sleep: Callable[[float], object],
) -> None:
    if not isinstance(version, str) or not VERSION_PATTERN.fullmatch(version):
        raise RotationError("retire_check() takes a key version, such as 'v1'")
    if isinstance(settle, bool) or not isinstance(settle, (int, float)) or settle < 0:
        raise RotationError("settle is a number of seconds, 0 or more")
    if settle and isinstance(bind, Connection) and bind.in_transaction():
        raise RotationError(
            "the connection is inside a transaction, which may not see what others commit while "
            "retire_check() waits. End it first, or pass the engine"
        )
    own = None if keyring is None else keyring_of(keyring)
    rest = own.without(version) if own is not None and version in own.versions else own
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    _raise_if_needed(bind, version, targets, rest, exclude)
    if version not in _known_versions(own):
        raise RotationError(
            f"neither a value of the targets nor the keyring has key version {version!r}: is it "
            "misspelt? Leave the key in the keyring until this check has passed"
        )
    if settle:
        if isinstance(bind, Connection):
            bind.rollback()  # the count began a transaction
        sleep(settle)
        _raise_if_needed(bind, version, targets, rest, exclude)


def _known_versions(keyring: Keyring | None) -> set[str]:
    """Return the versions of `keyring`, which may have been taken out of it, and of the default."""
    known = set(keyring.versions if keyring is not None else ())
    with suppress(ConfigurationError):
        known.update(default_keyring().versions)
    return known


def _raise_if_needed(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None,
    rest: Keyring | None,
    exclude: Sequence[str],
) -> None:
    with _connected(bind) as connection:
        known = survey(connection, resolve_targets(targets, connection))
        refuse_left_out(connection, known, exclude)
    needing: dict[str, int] = {}
    for row in status(bind, targets).rows:
        if row.key_version == version:  # once per fingerprint
            name = f"{row.table}.{row.column}"
            needing[name] = needing.get(name, 0) + row.count
    if needing:
        counts = ", ".join(f"{count} in {name}" for name, count in needing.items())
        raise KeyInUseError(
            f"key version {version!r} is still needed: {counts}. Rotate these values before the "
            "key is retired; verify() names those that do not open, such as values that another "
            "key of that name sealed"
        )
    if rest is None:
        return
    report = verify(bind, targets, keyring=rest)
    if not report.ok:
        first = report.failed[0]
        raise KeyInUseError(
            f"{report.failed_count} values do not open without key version {version!r}, whatever "
            f"version they name; the first is {first.table}.{first.column} in the row with primary "
            f"key {first.primary_key!r} ({first.error}). verify() names them all: correct or "
            "delete them before the key is retired"
        )


def verify(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    sample: int | None = None,
) -> VerifyReport:
    """Open every value and report what does not open; nothing is written.

    :param bind: an engine or a connection.
    :param targets: as for :func:`rotate`.
    :param keyring: the keyring to open with, or a function that returns it; the default one if
        left out.
    :param sample: look at the first so many rows of each table only, in primary-key order.
    :raises RotationError: `targets` has no encrypted column, or `sample` is below 1.
    """
    if sample is not None and (
        isinstance(sample, bool) or not isinstance(sample, int) or sample < 1
    ):
        raise RotationError("sample is a whole number of rows, 1 or more")
    keyring = keyring_of(keyring)
    failures = Failures()
    opened = 0
    with _connected(bind) as connection:
        known = survey(connection, resolve_targets(targets, connection))
        for table in known.tables:
            worker = TableWorker(table, keyring, connection.dialect)
            worker.check_keys(connection)
            for row in _rows(worker, connection, sample):
                for failed in worker.open_values(row):
                    if failed is None:
                        opened += 1
                    else:
                        failures.add([failed])
    return VerifyReport(opened, tuple(failures.named), failures.count, known.left_out)


async def averify(
    bind: AsyncEngine | AsyncConnection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    sample: int | None = None,
) -> VerifyReport:
    """Do what :func:`verify` does, over an async engine or connection."""
    return await run_sync(bind, lambda sync: verify(sync, targets, keyring=keyring, sample=sample))


def _rows(worker: TableWorker, connection: Connection, sample: int | None) -> Iterator[Any]:
    """Give the rows of a table in constant memory."""
    after: PrimaryKey | None = None
    left = sample
    while left is None or left > 0:
        limit = DEFAULT_BATCH_SIZE if left is None else min(left, DEFAULT_BATCH_SIZE)
        reach = worker.reach(connection, after, limit)
        if reach is None:
            return
        # Without a bound at the end: a key of an inexact type may not be found by its own value.
        upto = reach.last if reach.more or left is not None else None
        rows = worker.read(connection, after, None, upto=upto)
        yield from rows
        if not reach.more:
            return
        after = reach.last
        left = None if left is None else left - len(rows)


@contextmanager
def _connected(bind: Engine | Connection) -> Iterator[Connection]:
    if isinstance(bind, Connection):
        require_primary(bind)
        yield bind
    elif isinstance(bind, Engine):
        # AUTOCOMMIT: a transaction as long as the reading would keep the database from cleaning up.
        with bind.connect() as connection:
            connection.execution_options(**OUTSIDE_OF_TRANSACTIONS)
            require_primary(connection)
            yield connection
    else:
        raise not_a_bind(bind)
