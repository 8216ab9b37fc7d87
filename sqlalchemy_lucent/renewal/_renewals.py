"""``Renewals`` and ``AsyncRenewals``: secrets that are renewed before they expire, once for all."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import sqlalchemy as sa

from .._arguments import require_engine
from .._database.async_bridge import run_sync
from ..events import AccessHandler
from ..exceptions import ConfigurationError
from ..keyring import Keyring
from ..models import LucentSecret, LucentSecretMixin
from ..secret_key import SecretKey
from ._steps import Pause, Raised, RenewalAttempt, Step, Work, renew
from ._store import Options, Store

if TYPE_CHECKING:  # without greenlet, which only async programs need, it does not import
    from sqlalchemy.ext.asyncio import AsyncEngine

Answer: TypeAlias = tuple[Any, datetime | timedelta | None]
"""What a refresh function returns: the new value, and when it expires (``None``: never)."""

Refresh: TypeAlias = Callable[[Any, RenewalAttempt], Answer]
AsyncRefresh: TypeAlias = Callable[[Any, RenewalAttempt], Awaitable[Answer] | Answer]
Seconds: TypeAlias = float | timedelta


class Renewals:
    """Secrets that expire, and are renewed by one caller for all: OAuth tokens, for instance.

    :param engine: of the primary server. Each statement is in a short transaction of its own, and
        none is open while your function asks the provider.
    :param keyring: the keyring to use. If left out, the default keyring is looked up at each use.
    :param model: a mapped class made with :class:`LucentSecretMixin` and :func:`with_lifecycle`.
    :param keep: how many versions of a secret are kept, as for :class:`LucentSecrets`. Without it,
        a renewal keeps each value that it replaces.
    :param on_access: called for each value that is read or renewed, as for :class:`LucentSecrets`,
        but in a transaction of its own: a renewal is not undone.
    :raises ConfigurationError: an argument is of a wrong type.
    """

    def __init__(
        self,
        engine: sa.Engine,
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
        keep: int | None = None,
        on_access: AccessHandler | None = None,
    ) -> None:
        require_engine(engine, "Renewals", "AsyncRenewals")
        self._store = Store(engine, keyring, model, keep, on_access)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._store.table.name}>"

    def fresh(
        self,
        key: SecretKey | str,
        refresh: Refresh,
        *,
        within: Seconds = 60,
        lease: Seconds = 30,
        wait: Seconds = 10,
    ) -> Any:
        """Return the value stored under `key`, renewed if it expires soon.

        One SELECT, if it does not. Else one caller of all processes calls `refresh`, and the others
        wait for what it returns.

        :param refresh: takes the value and a :class:`RenewalAttempt`, and returns the new value and
            its expiry: a datetime with a time zone, a timedelta from now, or ``None`` for never. It
            raises :exc:`NeedsReauthorizationError` if the provider says that the grant is gone, or
            an error whose attribute `error` is ``"invalid_grant"``. No connection of `engine` is
            held while it runs.
        :param within: seconds before the expiry from which on the value is renewed.
        :param lease: seconds that `refresh` may take before another caller does it again. Let it be
            longer than the timeout of your HTTP client.
        :param wait: seconds to wait for another caller; 0 does not wait.
        :raises SecretNotFoundError: no secret is stored under `key`.
        :raises NeedsReauthorizationError: the provider said that the grant is gone, and nobody has
            stored another value since.
        :raises RenewalTimeoutError: the value has expired, and who renews it was not done in time.
        :raises RenewalError: `refresh` did not return a value and its expiry, or the database ended
            the renewal.
        :raises SerializationError: the value or the expiry cannot be stored.
        :raises DecryptionError: the stored value does not open; the subclass says why.
        :raises ConfigurationError: an argument is wrong, or the tables are missing.

        What `refresh` raises reaches you, unless another process has renewed the value meanwhile.
        The stored value stays in any case, and the next caller may try at once.
        """
        key = SecretKey.of(key)
        options = _options(within, lease, wait)
        if not callable(refresh) or _is_async(refresh):
            hint = "; AsyncRenewals takes a coroutine function" if callable(refresh) else ""
            raise ConfigurationError(f"refresh is a plain function{hint}")
        sealed = self._store.current(key, options.within)
        if sealed is not None:
            return self._store.open(key, sealed)
        result = _drive(renew(self._store, key, options), refresh)
        if not isinstance(result, Raised):
            return result
        raise result.error


class AsyncRenewals:
    """:class:`Renewals` over an async engine.

    Cancelled while `refresh` runs, it gives the lease back; the next holder is told. Once the
    provider has answered, the answer is stored before the cancellation goes on.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
        keep: int | None = None,
        on_access: AccessHandler | None = None,
    ) -> None:
        if not hasattr(engine, "sync_engine"):
            raise ConfigurationError(
                f"AsyncRenewals takes an AsyncEngine, not {type(engine).__name__}"
            )
        self._engine = engine
        self._store = Store(engine.sync_engine, keyring, model, keep, on_access)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._store.table.name}>"

    async def fresh(
        self,
        key: SecretKey | str,
        refresh: AsyncRefresh,
        *,
        within: Seconds = 60,
        lease: Seconds = 30,
        wait: Seconds = 10,
    ) -> Any:
        """See :meth:`Renewals.fresh`.

        :param refresh: a coroutine function; or a plain one, which runs in a thread.
        """
        key = SecretKey.of(key)
        options = _options(within, lease, wait)
        if not callable(refresh):
            raise ConfigurationError("refresh is a function")
        is_due, value = await run_sync(self._engine, lambda _: self._current(key, options))
        if not is_due:
            return value
        result = await _Driver(self._engine, refresh).drive(renew(self._store, key, options))
        if not isinstance(result, Raised):
            return result
        raise result.error

    def _current(self, key: SecretKey, options: Options) -> tuple[bool, Any]:
        sealed = self._store.current(key, options.within)
        return sealed is None, None if sealed is None else self._store.open(key, sealed)


