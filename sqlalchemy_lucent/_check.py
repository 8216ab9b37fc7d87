"""The CHECK constraint that keeps unsealed values out of a sealed column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import CheckConstraint, Column, Dialect, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateTable, conv
from sqlalchemy.sql.compiler import DDLCompiler

from . import _sql


class _InColumn(CheckConstraint):
    """The constraint as part of its column's definition, for SQLite.

    There, ADD COLUMN adds such a constraint and DROP COLUMN drops it. A constraint of the table can
    only be added by copying the table, and keeps the column from being dropped.
    """

    def __init__(self, check: CheckConstraint) -> None:
        super().__init__(check.sqltext, _autoattach=False, _type_bound=True)
        self.check = check

    def __repr__(self) -> str:
        return f"<CHECK {self.check.name}>"  # the inherited one and Column's call each other


@compiles(_InColumn)
def _compile_in_column(element: _InColumn, compiler: DDLCompiler, **kw: Any) -> str:
    rule = element.check._create_rule
    assert isinstance(rule, _CreateRule)
    if compiler.dialect.name != "sqlite" or not rule.wanted(compiler.dialect):
        return ""
    return str(compiler.process(element.check, **kw))


class _CreateRule:
    """Says whether a statement creates the constraint as one of the table."""

    def __init__(self, column: Column[Any], declared: Callable[[Dialect], bool]) -> None:
        self._column = column
        self._declared = declared

    def wanted(self, dialect: Dialect) -> bool:
        """Say whether the column has a constraint on `dialect`."""
        column = self._column
        is_current = column.table.c.get(column.key) is column  # not after `extend_existing`
        return is_current and _sql.has_form(dialect.name) and self._declared(dialect)

    # Alembic passes its own object, which has a dialect too.
    def __call__(self, compiler: Any) -> bool:
        if not self.wanted(compiler.dialect):
            return False
        if compiler.dialect.name != "sqlite":
            return True
        # In a copy by Alembic's batch mode, no column may have it.
        statement = getattr(compiler, "statement", None)
        return isinstance(statement, CreateTable) and not any(
            isinstance(constraint, _InColumn)
            for column in statement.element.columns
            if column.name == self._column.name
            for constraint in column.constraints
        )


def attach_check(column: Column[Any], table: Table, declared: Callable[[Dialect], bool]) -> None:
    """Add the constraint to a column that has joined its table, for dialects that support it."""
    if any(isinstance(constraint, _InColumn) for constraint in column.constraints):
        return
    check = CheckConstraint(
        _sql.is_sealed(column),
        name=_name(column, table),
        _create_rule=_CreateRule(column, declared),
        _type_bound=True,  # as with Enum and Boolean, the type of a copied column adds it again
    )
    column.constraints.add(_InColumn(check))


def _name(column: Column[Any], table: Table) -> str | None:
    conventions: Mapping[Any, Any] = table.metadata.naming_convention
    convention = conventions.get("ck", conventions.get(CheckConstraint))
    if convention is None:
        # With the table's name, because on MySQL the name is unique in the whole database. The
        # compiler shortens it if needed. Alembic copies a table under a name of its own.
        name = table.name.removeprefix("_alembic_tmp_")
        return conv(f"ck_{name}_{column.name}_sealed")
    return f"{column.name}_sealed" if "%(constraint_name)s" in convention else None
