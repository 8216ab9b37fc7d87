"""Write re-sealed values back, where the row still holds what was read: a form per database.

Each was chosen by measurement (``tests/bench/bench_rotation.py``). All of them compare the old
header and nonce, and say how many values they wrote.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from sqlalchemy import (
    ARRAY,
    CHAR,
    NCHAR,
    ColumnElement,
    Connection,
    Dialect,
    Enum,
    Float,
    Integer,
    LargeBinary,
    Numeric,
    String,
    TypeDecorator,
    Update,
    bindparam,
    column,
    func,
    literal_column,
    text,
    tuple_,
    update,
)
from sqlalchemy.sql.expression import ColumnClause, TableClause
from sqlalchemy.types import TypeEngine, _Binary

from .._sql import is_mysql
from .targets import TargetTable


class Changes:
    """New bytes for the same columns of some rows, and how the old ones began; a list per column.

    The rows are in the order of their primary keys.
    """

    __slots__ = ("keys", "names", "new", "old")

    def __init__(
        self,
        names: tuple[str, ...],
        keys: Sequence[list[Any]],
        old: Sequence[list[bytes]],
        new: Sequence[list[bytes]],
    ) -> None:
        self.names = names
        self.keys = keys
        self.old = old
        self.new = new

    def __len__(self) -> int:
        return len(self.old[0])

    def only(self, numbers: Sequence[int]) -> Changes:
        """Return the changes of the rows of these numbers."""
        keys, old, new = (
            [[values[number] for number in numbers] for values in columns]
            for columns in (self.keys, self.old, self.new)
        )
        return Changes(self.names, keys, old, new)


class Writer(Protocol):
    """Writes changes, by compare-and-swap."""

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`; return how many values were written."""


def writer_for(connection: Connection, target: TargetTable) -> Writer:
    """Return the fastest form that `target` allows on this database."""
    dialect = connection.dialect
    if dialect.name == "postgresql":
        in_psycopg = dialect.driver in ("psycopg", "psycopg_async")
        return (BinaryArrayWriter if in_psycopg else ArrayWriter)(target, dialect)
    if not is_mysql(dialect):
        return RowWriter(target, dialect)
    names = {"name": str(target.clause.name), "schema": target.clause.schema}
    kept = on_update_columns(connection, target.clause)
    if dialect.paramstyle in ("format", "pyformat") and all(
        _compares_alike(column.type, dialect) for column in target.primary_key
    ):
        named = {column.name.lower() for column in target.primary_key}
        primary = {name.lower() for name in connection.scalars(_PRIMARY, names)}
        rows_first = bool(getattr(dialect, "is_mariadb", False)) and primary == named
        packet = connection.scalar(text("SELECT @@max_allowed_packet"))
        return JoinWriter(target, dialect, kept, packet, rows_first=rows_first)
    return RowWriter(target, dialect, kept)


def check_rights(connection: Connection, target: TargetTable) -> None:
    """Fail now, by an error of the database, if it would not let this user update `target`.

    It has the statement explained, which fires no trigger and does not wait for a lock of a row.
    """
    if connection.dialect.name == "sqlite":
        return
    values = {column.name: target.clause.c[column.name] for column in target.columns}
    statement = update(target.clause).values(values).compile(dialect=connection.dialect)
    connection.exec_driver_sql(f"EXPLAIN {statement}").close()


# MySQL renews such columns at each UPDATE that does not set them, whatever the metadata knows.
_SELF_UPDATING: Final = text(
    "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND extra LIKE '%on update%'"
)


def on_update_columns(connection: Connection, clause: TableClause) -> Sequence[str]:
    """Return the columns that an UPDATE has to set to themselves, if they are to stay."""
    if not is_mysql(connection.dialect):
        return ()
    names = {"name": str(clause.name), "schema": clause.schema}
    return connection.scalars(_SELF_UPDATING, names).all()


_PRIMARY: Final = text(
    "SELECT column_name AS name FROM information_schema.statistics WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND index_name = 'PRIMARY'"
)


def _compares_alike(type_: TypeEngine[Any], dialect: Dialect) -> bool:
    """Say whether MySQL compares a column of `type_` with a column of a derived table by its index.

    Where the connection's collation is not the column's, it fails or reads the whole table. Nor
    may the column's character set be smaller than the connection's, unless all of its characters
    have the same bytes in both.
    """
    implementation = type_.dialect_impl(dialect)
    if isinstance(implementation, String):
        collation = implementation.collation or ""
        return collation.startswith(("utf8mb4_", "ascii_")) and collation.endswith("_bin")
    return isinstance(implementation, (Integer, _Binary))


