"""Run the synchronous engine over an async engine or connection.

SQLAlchemy's asyncio extension is imported on use: it needs greenlet, which not every program has.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from sqlalchemy import Connection, Dialect, Engine

from ..exceptions import RotationError, hide_locals

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

_T = TypeVar("_T")
_P = ParamSpec("_P")


def awaited(
    function: Callable[Concatenate[Engine | Connection, _P], _T],
) -> Callable[Concatenate[AsyncEngine | AsyncConnection, _P], Coroutine[Any, Any, _T]]:
    """Return `function` for an async engine or connection, with its other arguments as they are."""
    signature = inspect.signature(function)
    first, *others = signature.parameters.values()
    # As Concatenate types it.
    first = first.replace(
        annotation="AsyncEngine | AsyncConnection", kind=inspect.Parameter.POSITIONAL_ONLY
    )
    signature = signature.replace(parameters=[first, *others])

    @functools.wraps(function)
    @hide_locals
    async def run(*args: Any, **kwargs: Any) -> _T:
        bind, *rest = signature.bind(*args, **kwargs).args  # or a TypeError names what is missing
        return await run_sync(bind, lambda sync: function(sync, *rest, **kwargs))

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__name__ = run.__qualname__ = f"a{function.__name__}"
    run.__doc__ = f"""Do what :func:`{function.__name__}` does, over an async engine or connection.

    It takes the same arguments. While the database works, and while it waits, the event loop runs.
    Functions among the arguments are ordinary ones.
    """
    return cast("Callable[..., Coroutine[Any, Any, _T]]", run)


async def run_sync(
    bind: AsyncEngine | AsyncConnection, work: Callable[[Engine | Connection], _T]
) -> _T:
    """Run `work` on the synchronous engine or connection below `bind`."""
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

    if isinstance(bind, AsyncConnection):
        if bind.sync_connection is None:
            raise RotationError(
                "the connection is not open. Open it with `async with engine.connect()`, or pass "
                "the engine"
            )
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
