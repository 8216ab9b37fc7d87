"""Conversions of a column, batch by batch: plaintext to sealed, sealed to plaintext, one context to
another. Each is a worker that the engine drives as it drives a rotation's.

A worker deals in documents: the UTF-8 JSON that is sealed. Text that is a JSON document already is
sealed as it is, so that it comes back to the letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    column,
    func,
    literal,
    or_,
    select,
    table,
    update,
)
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.types import TypeEngine

from .._envelope import LONGEST_PREFIX
from .._json import Codec, JSONValue, same_value
from .._keyset import is_behind
from ..exceptions import DecryptionError, LucentError
from ..keyring import Keyring
from ..types import EncryptedJSON, as_bytes, encode_row, open_in_contexts
from ._table import ROW_LOCKING, Batch, PrimaryKey
from ._visible import refuse_hidden_rows
from ._write import self_updating
from .report import FailedRow

Reader = Callable[[Any], JSONValue]
"""Turns a value, as the plaintext column's type gives it, into the JSON value to seal."""

Writer = Callable[[JSONValue], Any]
"""Turns an opened JSON value into a value that the plaintext column's type takes."""


class ConversionError(LucentError):
    """A value could not be read from a plaintext column, or would not be what it was in one."""


class PlainColumn:
    """Reads and writes a plaintext column of one type, one value at a time.

    A value is fetched as the driver gives it and converted here, so that one that cannot be read
    fails by itself and not with its batch, in an error that shows nothing of it.
    """

    def __init__(
        self,
        name: str,
        type_: TypeEngine[Any],
        codec: Codec,
        dialect: Dialect,
        reader: Reader | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.name = name
        self.type = type_
        self._codec = codec
        self._reader = reader
        self._writer = writer
        self._is_json = isinstance(type_, JSON)
        self._is_text = isinstance(type_, String)
        # Drivers would read JSON in ways of their own; that of SQLite fails on text that is not
        # UTF-8, and gives a number for JSON that is one.
        self._cast: type[TypeEngine[Any]] | None = None
        if dialect.name == "sqlite":
            self._cast = LargeBinary if self._is_json or self._is_text else None
        elif self._is_json:
            self._cast = Text
        impl = type_.dialect_impl(dialect)
        self._process = impl.result_processor(dialect, None)
        self._bind = impl.bind_processor(dialect)

    def expression(self) -> ColumnElement[Any]:
        """What to select."""
        raw: ColumnElement[Any] = column(self.name)
        return raw if self._cast is None else cast(raw, self._cast)

    def read(self, stored: Any) -> bytes:
        """Return the document that `stored` holds, or raise `ConversionError`."""
        try:
            return self._read(stored)
        except Exception as error:  # noqa: BLE001  (a reader or type may raise anything)
            fault = type(error).__name__
        # Not chained: a parser's error carries the text that it could not read.
        raise ConversionError(f"a value of {self.name} cannot be read as JSON ({fault})")

    def _read(self, stored: Any) -> bytes:
        if self._is_json or self._is_text:
            document = stored.encode("utf-8") if isinstance(stored, str) else bytes(stored)
            if self._is_text and self._reader is not None:
                return self._codec.dumps(self._reader(document.decode("utf-8")))
            value = self._codec.loads(document)
            if self._is_text:
                self._codec.dumps(value)  # refuses what could not come back
                return document
        else:
            value = stored if self._process is None else self._process(stored)
        return self._codec.dumps(value if self._reader is None else self._reader(value))

    def write(self, document: bytes) -> Any:
        """Return what to bind for `document`, or raise `ConversionError`."""
        try:
            value = self._write(document)
            if self._bind is not None:
                # SQLAlchemy does this again. An error then would show the value.
                self._bind(value)
        except Exception as error:  # noqa: BLE001
            fault = type(error).__name__
        else:
            if value is not None and self._fits(value):
                return value
            fault = "it is NULL there" if value is None else "it is too long"
        raise ConversionError(f"a value cannot be written to {self.name} ({fault})")

    def _write(self, document: bytes) -> Any:
        if self._is_text and self._writer is None:
            return document.decode("utf-8")
        value = self._codec.loads(document)
        if self._writer is not None:
            value = self._writer(value)
        return JSON.NULL if value is None and self._is_json else value

    def _fits(self, value: Any) -> bool:
        """Say whether text is not longer than the column: some databases would cut it."""
        length = self.type.length if isinstance(self.type, String) else None
        return length is None or not isinstance(value, str) or len(value) <= length

    def agree(self, one: bytes, other: bytes) -> bool:
        """Say whether two documents hold the same value."""
        return one == other or same_value(self._codec.loads(one), self._codec.loads(other))


class _Worker:
    """What the conversions share: rows in primary-key order, written one column at a time."""

    def __init__(
        self, owner: Table, sealed: Column[Any], keyring: Callable[[], Keyring], dialect: Dialect
    ) -> None:
        type_ = sealed.type
        assert isinstance(type_, EncryptedJSON)
        self._keyring = keyring
        self._type = type_
        self._dialect = dialect
        self._locking = dialect.name in ROW_LOCKING
        bound = [owner.c[name] for name in type_.bound_to]
        typed = dict.fromkeys([*owner.primary_key.columns, *bound])
        names = dict.fromkeys(c.name for c in owner.columns if c not in typed)
        self._clause = table(
            owner.name,
            *(column(c.name, c.type) for c in typed),
            *map(column, names),
            schema=owner.schema,
        )
        self.name = owner.fullname
        self.primary_key = tuple(self._clause.c[c.name] for c in owner.primary_key.columns)
        self._selected = [self._clause.c[c.name] for c in typed]
        self._bound = [list(typed).index(c) for c in bound]
        self._kept: dict[str, ColumnClause[Any]] = {}

    def _prepare(self, connection: Connection) -> None:
        refuse_hidden_rows(connection, self._clause.name, self._clause.schema)
        self._kept = {name: column(name) for name in self_updating(connection, self._clause)}
        for own in self._kept.values():
            if own.name not in self._clause.c:
                self._clause.append_column(own)

    def _read(
        self,
        connection: Connection,
        values: Sequence[ColumnElement[Any]],
        condition: ColumnElement[bool],
        after: PrimaryKey | None,
        limit: int,
        *,
        lock: bool = False,
        skip_locked: bool = False,
    ) -> Sequence[Sequence[Any]]:
        statement = (
            select(*self._selected, *values)
            .select_from(self._clause)
            .where(condition)
            .order_by(*self.primary_key)
            .limit(limit)
        )
        if after is not None:
            values_after = [
                literal(part, c.type) for c, part in zip(self.primary_key, after, strict=True)
            ]
            statement = statement.where(is_behind(self.primary_key, values_after, self._dialect))
        if lock and self._locking:
            statement = statement.with_for_update(skip_locked=skip_locked, key_share=True)
        return connection.execute(statement).all()

    def _key(self, row: Sequence[Any]) -> PrimaryKey:
        return tuple(row[: len(self.primary_key)])

    def _last(self, rows: Sequence[Sequence[Any]]) -> PrimaryKey | None:
        return self._key(rows[-1]) if rows else None

    def _row_context(self, row: Sequence[Any]) -> bytes:
        return encode_row([row[position] for position in self._bound], self._type.bound_to)

    def _seal(self, document: bytes, row: Sequence[Any]) -> bytes:
        keys = self._keyring().for_context(self._type.contexts[0])
        return keys.seal(document, self._row_context(row))

    def _open(self, sealed: Any, row: Sequence[Any], contexts: Sequence[str] = ()) -> bytes:
        contexts = contexts or self._type.contexts
        return open_in_contexts(contexts, as_bytes(sealed), self._row_context(row), self._keyring())

    def _set(
        self,
        connection: Connection,
        name: str,
        type_: TypeEngine[Any],
        changes: Sequence[tuple[PrimaryKey, Any]],
        old: Sequence[bytes] = (),
    ) -> None:
        """Write a column of rows that are locked, one by one or as a table.

        :param old: how each value began that is to be replaced. A table that others inherit from
            may have several rows of one primary key.
        """
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
            .values({name: bindparam("lucent_new", type_=type_), **self._kept})
        )
        parameters: list[dict[str, Any]] = [
            {
                **{f"lucent_key_{position}": part for position, part in enumerate(key)},
                "lucent_new": new,
            }
            for key, new in changes
        ]
        if old:
            beginning = func.substr(
                self._clause.c[name], 1, bindparam("lucent_size", type_=Integer), type_=LargeBinary
            )
            statement = statement.where(beginning == bindparam("lucent_old", type_=LargeBinary))
            for each, prefix in zip(parameters, old, strict=True):
                each |= {"lucent_old": prefix, "lucent_size": len(prefix)}
        connection.execute(
            statement,
            parameters,
            # Types of others often lack `cache_ok`, which SQLAlchemy would warn of.
            execution_options={"compiled_cache": None},
        )

    def _failure(self, name: str, row: Sequence[Any], error: LucentError) -> FailedRow:
        return FailedRow(self.name, name, self._key(row), type(error).__name__)


