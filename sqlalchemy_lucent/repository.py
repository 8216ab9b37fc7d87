"""The repository of scoped secrets: ``LucentSecrets`` and ``AsyncLucentSecrets``.

Statements are written once, in the synchronous class; the asynchronous one runs it on the
synchronous session below its ``AsyncSession``, as SQLAlchemy does itself. Both take part in the
caller's transaction: they flush, and never commit or roll it back.
"""

from __future__ import annotations

import builtins
import enum
import functools
import importlib
import inspect as python_inspect
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast, overload

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    CursorResult,
    Executable,
    LargeBinary,
    Row,
    Select,
    String,
    Table,
    and_,
    bindparam,
    column,
    delete,
    false,
    func,
    inspect,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Mapper, Session, scoped_session
from sqlalchemy.sql.dml import Insert

from ._envelope import LONGEST_PREFIX, NONCE_SIZE, header_size, parse
from ._pagination import row_after
from ._row import encode_row
from ._schema import Schema
from ._sealing import ColumnCodec, Sealed
from ._sql import is_mysql
from .events import AccessHandler, Action, SecretAccess
from .exceptions import (
    ConfigurationError,
    ConflictError,
    DecryptionError,
    InvalidKeyError,
    SecretNotFoundError,
    SerializationError,
    UnsupportedOperationError,
    hide_locals,
)
from .keyring import Keyring, generate_master_key
from .models import LucentSecret, LucentSecretMixin, utc_now
from .secret_key import KEY_PART_NAMES, SecretKey, check_part
from .types import EncryptedJSON

if TYPE_CHECKING:  # without greenlet, which only async programs need, it does not import
    from sqlalchemy.ext.asyncio import AsyncSession

_T = TypeVar("_T")

_Key = SecretKey | str

_ROTATE_ATTEMPTS: Final = 5
"""Compare-and-swap attempts of one rotation. A second is rare, a fifth means a hot key."""

_KEYS_PER_STATEMENT: Final = 128
"""Keys of one statement, four parameters each: databases limit these, and plan long for many."""


class _Unset(enum.Enum):
    UNSET = "whatever is stored"


_UNSET: Final = _Unset.UNSET


@dataclass(frozen=True)
class SecretInfo:
    """What is known of a secret without opening it.

    `token` names the stored value for ``expected=``: another with each write and each rotation.
    `key_version` and `token` are ``None`` if the stored bytes are not sealed.
    """

    key: SecretKey
    key_version: str | None
    created_at: datetime
    updated_at: datetime
    token: str | None


