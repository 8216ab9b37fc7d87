"""Change a SQLite table by Alembic's copy of it, and refuse to lose what the table had."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from alembic.operations import BatchOperations, Operations
from sqlalchemy import Connection, text

from .._database.connection import ManagedConnection, is_in_transaction
from ..exceptions import RotationError


@contextmanager
def copied_table(
    operations: Operations,
    table_name: str,
    schema: str | None,
    *,
    because: str,
    instead: str,
    loses: str | None = None,
) -> Iterator[BatchOperations]:
    """Give a batch that changes a table by a copy of it, in one transaction.

    :param because: what needs the copy, for the error.
    :param instead: what to do without it, for the error.
    :param loses: the clause that the change is to remove.
    :raises RotationError: the copy would lack something else. Nothing was changed.
    """
    connection = operations.get_bind()
    with _transaction(connection):
        before = _contents(connection, table_name, schema)
        with operations.batch_alter_table(table_name, schema=schema, recreate="always") as batch:
            yield batch
        removed = Counter([loses] if loses else ())
        lost = before - _contents(connection, table_name, schema) - removed
        if lost:
            raise RotationError(
                f"{because} only on a copy of the table, and Alembic's copy would lose: "
                f"{', '.join(sorted(lost))}. {instead}"
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
    """Keep SQLite from deleting rows that refer to a table while its copy takes its place.

    With foreign keys on, DROP TABLE deletes the table's rows first.
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


def _contents(connection: Connection, table_name: str, schema: str | None) -> Counter[str]:
    """Count what the table has: its clauses by word, its indexes and triggers by name."""
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
"""Clauses of a CREATE TABLE that may be missing in a copy, which is made by reflection."""
