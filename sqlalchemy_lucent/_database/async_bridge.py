"""Run the synchronous engine over an async engine or connection.

SQLAlchemy's asyncio extension is imported on use: it needs greenlet, which not every program has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Dialect, Engine

from ..exceptions import RotationError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_T = TypeVar("_T")


async def run_sync(
    bind: AsyncEngine | AsyncConnection, work: Callable[[Engine | Connection], _T]
) -> _T:
    """Run `work` on the synchronous engine or connection below `bind`."""
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

    if isinstance(bind, AsyncConnection):
        return await bind.run_sync(work)
    if not isinstance(bind, AsyncEngine):
        raise RotationError(
            f"the bind is an AsyncEngine or AsyncConnection, not {type(bind).__name__}"
        )
    # AsyncEngine has no run_sync(). A session has, and connects to nothing by itself.
    async with AsyncSession(bind) as session:
        return await session.run_sync(lambda _: work(bind.sync_engine))


def sleep(seconds: float, dialect: Dialect) -> None:
    """Wait; with an async driver, while the event loop goes on."""
    if dialect.is_async:
        wait_for(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def wait_for(awaitable: Awaitable[Any]) -> None:
    """Wait, inside :func:`run_sync`, for what an async driver does."""
    from sqlalchemy.util import await_only

    await_only(awaitable)
