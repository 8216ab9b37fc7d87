"""The key registry: the steps of a key's life, each one transaction or a step that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, ClassVar

import sqlalchemy as sa

from .. import _key_tables
from .._database.clock import database_time
from .._database.connection import DEFAULT_LOCK_TIMEOUT, DEFAULT_RETRIES
from ..exceptions import ConfigurationError, KeyStateError, hide_locals
from ..keyring import Keyring, default_keyring
from ..rotation import keyring_of
from ..rotation.targets import Target
from . import _leaks
from ._following import INTERVAL, FollowingKeyring
from ._holders import (
    DEFAULT_INTERVAL,
    DEFAULT_QUIET,
    Announcement,
    Readiness,
    check_kinds,
    check_seconds,
    delete_holder,
    find_readiness,
    require_ready,
    write_holder,
)
from ._leaks import LeakReport
from ._receipts import KeyReceipt, ReceiptsReport, append_receipt, prove, read_receipts
from ._state import (
    VERBS,
    KeyCheck,
    RegisteredKey,
    State,
    add_key,
    change_state,
    notes_on,
    primary_of,
    read_keys,
    refuse_primary,
    require_key,
    require_own,
    require_same_keys,
    signer_of,
)
from ._store import Store, has_tables
from ._tables import Counts, Tables


class KeyRegistry:
    """The keys of one database and their states, in tables beside its data.

    A key is *registered*, then *ready* when every process has it, *primary* while it seals,
    *draining* once another key does, *fenced* when the database refuses its version, and *retired*
    when nothing opens under it any more. Each step has a receipt. The tables come from
    ``op.create_lucent_keys()``.

    :param engine: of the primary server.
    :param targets: as for :func:`rotate`: every table that the keys are used for.
    :param keyring: this process's keyring, or a function that returns it; the default one if left
        out.
    :raises ConfigurationError: `engine` is not an Engine.

    Every method raises :exc:`ConfigurationError` if the tables are missing, and
    :exc:`RotationError` if the database ends it, is a replica, or does not let this user.
    """

    metadata: ClassVar[sa.MetaData] = _key_tables.key_metadata
    """The tables. Add it to the ``target_metadata`` of Alembic, beside your own."""

    @hide_locals
    def __init__(
        self,
        engine: sa.Engine,
        *,
        targets: Target | Iterable[Target] | None = None,
        keyring: Keyring | Callable[[], Keyring] | None = None,
    ) -> None:
        if keyring is not None and not callable(keyring):
            keyring_of(keyring)  # refuses what is none
        self._store = Store(engine)
        self._engine = engine
        self._tables = Tables(self._store, targets)
        self._keyring = keyring

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._engine.url.render_as_string()}>"

    def exists(self) -> bool:
        """Say whether the database has the tables of a registry."""
        with self._engine.connect() as connection:
            return has_tables(connection)

    # -- registered --------------------------------------------------------------------------------

    def register(self) -> tuple[RegisteredKey, ...]:
        """Register the keys of this process that are new, and return all keys.

        In an empty registry, the keyring's primary becomes the primary; another key is draining if
        a value is under it.

        :raises WrongKeyError: this process has another key under a registered version's name.
        :raises TamperedError: a line of the registry was changed.
        """
        keyring, keys = self._own_keys()
        if all(version in keys for version in keyring.versions):
            return tuple(keys.values())
        counts = {} if keys else self._tables.counts()
        self._store.step(
            "the registration of keys", lambda connection: _register(connection, keyring, counts)
        )
        return self.registered()

    def registered(self) -> tuple[RegisteredKey, ...]:
        """Return all keys, in the order of their registration."""
        return tuple(self._keys().values())

    def check(self, *, register: bool = True) -> KeyCheck:
        """Register what is new, and fail if this process has the wrong keys.

        Call it when a process starts, so that a wrong key does not fail in a user's request later.

        :param register: ``False`` writes nothing, and notes the keys that are not registered.
        :raises WrongKeyError: this process has another key under a version's name.
        :raises TamperedError: a canary was replaced, or a line was changed.
        :raises UnknownKeyVersionError: this process lacks the primary, or a version that values
            are sealed under.
        :raises KeyStateError: this process seals with a key that is fenced or retired.
        """
        keyring = keyring_of(self._keyring)
        keys = {key.version: key for key in self.register()} if register else self._keys()
        require_same_keys(keys, keyring)
        for key in keys.values():
            if key.version in keyring.versions:
                continue
            if key.state == "primary":
                require_own(keyring, key.version, "the primary, under which others seal")
            if key.state not in ("fenced", "retired"):
                self._tables.require_unneeded(key.version)
        own = keys.get(keyring.primary)
        if own is not None and own.state in ("fenced", "retired"):
            raise KeyStateError(
                f"this process seals with key version {own.version!r}, which is {own.state}: the "
                f"database refuses what it writes. The primary is {primary_of(keys)!r}: make it "
                "the primary of this process's keyring, or use Keyring.following()"
            )
        notes = notes_on(keys, keyring, self._tables.fenced(keys))
        return KeyCheck(tuple(keys.values()), tuple(notes))

    # -- ready, primary ----------------------------------------------------------------------------

    @hide_locals
    def announce(self, kind: str, *, interval: float = DEFAULT_INTERVAL) -> Announcement:
        """Return a context manager that tells the registry which keys this process has.

        ::

            with registry.announce("web"):
                serve()

        :param kind: what the process is, such as ``web`` or ``worker``.
        :param interval: seconds between two announcements.
        """
        return Announcement(self, kind, interval)

    def write_holder(self, id_: str, kind: str) -> None:
        """Write that this process is there. :meth:`announce` calls it."""
        keyring = keyring_of(self._keyring)
        self._store.step(
            "the announcement of this process",
            lambda connection: write_holder(connection, id_, kind, keyring),
        )

    def delete_holder(self, id_: str) -> None:
        """Write that this process has ended. :meth:`announce` calls it."""
        self._store.step(
            "the end of an announcement", lambda connection: delete_holder(connection, id_)
        )

    @hide_locals
    def readiness(
        self, version: str, kinds: Iterable[str] = (), *, quiet: float = DEFAULT_QUIET
    ) -> Readiness:
        """Say which processes have a key, and name those that lack it.

        :param kinds: kinds of processes that must be there.
        :param quiet: seconds after which a process that is silent counts as gone.
        :raises KeyStateError: the registry does not know `version`.
        """
        wanted, seconds = check_kinds(kinds), check_seconds("quiet", quiet)
        return self._store.read(
            "the look at the processes",
            lambda connection: find_readiness(
                connection, require_key(read_keys(connection), version), wanted, seconds
            ),
        )

    @hide_locals
    def promote(
        self, version: str, kinds: Iterable[str] = (), *, quiet: float = DEFAULT_QUIET
    ) -> RegisteredKey:
        """Make a key the primary, once every process has it. The former primary is draining.

        Processes with :meth:`Keyring.following` seal with it within 30 seconds. A primary is left
        alone.

        :param kinds: kinds of processes that must have announced themselves.
        :param quiet: as for :meth:`readiness`.
        :raises KeyStateError: a process lacks the key, none was seen, or the key is fenced or
            retired.
        :raises UnknownKeyVersionError: this process lacks the key.
        """
        wanted, seconds = check_kinds(kinds), check_seconds("quiet", quiet)
        keyring, keys = self._own_keys()
        known = require_key(keys, version)
        if known.state == "primary":
            return known
        require_own(keyring, version, "which it is to promote")
        counts = self._tables.counts()

        def make_ready(connection: sa.Connection) -> None:
            keys = read_keys(connection)
            key = require_key(keys, version)
            if key.state in ("ready", "primary"):
                return
            found = require_ready(connection, key, wanted, seconds)
            now = database_time(connection)
            change_state(connection, version, "ready")
            held_by = [f"{h.kind} {h.id[:8]} on {h.host}" for h in found.holders]
            append_receipt(connection, keyring, keys, "ready", version, now, held_by=held_by)

        def make_primary(connection: sa.Connection) -> None:
            keys = read_keys(connection)
            key = require_key(keys, version)
            if key.state == "primary":
                return
            require_ready(connection, key, wanted, seconds)
            now = database_time(connection)
            former = primary_of(keys)
            if former is not None:
                change_state(connection, former, "draining")
            change_state(connection, version, "primary", promoted_at=now)
            append_receipt(
                connection, keyring, keys, "promote", version, now, former=former, counts=counts
            )

        what = f"the promotion of key version {version!r}"
        self._store.step(what, make_ready)
        self._store.step(what, make_primary)
        return self._key(version)

    def following(self, *, interval: float = INTERVAL) -> FollowingKeyring:
        """Return what :meth:`Keyring.following` returns, with another interval."""
        seconds = check_seconds("interval", interval)
        return FollowingKeyring(self._engine, self._keyring or default_keyring(), seconds)

    # -- fenced, retired ---------------------------------------------------------------------------

    @hide_locals
    def fence(
        self,
        version: str,
        *,
        exclude: Iterable[str] = (),
        rotate: bool = False,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
    ) -> RegisteredKey:
        """Have the database refuse new values under a key, in every column of the targets.

        :param exclude: as for :func:`retire_check`.
        :param rotate: re-encrypt every value under the primary, before and after the fence is
            there. For processes that never stop sealing under the key.
        :param lock_timeout: seconds to wait for a table, as for :func:`op.fence_key_version()
            <sqlalchemy_lucent.migrations.fence_key_version>`.
        :param retries: further attempts, likewise.
        :raises KeyInUseError: values are still under it. They are counted, and nothing is fenced.
        :raises KeyStateError: it is the primary.
        """
        return self._end(version, "fenced", exclude, rotate, lock_timeout, retries)

    @hide_locals
    def unfence(self, version: str) -> RegisteredKey:
        """Have the database take values under a fenced key again: it is draining.

        :raises KeyStateError: the key is retired, which :meth:`unretire` undoes.
        """
        if self._key(version).state == "retired":
            raise KeyStateError(
                f"key version {version!r} is retired: unretire() brings it back, and drops its "
                "fence as well"
            )
        return self._reopen(version, "unfence", "fenced")

    @hide_locals
    def retire(
        self,
        version: str,
        *,
        exclude: Iterable[str] = (),
        rotate: bool = False,
        lock_timeout: float = DEFAULT_LOCK_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
    ) -> RegisteredKey:
        """Fence a key, prove that no value is under it, and write that it is retired.

        From then on, processes that follow the registry open nothing under it. After that, take the
        key out of their environment.

        :param exclude: as for :func:`retire_check`.
        :param rotate: as for :meth:`fence`, as are `lock_timeout` and `retries`.
        :raises KeyInUseError: values are still under it, per column.
        :raises KeyStateError: it is the primary.
        """
        return self._end(version, "retired", exclude, rotate, lock_timeout, retries)

    @hide_locals
    def unretire(self, version: str) -> RegisteredKey:
        """Bring a retired key back, for a backup that was restored: it is draining.

        Its values open again, and can be rotated. The fence is dropped.

        :raises KeyStateError: it is not retired.
        """
        known = self._key(version)
        if known.state not in ("retired", "draining"):
            raise KeyStateError(
                f"key version {version!r} is {known.state}, not retired: there is nothing to undo"
            )
        return self._reopen(version, "unretire", "retired")

    # -- leaked ------------------------------------------------------------------------------------

    @hide_locals
    def leaked(self, version: str, *, since: datetime | None = None) -> LeakReport:
        """Write that a key has leaked, and return what it sealed: the values to replace.

        Call it again to see the list shrink: a line closes when another value is stored in its row.
        Re-encryption closes none, because whoever has the key may have the value.

        It cannot know who read the database or a backup. It knows the rows that are under the key
        when it is first called; of values that had left the key, the receipts have the number only.

        :param since: when it leaked; now, if nobody said so before.
        :raises KeyStateError: the registry does not know `version`.
        :raises UnknownKeyVersionError: this process lacks the primary, which signs the list.
        """
        if since is not None and since.tzinfo is None:
            raise ConfigurationError("since= is a datetime with a time zone")
        keyring, keys = self._own_keys()
        key = require_key(keys, version)
        signing = keyring.with_oldest(None).with_primary(signer_of(keys, keyring))
        leaked_since = key.leaked_since
        if leaked_since is None or (since is not None and since != leaked_since):
            leaked_since = self._mark_leaked(version, since, keyring)
        what = f"the search for values of key version {version!r}"
        unopened = self._tables.work(
            what, lambda database, found: _leaks.note_leaked(database, found, version, signing)
        )
        moment = leaked_since
        return self._store.read(
            what,
            lambda connection: _leaks.report_leaked(
                connection, version, moment, read_receipts(connection), unopened
            ),
        )

    # -- receipts ----------------------------------------------------------------------------------

    def receipts(self) -> tuple[KeyReceipt, ...]:
        """Return the receipts of all steps, in their order."""
        return self._store.read("the reading of receipts", read_receipts)

    def verify_receipts(self, head: str | None = None) -> ReceiptsReport:
        """Prove that the receipts are as they were written, and name each that is not.

        :param head: a head of an earlier report, which was kept elsewhere. It shows whether lines
            were cut off at the end since.
        :raises ConfigurationError: `head` is not one.
        """
        return prove(self.receipts(), keyring_of(self._keyring), head)

    # -- how steps are done ------------------------------------------------------------------------

    def _keys(self) -> dict[str, RegisteredKey]:
        return self._store.read("the reading of keys", read_keys)

    def _key(self, version: str) -> RegisteredKey:
        return require_key(self._keys(), version)

    def _own_keys(self) -> tuple[Keyring, dict[str, RegisteredKey]]:
        """Return this process's keyring and the registered keys, if the two agree."""
        keyring = keyring_of(self._keyring)
        keys = self._keys()
        require_same_keys(keys, keyring)
        return keyring, keys

    def _end(
        self,
        version: str,
        state: State,
        exclude: Iterable[str],
        rotate: bool,
        lock_timeout: float,
        retries: int,
    ) -> RegisteredKey:
        """Fence a key and write its new state, with a receipt of the proof."""
        keyring, known_keys = self._own_keys()
        key = require_key(known_keys, version)
        refuse_primary(key, VERBS[state])
        if state == "fenced" and key.state == "retired":
            raise KeyStateError(
                f"key version {version!r} is retired, and fenced: there is nothing to do"
            )
        primary = signer_of(known_keys, keyring)
        target = keyring.with_oldest(None).with_primary(primary) if rotate else None
        self._tables.fence(version, exclude, target, lock_timeout=lock_timeout, retries=retries)
        if key.state == state:
            return key
        counts = self._tables.counts()

        def write(connection: sa.Connection) -> None:
            keys = read_keys(connection)
            known = require_key(keys, version)
            refuse_primary(known, VERBS[state])
            if known.state == state:
                return
            now = database_time(connection)
            times: dict[str, datetime] = {f"{state}_at": now}
            if known.fenced_at is None:
                times["fenced_at"] = now
            change_state(connection, version, state, **times)
            append_receipt(
                connection, keyring, keys, VERBS[state], version, now, counts=counts, fenced=True
            )

        self._store.step(f"the receipt of key version {version!r}", write)
        return self._key(version)

    def _reopen(self, version: str, action: str, state: State) -> RegisteredKey:
        """Write that a key is draining again, then drop its fences."""
        keyring, _ = self._own_keys()

        def write(connection: sa.Connection) -> None:
            keys = read_keys(connection)
            if require_key(keys, version).state != state:
                return  # it was done, and the fences are left
            now = database_time(connection)
            change_state(connection, version, "draining", fenced_at=None, retired_at=None)
            append_receipt(connection, keyring, keys, action, version, now)

        self._store.step(f"{action}() of key version {version!r}", write)
        self._tables.unfence(version)
        return self._key(version)

    def _mark_leaked(self, version: str, since: datetime | None, keyring: Keyring) -> datetime:
        def write(connection: sa.Connection) -> datetime:
            keys = read_keys(connection)
            key = require_key(keys, version)
            now = database_time(connection)
            moment = (since or now).astimezone(UTC)
            if key.leaked_since == moment:
                return moment
            change_state(connection, version, key.state, leaked_since=moment)
            append_receipt(
                connection, keyring, keys, "leak", version, now, since=moment.isoformat()
            )
            return moment

        return self._store.step(f"the leak of key version {version!r}", write)


def _register(connection: sa.Connection, keyring: Keyring, counts: Counts) -> None:
    keys = read_keys(connection)
    require_same_keys(keys, keyring)
    now = database_time(connection)
    for version in keyring.versions:  # the primary first
        if version in keys:
            continue
        state: State = "registered"
        if primary_of(keys) is None:
            state = "primary"
        elif any(versions.get(version) for versions in counts.values()):
            state = "draining"
        add_key(connection, keyring, version, state, now)
        keys = read_keys(connection)
        details: dict[str, Any] = {"state": state, "check_id": keyring.check_id(version).hex()}
        if state == "primary":
            details["counts"] = counts
        append_receipt(connection, keyring, keys, "register", version, now, **details)
