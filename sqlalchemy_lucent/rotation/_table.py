"""One table: count its stale values, read its rows in primary-key order, seal them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
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
    event,
    func,
    literal,
    not_,
    or_,
    select,
)

from .._envelope import LONGEST_PREFIX, parse
from .._keyset import is_behind
from ..exceptions import ConfigurationError, DecryptionError, RotationError
from ..keyring import Keyring
from ..types import as_bytes, encode_row, open_in_contexts
from ._visible import refuse_hidden_rows
from ._write import Changes, Writer, writer_for
from .report import FailedRow
from .targets import TargetColumn, TargetTable

PrimaryKey = tuple[Any, ...]

ROW_LOCKING: Final = frozenset({"postgresql", "mysql", "mariadb"})

_BINARY_OIDS: Final = frozenset({16, 17, 20, 21, 23, 25, 1042, 1043, 2950})
"""PostgreSQL's types whose values psycopg gives alike in either format: bool, bytea, int8, int2,
int4, text, char, varchar, uuid. Of a type that it does not know, it gives text or bytes."""


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


class _Renewed:
    """What became of the stale values of one column: the rows' numbers, and lists beside them.

    Lists of bytes, not an object per row: the garbage collector does not look into them.
    """

    __slots__ = ("name", "new", "numbers", "old", "size")

    def __init__(self, name: str) -> None:
        self.name = name
        self.numbers: list[int] = []
        self.old: list[bytes] = []
        self.new: list[bytes] = []
        self.size = 0

    def only(self, numbers: Sequence[int]) -> _Renewed:
        """Return the part of it that these rows are."""
        place = {number: place for place, number in enumerate(self.numbers)}
        chosen = _Renewed(self.name)
        chosen.old = [self.old[place[number]] for number in numbers]
        chosen.new = [self.new[place[number]] for number in numbers]
        return chosen


class SealedColumn:
    """Opens and re-seals the values of one column."""

    def __init__(self, target: TargetColumn, keyring: Keyring, names: Sequence[str]) -> None:
        self.name = target.name
        self.contexts = target.type.contexts
        self.keys = keyring.for_context(self.contexts[0])
        self.header = self.keys.primary.header
        self.open: Callable[[bytes, bytes], bytes] = self.keys.open
        """Returns the plaintext of (sealed bytes, row context), or raises a `DecryptionError`."""
        self.seal: Callable[[bytes, bytes], bytes] = self.keys.primary.seal
        """Seals a plaintext, with its row context, under the primary key."""
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


class TableWorker:
    """Reads, opens and re-seals the rows of one table. The caller has the transaction."""

    upto: PrimaryKey | None = None
    """The primary key up to which :meth:`batch` and :meth:`rehearse` go; to the end if ``None``.
    Not for SQLite's worker, which gets no ranges."""

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
        self._in_binary = False
        # Kept, because building a statement costs SQLAlchemy as much as running it.
        self._statements: dict[tuple[object, ...], Select[Any]] = {}

    # -- statements ------------------------------------------------------------------------------

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if the table or a column is missing or not ours to lock; write nothing."""
        self._writer = writer_for(connection, self.target)
        self.check_keys(connection)
        statement = self._reading(None, None, 0, stale_only=True, lock=lock)
        result = connection.execute(statement, self.parameters(None, None, 0))
        if self._dialect.driver == "psycopg" and not self._dialect.is_async:
            described = result.cursor.description or ()
            self._in_binary = {column[1] for column in described} <= _BINARY_OIDS
        result.close()

    def check_keys(self, connection: Connection) -> None:
        """Refuse a table with rows that are not seen, or that no primary key leads to.

        The one is row-level security; the other is NULL in a primary key, which SQLite allows.

        :raises RotationError: there is, or may be, such a row.
        """
        refuse_hidden_rows(connection, self.target.clause.name, self.target.clause.schema)
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
        if self._dialect.name == "sqlite":
            # The same without a call per row; bytes are more than all that is not bytes.
            behind = (int.from_bytes(sealed.header) + 1).to_bytes(len(sealed.header))
            header, end = (literal(bound, LargeBinary) for bound in (sealed.header, behind))
            return or_(value < header, value >= end)
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
        statement = self._reading(after, upto, limit, stale_only=stale_only, lock=lock)
        parameters = self.parameters(after, upto, limit)
        if not self._in_binary:
            return connection.execute(statement, parameters).all()
        with _binary_results(connection):
            return connection.execute(statement, parameters).all()

    def _reading(
        self,
        after: PrimaryKey | None,
        upto: PrimaryKey | None,
        limit: int | None,
        *,
        stale_only: bool,
        lock: bool,
    ) -> Select[Any]:
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
        return self._statements[kind]

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

    def reseal(self, rows: Sequence[Sequence[Any]]) -> Resealed:
        """Seal the stale values of `rows` anew."""
        failed: list[tuple[int, FailedRow]] = []
        renewed = [self._reseal_column(sealed, rows, failed) for sealed in self.columns]
        failed.sort(key=itemgetter(0))  # in the order of the rows, whichever the column
        size = sum(column.size for column in renewed)
        return Resealed(self._changes(rows, renewed), [row for _, row in failed], size)

    def _reseal_column(
        self,
        sealed: SealedColumn,
        rows: Sequence[Sequence[Any]],
        failed: list[tuple[int, FailedRow]],
    ) -> _Renewed:
        # Looked up once: the loop is run for every value.
        position, header, open_, seal = sealed.position, sealed.header, sealed.open, sealed.seal
        row_context = sealed.row_context if sealed.bound_columns else None
        renewed = _Renewed(sealed.name)
        size = 0
        for number, row in enumerate(rows):
            value = row[position]
            if type(value) is not bytes:
                if value is None:
                    continue
                value = as_bytes(value)
            if value.startswith(header):
                continue
            size += len(value)
            try:
                context = b"" if row_context is None else row_context(row)
                new = seal(open_(value, context), context)
            except (DecryptionError, ConfigurationError) as error:
                failed.append((number, self._failure(row, sealed, error)))
                continue
            renewed.numbers.append(number)
            renewed.old.append(value[:LONGEST_PREFIX])  # what is compared when it is written
            renewed.new.append(new)
        renewed.size = size
        return renewed

    def _changes(self, rows: Sequence[Sequence[Any]], renewed: Sequence[_Renewed]) -> list[Changes]:
        """Put what was renewed together, by which columns of a row were."""
        if all(column.numbers == renewed[0].numbers for column in renewed):
            numbers = renewed[0].numbers
            return [self._changes_of(rows, renewed, numbers)] if numbers else []
        names_of: dict[int, tuple[str, ...]] = {}
        for column in renewed:
            for number in column.numbers:
                names_of[number] = (*names_of.get(number, ()), column.name)
        groups: dict[tuple[str, ...], list[int]] = {}
        for number in sorted(names_of):
            groups.setdefault(names_of[number], []).append(number)
        return [
            self._changes_of(rows, [c.only(numbers) for c in renewed if c.name in names], numbers)
            for names, numbers in groups.items()
        ]

    def _changes_of(
        self, rows: Sequence[Sequence[Any]], renewed: Sequence[_Renewed], numbers: list[int]
    ) -> Changes:
        chosen = rows if len(numbers) == len(rows) else [rows[number] for number in numbers]
        return Changes(
            names=tuple(column.name for column in renewed),
            keys=[[row[part] for row in chosen] for part in range(self._key_size)],
            old=[column.old for column in renewed],
            new=[column.new for column in renewed],
        )

    def _failure(self, row: Sequence[Any], sealed: SealedColumn, error: Exception) -> FailedRow:
        envelope = parse(as_bytes(row[sealed.position]))
        key = (envelope.version, envelope.key_id.hex()) if envelope else (None, None)
        return FailedRow(
            self.target.name, sealed.name, self.primary_key_of(row), type(error).__name__, *key
        )

    # -- batches ---------------------------------------------------------------------------------

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Re-seal the next `limit` stale rows behind `after`."""
        rows = self.read(connection, after, limit, upto=self.upto, stale_only=True)
        changes, failed, size = self.reseal(rows)
        assert self._writer is not None
        written = sum(self._writer.write(connection, change) for change in changes)
        last = self.primary_key_of(rows[-1]) if rows else None
        return Batch(len(rows), last, written, failed, size)

    def rehearse(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Do what :meth:`batch` does, but lock nothing and write nothing."""
        rows = self.read(connection, after, limit, upto=self.upto, stale_only=True, lock=False)
        changes, failed, size = self.reseal(rows)
        last = self.primary_key_of(rows[-1]) if rows else None
        return Batch(len(rows), last, sum(len(c) * len(c.names) for c in changes), failed, size)


@contextmanager
def _binary_results(connection: Connection) -> Iterator[None]:
    """Have psycopg fetch as bytes what it would fetch, and read, as hexadecimal text.

    SQLAlchemy has no option for it, but shows each cursor to those who listen.
    """

    def fetch_in_binary(_connection: Any, cursor: Any, *_rest: Any) -> None:
        cursor.format = 1

    event.listen(connection, "before_cursor_execute", fetch_in_binary)
    try:
        yield
    finally:
        event.remove(connection, "before_cursor_execute", fetch_in_binary)


def _open_in_contexts(
    contexts: Sequence[str], keyring: Keyring, sealed: bytes, row: bytes
) -> bytes:
    return open_in_contexts(contexts, sealed, row, keyring)


def _parameters(columns: Sequence[ColumnElement[Any]], name: str) -> list[ColumnElement[Any]]:
    return [
        bindparam(f"lucent_{name}_{position}", type_=column.type)
        for position, column in enumerate(columns)
    ]
