"""The time by the database's clock, which all processes share."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select

from .._lifecycle import time_of
from ..models import utc_now


def database_time(connection: Connection) -> datetime:
    """Return the current time in UTC. A SQLite database is on this machine, and has its clock."""
    if connection.dialect.name == "sqlite":
        return utc_now()
    found: datetime = connection.execute(select(time_of(connection.dialect))).scalar_one()
    return found
