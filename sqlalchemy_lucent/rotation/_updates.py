"""Write changed values back where the row still holds what was read: one form per database.

Each form was chosen by measurement (``tests/bench/bench_rotation.py``). All of them compare how the
old value began, and return how many values they wrote.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.types import TypeEngine, _Binary

from .._sql import is_mariadb, is_mysql, is_psycopg
from .rows import Rows


@dataclass(slots=True, repr=False)
class Changes:
    """New values for the same columns of some rows, and the first bytes of the old ones.

    There is a list per column, with the rows in the order of their primary keys. ``None`` is NULL.
    These are lists of bytes, not one object per row, which the garbage collector would look into.
    """

    names: tuple[str, ...]
    keys: Sequence[list[Any]]
    old: Sequence[list[bytes | None]]
    new: Sequence[list[Any]]

    def __len__(self) -> int:
        return len(self.old[0])

    def only(self, numbers: Sequence[int]) -> Changes:
        """Return the changes of the rows with these numbers."""
        keys, old, new = (
            [[values[number] for number in numbers] for values in columns]
            for columns in (self.keys, self.old, self.new)
        )
        return Changes(self.names, keys, old, new)


class Writer(Protocol):
    """Writes changes by compare-and-swap; returns how many values were written."""

    def write(self, connection: sa.Connection, changes: Changes) -> int: ...


def writer_for(
    connection: sa.Connection, rows: Rows, types: Mapping[str, TypeEngine[Any]] | None = None
) -> Writer:
    """Return the fastest form that the table allows on this database.

    :param types: the types of columns that are not sealed. Their old values are compared for being
        NULL only, so their rows must be locked.
    """
    dialect = connection.dialect
    if is_mysql(dialect):
        names = {"name": str(rows.clause.name), "schema": rows.clause.schema}
        pinned = connection.scalars(_ON_UPDATE_COLUMNS, names).all()
        can_join = dialect.paramstyle in ("format", "pyformat") and all(
            _compares_alike(type_, dialect) for type_ in rows.key_types
        )
        if can_join and not types:
            packet = connection.scalar(sa.text("SELECT @@max_allowed_packet"))
            primary = {name.lower() for name in connection.scalars(_PRIMARY_KEY, names)}
            by_primary_key = primary == {part.name.lower() for part in rows.primary_key}
            return JoinWriter(
                rows, pinned, packet, rows_first=by_primary_key and is_mariadb(dialect)
            )
        return RowWriter(rows, pinned, types)
    # PostgreSQL has no arrays of arrays of different lengths.
    has_array = any(isinstance(type_, sa.ARRAY) for type_ in rows.key_types)
    if dialect.name == "postgresql" and not types and not has_array:
        return BinaryArrayWriter(rows) if is_psycopg(dialect) else ArrayWriter(rows)
    return RowWriter(rows, types=types)


def check_rights(connection: sa.Connection, rows: Rows, names: Sequence[str]) -> None:
    """Fail now, by an error of the database, if this user may not update these columns.

    It runs EXPLAIN, which fires no trigger and waits for no row lock.
    """
    if connection.dialect.name == "sqlite":
        return
    values: dict[str, ColumnClause[Any]] = {name: sa.column(name) for name in names}
    statement = sa.update(rows.clause).values(values).compile(dialect=connection.dialect)
    connection.exec_driver_sql(f"EXPLAIN {statement}").close()


# MySQL sets such columns at each UPDATE that does not set them, whatever the metadata says. To keep
# their values, an UPDATE sets them to themselves.
_ON_UPDATE_COLUMNS: Final = sa.text(
    "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND extra LIKE '%on update%'"
)


_PRIMARY_KEY: Final = sa.text(
    "SELECT column_name AS name FROM information_schema.statistics WHERE table_name = :name"
    " AND table_schema = coalesce(:schema, database()) AND index_name = 'PRIMARY'"
)


def _compares_alike(type_: TypeEngine[Any], dialect: sa.Dialect) -> bool:
    """Say whether MySQL uses the index to join a column of `type_` with a derived table.

    If the connection has another collation than the column, MySQL fails or reads the whole table.
    The same goes for a column with a smaller character set than the connection, unless all of its
    characters have the same bytes in both.
    """
    implementation = type_.dialect_impl(dialect)
    if isinstance(implementation, sa.String):
        collation = implementation.collation or ""
        return collation.startswith(("utf8mb4_", "ascii_")) and collation.endswith("_bin")
    return isinstance(implementation, (sa.Integer, _Binary))


def _bind(
    types: Iterable[TypeEngine[Any] | None], dialect: sa.Dialect, columns: Iterable[list[Any]]
) -> Iterator[list[Any]]:
    """Give the parameters of each column as SQLAlchemy gives them to the driver."""
    for type_, values in zip(types, columns, strict=True):
        process = type_ and type_.dialect_impl(dialect).bind_processor(dialect)
        yield list(map(process, values)) if process else values


def _sizes(old: Sequence[bytes | None]) -> list[int]:
    """Return how many bytes of each value to compare; 1 for NULL, whose prefix is NULL too."""
    return [1 if prefix is None else len(prefix) for prefix in old]


def _numbered(**lists: Iterable[Any]) -> dict[str, Any]:
    """Name each member of some lists, one per column, by its list and position."""
    return {
        f"lucent_{kind}_{position}": member
        for kind, members in lists.items()
        for position, member in enumerate(members)
    }


class RowWriter:
    """SQLite, MySQL and MariaDB, and columns that are not sealed: one UPDATE a row, in one call.

    The parameters go to the driver as they are. SQLAlchemy would make a dict of each row, and one
    more object of each value.
    """

    def __init__(
        self,
        rows: Rows,
        pinned: Sequence[str] = (),
        types: Mapping[str, TypeEngine[Any]] | None = None,
    ) -> None:
        self._rows = rows
        self._types = types or {}
        self._pinned: dict[str, ColumnClause[Any]] = {name: sa.column(name) for name in pinned}
        for own in self._pinned.values():
            if own.name not in rows.clause.c:
                rows.clause.append_column(own)
        self._statements: dict[tuple[str, ...], tuple[str, Sequence[str] | None]] = {}

    def write(self, connection: sa.Connection, changes: Changes) -> int:
        dialect, names = self._rows.dialect, changes.names
        if names not in self._statements:
            compiled: Any = self._statement(names).compile(dialect=dialect)
            self._statements[names] = str(compiled), compiled.positiontup
        statement, order = self._statements[names]
        named = _numbered(
            key=_bind(self._rows.key_types, dialect, changes.keys),
            old=changes.old,
            size=map(_sizes, changes.old),
            new=_bind(map(self._types.get, names), dialect, changes.new),
        )
        rows: list[Any] = list(zip(*(named[name] for name in order or named), strict=True))
        if order is None:  # the driver takes parameters by name
            rows = [dict(zip(named, row, strict=True)) for row in rows]
        written = connection.exec_driver_sql(statement, rows).rowcount
        # Some drivers do not count; there the rows are locked, so none can have been missed.
        return (written if written >= 0 else len(rows)) * len(names)

    def _statement(self, names: tuple[str, ...]) -> sa.Update:
        rows = self._rows
        parts = zip(rows.primary_key, rows.key_types, strict=True)
        statement = sa.update(rows.clause).where(
            *(
                part == sa.bindparam(f"lucent_key_{position}", type_=type_)
                for position, (part, type_) in enumerate(parts)
            )
        )
        for position, name in enumerate(names):
            type_ = self._types.get(name)
            old = sa.bindparam(f"lucent_old_{position}", type_=sa.LargeBinary)
            size = sa.bindparam(f"lucent_size_{position}", type_=sa.Integer)
            new = sa.bindparam(f"lucent_new_{position}", type_=type_ or sa.LargeBinary())
            statement = statement.where(
                _begins_with(rows.clause.c[name], size, old)
                if type_ is None
                else sa.or_(
                    sa.cast(old, sa.LargeBinary).is_not(None), rows.clause.c[name].is_(None)
                )
            ).values({name: new})
        return statement.values(self._pinned) if self._pinned else statement


def _begins_with(
    value: sa.ColumnElement[Any], size: sa.ColumnElement[Any], old: sa.ColumnElement[Any]
) -> sa.ColumnElement[bool]:
    prefix = sa.func.substr(value, sa.literal_column("1"), size, type_=sa.LargeBinary)
    return prefix.is_not_distinct_from(old)


class ArrayWriter:
    """PostgreSQL: one ``UPDATE … FROM unnest(…)`` with an array for each column."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._statements: dict[tuple[str, ...], sa.Update] = {}

    def write(self, connection: sa.Connection, changes: Changes) -> int:
        names, keys = changes.names, changes.keys
        if names not in self._statements:
            self._statements[names] = self._statement(names)
        ends = {"first": [values[0] for values in keys], "last": [values[-1] for values in keys]}
        parameters = _numbered(key=keys, old=changes.old, new=changes.new, **ends)
        return self._execute(connection, self._statements[names], parameters) * len(names)

    def _execute(
        self, connection: sa.Connection, statement: sa.Update, parameters: dict[str, Any]
    ) -> int:
        return connection.execute(statement, parameters).rowcount

    def _statement(self, names: tuple[str, ...]) -> sa.Update:
        clause = self._rows.clause
        of_values = [sa.LargeBinary()] * len(names)
        types = _numbered(key=self._rows.key_types, old=of_values, new=of_values)
        arrays = (sa.bindparam(name, type_=sa.ARRAY(type_)) for name, type_ in types.items())
        renewed = (
            sa.func.unnest(*arrays)
            .table_valued(
                *(sa.column(name, type_) for name, type_ in types.items()), name="renewed"
            )
            .render_derived()
        )
        statement = sa.update(clause).where(
            *(
                part == renewed.c[f"lucent_key_{position}"]
                for position, part in enumerate(self._rows.primary_key)
            ),
            *self._range(),
        )
        for position, name in enumerate(names):
            old = renewed.c[f"lucent_old_{position}"]
            size = sa.func.coalesce(sa.func.octet_length(old), sa.literal_column("1"))
            statement = statement.where(_begins_with(clause.c[name], size, old)).values(
                {name: renewed.c[f"lucent_new_{position}"]}
            )
        return statement

    def _range(self) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
        # Without it, PostgreSQL may read the whole table to hash it, for each batch.
        primary_key = self._rows.primary_key
        first, last = (
            sa.tuple_(
                *(
                    sa.bindparam(f"lucent_{end}_{position}", type_=type_)
                    for position, type_ in enumerate(self._rows.key_types)
                )
            )
            for end in ("first", "last")
        )
        return sa.tuple_(*primary_key) >= first, sa.tuple_(*primary_key) <= last