class BackfillWorker(_Worker):
    """Fill one column of a table from another.

    :param owner: the table, with its primary key, both columns and those that values are bound to.
    :param sealed: the sealed one of the two.
    :param plain: the plaintext one.
    :param keyring: gives the keyring when the first value needs it.
    :param to_sealed: whether the plaintext is the source.
    :param compare: look at every row rather than at those that are not filled yet, and fill again
        what no longer agrees with its source: a writer may know of the source only.
    :param written_since: with `compare`, the condition that a row is to be looked at.
    """

    def __init__(
        self,
        owner: Table,
        sealed: Column[Any],
        plain: PlainColumn,
        keyring: Callable[[], Keyring],
        dialect: Dialect,
        *,
        to_sealed: bool,
        compare: bool = False,
        written_since: ColumnElement[bool] | None = None,
    ) -> None:
        super().__init__(owner, sealed, keyring, dialect)
        self._plain = plain
        self._to_sealed = to_sealed
        self._compare = compare
        self._written_since = written_since
        self._source = plain.name if to_sealed else sealed.name
        self._target = sealed.name if to_sealed else plain.name
        self._target_type: TypeEngine[Any] = LargeBinary() if to_sealed else plain.type
        self._values = [plain.expression(), self._clause.c[sealed.name]]

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if a column is missing, or the rows are not ours to lock; write nothing."""
        self._prepare(connection)
        self._rows(connection, None, 0, lock=lock)

    def count_stale(self, connection: Connection) -> int:
        """Count the rows that are not filled yet."""
        statement = select(func.count()).select_from(self._clause).where(self._is_pending)
        return connection.scalar(statement) or 0

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Fill the next `limit` rows behind `after`."""
        rows = self._rows(connection, after, limit, lock=True)
        changes, failed = [], []
        for row in rows:
            try:
                if not self._is_filled(row):
                    changes.append((self._key(row), self._convert(row)))
            except LucentError as error:
                failed.append(self._failure(self._source, row, error))
        self._set(connection, self._target, self._target_type, changes)
        if changes and self._compare:
            failed += self._written_otherwise(connection, after, limit, {key for key, _ in changes})
        size = sum(len(value) for row in rows for value in row[-2:] if hasattr(value, "__len__"))
        more = len(rows) >= limit
        return Batch(len(rows), self._last(rows), more, len(changes), failed, size)

    @property
    def _is_pending(self) -> ColumnElement[bool]:
        columns = self._clause.c
        return and_(columns[self._source].is_not(None), columns[self._target].is_(None))

    def _rows(
        self, connection: Connection, after: PrimaryKey | None, limit: int, *, lock: bool = False
    ) -> Sequence[Sequence[Any]]:
        columns = self._clause.c
        condition = self._is_pending
        if self._compare:
            condition = or_(columns[self._source].is_not(None), columns[self._target].is_not(None))
            if self._written_since is not None:
                condition = and_(condition, self._written_since)
        return self._read(
            connection,
            self._values,
            condition,
            after,
            limit,
            lock=lock,
            # A row that is not filled yet is found again; one that was passed over is not.
            skip_locked=not self._compare,
        )

    def _source_and_target(self, row: Sequence[Any]) -> tuple[Any, Any]:
        plain, sealed = row[-2:]
        return (plain, sealed) if self._to_sealed else (sealed, plain)

    def _convert(self, row: Sequence[Any]) -> Any:
        source, _ = self._source_and_target(row)
        if source is None:
            return None
        if self._to_sealed:
            return self._seal(self._plain.read(source), row)
        return self._plain.write(self._open(source, row))

    def _is_filled(self, row: Sequence[Any]) -> bool:
        source, target = self._source_and_target(row)
        if source is None or target is None:
            return source is target
        plain, sealed = row[-2:]
        try:
            return self._plain.agree(self._plain.read(plain), self._open(sealed, row))
        except LucentError:
            return False  # converting it again tells whether its source is at fault

    def _written_otherwise(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        limit: int,
        written: set[PrimaryKey],
    ) -> list[FailedRow]:
        """Read again what was written; return what the database made something else of."""
        error = ConversionError("what was written does not read as what it was")
        return [
            self._failure(self._target, row, error)
            for row in self._rows(connection, after, limit)
            if self._key(row) in written and not self._is_filled(row)
        ]