class LucentSecrets:
    """Secrets under scoped keys, over a :class:`~sqlalchemy.orm.Session`.

    :param session: the caller's session, or a registry of sessions such as Flask-SQLAlchemy's
        ``db.session``; it is never committed or rolled back here.
    :param keyring: seals and opens; the default keyring, looked up at each use, if left out.
    :param model: a mapped class made with :class:`LucentSecretMixin`.
    :param on_access: is told of each use of a secret, see :mod:`sqlalchemy_lucent.events`. With
        one, a write happens in a savepoint, so that it is undone if the handler raises.
    :raises ConfigurationError: `session`, `keyring`, `model` or `on_access` is of another kind.

    Every method takes a :class:`SecretKey` or its text, and raises
    :exc:`InvalidKeyError` for one that breaks a rule.
    """

    generate_master_key = staticmethod(generate_master_key)
    key = staticmethod(SecretKey)

    @hide_locals
    def __init__(
        self,
        session: Session | scoped_session[Any],
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
        on_access: AccessHandler | None = None,
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
                "on_access= takes a plain function, also with an AsyncSession: it is given the "
                "synchronous session, and nothing would await a coroutine"
            )
        self._session = session
        self._keyring = keyring
        self._model = model
        # Of the class itself: a class beneath it that is not mapped has it too. inspect() would be
        # six calls.
        mapper: Mapper[Any] | None = getattr(model, "__mapper__", None)
        if mapper is None or mapper.class_ is not model or not issubclass(model, LucentSecretMixin):
            raise ConfigurationError(
                "model= takes a mapped class made with LucentSecretMixin, not "
                f"{getattr(model, '__name__', type(model).__name__)}"
            )
        self._mapper = mapper
        self._table: Table = mapper.local_table  # type: ignore[assignment]
        self._on_access = on_access

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._table.name}>"

    # -- one secret ------------------------------------------------------------------------------

    @hide_locals
    def set(
        self,
        key: _Key,
        value: Any,
        *,
        expected: str | Literal[_Unset.UNSET] | None = _UNSET,
    ) -> str:
        """Store `value` under `key`, and return the token of what is stored now.

        One statement. Without `expected` it is an upsert, safe under concurrent callers: the last
        one to commit wins.

        :param expected: store only if the stored value still has this token
            (:attr:`SecretInfo.token`), or if there is none, for ``None``.
        :raises SerializationError: JSON would not give `value` back equal.
        :raises ConflictError: another value is stored than `expected` says.
        """
        key = SecretKey.of(key)
        dialect = self._dialect
        sealed = self._seal(key, value, self._keyring, _codec(self._table, dialect))
        if self._on_access is None:  # without the calls of a context manager
            written = self._store(key, sealed, expected, dialect)
        else:
            with self._savepoint_if_audited():
                written = self._store(key, sealed, expected, dialect)
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
    def require(self, key: _Key) -> Any: ...

    @overload
    def require(self, key: _Key, *, as_: type[_T]) -> _T: ...

    @hide_locals
    def require(self, key: _Key, *, as_: type[_T] | None = None) -> Any:
        """Return the value stored under `key`.

        :param as_: the type to return it as: a dataclass, TypedDict, msgspec Struct or pydantic
            model.
        :raises SecretNotFoundError: there is none.
        :raises DecryptionError: it does not open; the subclass says why.
        :raises SchemaMismatchError: it does not fit `as_`; the message gives the path of the
            fault, and never the value.
        """
        key = SecretKey.of(key)
        value = self._read(key, self._load_required(key))
        return value if as_ is None else Schema(as_).load(value)

    def exists(self, key: _Key) -> bool:
        """Say whether a secret is stored under `key`, without opening it."""
        return self._execute(self._select_one(SecretKey.of(key))).first() is not None

    def info(self, key: _Key) -> SecretInfo | None:
        """Return what is known of the secret under `key` without opening it, or ``None``."""
        statement = self._select_info().where(self._matches(SecretKey.of(key)))
        row = self._execute(statement).first()
        return None if row is None else _info(row)

    def delete(self, key: _Key, *, expected: str | Literal[_Unset.UNSET] = _UNSET) -> bool:
        """Delete the secret under `key`; say whether there was one.

        :param expected: delete only if the stored value still has this token.
        :raises ConflictError: another value is stored than `expected` says, or none.
        """
        key = SecretKey.of(key)
        statement = delete(self._table).where(self._matches(key))
        if expected is not _UNSET:
            statement = statement.where(
                self._has_token(literal(_token_bytes(expected), LargeBinary))
            )
        with self._savepoint_if_audited():
            deleted = self._write([key], statement).rowcount > 0
            refused = "missing" if expected is _UNSET else "conflict"
            self._tell("delete", key, None, "ok" if deleted else refused)
        if not deleted and expected is not _UNSET:
            raise _conflict(key)
        return deleted

    def copy(self, source: _Key, target: _Key) -> None:
        """Store the secret under `source` under `target` too, sealed for it.

        :raises SecretNotFoundError: there is none under `source`.
        :raises ConflictError: there is one under `target`.
        """
        source, target = _two_keys(source, target)
        value = self._read(source, self._load_required(source))
        renewed = self._seal(target, value, self._keyring)
        with self._savepoint_if_audited():
            written = self._insert_absent(target, renewed)
            self._tell("write", target, renewed, "ok" if written else "conflict")
        if not written:
            raise _conflict(target)

    def move(self, source: _Key, target: _Key) -> None:
        """Store the secret under `source` under `target` instead, sealed for it; one UPDATE.

        :raises SecretNotFoundError: there is none under `source`.
        :raises ConflictError: there is one under `target`, or another writer changed `source`
            meanwhile.
        :raises sqlalchemy.exc.IntegrityError: another writer made `target` meanwhile.
        """
        source, target = _two_keys(source, target)
        sealed = self._load_required(source, lock=True)
        renewed = self._seal(target, self._read(source, sealed), self._keyring)
        taken = self.exists(target)
        with self._savepoint_if_audited():
            moved = not taken and self._replace(source, _prefix(bytes(sealed)), renewed, target)
            outcome = "ok" if moved else "conflict"
            self._tell("write", target, renewed, outcome)
            self._tell("delete", source, None, outcome)
        if not moved:
            raise _conflict(target if taken else source)

    @hide_locals
    def rotate(self, key: _Key, to: Keyring | None = None) -> str:
        """Seal the secret under `key` anew and return the key version that it has then.

        :param to: the keyring whose primary seals; the repository's own if left out.
        :raises SecretNotFoundError: there is none.
        :raises ConflictError: other writers changed it each time in between.
        """
        key = SecretKey.of(key)
        return self.rotate_many([key], to)[key]

    # -- many secrets ----------------------------------------------------------------------------

    @hide_locals
    def set_many(self, values: Mapping[SecretKey, Any] | Mapping[str, Any]) -> None:
        """Store each value under its key, as :meth:`set` does, with one statement for all.

        :raises SerializationError: JSON would not give a value back equal; nothing is written.
        :raises InvalidKeyError: a key breaks a rule, or stands there twice, as a key and its text.
        """
        by_key: dict[SecretKey, Any] = {}
        for given, value in values.items():
            key = SecretKey.of(given)
            if key in by_key:
                raise InvalidKeyError(f"the key {key} stands there twice")
            by_key[key] = value
        if not by_key:
            return
        dialect = self._dialect
        codec = _codec(self._table, dialect)
        sealed = {
            key: self._seal(key, value, self._keyring, codec) for key, value in by_key.items()
        }
        # In key order, so that two callers lock the same rows in the same order.
        rows = [self._row(key, sealed[key]) for key in sorted(sealed)]
        with self._savepoint_if_audited():
            self._write(sealed, _upsert(self._table, dialect.name), rows)
            for key, each in sealed.items():
                self._tell("write", key, each, "ok")

    def get_many(self, keys: Iterable[_Key]) -> dict[SecretKey, Any]:
        """Return the values stored under `keys`, in that order; keys without one are left out.

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
        """Seal the secrets under `keys` anew, as :meth:`rotate` does; return their key versions.

        :raises SecretNotFoundError: one is missing; nothing is written.
        :raises DecryptionError: one does not open; nothing is written.
        """
        keyring = to or self._keyring
        wanted = _distinct(keys)
        versions: dict[SecretKey, str] = {}
        with self._savepoint_if_audited():
            waiting = wanted
            for _ in range(_ROTATE_ATTEMPTS):
                stored = self._load_many(waiting, lock=True)
                missing = [key for key in waiting if key not in stored]
                if missing:
                    raise _not_found(missing)
                renewed = {
                    key: self._seal(key, self._open(key, stored[key]), keyring) for key in waiting
                }
                waiting = self._replace_many(stored, renewed)
                for key in renewed.keys() - waiting:
                    versions[key] = renewed[key].key_version or ""
                if not waiting:
                    break
            else:
                raise ConflictError(
                    f"the secret {waiting[0]} was changed by others each time it was rotated"
                )
            for key in wanted:
                self._tell("rotate", key, versions[key], "ok")
        return {key: versions[key] for key in wanted}

    def delete_many(
        self, *, scope: str, owner_id: str | int | uuid.UUID, provider: str | None = None
    ) -> int:
        """Delete an owner's secrets (a tenant leaves), or those of one provider; return how many.

        :raises InvalidKeyError: a part breaks a rule.
        """
        parts = _leading_parts(scope, owner_id, provider)
        if len(parts) < len(("scope", "owner_id")):
            raise InvalidKeyError("delete_many() takes the scope and the owner_id of one owner")
        condition = self._begins_with(parts)
        if self._on_access is None:
            deleted = self._write((), delete(self._table).where(condition)).rowcount
        else:
            # By their keys, so that what is told is what is deleted.
            selected = select(*self._key_columns).where(condition).with_for_update()
            keys = [_stored_key(row) for row in self._execute(selected)]
            deleted = 0
            with self._savepoint_if_audited():
                for size, parameters in _batches(keys):
                    statement = delete(self._table).where(
                        _is_one_of(self._table, self._dialect.name, size)
                    )
                    deleted += self._write((), statement, parameters).rowcount
                for key in keys:
                    self._tell("delete", key, None, "ok")
        for loaded in self._session.identity_map.values():
            if isinstance(loaded, self._model) and _key_of(loaded)[: len(parts)] == parts:
                self._expire(loaded)
        return deleted

    # -- what there is ---------------------------------------------------------------------------

    def list(
        self,
        *,
        scope: str | None = None,
        owner_id: str | int | uuid.UUID | None = None,
        provider: str | None = None,
        name: str | None = None,
        limit: int | None = None,
        after: _Key | None = None,
    ) -> builtins.list[SecretInfo]:
        """Return what is known of the secrets whose keys begin with the given parts, in key order.

        Opens none of them.

        :param limit: the most to return: one page.
        :param after: return those behind this key: the last key of the page before. It costs the
            same on the last page as on the first.
        :raises InvalidKeyError: a part breaks a rule, or is given without the parts before it.
        """
        parts = _leading_parts(scope, owner_id, provider, name)
        statement = self._select_info().order_by(*self._key_columns).limit(limit)
        if parts:
            statement = statement.where(self._begins_with(parts))
        if after is not None:
            behind = SecretKey.of(after)
            if behind[: len(parts)] != parts:
                raise InvalidKeyError(f"after= is a key of another listing, {behind}")
            statement = statement.where(self._is_behind(behind, len(parts)))
        return [_info(row) for row in self._execute(statement)]

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
        statement = select(func.count()).select_from(self._table)
        parts = _leading_parts(scope, owner_id, provider)
        if parts:
            statement = statement.where(self._begins_with(parts))
        count: int = self._execute(statement).scalar_one()
        return count

    # -- conditions ------------------------------------------------------------------------------

    @property
    def _key_columns(self) -> builtins.list[ColumnElement[str]]:
        return [self._table.c[name] for name in KEY_PART_NAMES]

    def _matches(self, key: SecretKey) -> ColumnElement[bool]:
        return self._begins_with(key)

    def _begins_with(self, parts: Sequence[str]) -> ColumnElement[bool]:
        return and_(
            *(column == part for column, part in zip(self._key_columns, parts, strict=False))
        )

    def _is_behind(self, key: SecretKey, fixed: int) -> ColumnElement[bool]:
        """Return whether a key, of which the first `fixed` parts are given, comes after `key`."""
        columns, parts = self._key_columns[fixed:], key[fixed:]
        if not columns:
            return false()
        return row_after(columns, [literal(part) for part in parts], self._dialect)

    def _has_token(self, token: ColumnElement[bytes]) -> ColumnElement[bool]:
        size = func.length(token)
        return func.substr(self._table.c.payload, 1, size, type_=LargeBinary) == token

    # -- reading ---------------------------------------------------------------------------------

    def _select_one(self, key: SecretKey) -> Any:
        return select(literal(1)).where(self._matches(key))

    def _select_info(self) -> Any:
        columns = self._table.c
        return select(
            *self._key_columns,
            columns.key_version,
            columns.created_at,
            columns.updated_at,
            func.substr(columns.payload, 1, LONGEST_PREFIX, type_=LargeBinary).label("prefix"),
        )

    def _load(self, key: SecretKey, *, lock: bool = False) -> Sealed | None:
        statement = _select_payload(self._table)
        if lock:
            statement = statement.with_for_update()
        sealed: Sealed | None = self._execute(statement, key._asdict()).scalar()
        return sealed

    def _load_required(self, key: SecretKey, *, lock: bool = False) -> Sealed:
        sealed = self._load(key, lock=lock)
        if sealed is None:
            self._tell("read", key, None, "missing")
            raise _not_found([key])
        return sealed

    def _load_many(
        self, keys: Sequence[SecretKey], *, lock: bool = False
    ) -> dict[SecretKey, Sealed]:
        found: dict[SecretKey, Sealed] = {}
        if not keys:
            return found
        # In key order, so that two callers lock the same rows in the same order.
        ordered = sorted(keys)
        statements: Iterable[tuple[Select[Any], Any]]
        locked = None
        dialect_name = self._dialect.name
        if dialect_name == "postgresql":
            parts = map(list, zip(*ordered, strict=True))
            arrays = dict(zip(KEY_PART_NAMES, parts, strict=True))
            statements = [(_select_payloads_by_arrays(self._table), arrays)]
            locked = self._table  # and not the arrays
        else:
            statements = (
                (_select_payloads(self._table, dialect_name, size), parameters)
                for size, parameters in _batches(ordered)
            )
        for statement, parameters in statements:
            if lock:
                statement = statement.order_by(*self._key_columns).with_for_update(of=locked)
            for row in self._execute(statement, parameters):
                found[_stored_key(row[:-1])] = row[-1]
        return found

    def _read(self, key: SecretKey, sealed: Sealed) -> Any:
        """Open a value for the caller, and tell of it."""
        try:
            value = self._open(key, sealed)
        except (DecryptionError, SerializationError) as error:
            refusal = error
        else:
            self._tell("read", key, sealed, "ok")
            return value
        self._tell("read", key, sealed, type(refusal).__name__)
        raise refusal

    def _open(self, key: SecretKey, sealed: Sealed) -> Any:
        # Sealed.open(), without its check of `row`.
        return sealed._codec.open(sealed._data, encode_row(key), self._keyring)

    # -- writing ---------------------------------------------------------------------------------

    @property
    def _dialect(self) -> Dialect:
        return self._session.get_bind(self._mapper).dialect

    def _seal(
        self,
        key: SecretKey,
        value: Any,
        keyring: Keyring | None,
        codec: ColumnCodec | None = None,
    ) -> Sealed:
        codec = codec or _codec(self._table, self._dialect)
        row = encode_row(key)
        return Sealed(codec.seal(value, row, keyring), codec, row)

    @staticmethod
    def _row(key: SecretKey, sealed: Sealed) -> dict[str, Any]:
        now = utc_now()
        return {**key._asdict(), "payload": sealed, "created_at": now, "updated_at": now}

    def _store(
        self,
        key: SecretKey,
        sealed: Sealed,
        expected: str | Literal[_Unset.UNSET] | None,
        dialect: Dialect,
    ) -> bool:
        """Write the value under `key`; say whether what was stored is what `expected` says."""
        if expected is _UNSET:
            self._write([key], _upsert(self._table, dialect.name), self._row(key, sealed))
            return True
        if expected is None:
            return self._insert_absent(key, sealed)
        return self._replace(key, _token_bytes(expected), sealed)

    def _insert_absent(self, key: SecretKey, sealed: Sealed) -> bool:
        """Insert the secret unless there is one; say whether it was inserted."""
        # SQLAlchemy keeps the row count of an INSERT only if it is told to.
        statement = _insert(self._table, self._dialect.name, ()).execution_options(
            preserve_rowcount=True
        )
        count = self._write([key], statement, self._row(key, sealed)).rowcount
        if not is_mysql(self._dialect):
            return count > 0
        # MySQL counts 1 for a row that it left alone too. What is stored tells: nobody else can
        # have made the same bytes.
        stored = self._load(key)
        return stored is not None and bytes(stored) == bytes(sealed)

    def _replace(
        self, key: SecretKey, token: bytes, sealed: Sealed, moved_to: SecretKey | None = None
    ) -> bool:
        """Compare-and-swap the value under `key`; say whether it was swapped."""
        values: dict[str, Any] = {"payload": sealed, "updated_at": utc_now()}
        keys = [key]
        if moved_to is not None:
            values.update(moved_to._asdict())
            keys.append(moved_to)
        statement = update(self._table).where(
            self._matches(key), self._has_token(literal(token, LargeBinary))
        )
        return self._write(keys, statement.values(values)).rowcount > 0

    def _replace_many(
        self, stored: Mapping[SecretKey, Sealed], renewed: Mapping[SecretKey, Sealed]
    ) -> builtins.list[SecretKey]:
        """Compare-and-swap each value, with one statement; return the keys of those that others
        changed in between.

        The old bytes are compared for databases that take no row lock: a concurrent writer wins.
        `updated_at` is named to switch off its `onupdate`: a rotation is no edit.
        """
        if not renewed:
            return []
        statement = (
            update(self._table)
            .where(
                *(
                    column == bindparam(f"key_{name}")
                    for column, name in zip(self._key_columns, KEY_PART_NAMES, strict=True)
                ),
                self._has_token(bindparam("token", type_=LargeBinary)),
            )
            .values(payload=bindparam("renewed"), updated_at=self._table.c.updated_at)
        )
        parameters = [
            {
                **{f"key_{name}": part for name, part in key._asdict().items()},
                "token": _prefix(bytes(stored[key])),
                "renewed": sealed,
            }
            for key, sealed in renewed.items()
        ]
        count = self._write(renewed, statement, parameters).rowcount
        # asyncpg does not count; PostgreSQL has locked the rows, so none can have been missed.
        if count in (len(renewed), -1):
            return []
        current = self._load_many(builtins.list(renewed))
        return [key for key, sealed in renewed.items() if current.get(key) != sealed]

    def _write(
        self, keys: Iterable[SecretKey], statement: Executable, parameters: Any = None
    ) -> CursorResult[Any]:
        result = self._execute(statement, parameters)
        # An object of such a secret that the session has loaded is out of date now.
        if self._session.identity_map:
            for key in keys:
                identity = self._mapper.identity_key_from_primary_key(tuple(key))
                loaded = self._session.identity_map.get(identity)
                if loaded is not None:
                    self._expire(loaded)
        return result  # whose row count takes four calls

    def _expire(self, loaded: Any) -> None:
        # Not if it waits to be flushed (with autoflush off): its changes are the caller's.
        if not inspect(loaded).modified:
            self._session.expire(loaded)

    def _execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        # These are Core statements, which a session does not autoflush for by itself.
        if self._session.autoflush:
            self._session.flush()
        result: Any = self._session.execute(
            statement, parameters, bind_arguments={"mapper": self._mapper}
        )
        return result  # type: ignore[no-any-return]

    # -- telling ---------------------------------------------------------------------------------

    def _tell(
        self, action: Action, key: SecretKey, version: Sealed | str | None, outcome: str
    ) -> None:
        if self._on_access is not None:
            if isinstance(version, Sealed):
                version = version.key_version
            access = SecretAccess(action, key, version, utc_now(), outcome)
            session = self._session
            self._on_access(access, session() if isinstance(session, scoped_session) else session)

    @contextmanager
    def _savepoint_if_audited(self) -> Iterator[None]:
        """Undo what is written inside if it raises, which with a handler it may do late."""
        if self._on_access is None:
            yield
            return
        connection = self._session.connection(bind_arguments={"mapper": self._mapper})
        if connection.dialect.name == "sqlite":
            # Python's sqlite3 begins a transaction before the first write, and not before a
            # savepoint: releasing that one would commit.
            driver_connection: Any = connection.connection.driver_connection
            if not driver_connection.in_transaction:
                connection.exec_driver_sql("BEGIN")
        with self._session.begin_nested():
            yield


class AsyncLucentSecrets:
    """Secrets under scoped keys, over an :class:`~sqlalchemy.ext.asyncio.AsyncSession`.

    The same methods as :class:`LucentSecrets`, to be awaited. `on_access` is a plain function here
    too, and is given the synchronous session.
    """

    generate_master_key = staticmethod(generate_master_key)
    key = staticmethod(SecretKey)

    @hide_locals
    def __init__(
        self,
        session: AsyncSession,
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
        on_access: AccessHandler | None = None,
    ) -> None:
        if not hasattr(session, "sync_session"):
            raise ConfigurationError(
                f"session= takes an AsyncSession, not {type(session).__name__}"
            )
        self._session = session
        self._secrets = LucentSecrets(
            session.sync_session, keyring=keyring, model=model, on_access=on_access
        )

    def __repr__(self) -> str:
        return repr(self._secrets).replace("<", "<Async", 1)

    async def _run(self, operation: Callable[[LucentSecrets], _T]) -> _T:
        return await self._session.run_sync(lambda _: operation(self._secrets))

    @hide_locals
    async def set(
        self,
        key: _Key,
        value: Any,
        *,
        expected: str | Literal[_Unset.UNSET] | None = _UNSET,
    ) -> str:
        """See :meth:`LucentSecrets.set`."""
        return await self._run(lambda secrets: secrets.set(key, value, expected=expected))

    async def get(self, key: _Key) -> Any:
        """See :meth:`LucentSecrets.get`."""
        return await self._run(lambda secrets: secrets.get(key))

    @overload
    async def require(self, key: _Key) -> Any: ...

    @overload
    async def require(self, key: _Key, *, as_: type[_T]) -> _T: ...

    @hide_locals
    async def require(self, key: _Key, *, as_: type[_T] | None = None) -> Any:
        """See :meth:`LucentSecrets.require`."""
        if as_ is None:
            return await self._run(lambda secrets: secrets.require(key))
        return await self._run(lambda secrets: secrets.require(key, as_=as_))

    async def exists(self, key: _Key) -> bool:
        """See :meth:`LucentSecrets.exists`."""
        return await self._run(lambda secrets: secrets.exists(key))

    async def info(self, key: _Key) -> SecretInfo | None:
        """See :meth:`LucentSecrets.info`."""
        return await self._run(lambda secrets: secrets.info(key))

    async def delete(self, key: _Key, *, expected: str | Literal[_Unset.UNSET] = _UNSET) -> bool:
        """See :meth:`LucentSecrets.delete`."""
        return await self._run(lambda secrets: secrets.delete(key, expected=expected))

    async def copy(self, source: _Key, target: _Key) -> None:
        """See :meth:`LucentSecrets.copy`."""
        await self._run(lambda secrets: secrets.copy(source, target))

    async def move(self, source: _Key, target: _Key) -> None:
        """See :meth:`LucentSecrets.move`."""
        await self._run(lambda secrets: secrets.move(source, target))

    @hide_locals
    async def rotate(self, key: _Key, to: Keyring | None = None) -> str:
        """See :meth:`LucentSecrets.rotate`."""
        return await self._run(lambda secrets: secrets.rotate(key, to))

    @hide_locals
    async def set_many(self, values: Mapping[SecretKey, Any] | Mapping[str, Any]) -> None:
        """See :meth:`LucentSecrets.set_many`."""
        await self._run(lambda secrets: secrets.set_many(values))

    async def get_many(self, keys: Iterable[_Key]) -> dict[SecretKey, Any]:
        """See :meth:`LucentSecrets.get_many`."""
        return await self._run(lambda secrets: secrets.get_many(keys))

    @hide_locals
    async def rotate_many(
        self, keys: Iterable[_Key], to: Keyring | None = None
    ) -> dict[SecretKey, str]:
        """See :meth:`LucentSecrets.rotate_many`."""
        return await self._run(lambda secrets: secrets.rotate_many(keys, to))

    async def delete_many(
        self, *, scope: str, owner_id: str | int | uuid.UUID, provider: str | None = None
    ) -> int:
        """See :meth:`LucentSecrets.delete_many`."""
        return await self._run(
            lambda secrets: secrets.delete_many(scope=scope, owner_id=owner_id, provider=provider)
        )

    async def list(
        self,
        *,
        scope: str | None = None,
        owner_id: str | int | uuid.UUID | None = None,
        provider: str | None = None,
        name: str | None = None,
        limit: int | None = None,
        after: _Key | None = None,
    ) -> builtins.list[SecretInfo]:
        """See :meth:`LucentSecrets.list`."""
        return await self._run(
            lambda secrets: secrets.list(
                scope=scope,
                owner_id=owner_id,
                provider=provider,
                name=name,
                limit=limit,
                after=after,
            )
        )

    async def count(
        self,
        *,
        scope: str | None = None,
        owner_id: str | int | uuid.UUID | None = None,
        provider: str | None = None,
    ) -> int:
        """See :meth:`LucentSecrets.count`."""
        return await self._run(
            lambda secrets: secrets.count(scope=scope, owner_id=owner_id, provider=provider)
        )


@functools.lru_cache(maxsize=32)
def _codec(table: Table, dialect: Dialect) -> ColumnCodec:
    """Return what seals and opens payloads; kept, because making it takes as long as sealing."""
    type_ = table.c.payload.type
    assert isinstance(type_, EncryptedJSON)
    return type_.column_codec(dialect)


@functools.lru_cache(maxsize=32)
def _select_payload(table: Table) -> Select[Any]:
    """Return the SELECT of one payload, with a parameter for each part of the key.

    Kept, because building it anew takes a third of the time of a whole `require`.
    """
    return select(table.c.payload).where(
        *(table.c[name] == bindparam(name) for name in KEY_PART_NAMES)
    )


@functools.lru_cache(maxsize=256)
def _is_one_of(table: Table, dialect_name: str, size: int) -> ColumnElement[bool]:
    """Return whether a key is one of `size` given as parameters; kept for the same reason.

    `(a, b, …) IN (…)` is what MySQL and MariaDB take less time for. For it, SQLite scans the table,
    and PostgreSQL plans twice as long.
    """
    columns = [table.c[name] for name in KEY_PART_NAMES]
    keys = [
        [bindparam(f"{column.name}_{position}", type_=column.type) for column in columns]
        for position in range(size)
    ]
    if dialect_name in ("mysql", "mariadb"):
        return tuple_(*columns).in_([tuple_(*key) for key in keys])
    return or_(
        *(
            and_(*(column == part for column, part in zip(columns, key, strict=True)))
            for key in keys
        )
    )


@functools.lru_cache(maxsize=256)
def _select_payloads(table: Table, dialect_name: str, size: int) -> Select[Any]:
    """Return the SELECT of the payloads under `size` keys, with their keys."""
    columns = (table.c[name] for name in (*KEY_PART_NAMES, "payload"))
    return select(*columns).where(_is_one_of(table, dialect_name, size))


@functools.lru_cache(maxsize=32)
def _select_payloads_by_arrays(table: Table) -> Select[Any]:
    """Return PostgreSQL's SELECT of the payloads under any number of keys, with their keys.

    An array for each part of the keys: the statement is the same for all, and is planned as a join.
    """
    wanted = (
        func.unnest(*(bindparam(name, type_=ARRAY(String)) for name in KEY_PART_NAMES))
        .table_valued(*(column(name, String) for name in KEY_PART_NAMES), name="wanted")
        .render_derived()
    )
    columns = (table.c[name] for name in (*KEY_PART_NAMES, "payload"))
    return select(*columns).where(*(table.c[name] == wanted.c[name] for name in KEY_PART_NAMES))


def _upsert(table: Table, dialect_name: str) -> Insert:
    """Return the dialect's one-statement upsert; `created_at` stays that of the first write."""
    return _insert(table, dialect_name, ("payload", "updated_at"))


