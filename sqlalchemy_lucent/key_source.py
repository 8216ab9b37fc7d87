"""``KeySource``: the keyring of a key manager, loaded at first use and refreshed in the background.

::

    source = KeySource(load)            # load() asks the manager and returns a Keyring
    set_default_keyring(source)
"""

from __future__ import annotations

import inspect
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from .exceptions import ConfigurationError, LucentError, PicklingRefusedError, hide_locals
from .keyring import Keyring

logger = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 1.0
"""Seconds after a failed load; doubled at each further one."""
_LONGEST_PAUSE: Final = 30.0


@dataclass(frozen=True)
class KeySourceHealth:
    """What a :class:`KeySource` can tell of itself, in this process. It holds no key."""

    ok: bool
    """Whether the last load succeeded, and none is overdue."""
    primary: str | None
    """The version that seals; ``None`` while there is no keyring."""
    loaded_at: datetime | None
    """When the keyring was loaded, in UTC."""
    age: float | None
    """Seconds since then."""
    failures: int
    """Failed loads since then."""
    error: str | None
    """The last failure: the name of the error's class, and the message of one of this package."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        loaded_at = None if self.loaded_at is None else self.loaded_at.isoformat()
        return {**asdict(self), "loaded_at": loaded_at}


class KeySource:
    """A function that returns the keyring of a key manager, for :func:`set_default_keyring` and
    wherever a function that returns a keyring may be passed.

    The first use loads the keyring, and waits for it. A daemon thread loads it again from time to
    time; while that fails, the last keyring stays, and the loads are repeated after 1 to 30
    seconds. A forked child keeps the keyring and refreshes it by a thread of its own.

    :param load: asks the manager and returns a :class:`Keyring`. It is called in a thread, one call
        at a time.
    :param refresh: seconds between two loads; ``None`` loads once.
    :param jitter: by what part of itself `refresh` may be shorter or longer, so that many processes
        do not ask at one moment.
    :param wait: seconds that the first use waits at most. Later uses get the keyring or the error
        at once.
    :raises ConfigurationError: an argument is wrong.

    Errors and the log show the class of the manager's error and not its message, which may hold a
    secret. Call `load` yourself to see it.
    """

    @hide_locals
    def __init__(
        self,
        load: Callable[[], Keyring],
        *,
        refresh: float | None = 300.0,
        jitter: float = 0.1,
        wait: float = 5.0,
    ) -> None:
        if not callable(load) or inspect.iscoroutinefunction(load):
            raise ConfigurationError(
                "load is a plain function that returns a Keyring: it runs in a thread, and nothing "
                "would await a coroutine"
            )
        if refresh is not None and not (_is_number(refresh) and refresh > 0):
            raise ConfigurationError("refresh is a number of seconds above 0, or None")
        if not (_is_number(jitter) and 0 <= jitter < 1):
            raise ConfigurationError("jitter is a number from 0 to below 1")
        if not (_is_number(wait) and wait > 0):
            raise ConfigurationError("wait is a number of seconds above 0")
        self._load = load
        self._refresh = refresh
        self._jitter = jitter
        self._wait = wait
        # By process, because a forked child has no thread, and a lock may be held for ever there.
        self._processes: dict[int, _Process] = {}
        # A source that nobody can reach any more asks the manager no more.
        weakref.finalize(self, _close_here, self._processes).atexit = False

    def __call__(self) -> Keyring:
        """Return the keyring.

        :raises ConfigurationError: it could not be loaded, or not in time.
        """
        process = self._processes.get(os.getpid()) or self._here()
        return process.keyring or process.first(self._wait)

    def health(self) -> KeySourceHealth:
        """Say how the last loads went; load nothing."""
        return self._here().health()

    def close(self) -> None:
        """End the thread of this process. The keyring stays as it is."""
        self._here().close()

    def _here(self) -> _Process:
        """Return what belongs to this process; a forked child begins with its parent's keyring."""
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            parents = list(self._processes.values())
            begun = _Process(
                self._load, self._refresh, self._jitter, parents[0] if parents else None
            )
            process = self._processes.setdefault(pid, begun)
            for other in [other for other in self._processes if other != pid]:
                self._processes.pop(other, None)
            if process is begun and process.keyring is not None:
                process.start()
        return process

    def __repr__(self) -> str:
        health = self.health()
        state = "not loaded" if health.age is None else f"loaded {health.age:.0f} s ago"
        return f"<KeySource {state}, primary={health.primary}, failures={health.failures}>"

    def __copy__(self) -> KeySource:
        return self

    def __deepcopy__(self, memo: object) -> KeySource:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PicklingRefusedError(
            "a KeySource cannot be pickled, because its keys would be in the pickle. Let the other "
            "process make its own"
        )


