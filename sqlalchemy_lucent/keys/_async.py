"""The registry over an async engine. Steps are written once, in the synchronous class."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import sqlalchemy as sa

from .. import _key_tables
from .._database.async_bridge import run_sync
from ..exceptions import ConfigurationError, LucentError, hide_locals
from ..keyring import Keyring
from ..rotation.targets import Target
from ._following import INTERVAL, FollowingKeyring
from ._holders import DEFAULT_INTERVAL
from .registry import KeyRegistry

if TYPE_CHECKING:  # without greenlet, which only async programs need, it does not import
    from sqlalchemy.ext.asyncio import AsyncEngine

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _awaited(
    method: Callable[Concatenate[KeyRegistry, _P], _T],
) -> Callable[Concatenate[AsyncKeyRegistry, _P], Coroutine[Any, Any, _T]]:
    """Return `method` for :class:`AsyncKeyRegistry`, run below its engine."""

    @functools.wraps(method)
    @hide_locals
    async def run(self: AsyncKeyRegistry, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await run_sync(self._engine, lambda _: method(self._registry, *args, **kwargs))

    run.__doc__ = f"See :meth:`KeyRegistry.{method.__name__}`."
    return run


class AsyncKeyRegistry:
    """The keys of one database and their states, over an async engine.

    It has the methods of :class:`KeyRegistry`, to be awaited; :meth:`announce` is an async context
    manager. A keyring that follows it reads the registry where values are written and read by the
    database, and not where a :class:`Sealed` is opened outside of it.
    """

    metadata: ClassVar[sa.MetaData] = _key_tables.key_metadata

    @hide_locals
    def __init__(
        self,
        engine: AsyncEngine,
        *,
        targets: Target | Iterable[Target] | None = None,
        keyring: Keyring | Callable[[], Keyring] | None = None,
    ) -> None:
        if not hasattr(engine, "sync_engine"):
            raise ConfigurationError(
                f"an async key registry takes an AsyncEngine, not {type(engine).__name__}"
            )
        self._engine = engine
        self._registry = KeyRegistry(engine.sync_engine, targets=targets, keyring=keyring)

    def __repr__(self) -> str:
        return repr(self._registry).replace("<", "<Async", 1)

    exists = _awaited(KeyRegistry.exists)
    register = _awaited(KeyRegistry.register)
    registered = _awaited(KeyRegistry.registered)
    check = _awaited(KeyRegistry.check)
    readiness = _awaited(KeyRegistry.readiness)
    promote = _awaited(KeyRegistry.promote)
    fence = _awaited(KeyRegistry.fence)
    unfence = _awaited(KeyRegistry.unfence)
    retire = _awaited(KeyRegistry.retire)
    unretire = _awaited(KeyRegistry.unretire)
    leaked = _awaited(KeyRegistry.leaked)
    receipts = _awaited(KeyRegistry.receipts)
    verify_receipts = _awaited(KeyRegistry.verify_receipts)
    write_holder = _awaited(KeyRegistry.write_holder)
    delete_holder = _awaited(KeyRegistry.delete_holder)

    def following(self, *, interval: float = INTERVAL) -> FollowingKeyring:
        """See :meth:`KeyRegistry.following`."""
        return self._registry.following(interval=interval)

    def announce(self, kind: str, *, interval: float = DEFAULT_INTERVAL) -> AsyncAnnouncement:
        """Return an async context manager that tells the registry which keys this process has."""
        return AsyncAnnouncement(self, kind, interval)


class AsyncAnnouncement:
    """Tells the registry, from a task, that this process is there and which keys it holds."""

    def __init__(self, registry: AsyncKeyRegistry, kind: str, interval: float) -> None:
        known = registry._registry.announce(kind, interval=interval)  # checks them
        self.kind, self.id = known.kind, known.id
        self._registry = registry
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._closing.clear()
        await self._registry.write_holder(self.id, self.kind)
        self._task = asyncio.create_task(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        # Not by cancelling the task, which would leave a connection half-used.
        self._closing.set()
        if self._task is not None:
            await self._task
        with suppress(LucentError):  # it is forgotten after `quiet` seconds anyway
            await self._registry.delete_holder(self.id)

    async def _renew(self) -> None:
        while not self._closing.is_set():
            try:
                await asyncio.wait_for(self._closing.wait(), self._interval)
            except TimeoutError:
                with suppress(LucentError):
                    await self._registry.write_holder(self.id, self.kind)
