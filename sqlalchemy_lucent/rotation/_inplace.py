"""SQLite: let the UPDATE itself open and seal, by functions registered on the connection.

The values never leave the database's process, and the statement is atomic by itself: there is no
read to compare with, and no concurrent writer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Update,
    and_,
    case,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from ..exceptions import ConfigurationError, DecryptionError
from ..keyring import Keyring
from ..types import encode_row
from ._table import Batch, PrimaryKey, SealedColumn, TableWorker
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

    def batch(self, connection: Connection, after: PrimaryKey | None, limit: int) -> Batch:
        """Re-seal the next `limit` stale rows behind `after`."""
        bounds = self.parameters(after, None, limit)
        keys = connection.execute(self._selection(after), bounds).all()
        if not keys:
            return Batch(0, None, 0, (), 0)
        last = tuple(keys[-1])
        with self._registered(connection):
            connection.execute(self._update(after), self.parameters(after, last))
        written = sum(function.written for function in self._functions)
        failed: Sequence[FailedRow] = ()
        if len(self._functions) > 1 or written < len(keys):
            # What is stale now is what does not open.
            left = self.read(connection, after, None, upto=last, stale_only=True)
            failed = self.reseal(left).failed
        size = sum(function.size for function in self._functions)
        return Batch(len(keys), last, written, failed, size)

    def _selection(self, after: PrimaryKey | None) -> Select[Any]:
        kind = ("keys", after is None)
        if kind not in self._statements:
            stale = select(*self.primary_key).where(self.any_stale())
            self._statements[kind] = self.in_order(stale, after, None, 1)
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
        for function in self._functions:
            function.begin()
            driver.create_function(function.function_name, -1, function)
        refused: DBAPIError | None = None
        try:
            yield
        except DBAPIError as error:
            refused = error
        finally:
            for function in self._functions:
                driver.create_function(function.function_name, -1, None)
        if refused is None:
            return
        # SQLite reports every exception of a function in the same few words.
        for function in self._functions:
            if function.raised is not None:
                raise function.raised
        raise refused


class _Function:
    """``reseal(value, binding columns…)`` as SQLite calls it."""

    def __init__(
        self, function_name: str, worker: TableWorker, sealed: SealedColumn, connection: Connection
    ) -> None:
        self.function_name = function_name
        self.name = sealed.name
        self._renew = sealed.renew
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
        # Text was never sealed, and the driver would fail to decode it if it is not UTF-8.
        self.applies = and_(worker.is_stale(sealed), func.typeof(self.column) == "blob")
        self.begin()

    def begin(self) -> None:
        """Begin a statement."""
        self.written = 0
        self.size = 0
        self.raised: BaseException | None = None

    def __call__(self, value: bytes, *bound: Any) -> bytes:
        try:
            renewed = self._renew(value, self._row_context(bound) if bound else b"")
        except (DecryptionError, ConfigurationError):
            return value
        except BaseException as error:
            self.raised = error  # an interrupt too: SQLite would make a common error of it
            raise
        self.written += 1
        self.size += len(value)
        return renewed

    def _row_context(self, bound: tuple[Any, ...]) -> bytes:
        parts = [
            part if process is None else process(part)
            for process, part in zip(self._processors, bound, strict=True)
        ]
        return encode_row(parts, self._bound_to)
