"""The steps of a renewal, written once for threads and for asyncio.

:func:`renew` is a generator. It yields what is to be done next, gets the result, and returns the
value. A driver does it: work on the database, a pause, or the call of the application's function.
An error comes back as a :class:`Raised` and is returned as one, so that no frame that holds a value
is in the traceback of an error.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeAlias

import sqlalchemy as sa

from ..exceptions import (
    ConfigurationError,
    NeedsReauthorizationError,
    RenewalError,
    RenewalTimeoutError,
)
from ..secret_key import SecretKey
from ._store import Claim, Options, Renewed, Seen, Store

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

    do: Callable[[sa.Engine], Any]


class Pause(NamedTuple):
    """Wait."""

    seconds: float


class Call(NamedTuple):
    """Call the application's function."""

    value: Any
    attempt: RenewalAttempt


Step: TypeAlias = Work | Pause | Call


class Raised:
    """An error instead of a result, without the frames of this package."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error.with_traceback(_foreign(error.__traceback__))


def _foreign(traceback: TracebackType | None) -> TracebackType | None:
    """Return `traceback` without the frames of this package, which hold values."""
    frames = []
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
            frames.append(traceback)
        traceback = traceback.tb_next
    kept = None
    for each in reversed(frames):
        kept = TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return kept


def renew(
    store: Store, key: SecretKey, options: Options, seen: Seen
) -> Generator[Step, Any, Any | Raised]:
    """Renew the secret, or wait for who does; return its value, or what was raised.

    :param seen: the secret as it was read, due.
    """
    began, first, pause = time.monotonic(), seen, _FIRST_PAUSE
    while True:
        if seen.needs_reauthorization_at is not None:
            return Raised(_needs_reauthorization(key))
        if not seen.is_leased:
            claiming = time.monotonic()
            claim = yield Work(store.claiming(key, seen, options))
            if claim is not None:
                break
        left = began + options.wait - time.monotonic()
        if left <= 0:
            if not seen.is_expired:
                return (yield Work(store.opening(key, seen)))
            return Raised(_not_in_time(key, options))
        waited = yield Pause(min(left, pause * random.uniform(0.5, 1)))  # noqa: S311  (jitter)
        if isinstance(waited, Raised):
            return waited
        pause = min(2 * pause, _LONGEST_PAUSE)
        seen = yield Work(store.reading(key))
        if isinstance(seen, Raised):
            return seen
        # A token that lives shorter than `within` is due as soon as it is there.
        is_new = seen.number != first.number and not seen.is_expired
        if is_new or not seen.is_due(options.within):
            return (yield Work(store.opening(key, seen)))
    if not isinstance(claim, Claim):
        return claim  # an error, or the value of an answer that came late
    attempt = RenewalAttempt(key, claim.number, claim.is_uncertain)
    if time.monotonic() - claiming >= options.lease:
        yield Work(store.giving_back(key, claim))
        return Raised(
            ConfigurationError(
                f"the lease of {options.lease:g} seconds on {key} was over before the claim was "
                "stored: lease= is longer than the provider takes at most"
            )
        )
    answer = yield Call(claim.take_value(), attempt)
    if not isinstance(answer, Raised):
        return (yield from _keep(store, key, options, claim, answer))
    waits_until = min(began + options.wait, claiming + options.lease)
    return (yield from _look_again(store, key, claim, answer, waits_until))


def _keep(
    store: Store, key: SecretKey, options: Options, claim: Claim, answer: Any
) -> Generator[Step, Any, Any | Raised]:
    """Store the provider's answer; return the value that counts now."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        yield Work(store.giving_back(key, claim))
        return Raised(_not_an_answer(key, answer))
    keeping = store.keeping(key, claim, answer, options)
    kept = yield Work(keeping)
    if isinstance(kept, Raised) and not isinstance(kept.error, Exception):
        # An interrupt. The answer comes first.
        yield Work(keeping)
    elif isinstance(kept, Raised) and not isinstance(kept.error, RenewalError):
        # It cannot be sealed. If it was the database, the lease stays, and tells who comes next.
        yield Work(store.giving_back(key, claim))
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
        yield Work(store.breaking_off(key, claim))
        return raised
    is_gone = says_invalid_grant(raised.error)
    pause = _FIRST_PAUSE
    while True:
        is_last = not (is_gone and claim.is_uncertain) or time.monotonic() >= waits_until
        found = yield Work(store.failing(key, claim, raised.error, is_gone, is_last))
        if isinstance(found, Renewed):
            return found.value
        if is_last or isinstance(found, Raised):
            return raised
        waited = yield Pause(pause * random.uniform(0.5, 1))  # noqa: S311  (jitter)
        if isinstance(waited, Raised):
            yield Work(store.giving_back(key, claim))
            return waited
        pause = min(2 * pause, _LONGEST_PAUSE)


def says_invalid_grant(error: BaseException) -> bool:
    """Say whether the grant is gone: RFC 6749, 5.2, as the errors of OAuth libraries have it."""
    if isinstance(error, NeedsReauthorizationError):
        return True
    return getattr(error, "error", None) == "invalid_grant"
