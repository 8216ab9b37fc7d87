"""The check of an argument that is an engine, with the name of what takes an async one."""

from __future__ import annotations

import sqlalchemy as sa

from .exceptions import ConfigurationError


def require_engine(given: object, taker: str, async_taker: str) -> None:
    """Refuse what is no engine.

    :raises ConfigurationError: it is none.
    """
    if not isinstance(given, sa.Engine):
        name = type(given).__name__
        hint = f"; {async_taker} takes it" if name == "AsyncEngine" else ""
        raise ConfigurationError(f"{taker} takes an Engine, not {name}{hint}")
