"""Conversions of a column, batch by batch: plaintext to sealed, sealed to plaintext, one context to
another. Each is a worker that the engine drives as it drives a rotation's.

A worker deals in documents: the UTF-8 JSON that is sealed. Text that is a JSON document already is
sealed as it is, so that it comes back to the letter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Enum,
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
    or_,
    select,
    table,
    type_coerce,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine

from .._envelope import LONGEST_PREFIX, as_bytes
from .._json import Codec, JSONValue, same_value
from .._pagination import key_type
from .._row import encode_row
from ..exceptions import DecryptionError, LucentError, SerializationError
from ..keyring import Keyring
from ..types import EncryptedJSON
from ._updates import on_update_columns
from .report import FailedRow
from .rows import Batch, BatchBounds, PrimaryKey, Rows
from .throttle import BATCH_BYTES

Reader = Callable[[Any], JSONValue]
"""Turns a value, as the plaintext column's type gives it, into the JSON value to seal."""

Writer = Callable[[JSONValue], Any]
"""Turns an opened JSON value into a value that the plaintext column's type takes."""


class ConversionError(LucentError):
    """A value could not be read from a plaintext column, or would not be what it was in one."""


class _Held:
    """A value that was fetched and not read yet. It does not print itself, because SQLAlchemy logs
    every row under ``echo="debug"``.
    """

    __slots__ = ("_process", "raw")

    def __init__(self, raw: Any, process: Callable[[Any], Any] | None) -> None:
        self.raw = raw
        self._process = process

    def read(self) -> Any:
        """Return the value, as its type gives it."""
        return self.raw if self._process is None else self._process(self.raw)

    def __repr__(self) -> str:
        return "<value not shown>"


class _Unread(TypeDecorator[Any]):
    """Another type, whose values are fetched as :class:`_Held`: one that its type cannot read fails
    by itself then, and not with its batch.
    """

    impl = NullType
    cache_ok = False

    def __init__(self, type_: TypeEngine[Any]) -> None:
        super().__init__()
        self._type = type_

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return self._type.dialect_impl(dialect)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        process = self._type.dialect_impl(dialect).result_processor(dialect, coltype)
        return lambda value: None if value is None else _Held(value, process)


_JSON_TYPES: Final = frozenset({str, int, float, bool, list, dict})
_UNTOLD: Final = frozenset({"YEAR", "OID", "MACADDR", "MACADDR8", "MONEY", "HSTORE"})
"""Types of SQLAlchemy's that do not say that they give a number, a text or a dict."""


def _has_json_values(type_: TypeEngine[Any]) -> bool | None:
    """Say whether a type's Python values are JSON values; ``None`` if nothing but they can tell."""
    if isinstance(type_, JSON) or type_.__visit_name__ in _UNTOLD:
        return True
    if isinstance(type_, ARRAY):
        return _has_json_values(type_.item_type)
    if type_.__visit_name__ == "SET":  # says str, and gives a set
        return False
    try:
        kind: type[Any] = type_.python_type
    except NotImplementedError:
        kind = object
    if kind is not object:
        return kind in _JSON_TYPES
    is_own = type(type_).__module__.startswith("sqlalchemy.")
    return None if isinstance(type_, TypeDecorator) or not is_own else False


