"""The keys of the process, their life in the key registry, and the rotation in its thread.

A real service reads its keys from the environment (``Keyring.from_env()``, the default), and a
deployment adds one. This service is a single process with a throwaway database, so a button does.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine

from sqlalchemy_lucent import (
    KeyRegistry,
    Keyring,
    LucentError,
    RotationProgress,
    RotationReport,
    VerifyReport,
    generate_master_key,
    rotate,
    verify,
)

from .models import TARGETS

BATCH_SIZE: Final = 100
"""Rows per transaction. Few, so that the progress bar moves smoothly."""


class BusyError(Exception):
    """A rotation is running, and the request must wait for its end."""


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
    """The keys of the process and their states in the registry of the database."""

    def __init__(self, engine: Engine, keyring: Keyring, *, max_rate: int) -> None:
        self._engine = engine
        self._own = keyring
        self._max_rate = max_rate
        self.registry = KeyRegistry(engine, targets=TARGETS, keyring=lambda: self._own)
        self.registry.check()  # with a wrong key, the service does not start
        self._announcement = self.registry.announce("web").start()
        self._following = self.registry.following()
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rotation")
        self.rotation: Rotation | None = None

    def current(self) -> Keyring:
        """Return the keyring. The library calls this each time it seals or opens a value."""
        return self._following()

    def add_version(self) -> None:
        """Make a key under the next version and register it. It opens values and seals none."""
        with self._lock:
            # Never reuse a version, even if its key is gone: backups still name it.
            version = f"v{len(self.registry.registered()) + 1}"
            self._own = self._own.adding(version, generate_master_key())
            self.registry.register()
            # As a deployment would: the process ends and comes back with both keys.
            self._announcement.stop()
            self._announcement.start()
            self._follow()

    def promote(self, version: str) -> None:
        """Have new values sealed under `version`.

        :raises BusyError: a rotation is running. It seals under the key that was primary when it
            began, and would move new values back to that key.
        :raises KeyStateError: the registry does not know the version, or it is fenced or retired.
        """
        with self._lock:
            self._raise_if_busy()
            self.registry.promote(version, kinds=["web"])
            self._follow()

    def retire(self, version: str) -> None:
        """Have the database refuse `version`, and remove its key from this process.

        :raises KeyInUseError: values are sealed under it.
        :raises KeyStateError: it is the primary, or the registry does not know it.
        """
        with self._lock:
            self.registry.retire(version)
            if version in self._own.versions:
                self._own = self._own.with_primary(self.current().primary).without(version)
            self._follow()

    def _follow(self) -> None:
        # A keyring reads the registry every 30 seconds. Here, a button shows its effect at once.
        self._following = self.registry.following()

    def rotate(self) -> None:
        """Start to re-encrypt everything under the primary key.

        :raises BusyError: a rotation is running already.
        """
        with self._lock:
            self._raise_if_busy()
            self.rotation = Rotation(self._executor, self._engine, self.current(), self._max_rate)

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
        self._announcement.stop()
