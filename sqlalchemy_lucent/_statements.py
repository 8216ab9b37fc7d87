"""Statements that would put something unsealed into a sealed column: refused before they run.

SQLAlchemy asks a column's type about parameters only, not about SQL expressions, and about the
first member of a UNION only. So a listener on each dialect that has met a sealed column looks at
every statement before it is executed. Defaults that the database would compute are refused when
the column joins its table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import BindParameter, Column, CompoundSelect, event, inspect
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql.dml import Insert, Update
from sqlalchemy.sql.elements import Cast, ClauseElement, ColumnClause, Null, TextClause, TypeCoerce
from sqlalchemy.sql.sqltypes import _Binary
from sqlalchemy.types import NullType, TypeEngine

from . import _sql
from ._driver_errors import hide_values
from ._sealing import SealedType
from .exceptions import UnsupportedOperationError

BINARY_RESULTS: Final = "lucent_binary_results"
"""The execution option that turns psycopg's binary results off, with ``False``."""

REPEATABLE: Final = "repeatable"
"""Its value for a rotation's SELECT of stored bytes, which may be executed twice."""


def watch(dialect: Dialect) -> None:
    """Look at every statement that `dialect` executes, and keep values out of its errors."""
    if event.contains(dialect, "handle_error", hide_values):
        return
    passed: WeakSet[Compiled] = WeakSet()  # so that a cached statement is looked at once

    def refuse_statement(*arguments: Any) -> None:
        context = arguments[-1]  # the arguments are those of ``do_execute`` and its variants
        compiled = context.compiled
        if compiled is None or compiled in passed:
            return
        fault = _fault_of_statement(context, compiled)
        if fault is None:
            passed.add(compiled)
            return
        del arguments  # there may be plaintext among the parameters
        raise UnsupportedOperationError(fault)

    for execution in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(dialect, execution, refuse_statement)
    if _sql.is_psycopg(dialect):
        from ._binary_results import read_in_binary  # with that driver only

        read_in_binary(dialect)
    # Last: it tells another thread that the dialect is watched.
    event.listen(dialect, "handle_error", hide_values)


# -- defaults --------------------------------------------------------------------------------------


def refuse_unsealed_defaults(column: Column[Any], type_: SealedType) -> None:
    """Refuse defaults that the database would compute: it has no key to seal them with."""
    for name in ("server_default", "server_onupdate"):
        refuse_server_default(str(column), name, getattr(column, name))
    for name in ("default", "onupdate"):
        default = getattr(column, name)
        if default is None or default.is_scalar or default.is_callable:
            continue
        fault = "a Sequence" if default.is_sequence else _fault_of(default.arg, type_)
        if fault is not None:
            raise UnsupportedOperationError(
                f"{name}= of {column} would store a value that is not sealed ({fault}): give it a "
                "Python value or function"
            )


def refuse_server_default(column: str, name: str, default: Any) -> None:
    """Refuse a server default of a sealed column that is not NULL. Internal."""
    expression = getattr(default, "arg", default)
    if expression is None:
        return
    # FetchedValue, Computed and Identity are no expressions.
    if isinstance(expression, ClauseElement) and all(map(_is_null, _sql.sources(expression))):
        return
    raise UnsupportedOperationError(
        f"{name}= of {column} would store a value that is not sealed, because the database has no "
        "key: a sealed column takes no server default but NULL. Use default= or onupdate= with a "
        "Python value or function"
    )


_NULL: Final = re.compile(r"\s*\(*\s*NULL\s*(::[\w\s]+)?\)*\s*", re.IGNORECASE)


def _is_null(source: Any) -> bool:
    if isinstance(source, (Cast, TypeCoerce)):
        return all(map(_is_null, _sql.sources(source.clause)))
    if isinstance(source, TextClause) or getattr(source, "is_literal", False):
        return _NULL.fullmatch(str(source)) is not None
    return isinstance(source, Null)


# -- values ----------------------------------------------------------------------------------------


def _fault_of(value: Any, type_: object) -> str | None:
    """Say what in `value` is not sealed for a column of `type_`; ``None`` if all of it is."""
    if hasattr(value, "__clause_element__"):
        value = value.__clause_element__()
    if not (isinstance(type_, SealedType) and isinstance(value, ClauseElement)):
        return None  # another column, or a Python value, which the type binds
    faults = (_fault_of_source(source, type_) for source in _sql.sources(value))
    return next(filter(None, faults), None)