class BinaryArrayWriter(ArrayWriter):
    """The same for psycopg, which would send bytes in a list as hexadecimal text.

    SQLAlchemy has no option for binary parameters, so the driver gets the compiled statement. That
    writes large values three times as fast.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        dialect = rows.dialect
        self._processors: dict[str, Callable[[Any], Any] | None] = {}
        for position, key in enumerate(rows.primary_key):
            of_array = sa.ARRAY(key.type).dialect_impl(dialect).bind_processor(dialect)
            of_key = key.type.dialect_impl(dialect)
            # psycopg takes three times as long to write an array of integers.
            is_integer = isinstance(of_key, sa.Integer)
            self._processors[f"lucent_key_{position}"] = _array_literal if is_integer else of_array
            for end in ("first", "last"):
                self._processors[f"lucent_{end}_{position}"] = of_key.bind_processor(dialect)
        self._texts: dict[sa.Update, str] = {}

    def _execute(
        self, connection: sa.Connection, statement: sa.Update, parameters: dict[str, Any]
    ) -> int:
        text = self._texts.get(statement)
        if text is None:
            # The type of a key may be in a schema of its own.
            schemas = connection.get_execution_options().get("schema_translate_map")
            compiled = statement.compile(
                dialect=self._rows.dialect,
                schema_translate_map=schemas,
                render_schema_translate=bool(schemas),
            )
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

    It is written as text, because compiling a thousand SELECTs costs SQLAlchemy more than running
    them costs the database. The text holds the sealed values, because the drivers escape bytes in
    Python, which takes longer than sending and reading twice the bytes. It also holds integer keys,
    unless the engine hides parameters; other keys may say more of the row than a log should.

    :param rows_first: have MariaDB look up the rows by primary key and change each as it finds it,
        1.3 times as fast (small values): by itself, it writes the changes to a temporary table.
    """

    _MAX_ROWS: Final = 500
    """Rows of a statement. MariaDB turns a list of 1,000 keys into a subquery
    (``in_predicate_conversion_threshold``)."""

    _MAX_BYTES: Final = 1 << 20
    """Bytes of the values of a statement, roughly; as text they take twice as many."""

    _MAX_LENGTH: Final = 32_768
    """Bytes of a value. MariaDB (10.11) silently truncates one of 65,536 or more in a derived table
    to its length modulo 65,536. Longer values have an UPDATE of their own."""

    def __init__(
        self, rows: Rows, pinned: Sequence[str], max_allowed_packet: int, *, rows_first: bool
    ) -> None:
        self._max_bytes = min(self._MAX_BYTES, max_allowed_packet // 4)
        self._rows = rows
        self._rows_first = rows_first
        preparer = rows.dialect.identifier_preparer
        self._quote = preparer.quote
        # No alias: a table that is locked (LOCK TABLES) may be used by its own name only.
        self._table = preparer.format_table(rows.clause)
        self._pinned = [self._column(name) for name in pinned]
        # The first row gives each column its type; some versions of the driver send bytes as text
        # of the connection's character set.
        self._casts = {
            f"lucent_key_{i}": "CAST(%s AS BINARY)"
            for i, type_ in enumerate(rows.key_types)
            if isinstance(type_.dialect_impl(rows.dialect), _Binary)
        }
        self._of_long_values = RowWriter(rows, pinned)

    def write(self, connection: sa.Connection, changes: Changes) -> int:
        long, short = [], {}
        for number, new in enumerate(zip(*changes.new, strict=True)):
            sizes = [len(value or b"") for value in new]
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
        """Give the row numbers of each statement; `sizes` has their bytes by number."""
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
        old, new = map(_literals, changes.old), map(_literals, changes.new)
        columns = _numbered(key=keys, old=old, new=new)
        first, *others = zip(*columns.values(), strict=True)
        named = ", ".join(
            f"{self._casts.get(name, value)} AS {name}"
            for value, name in zip(first, columns, strict=True)
        )
        source, rows = f"SELECT {named}", list(map(", ".join, others))
        values = [self._column(name) for name in changes.names]
        compared = " AND ".join(
            f"SUBSTRING({value}, 1, COALESCE(LENGTH({old}), 1)) <=> {old}"
            for value, old in ((v, f"lucent_changes.lucent_old_{i}") for i, v in enumerate(values))
        )
        assigned = [f"{value} = lucent_changes.lucent_new_{i}" for i, value in enumerate(values)]
        assigned += [f"{own} = {own}" for own in self._pinned]
        joined = " AND ".join(
            f"{self._column(part.name)} = lucent_changes.lucent_key_{i}"
            for i, part in enumerate(self._rows.primary_key)
        )
        # Every part is a literal, a placeholder, or quoted by the dialect. The order of the join is
        # given: a scan of the table would wait for rows that others have locked.
        if self._rows_first:
            source += f" UNION ALL VALUES ({'), ('.join(rows)})" if rows else ""
            key = ", ".join(self._column(part.name) for part in self._rows.primary_key)
            among = "), (".join(map(", ".join, zip(*keys, strict=True)))
            compared += f" AND ({key}) IN (({among}))"
            parameters *= 2  # for the keys in `among`
            tables = (
                f"{self._table} FORCE INDEX (PRIMARY) STRAIGHT_JOIN ({source}) AS lucent_changes"
            )
        else:
            source = " UNION ALL SELECT ".join([source, *rows])
            tables = f"({source}) AS lucent_changes STRAIGHT_JOIN {self._table}"
        statement = f"UPDATE {tables} ON {joined}"
        return f"{statement} SET {', '.join(assigned)} WHERE {compared}", tuple(parameters)

    def _column(self, name: str) -> str:
        return f"{self._table}.{self._quote(name)}"

    def _keys(self, changes: Changes, *, hide_keys: bool) -> tuple[list[list[str]], list[Any]]:
        """Return the keys as they stand in a statement, a list per column, and its parameters."""
        texts: list[list[str]] = []
        parameters: list[list[Any]] = []
        for values in _bind(self._rows.key_types, self._rows.dialect, changes.keys):
            if hide_keys or set(map(type, values)) != {int}:
                texts.append(["%s"] * len(values))
                parameters.append(values)
            else:
                texts.append([str(value) for value in values])
        return texts, list(itertools.chain.from_iterable(zip(*parameters, strict=True)))


def _literals(values: Sequence[bytes | None]) -> list[str]:
    return ["NULL" if value is None else f"x'{value.hex()}'" for value in values]
