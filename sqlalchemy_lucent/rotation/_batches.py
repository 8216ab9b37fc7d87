"""Batches: read rows in primary-key order, write them by compare-and-swap, commit each batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    Row,
    Update,
    and_,
    bindparam,
    false,
    func,
    literal,
    or_,
    select,
    update,
)

from .._envelope import NONCE_SIZE, header_size
from ..exceptions import DecryptionError, RotationError
from ..keyring import Keyring
from ..types import EncryptedJSON, as_bytes, encode_row, open_in_contexts
from .report import FailedRow
from .targets import TargetTable

_LOCKING_DIALECTS: Final = frozenset({"postgresql", "mysql", "mariadb"})
_BEGIN: Final = {"sqlite": "BEGIN IMMEDIATE"}


@contextmanager
def autocommitting(bind: Engine | Connection) -> Iterator[Connection]:
    """
    Give a connection in AUTOCOMMIT mode, on which :func:`batch` begins and commits.

    :raises RotationError: `bind` is a connection inside a transaction, which is not ours to end.
    """
    if isinstance(bind, Engine):
        with bind.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")
        return
    if not isinstance(bind, Connection):
        raise RotationError(f"the bind is an Engine or a Connection, not {type(bind).__name__}")
    if bind.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        yield bind
        return
    if bind.in_transaction():
        raise RotationError(
            "the connection is inside a transaction; a rotation commits batch by batch and will "
            "not end a transaction that is not its own. Commit it first, or pass the engine"
        )
    previous = bind.get_isolation_level()
    bind.rollback()  # asking began a transaction
    try:
        yield bind.execution_options(isolation_level="AUTOCOMMIT")
    finally:
        bind.rollback()
        bind.execution_options(isolation_level=previous)


@contextmanager
def batch(connection: Connection) -> Iterator[None]:
    """
    One short transaction on an AUTOCOMMIT connection, begun and ended explicitly.

    Not `connection.begin()`: the connection may be Alembic's own, inside its autocommit block,
    where SQLAlchemy's transaction is a stand-in that commits nothing.
    """
    connection.exec_driver_sql(_BEGIN.get(connection.dialect.name, "BEGIN"))
    try:
        yield
    except BaseException:
        if not connection.invalidated:
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


class TableWorker:
    """Reads, opens and re-seals the rows of one table."""

    def __init__(self, target: TargetTable, keyring: Keyring) -> None:
        self.target = target
        self._keyring = keyring
        self._primary_headers = {
            name: keyring.for_context(type_.contexts[0]).primary.header
            for name, type_ in target.types.items()
        }

    # -- statements ------------------------------------------------------------------------------

    def _is_stale(self, name: str) -> ColumnElement[bool]:
        value = self.target.clause.c[name]
        header = self._primary_headers[name]
        return and_(value.is_not(None), _prefix(value, len(header)) != literal(header, LargeBinary))

    def count_stale(self, connection: Connection) -> int:
        """Count the values that are not under the primary key."""
        return sum(
            connection.scalar(
                select(func.count()).select_from(self.target.clause).where(self._is_stale(name))
            )
            or 0
            for name in self.target.types
        )

    def read(
        self,
        connection: Connection,
        after: Sequence[Any] | None,
        limit: int,
        *,
        stale_only: bool,
    ) -> Sequence[Row[Any]]:
        """Return the next rows behind the primary key `after`; lock them if they are stale ones."""
        statement = (
            select(*self.target.clause.c)
            .where(
                or_(false(), *map(self._is_stale, self.target.types))
                if stale_only
                else or_(*(self.target.clause.c[n].is_not(None) for n in self.target.types))
            )
            .order_by(*self.target.primary_key)
            .limit(limit)
        )
        if after is not None:
            statement = statement.where(_behind(self.target.primary_key, after))
        if stale_only and connection.dialect.name in _LOCKING_DIALECTS:
            # Rows that another rotator has in hand are left to it.
            statement = statement.with_for_update(skip_locked=True)
        return connection.execute(statement).all()

    def primary_key_of(self, row: Row[Any]) -> tuple[Any, ...]:
        """Return the primary key of `row`."""
        return tuple(row._mapping[column] for column in self.target.primary_key)

    def values_in(self, row: Row[Any]) -> Iterator[str]:
        """Give the names of the columns of `row` that hold a value."""
        for name in self.target.types:
            if row._mapping[self.target.clause.c[name]] is not None:
                yield name

    def open(self, row: Row[Any], name: str) -> bytes:
        """Return the plaintext of the column `name` of `row`, or raise a `DecryptionError`."""
        type_ = self.target.types[name]
        sealed = as_bytes(row._mapping[self.target.clause.c[name]])
        return open_in_contexts(
            type_.contexts, sealed, self._row_context(row, type_), self._keyring
        )

    def reseal(self, rows: Sequence[Row[Any]]) -> tuple[list[Renewal], list[FailedRow]]:
        """Seal the stale values of `rows` anew; say which do not open."""
        renewals, failed = [], []
        for row in rows:
            renewal = Renewal(row)
            for name in self.values_in(row):
                sealed = as_bytes(row._mapping[self.target.clause.c[name]])
                if sealed.startswith(self._primary_headers[name]):
                    continue
                try:
                    plaintext = self.open(row, name)
                except DecryptionError as error:
                    failed.append(self.failure(row, name, error))
                    continue
                type_ = self.target.types[name]
                keys = self._keyring.for_context(type_.contexts[0])
                renewal.values[name] = keys.seal(plaintext, self._row_context(row, type_))
            if renewal.values:
                renewals.append(renewal)
        return renewals, failed

    def failure(self, row: Row[Any], name: str, error: DecryptionError) -> FailedRow:
        """Describe a value that does not open."""
        return FailedRow(self.target.name, name, self.primary_key_of(row), type(error).__name__)

    def write(self, connection: Connection, renewals: Sequence[Renewal]) -> int:
        """
        Write `renewals` where the row still holds what was read; return how many values were.

        Compared are the header and the nonce, which are fresh for every seal: that decides as
        well as comparing the whole value, and sends a few bytes.
        """
        written = 0
        by_columns: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for renewal in renewals:
            parameters: dict[str, Any] = {}
            for position, part in enumerate(self.primary_key_of(renewal.row)):
                parameters[f"key_{position}"] = part
            for position, (name, sealed) in enumerate(renewal.values.items()):
                old = as_bytes(renewal.row._mapping[self.target.clause.c[name]])
                compared = header_size(old) + NONCE_SIZE
                parameters[f"new_{position}"] = sealed
                parameters[f"size_{position}"] = compared
                parameters[f"old_{position}"] = old[:compared]
            by_columns.setdefault(tuple(renewal.values), []).append(parameters)
        for names, parameter_sets in by_columns.items():
            result = connection.execute(self._update(names), parameter_sets)
            # Some drivers do not count; there the rows are locked, so none can have been missed.
            rows = result.rowcount if result.rowcount >= 0 else len(parameter_sets)
            written += rows * len(names)
        return written

    def _update(self, names: tuple[str, ...]) -> Update:
        clause = self.target.clause
        statement = update(clause).where(
            *(
                column == bindparam(f"key_{position}", type_=column.type)
                for position, column in enumerate(self.target.primary_key)
            )
        )
        for position, name in enumerate(names):
            size = bindparam(f"size_{position}", type_=Integer)
            statement = statement.where(
                _prefix(clause.c[name], size) == bindparam(f"old_{position}", type_=LargeBinary)
            ).values({name: bindparam(f"new_{position}", type_=LargeBinary)})
        return statement

    def _row_context(self, row: Row[Any], type_: EncryptedJSON) -> bytes:
        parts = [row._mapping[self.target.clause.c[bound]] for bound in type_.bound_to]
        return encode_row(parts, type_.bound_to)


class Renewal:
    """New bytes for some columns of a row that was read."""

    __slots__ = ("row", "values")

    def __init__(self, row: Row[Any]) -> None:
        self.row = row
        self.values: dict[str, bytes] = {}


def _prefix(value: ColumnElement[Any], size: Any) -> ColumnElement[bytes]:
    return func.substr(value, 1, size, type_=LargeBinary)


def _behind(columns: Sequence[ColumnElement[Any]], values: Sequence[Any]) -> ColumnElement[bool]:
    """
    Return ``(a, b) > (x, y)`` spelled out, which every database's planner can use an index for.

    Row values would be shorter, but MySQL and MariaDB scan the table for them.
    """
    *rest, (last_column, last_value) = zip(columns, values, strict=True)
    condition: ColumnElement[bool] = last_column > last_value
    for column, value in reversed(rest):
        condition = and_(column >= value, or_(column > value, condition))
    return condition