def _fault_of_source(source: Any, type_: SealedType) -> str | None:
    if _is_null(source):
        return None
    if isinstance(source, (Cast, TypeCoerce)):
        return _fault_of(source.clause, type_)
    if isinstance(source, TextClause) or getattr(source, "is_literal", False):
        return "SQL text"
    if isinstance(source, (ColumnClause, BindParameter)):
        given = source.type
        if isinstance(given, SealedType):
            if given.context in type_.contexts and given.bound_to == type_.bound_to:
                return None
            return f"values of {given.context}"
        if isinstance(given, _Binary):
            return None  # stored bytes, which the CHECK constraint tests
        kind = "the column" if isinstance(source, ColumnClause) else "a parameter"
        return f"{kind} of type {type(given).__name__}"
    return f"the expression {type(source).__name__}"


# -- statements ------------------------------------------------------------------------------------


def _fault_of_statement(context: Any, compiled: Any) -> str | None:
    """Say what is wrong with a statement: it gives a sealed column a value that the column's type
    does not bind, or its UNION mixes values of several columns.
    """
    statement = compiled.statement
    statement = getattr(statement, "element", statement)  # what from_statement() was given
    if isinstance(statement, CompoundSelect):
        return _fault_of_union(statement)
    assigned = []
    if context.isinsert or context.isupdate:
        state = compiled.compile_state
        values = state._dict_parameters
        if values or state.statement._post_values_clause is not None:
            assigned.append((state.statement, state._multi_parameters or [values or {}]))
    inside = [cte.element for cte in getattr(compiled, "ctes", None) or ()]
    assigned += [(dml, _rows_of(dml)) for dml in inside if isinstance(dml, (Insert, Update))]
    for statement, rows in assigned:
        for key, value, takes_type in _values_of(statement, rows):
            if takes_type and isinstance(value, BindParameter) and isinstance(value.type, NullType):
                continue
            column = statement.table.c.get(key) if isinstance(key, str) else key
            type_ = getattr(column, "type", None)
            if isinstance(type_, TypeEngine):
                type_ = type_._variant_mapping.get(context.dialect.name, type_)
            fault = _fault_of(value, type_)
            if fault is not None:
                return (
                    f"{column} was given a value that its type does not seal ({fault}): pass a "
                    "Python value, or a parameter that has no type or the column's. NULL, the "
                    "column itself and columns of the same context work too"
                )
    return None


def _fault_of_union(statement: CompoundSelect[Any]) -> str | None:
    for first, *others in zip(*_sql.columns_of_members(statement), strict=False):
        type_ = getattr(first, "type", None)
        if not isinstance(type_, SealedType):
            continue
        for source in chain.from_iterable(map(_sql.sources, others)):
            given = getattr(source, "type", None)
            if isinstance(given, SealedType) and not set(given.contexts) <= set(type_.contexts):
                return (
                    f"a UNION has values of {given.context} in the column of {type_.context}, and "
                    "SQLAlchemy would open all of them as the latter: select from it as a "
                    "subquery, select(union.subquery()), or give both columns one context="
                )
    return None


def _rows_of(statement: Insert | Update) -> Sequence[Mapping[Any, Any]]:
    """Return the VALUES of a statement inside another, which has no compile state of its own."""
    names = statement.table.c.keys()
    several = [
        row if isinstance(row, Mapping) else dict(zip(names, row, strict=False))
        for rows in statement._multi_values
        for row in rows
    ]
    ordered = getattr(statement, "_ordered_values", None)  # SQLAlchemy 2.0
    rows = several or [dict(ordered or statement._values or {})]
    entity = statement.entity_description.get("entity")
    if entity is None:
        return rows
    columns = inspect(entity).mapper.columns  # by the names of the attributes
    return [{columns.get(key, key): value for key, value in row.items()} for row in rows]


def _values_of(
    statement: Insert | Update, rows: Sequence[Mapping[Any, Any]]
) -> Iterator[tuple[Any, Any, bool]]:
    """Yield each column and value, and whether a parameter without a type gets the column's."""
    for number, row in enumerate(rows):
        for key, value in row.items():
            yield key, value, number == 0
    if isinstance(statement, Insert):
        for position, key in enumerate(statement._select_names or ()):
            for source in _sql.selected(statement.select, position):
                yield key, source, False
        clause = statement._post_values_clause
        for part in getattr(clause, "clauses", [clause]):
            updates = getattr(part, "update_values_to_set", None) or getattr(part, "update", {})
            for key, value in dict(updates).items():
                yield key, value, True