@functools.lru_cache(maxsize=32)
def _insert(table: Table, dialect_name: str, renewed: tuple[str, ...]) -> Insert:
    """Return an INSERT that takes over the columns `renewed` where the key is taken already.

    Kept, because building it takes as long as running it. A dialect is imported with its database
    only, because importing all three takes as long as the rest of the package.
    """
    if dialect_name in ("mysql", "mariadb"):
        from sqlalchemy.dialects import mysql

        # Callers that insert one new key at once wait for the first, and go on when it commits. If
        # it rolls back, InnoDB leaves each of them a lock on the gap where the row was, and ends
        # the deadlock (error 1213) by undoing one of their transactions as a whole. No form of
        # INSERT takes other locks there, and to repeat the statement would lose the rest of that
        # transaction; so the error goes to the caller, whose transaction it is to repeat.
        mysql_insert = mysql.insert(table)
        # Of nothing at all there is no such form: assigning a column to itself leaves the row.
        return mysql_insert.on_duplicate_key_update(
            {name: mysql_insert.inserted[name] for name in renewed} or {"scope": table.c.scope}
        )
    if dialect_name in ("postgresql", "sqlite"):
        module = importlib.import_module(f"sqlalchemy.dialects.{dialect_name}")
        insert: Any = module.insert(table)
        statement: Insert = (
            insert.on_conflict_do_update(
                index_elements=KEY_PART_NAMES,
                set_={name: insert.excluded[name] for name in renewed},
            )
            if renewed
            else insert.on_conflict_do_nothing(index_elements=KEY_PART_NAMES)
        )
        return statement
    raise UnsupportedOperationError(
        f"LucentSecrets has no upsert for the dialect {dialect_name!r}; "
        "there is one for sqlite, postgresql, mysql and mariadb"
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


def _batches(keys: Sequence[SecretKey]) -> Iterator[tuple[int, dict[str, str]]]:
    """Give the parameters of :func:`_is_one_of` for `keys`, batch by batch.

    The last key of a batch fills it up to a power of two, so that there are few sizes.
    """
    for start in range(0, len(keys), _KEYS_PER_STATEMENT):
        batch = keys[start : start + _KEYS_PER_STATEMENT]
        size = 1 << (len(batch) - 1).bit_length()
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        yield (
            size,
            {
                f"{name}_{position}": part
                for position, key in enumerate(filled)
                for name, part in zip(KEY_PART_NAMES, key, strict=True)
            },
        )


def _stored_key(parts: Iterable[str]) -> SecretKey:
    # Not checked again: a key that breaks a rule was not written by us, and is shown as it is.
    return tuple.__new__(SecretKey, parts)


def _info(row: Row[Any]) -> SecretInfo:
    key = _stored_key((row.scope, row.owner_id, row.provider, row.name))
    return SecretInfo(key, row.key_version, row.created_at, row.updated_at, _token(row.prefix))


def _key_of(secret: LucentSecretMixin) -> tuple[str, ...]:
    # From the identity: reading an expired attribute would go to the database.
    identity: tuple[str, ...] = inspect(secret).identity
    return identity


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


def _token_bytes(token: object) -> bytes:
    try:
        prefix = bytes.fromhex(cast("str", token))
    except (TypeError, ValueError):
        prefix = b""
    # A whole one, because so many bytes are compared as it has.
    if _is_token(prefix):
        return prefix
    raise InvalidKeyError("expected= takes the token of a SecretInfo")


def _conflict(key: SecretKey) -> ConflictError:
    return ConflictError(
        f"what is stored under {key} is not what was expected: it was changed, deleted or made by "
        "another writer. Read it again and decide anew"
    )


def _not_found(keys: Sequence[SecretKey]) -> SecretNotFoundError:
    others = f", nor under {len(keys) - 1} more of the keys" if len(keys) > 1 else ""
    return SecretNotFoundError(f"no secret is stored under {keys[0]}{others}")
