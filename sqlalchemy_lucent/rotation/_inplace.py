"""SQLite: let the UPDATE itself open and seal, by functions registered on the connection.

The values never leave the database's process, and the statement is atomic by itself: there is no
read to compare with, and no concurrent writer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    Update,
    and_,
    bindparam,
    case,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from ..exceptions import ConfigurationError, DecryptionError, RotationError
from ..keyring import Keyring
from ..types import encode_row
from ._table import Batch, PrimaryKey, Reach, SealedColumn, TableWorker
from .report import FailedRow
from .targets import TargetTable


def can_work_in_place(connection: Connection) -> bool:
    """Say whether functions can be registered: on Python's own SQLite driver."""
    return isinstance(connection.connection.driver_connection, sqlite3.Connection)


class InPlaceWorker(TableWorker):
    """A :class:`TableWorker` whose batches are one UPDATE each."""

    def __init__(self, target: TargetTable, keyring: Keyring, connection: Connection) -> None:
        super().__init__(target, keyring, connection.dialect)
        self._functions = [
            _Function(f"lucent_reseal_{position}", self, sealed, connection)
            for position, sealed in enumerate(self.columns)
        ]
        self._updates: dict[bool, Update] = {}

    def work(
        self, connection: Connection, after: PrimaryKey | None, reach: Reach, limit: int
    ) -> Batch:
        """Re-seal the stale rows behind `after`, as far as `reach` goes."""
        with self._registered(connection):
            connection.execute(self._update(after), self.parameters(after, reach.last))
        counts = [function.done() for function in self._functions]
        written = sum(values for values, _ in counts)
        failed: Sequence[FailedRow] = ()
        if len(self._functions) > 1 or written < reach.rows:
            # What is stale now is what does not open.
            left = self.read(connection, after, None, upto=reach.last, stale_only=True)
            failed = self.reseal(left).failed
        size = sum(size for _, size in counts)
        return Batch(reach.rows, reach.last, reach.more, written, failed, size)

    def reach(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Reach | None:
        """Return how far the next `limit` stale rows behind `after` go.

        Reading locks no row here, and their size does not matter: SQLite hands them to the
        functions one by one.
        """
        # A whole batch needs its last row only.
        skipping = {**self.parameters(after, None, 1), "lucent_skip": limit - 1}
        last = self._all(connection, self._selection(after, last_only=True), skipping)
        if last:
            return Reach(tuple(last[0]), True, limit)
        bounds = self.parameters(after, None, limit)
        keys = self._all(connection, self._selection(after, last_only=False), bounds)
        return Reach(tuple(keys[-1]), False, len(keys)) if keys else None

    def _selection(self, after: PrimaryKey | None, *, last_only: bool) -> Select[Any]:
        kind = ("last" if last_only else "keys", after is None)
        if kind not in self._statements:
            stale = select(*self.primary_key).where(self.any_stale())
            statement = self.in_order(stale, after, None, 1)
            if last_only:
                statement = statement.offset(bindparam("lucent_skip"))
            self._statements[kind] = statement
        return self._statements[kind]

    def _update(self, after: PrimaryKey | None) -> Update:
        if (after is None) not in self._updates:
            self._updates[after is None] = (
                update(self.target.clause)
                .where(or_(*(f.applies for f in self._functions)), *self.key_range(after, ()))
                .values({function.name: self._renewed(function) for function in self._functions})
            )
        return self._updates[after is None]

    def _renewed(self, function: _Function) -> ColumnElement[Any]:
        if len(self._functions) == 1:
            return function.call
        return case((function.applies, function.call), else_=function.column)

    @contextmanager
    def _registered(self, connection: Connection) -> Iterator[None]:
        """Have the functions on the connection for one statement: they hold keys."""
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        refused: DBAPIError | None = None
        try:
            for function in self._functions:
                function.begin()
                _register(driver, function.function_name, function.called)
            yield
        except DBAPIError as error:
            refused = error
        finally:
            for function in self._functions:
                function.end()
                _register(driver, function.function_name, None)
        if refused is None:
            return
        # SQLite reports every exception of a function in the same few words.
        for function in self._functions:
            if function.raised is not None:
                raise function.raised
        raise refused


class _Function:
    """``reseal(value, binding columns…)``; SQLite calls its `called`."""

    def __init__(
        self, function_name: str, worker: TableWorker, sealed: SealedColumn, connection: Connection
    ) -> None:
        self.function_name = function_name
        self.name = sealed.name
        self._open, self._seal = sealed.open, sealed.seal
        self._usual, self._usual_size = sealed.usual, sealed.usual_size
        self._bound_to = sealed.bound_to
        clause = worker.target.clause
        self.column = clause.c[sealed.name]
        bound = [clause.c[name] for name in sealed.bound_columns]
        # Columns come as SQLite stores them; their types know what the application sees.
        dialect = connection.dialect
        self._processors: list[Callable[[Any], Any] | None] = [
            column.type.dialect_impl(dialect).result_processor(dialect, None) for column in bound
        ]
        self.call: ColumnElement[Any] = getattr(func, function_name)(self.column, *bound)
        # Text was never sealed, and the driver would fail to decode it if it is not UTF-8. To
        # SQLite, whatever is not bytes is less than bytes are.
        self.applies = and_(worker.is_stale(sealed), self.column >= literal(b"", LargeBinary))
        self.begin()

    def begin(self) -> None:
        """Begin a statement."""
        self.raised: BaseException | None = None
        self.called, self.done, self.end = self._counting()

    def _counting(
        self,
    ) -> tuple[Callable[..., bytes], Callable[[], tuple[int, int]], Callable[[], None]]:
        """Return what SQLite calls, what tells how many values and bytes were renewed by it, and
        what takes the keys from it: it may outlive the statement.
        """
        # Called for every value, so all that it needs is at hand.
        open_, seal = self._open, self._seal
        usual, usual_size = self._usual, self._usual_size
        written = size = 0

        def reseal(value: bytes, row: bytes = b"") -> bytes:
            nonlocal written, size
            try:
                try:
                    # Of a value that does not open there is None, which the cipher does not take.
                    renewed = seal(usual[value[:usual_size]].open(value, row), row)  # type: ignore[arg-type]
                except (KeyError, TypeError):
                    renewed = seal(open_(value, row), row)
            except (DecryptionError, ConfigurationError):
                return value
            except BaseException as error:
                self.raised = error  # an interrupt too: SQLite would make a common error of it
                raise
            written += 1
            size += len(value)
            return renewed

        def reseal_bound(value: bytes, *bound: Any) -> bytes:
            try:
                row = self._row_context(bound)
            except (DecryptionError, ConfigurationError):
                return value
            except BaseException as error:
                self.raised = error
                raise
            return reseal(value, row)

        def end() -> None:
            nonlocal open_, seal, usual
            open_ = seal = _ended
            usual = {}

        return reseal_bound if self._bound_to else reseal, lambda: (written, size), end

    def _row_context(self, bound: tuple[Any, ...]) -> bytes:
        try:
            parts = [
                part if process is None else process(part)
                for process, part in zip(self._processors, bound, strict=True)
            ]
        except (LookupError, ValueError, TypeError):
            fault = ConfigurationError("a value of a binding column is none of its type")
        else:
            return encode_row(parts, self._bound_to)
        raise fault


def _ended(data: bytes, row: bytes) -> NoReturn:
    raise RotationError("the rotation that this function was made for has ended")


def _register(driver: sqlite3.Connection, name: str, function: Callable[..., bytes] | None) -> None:
    try:
        driver.create_function(name, -1, function)
    except sqlite3.Error:
        pass
    else:
        return
    raise RotationError(
        "the connection has a result that was not read to its end, which keeps SQLite from being "
        "given the function that seals. Read or close it first, or pass an engine with a "
        "connection of its own for the rotation"
    )
