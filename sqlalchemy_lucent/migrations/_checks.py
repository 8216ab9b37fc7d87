"""The CHECK constraint of a sealed column in a database: found, added, dropped."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from alembic.operations import BatchOperations, Operations
from sqlalchemy import (
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    TextClause,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy import column as column_clause
from sqlalchemy import table as table_clause
from sqlalchemy.engine.interfaces import ReflectedCheckConstraint
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import conv
from sqlalchemy.types import NullType, _Binary

from .. import _sql
from .._database.connection import ManagedConnection, is_in_transaction
from .._database.visibility import require_full_visibility
from ..exceptions import RotationError
from ..types import EncryptedJSON
from ._reflect import reflect_columns

logger = logging.getLogger("alembic.runtime.migration.lucent")


def find_check(
    connection: Connection, table_name: str, column_name: str, schema: str | None
) -> ReflectedCheckConstraint | None:
    """Return the constraint by what it says, since a renamed table or column keeps its name."""
    own = re.compile(rf"(?<!\w){re.escape(column_name)}(?!\w)")
    for check in inspect(connection).get_check_constraints(table_name, schema=schema):
        if _SIGNATURE.search(check["sqltext"]) and own.search(check["sqltext"]):
            return check
    return None


_SIGNATURE: Final = re.compile(
    r"3A01\b.*\[\^A-Za-z0-9|\{1,32\}:\\+u0001", re.IGNORECASE | re.DOTALL
)
"""What :class:`._sql.is_sealed` has in the words of every database, and nothing else has."""


def declared_check(
    operations: Operations, table_name: str, column_name: str, schema: str | None
) -> CheckConstraint:
    """Return the constraint that a new table would have, named by the target's convention."""
    column: Column[Any] = Column(column_name, EncryptedJSON())
    table = operations.schema_obj.table(table_name, column, schema=schema)
    (check,) = (c for c in table.constraints if isinstance(c, CheckConstraint))
    # Its name is final, also in a batch, which copies the table under another name.
    preparer = operations.get_context().dialect.identifier_preparer
    check.name = conv(str(preparer.format_constraint(check, _alembic_quote=False)))
    return check


def condition_of(column_name: str, dialect: Dialect) -> TextClause:
    """Return what the constraint says, for a column that is in no table."""
    return text(str(_sql.is_sealed(column_clause(column_name)).compile(dialect=dialect)))


def create_check(
    operations: Operations, table_name: str, column_name: str, schema: str | None
) -> None:
    """Add the constraint where it is missing, over a connection in AUTOCOMMIT mode.

    :raises RotationError: there are values that it would refuse; nothing was written.
    """
    connection = operations.get_bind()
    full_name = ".".join(filter(None, (schema, table_name, column_name)))
    _require_column(connection, table_name, column_name, schema)
    found = find_check(connection, table_name, column_name, schema)
    is_validated = found and not found.get("dialect_options", {}).get("not_valid")
    if is_validated:
        return
    _refuse_unsealed(connection, table_name, column_name, schema)
    check = declared_check(operations, table_name, column_name, schema)
    name = conv(str(check.name))
    dialect = connection.dialect.name
    try:
        if dialect == "sqlite":
            condition = condition_of(column_name, connection.dialect)
            _copy_on_sqlite(
                operations,
                table_name,
                schema,
                lambda batch: batch.create_check_constraint(name, condition),
            )
        else:
            if found is None:
                # Rows are read afterwards, under a lock that lets others write.
                check.dialect_options["postgresql"]["not_valid"] = True
                operations.impl.add_constraint(check)
            if dialect == "postgresql":
                preparer = connection.dialect.identifier_preparer
                table = preparer.format_table(check.table)
                quoted = preparer.quote(str(found["name"]) if found else name)
                connection.exec_driver_sql(f"ALTER TABLE {table} VALIDATE CONSTRAINT {quoted}")
    except DBAPIError as error:
        fault = type(error.orig).__name__
    else:
        logger.info("%s refuses what is not sealed from now on", full_name)
        return
    _refuse_unsealed(connection, table_name, column_name, schema)  # if they came meanwhile
    raise RotationError(
        f"the database refused the CHECK constraint of {full_name}: {fault}. Run it again to go on"
    )


def _require_column(
    connection: Connection, table_name: str, column_name: str, schema: str | None
) -> None:
    columns = reflect_columns(connection, table_name, schema, [column_name])
    type_ = columns[column_name]["type"]
    if not isinstance(type_, (_Binary, NullType)):
        where = ".".join(filter(None, (schema, table_name)))
        raise RotationError(
            f"{where}.{column_name} is a column of the type {type_}, and not an "
            "encrypted one; op.encrypt_column() makes it one"
        )


