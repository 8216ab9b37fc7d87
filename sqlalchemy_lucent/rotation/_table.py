"""One table: count its stale values, read its rows in primary-key order, seal them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    Row,
    Select,
    and_,
    bindparam,
    cast,
    func,
    literal,
    not_,
    or_,
    select,
)

from .._envelope import NONCE_SIZE, header_size
from .._keyset import is_behind
from ..exceptions import ConfigurationError, DecryptionError, RotationError
from ..keyring import Keyring
from ..types import as_bytes, encode_row, open_in_contexts
from ._write import Changes, Writer, writer_for
from .report import FailedRow
from .targets import TargetColumn, TargetTable

PrimaryKey = tuple[Any, ...]

ROW_LOCKING: Final = frozenset({"postgresql", "mysql", "mariadb"})


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


class Resealed(NamedTuple):
    """What became of some rows in memory."""

    changes: list[Changes]
    failed: list[FailedRow]
    size: int
    """Bytes of the values that were stale."""


class SealedColumn:
    """Opens and re-seals the values of one column."""

    def __init__(self, target: TargetColumn, keyring: Keyring, names: Sequence[str]) -> None:
        self.name = target.name
        self.contexts = target.type.contexts
        self.keys = keyring.for_context(self.contexts[0])
        self.header = self.keys.primary.header
        self.open: Callable[[bytes, bytes], bytes] = self.keys.open
        """Returns the plaintext of (sealed bytes, row context), or raises a `DecryptionError`."""
        if len(self.contexts) > 1:
            self.open = partial(_open_in_contexts, self.contexts, keyring)
        self.bound_to = target.type.bound_to
        self.bound_columns = target.bound_to
        self._positions = [names.index(name) for name in target.bound_to]
        self.position = names.index(target.name)

    def row_context(self, row: Sequence[Any]) -> bytes:
        """Return the context that `row`, in the order of the select list, gives its value."""
        if not self._positions:
            return b""
        return encode_row([row[position] for position in self._positions], self.bound_to)

    def renew(self, sealed: bytes, row: bytes) -> bytes:
        """Return the same plaintext sealed under the primary key, or raise `DecryptionError`."""
        return self.keys.seal(self.open(sealed, row), row)


class TableWorker:
    """Reads, opens and re-seals the rows of one table. The caller has the transaction."""

    def __init__(self, target: TargetTable, keyring: Keyring, dialect: Dialect) -> None:
        self.target = target
        self.name = target.name
        self.primary_key = target.primary_key
        self._dialect = dialect
        self._locking = dialect.name in ROW_LOCKING
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
        # Kept, because building a statement costs SQLAlchemy as much as running it.
        self._statements: dict[tuple[object, ...], Select[Any]] = {}

    # -- statements ------------------------------------------------------------------------------

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if the table or a column is missing or not ours to lock; write nothing."""
        self._writer = writer_for(connection, self.target)
        self.check_keys(connection)
        self.read(connection, None, 0, stale_only=True, lock=lock)

    def check_keys(self, connection: Connection) -> None:
        """Refuse a table with rows that no primary key leads to: SQLite allows NULL in one.

        :raises RotationError: there is such a row.
        """
        if connection.dialect.name != "sqlite":
            return
        lost = or_(*(part.is_(None) for part in self.primary_key))
        statement = select(literal(1)).select_from(self.target.clause).where(lost).limit(1)
        if connection.execute(statement).first() is not None:
            raise RotationError(
                f"table {self.target.name} has a row with NULL in its primary key; give such rows "
                "a primary key, so that they can be read in order and named"
            )

    def is_stale(self, sealed: SealedColumn) -> ColumnElement[bool]:
        """The condition that a value is not under the primary key."""
        value = self.target.clause.c[sealed.name]
        prefix = func.substr(value, 1, len(sealed.header), type_=LargeBinary)
        # "Distinct from", because SQLite's substr() of an empty value is NULL.
        return and_(
            value.is_not(None), prefix.is_distinct_from(literal(sealed.header, LargeBinary))
        )

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
        kind = (after is None, upto is None, limit is None, stale_only, lock)
        if kind not in self._statements:
            if stale_only:
                condition = self.any_stale()
            else:
                clause = self.target.clause
                condition = or_(*(clause.c[sealed.name].is_not(None) for sealed in self.columns))
            statement = self.in_order(select(*self.selected).where(condition), after, upto, limit)
            if stale_only and lock and self._locking:
                # Rows that another rotator has in hand are left to it. `key_share` is PostgreSQL's
                # lock that leaves alone those who insert rows with a foreign key to this one.
                statement = statement.with_for_update(skip_locked=True, key_share=True)
            self._statements[kind] = statement
        parameters = self.parameters(after, upto, limit)
        return connection.execute(self._statements[kind], parameters).all()

    def in_order(
        self,
        statement: Select[Any],
        after: PrimaryKey | None,
        upto: PrimaryKey | None,
        limit: int | None,
    ) -> Select[Any]:
        """Order `statement` by primary key, within what :meth:`parameters` will give."""
        statement = statement.where(*self.key_range(after, upto)).order_by(*self.primary_key)
        return statement if limit is None else statement.limit(bindparam("lucent_limit"))

    def key_range(
        self, after: PrimaryKey | None, upto: PrimaryKey | None
    ) -> list[ColumnElement[bool]]:
        """The conditions that a row is behind `after`, and not behind `upto`."""
        conditions = []
        if after is not None:
            parameters = _parameters(self.primary_key, "after")
            conditions.append(is_behind(self.primary_key, parameters, self._dialect))
        if upto is not None:
            parameters = _parameters(self.primary_key, "upto")
            conditions.append(not_(is_behind(self.primary_key, parameters, self._dialect)))
        return conditions

    def parameters(
        self, after: PrimaryKey | None, upto: PrimaryKey | None, limit: int | None = None
    ) -> dict[str, Any]:
        """Return the parameters of a statement within these bounds."""
        parameters = {
            f"lucent_{name}_{position}": value
            for name, key in (("after", after), ("upto", upto))
            for position, value in enumerate(key or ())
        }
        return parameters if limit is None else {**parameters, "lucent_limit": limit}

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

    def reseal(self, rows: Sequence[Row[Any]]) -> Resealed:
        """Seal the stale values of `rows` anew."""
        changes: dict[tuple[str, ...], Changes] = {}
        failed: list[FailedRow] = []
        size = 0
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
                if names not in changes:
                    changes[names] = Changes(names, self._key_size)
                changes[names].add(row, old, new)
        return Resealed(list(changes.values()), failed, size)

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
        written = sum(self._writer.write(connection, change) for change in changes)
        last = self.primary_key_of(rows[-1]) if rows else None
        return Batch(len(rows), last, written, failed, size)

    def rehearse(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Do what :meth:`batch` does, but lock nothing and write nothing."""
        rows = self.read(connection, after, limit, stale_only=True, lock=False)
        changes, failed, size = self.reseal(rows)
        last = self.primary_key_of(rows[-1]) if rows else None
        return Batch(len(rows), last, sum(len(c) * len(c.names) for c in changes), failed, size)


def _open_in_contexts(
    contexts: Sequence[str], keyring: Keyring, sealed: bytes, row: bytes
) -> bytes:
    return open_in_contexts(contexts, sealed, row, keyring)


def _parameters(columns: Sequence[ColumnElement[Any]], name: str) -> list[ColumnElement[Any]]:
    return [
        bindparam(f"lucent_{name}_{position}", type_=column.type)
        for position, column in enumerate(columns)
    ]
