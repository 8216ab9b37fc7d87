"""One table: count its stale values, read its rows in primary-key order, seal them anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    Row,
    and_,
    bindparam,
    cast,
    func,
    literal,
    or_,
    select,
)

from .._envelope import NONCE_SIZE, header_size
from ..exceptions import ConfigurationError, DecryptionError
from ..keyring import Keyring
from ..types import as_bytes, encode_row, open_in_contexts
from ._write import Change, Writer, writer_for
from .report import FailedRow
from .targets import TargetColumn, TargetTable

PrimaryKey = tuple[Any, ...]

_ROW_LOCKING: Final = frozenset({"postgresql", "mysql", "mariadb"})


class Batch(NamedTuple):
    """What became of one batch."""

    rows: int
    """Rows that were read."""
    last: PrimaryKey | None
    """The primary key of the last one."""
    written: int
    """Values written."""
    failed: Sequence[FailedRow]
    size: int
    """Bytes of the values that were read."""


class SealedColumn:
    """Opens and re-seals the values of one column."""

    def __init__(self, target: TargetColumn, keyring: Keyring, names: Sequence[str]) -> None:
        self.name = target.name
        self.contexts = target.type.contexts
        self.keys = keyring.for_context(self.contexts[0])
        self.header = self.keys.primary.header
        self._keyring = keyring
        self.bound_to = target.type.bound_to
        self.bound_columns = target.bound_to
        self._positions = [names.index(name) for name in target.bound_to]
        self.position = names.index(target.name)

    def row_context(self, row: Sequence[Any]) -> bytes:
        """Return the context that `row`, in the order of the select list, gives its value."""
        if not self._positions:
            return b""
        return encode_row([row[position] for position in self._positions], self.bound_to)

    def open(self, sealed: bytes, row: bytes) -> bytes:
        """Return the plaintext, or raise a `DecryptionError`."""
        return open_in_contexts(self.contexts, sealed, row, self._keyring)

    def renew(self, sealed: bytes, row: bytes) -> bytes:
        """Return the same plaintext sealed under the primary key, or raise `DecryptionError`."""
        return self.keys.seal(self.open(sealed, row), row)


class TableWorker:
    """Reads, opens and re-seals the rows of one table. The caller has the transaction."""

    def __init__(self, target: TargetTable, keyring: Keyring, dialect: Dialect) -> None:
        self.target = target
        self.name = target.name
        self.primary_key = target.primary_key
        self._locking = dialect.name in _ROW_LOCKING
        clause = target.clause
        sealed = {found.name for found in target.columns}
        plain = [c for c in clause.c if c.name not in sealed]
        plain_first = [*target.primary_key, *(c for c in plain if c not in target.primary_key)]
        values: list[ColumnElement[Any]] = [clause.c[found.name] for found in target.columns]
        if dialect.name == "sqlite":
            # The driver would decode text that was never sealed, and fail if it is not UTF-8.
            values = [cast(value, LargeBinary) for value in values]
        self.selected: list[ColumnElement[Any]] = [*plain_first, *values]
        names = [*(c.name for c in plain_first), *(found.name for found in target.columns)]
        self.columns = [SealedColumn(found, keyring, names) for found in target.columns]
        self._key_size = len(target.primary_key)
        self._writer: Writer | None = None

    # -- statements ------------------------------------------------------------------------------

    def prepare(self, connection: Connection) -> None:
        """Fail now if the table or a column is missing or not ours to lock; write nothing."""
        self._writer = writer_for(connection, self.target)
        self.read(connection, None, 0, stale_only=True)

    def is_stale(self, sealed: SealedColumn) -> ColumnElement[bool]:
        """The condition that a value is not under the primary key."""
        value = self.target.clause.c[sealed.name]
        prefix = func.substr(value, 1, len(sealed.header), type_=LargeBinary)
        return and_(value.is_not(None), prefix != literal(sealed.header, LargeBinary))

    def any_stale(self) -> ColumnElement[bool]:
        """The condition that a row has a value which is not under the primary key."""
        return or_(*map(self.is_stale, self.columns))

    def count_stale(self, connection: Connection) -> int:
        """Count the values that are not under the primary key."""
        return sum(
            connection.scalar(
                select(func.count()).select_from(self.target.clause).where(self.is_stale(sealed))
            )
            or 0
            for sealed in self.columns
        )

    def read(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        limit: int | None,
        *,
        upto: PrimaryKey | None = None,
        stale_only: bool = False,
        lock: bool = True,
    ) -> Sequence[Row[Any]]:
        """Return rows behind the primary key `after`, in order; stale ones are locked."""
        if stale_only:
            condition = self.any_stale()
        else:
            clause = self.target.clause
            condition = or_(*(clause.c[sealed.name].is_not(None) for sealed in self.columns))
        statement = (
            select(*self.selected)
            .where(condition, *self.key_range(after, upto))
            .order_by(*self.primary_key)
            .limit(limit)
        )
        if stale_only and lock and self._locking:
            # Rows that another rotator has in hand are left to it. `key_share` is PostgreSQL's lock
            # that leaves alone those who insert rows with a foreign key to this one.
            statement = statement.with_for_update(skip_locked=True, key_share=True)
        return connection.execute(statement).all()

    def key_range(
        self, after: PrimaryKey | None, upto: PrimaryKey | None
    ) -> list[ColumnElement[bool]]:
        """The conditions that a row is behind `after`, and not behind `upto`."""
        conditions = []
        if after is not None:
            conditions.append(_compared(self.primary_key, after, "after", behind=True))
        if upto is not None:
            conditions.append(_compared(self.primary_key, upto, "upto", behind=False))
        return conditions

    # -- rows ------------------------------------------------------------------------------------

    def primary_key_of(self, row: Sequence[Any]) -> PrimaryKey:
        """Return the primary key of `row`."""
        return tuple(row[: self._key_size])

    def size_of(self, row: Sequence[Any]) -> int:
        """Return the bytes of the sealed values of `row`."""
        return sum(len(row[sealed.position] or b"") for sealed in self.columns)

    def open_values(self, row: Sequence[Any]) -> Iterator[FailedRow | None]:
        """Open each value of `row`; give ``None`` for it, or how it failed."""
        for sealed in self.columns:
            value = row[sealed.position]
            if value is None:
                continue
            try:
                sealed.open(as_bytes(value), sealed.row_context(row))
            except (DecryptionError, ConfigurationError) as error:
                yield self._failure(row, sealed, error)
            else:
                yield None

    def reseal(self, rows: Sequence[Row[Any]]) -> tuple[list[Change], list[FailedRow], int]:
        """Seal the stale values of `rows` anew; return that, the failures and the bytes read."""
        changes, failed, size = [], [], 0
        for row in rows:
            names: tuple[str, ...] = ()
            old: tuple[bytes, ...] = ()
            new: tuple[bytes, ...] = ()
            for sealed in self.columns:
                value = row[sealed.position]
                if value is None:
                    continue
                value = as_bytes(value)
                if value.startswith(sealed.header):
                    continue
                size += len(value)
                try:
                    renewed = sealed.renew(value, sealed.row_context(row))
                except (DecryptionError, ConfigurationError) as error:
                    failed.append(self._failure(row, sealed, error))
                    continue
                names += (sealed.name,)
                # What is compared when it is written: the nonce is fresh for every seal, so this
                # decides as well as the whole value would, and sends a few bytes.
                old += (value[: header_size(value) + NONCE_SIZE],)
                new += (renewed,)
            if names:
                changes.append(Change(self.primary_key_of(row), names, old, new))
        return changes, failed, size

    def _failure(self, row: Sequence[Any], sealed: SealedColumn, error: Exception) -> FailedRow:
        return FailedRow(
            self.target.name, sealed.name, self.primary_key_of(row), type(error).__name__
        )

    # -- batches ---------------------------------------------------------------------------------

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Re-seal the next `limit` stale rows behind `after`."""
        rows = self.read(connection, after, limit, stale_only=True)
        changes, failed, size = self.reseal(rows)
        assert self._writer is not None
        written = self._writer.write(connection, changes) if changes else 0
        last = self.primary_key_of(rows[-1]) if rows else None
        return Batch(len(rows), last, written, failed, size)

    def rehearse(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Do what :meth:`batch` does, but lock nothing and write nothing."""
        rows = self.read(connection, after, limit, stale_only=True, lock=False)
        changes, failed, size = self.reseal(rows)
        last = self.primary_key_of(rows[-1]) if rows else None
        return Batch(len(rows), last, sum(len(c.names) for c in changes), failed, size)


def _compared(
    columns: Sequence[ColumnElement[Any]], values: PrimaryKey, name: str, *, behind: bool
) -> ColumnElement[bool]:
    """
    Return ``(a, b) > (x, y)``, or ``<=``, spelled out: each database's planner can use an index.

    Row values would be shorter, but MySQL and MariaDB scan the table for them.
    """
    parameters = [
        bindparam(f"lucent_{name}_{position}", value, type_=column.type)
        for position, (column, value) in enumerate(zip(columns, values, strict=True))
    ]
    *rest, (last_column, last) = zip(columns, parameters, strict=True)
    condition = last_column > last if behind else last_column <= last
    for column_, value in reversed(rest):
        if behind:
            condition = and_(column_ >= value, or_(column_ > value, condition))
        else:
            condition = and_(column_ <= value, or_(column_ < value, condition))
    return condition
