"""The time by the database's clock, which all processes share."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, func, select

from .._sql import is_mysql


def database_time(connection: Connection) -> datetime:
    """Return the current time in UTC. A SQLite database is on this machine, and has its clock."""
    if connection.dialect.name == "sqlite":
        return datetime.now(UTC)
    now = func.utc_timestamp(6) if is_mysql(connection.dialect) else func.clock_timestamp()
    found: datetime = connection.execute(select(now)).scalar_one()
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
