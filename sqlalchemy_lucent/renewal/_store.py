"""What renewals read and write: each step is one short transaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from .._database.clock import database_time
from .._database.connection import DEFAULT_RETRIES, ManagedConnection
from .._database.faults import Fault
from .._lifecycle import check_moment, describes, required_tables, run, time_of
from .._payloads import open_payload, read_payload
from .._sealing import Sealed
from .._sql import is_psycopg
from .._upsert import KEY_PARAMETERS, has_key
from .._versions import SecretHistory, State
from ..events import AccessHandler, Action, SecretAccess
from ..exceptions import (
    ConflictError,
    DecryptionError,
    RenewalError,
    RotationError,
    SecretNotFoundError,
    SerializationError,
)
from ..keyring import Keyring
from ..models import LucentSecretMixin, utc_now
from ..repository import LucentSecrets
from ..secret_key import SecretKey

_T = TypeVar("_T")

_ATTEMPTS: Final = 5

_FEW_RETRIES: Final = 3
"""For work that another caller can repeat. A provider's answer cannot be had again, so storing it
uses :data:`DEFAULT_RETRIES`."""


class Options(NamedTuple):
    """What a caller of ``fresh`` asked for."""

    within: timedelta
    lease: float
    wait: float


class Seen(NamedTuple):
    """A secret and its state at one moment of the database's time.

    Without a number, the state describes another value than the one that is stored.
    """

    payload: Sealed
    number: int | None
    expires_at: datetime | None
    needs_reauthorization_at: datetime | None
    lease_number: int | None
    lease_until: datetime | None
    now: datetime

    def is_due(self, within: timedelta) -> bool:
        return _is_due(self.expires_at, self.now + within)

    @property
    def is_expired(self) -> bool:
        return _is_due(self.expires_at, self.now)

    @property
    def is_leased(self) -> bool:
        return self.lease_until is not None and self.lease_until > self.now


def _is_due(expires_at: datetime | None, by: datetime) -> bool:
    return expires_at is not None and expires_at <= by


@lru_cache(maxsize=32)
def _select_current(table: sa.Table, states: sa.Table, dialect: sa.Dialect) -> sa.Select[Any]:
    """Return the SELECT of the payload, its expiry and the time, by `KEY_PARAMETERS`.

    Most calls need no more. It costs least with few columns, and without a join to plan.
    """
    is_of_value = states.c.written_at == table.c.updated_at
    expires_at = sa.select(states.c.expires_at).where(has_key(states, KEY_PARAMETERS), is_of_value)
    expiry = expires_at.correlate(table).scalar_subquery()
    columns = table.c.payload, expiry.label("expires_at"), time_of(dialect).label("now")
    return sa.select(*columns).where(has_key(table, KEY_PARAMETERS))


@lru_cache(maxsize=32)
def _select_seen(
    table: sa.Table, states: sa.Table, dialect: sa.Dialect, *, lock: bool = False
) -> sa.Select[Any]:
    """Return the SELECT of a :class:`Seen`, by `KEY_PARAMETERS`.

    :param lock: lock both rows. Those that a writer has locked are skipped.
    """
    of_state = [states.c[name] for name in Seen._fields[1:-1]]
    statement = (
        sa.select(table.c.payload, *of_state, time_of(dialect).label("now"))
        .select_from(table.join(states, describes(states, table), isouter=not lock))
        .where(has_key(table, KEY_PARAMETERS))
    )
    return statement.with_for_update(skip_locked=True) if lock else statement


@dataclass
class Claim:
    """A lease that was taken, to renew one value."""

    number: int
    is_uncertain: bool
    until: datetime
    began: float
    """When it was taken, by this process's monotonic clock."""
    value_number: int
    value: Any = field(repr=False)
    """The value to renew; ``None`` once it was taken out."""
    sealed: Sealed | None = None
    added: int | None = None
    """What was stored last, under which number: whether it was committed is not known after a
    connection was lost."""

    def take_value(self) -> Any:
        """Return the value, and hold it no more."""
        value, self.value = self.value, None
        return value


class Renewed(NamedTuple):
    """The value that another process got meanwhile."""

    value: Any
    sealed: Sealed | None


class _Kept(NamedTuple):
    """What became of an answer, and the value for the caller."""

    value: Any
    sealed: Sealed
    outcome: str
    fault: SerializationError | None = None