def _bind_processor(type_: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return what SQLAlchemy does to a parameter of `type_` before the driver has it."""
    return type_.dialect_impl(dialect).bind_processor(dialect)


def without_limits(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """Return `type_` for a cast in PostgreSQL that leaves every key as it is; elsewhere, `type_`.

    The column in the database may be wider than the model says: a cast to the model's type would
    cut the key off, or round it.
    """
    if dialect.name != "postgresql":
        return type_
    from sqlalchemy.dialects import postgresql  # with that database only

    implementation = type_.dialect_impl(dialect)
    if isinstance(type_, TypeDecorator):
        return type_
    if isinstance(implementation, String) and not isinstance(implementation, (CHAR, NCHAR, Enum)):
        # Without a length it may be CITEXT, or another type with an equality of its own.
        return String() if implementation.length is not None else type_
    if isinstance(implementation, Numeric) and not isinstance(implementation, Float):
        return Numeric() if implementation.asdecimal else Numeric(asdecimal=False)
    if isinstance(type_, postgresql.TIMESTAMP):
        return postgresql.TIMESTAMP(timezone=type_.timezone)
    return type_


class RowWriter:
    """SQLite, MySQL and MariaDB, the form for everything: one UPDATE a row, sent together as the
    driver can.

    The parameters go to the driver as they are. SQLAlchemy would make a dict of each row, and one
    more object of each value.
    """

    def __init__(self, target: TargetTable, dialect: Dialect, kept: Sequence[str] = ()) -> None:
        self._target = target
        self._dialect = dialect
        self._kept: dict[str, ColumnClause[Any]] = {name: column(name) for name in kept}
        for own in self._kept.values():
            if own.name not in target.clause.c:
                target.clause.append_column(own)
        self._processors = [_bind_processor(c.type, dialect) for c in target.primary_key]
        self._statements: dict[tuple[str, ...], tuple[str, Sequence[str] | None]] = {}

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`."""
        if changes.names not in self._statements:
            compiled: Any = self._statement(changes.names).compile(dialect=self._dialect)
            self._statements[changes.names] = str(compiled), compiled.positiontup
        statement, order = self._statements[changes.names]
        keys = [
            values if process is None else list(map(process, values))
            for process, values in zip(self._processors, changes.keys, strict=True)
        ]
        sizes = [list(map(len, prefixes)) for prefixes in changes.old]
        named = {
            f"lucent_{kind}_{position}": values
            for kind, columns in (
                ("key", keys),
                ("old", changes.old),
                ("size", sizes),
                ("new", changes.new),
            )
            for position, values in enumerate(columns)
        }
        rows: list[Any] = list(zip(*(named[name] for name in order or named), strict=True))
        if order is None:  # the driver takes parameters by name
            rows = [dict(zip(named, row, strict=True)) for row in rows]
        written = connection.exec_driver_sql(statement, rows).rowcount
        # Some drivers do not count; there the rows are locked, so none can have been missed.
        return (written if written >= 0 else len(rows)) * len(changes.names)

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
            prefix = func.substr(clause.c[name], literal_column("1"), size, type_=LargeBinary)
            statement = statement.where(prefix == old).values(
                {name: bindparam(f"lucent_new_{position}", type_=LargeBinary)}
            )
        return statement.values(self._kept) if self._kept else statement


class ArrayWriter:
    """PostgreSQL: one ``UPDATE … FROM unnest(…)`` with an array for each column."""

    def __init__(self, target: TargetTable, dialect: Dialect) -> None:
        self._target = target
        self._key_types = [without_limits(c.type, dialect) for c in target.primary_key]
        self._statements: dict[tuple[str, ...], Update] = {}

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`."""
        if changes.names not in self._statements:
            self._statements[changes.names] = self._statement(changes.names)
        parameters: dict[str, Any] = {
            f"lucent_{kind}_{position}": values
            for kind, columns in (("key", changes.keys), ("old", changes.old), ("new", changes.new))
            for position, values in enumerate(columns)
        }
        for position, values in enumerate(changes.keys):
            parameters[f"lucent_first_{position}"] = values[0]
            parameters[f"lucent_last_{position}"] = values[-1]
        rows = self._execute(connection, self._statements[changes.names], parameters)
        return rows * len(changes.names)

    def _execute(
        self, connection: Connection, statement: Update, parameters: dict[str, Any]
    ) -> int:
        return connection.execute(statement, parameters).rowcount

    def _statement(self, names: tuple[str, ...]) -> Update:
        clause = self._target.clause
        types: dict[str, TypeEngine[Any]] = {
            f"lucent_key_{position}": type_ for position, type_ in enumerate(self._key_types)
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
            ),
            *self._range(),
        )
        for position, name in enumerate(names):
            old = renewed.c[f"lucent_old_{position}"]
            size = func.octet_length(old)
            prefix = func.substr(clause.c[name], literal_column("1"), size, type_=LargeBinary)
            statement = statement.where(prefix == old).values(
                {name: renewed.c[f"lucent_new_{position}"]}
            )
        return statement

    def _range(self) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
        # Without it, PostgreSQL may read the whole table to hash it, for each batch.
        primary_key = self._target.primary_key
        first, last = (
            tuple_(
                *(
                    bindparam(f"lucent_{end}_{position}", type_=type_)
                    for position, type_ in enumerate(self._key_types)
                )
            )
            for end in ("first", "last")
        )
        return tuple_(*primary_key) >= first, tuple_(*primary_key) <= last


class BinaryArrayWriter(ArrayWriter):
    """The same for psycopg, which sends bytes in a list as hexadecimal text unless told otherwise.

    SQLAlchemy has no way to tell it, so the compiled statement is given to the driver. Large values
    are written three times as fast for it.
    """

    def __init__(self, target: TargetTable, dialect: Dialect) -> None:
        super().__init__(target, dialect)
        self._dialect = dialect
        self._processors: dict[str, Callable[[Any], Any] | None] = {}
        for position, key in enumerate(target.primary_key):
            of_array = _bind_processor(ARRAY(key.type), dialect)
            if isinstance(key.type.dialect_impl(dialect), Integer):
                of_array = _array_literal  # which psycopg takes three times as long to make
            self._processors[f"lucent_key_{position}"] = of_array
            for end in ("first", "last"):
                self._processors[f"lucent_{end}_{position}"] = _bind_processor(key.type, dialect)
        self._texts: dict[Update, str] = {}

    def _execute(
        self, connection: Connection, statement: Update, parameters: dict[str, Any]
    ) -> int:
        text = self._texts.get(statement)
        if text is None:
            # The type of a key may be in a schema of its own.
            schemas = connection.get_execution_options().get("schema_translate_map")
            options = (
                {"schema_translate_map": schemas, "render_schema_translate": True}
                if schemas
                else {}
            )
            compiled = statement.compile(dialect=self._dialect, **options)
            text = _BYTES_PARAMETER.sub(r"\1b", str(compiled))
            self._texts[statement] = text
        for name, process in self._processors.items():
            if process is not None:
                parameters[name] = process(parameters[name])
        return connection.exec_driver_sql(text, parameters).rowcount


def _array_literal(numbers: Sequence[int]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


_BYTES_PARAMETER: Final = re.compile(r"(%\(lucent_(?:old|new)_\d+\))s")


class JoinWriter:
    """MySQL and MariaDB: one UPDATE of the table joined to a derived table of the changes.

    Written as text, because compiling a thousand SELECTs costs SQLAlchemy more than the database
    needs for running them; and with the sealed values in it, because the drivers escape bytes in
    Python, which takes longer than twice the bytes take to send and read. Of the keys, integers are
    in it too, unless the engine hides parameters; others may say more of the row than a log should.

    MariaDB takes the changes as rows of VALUES. Told to begin with the rows to change, it changes
    each as it finds it; by itself it begins with the derived table, and writes all changes to a
    temporary table first. It must find them by the primary key, because it would wait for the lock
    of any other row that it looks at.
    """

    _MAX_ROWS: Final = 500
    """Rows of a statement: MariaDB makes a subquery of a list of 1,000 (its variable
    ``in_predicate_conversion_threshold``)."""

    _MAX_BYTES: Final = 1 << 20
    """Bytes of the values of a statement, roughly, which has them doubled."""

    _MAX_LENGTH: Final = 32_768
    """Bytes of a value. MariaDB (10.11) cuts one of 65,536 or more in a derived table, to the rest
    of a division by that, and says nothing of it."""

    def __init__(
        self,
        target: TargetTable,
        dialect: Dialect,
        kept: Sequence[str],
        max_allowed_packet: int,
        *,
        rows_first: bool,
    ) -> None:
        self._max_bytes = min(self._MAX_BYTES, max_allowed_packet // 4)
        quote = dialect.identifier_preparer.quote
        self._quote = quote
        self._table = dialect.identifier_preparer.format_table(target.clause)
        self._key = [f"t.{quote(column.name)}" for column in target.primary_key]
        self._kept = [f"t.{quote(name)}" for name in kept]
        self._processors = [_bind_processor(c.type, dialect) for c in target.primary_key]
        # What the first row has makes a column's type; some versions of the driver send bytes as
        # text of the connection's character set.
        self._casts = {
            f"k{i}": "CAST(%s AS BINARY)"
            for i, column in enumerate(target.primary_key)
            if isinstance(column.type.dialect_impl(dialect), _Binary)
        }
        self._rows_first = rows_first
        self._of_long_values = RowWriter(target, dialect, kept)

    def write(self, connection: Connection, changes: Changes) -> int:
        """Write `changes`."""
        long, short = [], {}
        for number, new in enumerate(zip(*changes.new, strict=True)):
            sizes = list(map(len, new))
            if max(sizes) > self._MAX_LENGTH:
                long.append(number)
            else:
                short[number] = sum(sizes)
        written = self._of_long_values.write(connection, changes.only(long)) if long else 0
        for numbers in self._parts(short):
            part = changes if len(numbers) == len(changes) else changes.only(numbers)
            statement = self._statement(part, hide_keys=connection.engine.hide_parameters)
            result = connection.exec_driver_sql(*statement)
            written += result.rowcount * len(changes.names)
        return written

    def _parts(self, sizes: Mapping[int, int]) -> Iterator[list[int]]:
        """Give the numbers of the rows of each statement; `sizes` are their bytes by number."""
        part: list[int] = []
        total = 0
        for number, size in sizes.items():
            if len(part) == self._MAX_ROWS or total > self._max_bytes:
                yield part
                part, total = [], 0
            part.append(number)
            total += size
        if part:
            yield part

    def _statement(self, changes: Changes, *, hide_keys: bool) -> tuple[str, tuple[Any, ...]]:
        keys, parameters = self._keys(changes, hide_keys=hide_keys)
        columns = {f"k{i}": texts for i, texts in enumerate(keys)}
        columns |= {f"o{i}": _hexadecimal(old) for i, old in enumerate(changes.old)}
        columns |= {f"n{i}": _hexadecimal(new) for i, new in enumerate(changes.new)}
        first, *others = zip(*columns.values(), strict=True)
        named = ", ".join(
            f"{self._casts.get(name, value)} AS {name}"
            for value, name in zip(first, columns, strict=True)
        )
        source, rows = f"SELECT {named}", list(map(", ".join, others))
        quoted = [f"t.{self._quote(name)}" for name in changes.names]
        compared = " AND ".join(
            f"SUBSTRING({name}, 1, LENGTH(v.o{i})) = v.o{i}" for i, name in enumerate(quoted)
        )
        assigned = [f"{name} = v.n{i}" for i, name in enumerate(quoted)]
        assigned += [f"{name} = {name}" for name in self._kept]
        # Every part is a literal, a placeholder, or quoted by the dialect.
        if self._rows_first:
            table = f"{self._table} AS t FORCE INDEX (PRIMARY) STRAIGHT_JOIN"
            source += f" UNION ALL VALUES ({'), ('.join(rows)})" if rows else ""
            among = "), (".join(map(", ".join, zip(*keys, strict=True)))
            compared += f" AND ({', '.join(self._key)}) IN (({among}))"
            parameters *= 2  # the keys stand there twice
        else:
            table = f"{self._table} AS t JOIN"
            source = " UNION ALL SELECT ".join([source, *rows])
        joined = " AND ".join(f"{name} = v.k{i}" for i, name in enumerate(self._key))
        changed = f"SET {', '.join(assigned)} WHERE {compared}"
        return f"UPDATE {table} ({source}) AS v ON {joined} {changed}", tuple(parameters)

    def _keys(self, changes: Changes, *, hide_keys: bool) -> tuple[list[list[str]], list[Any]]:
        """Return the keys as they stand in a statement, a list per column, and its parameters."""
        texts: list[list[str]] = []
        parameters: list[list[Any]] = []
        for process, keys in zip(self._processors, changes.keys, strict=True):
            values = keys if process is None else [process(key) for key in keys]
            if hide_keys or set(map(type, values)) != {int}:
                texts.append(["%s"] * len(values))
                parameters.append(values)
            else:
                texts.append([str(value) for value in values])
        return texts, list(itertools.chain.from_iterable(zip(*parameters, strict=True)))


def _hexadecimal(values: Sequence[bytes]) -> list[str]:
    return [f"x'{value.hex()}'" for value in values]