class RebindWorker(_Worker):
    """Seal values of an earlier context under the column's own, and under the primary key.

    Whether a value is of the earlier context only opening it can tell: each pass opens all.
    """

    def __init__(
        self, owner: Table, sealed: Column[Any], keyring: Callable[[], Keyring], dialect: Dialect
    ) -> None:
        super().__init__(owner, sealed, keyring, dialect)
        self._column = sealed.name

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if the column is missing, or the rows are not ours to lock; write nothing."""
        self._prepare(connection)
        self._rows(connection, None, 0, lock=lock)

    def count_stale(self, connection: Connection) -> int:
        """Count the values that do not open under the column's own context."""
        count = 0
        after: PrimaryKey | None = None
        while rows := self._rows(connection, after, 1_000):
            count += sum(not self._is_bound(row) for row in rows)
            after = self._last(rows)
        return count

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Seal anew what is of an earlier context among the next `limit` rows behind `after`."""
        rows = self._rows(connection, after, limit, lock=True)
        changes, old, failed = [], [], []
        for row in rows:
            if self._is_bound(row):
                continue
            try:
                changes.append((self._key(row), self._seal(self._open(row[-1], row), row)))
            except LucentError as error:
                failed.append(self._failure(self._column, row, error))
            else:
                sealed = as_bytes(row[-1])
                old.append(sealed[:LONGEST_PREFIX])
        self._set(connection, self._column, LargeBinary(), changes, old)
        size = sum(len(as_bytes(row[-1])) for row in rows)
        more = len(rows) >= limit
        return Batch(len(rows), self._last(rows), more, len(changes), failed, size)

    def earlier_context(self, connection: Connection) -> str | None:
        """Return the context of the first value that is of an earlier one."""
        after: PrimaryKey | None = None
        while rows := self._rows(connection, after, 1_000):
            for row in rows:
                if self._is_bound(row):
                    continue
                for context in self._type.contexts[1:]:
                    if self._opens(row, context):
                        return context
            after = self._last(rows)
        return None

    def contexts_of(self, connection: Connection, sample: int) -> list[str | None]:
        """Return, for the first `sample` values, the context that each opens under."""
        found = []
        for row in self._rows(connection, None, sample):
            opened_under = (c for c in self._type.contexts if self._opens(row, c))
            found.append(next(opened_under, None))
        return found

    def _rows(
        self, connection: Connection, after: PrimaryKey | None, limit: int, *, lock: bool = False
    ) -> Sequence[Sequence[Any]]:
        value = self._clause.c[self._column]
        return self._read(
            connection, [value], value.is_not(None), after, limit, lock=lock, skip_locked=True
        )

    def _is_bound(self, row: Sequence[Any]) -> bool:
        return self._opens(row, self._type.contexts[0])

    def _opens(self, row: Sequence[Any], context: str) -> bool:
        try:
            self._open(row[-1], row, [context])
        except DecryptionError:
            return False
        return True