class Store:
    """The secrets of one model, as renewals read and write them.

    :raises ConfigurationError: an argument is of a wrong type.
    """

    def __init__(
        self,
        engine: sa.Engine,
        keyring: Keyring | None,
        model: type[LucentSecretMixin],
        keep: int | None,
        on_access: AccessHandler | None,
    ) -> None:
        # It checks what is the same for both.
        LucentSecrets(Session(), keyring=keyring, model=model, keep=keep, on_access=on_access)
        table: Any = sa.inspect(model).local_table
        self.table: sa.Table = table
        self.tables = required_tables(table)
        self._engine = engine
        # One statement needs no BEGIN and ROLLBACK, which are round trips of their own. asyncpg
        # needs them behind a pooler; drivers of MySQL would need as many to change the mode.
        self._reader = engine
        if is_psycopg(engine.dialect):
            self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._keyring = keyring
        self._kept = keep
        self._on_access = on_access
        sources = table, self.tables.states, engine.dialect
        self._select_current = _select_current(*sources)
        self._select_seen = _select_seen(*sources)
        self._select_to_claim = _select_seen(*sources, lock=True)

    # -- reading -----------------------------------------------------------------------------------

    def current(self, key: SecretKey, within: timedelta) -> Sealed | None:
        """Return the value, or ``None`` if it is due, by one statement.

        :raises SecretNotFoundError: there is none.
        """
        payload, expires_at, now = self._one(key, self._select_current)
        return None if _is_due(expires_at, now + within) else payload

    def read(self, key: SecretKey) -> Seen:
        """Read the secret and its state, by one statement.

        :raises SecretNotFoundError: there is none.
        """
        return Seen._make(self._one(key, self._select_seen))

    def _one(self, key: SecretKey, statement: sa.Select[Any]) -> Any:
        with self._reader.connect() as connection:
            row = run(connection.execute, self.tables, statement, key._asdict()).first()
        if row is not None:
            return row
        self._tell("read", key, None, "missing")
        raise SecretNotFoundError(f"no secret is stored under {key}")

    def open(self, key: SecretKey, sealed: Sealed) -> Any:
        """Open the value, for the caller."""
        return read_payload(sealed, key, self._keyring, self._tell)

    # -- the lease ---------------------------------------------------------------------------------

    def claim(self, key: SecretKey, seen: Seen, options: Options) -> Claim | Renewed | None:
        """Take the lease; return ``None`` if another caller has it, or the secret has changed.

        An answer that came late becomes current first. If it is not due, nobody has the lease, and
        its value is returned.
        """
        claimed: Claim | None = None

        def work(connection: sa.Connection) -> Claim | Renewed | None:
            nonlocal claimed
            # Rows that a writer has locked are skipped: it may be the caller's own transaction.
            began = time.monotonic()
            row = run(connection.execute, self.tables, self._select_to_claim, key._asdict()).first()
            if row is None:
                return None
            now = Seen._make(row)
            lease = now.lease_number, now.lease_until
            if claimed is not None and lease == (claimed.number, claimed.until):
                return claimed  # it was committed when the connection was lost
            if now.number != seen.number or now.is_leased or not now.is_due(options.within):
                return None
            history = self._history(key, connection)
            state = history.lock()
            was_taken = self._take_pending(history, state)
            value = history.open_current(state)
            if was_taken and not _is_due(state.expires_at, now.now + options.within):
                state.lease_until = None
                history.save(state)
                return Renewed(value, state.current)
            # A value that was pending has not been with the holder before.
            is_uncertain = state.lease_until is not None and not was_taken
            state.lease_number += 1
            state.lease_until = now.now + timedelta(seconds=options.lease)
            history.save(state)
            claimed = Claim(
                state.lease_number, is_uncertain, state.lease_until, began, state.number, value
            )
            return claimed

        found = self._transaction(work, _FEW_RETRIES)
        if isinstance(found, Renewed):
            self._tell("renew", key, found.sealed, "ok")
        return found

    def give_back(self, key: SecretKey, claim: Claim) -> None:
        """Let the next caller claim at once."""
        self._end_lease(key, claim, None)

    def break_off(self, key: SecretKey, claim: Claim) -> None:
        """Let the next caller claim at once, and be told that the provider may have answered."""
        self._end_lease(key, claim, time_of(self._engine.dialect))

    def _end_lease(self, key: SecretKey, claim: Claim, until: Any) -> None:
        states = self.tables.states
        mine = sa.and_(has_key(states, key), states.c.lease_number == claim.number)
        statement = sa.update(states).where(mine).values(lease_until=until)
        self._transaction(lambda connection: connection.execute(statement), _FEW_RETRIES)

    # -- the answer --------------------------------------------------------------------------------

    def keep(self, key: SecretKey, claim: Claim, answer: tuple[Any, Any]) -> Any:
        """Store the provider's answer; return the value that counts for the caller.

        :raises SerializationError: the value cannot be sealed, and is lost; or the expiry is wrong,
            and the value is kept for the next holder.
        """
        for _ in range(_ATTEMPTS):
            try:
                kept = self._transaction(lambda c: self._store(key, claim, answer, c))
                break
            except ConflictError as error:
                conflict = error
        else:
            raise conflict
        self._tell("renew", key, kept.sealed, kept.outcome)
        if kept.fault is not None:
            raise kept.fault
        return kept.value

    def _store(
        self, key: SecretKey, claim: Claim, answer: tuple[Any, Any], connection: sa.Connection
    ) -> _Kept:
        history = self._history(key, connection)
        sealed = history.seal(answer[0])  # first of all: whether it can be
        value = open_payload(sealed, key, self._keyring)
        state = history.lock()
        now = database_time(connection)
        is_mine = state.lease_number == claim.number
        if is_mine and claim.sealed is not None and state.current == claim.sealed:
            return _Kept(value, sealed, "ok")  # it was committed when the connection was lost
        if claim.added is not None:
            stored = history.find_number(claim.added)
            if stored is not None and history.open(stored.number, stored.payload) == value:
                return _Kept(value, sealed, "late")
        expires_at, fault = _expiry_of(answer[1], now)
        if is_mine:
            state.lease_until = None
        is_replaced = state.number != claim.value_number
        if is_mine and not is_replaced and fault is None:
            try:
                claim.sealed = sealed
                history.write_current(state, sealed, expires_at=expires_at)
            except DecryptionError:
                pass  # another process has sealed what it replaces under a key that is not here
            else:
                return _Kept(value, sealed, "ok")
        if is_replaced:
            claim.added, _ = history.add_version(state, value, None, expires_at)
        else:
            claim.added, _ = history.add_version(state, value, "pending", expires_at)
            state.needs_reauthorization_at = None
        history.save(state)
        history.trim(state)
        if is_mine and is_replaced and state.current is not None:
            return _Kept(history.open_current(state), state.current, "conflict")
        outcome = "late" if fault is None else type(fault).__name__
        return _Kept(value, sealed, outcome, fault)

    # -- no answer ---------------------------------------------------------------------------------

    def look_again(
        self, key: SecretKey, claim: Claim, error: Exception, *, is_gone: bool, is_last: bool
    ) -> Renewed | None:
        """Return what another process stored meanwhile; else, at last, give back the lease.

        :param is_gone: whether the provider said that the grant is gone, which is then noted.
        """

        def work(connection: sa.Connection) -> Renewed | None:
            history = self._history(key, connection)
            state = history.lock()
            now = database_time(connection)
            is_mine = state.lease_number == claim.number
            is_new = self._take_pending(history, state) or state.number != claim.value_number
            found = None
            if is_new and state.current is not None and not _is_due(state.expires_at, now):
                found = Renewed(history.open_current(state), state.current)
            if is_mine and (is_last or is_new):
                state.lease_until = None
                if is_gone and not is_new:
                    state.needs_reauthorization_at = now
            history.save(state)
            return found

        found = self._transaction(work, _FEW_RETRIES)
        if found is not None:
            self._tell("read", key, found.sealed, "ok")
        elif is_last:
            self._tell("renew", key, None, type(error).__name__)
        return found

    # -- the parts ---------------------------------------------------------------------------------

    def _history(self, key: SecretKey, connection: sa.Connection) -> SecretHistory:
        execute, dialect = connection.execute, connection.dialect
        return SecretHistory(self.table, key, execute, dialect, self._keyring, keep=self._kept)

    @staticmethod
    def _take_pending(history: SecretHistory, state: State) -> bool:
        """Make an answer that came late current; return whether there was one."""
        row = history.find_pending(state)
        if row is None:
            return False
        sealed = history.seal(history.open(row.number, row.payload))
        history.delete_version(row.number)
        history.write_current(state, sealed, expires_at=row.expires_at)
        return True

    def _transaction(
        self, work: Callable[[sa.Connection], _T], retries: int = DEFAULT_RETRIES
    ) -> _T:
        """Return what `work` does in one transaction, retried after passing faults.

        :raises RenewalError: the database ended it.
        """
        database = ManagedConnection(self._engine, retries=retries)

        def once(_: int) -> _T:
            with database.transaction() as connection:
                return work(connection)

        try:
            with database:
                return database.retry(once)
        except Fault as error:
            fault = f"{error.message}. {error.next_step('Call it again')}"
        except RotationError as error:
            fault = str(error)
        raise RenewalError(f"the database ended the renewal: {fault}")

    def _tell(self, action: Action, key: SecretKey, sealed: Sealed | None, outcome: str) -> None:
        if self._on_access is not None:
            version = None if sealed is None else sealed.key_version
            with Session(self._engine) as session:
                self._on_access(SecretAccess(action, key, version, utc_now(), outcome), session)
                session.commit()


def _expiry_of(given: Any, now: datetime) -> tuple[datetime | None, SerializationError | None]:
    """Return when the provider's answer expires; and what is wrong with it.

    A value whose expiry is not known is due at once.
    """
    if isinstance(given, (int, float)):  # OAuth's expires_in, as it is
        return now, _wrong_expiry("is a number; return timedelta(seconds=…) instead")
    try:
        moment = now + given if isinstance(given, timedelta) else given
        expires_at = None if moment is None else check_moment("expires_at", moment)
    except OverflowError:
        return now, _wrong_expiry("is out of range")
    except SerializationError as error:
        return now, _wrong_expiry(f"is wrong: {error}")
    if expires_at is not None and expires_at <= now:
        return now, _wrong_expiry("has passed already")
    return expires_at, None


def _wrong_expiry(fault: str) -> SerializationError:
    return SerializationError(
        f"the expiry that refresh returned {fault}. The value that it returned is kept, and is "
        "renewed by the next call"
    )
