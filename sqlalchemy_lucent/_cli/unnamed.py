"""Search the whole database for sealed values that no model names.

Most are copies: rows that a trigger keeps, a detached partition, a column that left the model. No
rotation finds them, and they still need the key when it is retired.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from .. import _key_tables
from .._database.reflection import translated
from .._database.relations import relation_of
from .._database.visibility import require_full_visibility
from .._envelope import FORMAT_AES_256_GCM, MAX_VERSION_LENGTH
from .._sql import is_mysql, key_version
from ..exceptions import RotationError
from ..rotation.targets import TargetTable


class Unnamed(NamedTuple):
    """A column with sealed values that is not a target, or a table that could not be read."""

    name: str
    versions: dict[str, int]
    """How many values there are under each key version."""
    unread: str | None = None
    """Why its table could not be read."""


class _Column(NamedTuple):
    schema: str
    table: str
    name: str
    is_text: bool
    """Whether it can hold sealed bytes only as PostgreSQL writes bytes in text."""


def unnamed_values(engine: sa.Engine, targets: list[TargetTable]) -> Iterator[Unnamed]:
    """Count the sealed values of every binary and text column that is not a target, in SQL.

    Reads each table once, and once more if it has some. Partitions are read through their parent.
    """
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        fold = str if engine.dialect.name == "postgresql" else str.lower
        named = set()
        for target in targets:
            found = relation_of(connection, target.clause.name, target.clause.schema)
            if found is not None:
                named |= {(found.schema, found.name, fold(c.name)) for c in target.columns}
        by_table: dict[tuple[str, str], list[_Column]] = {}
        canaries = relation_of(connection, _key_tables.keys.name, translated(connection, None))
        if canaries is not None:
            named.add((canaries.schema, canaries.name, _key_tables.keys.c.canary.name))
        for each in _columns(connection):
            if (each.schema, each.table, fold(each.name)) not in named:
                by_table.setdefault((each.schema, each.table), []).append(each)
        for (schema, name), columns in sorted(by_table.items()):
            try:
                require_full_visibility(connection, name, schema)
                yield from _in_table(connection, columns)
            except (DBAPIError, RotationError) as error:
                if isinstance(error, DBAPIError) and error.connection_invalidated:
                    raise
                yield Unnamed(f"{schema}.{name}", {}, type(error).__name__)


def _in_table(connection: sa.Connection, columns: list[_Column]) -> Iterator[Unnamed]:
    schema, name = columns[0].schema, columns[0].table
    owner = sa.table(name, *(sa.column(each.name) for each in columns), schema=schema)
    versions = [_version(connection, owner.c[each.name], each) for each in columns]
    counts = connection.execute(sa.select(*map(sa.func.count, versions)).select_from(owner)).one()
    for each, version, count in zip(columns, versions, counts, strict=True):
        if not count:
            continue
        under = sa.select(version.label("version")).select_from(owner).subquery().c.version
        counting = sa.select(under, sa.func.count()).where(under.is_not(None)).group_by(under)
        rows = connection.execute(counting.order_by(under)).all()
        found = {bytes.fromhex(v).decode() if each.is_text else str(v): n for v, n in rows}
        yield Unnamed(f"{schema}.{name}.{each.name}", found)


def _version(
    connection: sa.Connection, value: sa.ColumnElement[Any], each: _Column
) -> sa.ColumnElement[Any]:
    if each.is_text:
        return sa.func.substring(sa.cast(value, sa.Text), _IN_TEXT)
    if connection.dialect.name == "postgresql":
        return key_version(value)
    return key_version(sa.cast(value, sa.LargeBinary))


# In hexadecimal: the characters of a version, ":", the format, and the shortest value's rest.
_IN_TEXT: Final = (
    r"\\x((?:2[de]|3[0-9]|4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9a])"
    rf"{{1,{MAX_VERSION_LENGTH}}})3a{FORMAT_AES_256_GCM:02x}[0-9a-f]{{66}}"
)

# Inherited columns are left out: their rows are read through the parent.
_POSTGRESQL: Final = sa.text("""
SELECT namespace.nspname, class.relname, attribute.attname,
    type.typsend <> CAST('byteasend' AS regproc)
FROM pg_attribute AS attribute
JOIN pg_class AS class ON class.oid = attribute.attrelid
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
JOIN pg_type AS type ON type.oid = attribute.atttypid
WHERE class.relkind IN ('r', 'p', 'm') AND class.relpersistence <> 't'
AND attribute.attnum > 0 AND NOT attribute.attisdropped AND attribute.attinhcount = 0
AND namespace.nspname <> 'information_schema' AND namespace.nspname NOT LIKE 'pg\\_%'
AND (type.typsend = CAST('byteasend' AS regproc)
    OR type.typcategory IN ('S', 'A', 'C') OR type.typname IN ('json', 'jsonb', 'hstore', 'xml'))
ORDER BY attribute.attnum
""")

_MYSQL: Final = sa.text("""
SELECT c.table_schema, c.table_name, c.column_name, 0
FROM information_schema.columns AS c JOIN information_schema.tables AS t
ON t.table_schema = c.table_schema AND t.table_name = c.table_name
WHERE c.table_schema = database() AND t.table_type NOT IN ('VIEW', 'SYSTEM VIEW', 'SEQUENCE')
AND (c.data_type LIKE '%blob' OR c.data_type LIKE '%text' OR c.data_type LIKE '%binary'
    OR c.data_type LIKE '%char' OR c.data_type = 'json')
ORDER BY c.ordinal_position
""")


def _columns(connection: sa.Connection) -> list[_Column]:
    """Return every column that may hold sealed values."""
    if connection.dialect.name == "postgresql":
        return [_Column(*row) for row in connection.execute(_POSTGRESQL)]
    if is_mysql(connection.dialect):
        return [_Column(*row) for row in connection.execute(_MYSQL)]
    inspector = sa.inspect(connection)
    return [
        _Column(schema, name, each["name"], is_text=False)  # SQLite: any column may hold any value
        for schema in inspector.get_schema_names()
        for name in inspector.get_table_names(schema)
        for each in inspector.get_columns(name, schema)
    ]
