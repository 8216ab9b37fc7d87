"""
Write re-sealed values back, where the row still holds what was read: a form per database.

Each was chosen by measurement (``tests/bench/bench_rotation.py``). All of them compare the old
header and nonce, and say how many values they wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import (
    ARRAY,
    Connection,
    Dialect,
    Integer,
    LargeBinary,
    String,
    Update,
    bindparam,
    column,
    func,
    text,
    update,
)
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.types import TypeEngine, _Binary

from .targets import TargetTable


class Change(NamedTuple):
    """New bytes for some columns of a row, and how the old ones began."""

    key: tuple[Any, ...]
    names: tuple[str, ...]
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


class Writer(Protocol):
    """Writes changes, by compare-and-swap."""

    def write(self, connection: Connection, changes: Sequence[Change]) -> int:
        """Write `changes`; return how many values were written."""


def writer_for(connection: Connection, target: TargetTable) -> Writer:
    """Return the fastest form that `target` allows on this database."""
    dialect = connection.dialect
    if dialect.name == "postgresql":
        return ArrayWriter(target)
    if dialect.name not in ("mysql", "mariadb"):
        return RowWriter(target)
    names = {"name": str(target.clause.name), "schema": target.clause.schema}
    kept = connection.scalars(_SELF_UPDATING, names).all()
    if dialect.paramstyle in ("format", "pyformat") and all(
        _compares_alike(column.type, dialect) for column in target.primary_key
    ):
        return JoinWriter(target, dialect, kept)
    return RowWriter(target, kept)


# MySQL renews such columns at each UPDATE that does not set them, whatever the metadata knows.
_SELF_UPDATING: Final = text(
    "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND extra LIKE '%on update%'"
)


def _compares_alike(type_: TypeEngine[Any], dialect: Dialect) -> bool:
    """
    Say whether MySQL compares a column of `type_` with a column of a derived table by its index.

    Where the connection's collation is not the column's, it fails or reads the whole table.
    """
    implementation = type_.dialect_impl(dialect)
    return isinstance(implementation, (Integer, _Binary)) or (
        isinstance(implementation, String) and (implementation.collation or "").endswith("_bin")
    )


def _by_columns(changes: Sequence[Change]) -> Iterable[tuple[tuple[str, ...], list[Change]]]:
    grouped: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        grouped.setdefault(change.names, []).append(change)
    return grouped.items()


class RowWriter:
    """The form for everything: one UPDATE a row, sent together as the driver can."""

    def __init__(self, target: TargetTable, kept: Sequence[str] = ()) -> None:
        self._target = target
        self._kept: dict[str, ColumnClause[Any]] = {name: column(name) for name in kept}
        for own in self._kept.values():
            if own.name not in target.clause.c:
                target.clause.append_column(own)

    def write(self, connection: Connection, changes: Sequence[Change]) -> int:
        """Write `changes`."""
        written = 0
        for names, group in _by_columns(changes):
            parameters = [dict(_parameters(change)) for change in group]
            result = connection.execute(self._statement(names), parameters)
            # Some drivers do not count; there the rows are locked, so none can have been missed.
            rows = result.rowcount if result.rowcount >= 0 else len(group)
            written += rows * len(names)
        return written

    def _statement(self, names: tuple[str, ...]) -> Update:
        clause = self._target.clause
        statement = update(clause).where(
            *(
                column == bindparam(f"lucent_key_{position}", type_=column.type)
                for position, column in enumerate(self._target.primary_key)
            )
        )
        for position, name in enumerate(names):
            size = bindparam(f"lucent_size_{position}", type_=Integer)
            old = bindparam(f"lucent_old_{position}", type_=LargeBinary)
            statement = statement.where(
                func.substr(clause.c[name], 1, size, type_=LargeBinary) == old
            ).values({name: bindparam(f"lucent_new_{position}", type_=LargeBinary)})
        return statement.values(self._kept) if self._kept else statement


def _parameters(change: Change) -> Iterator[tuple[str, Any]]:
    for position, part in enumerate(change.key):
        yield f"lucent_key_{position}", part
    for position, (old, new) in enumerate(zip(change.old, change.new, strict=True)):
        yield f"lucent_old_{position}", old
        yield f"lucent_size_{position}", len(old)
        yield f"lucent_new_{position}", new


class ArrayWriter:
    """PostgreSQL: one ``UPDATE … FROM unnest(…)`` with an array for each column."""

    def __init__(self, target: TargetTable) -> None:
        self._target = target
        self._statements: dict[tuple[str, ...], Update] = {}

    def write(self, connection: Connection, changes: Sequence[Change]) -> int:
        """Write `changes`."""
        written = 0
        for names, group in _by_columns(changes):
            if names not in self._statements:
                self._statements[names] = self._statement(names)
            parameters: dict[str, list[Any]] = {}
            for kind, values in (
                ("key", [change.key for change in group]),
                ("old", [change.old for change in group]),
                ("new", [change.new for change in group]),
            ):
                for position, array in enumerate(zip(*values, strict=True)):
                    parameters[f"lucent_{kind}_{position}"] = list(array)
            result = connection.execute(self._statements[names], parameters)
            written += result.rowcount * len(names)
        return written

    def _statement(self, names: tuple[str, ...]) -> Update:
        clause = self._target.clause
        types: dict[str, TypeEngine[Any]] = {
            f"lucent_key_{position}": column.type
            for position, column in enumerate(self._target.primary_key)
        }
        for position in range(len(names)):
            types[f"lucent_old_{position}"] = LargeBinary()
            types[f"lucent_new_{position}"] = LargeBinary()
        arrays = (bindparam(name, type_=ARRAY(type_)) for name, type_ in types.items())
        renewed = (
            func.unnest(*arrays)
            .table_valued(*(column(name, type_) for name, type_ in types.items()), name="renewed")
            .render_derived()
        )
        statement = update(clause).where(
            *(
                column == renewed.c[f"lucent_key_{position}"]
                for position, column in enumerate(self._target.primary_key)
            )
        )
        for position, name in enumerate(names):
            old = renewed.c[f"lucent_old_{position}"]
            prefix = func.substr(clause.c[name], 1, func.octet_length(old), type_=LargeBinary)
            statement = statement.where(prefix == old).values(
                {name: renewed.c[f"lucent_new_{position}"]}
            )
        return statement


class JoinWriter:
    """
    MySQL and MariaDB: one UPDATE of the table joined to a derived table of the changes.

    Written as text, because compiling a thousand SELECTs costs SQLAlchemy more than the database
    needs for running them.
    """

    _MAX_BYTES: Final = 1 << 20
    """Bytes of a statement, roughly: far below ``max_allowed_packet``, 16 MiB by default."""

    def __init__(self, target: TargetTable, dialect: Dialect, kept: Sequence[str]) -> None:
        quote = dialect.identifier_preparer.quote
        self._kept = [f"t.{quote(name)}" for name in kept]
        self._target = target
        self._quote = quote
        self._table = dialect.identifier_preparer.format_table(target.clause)
        self._processors: list[Callable[[Any], Any] | None] = [
            column.type.dialect_impl(dialect).bind_processor(dialect)
            for column in target.primary_key
        ]

    def write(self, connection: Connection, changes: Sequence[Change]) -> int:
        """Write `changes`."""
        written = 0
        for names, group in _by_columns(changes):
            for part in self._split(group):
                parameters = [value for change in part for value in self._values(change)]
                statement = self._statement(names, len(part))
                result = connection.exec_driver_sql(statement, tuple(parameters))
                written += result.rowcount * len(names)
        return written

    def _split(self, changes: Sequence[Change]) -> Iterator[list[Change]]:
        part: list[Change] = []
        size = 0
        for change in changes:
            length = sum(map(len, change.new))
            if part and size + length > self._MAX_BYTES:
                yield part
                part, size = [], 0
            part.append(change)
            size += length
        yield part

    def _values(self, change: Change) -> Iterator[Any]:
        for process, part in zip(self._processors, change.key, strict=True):
            yield part if process is None else process(part)
        yield from change.old
        yield from change.new

    def _statement(self, names: tuple[str, ...], rows: int) -> str:
        keys = range(len(self._target.primary_key))
        values = range(len(names))
        columns = [f"k{i}" for i in keys] + [f"o{i}" for i in values] + [f"n{i}" for i in values]
        first = "SELECT " + ", ".join(f"%s AS {name}" for name in columns)
        others = " UNION ALL SELECT " + ", ".join(["%s"] * len(columns))
        joined = " AND ".join(
            f"t.{self._quote(column.name)} = v.k{i}"
            for i, column in enumerate(self._target.primary_key)
        )
        quoted = [f"t.{self._quote(name)}" for name in names]
        compared = " AND ".join(
            f"SUBSTRING({name}, 1, LENGTH(v.o{i})) = v.o{i}" for i, name in enumerate(quoted)
        )
        assigned = [f"{name} = v.n{i}" for i, name in enumerate(quoted)]
        assigned += [f"{name} = {name}" for name in self._kept]
        # Every part is a placeholder, or quoted by the dialect.
        source = f"({first}{others * (rows - 1)}) AS v ON {joined}"
        changed = f"SET {', '.join(assigned)} WHERE {compared}"
        return f"UPDATE {self._table} AS t JOIN {source} {changed}"
