"""Conversions of a column in batches: plaintext to sealed, sealed to plaintext, one context to
another. Each is a worker that the engine drives as it drives a rotation's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    column,
    func,
    select,
    table,
    update,
)
from sqlalchemy.types import TypeEngine

from .._json import STRICT, JSONValue, same_value
from ..exceptions import DecryptionError, LucentError
from ..keyring import Keyring
from ..types import EncryptedJSON, as_bytes, encode_row, open_in_contexts
from ._table import Batch, PrimaryKey, key_range, may_lock_rows
from .report import FailedRow

Reader = Callable[[Any], JSONValue]
"""Turns what a plaintext column holds into the JSON value to seal."""

Writer = Callable[[JSONValue], Any]
"""Turns an opened JSON value into what a plaintext column is to hold."""


class ReadFailedError(LucentError):
    """A plaintext value could not be read as JSON."""


class PlainColumn:
    """Reads and writes the values of a plaintext column of one type, one value at a time.

    A value is fetched as the driver gives it and converted here, so that one that cannot be read
    fails by itself and not with the whole batch.
    """

    def __init__(
        self,
        name: str,
        type_: TypeEngine[Any],
        dialect: Dialect,
        reader: Reader | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.name = name
        self.type = type_
        self._is_json = isinstance(type_, JSON)
        self._is_text = isinstance(type_, String)
        self._as_text = self._is_json and dialect.name != "sqlite"
        self._reader = reader
        self._writer = writer
        self._process = (
            None
            if self._is_json or self._is_text
            else type_.dialect_impl(dialect).result_processor(dialect, None)
        )

    def expression(self) -> ColumnElement[Any]:
        """What to select. JSON is selected as text: drivers would read it in ways of their own."""
        raw: ColumnElement[Any] = column(self.name)
        return cast(raw, Text) if self._as_text else raw

    def read(self, stored: Any) -> JSONValue:
        """Return the JSON value of `stored`, or raise `ReadFailedError`."""
        try:
            if self._process is not None:
                stored = self._process(stored)
            if self._reader is not None:
                return self._reader(stored)
            if self._is_json or self._is_text:
                return STRICT.loads(stored.encode("utf-8") if isinstance(stored, str) else stored)
            return stored
        except Exception as error:  # noqa: BLE001  (a reader may raise anything)
            fault = type(error).__name__
        # Not chained: a parser's error carries the text that it could not read.
        raise ReadFailedError(f"a value of {self.name} cannot be read as JSON ({fault})")

    def write(self, value: JSONValue) -> Any:
        """Return what to bind for `value`."""
        if self._writer is not None:
            return self._writer(value)
        return STRICT.dumps(value).decode("utf-8") if self._is_text else value


class _Worker:
    """What the conversions share: rows in primary-key order, written one column at a time."""

    def __init__(
        self, owner: Table, sealed: Column[Any], keyring: Keyring, dialect: Dialect
    ) -> None:
        type_ = sealed.type
        assert isinstance(type_, EncryptedJSON)
        self._keyring = keyring
        self._type = type_
        self._locking = may_lock_rows(dialect)
        bound = [owner.c[name] for name in type_.bound_to]
        plain = dict.fromkeys([*owner.primary_key.columns, *bound])
        names = dict.fromkeys(c.name for c in owner.columns if c not in plain)
        self._clause = table(
            owner.name,
            *(column(c.name, c.type) for c in plain),
            *map(column, names),
            schema=owner.schema,
        )
        self.name = owner.fullname
        self.primary_key = tuple(self._clause.c[c.name] for c in owner.primary_key.columns)
        self._selected = [self._clause.c[c.name] for c in plain]
        self._bound = [list(plain).index(c) for c in bound]

    def _read(
        self,
        connection: Connection,
        values: Sequence[ColumnElement[Any]],
        condition: ColumnElement[bool],
        after: PrimaryKey | None,
        limit: int,
        *,
        lock: bool = False,
    ) -> Sequence[Sequence[Any]]:
        statement = (
            select(*self._selected, *values)
            .select_from(self._clause)
            .where(condition, *key_range(self.primary_key, after, None))
            .order_by(*self.primary_key)
            .limit(limit)
        )
        if lock and self._locking:
            statement = statement.with_for_update(skip_locked=True)
        return connection.execute(statement).all()

    def _key(self, row: Sequence[Any]) -> PrimaryKey:
        return tuple(row[: len(self.primary_key)])

    def _row_context(self, row: Sequence[Any]) -> bytes:
        return encode_row([row[position] for position in self._bound], self._type.bound_to)

    def _seal(self, value: JSONValue, row: Sequence[Any]) -> bytes:
        keys = self._keyring.for_context(self._type.contexts[0])
        return keys.seal(STRICT.dumps(value), self._row_context(row))

    def _open(self, sealed: Any, row: Sequence[Any]) -> JSONValue:
        return STRICT.loads(
            open_in_contexts(
                self._type.contexts, as_bytes(sealed), self._row_context(row), self._keyring
            )
        )

    def _set(
        self,
        connection: Connection,
        name: str,
        type_: TypeEngine[Any],
        changes: Sequence[tuple[PrimaryKey, Any]],
    ) -> None:
        """Write a column. The rows are locked, by `_read` or as a whole table."""
        if not changes:
            return
        statement = (
            update(self._clause)
            .where(
                *(
                    part == bindparam(f"lucent_key_{position}", type_=part.type)
                    for position, part in enumerate(self.primary_key)
                )
            )
            .values({name: bindparam("lucent_new", type_=type_)})
        )
        connection.execute(
            statement,
            [
                {
                    **{f"lucent_key_{position}": part for position, part in enumerate(key)},
                    "lucent_new": new,
                }
                for key, new in changes
            ],
        )

    def _failure(self, name: str, row: Sequence[Any], error: LucentError) -> FailedRow:
        return FailedRow(self.name, name, self._key(row), type(error).__name__)


class BackfillWorker(_Worker):
    """Fill one column of a table from another: where the source has a value and it has none."""

    def __init__(
        self,
        owner: Table,
        sealed: Column[Any],
        plain: PlainColumn,
        keyring: Keyring,
        dialect: Dialect,
        *,
        to_sealed: bool,
    ) -> None:
        super().__init__(owner, sealed, keyring, dialect)
        self._sealed_name = sealed.name
        self._plain = plain
        self._to_sealed = to_sealed
        self._source = plain.name if to_sealed else sealed.name
        self._target = sealed.name if to_sealed else plain.name
        self._target_type: TypeEngine[Any] = LargeBinary() if to_sealed else plain.type

    def prepare(self, connection: Connection) -> None:
        """Fail now if a column is missing; write nothing."""
        self._pending(connection, None, 0)

    def count_stale(self, connection: Connection) -> int:
        """Count the rows that are still to be filled."""
        statement = select(func.count()).select_from(self._clause).where(self._is_pending)
        return connection.scalar(statement) or 0

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Fill the next `limit` rows behind `after`."""
        rows = self._pending(connection, after, limit, lock=True)
        changes, failed = [], []
        for row in rows:
            try:
                changes.append((self._key(row), self._convert(row[-1], row)))
            except LucentError as error:
                failed.append(self._failure(self._source, row, error))
        self._set(connection, self._target, self._target_type, changes)
        last = self._key(rows[-1]) if rows else None
        return Batch(len(rows), last, len(changes), failed, sum(len(r[-1]) for r in rows))

    def reconcile(self, connection: Connection, limit: int) -> Iterator[FailedRow]:
        """Bring the filled column up to date with its source, row by row, under a table lock.

        Between the back-fill and the lock, writers that know of one column only may have changed
        the source. Gives what cannot be converted.
        """
        source, target = self._clause.c[self._source], self._clause.c[self._target]
        values = [self._plain.expression(), self._clause.c[self._sealed_name]]
        after: PrimaryKey | None = None
        rows: Sequence[Sequence[Any]] = [()]
        while rows:
            condition = source.is_not(None) | target.is_not(None)
            rows = self._read(connection, values, condition, after, limit)
            changes: list[tuple[PrimaryKey, Any]] = []
            for row in rows:
                plain, sealed = row[-2], row[-1]
                stored, filled = (plain, sealed) if self._to_sealed else (sealed, plain)
                try:
                    if stored is None:
                        changes.append((self._key(row), None))
                    elif filled is None or not self._agree(plain, sealed, row):
                        changes.append((self._key(row), self._convert(stored, row)))
                except LucentError as error:
                    yield self._failure(self._source, row, error)
            self._set(connection, self._target, self._target_type, changes)
            after = self._key(rows[-1]) if rows else after

    @property
    def _is_pending(self) -> ColumnElement[bool]:
        columns = self._clause.c
        return and_(columns[self._source].is_not(None), columns[self._target].is_(None))

    def _pending(
        self, connection: Connection, after: PrimaryKey | None, limit: int, *, lock: bool = False
    ) -> Sequence[Sequence[Any]]:
        value = (
            self._plain.expression() if self._to_sealed else self._clause.c[self._sealed_name]
        )
        return self._read(connection, [value], self._is_pending, after, limit, lock=lock)

    def _convert(self, stored: Any, row: Sequence[Any]) -> Any:
        if self._to_sealed:
            return self._seal(self._plain.read(stored), row)
        return self._plain.write(self._open(stored, row))

    def _agree(self, plain: Any, sealed: Any, row: Sequence[Any]) -> bool:
        try:
            return same_value(self._plain.read(plain), self._open(sealed, row))
        except LucentError:
            return False