class _Process:
    """The keyring and the thread of one process."""

    def __init__(
        self,
        load: Callable[[], Keyring],
        refresh: float | None,
        jitter: float,
        parent: _Process | None,
    ) -> None:
        self._load = load
        self._refresh = refresh
        self._jitter = jitter
        self.keyring: Keyring | None = None
        self._loaded_at: datetime | None = None
        self._loaded = 0.0
        if parent is not None:
            self.keyring = parent.keyring
            self._loaded_at = parent._loaded_at
            self._loaded = parent._loaded
        self._failures = 0
        self._error: str | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._closed = False

    def start(self) -> None:
        """Start the thread, unless there is one."""
        with self._changed:
            self._start()

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="lucent-keys", daemon=True)
            self._thread.start()

    def first(self, wait: float) -> Keyring:
        """Wait for the first keyring, until `wait` seconds after the first use."""
        with self._changed:
            self._start()
            left = self._began + wait - time.monotonic()
            self._changed.wait_for(lambda: self.keyring is not None or self._failures, max(0, left))
            keyring, error = self.keyring, self._error
        if keyring is not None:
            return keyring
        fault = error or f"it is not there {wait:g} seconds after its first use"
        raise ConfigurationError(
            f"the keyring of the key manager could not be loaded: {fault}. It is still being "
            "tried; call the function given to KeySource() yourself to see why"
        )

    def health(self) -> KeySourceHealth:
        with self._changed:
            age = None if self._loaded_at is None else time.monotonic() - self._loaded
            overdue = age is not None and self._refresh is not None and age > 2 * self._refresh + 60
            return KeySourceHealth(
                ok=age is not None and not self._failures and not overdue,
                primary=None if self.keyring is None else self.keyring.primary,
                loaded_at=self._loaded_at,
                age=age,
                failures=self._failures,
                error=self._error,
            )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        pause = 0.0 if self.keyring is None else self._pause()
        while pause is not None and not self._is_closed_after(pause):
            keyring, error = self._ask()
            with self._changed:
                if keyring is None:
                    self._failures += 1
                    self._error = error
                else:
                    self.keyring, self._error, self._failures = keyring, None, 0
                    self._loaded, self._loaded_at = time.monotonic(), datetime.now(UTC)
                pause = self._pause()
                self._changed.notify_all()
            if error is not None:
                logger.error("the keyring could not be loaded: %s", error)

    def _is_closed_after(self, pause: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, pause)

    def _pause(self) -> float | None:
        """Return the seconds to the next load; ``None`` if there is none."""
        if self._failures:
            longest = _LONGEST_PAUSE if self._refresh is None else self._refresh
            return min(_FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10), _LONGEST_PAUSE, longest)
        if self._refresh is None:
            return None
        return self._refresh * random.uniform(1 - self._jitter, 1 + self._jitter)  # noqa: S311

    def _ask(self) -> tuple[Keyring | None, str | None]:
        """Load; return the keyring, or the fault."""
        try:
            result: object = self._load()
        except LucentError as error:
            return None, f"{type(error).__name__}: {error}"  # whose message shows no key
        except BaseException as error:  # noqa: BLE001  (or the thread would end without a word)
            return None, type(error).__name__
        if isinstance(result, Keyring):
            return result, None
        return None, f"a {type(result).__name__} was returned instead of a Keyring"


def _close_here(processes: Mapping[int, _Process]) -> None:
    process = processes.get(os.getpid())  # a lock of another process may be held for ever
    if process is not None:
        process.close()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
