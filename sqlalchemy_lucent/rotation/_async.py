"""Run the synchronous engine over an async engine or connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.util import await_only

from ..exceptions import RotationError

_T = TypeVar("_T")


async def run_sync(
    bind: AsyncEngine | AsyncConnection, work: Callable[[Engine | Connection], _T]
) -> _T:
    """Run `work` on the synchronous engine or connection below `bind`."""
    if isinstance(bind, AsyncConnection):
        return await bind.run_sync(work)
    if not isinstance(bind, AsyncEngine):
        raise RotationError(
            f"the bind is an AsyncEngine or AsyncConnection, not {type(bind).__name__}"
        )
    # A session is what SQLAlchemy has for running code without a connection to begin with.
    async with AsyncSession(bind) as session:
        return await session.run_sync(lambda _: work(bind.sync_engine))


def sleep_in_async(seconds: float) -> None:
    """Wait, inside :func:`run_sync`, while the event loop goes on."""
    await_only(asyncio.sleep(seconds))
