"""The repository of scoped secrets: ``LucentSecrets`` and ``AsyncLucentSecrets``.

Statements are written once, in the synchronous class; the asynchronous one runs it on the
synchronous session below its ``AsyncSession``, as SQLAlchemy does itself. Both take part in the
caller's transaction: they flush, and never commit or roll it back.
"""

from __future__ import annotations

import builtins
import enum
import functools
import inspect as python_inspect
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Final, Literal, ParamSpec, TypeVar, overload

import sqlalchemy as sa
from sqlalchemy import ColumnElement, CursorResult, Executable, LargeBinary, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session, scoped_session

from . import _lifecycle, _upsert
from ._envelope import LONGEST_PREFIX, NONCE_SIZE, header_size, parse
from ._lifecycle import READABLE_STAGES, SecretVersion, Stage
from ._pagination import row_after
from ._payloads import open_payload, read_payload, seal_payload
from ._purge import apurge, purge
from ._schema import Schema
from ._sealing import Sealed
from ._sql import is_mysql
from ._upsert import has_key, key_columns
from ._versions import SecretHistory
from .events import AccessHandler, Action, SecretAccess
from .exceptions import (
    ConfigurationError,
    ConflictError,
    InvalidKeyError,
    SecretNotFoundError,
    hide_locals,
)
from .keyring import Keyring, generate_master_key
from .models import LucentSecret, LucentSecretMixin, lifecycle_tables, utc_now
from .secret_key import KEY_PART_NAMES, SecretKey, check_part, stored_key

if TYPE_CHECKING:  # without greenlet, which only async programs need, it does not import
    from sqlalchemy.ext.asyncio import AsyncSession

_T = TypeVar("_T")
_P = ParamSpec("_P")

_Key = SecretKey | str

_ROTATE_ATTEMPTS: Final = 5
"""Compare-and-swap attempts of one rotation. A second is rare, a fifth means a hot key."""


class _Unset(enum.Enum):
    UNSET = "whatever is stored"


_UNSET: Final = _Unset.UNSET
_Expected = str | Literal[_Unset.UNSET] | None


@dataclass(frozen=True)
class SecretInfo:
    """What is known about a secret without opening it.

    `token` identifies the stored value for ``expected=``; each write and rotation changes it.
    `key_version` and `token` are ``None`` if the stored bytes are not sealed.

    `number` is that of the value among its versions, ``None`` if it was stored without one.
    `needs_reauthorization` says that a renewal was refused for good. `deleted_at` and `purge_at`
    are set for a secret that was deleted and can be undeleted; its `token` is ``None``.
    """

    key: SecretKey
    key_version: str | None
    created_at: datetime
    updated_at: datetime
    token: str | None
    number: int | None = None
    expires_at: datetime | None = None
    needs_reauthorization: bool = False
    deleted_at: datetime | None = None
    purge_at: datetime | None = None


