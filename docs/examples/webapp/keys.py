"""The keyring of the process, and the rotation in its thread.

A real service reads its keyring from the environment (``Keyring.from_env()``, the default). A new
key version then takes two deployments: one adds the key everywhere, one promotes it. This service
is a single process with a throwaway database, so a button does both.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine

from sqlalchemy_lucent import (
    Keyring,
    LucentError,
    RotationProgress,
    RotationReport,
    VerifyReport,
    generate_master_key,
    retire_check,
    rotate,
    status,
    verify,
)

from .models import TARGETS

BATCH_SIZE: Final = 100
"""Rows per transaction. Few, so that the progress bar moves smoothly."""

SETTLE: Final = 0.5
"""Seconds between the two counts before a key is retired. Longer than any transaction of a page."""


class BusyError(Exception):
    """A rotation is running, and the request must wait for its end."""


def values_per_version(bind: Engine | Connection) -> Counter[str]:
    """Count the sealed values of all tables by key version, without opening any."""
    counts: Counter[str] = Counter()
    for row in status(bind, TARGETS).rows:
        counts[row.key_version or "not sealed"] += row.count
    return counts


@dataclass(frozen=True)
class Outcome:
    """The result of a rotation."""

    report: RotationReport
    proof: VerifyReport
    """Whether every value opens with the new key alone."""


class Rotation:
    """One run in the thread of `executor`, on a connection of its own."""

    def __init__(
        self, executor: ThreadPoolExecutor, engine: Engine, keyring: Keyring, max_rate: int
    ) -> None:
        self.key_version = keyring.primary
        self.before = values_per_version(engine)
        # The thread writes it, the pages read it. It needs no lock: it is immutable and replaced
        # as a whole.
        self.progress: RotationProgress | None = None
        self._stop = threading.Event()
        self._future: Future[Outcome] = executor.submit(self._run, engine, keyring, max_rate)

    def _run(self, engine: Engine, keyring: Keyring, max_rate: int) -> Outcome:
        report = rotate(
            engine,
            TARGETS,
            keyring=keyring,
            batch_size=BATCH_SIZE,
            max_rate=max_rate,
            on_progress=self._note,
            stop_when=lambda _: self._stop.is_set(),
        )
        new_key_alone = keyring
        for version in keyring.versions[1:]:
            new_key_alone = new_key_alone.without(version)
        return Outcome(report, verify(engine, TARGETS, keyring=new_key_alone))

    def _note(self, progress: RotationProgress) -> None:
        self.progress = progress

    def stop(self) -> None:
        """End the run after the current batch. Its work stays; a later run continues."""
        self._stop.set()

    @property
    def running(self) -> bool:
        """Whether the thread is still working."""
        return not self._future.done()

    @property
    def error(self) -> str | None:
        """Why the run failed, in a sentence; ``None`` if it did not."""
        error = None if self.running else self._future.exception()
        if error is None or isinstance(error, LucentError):
            return None if error is None else str(error)
        # Texts of other errors were not written to be shown to a browser.
        return f"the rotation ended with {type(error).__name__}"

    @property
    def outcome(self) -> Outcome | None:
        """The result of the run; ``None`` while it lasts, or if it failed."""
        if self.running or self._future.exception() is not None:
            return None
        return self._future.result()


class Keys:
    """The current keyring of the process, and the rules for changing it."""

    def __init__(self, engine: Engine, keyring: Keyring, *, max_rate: int) -> None:
        self._engine = engine
        self._keyring = keyring
        self._max_rate = max_rate
        self._versions_made = len(keyring.versions)
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rotation")
        self.rotation: Rotation | None = None

    def current(self) -> Keyring:
        """Return the keyring. The library calls this each time it seals or opens a value."""
        return self._keyring

    def add_version(self) -> str:
        """Make a key under the next version and promote it.

        :raises BusyError: a rotation is running. It seals under the key that was primary when it
            began, and would move new values back to that key.
        """
        with self._lock:
            self._raise_if_busy()
            # Never reuse a version, even if its key is gone: backups still name it.
            self._versions_made += 1
            version = f"v{self._versions_made}"
            added = self._keyring.adding(version, generate_master_key())
            self._keyring = added.with_primary(version)
            return version

    def retire(self, version: str) -> None:
        """Remove the key of `version` from the keyring.

        :raises KeyInUseError: values are sealed under it.
        :raises ConfigurationError: it is the primary, or there is no such version.
        """
        self._keyring.without(version)  # raises before anything is counted
        retire_check(self._engine, version, TARGETS, settle=SETTLE)
        with self._lock:
            self._keyring = self._keyring.without(version)

    def rotate(self) -> None:
        """Start to re-encrypt everything under the primary key.

        :raises BusyError: a rotation is running already.
        """
        with self._lock:
            self._raise_if_busy()
            self.rotation = Rotation(self._executor, self._engine, self._keyring, self._max_rate)

    @property
    def rotating(self) -> bool:
        """Whether a rotation is running."""
        return self.rotation is not None and self.rotation.running

    def _raise_if_busy(self) -> None:
        if self.rotating:
            raise BusyError("A rotation is running. Wait for its end.")

    def close(self) -> None:
        """Stop a running rotation and wait for its end."""
        if self.rotation is not None:
            self.rotation.stop()
        self._executor.shutdown()