def _drive(steps: Generator[Step, Any, Any], refresh: Refresh) -> Any:
    """Take the steps in this thread; return what they return."""
    result = None
    while True:
        try:
            step = steps.send(result)
        except StopIteration as end:
            return end.value
        try:
            if isinstance(step, Work):
                result = step.do()
            elif isinstance(step, Pause):
                time.sleep(step.seconds)
                result = None
            else:
                result = refresh(*step)
        except BaseException as error:  # noqa: BLE001  (the steps decide)
            result = Raised(error)


class _Driver:
    """Takes the steps in a task of asyncio.

    Work on the database is a task of its own: a cancellation waits for it.
    """

    def __init__(self, engine: AsyncEngine, refresh: AsyncRefresh) -> None:
        self._engine = engine
        self._refresh = refresh
        self._cancelled: asyncio.CancelledError | None = None

    async def drive(self, steps: Generator[Step, Any, Any]) -> Any:
        result = None
        while True:
            try:
                step = steps.send(result)
            except StopIteration as end:
                return end.value if self._cancelled is None else Raised(self._cancelled)
            try:
                result = await self._take(step)
            except GeneratorExit:
                raise  # nothing can be awaited any more
            except BaseException as error:  # noqa: BLE001  (the steps decide)
                result = Raised(error)

    async def _take(self, step: Step) -> Any:
        if isinstance(step, Work):
            return await self._to_the_end(run_sync(self._engine, lambda _: step.do()))
        if self._cancelled is not None:
            raise self._cancelled
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if _is_async(self._refresh):
            return await cast("Awaitable[Answer]", self._refresh(*step))
        # A thread cannot be cancelled, and its answer counts.
        answer = await self._to_the_end(asyncio.to_thread(self._refresh, *step))
        return await answer if inspect.isawaitable(answer) else answer

    async def _to_the_end(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await `work`, and remember a cancellation."""
        task = asyncio.ensure_future(work)
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                self._cancelled = error
        return task.result()


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    called = getattr(function, "__call__", None)  # noqa: B004  (of an object that is callable)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _options(within: Seconds, lease: Seconds, wait: Seconds) -> Options:
    return Options(
        within=timedelta(seconds=_seconds("within", within)),
        lease=_seconds("lease", lease, above=True),
        wait=_seconds("wait", wait),
    )


def _seconds(name: str, given: Seconds, *, above: bool = False) -> float:
    value: Any = given.total_seconds() if isinstance(given, timedelta) else given
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and (value > 0 or (value == 0 and not above)):
        return float(value)
    least = "above 0" if above else "of 0 or more"
    raise ConfigurationError(f"{name}= is a number of seconds {least}, or such a timedelta")
