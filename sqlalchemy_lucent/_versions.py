"""The steps that change the versions and the state of one secret.

Each begins with :meth:`SecretHistory.lock`, which waits for other steps at the same key, and gives
a number to a value that a store without versions has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa

from . import _upsert
from ._lifecycle import NO_NUMBER, Stage, describes, is_ordinary, required_tables, run
from ._payloads import open_payload, seal_payload
from ._sealing import Sealed
from ._sql import is_mysql
from ._upsert import has_key, same_key
from .exceptions import ConflictError, DecryptionError, hide_locals
from .keyring import Keyring
from .models import utc_now
from .secret_key import SecretKey

_ATTEMPTS: Final = 5
"""Attempts at a row that others delete and create. A second is rare."""


@dataclass
class State:
    """The state of a locked secret, as :meth:`SecretHistory.save` stores it; and its value."""

    number: int
    """Of the current value; 0 if there is none."""
    last_number: int
    written_at: datetime | None
    expires_at: datetime | None
    needs_reauthorization_at: datetime | None
    lease_number: int
    lease_until: datetime | None
    created_at: datetime | None
    deleted_at: datetime | None
    purge_at: datetime | None

    # What follows has a default, and is not stored.
    current: Sealed | None = None
    """The current value. The fields below are of its row; meaningless without one."""
    stored_at: datetime | None = None
    stored_since: datetime | None = None
    had_secret: bool = False
    """Whether there was a secret that a store without versions has deleted."""

    def take_number(self) -> int:
        """Return the number of another value."""
        self.last_number += 1
        return self.last_number


_STATE_COLUMNS: Final = tuple(field.name for field in fields(State) if field.default is MISSING)


class SecretHistory:
    """One secret, its versions and its state, in the caller's transaction.

    :param table: the table of secrets.
    :param execute: executes a statement of Core with parameters.
    :param keep: how many values of the secret remain, the current one included; ``None`` for all.
    :raises ConfigurationError: the metadata has no tables beside `table`. Every method raises it if
        the database has none.
    """

    def __init__(
        self,
        table: sa.Table,
        key: SecretKey,
        execute: _upsert.Execute,
        dialect: sa.Dialect,
        keyring: Keyring | None = None,
        *,
        keep: int | None = None,
    ) -> None:
        self.key = key
        self.tables = required_tables(table)
        self.table = table
        self._versions, self._states = self.tables
        self._dialect = dialect
        self._keyring = keyring
        self._keep = keep
        self._execute = execute

    def _run(self, statement: Any, parameters: Any = None) -> sa.CursorResult[Any]:
        return run(self._execute, self.tables, statement, parameters)

    # -- the state -------------------------------------------------------------------------------

    def lock(self, *, to_insert: bool = False) -> State:
        """Wait for other steps at this key, and return its state, with a number for its value.

        :param to_insert: whether a secret may be inserted. On MySQL and MariaDB, locking a row that
            is not there locks the gap where it would be, and callers that insert into one gap would
            deadlock; so a secret that seems not to exist is not locked then.
        """
        insert = _upsert.insert_or(self._states, self._dialect.name)
        counters = {"number": 0, "last_number": 0, "lease_number": 0}
        selected = sa.select(*(self._states.c[name] for name in _STATE_COLUMNS))
        selected = selected.where(has_key(self._states, self.key)).with_for_update()
        for _ in range(_ATTEMPTS):
            self._run(insert, {**self.key._asdict(), **counters})
            row = self._run(selected).first()
            if row is not None:
                break
        else:
            raise ConflictError(f"other writers kept deleting the secret {self.key}. Try again")
        state = State(*tuple(row))
        # What MySQL reads without a lock may be of an older state. It only makes a difference to a
        # secret that no state describes, and an INSERT will tell.
        if to_insert and is_mysql(self._dialect) and state.written_at is None:
            exists = sa.select(sa.literal(1)).where(has_key(self.table, self.key))
            if self._run(exists).first() is not None:
                self._read_current(state)
        else:
            self._read_current(state)
        self._adopt(state)
        return state

    def _read_current(self, state: State) -> None:
        columns = self.table.c
        statement = sa.select(columns.payload, columns.updated_at, columns.created_at)
        row = self._run(statement.where(has_key(self.table, self.key)).with_for_update()).first()
        if row is not None:
            state.current, state.stored_at, state.stored_since = tuple(row)

    def _adopt(self, state: State) -> None:
        """Make the state that of the current value, whoever stored it."""
        if state.current is None:
            if state.written_at is not None:  # deleted by a store without versions
                self._delete_versions(~self._has_stage("deleted"))
                state.had_secret = True
            state.number = 0
        elif state.written_at != state.stored_at:
            state.number = state.take_number()
        else:
            return
        state.written_at = state.stored_at
        state.expires_at = state.needs_reauthorization_at = None

    def save(self, state: State) -> None:
        """Store the state."""
        values = {name: getattr(state, name) for name in _STATE_COLUMNS}
        statement = sa.update(self._states).where(has_key(self._states, self.key))
        self._run(statement.values(values))

    def note_expiry(self, written_at: datetime, expires_at: datetime | None) -> None:
        """Store the state of a value that is about to be written, with one upsert.

        It gives the value a number, and archives nothing.
        """
        updated = ("written_at", "expires_at", "needs_reauthorization_at")
        insert = _upsert.insert_or(self._states, self._dialect.name, *updated, numbered=True)
        values = {"number": 1, "last_number": 1, "lease_number": 0}
        times = {
            "written_at": written_at,
            "expires_at": expires_at,
            "needs_reauthorization_at": None,
        }
        self._run(insert, {**self.key._asdict(), **values, **times})

    def forget(self) -> None:
        """Delete the versions and the state."""
        self._delete_versions(sa.true())
        self._run(sa.delete(self._states).where(has_key(self._states, self.key)))

    # -- the current value -----------------------------------------------------------------------

    @hide_locals
    def open_current(self, state: State) -> Any:
        """Return the current value.

        :raises DecryptionError: it does not open.
        """
        assert state.current is not None
        return self.open(None, state.current)

    @hide_locals
    def seal(self, value: Any) -> Sealed:
        """Seal a value for the secret's own row."""
        return seal_payload(self.table, self._dialect, self.key, value, self._keyring)

    def write_current(
        self,
        state: State,
        sealed: Sealed,
        *,
        expires_at: datetime | None = None,
        archive: bool = True,
        only_new: bool = False,
    ) -> bool:
        """Make `sealed` the current value under a new number; archive what it replaces.

        The state is stored, with the lease that it has.

        :param only_new: insert the secret, or return ``False`` if there is one.
        :raises DecryptionError: the value that it replaces does not open, so it cannot be kept.
        """
        for _ in range(_ATTEMPTS):
            now = utc_now()
            if state.current is not None:
                if archive:
                    self.archive(state)
                statement = sa.update(self.table).where(has_key(self.table, self.key))
                self._run(statement.values(payload=sealed, updated_at=now))
                break
            if self.insert_current(sealed, created_at=now, updated_at=now):
                state.stored_since = now
                break
            if only_new:
                return False
            # A store that does not lock was faster. Its value is archived like any other.
            self._read_current(state)
            self._adopt(state)
        else:
            raise ConflictError(f"other writers kept changing the secret {self.key}. Try again")
        state.number = state.take_number()
        state.current, state.stored_at = sealed, now
        state.written_at, state.expires_at = now, expires_at
        state.needs_reauthorization_at = None
        self.save(state)
        self.trim(state)
        return True

    def insert_current(self, sealed: Sealed, *, created_at: datetime, updated_at: datetime) -> bool:
        """Insert the secret's row unless there is one; return whether it was inserted."""
        times = {"created_at": created_at, "updated_at": updated_at}
        row = {**self.key._asdict(), "payload": sealed, **times}
        return _upsert.insert_absent(self._run, self.table, self._dialect, row)

    def delete_softly(self, state: State, purge_after: timedelta) -> None:
        """Move the current value to the versions, to be undeleted until it is purged."""
        self.archive(state, "deleted")
        self.supersede("deleted", state.number)
        self.delete_current()
        state.created_at, state.deleted_at = state.stored_since, utc_now()
        state.purge_at = state.deleted_at + purge_after
        state.number, state.written_at = 0, None
        state.expires_at = state.needs_reauthorization_at = None
        self.save(state)

    def undelete(self, state: State, deleted: sa.Row[Any], sealed: Sealed) -> bool:
        """Store a deleted secret as it was; return whether there was no other."""
        times = {"created_at": state.created_at or utc_now(), "updated_at": deleted.created_at}
        if not self.insert_current(sealed, **times):
            return False
        self.delete_version(deleted.number)
        state.number, state.written_at = deleted.number, deleted.created_at
        state.expires_at = deleted.expires_at
        state.created_at = state.deleted_at = state.purge_at = None
        self.save(state)
        return True

    def purge_deleted(self, state: State) -> None:
        """Delete what was deleted softly; without another secret, all versions but a staged one.

        The caller stores the state afterwards.
        """
        stage = "deleted" if state.current is not None else "staged"
        condition = self._has_stage(stage)
        self._delete_versions(condition if state.current is not None else ~condition)
        state.created_at = state.deleted_at = state.purge_at = None

    def delete_current(self) -> None:
        """Delete the secret's row."""
        self._run(sa.delete(self.table).where(has_key(self.table, self.key)))

    # -- versions --------------------------------------------------------------------------------

    @hide_locals
    def archive(self, state: State, stage: Literal["deleted"] | None = None) -> None:
        """Store the current value as a version under its number.

        :raises DecryptionError: it does not open, so it cannot be sealed as a version.
        """
        assert state.stored_at is not None
        try:
            sealed = self.seal_version(state.number, self.open_current(state))
        except DecryptionError as error:
            refusal = error
        else:
            self.insert_version(
                state.number, sealed, stage, state.expires_at, created_at=state.stored_at
            )
            return
        raise type(refusal)(
            f"{refusal}. So the value under {self.key} cannot be kept as a version. A "
            "LucentSecrets without keep= may overwrite or delete it"
        )

    @hide_locals
    def add_version(
        self,
        state: State,
        value: Any,
        stage: Literal["staged", "pending"] | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[int, Sealed]:
        """Store a value that is not current; return its new number and the sealed value.

        The caller stores the state afterwards.
        """
        number = state.take_number()
        sealed = self.seal_version(number, value)
        self.insert_version(number, sealed, stage, expires_at, utc_now())
        return number, sealed

    @hide_locals
    def seal_version(self, number: int, value: Any) -> Sealed:
        """Seal a value as the version `number`."""
        return seal_payload(self._versions, self._dialect, self.key, value, self._keyring, number)

    def insert_version(
        self,
        number: int,
        sealed: Sealed,
        stage: str | None,
        expires_at: datetime | None,
        created_at: datetime,
    ) -> None:
        """Store a sealed version."""
        values = {
            **self.key._asdict(),
            "number": number,
            "payload": sealed,
            "stage": stage,
            "expires_at": expires_at,
            "created_at": created_at,
        }
        self._run(sa.insert(self._versions), values)

    @hide_locals
    def open(self, number: int | None, sealed: Sealed) -> Any:
        """Return the value of a version, or of the current row if `number` is ``None``.

        :raises DecryptionError: it does not open.
        """
        return open_payload(sealed, self.key, self._keyring, number)

    def read(self, number: int | None, stage: Stage | None) -> tuple[int | None, Sealed] | None:
        """Return the number and the payload of a version, or ``None``; the current has no number.

        One SELECT. Versions of a secret that does not exist, or is deleted, are not found, except a
        staged value.
        """
        table, states, versions = self.table, self._states, self._versions
        if stage == "current":
            row = self._run(sa.select(table.c.payload).where(has_key(table, self.key))).first()
            return None if row is None else (None, row.payload)
        if stage == "staged":
            found = self.find_stage("staged", lock=False)
            return None if found is None else (found.number, found.payload)
        current = states.c.number  # NULL if the state describes another value
        if stage == "previous":
            wanted = is_ordinary(versions, sa.func.coalesce(current, NO_NUMBER))
        elif stage == "pending":
            wanted = sa.and_(versions.c.stage == "pending", versions.c.number > current)
        else:
            wanted = sa.and_(versions.c.number == number, ~self._has_stage("deleted"))
        secret = table.outerjoin(states, describes(states, table))
        archived = versions.c.payload.label("archived")
        statement = (
            sa.select(current.label("current"), table.c.payload, versions.c.number, archived)
            .select_from(secret.outerjoin(versions, sa.and_(same_key(versions, table), wanted)))
            .where(has_key(table, self.key))
            .order_by(versions.c.number.desc())
            .limit(1)
        )
        row = self._run(statement).first()
        if row is None:
            return None
        if number is not None and row.current == number:
            return None, row.payload
        return None if row.number is None else (row.number, row.archived)

    def find(self, condition: sa.ColumnElement[bool], *, lock: bool = True) -> sa.Row[Any] | None:
        """Return the newest version that fits, as :meth:`all_versions` does.

        :param lock: read what is committed now, for a step that depends on it.
        """
        number = self._versions.c.number
        statement = self._select_versions().where(condition).order_by(number.desc()).limit(1)
        return self._run(statement.with_for_update() if lock else statement).first()

    def find_number(self, number: int) -> sa.Row[Any] | None:
        """Return the version with this number, unless it is that of a deleted secret."""
        return self.find(sa.and_(self._versions.c.number == number, ~self._has_stage("deleted")))

    def find_stage(
        self, stage: Literal["staged", "deleted"], *, lock: bool = True
    ) -> sa.Row[Any] | None:
        """Return the version in this stage."""
        return self.find(self._has_stage(stage), lock=lock)

    def find_pending(self, state: State) -> sa.Row[Any] | None:
        """Return the answer of a renewal that came late, unless a later value is stored."""
        columns = self._versions.c
        return self.find(sa.and_(columns.stage == "pending", columns.number > state.number))

    def delete_version(self, number: int) -> None:
        """Delete one version."""
        self._delete_versions(self._versions.c.number == number)

    def supersede(self, stage: Literal["staged", "deleted"], number: int) -> None:
        """Let `number` be the only version in `stage`.

        An earlier staged value is deleted. An earlier deleted secret's becomes an ordinary version.
        """
        columns = self._versions.c
        earlier = sa.and_(columns.stage == stage, columns.number < number)
        if stage == "staged":
            self._delete_versions(earlier)
        else:
            statement = sa.update(self._versions).where(has_key(self._versions, self.key), earlier)
            self._run(statement.values(stage=None))

    def all_versions(self) -> Sequence[sa.Row[Any]]:
        """Return number, payload, stage, expires_at and created_at of each version; lock them."""
        return self._run(self._select_versions().with_for_update()).all()

    def _select_versions(self) -> sa.Select[Any]:
        names = "number", "payload", "stage", "expires_at", "created_at"
        columns = (self._versions.c[name] for name in names)
        return sa.select(*columns).where(has_key(self._versions, self.key))

    def trim(self, state: State) -> None:
        """Delete ordinary versions beyond those that are kept."""
        if self._keep is None:
            return
        columns = self._versions.c
        ordinary = is_ordinary(self._versions, state.number)
        statement = (
            sa.select(columns.number)
            .where(has_key(self._versions, self.key), ordinary)
            .order_by(columns.number.desc())
            .limit(1)
            .offset(self._keep - 1)
        )
        oldest = self._run(statement).scalar()
        if oldest is not None:
            self._delete_versions(sa.and_(ordinary, columns.number <= oldest))

    def _delete_versions(self, condition: sa.ColumnElement[bool]) -> None:
        self._run(sa.delete(self._versions).where(has_key(self._versions, self.key), condition))

    def _has_stage(self, stage: str) -> sa.ColumnElement[bool]:
        return sa.func.coalesce(self._versions.c.stage, "") == stage