class RebindWorker(_Worker):
    """Seal values of an earlier context under the column's own, and under the primary key.

    Whether a value is of the earlier context only opening it can tell: each pass opens all.
    """

    def __init__(
        self, owner: Table, sealed: Column[Any], keyring: Keyring, dialect: Dialect
    ) -> None:
        super().__init__(owner, sealed, keyring, dialect)
        self._name = sealed.name

    def prepare(self, connection: Connection) -> None:
        """Fail now if the column is missing; write nothing."""
        self._values(connection, None, 0)

    def count_stale(self, connection: Connection) -> int:
        """Count the values that do not open under the column's own context."""
        count = 0
        after: PrimaryKey | None = None
        rows: Sequence[Sequence[Any]] = [()]
        while rows:
            rows = self._values(connection, after, 1_000)
            count += sum(not self._is_bound(row) for row in rows)
            after = self._key(rows[-1]) if rows else after
        return count

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Re-seal what is of an earlier context among the next `limit` rows behind `after`."""
        rows = self._values(connection, after, limit, lock=True)
        changes, failed = [], []
        for row in rows:
            if self._is_bound(row):
                continue
            try:
                changes.append((self._key(row), self._seal(self._open(row[-1], row), row)))
            except LucentError as error:
                failed.append(self._failure(self._name, row, error))
        self._set(connection, self._name, LargeBinary(), changes)
        last = self._key(rows[-1]) if rows else None
        return Batch(len(rows), last, len(changes), failed, sum(len(r[-1]) for r in rows))

    def _values(
        self, connection: Connection, after: PrimaryKey | None, limit: int, *, lock: bool = False
    ) -> Sequence[Sequence[Any]]:
        value = self._clause.c[self._name]
        return self._read(connection, [value], value.is_not(None), after, limit, lock=lock)

    def _is_bound(self, row: Sequence[Any]) -> bool:
        own = self._type.contexts[:1]
        try:
            open_in_contexts(own, as_bytes(row[-1]), self._row_context(row), self._keyring)
        except DecryptionError:
            return False
        return True
