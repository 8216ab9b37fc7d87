"""What lets a primary key find its row: a type that leaves it as it is, and its characters."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.sql.expression import TableClause
from sqlalchemy.types import TypeEngine

from .._sql import is_mysql
from ..exceptions import RotationError


def without_limits(type_: TypeEngine[Any], dialect: sa.Dialect) -> TypeEngine[Any]:
    """Return the type that PostgreSQL casts a key to, without a length or precision.

    The column in the database may be wider than the model says. A cast to the model's type would
    cut the key off, or round it.
    """
    if dialect.name != "postgresql" or isinstance(type_, sa.TypeDecorator):
        return type_
    from sqlalchemy.dialects import postgresql  # with that database only

    implementation = type_.dialect_impl(dialect)
    if isinstance(implementation, sa.String) and not isinstance(
        implementation, (sa.CHAR, sa.NCHAR, sa.Enum)
    ):
        # Without a length it may be CITEXT, or another type with an equality of its own.
        return sa.String() if implementation.length is not None else type_
    if isinstance(implementation, sa.Numeric) and not isinstance(implementation, sa.Float):
        return sa.Numeric() if implementation.asdecimal else sa.Numeric(asdecimal=False)
    if isinstance(type_, postgresql.TIMESTAMP):
        return postgresql.TIMESTAMP(timezone=type_.timezone)
    return type_


def check_character_sets(connection: sa.Connection, name: str, clause: TableClause) -> None:
    """Refuse keys that the connection cannot read without loss.

    MySQL and MariaDB send a question mark for each character that the connection's character set
    lacks. Such a key would find no row, and a value that is bound to it would not open.

    :raises RotationError: the connection's character set lacks characters of a column's.
    """
    if not is_mysql(connection.dialect):
        return
    names = {"name": str(clause.name), "schema": clause.schema}
    sets = connection.execute(_CONNECTION_SETS).one()
    lossy = [
        f"{column} ({set_})"
        for column, set_ in connection.execute(_CHARACTER_SETS, names)
        # utf8mb4 has every character, and every set has those of ASCII.
        if column in clause.c and set_ != "ascii" and {*sets} - {None, "utf8mb4", set_}
    ]
    if lossy:
        raise RotationError(
            f"the connection's character set is {sets[0]}, which lacks characters of {name}."
            f"{', '.join(lossy)}, by which rows are found. Connect with charset=utf8mb4"
        )


_CONNECTION_SETS: Final = sa.text(
    "SELECT @@character_set_client, @@character_set_connection, @@character_set_results"
)
_CHARACTER_SETS: Final = sa.text(
    "SELECT column_name AS name, character_set_name AS set_ FROM information_schema.columns"
    " WHERE table_name = :name AND table_schema = coalesce(:schema, database())"
    " AND character_set_name IS NOT NULL"
)
