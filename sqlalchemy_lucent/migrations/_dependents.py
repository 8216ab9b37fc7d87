"""What depends on a column: constraints, indexes, generated columns, views, triggers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from sqlalchemy import Connection, TextClause, inspect, text

from .._database.relations import regclass
from .._sql import is_mariadb


def dependents(
    connection: Connection,
    table_name: str,
    schema: str | None,
    column_name: str,
    *,
    ours: str | None,
) -> list[str]:
    """Return what depends on a column, each by kind and name.

    Function bodies are searched for triggers of the table only.

    :param ours: the name of the column's own CHECK constraint, which is left out.
    """
    dialect = connection.dialect.name
    names = {"table": table_name, "schema": schema, "column": column_name, "ours": ours}
    others = {"postgresql": _on_postgresql, "sqlite": _on_sqlite}.get(dialect, _on_mysql)
    constraints = _constraints(connection, table_name, schema, column_name)
    return list(dict.fromkeys([*constraints, *others(connection, names)]))


def _constraints(
    connection: Connection, table: str, schema: str | None, column: str
) -> Iterator[str]:
    inspector = inspect(connection)
    for kind, names, found in (
        ("foreign key", "constrained_columns", inspector.get_foreign_keys(table, schema)),
        ("unique constraint", "column_names", inspector.get_unique_constraints(table, schema)),
        ("index", "column_names", inspector.get_indexes(table, schema)),
    ):
        for each in found:
            if column in each[names]:  # type: ignore[literal-required]
                yield f"{kind} {each['name'] or 'without a name'}"


# Constraints and indexes, also of expressions, conditions and INCLUDE; generated columns; views,
# rules, policies, triggers, publications, statistics. Not the column's own default, nor PostgreSQL
# 18's NOT NULL. Dropping a parent's column drops it in the tables that inherit it.
_DEPENDS_ON_COLUMN: Final = text("""
WITH RECURSIVE family (relation) AS (
    SELECT CAST(to_regclass(:relation) AS oid)
    UNION SELECT inhrelid FROM pg_inherits JOIN family ON inhparent = relation
)
SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid) FROM family
JOIN pg_depend AS d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = relation
JOIN pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
LEFT JOIN pg_attrdef AS f ON d.classid = 'pg_attrdef'::regclass AND f.oid = d.objid
LEFT JOIN pg_constraint AS c ON d.classid = 'pg_constraint'::regclass AND c.oid = d.objid
WHERE a.attname = CAST(:column AS name)
AND f.adnum IS DISTINCT FROM a.attnum AND c.contype IS DISTINCT FROM 'n'
AND (c.conname IS NULL OR c.conname IS DISTINCT FROM CAST(:ours AS name))
ORDER BY 1
""")

_TRIGGER_FUNCTIONS: Final = text("""
SELECT t.tgname, p.prosrc, encode(t.tgargs, 'escape') FROM pg_trigger AS t
JOIN pg_proc AS p ON p.oid = t.tgfoid
WHERE NOT t.tgisinternal AND t.tgrelid = to_regclass(:relation)
""")


def _on_postgresql(connection: Connection, names: Mapping[str, Any]) -> Iterator[str]:
    names = {**names, "relation": regclass(connection, names["table"], names["schema"])}
    yield from connection.scalars(_DEPENDS_ON_COLUMN, names)
    for trigger, body, arguments in connection.execute(_TRIGGER_FUNCTIONS, names):
        # Its arguments may name columns. A NUL ends each argument.
        words = arguments.replace("\\000", " ")
        if names["column"].lower() in _tokens(f"{body} {words}"):
            yield f"trigger {trigger}"


_MYSQL_COLUMNS: Final = text(
    "SELECT column_name AS name, generation_expression AS generation, CASE WHEN :is_mariadb"
    " OR extra LIKE '%DEFAULT_GENERATED%' THEN column_default END AS expression"
    " FROM information_schema.columns"
    " WHERE table_schema = coalesce(:schema, database()) AND table_name = :table"
)
_MARIADB_CHECKS: Final = text(
    "SELECT constraint_name AS name, check_clause AS clause, level = 'Column' AS of_column"
    " FROM information_schema.check_constraints"
    " WHERE constraint_schema = coalesce(:schema, database()) AND table_name = :table"
)
_MYSQL_CHECKS: Final = text(
    "SELECT c.constraint_name AS name, c.check_clause AS clause, 0 AS of_column"
    " FROM information_schema.check_constraints AS c"
    " JOIN information_schema.table_constraints AS t"
    " ON t.constraint_schema = c.constraint_schema AND t.constraint_name = c.constraint_name"
    " WHERE t.table_schema = coalesce(:schema, database()) AND t.table_name = :table"
)
_MYSQL_INDEXES: Final = text(
    "SELECT index_name AS name, expression AS clause FROM information_schema.statistics"
    " WHERE table_schema = coalesce(:schema, database()) AND table_name = :table"
    " AND expression IS NOT NULL"
)
_MYSQL_VIEWS: Final = text(
    "SELECT table_name AS name, view_definition AS clause FROM information_schema.views"
    " WHERE locate(:table, view_definition) > 0 AND locate(:column, view_definition) > 0"
)
_MYSQL_TRIGGERS: Final = text(
    "SELECT trigger_name AS name, action_statement AS clause, event_object_table = :table"
    " AND event_object_schema = coalesce(:schema, database()) AS is_own"
    " FROM information_schema.triggers WHERE locate(:column, action_statement) > 0"
)


def _on_mysql(connection: Connection, names: Mapping[str, Any]) -> Iterator[str]:
    on_mariadb = is_mariadb(connection.dialect)
    table, column = names["table"].lower(), names["column"].lower()

    def rows(statement: TextClause) -> Sequence[Any]:
        return connection.execute(statement, {"is_mariadb": on_mariadb, **names}).all()

    for name, generation, default in rows(_MYSQL_COLUMNS):
        if name.lower() == column:
            continue
        if column in _tokens(generation, escapes=True):
            yield f"generated column {name}"
        if column in _tokens(default, escapes=True):
            yield f"default of column {name}"
    for name, clause, of_column in rows(_MARIADB_CHECKS if on_mariadb else _MYSQL_CHECKS):
        found = _tokens(f"CHECK ({clause})", escapes=True)
        # MariaDB's JSON type is text with such a check, dropped with the column.
        is_dropped_with_it = name == names["ours"] or (of_column and _says_json(found, column))
        if column in found and not is_dropped_with_it:
            yield f"check constraint {name}"
    for name, clause in () if on_mariadb else rows(_MYSQL_INDEXES):
        if column in _tokens(clause, escapes=True):
            yield f"index {name}"
    for name, clause in rows(_MYSQL_VIEWS):
        if {table, column} <= {*_tokens(clause, escapes=True)}:
            yield f"view {name}"
    for name, clause, is_own in rows(_MYSQL_TRIGGERS):
        found = _tokens(clause, escapes=True)
        if column in found and (is_own or table in found):
            yield f"trigger {name}"


def _on_sqlite(connection: Connection, names: Mapping[str, Any]) -> Iterator[str]:
    table, column = names["table"].lower(), names["column"].lower()
    schema = connection.dialect.identifier_preparer.quote(names["schema"] or "main")
    for master in (f"{schema}.sqlite_master", "sqlite_temp_master"):
        everything = text(f"SELECT type, name, tbl_name, sql FROM {master} WHERE sql IS NOT NULL")  # noqa: S608
        for kind, name, owner, sql in connection.execute(everything).all():
            found = _tokens(sql, brackets=True)
            is_own = owner.lower() == table
            if kind == "table" and is_own:
                yield from _in_create_table(found, column, (names["ours"] or "").lower())
            elif kind == "table":  # full-text search names the table in a string
                words = {*re.findall(r"\w+", sql.lower())}
                if found[1] == "virtual" and {table, column} <= words:
                    yield f"virtual table {name}"
            elif table in found and (column in found or (kind != "index" and _has_star(found))):
                yield f"{kind} {name}"


def _in_create_table(created: list[str], column: str, ours: str) -> Iterator[str]:
    """Give what depends on `column` in the CREATE TABLE of its table."""
    for first, *others in _parts(created):
        if first == column:
            is_ours = ours in others and others.count("check") == 1
            if column in others and not is_ours and not _says_json(others, column):
                yield f"check constraint of {column}"
        elif first == "check" and column in others:
            yield "check constraint without a name"
        elif first == "constraint" and "check" in others and column in others:
            if others[0] != ours:
                yield f"check constraint {others[0]}"
        elif first not in _KEY_WORDS and column in others:
            yield f"generated column {first}"


_KEY_WORDS: Final = frozenset({"constraint", "primary", "unique", "foreign"})
"""The first words of constraints in a CREATE TABLE, which reflection shows."""


def _parts(created: list[str]) -> Iterator[list[str]]:
    """Give the columns and constraints of a CREATE TABLE."""
    part: list[str] = []
    depth = 0
    for token in created:
        depth -= token == ")"  # noqa: S105
        if depth == 0 or (token == "," and depth == 1):  # noqa: S105
            if part:
                yield part
            part = []
        else:
            part.append(token)
        depth += token == "("  # noqa: S105


def _has_star(tokens: list[str]) -> bool:
    """Say whether a star selects every column; those of products and ``count(*)`` do not."""
    ahead = {one for one, other in pairwise(tokens) if other == "*"}
    return not ahead.isdisjoint({"select", "distinct", "all", ",", "."})


def _says_json(tokens: list[str], column: str) -> bool:
    """Say whether the only use of `column` is a check that it is JSON."""
    said = f"check ( json_valid ( {column} ) )" in " ".join(tokens)
    return said and tokens.count(column) == 1


_COMMENT: Final = r"--[^\n]*|/\*.*?\*/"
_QUOTED: Final = r"\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`"
_WORD: Final = r"[\w$]+|[^\w\s]"


def _tokens(sql: str | None, *, escapes: bool = False, brackets: bool = False) -> list[str]:
    """Return the names and signs in `sql` in lower case, without strings and comments.

    :param escapes: a backslash escapes a quote in a string.
    :param brackets: brackets may quote a name.
    """
    string = r"'(?:[^'\\]|\\.|'')*'" if escapes else r"'(?:[^']|'')*'"
    quoted = rf"{_QUOTED}|\[[^\]]*\]" if brackets else _QUOTED
    found = re.findall(rf"{_COMMENT}|{string}|({quoted})|({_WORD})", sql or "", re.DOTALL)
    return [
        (name[1:-1].replace(name[-1] * 2, name[-1]) if name else sign).lower()
        for name, sign in found
        if name or sign
    ]