class PlainColumn:
    """Reads and writes a plaintext column of one type, one value at a time.

    Errors show nothing of the value.
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
        self.type = type_ = type_._variant_mapping.get(dialect.name, type_)
        self.has_json_values = _has_json_values(type_)
        """Whether its values need no reader; ``None`` if nothing but they can tell."""
        self._codec = codec
        self._dialect = dialect
        self._reader = reader
        self._writer = writer
        self._is_json = isinstance(type_, JSON)
        names_members = isinstance(type_, Enum) or self.has_json_values is False
        self._is_text = isinstance(type_, String) and not names_members
        # Drivers would read JSON in ways of their own; that of SQLite fails on text that is not
        # UTF-8, and gives a number for JSON that is one.
        self._cast: type[TypeEngine[Any]] | None = None
        if dialect.name == "sqlite":
            self._cast = LargeBinary if self._is_json or self._is_text else None
        elif self._is_json:
            self._cast = Text
        self._bind = type_.dialect_impl(dialect).bind_processor(dialect)

    def expression(self) -> ColumnElement[Any]:
        """What to select."""
        raw: ColumnElement[Any] = column(self.name)
        if self._cast is None:
            return type_coerce(raw, _Unread(self.type))
        return type_coerce(cast(raw, self._cast), _Unread(self._cast()))

    def size(self) -> ColumnElement[int]:
        """What tells how many bytes a value has, roughly."""
        # PostgreSQL has a length() for few types.
        length = func.pg_column_size if self._dialect.name == "postgresql" else func.length
        return length(column(self.name))

    def kind_unless_json(self, stored: _Held) -> str | None:
        """Return the name of a value's type, if it can be read and is no JSON value."""
        try:
            value = stored.read()
        except Exception:  # noqa: BLE001  (its row is named when it is converted)
            return None
        try:
            self._codec.dumps(value)
        except SerializationError:
            return type(value).__name__
        return None

    def read(self, stored: _Held) -> bytes:
        """Return the document that `stored` holds, or raise `ConversionError`."""
        try:
            return self._read(stored)
        except Exception as error:  # noqa: BLE001  (a reader or type may raise anything)
            fault = type(error).__name__
        # Not chained: a parser's error carries the text that it could not read.
        raise ConversionError(f"a value of {self.name} cannot be read as JSON ({fault})")

    def _read(self, stored: _Held) -> bytes:
        value = stored.read()
        if self._is_json or self._is_text:
            document = value.encode("utf-8") if isinstance(value, str) else bytes(value)
            if self._is_text and self._reader is not None:
                return self._codec.dumps(self._reader(document.decode("utf-8")))
            value = self._codec.loads(document)
            if self._is_text:
                self._codec.dumps(value)  # refuses what could not come back
                return document
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


