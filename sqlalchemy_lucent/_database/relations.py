"""What a name means in the database: a table, or a view and the tables beneath it.

Only tables are rotated. An update of a view may change another table or nothing, and the view's
``WHERE`` may hide rows that need a key.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, inspect, text
from sqlalchemy.types import NullType, TypeEngine, _Binary

from .._sql import is_mysql
from ..exceptions import RotationError


class Relation(NamedTuple):
    """What a name means, and the schema that it is in."""

    kind: str
    schema: str
    name: str

    @property
    def is_table(self) -> bool:
        """Whether its rows are stored under this name and nowhere else."""
        return self.kind == "table"


def relation_of(connection: Connection, name: str, schema: str | None) -> Relation | None:
    """Return what `name` means on this connection; ``None`` if it means nothing.

    :raises RotationError: it is a temporary table, which may hide the one that others see.
    """
    if is_mysql(connection.dialect):
        return _on_mysql(connection, name, schema)
    if connection.dialect.name == "sqlite":
        return _on_sqlite(connection, name, schema)
    return _on_postgresql(connection, name, schema)


def tables_beneath(connection: Connection, relation: Relation) -> set[tuple[str, str]] | None:
    """Return schema and name of each table that a view reads, directly or through other views.

    ``None`` if that is unknown, because its rows are stored elsewhere or come from a function.
    """
    if relation.kind != "view":
        return None
    if is_mysql(connection.dialect):
        return _beneath_on_mysql(connection, relation) or None
    if connection.dialect.name == "sqlite":
        return _beneath_on_sqlite(connection, relation) or None
    return _beneath_on_postgresql(connection, relation) or None


def binary_columns(connection: Connection, schema: str, name: str) -> set[str]:
    """Return the columns of a table that may hold sealed values."""
    columns = inspect(connection).get_columns(name, schema=schema)
    return {column["name"] for column in columns if is_binary(column["type"])}


def is_binary(type_: TypeEngine[Any]) -> bool:
    """Say whether a reflected type holds bytes, or is one that SQLAlchemy does not know."""
    return isinstance(getattr(type_, "data_type", type_), (_Binary, NullType))  # of a domain


def qualified(connection: Connection, name: str, schema: str | None) -> str:
    """Return the name as it is written in statements, with or without quotes."""
    quote = connection.dialect.identifier_preparer.quote
    return ".".join(quote(part) for part in (schema, name) if part is not None)


def _refuse_temporary(name: str) -> RotationError:
    return RotationError(
        f"{name} is a temporary table of this connection, which hides a table of that name from "
        "it. Drop it, or pass a connection that has none"
    )


# -- PostgreSQL ------------------------------------------------------------------------------------

_POSTGRESQL_RELATION: Final = text("""
SELECT CAST(class.relkind AS text), namespace.nspname, class.relname, class.relpersistence = 't'
FROM pg_class AS class JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.oid = to_regclass(:name)
""")

_POSTGRESQL_KINDS: Final = {
    "r": "table",
    "p": "table",  # its partitions are read and written through it
    "v": "view",
    "m": "materialized view",
    "f": "foreign table",
}

# A function may read any table. The server's own functions have no entry in pg_depend.
_POSTGRESQL_BENEATH: Final = text("""
WITH RECURSIVE beneath (relation) AS (
    SELECT CAST(to_regclass(:name) AS oid)
    UNION
    SELECT depends.refobjid FROM beneath
    JOIN pg_rewrite AS rule ON rule.ev_class = beneath.relation
    JOIN pg_depend AS depends ON depends.objid = rule.oid
    WHERE depends.classid = CAST('pg_rewrite' AS regclass)
    AND depends.refclassid = CAST('pg_class' AS regclass)
)
SELECT CAST(class.relkind AS text), namespace.nspname, class.relname, EXISTS (
    SELECT FROM pg_rewrite AS rule JOIN pg_depend AS depends ON depends.objid = rule.oid
    WHERE rule.ev_class = class.oid
    AND depends.classid = CAST('pg_rewrite' AS regclass)
    AND depends.refclassid = CAST('pg_proc' AS regclass)
)
FROM beneath JOIN pg_class AS class ON class.oid = beneath.relation
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
""")


def regclass(connection: Connection, name: str, schema: str | None) -> str:
    """Return the name as a parameter for ``to_regclass()``."""
    name = qualified(connection, name, schema)
    # In a statement, a percent sign would begin a parameter.
    doubles = connection.dialect.identifier_preparer._double_percents
    return name.replace("%%", "%") if doubles else name


def _on_postgresql(connection: Connection, name: str, schema: str | None) -> Relation | None:
    names = {"name": regclass(connection, name, schema)}
    row = connection.execute(_POSTGRESQL_RELATION, names).first()
    if row is None:
        return None
    kind, found_in, found, is_temporary = row
    if is_temporary:
        raise _refuse_temporary(name)
    return Relation(_POSTGRESQL_KINDS.get(kind, "no table"), found_in, found)


def _beneath_on_postgresql(
    connection: Connection, relation: Relation
) -> set[tuple[str, str]] | None:
    names = {"name": regclass(connection, relation.name, relation.schema)}
    tables = set()
    for kind, schema, name, calls_a_function in connection.execute(_POSTGRESQL_BENEATH, names):
        if calls_a_function or kind not in ("r", "p", "v"):
            return None
        if kind != "v":
            tables.add((schema, name))
    return tables


# -- MySQL and MariaDB -----------------------------------------------------------------------------

_MYSQL_RELATION: Final = text("""
SELECT table_type, table_schema, table_name, engine FROM information_schema.tables
WHERE table_schema = coalesce(:schema, database()) AND table_name = :name
""")
_MYSQL_VIEW: Final = text("""
SELECT view_definition FROM information_schema.views
WHERE table_schema = :schema AND table_name = :name
""")
_ELSEWHERE: Final = frozenset({"FEDERATED", "CONNECT", "SPIDER", "MRG_MYISAM"})
"""Storage engines whose tables show what is stored in others."""

_QUOTED: Final = r"`((?:[^`]|``)+)`"
_PAIR: Final = re.compile(rf"{_QUOTED}\.{_QUOTED}(\()?")  # a parenthesis: a function that is called
_ALIAS: Final = re.compile(rf"[`)] {_QUOTED}(?!\.)")


def _on_mysql(connection: Connection, name: str, schema: str | None) -> Relation | None:
    rows = connection.execute(_MYSQL_RELATION, {"name": name, "schema": schema}).all()
    # Where names are compared without case, prefer the exact one.
    rows = sorted(rows, key=lambda row: row[2] != name)
    if not rows:
        return None
    type_, found_in, found, engine = rows[0]
    if type_.endswith("VIEW"):
        return Relation("view", found_in, found)
    # Not all releases list temporary tables.
    made = connection.exec_driver_sql(f"SHOW CREATE TABLE {qualified(connection, name, schema)}")
    if made.one()[1].startswith("CREATE TEMPORARY"):
        raise _refuse_temporary(name)
    is_elsewhere = str(engine).upper() in _ELSEWHERE
    return Relation("foreign table" if is_elsewhere else "table", found_in, found)


def _beneath_on_mysql(connection: Connection, relation: Relation) -> set[tuple[str, str]] | None:
    definition = connection.scalar(_MYSQL_VIEW, {"schema": relation.schema, "name": relation.name})
    if not definition:  # not shown to this user
        return None
    # The server writes every table as `schema`.`table`. Some of the pairs are columns, and one that
    # is named like a table is taken for it: the result may have too many tables, never too few.
    pairs = set(_PAIR.findall(definition))
    found = {pair: _on_mysql(connection, _plain(pair[1]), _plain(pair[0])) for pair in pairs}
    known = {*_ALIAS.findall(definition), *(name for (_, name, _), it in found.items() if it)}
    tables: set[tuple[str, str]] = set()
    for (owner, _, is_called), it in found.items():
        if it is None:
            if is_called or owner not in known:  # a function, or hidden from this user
                return None
        elif it.is_table:
            tables.add((it.schema, it.name))
        elif it != relation:
            beneath = tables_beneath(connection, it)
            if beneath is None:
                return None
            tables |= beneath
    return tables


def _plain(quoted: str) -> str:
    return quoted.replace("``", "`")


# -- SQLite ----------------------------------------------------------------------------------------


def _on_sqlite(connection: Connection, name: str, schema: str | None) -> Relation | None:
    attached = [row[1] for row in connection.exec_driver_sql("PRAGMA database_list")]
    # The order in which SQLite itself looks for a name.
    places = sorted({"temp", *attached}, key=lambda place: (place != "temp", place != "main"))
    for place in places:
        if schema is not None and place.lower() != schema.lower():
            continue
        catalog = qualified(connection, "sqlite_master", place)
        row = connection.execute(
            text(
                f"SELECT type, name, sql FROM {catalog} "  # noqa: S608  (quoted)
                "WHERE type IN ('table', 'view') AND lower(name) = lower(:name)"
            ),
            {"name": name},
        ).first()
        if row is None:
            continue
        if place == "temp":
            raise _refuse_temporary(name)
        kind, found, made = row
        if made.upper().startswith("CREATE VIRTUAL"):
            kind = "foreign table"
        return Relation(kind, place, found)
    return None


def _beneath_on_sqlite(connection: Connection, relation: Relation) -> set[tuple[str, str]] | None:
    quote = connection.dialect.identifier_preparer.quote_identifier
    places = {row[0]: row[1] for row in connection.exec_driver_sql("PRAGMA database_list")}
    owners = {
        (number, root): (place, owner)
        for number, place in places.items()
        for root, owner in connection.exec_driver_sql(
            f"SELECT rootpage, tbl_name FROM {quote(place)}.sqlite_master"  # noqa: S608  (quoted)
        )
    }
    tables = set()
    # SQLite has no catalog for this. The view's program says which B-trees it opens, of tables or
    # indexes.
    view = f"{quote(relation.schema)}.{quote(relation.name)}"
    for _, opcode, _, root, number, *_ in connection.exec_driver_sql(
        f"EXPLAIN SELECT * FROM {view}"  # noqa: S608  (quoted)
    ):
        if opcode == "VOpen":
            return None
        if opcode in ("OpenRead", "ReopenIdx"):
            if (number, root) not in owners:
                return None
            tables.add(owners[number, root])
    return tables
