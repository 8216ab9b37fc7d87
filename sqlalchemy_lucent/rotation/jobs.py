"""What a batch does to the rows that were read: re-seal, back-fill, or bind to another context."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

from .._envelope import LONGEST_PREFIX, as_bytes, parse
from ..exceptions import (
    DecryptionError,
    LucentError,
    RetiredKeyError,
    RotationError,
    UnknownKeyVersionError,
)
from ..keyring import Keyring
from ._sealed_column import Change, Changed, change_each
from ._sealed_column import SealedColumn as SealedColumn
from ._updates import Changes, Writer, check_rights, writer_for
from .plain import ConversionError, PlainColumn
from .report import FailedRow
from .rows import UNREADABLE, BatchBounds, PrimaryKey, Read, Rows
from .targets import TargetTable


class Outcome(NamedTuple):
    """What became of some rows in memory."""

    changes: list[Changes]
    failed: list[FailedRow]
    size: int
    """Bytes of the values that were read."""

    @property
    def values(self) -> int:
        """How many values have changed."""
        return sum(len(each) * len(each.names) for each in self.changes)


class Batch(NamedTuple):
    """What became of one batch."""

    rows: int
    """Rows that were read."""
    size: int
    """Bytes of their values."""
    written: int
    """Values written."""
    failed: Sequence[FailedRow]
    next_after: PrimaryKey | None
    """The key that the next batch begins after; ``None`` at the end of the table."""


class Job(ABC):
    """What is to be done with one table. A run reads its rows, applies it to them, and writes.

    :param target: the table and its sealed columns.
    :param values: what to read of a row besides its primary key and the binding columns.
    :param pending: which rows to read.
    :param sizes: how many bytes the values have, as SQL.
    """

    def __init__(
        self,
        target: TargetTable,
        dialect: sa.Dialect,
        values: Sequence[sa.ColumnElement[Any]],
        pending: sa.ColumnElement[bool],
        sizes: Sequence[sa.ColumnElement[int]],
        *,
        skips_locked: bool = True,
    ) -> None:
        bound = (name for each in target.columns for name in each.bound_to)
        names = dict.fromkeys([*(part.name for part in target.primary_key), *bound])
        self._names = list(names)
        self._value_positions = range(len(names), len(names) + len(values))
        self.name = target.name
        self.rows = Rows(
            target.name,
            target.clause,
            target.primary_key,
            dialect,
            selects=[*(target.clause.c[name] for name in names), *values],
            pending=pending,
            sizes=sizes,
            skips_locked=skips_locked,
        )
        self.changers: Mapping[str, Callable[[Sequence[sa.Row[Any]]], Changed]] = {}
        """For each column that is written, the function that changes it in some rows."""
        self._types: Mapping[str, TypeEngine[Any]] = {}
        self._writer: Writer | None = None

    def prepare(self, connection: sa.Connection, *, lock: bool = True) -> None:
        """Fail now if something is missing, or may not be locked or updated; write nothing."""
        check_rights(connection, self.rows, list(self.changers))
        self._writer = writer_for(connection, self.rows, self._types)
        self.rows.prepare(connection, lock=lock)

    @abstractmethod
    def count_left(self, read: Read) -> int:
        """Count the values that are left to do."""

    def apply(self, rows: Sequence[sa.Row[Any]]) -> Outcome:
        """Compute the changes of `rows`."""
        changed = {name: change(rows) for name, change in self.changers.items()}
        changes = []
        for names, numbers in _group(changed).items():
            chosen = rows if len(numbers) == len(rows) else [rows[number] for number in numbers]
            keys = [list(map(itemgetter(n), chosen)) for n in range(len(self.rows.primary_key))]
            old, new = zip(*(changed[name].only(numbers) for name in names), strict=True)
            changes.append(Changes(names, keys, old, new))
        failed = [
            (number, self.failure(rows[number], name, error))
            for name, each in changed.items()
            for number, error in each.failed
        ]
        failed.sort(key=itemgetter(0))  # in the order of the rows, whatever the column
        values = (map(itemgetter(position), rows) for position in self._value_positions)
        size = sum(sum(map(len, filter(None, column))) for column in values)
        return Outcome(changes, [row for _, row in failed], size)

    def write(
        self, connection: sa.Connection, bounds: BatchBounds, outcome: Outcome
    ) -> tuple[int, list[FailedRow]]:
        """Write the changes; return how many values were written, and what failed."""
        assert self._writer is not None
        try:
            written = sum(self._writer.write(connection, each) for each in outcome.changes)
        except UNREADABLE as error:
            fault = self.rows.unreadable(type(error))
        else:
            is_done = written >= outcome.values
            return written, [] if is_done else self._unchanged(connection, bounds, outcome)
        raise fault

    def _unchanged(
        self, connection: sa.Connection, bounds: BatchBounds, outcome: Outcome
    ) -> list[FailedRow]:
        """Return the values that were to be written and are still to do.

        The rows are locked, so no other writer was faster.
        """
        keys = {repr(key) for each in outcome.changes for key in zip(*each.keys, strict=True)}
        rows = {repr(self.rows.key_of(row)): row for row in self.rows.read(connection, bounds)}
        again = self.apply([row for key, row in rows.items() if key in keys])
        error = RotationError(_UNCHANGED)
        return [
            replace(self.failure(rows[repr(key)], name, error), reason=_UNCHANGED)
            for each in again.changes
            for key in zip(*each.keys, strict=True)
            for name in each.names
        ]

    def refused(
        self, connection: sa.Connection, bounds: BatchBounds, error: DBAPIError, reason: str
    ) -> tuple[Sequence[sa.Row[Any]], list[FailedRow]]:
        """Return the rows within `bounds`, which the database refuses to change, as failures."""
        # Without its values: the driver may have failed to read them.
        rows = self.rows.read(connection, bounds, lock=True, keys_only=True)
        names = list(self.changers)
        failures = [self.failure(row, name, error) for row in rows for name in names]
        return rows, [replace(failure, reason=reason) for failure in failures]

    def failure(self, row: Sequence[Any], name: str, error: Exception) -> FailedRow:
        """Return the report of a value that failed."""
        return FailedRow(self.name, name, self.rows.key_of(row), type(error).__name__)


_UNCHANGED: Final = (
    "the database did not change the row, and raised no error: its primary key, as it is read, "
    "does not find it (the column's type is inexact, as real is, or the model gives it another "
    "one), or a trigger or rule of the table left it as it is"
)


def _group(changed: Mapping[str, Changed]) -> dict[tuple[str, ...], list[int]]:
    """Return the numbers of the rows by which of their columns have changed."""
    first, *others = (each.numbers for each in changed.values())
    if all(other == first for other in others):
        return {tuple(changed): first} if first else {}
    names_of: dict[int, tuple[str, ...]] = {}
    for name, each in changed.items():
        for number in each.numbers:
            names_of[number] = (*names_of.get(number, ()), name)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number in sorted(names_of):
        groups.setdefault(names_of[number], []).append(number)
    return groups


_SAME_KEY: Final = (
    "its key version is another name of the primary key itself, and a rotation between two names "
    "of one key renews nothing. Give the new version a key of its own, from generate_master_key()"
)


_RETIRED: Final = (
    "its key version is retired. If it is from a restored backup, rotate once with "
    "keyring.with_oldest(None) or without LUCENT_SECRETS_OLDEST_VERSION; unretire() the version if "
    "it is the key registry that retired it"
)


class Reseal(Job):
    """Seal values under the primary key.

    :param keyring: opens with all its keys, seals with its primary.
    :param stale_only: read only rows with a value that is not under the primary key; otherwise,
        all rows with a value.
    """

    def __init__(
        self,
        target: TargetTable,
        keyring: Keyring,
        dialect: sa.Dialect,
        *,
        stale_only: bool = True,
    ) -> None:
        self._stale_only = stale_only
        values = [target.clause.c[each.name] for each in target.columns]
        headers = {
            each.name: keyring.for_context(each.type.contexts[0]).primary.header
            for each in target.columns
        }
        self.stale = [_is_stale(value, headers[value.name], dialect) for value in values]
        has_value = sa.or_(*(value.is_not(None) for value in values))
        super().__init__(
            target,
            dialect,
            [_sealed_value(value, dialect) for value in values],
            sa.or_(*self.stale) if stale_only else has_value,
            # The database knows the length without reading the bytes, even if it stores them
            # outside of the row.
            [sa.func.length(value) for value in values],
        )
        names = [*self._names, *headers]
        self.sealed = [SealedColumn(each, keyring, names) for each in target.columns]
        self.changers = {each.name: each.reseal for each in self.sealed}

    def count_left(self, read: Read) -> int:
        """Count the values that are not under the primary key."""
        return sum(self.rows.count_all(read, condition) for condition in self.stale)

    def refused(
        self, connection: sa.Connection, bounds: BatchBounds, error: DBAPIError, reason: str
    ) -> tuple[Sequence[sa.Row[Any]], list[FailedRow]]:
        """Return the stale values within `bounds` as failures, with what they are sealed under."""
        rows = self.rows.read(connection, bounds, lock=True)
        failures = [
            self.failure(row, each.name, error)
            for row in rows
            for each in self.sealed
            if each.is_stale(row) or (not self._stale_only and each.value(row) is not None)
        ]
        return rows, [replace(failure, reason=reason) for failure in failures]

    def failure(self, row: Sequence[Any], name: str, error: Exception) -> FailedRow:
        """Return the report of a value that failed, with what it is sealed under."""
        (sealed,) = (each for each in self.sealed if each.name == name)
        envelope = parse(sealed.value(row) or b"")
        failure = super().failure(row, name, error)
        if envelope is None:
            return failure
        reason = _RETIRED if isinstance(error, RetiredKeyError) else None
        if isinstance(error, UnknownKeyVersionError) and sealed.header.endswith(envelope.key_id):
            reason = _SAME_KEY
        return replace(
            failure,
            key_version=envelope.version,
            fingerprint=envelope.key_id.hex(),
            reason=reason,
        )


class Rebind(Reseal):
    """Seal values of an earlier context in the column's own, and under the primary key.

    Only opening a value tells its context, so each pass opens all of them.
    """

    def __init__(self, target: TargetTable, keyring: Keyring, dialect: sa.Dialect) -> None:
        super().__init__(target, keyring, dialect, stale_only=False)
        self._keyring = keyring
        (self._target,), (self._sealed,) = target.columns, self.sealed
        self.changers = {each.name: each.rebind for each in self.sealed}

    def count_left(self, read: Read) -> int:
        """Count the values that do not open in the column's own context."""
        return sum(context != self._own_context for context in self.contexts(read))

    @property
    def _own_context(self) -> str:
        return self._target.type.contexts[0]

    def earlier_context(self, read: Read) -> str | None:
        """Return the context of the first value that is of an earlier one."""
        known = {None, self._own_context}
        return next((context for context in self.contexts(read) if context not in known), None)

    def contexts(self, read: Read, sample: int | None = None) -> Iterator[str | None]:
        """Give the context that each value opens in, or each of the first `sample` values."""
        return map(self._context_of, self.rows.every(read, sample))

    def _context_of(self, row: Sequence[Any]) -> str | None:
        data, row_context = self._sealed.value(row), self._sealed.row_context(row)
        for context in self._target.type.contexts:
            try:
                self._keyring.for_context(context).open(data or b"", row_context)
            except DecryptionError:
                continue
            return context
        return None


