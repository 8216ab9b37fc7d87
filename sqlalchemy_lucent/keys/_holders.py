"""Which process holds which key: each announces itself, and is asked before a key is promoted."""

from __future__ import annotations

import json
import re
import socket
import threading
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Self

import sqlalchemy as sa

from .. import _key_tables
from .._database.clock import database_time
from ..exceptions import ConfigurationError, KeyStateError, LucentError
from ..keyring import Keyring
from ..rotation import is_wait
from ._state import RegisteredKey, data_of

if TYPE_CHECKING:
    from .registry import KeyRegistry

DEFAULT_INTERVAL: Final = 30.0
DEFAULT_QUIET: Final = 120.0

_KIND: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_FORGOTTEN: Final = timedelta(days=7)
"""Processes that ended without saying so are deleted after this long."""


@dataclass(frozen=True)
class KeyHolder:
    """A process that announced its keys."""

    id: str
    kind: str
    host: str
    versions: tuple[str, ...]
    primary_version: str
    seen_at: datetime
    check_ids: dict[str, str] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the holder as data that :func:`json.dumps` takes."""
        return data_of(self)


@dataclass(frozen=True)
class Readiness:
    """Which of the processes that were seen lately have a key."""

    version: str
    holders: tuple[KeyHolder, ...]
    """All processes that were seen lately."""
    lacking: tuple[KeyHolder, ...]
    """Those that lack the key, or have another one under its name."""
    missing_kinds: tuple[str, ...]
    """Kinds that were asked for, and of which no process was seen."""

    @property
    def ok(self) -> bool:
        """Whether the key may be promoted."""
        return bool(self.holders) and not self.lacking and not self.missing_kinds

    @property
    def reason(self) -> str:
        """Why it may not be promoted, as a sentence; empty if it may."""
        if self.missing_kinds:
            kinds = ", ".join(map(repr, self.missing_kinds))
            return f"no process of kind {kinds} has announced itself lately"
        if not self.holders:
            return "no process has announced itself lately"
        if self.lacking:
            named = ", ".join(f"{h.kind} {h.id[:8]} on {h.host}" for h in self.lacking)
            return (
                f"{len(self.lacking)} of {len(self.holders)} processes lack the registered key of "
                f"{self.version!r}: {named}"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that :func:`json.dumps` takes."""
        return {**data_of(self), "ok": self.ok}


def check_kinds(kinds: Iterable[object]) -> tuple[str, ...]:
    """Return kinds of processes, checked.

    :raises ConfigurationError: one breaks the rule.
    """
    given = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    checked = tuple(kind for kind in given if isinstance(kind, str) and _KIND.fullmatch(kind))
    if len(checked) < len(given):
        raise ConfigurationError(
            "a kind of process is 1 to 64 characters of A-Z a-z 0-9 . _ -, such as 'web'"
        )
    return checked


def check_seconds(name: str, seconds: object) -> float:
    """Return a number of seconds above 0.

    :raises ConfigurationError: it is none.
    """
    if not is_wait(seconds) or not seconds:
        raise ConfigurationError(f"{name}= is a number of seconds, above 0 and up to a week")
    return float(seconds)


def find_readiness(
    connection: sa.Connection, key: RegisteredKey, kinds: Sequence[str], quiet: float
) -> Readiness:
    """Ask the processes that were seen in the last `quiet` seconds of the database's time."""
    table = _key_tables.holders
    since = database_time(connection) - timedelta(seconds=quiet)
    rows = connection.execute(
        sa.select(table).where(table.c.seen_at >= since).order_by(table.c.kind, table.c.id)
    )
    holders = []
    for row in rows:
        check_ids = json.loads(row.versions)
        holders.append(
            KeyHolder(
                row.id,
                row.kind,
                row.host,
                tuple(check_ids),
                row.primary_version,
                row.seen_at,
                check_ids,
            )
        )
    lacking = [h for h in holders if h.check_ids.get(key.version) != key.check_id]
    seen = {holder.kind for holder in holders}
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in seen]
    return Readiness(key.version, tuple(holders), tuple(lacking), tuple(missing))


def require_ready(
    connection: sa.Connection, key: RegisteredKey, kinds: Sequence[str], quiet: float
) -> Readiness:
    """Say which processes have a key that may be promoted.

    :raises KeyStateError: it may not.
    """
    if key.state in ("fenced", "retired"):
        undo = "unfence()" if key.state == "fenced" else "unretire()"
        raise KeyStateError(
            f"key version {key.version!r} is {key.state} and cannot be promoted; {undo} brings it "
            "back"
        )
    found = find_readiness(connection, key, kinds, quiet)
    if not found.ok:
        raise KeyStateError(
            f"key version {key.version!r} cannot be promoted: {found.reason}. Give every process "
            "the key beside its present one, have each announce() itself, and call it again"
        )
    return found


def write_holder(connection: sa.Connection, id_: str, kind: str, keyring: Keyring) -> None:
    """Write that a process is there now, with these keys."""
    table = _key_tables.holders
    now = database_time(connection)
    facts = {
        "kind": kind,
        "host": socket.gethostname()[:255],
        "versions": json.dumps({v: keyring.check_id(v).hex() for v in keyring.versions}),
        "primary_version": keyring.primary,
        "seen_at": now,
    }
    known = connection.execute(sa.update(table).where(table.c.id == id_).values(facts))
    if not known.rowcount:
        connection.execute(sa.delete(table).where(table.c.seen_at < now - _FORGOTTEN))
        connection.execute(sa.insert(table).values(id=id_, **facts))


def delete_holder(connection: sa.Connection, id_: str) -> None:
    """Write that a process has ended."""
    table = _key_tables.holders
    connection.execute(sa.delete(table).where(table.c.id == id_))


class Announcement:
    """Tells the registry, from a thread, that this process is there and which keys it holds.

    A context manager. Where there is no block to put it around, call :meth:`start` in each process
    (after a fork, since a thread does not survive one) and :meth:`stop` at its end. If the registry
    is out of reach, it tries again after the interval.
    """

    def __init__(self, registry: KeyRegistry, kind: str, interval: float) -> None:
        (self.kind,) = check_kinds([kind])
        self.id = uuid.uuid4().hex
        self._registry = registry
        self._interval = check_seconds("interval", interval)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Announce this process now, and from then on at the interval.

        :raises LucentError: the registry is out of reach, or lacks its tables.
        """
        self._registry.write_holder(self.id, self.kind)
        self._ended.clear()
        self._thread = threading.Thread(target=self._renew, name="lucent-key-holder", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Take the announcement back."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended.set()
            thread.join()
            with suppress(LucentError):  # it is forgotten after `quiet` seconds anyway
                self._registry.delete_holder(self.id)

    def _renew(self) -> None:
        while not self._ended.wait(self._interval):
            with suppress(LucentError):
                self._registry.write_holder(self.id, self.kind)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