class LucentSecrets:
    """Secrets under scoped keys, over a :class:`~sqlalchemy.orm.Session`.

    :param session: the caller's session, or a registry of sessions such as Flask-SQLAlchemy's
        ``db.session``; it is never committed or rolled back here.
    :param keyring: the keyring to use. If left out, the default keyring is looked up at each use.
    :param model: a mapped class made with :class:`LucentSecretMixin`.
    :param on_access: called for each use of a secret, see :mod:`sqlalchemy_lucent.events`. Writes
        then happen in a savepoint, so that they are undone if the handler raises.
    :param keep: how many values of each secret to keep, the current one included. If left out, a
        write replaces the value.
    :raises ConfigurationError: `session`, `keyring`, `model`, `on_access` or `keep` is of a wrong
        type, or `model` has no tables to keep versions in.

    Every method takes a :class:`SecretKey` or its text, and raises
    :exc:`InvalidKeyError` for one that breaks a rule.
    """

    generate_master_key = staticmethod(generate_master_key)
    key = staticmethod(SecretKey)
    purge = staticmethod(purge)

    @hide_locals
    def __init__(
        self,
        session: Session | scoped_session[Any],
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
        on_access: AccessHandler | None = None,
        keep: int | None = None,
    ) -> None:
        if keyring is not None and not isinstance(keyring, Keyring):
            raise ConfigurationError(f"keyring= takes a Keyring, not {type(keyring).__name__}")
        given: object = session
        if not isinstance(given, (Session, scoped_session)):
            name = type(given).__name__
            hint = "; AsyncLucentSecrets takes it" if name.startswith("Async") else ""
            raise ConfigurationError(f"session= takes a Session, not {name}{hint}")
        if on_access is not None and python_inspect.iscoroutinefunction(on_access):
            raise ConfigurationError(
                "on_access= takes a plain function, also with an AsyncSession: it gets the "
                "synchronous session, and nothing would await a coroutine"
            )
        self._given_session = session
        self._keyring = keyring
        self._model = model
        # An unmapped subclass inherits `__mapper__`, so compare `mapper.class_`.
        mapper: Mapper[Any] | None = getattr(model, "__mapper__", None)
        if mapper is None or mapper.class_ is not model or not issubclass(model, LucentSecretMixin):
            raise ConfigurationError(
                "model= takes a mapped class made with LucentSecretMixin, not "
                f"{getattr(model, '__name__', type(model).__name__)}"
            )
        self._mapper = mapper
        self._table: sa.Table = mapper.local_table  # type: ignore[assignment]
        self._on_access = on_access
        given_keep: object = keep
        if keep is not None:
            if not isinstance(given_keep, int) or isinstance(given_keep, bool) or keep < 1:
                raise ConfigurationError(
                    "keep= takes the number of values of a secret to keep, from 1 on"
                )
            _lifecycle.required_tables(self._table)
        self._keep = keep

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._table.name}>"

    # -- one secret ------------------------------------------------------------------------------

    @hide_locals
    def set(
        self,
        key: _Key,
        value: Any,
        *,
        expected: _Expected = _UNSET,
        expires_at: datetime | None = None,
    ) -> str:
        """Store `value` under `key`, and return its token.

        One statement, unless the store keeps versions or the value expires. Without `expected` it
        is an upsert, safe under concurrent callers: the last one to commit wins.

        :param expected: store only if the stored value still has this token
            (:attr:`SecretInfo.token`); ``None`` means only if no secret is stored.
        :param expires_at: when the value expires, for :meth:`due`. The value can still be read
            then.
        :raises SerializationError: JSON would not give `value` back equal, or `expires_at` is in
            the past or has no time zone.
        :raises ConflictError: the stored value is not the expected one.
        :raises DecryptionError: the store keeps versions, and the value that would be replaced does
            not open.
        """
        if expires_at is not None:
            expires_at = _lifecycle.check_expiry(expires_at)
        return self._store(SecretKey.of(key), value, expected, expires_at)

    def _store(
        self, key: SecretKey, value: Any, expected: _Expected, expires_at: datetime | None
    ) -> str:
        dialect = self._dialect(to_write=True)
        sealed = seal_payload(self._table, dialect, key, value, self._keyring)
        del value
        with self._savepoint_if_audited():
            if self._keep is not None or (expires_at is not None and expected is not _UNSET):
                written = self._set_next(key, sealed, expected, expires_at)
            elif expected is _UNSET:
                row = self._row(key, sealed)
                if expires_at is not None:
                    self._history(key).note_expiry(row["updated_at"], expires_at)
                self._write([key], _upsert.upsert(self._table, dialect.name), row)
                written = True
            elif expected is None:
                execute = functools.partial(self._write, [key])
                row = self._row(key, sealed)
                written = _upsert.insert_absent(execute, self._table, dialect, row)
            else:
                written = self._replace(key, _token_bytes(expected), sealed)
            self._tell("write", key, sealed, "ok" if written else "conflict")
        if not written:
            raise _conflict(key)
        return _prefix(sealed._data).hex()

    def get(self, key: _Key) -> Any:
        """Return the value stored under `key`, or ``None``.

        :raises DecryptionError: the value does not open; the subclass says why.
        """
        key = SecretKey.of(key)
        sealed = self._load(key)
        if sealed is None:
            self._tell("read", key, None, "missing")
            return None
        return self._read(key, sealed)

    @overload
    def require(
        self, key: _Key, *, version: int | None = None, stage: Stage | None = None
    ) -> Any: ...

    @overload
    def require(
        self,
        key: _Key,
        *,
        as_: type[_T],
        version: int | None = None,
        stage: Stage | None = None,
    ) -> _T: ...

    def require(
        self,
        key: _Key,
        *,
        as_: type[_T] | None = None,
        version: int | None = None,
        stage: Stage | None = None,
    ) -> Any:
        """Return the value stored under `key`.

        :param as_: the type to return it as: a dataclass, TypedDict, msgspec Struct or pydantic
            model.
        :param version: the number of the version to return, see :meth:`versions`.
        :param stage: ``"current"``, ``"previous"``, ``"staged"`` or ``"pending"``, instead of a
            number.
        :raises SecretNotFoundError: no secret is stored under `key`, or not this version of it.
        :raises DecryptionError: it does not open; the subclass says why.
        :raises SchemaMismatchError: it does not fit `as_`; the message gives the path of the
            fault, never the value.
        """
        key = SecretKey.of(key)
        if as_ is not None:
            # Not `self.require`, which a subclass may have replaced.
            return _load_as(as_, LucentSecrets.require(self, key, version=version, stage=stage))
        if version is None and stage is None:
            return self._read(key, self._load_required(key))
        return self._read_version(key, version, stage)

    def exists(self, key: _Key) -> bool:
        """Say whether a secret is stored under `key`, without opening it."""
        return self._exists(SecretKey.of(key))

    def info(self, key: _Key) -> SecretInfo | None:
        """Return what is known about the secret under `key` without opening it, or ``None``."""
        statement = self._select_info().where(has_key(self._table, SecretKey.of(key)))
        row = self._select(statement).first()
        return None if row is None else _info(row)

    def delete(
        self,
        key: _Key,
        *,
        expected: str | Literal[_Unset.UNSET] = _UNSET,
        purge_after: timedelta | None = None,
    ) -> bool:
        """Delete the secret under `key`; return whether there was one.

        A store that keeps versions deletes them too. Another store leaves them to :meth:`purge`.

        :param expected: delete only if the stored value still has this token.
        :param purge_after: keep the secret and its versions so long, for :meth:`undelete`. It is
            not found any more, except by ``list(deleted=True)``.
        :raises ConflictError: the stored value is not the expected one, or there is none.
        :raises DecryptionError: with `purge_after`, the value does not open, so it cannot be kept.
        """
        key = SecretKey.of(key)
        token = None if expected is _UNSET else _token_bytes(expected)
        purge_after = _lifecycle.check_delay(purge_after)
        with self._savepoint_if_audited():
            if self._keep is not None or purge_after is not None:
                deleted = self._delete_with_history(key, token, purge_after)
            else:
                statement = sa.delete(self._table).where(has_key(self._table, key))
                if token is not None:
                    statement = statement.where(self._has_token(sa.literal(token, LargeBinary)))
                deleted = self._write([key], statement).rowcount > 0
            refused = "missing" if token is None else "conflict"
            self._tell("delete", key, None, "ok" if deleted else refused)
        if not deleted and token is not None:
            raise _conflict(key)
        return deleted

    @hide_locals
    def copy(self, source: _Key, target: _Key) -> None:
        """Store the secret of `source` under `target` as well, sealed for `target`.

        Its versions are not copied. A store that keeps versions copies when it expires.

        :raises SecretNotFoundError: no secret is stored under `source`.
        :raises ConflictError: a secret is stored under `target`.
        """
        source, target = _two_keys(source, target)
        stored = self._load_required(source, to_write=True)
        info = None if self._keep is None else self.info(source)
        expires_at = None if info is None else info.expires_at
        self._store(target, self._read(source, stored), None, expires_at)

    @hide_locals
    def move(self, source: _Key, target: _Key) -> None:
        """Move the secret of `source` to `target`, sealed for `target`, in one UPDATE.

        A store that keeps versions moves them too, and when it expires.

        :raises SecretNotFoundError: no secret is stored under `source`.
        :raises ConflictError: a secret is stored under `target`, or another writer changed
            `source` meanwhile.
        :raises sqlalchemy.exc.IntegrityError: another writer created `target` meanwhile.
        """
        source, target = _two_keys(source, target)
        if self._keep is not None:
            self._move_with_history(source, target)
            return
        stored = self._load_required(source, to_write=True, lock=True)
        sealed = self._seal(target, self._read(source, stored), self._keyring)
        taken = self._exists(target, to_write=True)
        with self._savepoint_if_audited():
            moved = not taken and self._replace(source, _prefix(bytes(stored)), sealed, target)
            outcome = "ok" if moved else "conflict"
            self._tell("write", target, sealed, outcome)
            self._tell("delete", source, None, outcome)
        if not moved:
            raise _conflict(target if taken else source)

    @hide_locals
    def rotate(self, key: _Key, to: Keyring | None = None) -> str:
        """Seal the secret under `key` again, and return its new key version.

        Only the current value. The function :func:`~sqlalchemy_lucent.rotate` seals versions too.

        :param to: the keyring whose primary seals, instead of the repository's own.
        :raises SecretNotFoundError: no secret is stored under `key`.
        :raises ConflictError: other writers kept changing it.
        """
        key = SecretKey.of(key)
        return self.rotate_many([key], to)[key]

    # -- versions of one secret ------------------------------------------------------------------

    def versions(self, key: _Key) -> builtins.list[SecretVersion]:
        """Return what is known about each version of a secret, the newest first. None is opened.

        The current value is among them. Without a secret, or after a soft delete, only a staged
        value is left to show.

        :raises ConfigurationError: the database has no tables of versions.
        """
        return _lifecycle.list_versions(self._table, SecretKey.of(key), self._execute)

    @hide_locals
    def stage(self, key: _Key, value: Any, *, expires_at: datetime | None = None) -> int:
        """Store a value to try before it counts, and return its number.

        ``require(key, stage="staged")`` returns it, and :meth:`promote` makes it the secret. A
        value that was staged before is replaced. There may be no secret under `key` yet.

        :raises SerializationError: JSON would not give `value` back equal, or `expires_at` is in
            the past or has no time zone.
        """
        key, expires_at = SecretKey.of(key), _lifecycle.check_expiry(expires_at)
        history = self._history(key)
        state = history.lock()
        with self._savepoint_if_audited():
            number, sealed = history.add_version(state, value, "staged", expires_at)
            history.supersede("staged", number)
            history.save(state)
            self._tell("stage", key, sealed, "ok")
        return number

    @hide_locals
    def promote(self, key: _Key) -> int:
        """Make the staged value the secret, and return its number, a new one.

        The value that it replaces is kept as a version.

        :raises SecretNotFoundError: no value is staged under `key`.
        :raises DecryptionError: the staged value or the one to keep does not open.
        """
        key = SecretKey.of(key)
        history = self._history(key)
        state = history.lock(to_insert=True)
        staged = history.find_stage("staged")
        if staged is None:
            self._tell("promote", key, None, "missing")
            raise _lifecycle.version_not_found(key, "staged value")
        sealed = history.seal(self._read(key, staged.payload, staged.number))
        with self._savepoint_if_audited():
            history.delete_version(staged.number)
            history.write_current(state, sealed, expires_at=staged.expires_at)
            self._tell("promote", key, sealed, "ok")
        return state.number

    @hide_locals
    def restore(self, key: _Key, version: int) -> int:
        """Make the value of an earlier version the secret again, and return its number, a new one.

        It expires when that version does. The value that it replaces is kept as a version.

        :raises SecretNotFoundError: there is no such version, or no secret under `key`.
        :raises DecryptionError: the version or the value to keep does not open.
        """
        key, number = SecretKey.of(key), _lifecycle.check_number(version)
        history = self._history(key)
        state = history.lock()
        if state.current is None:
            found = None
        elif state.number == number:
            found = (state.current, None, state.expires_at)
        else:
            row = history.find_number(number)
            found = None if row is None else (row.payload, row.number, row.expires_at)
        if found is None:
            self._tell("restore", key, None, "missing")
            raise _lifecycle.version_not_found(key, f"version {number}")
        payload, stored_as, expires_at = found
        sealed = history.seal(self._read(key, payload, stored_as))
        with self._savepoint_if_audited():
            history.write_current(state, sealed, expires_at=expires_at)
            self._tell("restore", key, sealed, "ok")
        return state.number

    @hide_locals
    def undelete(self, key: _Key) -> None:
        """Bring back a secret that was deleted with ``purge_after=``, as it was.

        :raises SecretNotFoundError: none was deleted under `key`, or it is purged.
        :raises ConflictError: another secret has been stored under `key` since.
        :raises DecryptionError: its value does not open.
        """
        key = SecretKey.of(key)
        history = self._history(key)
        state = history.lock(to_insert=True)
        deleted = history.find_stage("deleted")
        if deleted is None:
            self._tell("undelete", key, None, "missing")
            raise SecretNotFoundError(
                f"no deleted secret is kept under {key}: it was not deleted with purge_after=, or "
                "it is purged"
            )
        sealed = None
        if state.current is None:
            sealed = history.seal(self._read(key, deleted.payload, deleted.number))
        with self._savepoint_if_audited():
            undeleted = sealed is not None and history.undelete(state, deleted, sealed)
            self._tell("undelete", key, sealed, "ok" if undeleted else "conflict")
        if not undeleted:
            raise ConflictError(
                f"another secret is stored under {key} since it was deleted. Move or delete it, "
                "then undelete"
            )

    def _delete_with_history(
        self, key: SecretKey, token: bytes | None, purge_after: timedelta | None
    ) -> bool:
        history = self._history(key)
        state = history.lock()
        current = None if state.current is None else _prefix(bytes(state.current))
        is_expected = current is not None and token in (None, current)
        if purge_after is not None:
            if is_expected:
                history.delete_softly(state, purge_after)
        elif is_expected or token is None:
            history.delete_current()
            history.forget()
        return is_expected

    def _move_with_history(self, source: SecretKey, target: SecretKey) -> None:
        histories = {key: self._history(key) for key in (source, target)}
        states = {key: histories[key].lock(to_insert=key == target) for key in sorted(histories)}
        state, old, new = states[source], histories[source], histories[target]
        if state.current is None:
            self._tell("read", source, None, "missing")
            raise _not_found([source])
        sealed = new.seal(self._read(source, state.current))
        kept = [
            (row, new.seal_version(row.number, old.open(row.number, row.payload)))
            for row in old.all_versions()
        ]
        taken = states[target].current is not None or bool(new.all_versions())
        now, prefix = utc_now(), _prefix(bytes(state.current))
        with self._savepoint_if_audited():
            moved = not taken and self._replace(source, prefix, sealed, target, now)
            if moved:
                for row, version in kept:
                    new.insert_version(
                        row.number, version, row.stage, row.expires_at, row.created_at
                    )
                old.forget()
                state.written_at = now
                new.save(state)
            outcome = "ok" if moved else "conflict"
            self._tell("write", target, sealed, outcome)
            self._tell("delete", source, None, outcome)
        if not moved:
            raise _conflict(target if taken else source)

    def _history(self, key: SecretKey, *, to_read: bool = False) -> SecretHistory:
        execute = self._execute if to_read else functools.partial(self._write, [key])
        dialect = self._dialect(to_write=not to_read)
        return SecretHistory(self._table, key, execute, dialect, self._keyring, keep=self._keep)

    def _set_next(
        self, key: SecretKey, sealed: Sealed, expected: _Expected, expires_at: datetime | None
    ) -> bool:
        """Store a value under its own number; return whether the stored one was as expected."""
        token = None if expected is _UNSET or expected is None else _token_bytes(expected)
        history = self._history(key)
        state = history.lock(to_insert=token is None)
        current = None if state.current is None else _prefix(bytes(state.current))
        if expected is not _UNSET and current != token:
            return False
        return history.write_current(
            state,
            sealed,
            expires_at=expires_at,
            archive=self._keep is not None and self._keep > 1,
            only_new=expected is None,
        )

    def _read_version(self, key: SecretKey, version: int | None, stage: Stage | None) -> Any:
        if version is not None and stage is not None:
            raise InvalidKeyError("version= and stage= name one version in two ways; pass one")
        if stage is not None and stage not in READABLE_STAGES:
            raise InvalidKeyError(f"stage= takes one of {', '.join(READABLE_STAGES)}")
        number = None if version is None else _lifecycle.check_number(version)
        history = self._history(key, to_read=True)
        found = history.read(number, stage)
        if found is None:
            self._tell("read", key, None, "missing")
            raise _lifecycle.version_not_found(
                key, f"{stage} value" if number is None else f"version {number}"
            )
        number, sealed = found
        return self._read(key, sealed, number)

    # -- many secrets ----------------------------------------------------------------------------

    @hide_locals
    def set_many(self, values: Mapping[SecretKey, Any] | Mapping[str, Any]) -> None:
        """Store each value under its key, as :meth:`set` does.

        One statement for all, unless the store keeps versions.

        :raises SerializationError: JSON would not give a value back equal; nothing is written.
        :raises InvalidKeyError: a key breaks a rule, or is given twice, as a key and its text.
        """
        by_key: dict[SecretKey, Any] = {}
        for given, value in values.items():
            key = SecretKey.of(given)
            if key in by_key:
                raise InvalidKeyError(f"duplicate key {key}")
            by_key[key] = value
        if not by_key:
            return
        dialect = self._dialect(to_write=True)
        sealed = {
            key: seal_payload(self._table, dialect, key, value, self._keyring)
            for key, value in by_key.items()
        }
        with self._savepoint_if_audited():
            # In key order, so that two callers lock the same rows in the same order.
            if self._keep is None:
                rows = [self._row(key, sealed[key]) for key in sorted(sealed)]
                self._write(sealed, _upsert.upsert(self._table, dialect.name), rows)
            else:
                for key in sorted(sealed):
                    self._set_next(key, sealed[key], _UNSET, None)
            for key, each in sealed.items():
                self._tell("write", key, each, "ok")

    def get_many(self, keys: Iterable[_Key]) -> dict[SecretKey, Any]:
        """Return the values stored under `keys`, in that order, without keys that have none.

        :raises DecryptionError: a value does not open; the subclass says why.
        """
        wanted = _distinct(keys)
        found = self._load_many(wanted)
        values = {}
        for key in wanted:
            if key in found:
                values[key] = self._read(key, found[key])
            else:
                self._tell("read", key, None, "missing")
        return values

    @hide_locals
    def rotate_many(self, keys: Iterable[_Key], to: Keyring | None = None) -> dict[SecretKey, str]:
        """Seal the secrets under `keys` again, as :meth:`rotate` does; return their key versions.

        :raises SecretNotFoundError: one is missing; nothing is written.
        :raises DecryptionError: one does not open; nothing is written.
        """
        keyring = to or self._keyring
        wanted = _distinct(keys)
        done: dict[SecretKey, Sealed] = {}
        with self._savepoint_if_audited():
            waiting = wanted
            for _ in range(_ROTATE_ATTEMPTS):
                stored = self._load_many(waiting, to_write=True, lock=True)
                missing = [key for key in waiting if key not in stored]
                if missing:
                    raise _not_found(missing)
                resealed = {
                    key: self._seal(key, open_payload(stored[key], key, self._keyring), keyring)
                    for key in waiting
                }
                waiting = self._replace_many(stored, resealed)
                done.update(resealed)
                if not waiting:
                    break
            else:
                raise ConflictError(
                    f"other writers changed the secret {waiting[0]} each time it was rotated"
                )
            for key in wanted:
                self._tell("rotate", key, done[key], "ok")
        return {key: done[key].key_version or "" for key in wanted}

    def delete_many(
        self, *, scope: str, owner_id: str | int | uuid.UUID, provider: str | None = None
    ) -> int:
        """Delete an owner's secrets, or those of one provider; return how many.

        A store that keeps versions deletes those too, and the secrets that can be undeleted.

        :raises InvalidKeyError: a part breaks a rule.
        """
        parts = _leading_parts(scope, owner_id, provider)
        if len(parts) < len(("scope", "owner_id")):
            raise InvalidKeyError("delete_many() needs the scope and the owner_id of one owner")
        condition = has_key(self._table, parts)
        if self._on_access is None:
            self._forget_many(parts)
            deleted = self._write((), sa.delete(self._table).where(condition)).rowcount
        else:
            # By their keys, so that exactly the deleted secrets are reported.
            selected = sa.select(*key_columns(self._table)).where(condition).with_for_update()
            deleted = 0
            on_mysql = is_mysql(self._dialect(to_write=True))
            with self._savepoint_if_audited():
                self._forget_many(parts)
                keys = [stored_key(row) for row in self._execute(selected, to_write=True)]
                for size, parameters in _upsert.batches(keys):
                    one_of = _upsert.is_one_of(self._table, on_mysql, size)
                    statement = sa.delete(self._table).where(one_of)
                    deleted += self._write((), statement, parameters).rowcount
                for key in keys:
                    self._tell("delete", key, None, "ok")
        for loaded in self._session.identity_map.values():
            # By the identity: reading an expired attribute would go to the database.
            if isinstance(loaded, self._model) and inspect(loaded).identity[: len(parts)] == parts:
                self._expire(loaded)
        return deleted

    def _forget_many(self, parts: Sequence[str]) -> None:
        """Delete the versions and states of a store that keeps versions."""
        if self._keep is None:
            return
        tables = _lifecycle.required_tables(self._table)
        # The states first: every writer locks them first.
        for table in (tables.states, tables.versions):
            statement = sa.delete(table).where(has_key(table, parts))
            _lifecycle.run(functools.partial(self._write, ()), tables, statement)

    # -- listing ----------------------------------------------------------------------------------

    def list(
        self,
        *,
        scope: str | None = None,
        owner_id: str | int | uuid.UUID | None = None,
        provider: str | None = None,
        name: str | None = None,
        limit: int | None = None,
        after: _Key | None = None,
        deleted: bool = False,
    ) -> builtins.list[SecretInfo]:
        """Return what is known about the secrets whose keys begin with the given parts.

        They are in key order. None is opened.

        :param limit: return at most so many: one page.
        :param after: continue after this key, the last one of the previous page. The last page
            costs no more than the first.
        :param deleted: whether to list the secrets that can be undeleted as well.
        :raises InvalidKeyError: a part breaks a rule, or is given without the parts before it.
        :raises ConfigurationError: the model has tables of versions, and the database has none.
        """
        parts = _leading_parts(scope, owner_id, provider, name)
        last = None if after is None else SecretKey.of(after)
        if last is not None and last[: len(parts)] != parts:
            raise InvalidKeyError(f"after= is a key of another listing, {last}")

        def page(statement: Any, table: sa.Table) -> Iterator[SecretInfo]:
            columns = key_columns(table)
            if parts:
                statement = statement.where(has_key(table, parts))
            statement = statement.order_by(*columns).limit(limit)
            if last is not None:
                rest = [sa.literal(part) for part in last[len(parts) :]]
                dialect = self._dialect(to_write=False)
                following = row_after(columns[len(parts) :], rest, dialect) if rest else sa.false()
                statement = statement.where(following)
            return map(_info, self._select(statement))

        listed = builtins.list(page(self._select_info(), self._table))
        if deleted:
            tables = _lifecycle.required_tables(self._table)
            listed += page(_lifecycle.select_deleted(self._table, tables), tables.versions)
            # Python and the databases both compare by code points.
            listed.sort(key=lambda info: info.key)
        return listed[:limit]

    def due(
        self,
        before: datetime,
        *,
        scope: str | None = None,
        owner_id: str | int | uuid.UUID | None = None,
        limit: int | None = None,
    ) -> builtins.list[SecretInfo]:
        """Return what is known about the secrets that expire before a moment, the first ones first.

        Secrets that have expired are among them. An index finds them, and none is opened.

        :param limit: return at most so many.
        :raises SerializationError: `before` is no datetime with a time zone.
        :raises InvalidKeyError: a part breaks a rule, or is given without the parts before it.
        :raises ConfigurationError: the database has no tables of versions.
        """
        parts = _leading_parts(scope, owner_id)
        states = _lifecycle.required_tables(self._table).states
        statement = (
            self._select_info(described=True)
            .where(
                states.c.expires_at < _lifecycle.check_moment("before", before),
                *([has_key(states, parts)] if parts else []),
            )
            .order_by(states.c.expires_at, *key_columns(states))
            .limit(limit)
        )
        return [_info(row) for row in self._select(statement)]

    def count(
        self,
        *,
        scope: str | None = None,
        owner_id: str | int | uuid.UUID | None = None,
        provider: str | None = None,
    ) -> int:
        """Count the secrets whose keys begin with the given parts.

        :raises InvalidKeyError: a part breaks a rule, or is given without the parts before it.
        """
        statement = sa.select(sa.func.count()).select_from(self._table)
        parts = _leading_parts(scope, owner_id, provider)
        if parts:
            statement = statement.where(has_key(self._table, parts))
        count: int = self._execute(statement).scalar_one()
        return count

    # -- reading ---------------------------------------------------------------------------------

    def _select_info(self, *, described: bool = False) -> Any:
        """Select what :func:`_info` takes.

        :param described: select only the secrets that a state describes.
        """
        columns = self._table.c
        statement = sa.select(
            *key_columns(self._table),
            columns.key_version,
            columns.created_at,
            columns.updated_at,
            sa.func.substr(columns.payload, 1, LONGEST_PREFIX, type_=LargeBinary).label("prefix"),
        )
        tables = lifecycle_tables(self._table)
        if tables is None:
            return statement
        states = tables.states
        condition = _lifecycle.describes(states, self._table)
        return statement.add_columns(
            states.c.number, states.c.expires_at, states.c.needs_reauthorization_at
        ).join_from(self._table, states, condition, isouter=not described)

    def _select(self, statement: Any) -> CursorResult[Any]:
        tables = lifecycle_tables(self._table)
        if tables is None:
            return self._execute(statement)
        return _lifecycle.run(self._execute, tables, statement)

    def _exists(self, key: SecretKey, *, to_write: bool = False) -> bool:
        statement = sa.select(sa.literal(1)).where(has_key(self._table, key))
        return self._execute(statement, to_write=to_write).first() is not None

    def _load(self, key: SecretKey, *, to_write: bool = False, lock: bool = False) -> Sealed | None:
        statement = _upsert.select_payload(self._table)
        if lock:
            statement = statement.with_for_update()
        result = self._execute(statement, key._asdict(), to_write=to_write)
        sealed: Sealed | None = result.scalar()
        return sealed

    def _load_required(
        self, key: SecretKey, *, to_write: bool = False, lock: bool = False
    ) -> Sealed:
        sealed = self._load(key, to_write=to_write, lock=lock)
        if sealed is None:
            self._tell("read", key, None, "missing")
            raise _not_found([key])
        return sealed

    def _load_many(
        self, keys: Sequence[SecretKey], *, to_write: bool = False, lock: bool = False
    ) -> dict[SecretKey, Sealed]:
        found: dict[SecretKey, Sealed] = {}
        if not keys:
            return found
        dialect = self._dialect(to_write=to_write)
        # In key order, so that two callers lock the same rows in the same order.
        for statement, parameters in _upsert.select_payloads(self._table, dialect, sorted(keys)):
            if lock:
                # On PostgreSQL, the statement also selects from arrays, which take no lock.
                locked = self._table if dialect.name == "postgresql" else None
                statement = statement.order_by(*key_columns(self._table)).with_for_update(of=locked)
            for row in self._execute(statement, parameters, to_write=to_write):
                found[stored_key(row[:-1])] = row[-1]
        return found

    def _read(self, key: SecretKey, sealed: Sealed, number: int | None = None) -> Any:
        return read_payload(sealed, key, self._keyring, self._tell, number)

    # -- writing ---------------------------------------------------------------------------------

    def _seal(self, key: SecretKey, value: Any, keyring: Keyring | None) -> Sealed:
        return seal_payload(self._table, self._dialect(to_write=True), key, value, keyring)

    @staticmethod
    def _row(key: SecretKey, sealed: Sealed) -> dict[str, Any]:
        now = utc_now()
        return {**key._asdict(), "payload": sealed, "created_at": now, "updated_at": now}

    def _has_token(self, token: ColumnElement[bytes]) -> ColumnElement[bool]:
        size = sa.func.length(token)
        return sa.func.substr(self._table.c.payload, 1, size, type_=LargeBinary) == token

    def _replace(
        self,
        key: SecretKey,
        token: bytes,
        sealed: Sealed,
        moved_to: SecretKey | None = None,
        now: datetime | None = None,
    ) -> bool:
        """Compare-and-swap the value under `key`; return whether it was swapped."""
        values: dict[str, Any] = {"payload": sealed, "updated_at": now or utc_now()}
        keys = [key]
        if moved_to is not None:
            values.update(moved_to._asdict())
            keys.append(moved_to)
        statement = sa.update(self._table).where(
            has_key(self._table, key), self._has_token(sa.literal(token, LargeBinary))
        )
        return self._write(keys, statement.values(values)).rowcount > 0

    def _replace_many(
        self, stored: Mapping[SecretKey, Sealed], resealed: Mapping[SecretKey, Sealed]
    ) -> builtins.list[SecretKey]:
        """Compare-and-swap each value in one statement; return the keys that others changed first.

        The old bytes are compared for databases without row locks: a concurrent writer wins.
        """
        if not resealed:
            return []
        names = [f"key_{name}" for name in KEY_PART_NAMES]
        statement = (
            sa.update(self._table)
            .where(
                has_key(self._table, [sa.bindparam(name) for name in names]),
                self._has_token(sa.bindparam("token", type_=LargeBinary)),
            )
            # `updated_at` is named to switch off its `onupdate`: a rotation is no edit.
            .values(payload=sa.bindparam("resealed"), updated_at=self._table.c.updated_at)
        )
        parameters = [
            {
                **dict(zip(names, key, strict=True)),
                "token": _prefix(bytes(stored[key])),
                "resealed": sealed,
            }
            for key, sealed in resealed.items()
        ]
        count = self._write(resealed, statement, parameters).rowcount
        # asyncpg does not count, but PostgreSQL has locked the rows, so that none was missed.
        if count in (len(resealed), -1):
            return []
        current = self._load_many(builtins.list(resealed), to_write=True)
        return [key for key, sealed in resealed.items() if current.get(key) != sealed]

    def _write(
        self, keys: Iterable[SecretKey], statement: Executable, parameters: Any = None
    ) -> CursorResult[Any]:
        result = self._execute(statement, parameters, to_write=True)
        # Objects of these secrets that the session has loaded are out of date now.
        identity_map = self._session.identity_map
        if identity_map:
            for key in keys:
                identity = self._mapper.identity_key_from_primary_key(tuple(key))
                loaded = identity_map.get(identity)
                if loaded is not None:
                    self._expire(loaded)
        return result

    def _expire(self, loaded: Any) -> None:
        # Not if it waits to be flushed (autoflush is off): the changes are the caller's.
        if not inspect(loaded).modified:
            self._session.expire(loaded)

    def _execute(
        self, statement: Executable, parameters: Any = None, *, to_write: bool = False
    ) -> CursorResult[Any]:
        """Execute a Core statement.

        :param to_write: whether it writes, or reads what a write depends on.
        """
        # On SQLAlchemy 2.0, a session does not autoflush before Core statements. A handler of a
        # flush may call this too, and a flush within a flush is an error.
        session = self._session
        if session.autoflush and not getattr(session, "_flushing", False):
            session.flush()
        bind = self._bind_arguments(statement, to_write=to_write)
        if _is_plain(session):
            return session.connection(bind_arguments=bind).execute(statement, parameters)
        result: Any = session.execute(statement, parameters, bind_arguments=bind)
        return result  # type: ignore[no-any-return]

    @property
    def _session(self) -> Session:
        given = self._given_session
        return given() if isinstance(given, scoped_session) else given

    def _bind_arguments(
        self, statement: Executable | None = None, *, to_write: bool
    ) -> dict[str, Any]:
        """Return what a session that routes chooses the database by.

        It sends an UPDATE to its writer, but perhaps not an upsert, nor the SELECT that a write
        depends on. So all of these are routed as an UPDATE of the table.
        """
        clause = _upsert.any_update(self._table) if to_write else statement
        return {"mapper": self._mapper, "clause": clause}

    def _dialect(self, *, to_write: bool) -> sa.Dialect:
        return self._session.get_bind(**self._bind_arguments(to_write=to_write)).dialect

    # -- reporting -------------------------------------------------------------------------------

    def _tell(self, action: Action, key: SecretKey, value: Sealed | None, outcome: str) -> None:
        if self._on_access is not None:
            version = None if value is None else value.key_version
            access = SecretAccess(action, key, version, utc_now(), outcome)
            self._on_access(access, self._session)

    def _savepoint_if_audited(self) -> AbstractContextManager[object]:
        """With a handler, undo what is written inside if the handler raises."""
        return nullcontext() if self._on_access is None else self._savepoint()

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        connection = self._session.connection(bind_arguments=self._bind_arguments(to_write=True))
        if connection.dialect.name == "sqlite":
            # Python's sqlite3 begins a transaction before the first write but not before a
            # savepoint, so releasing the savepoint would commit.
            driver_connection: Any = connection.connection.driver_connection
            if not driver_connection.in_transaction:
                connection.exec_driver_sql("BEGIN")
        cause: BaseException | None = None
        try:
            with self._session.begin_nested():
                try:
                    yield
                except BaseException as error:
                    cause = error
                    raise
        except DBAPIError as error:
            # At a deadlock, MySQL ends the transaction. The savepoint is gone with it, and going
            # back to it is an error that would hide the cause.
            cause = cause or error
        if cause is not None:
            raise cause