class Backfill(Job):
    """Fill one column of a table from another.

    :param target: the table, with the sealed one of the two.
    :param plain: the plaintext one.
    :param keyring: gives the keyring when the first value needs it.
    :param to_sealed: whether the plaintext is the source.
    :param compare: look at every row, not only at those that are not filled yet. Fill again what no
        longer agrees with its source: a writer may know of the source only.
    :param written_since: with `compare`, the condition that a row is to be looked at.
    """

    def __init__(
        self,
        target: TargetTable,
        plain: PlainColumn,
        keyring: Callable[[], Keyring],
        dialect: sa.Dialect,
        *,
        to_sealed: bool,
        compare: bool,
        written_since: sa.ColumnElement[bool] | None,
    ) -> None:
        (self._target,) = target.columns
        if plain.name not in target.clause.c:
            target.clause.append_column(sa.column(plain.name))
        sealed_value, plain_value = target.clause.c[self._target.name], target.clause.c[plain.name]
        source, filled = (plain_value, sealed_value) if to_sealed else (sealed_value, plain_value)
        self.unfilled = sa.and_(source.is_not(None), filled.is_(None))
        pending: sa.ColumnElement[bool] = self.unfilled
        if compare:
            pending = sa.or_(source.is_not(None), filled.is_not(None))
        if written_since is not None:
            pending = sa.and_(pending, written_since)
        super().__init__(
            target,
            dialect,
            [plain.expression(), _sealed_value(sealed_value, dialect)],
            pending,
            [plain.size() if to_sealed else sa.func.length(sealed_value)],
            # The next pass fills a row that this one skipped. A comparison would miss the row.
            skips_locked=not compare,
        )
        self._plain = plain
        self._keyring = keyring
        self._to_sealed = to_sealed
        self._compare = compare
        self._source = source.name
        self._filled = filled.name
        self.changers = {self._filled: partial(change_each, change=self._change)}
        self._types = {} if to_sealed else {plain.name: plain.type}

    def count_left(self, read: Read) -> int:
        """Count the rows that are not filled yet."""
        return self.rows.count_all(read, self.unfilled)

    def write(
        self, connection: sa.Connection, bounds: BatchBounds, outcome: Outcome
    ) -> tuple[int, list[FailedRow]]:
        """Write the changes, and when comparing, read again what was written: the database may have
        turned it into something else.
        """
        written, failed = super().write(connection, bounds, outcome)
        if not (written and self._compare):
            return written, failed
        fault = ConversionError("what was written does not read as what it was")
        keys = {repr(key) for each in outcome.changes for key in zip(*each.keys, strict=True)}
        return written, [
            super(Backfill, self).failure(row, self._filled, fault)
            for row in self.rows.read(connection, bounds)
            if repr(self.rows.key_of(row)) in keys and not self._is_filled(row)
        ]

    def failure(self, row: Sequence[Any], name: str, error: Exception) -> FailedRow:
        """Return the report of a value that failed, which is the source's."""
        return super().failure(row, self._source, error)

    def _change(self, row: Sequence[Any]) -> Change | None:
        if self._is_filled(row):
            return None
        plain, sealed = row[-2:]
        old = sealed if self._to_sealed else None if plain is None else plain.raw
        return None if old is None else as_bytes(old)[:LONGEST_PREFIX], self._convert(row)

    def _convert(self, row: Sequence[Any]) -> Any:
        plain, sealed = row[-2:]
        if self._to_sealed and plain is not None:
            return self._sealed.seal(self._plain.read(plain), row)
        if not self._to_sealed and sealed is not None:
            return self._plain.write(self._open(row))
        return None

    def _is_filled(self, row: Sequence[Any]) -> bool:
        plain, sealed = row[-2:]
        if plain is None or sealed is None:
            return plain is sealed
        try:
            return self._plain.agree(self._plain.read(plain), self._open(row))
        except LucentError:
            return False  # converting it again tells whether its source is at fault

    def _open(self, row: Sequence[Any]) -> bytes:
        document = self._sealed.open(row)
        assert document is not None
        return document

    @cached_property
    def _sealed(self) -> SealedColumn:
        names = [*self._names, self._plain.name, self._target.name]
        return SealedColumn(self._target, self._keyring(), names)


def _sealed_value(value: sa.ColumnElement[Any], dialect: sa.Dialect) -> sa.ColumnElement[Any]:
    """Return what to select of a sealed column."""
    # SQLite's driver would decode text that was never sealed, and fail if it is not UTF-8.
    return sa.cast(value, sa.LargeBinary) if dialect.name == "sqlite" else value


def _is_stale(
    value: sa.ColumnElement[Any], header: bytes, dialect: sa.Dialect
) -> sa.ColumnElement[bool]:
    """Return the condition that a value does not begin with `header`."""
    if dialect.name == "sqlite":
        # The same without a call per row. Bytes sort after everything that is not bytes.
        next_header = (int.from_bytes(header) + 1).to_bytes(len(header))
        first, end = (sa.literal(bound, sa.LargeBinary) for bound in (header, next_header))
        return sa.or_(value < first, value >= end)
    prefix = sa.func.substr(value, 1, len(header), type_=sa.LargeBinary)
    return sa.and_(value.is_not(None), prefix != sa.literal(header, sa.LargeBinary))
