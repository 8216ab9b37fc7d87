"""Count values per key, prove that they open, and refuse to retire a key that rows need."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Row, func, select

from .. import _sql
from .._envelope import VERSION_PATTERN
from ..exceptions import KeyInUseError, RotationError
from ..keyring import Keyring
from ._async import run_sync, sleep_in_async
from ._faults import Fault
from ._link import Link
from ._scan import count_stale, ranges_of
from ._table import PrimaryKey, TableWorker, Within
from .engine import DEFAULT_BATCH_SIZE, keyring_of
from .report import Failures, StatusReport, StatusRow, VerifyReport
from .targets import Target, TargetTable, resolve_targets

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
    return _status(bind, targets, time.sleep)


async def astatus(
    bind: AsyncEngine | AsyncConnection, targets: Target | Iterable[Target] | None = None
) -> StatusReport:
    """Do what :func:`status` does, over an async engine or connection."""
    return await run_sync(bind, lambda sync: _status(sync, targets, sleep_in_async))


def _status(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None,
    sleep: Callable[[float], object],
) -> StatusReport:
    link = Link(bind, sleep=sleep, counting=True)
    tables = resolve_targets(targets, bind)
    return link.run(
        lambda: StatusReport(tuple(row for table in tables for row in _count(link, table))), _told
    )


def _told(fault: Fault) -> str:
    again = "Run it again" if fault.passes else "Another run would end like this one"
    if fault.advice:
        again = f"{fault.advice}, then run it again"
    return f"the database ended the count: {fault.said}. {again}"


def _count(link: Link, target: TargetTable) -> Iterator[StatusRow]:
    worker = TableWorker(target, None, link.dialect)
    link.read(worker.look)
    counts: dict[str, Counter[tuple[str | None, str | None]]] = {
        column.name: Counter() for column in target.columns
    }
    for within in ranges_of(link, worker):
        for name, found in counts.items():
            for row in link.read(partial(_counted, target, name, within)):
                found[row.version, row.fingerprint] += row.number
    for name, found in counts.items():
        for key in sorted(found, key=lambda key: (key[0] or "", key[1] or "")):
            yield StatusRow(target.name, name, *key, found[key])


def _counted(
    target: TargetTable, name: str, within: Within, connection: Connection
) -> Sequence[Row[Any]]:
    value = target.clause.c[name]
    counted = (
        select(
            _sql.key_version(value).label("version"),
            _sql.key_id(value).label("fingerprint"),
        )
        .select_from(target.clause)
        .where(value.is_not(None), *within.conditions)
        .subquery()
    )
    keys = (counted.c.version, counted.c.fingerprint)
    statement = select(*keys, func.count().label("number")).group_by(*keys)
    return connection.execute(statement, within.parameters).all()


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
    link = Link(bind, counting=True)
    tables = resolve_targets(targets, bind)

    def work() -> bool:
        workers = [TableWorker(table, keyring, link.dialect) for table in tables]
        for worker in workers:
            link.read(worker.look)
        return any(count_stale(link, worker) for worker in workers)

    return link.run(work, _told)


def retire_check(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None = None,
    *,
    settle: float = 0.0,
) -> None:
    """Raise while any value is sealed under `version`, whatever key that was.

    It passes for a version that no value has, and so for one that is misspelt. (The command
    ``lucent retire-check`` asks back when neither the keyring nor a value has it.)

    A count sees what is committed. A transaction that is open meanwhile may have sealed a value
    under `version` and commit it right afterwards: with `settle`, it counts, waits, and counts
    again. Choose it longer than the longest transaction of a process that had `version` as its
    primary, and run the check when no process has.

    :param bind: an engine, or a connection that is in no transaction.
    :param version: the key version that is to go.
    :param targets: as for :func:`rotate`. A column that is not among them is not looked at: name
        every MetaData that the key was used for.
    :param settle: seconds between the two counts; 0 counts once.
    :raises KeyInUseError: how many values need the version, per column.
    :raises RotationError: `targets` has no encrypted column, or an argument is wrong.
    """
    _retire_check(bind, version, targets, settle, time.sleep)


async def aretire_check(
    bind: AsyncEngine | AsyncConnection,
    version: str,
    targets: Target | Iterable[Target] | None = None,
    *,
    settle: float = 0.0,
) -> None:
    """Do what :func:`retire_check` does, over an async engine or connection.

    While it waits, the event loop runs.
    """
    await run_sync(bind, lambda sync: _retire_check(sync, version, targets, settle, sleep_in_async))


def _retire_check(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None,
    settle: float,
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
    _raise_if_needed(bind, version, targets, sleep)
    if settle:
        sleep(settle)
        _raise_if_needed(bind, version, targets, sleep)


def _raise_if_needed(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None,
    sleep: Callable[[float], object],
) -> None:
    needing: dict[str, int] = {}
    for row in _status(bind, targets, sleep).rows:
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
    return _verify(bind, targets, keyring, sample, time.sleep)


async def averify(
    bind: AsyncEngine | AsyncConnection,
    targets: Target | Iterable[Target] | None = None,
    *,
    keyring: Keyring | Callable[[], Keyring] | None = None,
    sample: int | None = None,
) -> VerifyReport:
    """Do what :func:`verify` does, over an async engine or connection."""
    return await run_sync(
        bind, lambda sync: _verify(sync, targets, keyring, sample, sleep_in_async)
    )


def _verify(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None,
    keyring: Keyring | Callable[[], Keyring] | None,
    sample: int | None,
    sleep: Callable[[float], object],
) -> VerifyReport:
    if sample is not None and (
        isinstance(sample, bool) or not isinstance(sample, int) or sample < 1
    ):
        raise RotationError("sample is a whole number of rows, 1 or more")
    own = keyring_of(keyring)
    link = Link(bind, sleep=sleep, counting=True)
    tables = resolve_targets(targets, bind)

    def work() -> VerifyReport:
        failures = Failures()
        opened = 0
        for table in tables:
            worker = TableWorker(table, own, link.dialect)
            link.read(worker.check_keys)
            for row in _rows(worker, link, sample):
                for failed in worker.open_values(row):
                    if failed is None:
                        opened += 1
                    else:
                        failures.add([failed])
        return VerifyReport(opened, tuple(failures.named), failures.count)

    return link.run(work, _told)


def _rows(worker: TableWorker, link: Link, sample: int | None) -> Iterator[Sequence[Any]]:
    """Give the rows of a table in constant memory."""
    after: PrimaryKey | None = None
    left = sample
    more = True
    while more and (left is None or left > 0):
        limit = DEFAULT_BATCH_SIZE if left is None else min(left, DEFAULT_BATCH_SIZE)
        rows, last = link.read(partial(_batch, worker, after, limit, sampled=left is not None))
        yield from rows
        more = last is not None
        after = last
        left = None if left is None else left - len(rows)


def _batch(
    worker: TableWorker, after: PrimaryKey | None, limit: int, connection: Connection, sampled: bool
) -> tuple[Sequence[Sequence[Any]], PrimaryKey | None]:
    """Return some rows, and the primary key to go on behind."""
    reach = worker.reach(connection, after, limit)
    if reach is None:
        return [], None
    # Without a bound at the end: a key of an inexact type may not be found by its own value.
    upto = reach.last if reach.more or sampled else None
    return worker.read(connection, after, None, upto=upto), reach.last if reach.more else None