class _Worker(Rows):
    """What the conversions share: values of rows in order, written one column at a time."""

    def __init__(
        self,
        owner: Table,
        sealed: Column[Any],
        keyring: Callable[[], Keyring],
        dialect: Dialect,
        source: str,
        values: Sequence[ColumnElement[Any]],
        size: ColumnElement[int],
    ) -> None:
        type_ = sealed.type
        assert isinstance(type_, EncryptedJSON)
        self._keyring = keyring
        self._type = type_
        self._source = source
        bound = [owner.c[name] for name in type_.bound_to]
        typed = dict.fromkeys([*owner.primary_key.columns, *bound])
        names = dict.fromkeys(c.name for c in owner.columns if c not in typed)
        clause = table(
            owner.name,
            *(column(c.name, key_type(c.type)) for c in typed),
            *map(column, names),
            schema=owner.schema,
        )
        primary_key = [clause.c[c.name] for c in owner.primary_key.columns]
        super().__init__(owner.fullname, clause, primary_key, dialect, [size])
        self._selected = [*(clause.c[c.name] for c in typed), *values]
        self._first_value = len(typed)
        self._bound = [list(typed).index(c) for c in bound]
        self._kept: dict[str, ColumnClause[Any]] = {}

    @property
    def _is_pending(self) -> ColumnElement[bool]:
        """The condition that a row is to be looked at."""
        raise NotImplementedError

    _skips_locked = True

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if a column is missing, or the rows are not ours to lock; write nothing."""
        self.check_keys(connection)
        self._kept = {name: column(name) for name in on_update_columns(connection, self._clause)}
        for own in self._kept.values():
            if own.name not in self._clause.c:
                self._clause.append_column(own)
        self._rows(connection, None, None, 0, lock=lock)

    def find_bounds(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        limit: int,
        most_bytes: int | None = BATCH_BYTES,
    ) -> BatchBounds | None:
        """Return how far a batch goes; on SQLite, which locks no rows, nothing but their number."""
        if self._locking:
            return super().find_bounds(connection, after, limit, most_bytes)
        return BatchBounds(None, False, limit)

    def count_pending(self, connection: Connection) -> int:
        """Count the rows that are to be looked at."""
        statement = select(func.count()).select_from(self._clause).where(self._is_pending)
        return connection.scalar(statement) or 0

    def work(
        self, connection: Connection, after: PrimaryKey | None, bounds: BatchBounds, limit: int
    ) -> Batch:
        """Convert the next `limit` rows behind `after`, as far as `bounds` goes."""
        rows = self._rows(connection, after, bounds.last, limit, lock=True)
        written, failed = self._convert_all(connection, rows, after)
        size = sum(
            len(held.raw)
            for row in rows
            for held in row[self._first_value :]
            if hasattr(held, "raw") and hasattr(held.raw, "__len__")
        )
        return self._batch(rows, bounds, limit, written, failed, size)

    def _convert_all(
        self, connection: Connection, rows: Sequence[Sequence[Any]], after: PrimaryKey | None
    ) -> tuple[int, list[FailedRow]]:
        """Convert the values of `rows`; return how many were written, and what failed."""
        raise NotImplementedError

    def refused(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        bounds: BatchBounds,
        error: DBAPIError,
        reason: str,
    ) -> Batch:
        """Return what became of the next row, which the database does not let change."""
        # Without its values: the driver may have failed to read them.
        statement = select(*self.primary_key).where(self._is_pending)
        statement = self.in_order(statement, after, bounds.last, 1)
        rows = self._all(connection, statement, self.parameters(after, bounds.last, 1))
        failed = [replace(self._failure(self._source, row, error), reason=reason) for row in rows]
        return self._batch(rows, bounds, 1, 0, failed, 0)

    def _rows(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        upto: PrimaryKey | None,
        limit: int | None,
        *,
        lock: bool = False,
    ) -> Sequence[Sequence[Any]]:
        kind = ("rows", after is None, upto is None, limit is None, lock)
        if kind not in self._statements:
            statement = select(*self._selected).select_from(self._clause).where(self._is_pending)
            statement = self.in_order(statement, after, upto, limit)
            if lock and self._locking:
                statement = statement.with_for_update(
                    skip_locked=self._skips_locked, key_share=True
                )
            self._statements[kind] = statement
        return self._all(connection, self._statements[kind], self.parameters(after, upto, limit))

    def _row_context(self, row: Sequence[Any]) -> bytes:
        return encode_row([row[position] for position in self._bound], self._type.bound_to)

    def _seal(self, document: bytes, row: Sequence[Any]) -> bytes:
        keys = self._keyring().for_context(self._type.contexts[0])
        return keys.seal(document, self._row_context(row))

    def _open(self, sealed: _Held, row: Sequence[Any], contexts: Sequence[str] = ()) -> bytes:
        contexts = contexts or self._type.contexts
        data = as_bytes(sealed.raw)
        return self._keyring().for_context(*contexts).open(data, self._row_context(row))

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

    def _failure(self, name: str, row: Sequence[Any], error: Exception) -> FailedRow:
        return FailedRow(self.name, name, self.primary_key_of(row), type(error).__name__)


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
        source, target = (plain, sealed) if to_sealed else (sealed, plain)
        values = [plain.expression(), type_coerce(column(sealed.name), _Unread(LargeBinary()))]
        size = plain.size() if to_sealed else func.length(column(sealed.name))
        super().__init__(owner, sealed, keyring, dialect, source.name, values, size)
        self._plain = plain
        self._to_sealed = to_sealed
        self._compare = compare
        self._written_since = written_since
        # A row that is not filled yet is found again; one that was passed over is not.
        self._skips_locked = not compare
        self._target = target.name
        self._target_type: TypeEngine[Any] = LargeBinary() if to_sealed else plain.type

    def count_stale(self, connection: Connection) -> int:
        """Count the rows that are not filled yet."""
        statement = select(func.count()).select_from(self._clause).where(self._is_empty)
        return connection.scalar(statement) or 0

    def _convert_all(
        self, connection: Connection, rows: Sequence[Sequence[Any]], after: PrimaryKey | None
    ) -> tuple[int, list[FailedRow]]:
        changes, failed = [], []
        for row in rows:
            try:
                if not self._is_filled(row):
                    changes.append((self.primary_key_of(row), self._convert(row)))
            except LucentError as error:
                failed.append(self._failure(self._source, row, error))
        self._set(connection, self._target, self._target_type, changes)
        if changes and self._compare:
            # Read again what was written: the database may have made something else of it.
            fault = ConversionError("what was written does not read as what it was")
            written = {repr(key) for key, _ in changes}
            failed += [
                self._failure(self._target, row, fault)
                for row in self._rows(connection, after, changes[-1][0], None)
                if repr(self.primary_key_of(row)) in written and not self._is_filled(row)
            ]
        return len(changes), failed

    @property
    def _is_empty(self) -> ColumnElement[bool]:
        columns = self._clause.c
        return and_(columns[self._source].is_not(None), columns[self._target].is_(None))

    @property
    def _is_pending(self) -> ColumnElement[bool]:
        if not self._compare:
            return self._is_empty
        columns = self._clause.c
        condition = or_(columns[self._source].is_not(None), columns[self._target].is_not(None))
        return condition if self._written_since is None else and_(condition, self._written_since)

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


class RebindWorker(_Worker):
    """Seal values of an earlier context under the column's own, and under the primary key.

    Whether a value is of the earlier context only opening it can tell: each pass opens all.
    """

    def __init__(
        self, owner: Table, sealed: Column[Any], keyring: Callable[[], Keyring], dialect: Dialect
    ) -> None:
        value: ColumnElement[Any] = column(sealed.name)
        values = [type_coerce(value, _Unread(LargeBinary()))]
        super().__init__(owner, sealed, keyring, dialect, sealed.name, values, func.length(value))

    def count_stale(self, connection: Connection) -> int:
        """Count the values that do not open under the column's own context."""
        return sum(not self._is_bound(row) for row in self._every_row(connection))

    def earlier_context(self, connection: Connection) -> str | None:
        """Return the context of the first value that is of an earlier one."""
        for row in self._every_row(connection):
            if self._is_bound(row):
                continue
            for context in self._type.contexts[1:]:
                if self._opens(row, context):
                    return context
        return None

    def contexts_of(self, connection: Connection, sample: int) -> list[str | None]:
        """Return, for the first `sample` values, the context that each opens under."""
        found = []
        for row in itertools.islice(self._every_row(connection), sample):
            opened_under = (c for c in self._type.contexts if self._opens(row, c))
            found.append(next(opened_under, None))
        return found

    def _every_row(self, connection: Connection) -> Iterator[Sequence[Any]]:
        self.check_keys(connection)
        after: PrimaryKey | None = None
        while rows := self._rows(connection, after, None, 1_000):
            yield from rows
            after = self.advanced(after, self.primary_key_of(rows[-1]))

    def _convert_all(
        self, connection: Connection, rows: Sequence[Sequence[Any]], after: PrimaryKey | None
    ) -> tuple[int, list[FailedRow]]:
        changes, old, failed = [], [], []
        for row in rows:
            if self._is_bound(row):
                continue
            try:
                document = self._open(row[-1], row)
                changes.append((self.primary_key_of(row), self._seal(document, row)))
            except LucentError as error:
                failed.append(self._failure(self._source, row, error))
            else:
                old.append(as_bytes(row[-1].raw)[:LONGEST_PREFIX])
        self._set(connection, self._source, LargeBinary(), changes, old)
        return len(changes), failed

    @property
    def _is_pending(self) -> ColumnElement[bool]:
        return self._clause.c[self._source].is_not(None)

    def _is_bound(self, row: Sequence[Any]) -> bool:
        return self._opens(row, self._type.contexts[0])

    def _opens(self, row: Sequence[Any], context: str) -> bool:
        try:
            self._open(row[-1], row, [context])
        except DecryptionError:
            return False
        return True
