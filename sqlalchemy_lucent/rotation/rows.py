"""One table: count its stale values, read its rows in primary-key order, seal them anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, reduce
from operator import add, itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Function,
    Integer,
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
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.expression import ColumnClause, TableClause

from .._database.visibility import require_full_visibility
from .._envelope import LONGEST_PREFIX, as_bytes, parse
from .._pagination import as_sort_value, row_after, sort_columns
from .._row import encode_row
from .._sql import is_mysql
from ..exceptions import (
    ConfigurationError,
    DecryptionError,
    RotationError,
    UnknownKeyVersionError,
)
from ..keyring import Keyring
from ._updates import Changes, Writer, check_rights, without_limits, writer_for
from .report import FailedRow
from .targets import TargetColumn, TargetTable
from .throttle import BATCH_BYTES

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
    """The primary key to go on behind."""
    more: bool
    """Whether there may be rows behind it."""
    written: int
    """Values written."""
    failed: Sequence[FailedRow]
    size: int
    """Bytes of the values that were read."""


class BatchBounds(NamedTuple):
    """How far a batch goes at most. Found by looking, before anything is locked."""

    last: PrimaryKey | None
    """The primary key of its last row; ``None`` if nothing but the number of rows ends it."""
    more: bool
    """Whether there may be rows behind it."""
    rows: int
    """Rows up to there."""


class Within(NamedTuple):
    """Some rows of a table: conditions, and the parameters in them."""

    conditions: Sequence[ColumnElement[bool]]
    parameters: Mapping[str, Any]


EVERYWHERE: Final = Within((), {})

MAX_LOOKAHEAD: Final = 50
"""Times its own rows that a batch looks at, where few of them are stale: what it has locked stays
locked until it has looked at all."""


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
        self.old: list[bytes] = []  # how they began, which is compared when they are written
        self.new: list[bytes] = []
        self.size = 0

    def only(self, numbers: Sequence[int]) -> _Renewed:
        """Return the part of it that these rows are."""
        place = {number: place for place, number in enumerate(self.numbers)}
        chosen = _Renewed(self.name)
        chosen.old = [self.old[place[number]] for number in numbers]
        chosen.new = [self.new[place[number]] for number in numbers]
        return chosen


_SAME_KEY: Final = (
    "it names the primary's own key by another version: a rotation between two names of one key "
    "renews nothing. Give the new version a key of its own, from generate_master_key()"
)


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
        self.usual, self.primary_header_size = self.keys.subkeys, self.keys.primary_header_size
        """The subkeys by their headers, and the size of most of these."""
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


_CONNECTION_SETS: Final = text(
    "SELECT @@character_set_client, @@character_set_connection, @@character_set_results"
)
_CHARACTER_SETS: Final = text(
    "SELECT column_name AS name, character_set_name AS set_ FROM information_schema.columns"
    " WHERE table_name = :name AND table_schema = coalesce(:schema, database())"
    " AND character_set_name IS NOT NULL"
)


def _holds(connection_set: str, column_set: str) -> bool:
    """Say whether the one character set has every character of the other."""
    return connection_set == "utf8mb4" or column_set in (connection_set, "ascii")


class Rows:
    """The rows of one table in primary-key order: everything that pages through a table by its key.

    The caller has the transaction.
    """

    def __init__(
        self,
        name: str,
        clause: TableClause,
        primary_key: Sequence[ColumnClause[Any]],
        dialect: Dialect,
        sizes: Sequence[ColumnElement[int]] = (),
    ) -> None:
        """Take the table, its key, and what tells how long the values are that a batch holds."""
        self.name = name
        self.primary_key = tuple(primary_key)
        self._clause = clause
        self._dialect = dialect
        self._sizes = sizes
        self._locking = dialect.name in ROW_LOCKING
        self._order: Sequence[ColumnElement[Any]] = self.primary_key
        self._bound_types = [without_limits(part.type, dialect) for part in primary_key]
        self._lookahead = 1
        self._key_size = len(primary_key)
        # Kept, because building a statement costs SQLAlchemy as much as running it.
        self._statements: dict[tuple[object, ...], Select[Any]] = {}

    def look(self, connection: Connection) -> None:
        """Learn what the order of the rows needs.

        :raises RotationError: some rows are not seen, because of row-level security.
        """
        require_full_visibility(connection, self._clause.name, self._clause.schema)
        self._order = sort_columns(connection, self._clause, self.primary_key)

    @property
    def lost(self) -> ColumnElement[bool]:
        """The condition that a row cannot be found by its primary key."""
        return or_(*(part.is_(None) for part in self.primary_key))

    def check_keys(self, connection: Connection) -> None:
        """Refuse a table with rows that are not seen, or that no primary key leads to.

        The one is row-level security; the other is NULL in a primary key, which SQLite allows, and
        any database where the model's key is not the table's own.

        :raises RotationError: there is, or may be, such a row.
        """
        self.look(connection)
        self._check_character_sets(connection)
        statement = select(literal(1)).select_from(self._clause).where(self.lost).limit(1)
        if connection.execute(statement).first() is not None:
            raise RotationError(
                f"table {self.name} has a row with NULL in its primary key; give such rows "
                "a primary key, so that they can be read in order and named"
            )

    def _check_character_sets(self, connection: Connection) -> None:
        """Refuse keys that the connection cannot have without loss.

        MySQL and MariaDB put a question mark for what the connection's character set has not, so
        that no row would be found by its key, nor a value open that is bound to it.
        """
        if not is_mysql(self._dialect):
            return
        clause = self._clause
        names = {"name": str(clause.name), "schema": clause.schema}
        has, *sets = connection.execute(_CONNECTION_SETS).one()
        lossy = [
            f"{name} ({set_})"
            for name, set_ in connection.execute(_CHARACTER_SETS, names)
            if name in clause.c
            and any(known is not None and not _holds(known, set_) for known in (has, *sets))
        ]
        if lossy:
            raise RotationError(
                f"the connection speaks {has}, which cannot tell all texts of {self.name}."
                f"{', '.join(lossy)} apart, by which rows are found. Connect with charset=utf8mb4"
            )

    def _all(
        self, connection: Connection, statement: Select[Any], parameters: dict[str, Any]
    ) -> Sequence[Row[Any]]:
        try:
            return connection.execute(statement, parameters).all()
        except (LookupError, ValueError, TypeError) as error:
            fault = type(error).__name__
        raise RotationError(
            f"a row of table {self.name} cannot be read ({fault}): a value of its primary key, or "
            "of a column that values are bound to, is none of the column's type. Correct it, or "
            "the type"
        )

    def within(self, after: PrimaryKey | None, upto: PrimaryKey | None) -> Within:
        """Return the rows behind `after`, and not behind `upto`."""
        return Within(self.key_range(after, upto), self.parameters(after, upto))

    def find_bounds(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        limit: int,
        most_bytes: int | None = BATCH_BYTES,
    ) -> BatchBounds | None:
        """Return how far a batch behind `after` goes that is to have `limit` rows at most.

        It has `most_bytes` at most too, unless one row has more. Nothing is locked, nor a value
        looked at but for its length. Without this bound, a batch would look for stale rows through
        the whole table while it holds those found first.
        """
        rows = limit * self._lookahead
        while True:
            parameters = self.parameters(after, None, rows)
            found = self._all(connection, self._finding_bounds(after), parameters)
            *last, count, size = tuple(found[0]) if found else (0, 0)
            if not count:
                return None
            if most_bytes is None or size <= most_bytes or count == 1:
                return BatchBounds(tuple(last), count == rows, count)
            rows = max(1, count * most_bytes // int(size))

    def _finding_bounds(self, after: PrimaryKey | None) -> Select[Any]:
        kind = ("bounds", after is None)
        if kind not in self._statements:
            sizes = (func.coalesce(size, 0) for size in self._sizes)
            order = [each.label(f"lucent_order_{n}") for n, each in enumerate(self._order)]
            batch = (
                select(
                    *(part.label(f"lucent_key_{n}") for n, part in enumerate(self.primary_key)),
                    *order,
                    reduce(add, sizes).label("lucent_size"),
                )
                .where(*self.key_range(after, None))
                .order_by(*self._order)
                .limit(bindparam("lucent_limit"))
                .subquery()
            )
            keys = [batch.c[f"lucent_key_{n}"] for n in range(self._key_size)]
            counts: list[Function[Any]] = [func.count(), func.sum(batch.c.lucent_size)]
            if len(keys) == 1 and isinstance(self._order[0].type, Integer):
                statement = select(*map(func.max, keys), *counts)
            else:
                # Not every type has a max(), nor have several columns. This takes twice as long.
                last_first = (batch.c[each.name].desc() for each in order)
                statement = select(*keys, *(count.over() for count in counts)).limit(1)
                statement = statement.order_by(*last_first)
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
        statement = statement.where(*self.key_range(after, upto)).order_by(*self._order)
        return statement if limit is None else statement.limit(bindparam("lucent_limit"))

    def key_range(
        self, after: PrimaryKey | None, upto: PrimaryKey | None
    ) -> list[ColumnElement[bool]]:
        """The conditions that a row is behind `after`, and not behind `upto`."""
        conditions = []
        if after is not None:
            conditions.append(row_after(self._order, self._bounds("after"), self._dialect))
        if upto is not None:
            conditions.append(not_(row_after(self._order, self._bounds("upto"), self._dialect)))
        return conditions

    def _bounds(self, name: str) -> list[ColumnElement[Any]]:
        """Return the parameters of a key that :meth:`parameters` gives, in the form compared."""
        return [
            as_sort_value(order, bindparam(f"lucent_{name}_{position}", type_=type_))
            for position, (type_, order) in enumerate(
                zip(self._bound_types, self._order, strict=True)
            )
        ]

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

    def primary_key_of(self, row: Sequence[Any]) -> PrimaryKey:
        """Return the primary key of `row`."""
        return tuple(row[: self._key_size])

    def advanced(self, after: PrimaryKey | None, last: PrimaryKey | None) -> PrimaryKey | None:
        """Return the key to go on behind, `last`.

        :raises RotationError: a batch behind `after` ended there too.
        """
        if last is not None and last == after:
            raise RotationError(
                f"the rows of {self.name} cannot be gone through in order: the database does not "
                "find its primary key behind itself, as with an inexact type (FLOAT)"
            )
        return last

    def _batch(
        self,
        rows: Sequence[Sequence[Any]],
        bounds: BatchBounds,
        limit: int,
        written: int,
        failed: Sequence[FailedRow],
        size: int,
    ) -> Batch:
        if len(rows) == limit:
            self._lookahead = 1
            return Batch(len(rows), self.primary_key_of(rows[-1]), True, written, failed, size)
        if 2 * len(rows) < limit:
            self._lookahead = min(2 * self._lookahead, MAX_LOOKAHEAD)
        return Batch(len(rows), bounds.last, bounds.more, written, failed, size)


class TableWorker(Rows):
    """Reads, opens and re-seals the rows of one table."""

    def __init__(self, target: TargetTable, keyring: Keyring | None, dialect: Dialect) -> None:
        clause = target.clause
        # The length of bytes is known without reading them, also where they are out of the row.
        sizes = [func.length(clause.c[found.name]) for found in target.columns]
        super().__init__(target.name, clause, target.primary_key, dialect, sizes)
        self.target = target
        sealed = {found.name for found in target.columns}
        plain = [c for c in clause.c if c.name not in sealed]
        plain_first = [*target.primary_key, *(c for c in plain if c not in target.primary_key)]
        values: list[ColumnElement[Any]] = [clause.c[found.name] for found in target.columns]
        if dialect.name == "sqlite":
            # The driver would decode text that was never sealed, and fail if it is not UTF-8.
            values = [cast(value, LargeBinary) for value in values]
        self.selected: list[ColumnElement[Any]] = [*plain_first, *values]
        names = [*(c.name for c in plain_first), *(found.name for found in target.columns)]
        # Without a keyring, the rows can be found and counted, but not opened.
        self.columns = (
            [SealedColumn(found, keyring, names) for found in target.columns] if keyring else []
        )
        self._writer: Writer | None = None
        self._in_binary = False

    # -- statements ------------------------------------------------------------------------------

    def prepare(self, connection: Connection, *, lock: bool = True) -> None:
        """Fail now if the table or a column is missing or not ours to lock; write nothing."""
        check_rights(connection, self.target)
        self._writer = writer_for(connection, self.target)
        self.check_keys(connection)
        statement = self._reading(None, None, 0, stale_only=True, lock=lock)
        result = connection.execute(statement, self.parameters(None, None, 0))
        if self._dialect.driver == "psycopg" and not self._dialect.is_async:
            described = result.cursor.description or ()
            known = {column[1] for column in described} <= _BINARY_OIDS
            # A cursor that puts parameters into the text has no binary results.
            self._in_binary = known and not hasattr(result.cursor, "mogrify")
        result.close()

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

    def count_stale(self, connection: Connection, within: Within = EVERYWHERE) -> int:
        """Count the values that are not under the primary key."""
        counted = select(func.count()).select_from(self.target.clause).where(*within.conditions)
        return sum(
            connection.scalar(counted.where(self.is_stale(sealed)), within.parameters) or 0
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
        """Return rows behind the primary key `after`, in order; stale ones are locked.

        :raises RotationError: a value of a key or binding column is none of its type.
        """
        statement = self._reading(after, upto, limit, stale_only=stale_only, lock=lock)
        parameters = self.parameters(after, upto, limit)
        with _binary_results(connection) if self._in_binary else nullcontext():
            return self._all(connection, statement, parameters)

    def any_value(self) -> ColumnElement[bool]:
        """The condition that a row has a value."""
        clause = self.target.clause
        return or_(*(clause.c[sealed.name].is_not(None) for sealed in self.columns))

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
            condition = self.any_stale() if stale_only else self.any_value()
            statement = self.in_order(select(*self.selected).where(condition), after, upto, limit)
            if stale_only and lock and self._locking:
                # Rows that another rotator has in hand are left to it. `key_share` is PostgreSQL's
                # lock that leaves alone those who insert rows with a foreign key to this one.
                statement = statement.with_for_update(skip_locked=True, key_share=True)
            self._statements[kind] = statement
        return self._statements[kind]

    # -- rows ------------------------------------------------------------------------------------

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
        renewed = [
            self._reseal_at_once(sealed, rows) or self._reseal_column(sealed, rows, failed)
            for sealed in self.columns
        ]
        failed.sort(key=itemgetter(0))  # in the order of the rows, whichever the column
        size = sum(column.size for column in renewed)
        return Resealed(self._changes(rows, renewed), [row for _, row in failed], size)

    def _reseal_at_once(
        self, sealed: SealedColumn, rows: Sequence[Sequence[Any]]
    ) -> _Renewed | None:
        """Return the usual batch sealed anew: one column, in which all is stale, and opens."""
        if len(self.columns) > 1 or sealed.bound_columns:
            return None
        position, usual, size, seal = (
            sealed.position,
            sealed.usual,
            sealed.primary_header_size,
            sealed.seal,
        )
        values = [row[position] for row in rows]
        if set(map(type, values)) != {bytes}:
            return None
        renewed = _Renewed(sealed.name)
        try:
            # Of a value that does not open there is None, which the cipher does not take.
            renewed.new = [seal(usual[value[:size]].open(value), b"") for value in values]  # type: ignore[arg-type]
        except (KeyError, TypeError):
            return None
        renewed.numbers = list(range(len(rows)))
        renewed.old = [value[:LONGEST_PREFIX] for value in values]
        renewed.size = sum(map(len, values))
        return renewed

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
            renewed.old.append(value[:LONGEST_PREFIX])
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
        is_primary = envelope is not None and sealed.header.endswith(envelope.key_id)
        reason = _SAME_KEY if is_primary and isinstance(error, UnknownKeyVersionError) else None
        return FailedRow(
            self.target.name,
            sealed.name,
            self.primary_key_of(row),
            type(error).__name__,
            envelope.version if envelope else None,
            envelope.key_id.hex() if envelope else None,
            reason,
        )

    # -- batches ---------------------------------------------------------------------------------

    def work(
        self, connection: Connection, after: PrimaryKey | None, bounds: BatchBounds, limit: int
    ) -> Batch:
        """Re-seal the next `limit` stale rows behind `after`, as far as `bounds` goes."""
        rows = self.read(connection, after, limit, upto=bounds.last, stale_only=True)
        changes, failed, size = self.reseal(rows)
        assert self._writer is not None
        written = sum(self._writer.write(connection, change) for change in changes)
        return self._batch(rows, bounds, limit, written, failed, size)

    def rehearse(
        self, connection: Connection, after: PrimaryKey | None, bounds: BatchBounds, limit: int
    ) -> Batch:
        """Do what :meth:`work` does, but lock nothing and write nothing."""
        rows = self.read(connection, after, limit, upto=bounds.last, stale_only=True, lock=False)
        changes, failed, size = self.reseal(rows)
        written = sum(len(each) * len(each.names) for each in changes)
        return self._batch(rows, bounds, limit, written, failed, size)

    def refused(
        self,
        connection: Connection,
        after: PrimaryKey | None,
        bounds: BatchBounds,
        error: DBAPIError,
        reason: str,
    ) -> Batch:
        """Return what became of the next stale row, which the database does not let change."""
        rows = self.read(connection, after, 1, upto=bounds.last, stale_only=True)
        failed = [
            replace(self._failure(row, sealed, error), reason=reason)
            for row in rows
            for sealed in self.columns
            if row[sealed.position] is not None
            and not as_bytes(row[sealed.position]).startswith(sealed.header)
        ]
        return self._batch(rows, bounds, 1, 0, failed, 0)


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
    return keyring.for_context(*contexts).open(sealed, row)