def _refuse_unsealed(
    connection: Connection, table_name: str, column_name: str, schema: str | None
) -> None:
    require_full_visibility(connection, table_name, schema)
    value: ColumnElement[Any] = column_clause(column_name)
    unsealed = select(func.count()).select_from(table_clause(table_name, schema=schema))
    count = connection.scalar(unsealed.where(value.is_not(None), _sql.key_version(value).is_(None)))
    if count:
        full_name = ".".join(filter(None, (schema, table_name, column_name)))
        raise RotationError(
            f"{count} values of {full_name} are not sealed, so it cannot have a CHECK constraint "
            "that refuses such values. Nothing was changed. verify() names their rows; "
            "op.encrypt_column() seals a column that holds plaintext"
        )


def drop_check(
    operations: Operations, table_name: str, column_name: str, schema: str | None
) -> None:
    """Drop the constraint, if there is one, over a connection in AUTOCOMMIT mode."""
    connection = operations.get_bind()
    found = find_check(connection, table_name, column_name, schema)
    if found is None or found["name"] is None:
        return
    name = conv(found["name"])
    if connection.dialect.name == "sqlite":
        _copy_on_sqlite(
            operations,
            table_name,
            schema,
            lambda batch: batch.drop_constraint(name, type_="check"),
            loses=Counter({"CHECK": 1}),
        )
    else:
        operations.drop_constraint(name, table_name, type_="check", schema=schema)


def _copy_on_sqlite(
    operations: Operations,
    table_name: str,
    schema: str | None,
    change: Callable[[BatchOperations], object],
    *,
    loses: Counter[str] | None = None,
) -> None:
    """Change a table by Alembic's copy of it, in one transaction; refuse to lose what it had."""
    connection = operations.get_bind()
    with _transaction(connection):
        before = schema_on_sqlite(connection, table_name, schema)
        with operations.batch_alter_table(table_name, schema=schema, recreate="always") as batch:
            change(batch)
        lost = before - schema_on_sqlite(connection, table_name, schema) - (loses or Counter())
        if lost:
            raise RotationError(
                f"SQLite changes the CHECK constraints of {table_name} only on a copy of the "
                f"table, and Alembic's copy would lose: {', '.join(sorted(lost))}. Nothing was "
                "changed. Copy the table in a revision of your own, or pass "
                "create_constraint=False to the column's type"
            )


@contextmanager
def _transaction(connection: Connection) -> Iterator[None]:
    if is_in_transaction(connection):  # that of a conversion
        yield
        return
    with (
        ManagedConnection(connection) as database,
        without_foreign_keys(database.connection),
        database.transaction(),
    ):
        yield


@contextmanager
def without_foreign_keys(connection: Connection) -> Iterator[None]:
    """Keep SQLite from deleting rows of other tables that refer to a table that is copied.

    When the copy of the table takes its place and foreign keys are on, DROP TABLE deletes the
    rows first.
    """
    enforced = (
        connection.dialect.name == "sqlite"
        and connection.exec_driver_sql("PRAGMA foreign_keys").scalar()
    )
    if enforced:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
    try:
        yield
    finally:
        if enforced:
            connection.exec_driver_sql("PRAGMA foreign_keys = ON")


def schema_on_sqlite(connection: Connection, table_name: str, schema: str | None) -> Counter[str]:
    """What the table has, for comparing it with its copy: objects by name, clauses by word."""
    quote = connection.dialect.identifier_preparer.quote
    master = f"{quote(schema)}.sqlite_master" if schema else "sqlite_master"
    statement = text(f"SELECT type, name, sql FROM {master} WHERE tbl_name = :name")  # noqa: S608
    found: Counter[str] = Counter()
    for type_, name, sql in connection.execute(statement, {"name": table_name}):
        if type_ == "table":
            found.update(" ".join(word.upper().split()) for word in _CLAUSES.findall(sql))
        elif sql is not None:
            found[f"{type_} {name}"] += 1
    return found


_CLAUSES: Final = re.compile(
    r"\b(?:CHECK|AUTOINCREMENT|COLLATE\s+\w+|ON\s+CONFLICT|STRICT|WITHOUT\s+ROWID|DEFAULT|UNIQUE"
    r"|GENERATED|REFERENCES|DEFERRABLE)\b",
    re.IGNORECASE,
)
"""The clauses of a CREATE TABLE that a copy made from what was reflected may lack."""
