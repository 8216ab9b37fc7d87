"""A keyring whose primary is the one that the registry names."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.util.concurrency import in_greenlet

from .. import _key_tables
from .._database.faults import errors_of
from .._envelope import is_older
from .._subkeys import RegistryRules
from ..exceptions import ConfigurationError, LucentError
from ..keyring import Keyring
from ..rotation import keyring_of
from ._state import State

INTERVAL: Final = 30.0
"""Seconds for which a process uses what it has read. Promoting a key takes this long everywhere."""


class FollowingKeyring:
    """A function that returns a keyring, for :func:`set_default_keyring`.

    It reads the registry at its first call, and then at a call that comes 30 seconds after the last
    reading. While it reads, other threads use the keyring that they have. If the registry is out of
    reach, the keyring stays; without any reading so far, it is the process's own.

    :param engine: of the registry, with connections to spare.
    :param source: the process's keys, or a function that returns them, which is called at each
        reading.
    """

    def __init__(
        self,
        engine: sa.Engine,
        source: Keyring | Callable[[], Keyring],
        interval: float = INTERVAL,
    ) -> None:
        if isinstance(engine.pool, (sa.StaticPool, sa.SingletonThreadPool)):
            raise ConfigurationError(
                "a keyring cannot follow a registry in a SQLite memory database: reading it would "
                "end the transaction that is open. Such a database has one process, whose keyring "
                "names its primary itself"
            )
        self._engine = engine
        self._source = source
        self._own = self._current = keyring_of(source)
        self._interval = interval
        self._next = 0.0
        self._known: tuple[tuple[str, State, bytes], ...] = ()
        self.fault: str | None = None
        """The class of the error at the last reading; ``None`` if it succeeded."""

    def __call__(self) -> Keyring:
        """Return the keyring as the registry has it."""
        # An async engine can be read only where the caller awaits. No lock, which a fork might
        # leave locked: two threads that read at once do no harm.
        can_read = not self._engine.dialect.is_async or in_greenlet()
        if can_read and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            self._read()
        return self._current

    def __repr__(self) -> str:
        return f"<FollowingKeyring {self._current!r}>"

    def _read(self) -> None:
        table = _key_tables.keys
        statement = sa.select(table.c.version, table.c.state, table.c.check_id)
        errors: tuple[type[Exception], ...] = (
            SQLAlchemyError,
            LucentError,
            *errors_of(self._engine.dialect),
        )
        try:
            own = keyring_of(self._source)
            with self._engine.connect() as connection:
                rows = connection.execute(statement.order_by(table.c.version)).all()
        except errors as error:
            self.fault = type(error).__name__
            return
        self.fault = None
        known = tuple((row.version, row.state, bytes(row.check_id)) for row in rows)
        if known != self._known or own is not self._own:  # otherwise keep it, with its subkeys
            self._known, self._own = known, own
            self._current = self._keyring(known)

    def _keyring(self, known: tuple[tuple[str, State, bytes], ...]) -> Keyring:
        own = self._own
        retired = frozenset(v for v, state, _ in known if state == "retired")
        primary = next(((v, check) for v, state, check in known if state == "primary"), None)
        if primary is None:
            return own
        version, check_id = primary
        if version not in own.versions:
            fault = "which this process lacks"
        elif own.check_id(version) != check_id:
            fault = "and this process has another key under that name"
        elif own.oldest is not None and is_older(version, own.oldest):
            fault = f"which is older than {own.oldest!r}, the oldest that this process opens"
        else:
            return own.ruled(version, RegistryRules(retired))
        refusal = (
            f"the key registry names key version {version!r} as the primary, {fault}: values are "
            "opened, and none is sealed. Put the registered key into this process's keyring"
        )
        return own.ruled(own.primary, RegistryRules(retired - {own.primary}, refusal))
