"""Read the rows of one table in primary-key order, whatever its primary key is.

Everything that pages through a table does so here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.sql.expression import ColumnClause, TableClause

from .._database.reflection import has_row
from .._database.visibility import require_full_visibility
from .._pagination import as_sort_value, row_after, sort_columns
from .._sql import is_mysql
from .._statements import BINARY_RESULTS, REPEATABLE, watch
from ..exceptions import RotationError
from ._keys import check_character_sets, without_limits
from .throttle import BATCH_BYTES

PrimaryKey = tuple[Any, ...]

MAX_LOOKAHEAD: Final = 50
"""Where few rows are pending, a batch searches up to this many times its own number of rows. There
is a limit because the rows that it locks stay locked until the search ends."""

BATCH_ROWS: Final = 1000
"""Rows that are read at once where nothing is written."""

_RANGE_SECONDS: Final = 0.25
"""Seconds that counting one range should take. SQLite's writers wait for readers, for 5 seconds by
default."""

_FIRST_RANGE: Final = 20_000
_LARGEST_RANGE: Final = 200_000

UNREADABLE: Final = (LookupError, ValueError, TypeError, OverflowError)
"""What a type raises for a value that it does not take."""

_T = TypeVar("_T")


class BatchBounds(NamedTuple):
    """The rows after one primary key, up to another."""

    after: PrimaryKey | None = None
    """The key before the first row; ``None`` begins at the start of the table."""
    upto: PrimaryKey | None = None
    """The key of the last row; ``None`` ends at the end of the table."""
    limit: int | None = None
    """How many pending rows to read at most."""
    rows: int = 0
    """How many rows there are, pending or not."""


EVERYTHING: Final = BatchBounds()

NULL_KEYS: Final = BatchBounds((), ())
"""The rows with NULL in their primary key. NULL is neither before nor after another key."""


class Read(Protocol):
    """Runs a function that reads from the database, in whatever transaction the caller chose."""

    def __call__(self, work: Callable[[sa.Connection], _T], /) -> _T:
        """Return what `work` returns."""


class Rows:
    """The rows of one table, in primary-key order. The caller has the transaction.

    :param name: the table's name, for messages.
    :param clause: the table.
    :param primary_key: its columns in `clause`.
    :param selects: what to read of a row; the primary key comes first.
    :param pending: which rows to read; all of them if left out.
    :param sizes: how many bytes the values of a row have, as SQL.
    :param skips_locked: whether :meth:`read` passes over rows that somebody else has locked.
    """

    def __init__(
        self,
        name: str,
        clause: TableClause,
        primary_key: Sequence[ColumnClause[Any]],
        dialect: sa.Dialect,
        *,
        selects: Sequence[sa.ColumnElement[Any]] = (),
        pending: sa.ColumnElement[bool] | None = None,
        sizes: Sequence[sa.ColumnElement[int]] = (),
        skips_locked: bool = True,
    ) -> None:
        self.name = name
        self.clause = clause
        self.primary_key = tuple(primary_key)
        self.key_types = [without_limits(part.type, dialect) for part in primary_key]
        self.dialect = dialect
        self.pending = sa.true() if pending is None else pending
        self._selects = selects or self.primary_key
        self._sizes = sizes or [sa.literal(0)]
        self._skips_locked = skips_locked
        self._order: Sequence[sa.ColumnElement[Any]] = self.primary_key
        self._lookahead = 1
        # Kept, because building a statement costs SQLAlchemy as much as running it.
        self._statements: dict[tuple[object, ...], sa.Select[Any]] = {}

    # -- checks ------------------------------------------------------------------------------------

    def prepare(self, connection: sa.Connection, *, lock: bool) -> None:
        """Check the keys, and that the rows may be read and locked.

        :raises RotationError: see :meth:`check_keys`.
        """
        self.check_keys(connection)
        nothing = BatchBounds(limit=0)
        watch(connection.dialect)
        connection.execute(self._reading(nothing, lock=lock), self.parameters(nothing)).close()

    def check_keys(self, connection: sa.Connection) -> None:
        """Refuse a table with rows that are hidden, or that cannot be found by primary key.

        SQLite allows NULL in a primary key. So does any database where the model declares a
        primary key that the table does not have.

        :raises RotationError: there is, or may be, such a row.
        """
        self.find_order(connection)
        check_character_sets(connection, self.name, self.clause)
        if has_row(connection, self.clause, self._has_null_key):
            dates = " (the date 0000-00-00 counts as NULL)" if is_mysql(self.dialect) else ""
            raise RotationError(
                f"table {self.name} has a row with NULL in its primary key{dates}; give such rows "
                "a primary key, so that they can be read in order and named"
            )

    def find_order(self, connection: sa.Connection) -> None:
        """Find out how the database sorts the key.

        :raises RotationError: row-level security hides rows.
        """
        require_full_visibility(connection, self.clause.name, self.clause.schema)
        self._order = sort_columns(connection, self.clause, self.primary_key)

    @property
    def _has_null_key(self) -> sa.ColumnElement[bool]:
        return sa.or_(*(part.is_(None) for part in self.primary_key))

    # -- reading -----------------------------------------------------------------------------------

    def find_bounds(
        self,
        connection: sa.Connection,
        after: PrimaryKey | None,
        limit: int,
        max_bytes: int | None = BATCH_BYTES,
    ) -> BatchBounds | None:
        """Return the bounds of a batch of at most `limit` rows after `after`; ``None`` at the end.

        Its values have at most `max_bytes` bytes, unless one row has more. This locks nothing and
        reads no value but its length. Without bounds, a batch would search the whole table for
        pending rows while it holds the first ones locked.
        """
        rows = limit * self._lookahead
        while True:
            parameters = self.parameters(BatchBounds(after, limit=rows))
            found = self._execute(connection, self._finding_bounds(after), parameters)
            *last, count, size = tuple(found[0]) if found else (0, 0)
            if not count:
                return None
            if max_bytes is None or size <= max_bytes or count == 1:
                # The last batch has no end: a key of an inexact type may not equal its own value.
                return BatchBounds(after, tuple(last) if count == rows else None, limit, count)
            rows = max(1, count * max_bytes // int(size))

    def read(
        self,
        connection: sa.Connection,
        bounds: BatchBounds,
        *,
        lock: bool = False,
        keys_only: bool = False,
        is_batch: bool = False,
    ) -> Sequence[sa.Row[Any]]:
        """Return the pending rows within `bounds`, in order.

        :param is_batch: leave a :exc:`~sqlalchemy.exc.DataError` to the caller, who looks for the
            row by halving the batch.
        :raises RotationError: a value of a key or binding column does not fit the column's type.
        """
        statement = self._reading(bounds, lock=lock, keys_only=keys_only)
        return self._execute(connection, statement, self.parameters(bounds), is_batch=is_batch)

    def next_after(self, bounds: BatchBounds, rows: Sequence[Sequence[Any]]) -> PrimaryKey | None:
        """Return the key that the next batch begins after; ``None`` at the end of the table.

        :param rows: what was read within `bounds`.
        :raises RotationError: that is the key that this batch began after.
        """
        key = bounds.upto
        if len(rows) == bounds.limit:
            key = self.key_of(rows[-1])
        if bounds.limit is not None:
            self._look_ahead(len(rows), bounds.limit)
        if key is not None and key == bounds.after:
            raise RotationError(
                f"{self.name} cannot be paged by primary key: a value, as it is read, does not "
                "compare equal to itself. The column is inexact, as FLOAT is, or has values that "
                "the model's type does not, such as a TIME below 0"
            )
        return key

    def _look_ahead(self, found: int, limit: int) -> None:
        """Search more rows in the next batch if few were pending in this one."""
        if found >= limit:
            self._lookahead = 1
        elif 2 * found < limit:
            self._lookahead = min(2 * self._lookahead, MAX_LOOKAHEAD)

    def every(self, read: Read, sample: int | None = None) -> Iterator[sa.Row[Any]]:
        """Check the keys, and give all pending rows, or the first `sample` of them.

        They are read in batches, so memory stays constant. A batch is everything between two keys,
        however many rows that is. So every row is in a batch, even if the key is not unique, or the
        database does not find the row by its key.

        :raises RotationError: see :meth:`check_keys`.
        """
        read(self.check_keys)
        after: PrimaryKey | None = None
        left = sample
        while left is None or left > 0:
            size = BATCH_ROWS if left is None else min(left, BATCH_ROWS)
            found = read(partial(self._read_next, after=after, limit=size))
            if found is None:
                return
            bounds, rows = found
            yield from rows[:left]
            after = self.next_after(bounds, rows)
            self._look_ahead(len(rows), size)
            if after is None:
                return
            left = None if left is None else left - len(rows)

    def _read_next(
        self, connection: sa.Connection, after: PrimaryKey | None, limit: int
    ) -> tuple[BatchBounds, Sequence[sa.Row[Any]]] | None:
        bounds = self.find_bounds(connection, after, limit)
        if bounds is None:
            return None
        bounds = bounds._replace(limit=None)
        return bounds, self.read(connection, bounds)

    def key_of(self, row: Sequence[Any]) -> PrimaryKey:
        """Return the primary key of a row that was read."""
        return tuple(row[: len(self.primary_key)])

    # -- counting ----------------------------------------------------------------------------------

    def count(
        self,
        connection: sa.Connection,
        condition: sa.ColumnElement[bool],
        bounds: BatchBounds = EVERYTHING,
    ) -> int:
        """Count the rows within `bounds` that meet a condition."""
        counted = sa.select(sa.func.count()).select_from(self.clause)
        counted = counted.where(condition, *self.in_range(bounds))
        return connection.scalar(counted, self.parameters(bounds)) or 0

    def count_all(self, read: Read, condition: sa.ColumnElement[bool]) -> int:
        """Count the rows that meet a condition, and keep no writer waiting for long."""
        # Only SQLite has its writers wait for readers.
        ranges = self.ranges(read) if self.dialect.name == "sqlite" else [EVERYTHING]
        return sum(
            read(partial(self.count, condition=condition, bounds=bounds)) for bounds in ranges
        )

    def ranges(self, read: Read) -> Iterator[BatchBounds]:
        """Split the table into ranges, each of which is counted in a short time.

        A row whose primary key changes meanwhile may be in two of them, or in none.
        """
        rows = _FIRST_RANGE
        after: PrimaryKey | None = None
        while True:
            started = time.monotonic()
            bounds = read(partial(self.find_bounds, after=after, limit=rows, max_bytes=None))
            # NULL may sort last.
            is_last = bounds is None or bounds.upto is None or None in bounds.upto
            if after is None:
                if is_last:
                    yield EVERYTHING
                    return
                yield NULL_KEYS
            if bounds is None or is_last:
                yield BatchBounds(after)
                return
            yield bounds
            after = bounds.upto
            factor = min(max(_RANGE_SECONDS / max(time.monotonic() - started, 1e-6), 0.5), 2.0)
            rows = max(1000, min(int(rows * factor), _LARGEST_RANGE))

    def in_range(self, bounds: BatchBounds) -> list[sa.ColumnElement[bool]]:
        """Return the conditions of a range that :meth:`ranges` gave."""
        return [self._has_null_key] if bounds is NULL_KEYS else self._within(bounds)

    # -- statements --------------------------------------------------------------------------------

    def parameters(self, bounds: BatchBounds) -> dict[str, Any]:
        """Return the parameters of a statement within `bounds`."""
        parameters = {
            f"lucent_{name}_{position}": value
            for name, key in (("after", bounds.after), ("upto", bounds.upto))
            for position, value in enumerate(key or ())
        }
        return parameters if bounds.limit is None else {**parameters, "lucent_limit": bounds.limit}

    def _within(self, bounds: BatchBounds) -> list[sa.ColumnElement[bool]]:
        conditions = []
        if bounds.after is not None:
            conditions.append(self._is_after("after"))
        if bounds.upto is not None:
            conditions.append(sa.not_(self._is_after("upto")))
        return conditions

    def _is_after(self, name: str) -> sa.ColumnElement[bool]:
        key = [
            as_sort_value(order, sa.bindparam(f"lucent_{name}_{position}", type_=type_))
            for position, (type_, order) in enumerate(zip(self.key_types, self._order, strict=True))
        ]
        return row_after(self._order, key, self.dialect)

    def _reading(
        self, bounds: BatchBounds, *, lock: bool, keys_only: bool = False
    ) -> sa.Select[Any]:
        is_open = (bounds.after is None, bounds.upto is None, bounds.limit is None)
        kind = ("rows", *is_open, lock, keys_only)
        if kind not in self._statements:
            selects = self.primary_key if keys_only else self._selects
            statement = sa.select(*selects).select_from(self.clause)
            statement = statement.where(self.pending, *self._within(bounds)).order_by(*self._order)
            if bounds.limit is not None:
                statement = statement.limit(sa.bindparam("lucent_limit"))
            if lock:
                # SQLite has none, and SQLAlchemy leaves it out there. `key_share` is PostgreSQL's
                # lock that lets others insert rows with a foreign key to this one.
                statement = statement.with_for_update(
                    skip_locked=self._skips_locked, key_share=True
                )
            # It selects stored bytes, and calls no function that does anything.
            self._statements[kind] = statement.execution_options(**{BINARY_RESULTS: REPEATABLE})
        return self._statements[kind]

    def _finding_bounds(self, after: PrimaryKey | None) -> sa.Select[Any]:
        kind = ("bounds", after is None)
        if kind not in self._statements:
            sizes = (sa.func.coalesce(size, 0) for size in self._sizes)
            order = [each.label(f"lucent_order_{n}") for n, each in enumerate(self._order)]
            batch = (
                sa.select(
                    *(part.label(f"lucent_key_{n}") for n, part in enumerate(self.primary_key)),
                    *order,
                    reduce(add, sizes).label("lucent_size"),
                )
                .select_from(self.clause)
                .where(*self._within(BatchBounds(after)))
                .order_by(*self._order)
                .limit(sa.bindparam("lucent_limit"))
                .subquery()
            )
            keys = [batch.c[f"lucent_key_{n}"] for n in range(len(self.primary_key))]
            counts: list[sa.Function[Any]] = [sa.func.count(), sa.func.sum(batch.c.lucent_size)]
            if len(keys) == 1 and isinstance(self._order[0].type, sa.Integer):
                statement = sa.select(*map(sa.func.max, keys), *counts)
            else:
                # Several columns have no max(), nor has every type. This takes twice as long.
                last_first = (batch.c[each.name].desc() for each in order)
                statement = sa.select(*keys, *(count.over() for count in counts)).limit(1)
                statement = statement.order_by(*last_first)
            self._statements[kind] = statement
        return self._statements[kind]

    def _execute(
        self,
        connection: sa.Connection,
        statement: sa.Select[Any],
        parameters: dict[str, Any],
        *,
        is_batch: bool = False,
    ) -> Sequence[sa.Row[Any]]:
        try:
            return connection.execute(statement, parameters).all()
        except sa.exc.StatementError as error:
            # psycopg's own fault is a DataError; a type's, in a parameter, is wrapped as well.
            is_unread = isinstance(error, sa.exc.DataError) and not is_batch
            if isinstance(error, sa.exc.DBAPIError) and not is_unread:
                raise
            fault = self.unreadable(type(error.orig or error))
        except UNREADABLE as error:
            fault = self.unreadable(type(error))
        raise fault

    def unreadable(self, fault: type[BaseException]) -> RotationError:
        """Return the error for a row with a key or bound value that its column's type refuses."""
        return RotationError(
            f"a row of table {self.name} cannot be read ({fault.__name__}): a value of its primary "
            "key, or of a column that values are bound to, does not fit the column's type, or is "
            "none in Python, such as a timestamp of infinity. Correct the value or the type"
        )
