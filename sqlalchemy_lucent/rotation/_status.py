"""Count values per key, prove that they open, and refuse to retire a key that rows need."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    String,
    column,
    func,
    inspect,
    or_,
    select,
    text,
)

from .._database.async_bridge import awaited, sleep
from .._database.connection import ManagedConnection
from .._envelope import VERSION_PATTERN
from .._sql import is_mariadb, key_id, key_version
from ..exceptions import (
    ConfigurationError,
    DecryptionError,
    KeyInUseError,
    RotationError,
    hide_locals,
)
from ..keyring import Keyring, default_keyring
from ._options import check_rows, is_wait, keyring_of, names_of
from .jobs import Reseal
from .report import Failures, StatusReport, StatusRow, VerifyReport
from .rows import BatchBounds, Rows
from .targets import (
    Survey,
    Target,
    TargetColumn,
    TargetTable,
    refuse_left_out,
    resolve_targets,
    survey,
)

_T = TypeVar("_T")

_BEARABLE: Final = 2.0
"""Seconds for which one count may keep SQLite's writers waiting."""

_MAX_COUNTS: Final = 5
"""Times that a table is counted by ranges while others write to it."""


def status(
    bind: Engine | Connection, targets: Target | Iterable[Target] | None = None
) -> StatusReport:
    """Count values per table, column, key version and fingerprint, by SQL alone.

    Needs no key and opens nothing. SQL NULL is not a value and is not counted.

    :param bind: an engine or a connection.
    :param targets: as for :func:`rotate`.
    :raises RotationError: `targets` has no encrypted column.
    """

    def work(database: ManagedConnection, known: Survey) -> StatusReport:
        rows = tuple(row for table in known.tables for row in _count(database, table))
        return StatusReport(rows, known.left_out)

    return _examine(bind, targets, work)


astatus = awaited(status)


def _examine(
    bind: Engine | Connection,
    targets: Target | Iterable[Target] | None,
    work: Callable[[ManagedConnection, Survey], _T],
) -> _T:
    """Do `work`, which only reads, on what the database has of `targets`."""
    database = ManagedConnection(bind, read_only=True)
    tables = resolve_targets(targets, bind)
    return database.run(
        lambda: work(database, database.read(lambda connection: survey(connection, tables))),
        lambda fault: (
            f"the database ended the count: {fault.message}. {fault.next_step('Run it again')}"
        ),
    )


def _rows(database: ManagedConnection, target: TargetTable) -> Rows:
    rows = Rows(target.name, target.clause, target.primary_key, database.dialect)
    database.read(rows.find_order)
    return rows


def _count(database: ManagedConnection, target: TargetTable) -> Iterator[StatusRow]:
    rows = _rows(database, target)
    counts: dict[str, Counter[tuple[str | None, str | None]]] = {
        each.name: Counter() for each in target.columns
    }
    for bounds in rows.ranges(database.read):
        for name, found in counts.items():
            for row in database.read(partial(_count_keys, rows, name, bounds)):
                found[row.version, row.fingerprint] += row.number
    for name, found in counts.items():
        for key in sorted(found, key=lambda key: (key[0] or "", key[1] or "")):
            yield StatusRow(target.name, name, *key, found[key])


def _count_keys(
    rows: Rows, name: str, bounds: BatchBounds, connection: Connection
) -> Sequence[Row[Any]]:
    value = rows.clause.c[name]
    counted = (
        select(key_version(value).label("version"), key_id(value).label("fingerprint"))
        .select_from(rows.clause)
        .where(value.is_not(None), *rows.in_range(bounds))
        .subquery()
    )
    keys = (counted.c.version, counted.c.fingerprint)
    statement = select(*keys, func.count().label("number")).group_by(*keys)
    return connection.execute(statement, rows.parameters(bounds)).all()


@hide_locals
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
    own = keyring_of(keyring)

    def work(database: ManagedConnection, known: Survey) -> bool:
        jobs = [Reseal(table, own, database.dialect) for table in known.tables]
        for job in jobs:
            database.read(job.rows.find_order)
        return any(job.count_left(database.read) for job in jobs)

    return _examine(bind, targets, work)


