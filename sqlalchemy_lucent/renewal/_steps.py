"""The steps of a renewal, written once for threads and for asyncio.

:func:`renew` is a generator. It yields what is to be done next, gets the result, and returns the
value. A driver does it: work on the database, a pause, or the call of the application's function.
An error comes back as a :class:`Raised` and is returned as one, so that no frame that holds a value
is in the traceback of an error.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutine
from types import FrameType, TracebackType
from typing import Any, Final, NamedTuple, TypeAlias

from ..exceptions import (
    ConfigurationError,
    LucentError,
    NeedsReauthorizationError,
    RenewalError,
    RenewalTimeoutError,
)
from ..secret_key import SecretKey
from ._store import Claim, Options, Renewed, Store

_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 0.5
"""Seconds between two looks for what another process stores."""

_PACKAGE: Final = __name__.partition(".")[0]


@dataclass(frozen=True)
class RenewalAttempt:
    """The second argument of a refresh function.

    `number` counts the attempts at this secret. With `uncertain`, the one before it broke off: its
    process died, was cancelled or is still waiting, so the provider may have taken the refresh
    token already, without that its answer was stored.
    """

    key: SecretKey
    number: int
    uncertain: bool


class Work(NamedTuple):
    """Work on the database, which a cancellation must not break off."""

    do: Callable[[], Any]


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class Call(NamedTuple):
    """Call the application's function."""

    value: Any
    attempt: RenewalAttempt


Step: TypeAlias = Work | Pause | Call


class Raised:
    """An error instead of a result, without the frames of this package, which hold values."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        kept = None
        links = list(_links(error.__traceback__))
        for link in reversed(links):
            if not _is_ours(link.tb_frame):
                kept = TracebackType(kept, link.tb_frame, link.tb_lasti, link.tb_lineno)
        if links and _is_ours(links[-1].tb_frame) and not isinstance(error, LucentError):
            where = links[-1].tb_frame.f_globals["__name__"]
            error.add_note(f"raised by {where}, line {links[-1].tb_lineno}")
        self.error = error.with_traceback(kept)


def _is_ours(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == _PACKAGE


def _links(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def renew(store: Store, key: SecretKey, options: Options) -> Generator[Step, Any, Any | Raised]:
    """Renew a secret that is due, or wait for who does; return its value, or what was raised."""
    began, first, pause = time.monotonic(), None, _FIRST_PAUSE
    while True:
        seen = yield Work(partial(store.read, key))
        if isinstance(seen, Raised):
            return seen
        first = first or seen
        # A token that lives shorter than `within` is due as soon as it is there.
        is_new = seen.number != first.number and not seen.is_expired
        if is_new or not seen.is_due(options.within):
            return (yield Work(partial(store.open, key, seen.payload)))
        if seen.needs_reauthorization_at is not None:
            return Raised(_needs_reauthorization(key))
        if not seen.is_leased:
            claim = yield Work(partial(store.claim, key, seen, options))
            if claim is not None:
                break
        left = began + options.wait - time.monotonic()
        if left <= 0:
            if not seen.is_expired:
                return (yield Work(partial(store.open, key, seen.payload)))
            return Raised(_not_in_time(key, options))
        waited = yield Pause(min(left, pause * random.uniform(0.5, 1)))  # noqa: S311  (jitter)
        if isinstance(waited, Raised):
            return waited
        pause = min(2 * pause, _LONGEST_PAUSE)
    if isinstance(claim, Renewed):
        return claim.value
    if isinstance(claim, Raised):
        return claim
    attempt = RenewalAttempt(key, claim.number, claim.is_uncertain)
    if time.monotonic() - claim.began >= options.lease:
        yield Work(partial(store.give_back, key, claim))
        return Raised(
            ConfigurationError(
                f"the lease of {options.lease:g} seconds on {key} was over before the claim was "
                "stored. Make lease= longer than the provider takes at most"
            )
        )
    answer = yield Call(claim.take_value(), attempt)
    if not isinstance(answer, Raised):
        return (yield from _keep(store, key, claim, answer))
    waits_until = min(began + options.wait, claim.began + options.lease)
    return (yield from _look_again(store, key, claim, answer, waits_until))


def _keep(
    store: Store, key: SecretKey, claim: Claim, answer: Any
) -> Generator[Step, Any, Any | Raised]:
    """Store the provider's answer; return the value that counts now."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        yield Work(partial(store.give_back, key, claim))
        return Raised(_not_an_answer(key, answer))
    keeping = Work(partial(store.keep, key, claim, answer))
    kept = yield keeping
    if isinstance(kept, Raised) and not isinstance(kept.error, Exception):
        # An interrupt. The answer comes first.
        yield keeping
    elif isinstance(kept, Raised) and not isinstance(kept.error, RenewalError):
        # It cannot be sealed. If it was the database, the lease stays, and tells who comes next.
        yield Work(partial(store.give_back, key, claim))
    return kept


def _look_again(
    store: Store, key: SecretKey, claim: Claim, raised: Raised, waits_until: float
) -> Generator[Step, Any, Any | Raised]:
    """Take what another process stored meanwhile; else give back the lease, and say what failed.

    The holder before may still wait for its answer. Then a refresh token that the provider does not
    take any more says nothing yet.
    """
    if not isinstance(raised.error, Exception):
        # Interrupted or cancelled: nobody knows what the provider did.
        yield Work(partial(store.break_off, key, claim))
        return raised
    is_gone = says_invalid_grant(raised.error)
    pause = _FIRST_PAUSE
    while True:
        is_last = not (is_gone and claim.is_uncertain) or time.monotonic() >= waits_until
        found = yield Work(
            partial(store.look_again, key, claim, raised.error, is_gone=is_gone, is_last=is_last)
        )
        if isinstance(found, Renewed):
            return found.value
        if is_last or isinstance(found, Raised):
            return raised
        waited = yield Pause(pause * random.uniform(0.5, 1))  # noqa: S311  (jitter)
        if isinstance(waited, Raised):
            yield Work(partial(store.give_back, key, claim))
            return waited
        pause = min(2 * pause, _LONGEST_PAUSE)


def says_invalid_grant(error: BaseException) -> bool:
    """Say whether the grant is gone: RFC 6749, 5.2, as the errors of OAuth libraries have it."""
    if isinstance(error, NeedsReauthorizationError):
        return True
    return getattr(error, "error", None) == "invalid_grant"


def _needs_reauthorization(key: SecretKey) -> NeedsReauthorizationError:
    return NeedsReauthorizationError(
        f"the provider does not renew the secret {key} any more: its grant is gone. Let its owner "
        "log in again, and store the new value with set()"
    )


def _not_in_time(key: SecretKey, options: Options) -> RenewalTimeoutError:
    return RenewalTimeoutError(
        f"the secret {key} has expired, and its renewal was not done within {options.wait:g} "
        "seconds. Call it again; raise wait= if the provider is slow"
    )


def _not_an_answer(key: SecretKey, answer: object) -> RenewalError:
    if iscoroutine(answer):
        answer.close()
    return RenewalError(
        f"refresh returned a {type(answer).__name__} for the secret {key} instead of a tuple of "
        "the new value and its expiry. The stored value stays"
    )
