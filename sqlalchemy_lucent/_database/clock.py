"""The time by the database's clock, which all processes share."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    bindparam,
    func,
    select,
    type_coerce,
)

from .._sql import is_mysql
from ..models import UTCDateTime, utc_now


def database_time(connection: Connection) -> datetime:
    """Return the current time in UTC. A SQLite database is on this machine, and has its clock."""
    if connection.dialect.name == "sqlite":
        return datetime.now(UTC)
    found: datetime = connection.execute(select(time_of(connection.dialect))).scalar_one()
    return found


def time_of(dialect: Dialect) -> ColumnElement[datetime]:
    """Return the current time in UTC as an expression, so that one statement can read it too."""
    if dialect.name == "sqlite":
        return bindparam("now", callable_=utc_now, type_=UTCDateTime())
    now = func.utc_timestamp(6) if is_mysql(dialect) else func.clock_timestamp()
    return type_coerce(now, UTCDateTime())
