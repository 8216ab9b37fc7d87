"""Which database it is, where that is more than the dialect's name."""

from __future__ import annotations

from sqlalchemy import Dialect


def is_mysql(dialect: Dialect) -> bool:
    """Say whether it is MySQL or MariaDB: one dialect, which SQLAlchemy knows by both names."""
    return dialect.name in ("mysql", "mariadb")
