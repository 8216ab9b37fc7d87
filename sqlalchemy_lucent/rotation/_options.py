"""The options of a rotation, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeGuard

from .._database.connection import DEFAULT_RETRIES, check_retries
from ..exceptions import RotationError
from ..keyring import Keyring, default_keyring
from .report import RotationProgress

DEFAULT_BATCH_SIZE: Final = 1000
"""Rows per transaction: few enough to hold locks for milliseconds only, and many enough that
commits take little of the time."""

_LONGEST_WAIT: Final = 604_800
"""Seconds. Python's own waits overflow somewhere beyond it."""


@dataclass(frozen=True)
class RotationOptions:
    """The options of :func:`rotate`, which says what each is."""

    batch_size: int = DEFAULT_BATCH_SIZE
    batch_time: float | None = None
    max_rate: float | None = None
    pause: float = 0.0
    retries: int = DEFAULT_RETRIES
    on_error: Literal["report", "raise"] = "report"
    on_progress: Callable[[RotationProgress], object] | None = None
    stop_when: Callable[[RotationProgress], object] | None = None
    dry_run: bool = False

    @property
    def may_read_ahead(self) -> bool:
        """Whether a batch may begin before the last one has ended."""
        is_throttled = self.pause or self.max_rate is not None or self.batch_time is not None
        return not (is_throttled or self.dry_run or self.on_error == "raise")

    def __post_init__(self) -> None:
        check_rows("batch_size", self.batch_size)
        check_retries(self.retries)
        if self.batch_time is not None and not (is_number(self.batch_time) and self.batch_time > 0):
            raise RotationError("batch_time is a number of seconds above 0")
        if self.max_rate is not None and not (is_number(self.max_rate) and self.max_rate >= 1):
            raise RotationError("max_rate is a number of rows per second, 1 or more")
        if not is_wait(self.pause):
            raise RotationError("pause is a number of seconds, from 0 to a week (604,800)")
        if self.on_error not in ("report", "raise"):
            raise RotationError('on_error is "report" or "raise"')
        if not isinstance(self.dry_run, bool):
            raise RotationError("dry_run is True or False")
        for name in ("on_progress", "stop_when"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise RotationError(f"{name} is a function of the progress")
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
                getattr(function, "__call__", None)  # noqa: B004  (of an object that is called)
            ):
                raise RotationError(
                    f"{name} is a plain function, also for arotate(): nothing would await a "
                    "coroutine"
                )


def check_rows(name: str, number: object) -> None:
    """Check an argument called `name`, which is a number of rows.

    :raises RotationError: it is not a whole number, or below 1.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise RotationError(f"{name} is a whole number of rows, 1 or more")


def is_number(value: object) -> TypeGuard[float]:
    """Say whether `value` is a finite number, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_wait(value: object) -> TypeGuard[float]:
    """Say whether `value` is a number of seconds from 0 to a week, which any clock can wait."""
    return is_number(value) and 0 <= value <= _LONGEST_WAIT


def names_of(name: str, given: object) -> tuple[str, ...]:
    """Return the names in `given`, an argument called `name`: one name, or several.

    :raises RotationError: it is something else.
    """
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Iterable):
        names = tuple(given)
        if all(isinstance(each, str) for each in names):
            return names
    raise RotationError(f"{name} is a name, or several in a list")


def keyring_of(keyring: Keyring | Callable[[], Keyring] | None) -> Keyring:
    """Return `keyring`, or what it returns; the default keyring for ``None``.

    :raises RotationError: it is neither a keyring nor a function that returns one.
    """
    if keyring is None:
        return default_keyring()
    if not isinstance(keyring, Keyring) and callable(keyring):
        keyring = keyring()
    if not isinstance(keyring, Keyring):
        raise RotationError(
            f"keyring= is a Keyring or a function that returns one, not a {type(keyring).__name__}"
        )
    return keyring
