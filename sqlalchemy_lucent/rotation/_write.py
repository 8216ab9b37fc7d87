"""Write re-sealed values back, where the row still holds what was read: a form per database.

Each was chosen by measurement (``tests/bench/bench_rotation.py``). All of them compare the old
header and nonce, and say how many values they wrote.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

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
    literal_column,
    text,
    update,
)
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.types import TypeEngine, _Binary

from .._dialects import is_mysql
from .targets import TargetTable

_Row = tuple[Any, ...]


class Changes:
    """New bytes for the same columns of some rows, and how the old ones began; a list per column.

    Lists of bytes, not an object per row: the garbage collector does not look into them.
    """

    __slots__ = ("keys", "names", "new", "old")

    def __init__(self, names: tuple[str, ...], key_size: int) -> None:
        self.names = names
        self.keys: tuple[list[Any], ...] = tuple([] for _ in range(key_size))
        self.old: tuple[list[bytes], ...] = tuple([] for _ in names)
        self.new: tuple[list[bytes], ...] = tuple([] for _ in names)

    def add(self, key: Sequence[Any], old: Sequence[bytes], new: Sequence[bytes]) -> None:
        """Add a row."""
        for values, part in zip(self.keys, key, strict=False):
            values.append(part)
        for prefixes, prefix in zip(self.old, old, strict=True):
            prefixes.append(prefix)
        for renewals, renewed in zip(self.new, new, strict=True):
            renewals.append(renewed)

    def __len__(self) -> int:
        return len(self.old[0])


class Writer(Protocol):
    """Writes changes, by compare-and-swap."""

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`; return how many values were written."""


def writer_for(connection: Connection, target: TargetTable) -> Writer:
    """Return the fastest form that `target` allows on this database."""
    dialect = connection.dialect
    if dialect.name == "postgresql":
        in_psycopg = dialect.driver in ("psycopg", "psycopg_async")
        return BinaryArrayWriter(target, dialect) if in_psycopg else ArrayWriter(target)
    if not is_mysql(dialect):
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
    """Say whether MySQL compares a column of `type_` with a column of a derived table by its index.

    Where the connection's collation is not the column's, it fails or reads the whole table.
    """
    implementation = type_.dialect_impl(dialect)
    return isinstance(implementation, (Integer, _Binary)) or (
        isinstance(implementation, String) and (implementation.collation or "").endswith("_bin")
    )


def _bind_processor(type_: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return what SQLAlchemy does to a parameter of `type_` before the driver has it."""
    return type_.dialect_impl(dialect).bind_processor(dialect)


class RowWriter:
    """The form for everything: one UPDATE a row, sent together as the driver can."""

    def __init__(self, target: TargetTable, kept: Sequence[str] = ()) -> None:
        self._target = target
        self._kept: dict[str, ColumnClause[Any]] = {name: column(name) for name in kept}
        for own in self._kept.values():
            if own.name not in target.clause.c:
                target.clause.append_column(own)

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`."""
        sizes = [list(map(len, prefixes)) for prefixes in changes.old]
        named = {
            f"lucent_{kind}_{position}": values
            for kind, columns in (
                ("key", changes.keys),
                ("old", changes.old),
                ("size", sizes),
                ("new", changes.new),
            )
            for position, values in enumerate(columns)
        }
        parameters = [
            dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True)
        ]
        result = connection.execute(self._statement(changes.names), parameters)
        # Some drivers do not count; there the rows are locked, so none can have been missed.
        rows = result.rowcount if result.rowcount >= 0 else len(changes)
        return rows * len(changes.names)

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


class ArrayWriter:
    """PostgreSQL: one ``UPDATE … FROM unnest(…)`` with an array for each column."""

    def __init__(self, target: TargetTable) -> None:
        self._target = target
        self._statements: dict[tuple[str, ...], Update] = {}

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`."""
        if changes.names not in self._statements:
            self._statements[changes.names] = self._statement(changes.names)
        parameters = {
            f"lucent_{kind}_{position}": values
            for kind, columns in (("key", changes.keys), ("old", changes.old), ("new", changes.new))
            for position, values in enumerate(columns)
        }
        rows = self._execute(connection, self._statements[changes.names], parameters)
        return rows * len(changes.names)

    def _execute(
        self, connection: Connection, statement: Update, parameters: dict[str, list[Any]]
    ) -> int:
        return connection.execute(statement, parameters).rowcount

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
            size = func.octet_length(old)
            prefix = func.substr(clause.c[name], literal_column("1"), size, type_=LargeBinary)
            statement = statement.where(prefix == old).values(
                {name: renewed.c[f"lucent_new_{position}"]}
            )
        return statement


class BinaryArrayWriter(ArrayWriter):
    """The same for psycopg, which sends bytes in a list as hexadecimal text unless told otherwise.

    SQLAlchemy has no way to tell it, so the compiled statement is given to the driver. Large values
    are written three times as fast for it.
    """

    def __init__(self, target: TargetTable, dialect: Dialect) -> None:
        super().__init__(target)
        self._dialect = dialect
        self._processors = {
            f"lucent_key_{position}": _bind_processor(ARRAY(column.type), dialect)
            for position, column in enumerate(target.primary_key)
        }
        self._texts: dict[Update, str] = {}

    def _execute(
        self, connection: Connection, statement: Update, parameters: dict[str, list[Any]]
    ) -> int:
        text = self._texts.get(statement)
        if text is None:
            text = _BYTES_PARAMETER.sub(r"\1b", str(statement.compile(dialect=self._dialect)))
            self._texts[statement] = text
        for name, process in self._processors.items():
            if process is not None:
                parameters[name] = process(parameters[name])
        return connection.exec_driver_sql(text, parameters).rowcount


_BYTES_PARAMETER: Final = re.compile(r"(%\(lucent_(?:old|new)_\d+\))s")


class JoinWriter:
    """MySQL and MariaDB: one UPDATE of the table joined to a derived table of the changes.

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
        self._processors = [_bind_processor(c.type, dialect) for c in target.primary_key]

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`."""
        keys = [
            values if process is None else map(process, values)
            for process, values in zip(self._processors, changes.keys, strict=True)
        ]
        rows = list(zip(*keys, *changes.old, *changes.new, strict=True))
        sizes = [sum(map(len, new)) for new in zip(*changes.new, strict=True)]
        written = 0
        for part in self._parts(rows, sizes):
            parameters = tuple(itertools.chain.from_iterable(part))
            statement = self._statement(changes.names, len(part))
            result = connection.exec_driver_sql(statement, parameters)
            written += result.rowcount * len(changes.names)
        return written

    def _parts(self, rows: list[_Row], sizes: list[int]) -> Iterator[list[_Row]]:
        part: list[_Row] = []
        total = 0
        for row, size in zip(rows, sizes, strict=True):
            if part and total + size > self._MAX_BYTES:
                yield part
                part, total = [], 0
            part.append(row)
            total += size
        yield part

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