def _awaited(
    method: Callable[Concatenate[LucentSecrets, _P], _T],
) -> Callable[Concatenate[AsyncLucentSecrets, _P], Coroutine[Any, Any, _T]]:
    """Return `method` for :class:`AsyncLucentSecrets`, run below its session."""

    @functools.wraps(method)
    @hide_locals
    async def run(self: AsyncLucentSecrets, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await self._session.run_sync(lambda _: method(self._secrets, *args, **kwargs))

    run.__doc__ = f"See :meth:`LucentSecrets.{method.__name__}`."
    return run


class AsyncLucentSecrets:
    """Secrets under scoped keys, over an :class:`~sqlalchemy.ext.asyncio.AsyncSession`.

    It has the methods of :class:`LucentSecrets`, to be awaited. `on_access` is a plain function
    here too, and gets the synchronous session.
    """

    generate_master_key = staticmethod(generate_master_key)
    key = staticmethod(SecretKey)
    purge = staticmethod(apurge)

    @hide_locals
    def __init__(
        self,
        session: AsyncSession,
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
        on_access: AccessHandler | None = None,
        keep: int | None = None,
    ) -> None:
        if not hasattr(session, "sync_session"):
            raise ConfigurationError(
                f"session= takes an AsyncSession, not {type(session).__name__}"
            )
        self._session = session
        self._secrets = LucentSecrets(
            session.sync_session, keyring=keyring, model=model, on_access=on_access, keep=keep
        )

    def __repr__(self) -> str:
        return repr(self._secrets).replace("<", "<Async", 1)

    set = _awaited(LucentSecrets.set)
    get = _awaited(LucentSecrets.get)
    exists = _awaited(LucentSecrets.exists)
    info = _awaited(LucentSecrets.info)
    delete = _awaited(LucentSecrets.delete)
    copy = _awaited(LucentSecrets.copy)
    move = _awaited(LucentSecrets.move)
    rotate = _awaited(LucentSecrets.rotate)
    set_many = _awaited(LucentSecrets.set_many)
    get_many = _awaited(LucentSecrets.get_many)
    rotate_many = _awaited(LucentSecrets.rotate_many)
    delete_many = _awaited(LucentSecrets.delete_many)
    list = _awaited(LucentSecrets.list)
    count = _awaited(LucentSecrets.count)
    stage = _awaited(LucentSecrets.stage)
    promote = _awaited(LucentSecrets.promote)
    restore = _awaited(LucentSecrets.restore)
    undelete = _awaited(LucentSecrets.undelete)
    due = _awaited(LucentSecrets.due)
    versions = _awaited(LucentSecrets.versions)
    _require: Any = _awaited(LucentSecrets.require)  # has overloads, which a ParamSpec lacks

    @overload
    async def require(
        self, key: _Key, *, version: int | None = None, stage: Stage | None = None
    ) -> Any: ...

    @overload
    async def require(
        self,
        key: _Key,
        *,
        as_: type[_T],
        version: int | None = None,
        stage: Stage | None = None,
    ) -> _T: ...

    async def require(
        self,
        key: _Key,
        *,
        as_: type[_T] | None = None,
        version: int | None = None,
        stage: Stage | None = None,
    ) -> Any:
        """See :meth:`LucentSecrets.require`."""
        return await self._require(key, as_=as_, version=version, stage=stage)


@hide_locals
def _load_as(type_: type[_T], value: Any) -> _T:
    return Schema(type_).load(value)


# As they are when this is imported: a program may replace them in the class, too.
_EXECUTE: Final = Session.execute
_CONNECTION: Final = Session.connection


def _is_plain(session: Session) -> bool:
    """Say whether :meth:`Session.execute` would do no more with a Core statement than execute it.

    Passing it by brings ``require`` near to a SELECT by hand, see ``tests/bench``.
    """
    kind, own = type(session), vars(session)
    return (
        kind.execute is _EXECUTE
        and kind.connection is _CONNECTION
        and "execute" not in own
        and "connection" not in own
        and not session.dispatch.do_orm_execute
        # SQLAlchemy 2.1: `execute` passes these on, over the connection's own.
        and not getattr(session, "execution_options", None)
    )


def _leading_parts(*given: str | int | uuid.UUID | None) -> tuple[str, ...]:
    """Check the leading parts of keys that a caller filters by, and return those given."""
    parts: list[str] = []
    for position, (name, part) in enumerate(zip(KEY_PART_NAMES, given, strict=False)):
        if part is None:
            continue
        if len(parts) < position:
            raise InvalidKeyError(
                f"{name}= filters only together with every part before it: "
                f"{', '.join(KEY_PART_NAMES[:position])}"
            )
        if name == "owner_id":
            part = SecretKey("scope", part, "provider", "name").owner_id
        parts.append(check_part(name, part))
    return tuple(parts)


def _distinct(keys: Iterable[_Key]) -> list[SecretKey]:
    if isinstance(keys, (str, SecretKey)):
        raise InvalidKeyError("several keys are expected, such as a list of them, not one")
    return list(dict.fromkeys(map(SecretKey.of, keys)))


def _two_keys(source: _Key, target: _Key) -> tuple[SecretKey, SecretKey]:
    source, target = SecretKey.of(source), SecretKey.of(target)
    if source == target:
        raise InvalidKeyError(f"source and target are the same key, {source}")
    return source, target


def _info(row: sa.Row[Any]) -> SecretInfo:
    known: Any = row._mapping
    return SecretInfo(
        stored_key(row[: len(KEY_PART_NAMES)]),
        row.key_version,
        row.created_at,
        row.updated_at,
        _token(row.prefix),
        known.get("number"),
        known.get("expires_at"),
        known.get("needs_reauthorization_at") is not None,
        known.get("deleted_at"),
        known.get("purge_at"),
    )


def _prefix(sealed: bytes) -> bytes:
    """Return the header and nonce of a sealed value."""
    return sealed[: header_size(sealed) + NONCE_SIZE]


def _token(sealed: Any) -> str | None:
    """Return the token of a value, from its first bytes."""
    prefix = _prefix(bytes(sealed or b""))
    return prefix.hex() if _is_token(prefix) else None


def _is_token(prefix: bytes) -> bool:
    envelope = parse(prefix)
    return envelope is not None and len(envelope.nonce) == NONCE_SIZE and not envelope.body


def _token_bytes(token: Any) -> bytes:
    try:
        prefix = bytes.fromhex(token)
    except (TypeError, ValueError):
        prefix = b""
    # It must be complete, because its length says how many bytes are compared.
    if _is_token(prefix):
        return prefix
    raise InvalidKeyError("expected= takes the token of a SecretInfo")


def _conflict(key: SecretKey) -> ConflictError:
    return ConflictError(
        f"what is stored under {key} is not what was expected: another writer changed, deleted or "
        "created it. Read it again before you write"
    )


def _not_found(keys: Sequence[SecretKey]) -> SecretNotFoundError:
    others = f", nor under {len(keys) - 1} more of the keys" if len(keys) > 1 else ""
    return SecretNotFoundError(f"no secret is stored under {keys[0]}{others}")