@hide_locals
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

    It counts the versions that values name, and opens no value. Anyone who can write to the
    database can put another version in front of a value, which then does not open. With `keyring`,
    the check also opens every value, without the key of `version`.

    A count sees only what is committed. A transaction that is still open may have sealed a value
    under `version`, and commit it right afterwards. With `settle`, the check looks, waits, and
    looks again. Let it wait longer than the longest transaction of a process that had `version` as
    its primary. Run the check when no process has that primary any more.

    :param bind: an engine, or a connection that is in no transaction; of the primary server.
    :param version: the key version to retire. If neither the keyring (`keyring`, or else the
        default one) nor a value has it, it is refused as misspelt.
    :param targets: as for :func:`rotate`. Name every MetaData that the key was used for: other
        columns are not looked at.
    :param settle: seconds between two looks; 0 looks once.
    :param keyring: the keyring to open with, or a function that returns it. `version` is not its
        primary.
    :param exclude: names of views and foreign tables among `targets` that show no value sealed
        under `version`, as in ``left_out`` of a report. Without it, the check accepts a view only
        if every binary column of the tables that it reads is a target.
    :raises KeyInUseError: how many values need the version, per column, are sealed with its key
        under another name, or (with `keyring`) do not open without it.
    :raises RotationError: `targets` has no encrypted column, one of its tables is missing or may
        hide rows, the server is a replica or read-only, `version` is unknown, or an argument is
        wrong.
    """
    if not isinstance(version, str) or not VERSION_PATTERN.fullmatch(version):
        raise RotationError("retire_check() takes a key version, such as 'v1'")
    if not is_wait(settle):
        raise RotationError("settle is a number of seconds, from 0 to a week (604,800)")
    if settle and isinstance(bind, Connection) and bind.in_transaction():
        raise RotationError(
            "the connection is inside a transaction, which may not see what others commit while "
            "retire_check() waits. End it first, or pass the engine"
        )
    own = None if keyring is None else keyring_of(keyring)
    rest = own.without(version) if own is not None and version in own.versions else own
    exclude = names_of("exclude", exclude)
    fingerprint = _fingerprint(version, own)
    _raise_if_needed(bind, version, targets, rest, exclude)
    if fingerprint is None:
        raise RotationError(
            f"neither the keyring nor any value of the targets has key version {version!r}: is it "
            "misspelt? Leave the key in the keyring until this check has passed"
        )
    for row in status(bind, targets).rows:
        if row.fingerprint == fingerprint and row.key_version != version:
            raise KeyInUseError(
                f"the key of version {version!r} is still needed: {row.count} values in "
                f"{row.table}.{row.column} are sealed with it under the name {row.key_version!r} "
                f"(fingerprint {fingerprint}). Give {row.key_version!r} a key of its own, from "
                "generate_master_key(), as a new version, and rotate to it"
            )
    if settle:
        sleep(settle, bind.dialect)
        _raise_if_needed(bind, version, targets, rest, exclude)


aretire_check = awaited(retire_check)


def _fingerprint(version: str, keyring: Keyring | None) -> str | None:
    """Return the fingerprint of `version` in `keyring` or, if it was taken out, in the default."""
    keyrings = [] if keyring is None else [keyring]
    with suppress(ConfigurationError):
        keyrings.append(default_keyring())
    return next((k.fingerprint(version) for k in keyrings if version in k.versions), None)


def _raise_if_needed(
    bind: Engine | Connection,
    version: str,
    targets: Target | Iterable[Target] | None,
    rest: Keyring | None,
    exclude: Sequence[str],
) -> None:
    def work(database: ManagedConnection, known: Survey) -> None:
        database.read(lambda connection: refuse_left_out(connection, known, exclude))
        require_unused(database, known.tables, version)

    _examine(bind, targets, work)
    if rest is None:
        return
    report = verify(bind, targets, keyring=rest)
    if not report.ok:
        first = report.failed[0]
        raise KeyInUseError(
            f"{report.failed_count} values do not open without key version {version!r}, whatever "
            f"version they name; the first is {first.table}.{first.column} in the row with primary "
            f"key {first.primary_key!r} ({first.error}). verify() names the first 1,000: correct "
            "or delete them before the key is retired"
        )


def require_unused(
    database: ManagedConnection, tables: Iterable[TargetTable], version: str
) -> None:
    """Refuse a key version under which `tables` have values. Opens none of them.

    :raises KeyInUseError: how many values need the version, per column.
    """
    counts = count_version(database, tables, version)
    if any(counts.values()):
        needing = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
        raise KeyInUseError(
            f"key version {version!r} is still needed: {needing}. Rotate these values before the "
            "key is retired; verify() names those that do not open, such as values that another "
            "key of that name sealed"
        )
    for table in tables:
        count = _count_history(database, table, version)
        if count:
            raise KeyInUseError(
                f"key version {version!r} is still needed: {table.name} keeps {count} earlier "
                "versions of rows with a value under it (WITH SYSTEM VERSIONING), which no "
                f"rotation can change. Delete them (DELETE HISTORY FROM {table.name}), or keep "
                "the key as long as them"
            )


def _count_history(database: ManagedConnection, table: TargetTable, version: str) -> int:
    """Count the rows in a table's history, which MariaDB keeps, with a value under `version`."""
    if not is_mariadb(database.dialect):
        return 0
    names = {"name": str(table.clause.name), "schema": table.clause.schema}
    if not database.read(lambda connection: connection.scalar(_IS_VERSIONED, names)):
        return 0
    is_under = or_(*(key_version(table.clause.c[each.name]) == version for each in table.columns))
    counted = select(func.count()).select_from(table.clause).where(is_under)
    counted = counted.with_hint(table.clause, "FOR SYSTEM_TIME ALL")
    return database.read(lambda connection: connection.scalar(counted)) or 0


_IS_VERSIONED: Final = text(
    "SELECT count(*) FROM information_schema.tables WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND table_type = 'SYSTEM VERSIONED'"
)


def count_version(
    database: ManagedConnection, tables: Iterable[TargetTable], version: str
) -> dict[str, int]:
    """Count the values under a key version, per column. Opens none of them."""
    counts: dict[str, int] = {}
    for table in tables:
        rows = _rows(database, table)
        for each in table.columns:
            counts[f"{table.name}.{each.name}"] = _count_version(database, rows, each, version)
    return counts


def _count_version(
    database: ManagedConnection, rows: Rows, found: TargetColumn, version: str
) -> int:
    """Count the values of a column under `version`, all at one moment.

    An index on the key version answers at once. Without one, readers keep writers waiting on
    SQLite in rollback-journal mode: there, a large table is counted by ranges.

    :raises RotationError: others wrote all the time, so a row may have moved between ranges.
    """
    condition = database.read(partial(_has_version, rows, found, version))
    whole = partial(rows.count, condition=condition)
    if database.dialect.name != "sqlite" or database.read(
        partial(_keeps_nobody_waiting, rows, condition)
    ):
        return database.read(whole)
    for _ in range(_MAX_COUNTS):
        before, started = database.read(_data_version), time.monotonic()
        count = rows.count_all(database.read, condition)
        if count or database.read(_data_version) == before:
            return count
        if time.monotonic() - started < _BEARABLE:
            return database.read(whole)
    raise RotationError(
        f"others write to {rows.name} all the time, and a row may move while it is counted. "
        "Index the key version of its sealed column, put the database in WAL mode, or look while "
        "nobody writes"
    )


def _has_version(
    rows: Rows, found: TargetColumn, version: str, connection: Connection
) -> ColumnElement[bool]:
    known: ColumnElement[str] = key_version(rows.clause.c[found.name])
    if found.version_column is not None:
        # Trust the column only if the database computes it. Otherwise anyone may have written it.
        columns = inspect(connection).get_columns(str(rows.clause.name), rows.clause.schema)
        computed = {c["name"]: c["computed"]["sqltext"] for c in columns if "computed" in c}
        if found.name in computed.get(found.version_column, ""):
            known = column(found.version_column, String())
    return known == version


def _keeps_nobody_waiting(
    rows: Rows, condition: ColumnElement[bool], connection: Connection
) -> bool:
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() in ("wal", "memory", "off"):
        return True
    statement = select(func.count()).select_from(rows.clause).where(condition)
    compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}").all()
    return not any(str(step[-1]).startswith("SCAN") for step in plan)


def _data_version(connection: Connection) -> Any:
    """Return a number that differs once another connection has written."""
    return connection.exec_driver_sql("PRAGMA data_version").scalar()


@hide_locals
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
    :param sample: look only at this many rows of each table, the first by primary key.
    :raises RotationError: `targets` has no encrypted column, or `sample` is below 1.
    """
    if sample is not None:
        check_rows("sample", sample)
    own = keyring_of(keyring)

    def work(database: ManagedConnection, known: Survey) -> VerifyReport:
        failures = Failures()
        opened = 0
        for table in known.tables:
            job = Reseal(table, own, database.dialect, stale_only=False)
            for row in job.rows.every(database.read, sample):
                for each in job.sealed:
                    try:
                        opened += each.open(row) is not None
                    except (DecryptionError, ConfigurationError) as error:
                        failures.add([job.failure(row, each.name, error)])
        return VerifyReport(opened, tuple(failures.named), failures.count, known.left_out)

    return _examine(bind, targets, work)


averify = awaited(verify)
