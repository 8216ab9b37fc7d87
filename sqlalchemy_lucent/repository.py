"""
The repository of scoped secrets: ``LucentSecrets`` and ``AsyncLucentSecrets``.

Statements are written once, in the synchronous class; the asynchronous one runs it on the
synchronous session below its ``AsyncSession``, as SQLAlchemy does itself. Both take part in the
caller's transaction: they flush, and never commit or roll back.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Executable,
    LargeBinary,
    Result,
    Row,
    Table,
    and_,
    delete,
    inspect,
    literal,
    select,
    type_coerce,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Insert

from .exceptions import (
    ConfigurationError,
    ConflictError,
    InvalidKeyError,
    SecretNotFoundError,
    UnsupportedOperationError,
)
from .keyring import Keyring, generate_master_key
from .models import LucentSecret, LucentSecretMixin, utc_now
from .secret_key import KEY_PART_NAMES, SecretKey, check_part
from .types import ColumnCodec, EncryptedJSON, Sealed, encode_row

_T = TypeVar("_T")

_ROTATE_ATTEMPTS: Final = 5
"""Compare-and-swap attempts of one `rotate`. A second is rare, a fifth means a hot key."""


@dataclass(frozen=True)
class SecretInfo:
    """What is known of a secret without opening it."""

    key: SecretKey
    key_version: str | None
    created_at: datetime
    updated_at: datetime


class LucentSecrets:
    """
    Secrets under scoped keys, over a :class:`~sqlalchemy.orm.Session`.

    :param session: the caller's session; it is never committed or rolled back here.
    :param keyring: seals and opens; the default keyring, looked up at each use, if left out.
    :param model: a mapped class made with :class:`LucentSecretMixin`.

    Every method takes a :class:`SecretKey` or its text, and raises
    :exc:`InvalidKeyError` for one that breaks a rule.
    """

    generate_master_key = staticmethod(generate_master_key)
    key = staticmethod(SecretKey)

    def __init__(
        self,
        session: Session,
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
    ) -> None:
        if keyring is not None and not isinstance(keyring, Keyring):
            raise ConfigurationError(f"keyring= takes a Keyring, not {type(keyring).__name__}")
        self._session = session
        self._keyring = keyring
        self._model = model
        self._mapper = inspect(model)
        self._table = cast("Table", self._mapper.local_table)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._table.name}>"

    def set(self, key: SecretKey | str, value: Any) -> None:
        """
        Store `value` under `key`, whether or not there is a secret already.

        One upsert statement, safe under concurrent callers: the last one to commit wins.

        :raises SerializationError: JSON would not give `value` back equal.
        """
        key = SecretKey.of(key)
        payload = self._seal(key, value, self._keyring)
        now = utc_now()
        self._write(
            key,
            _upsert(
                self._table,
                self._dialect,
                {**key._asdict(), "payload": payload, "created_at": now, "updated_at": now},
            ),
        )

    def get(self, key: SecretKey | str) -> Any:
        """
        Return the value stored under `key`, or ``None``.

        :raises DecryptionError: the value does not open; the subclass says why.
        """
        key = SecretKey.of(key)
        sealed = self._load(key)
        return None if sealed is None else self._open(key, sealed)

    def require(self, key: SecretKey | str) -> Any:
        """
        Return the value stored under `key`.

        :raises SecretNotFoundError: there is none.
        :raises DecryptionError: it does not open; the subclass says why.
        """
        key = SecretKey.of(key)
        return self._open(key, self._load_required(key))

    def exists(self, key: SecretKey | str) -> bool:
        """Say whether a secret is stored under `key`, without opening it."""
        found = self._execute(select(literal(1)).where(self._matches(SecretKey.of(key))))
        return found.first() is not None

    def delete(self, key: SecretKey | str) -> bool:
        """Delete the secret under `key`; say whether there was one."""
        key = SecretKey.of(key)
        return self._write(key, delete(self._table).where(self._matches(key))) > 0

    def list(
        self,
        *,
        scope: str | None = None,
        owner_id: str | None = None,
        provider: str | None = None,
    ) -> builtins.list[SecretInfo]:
        """
        Return what is known of the secrets whose keys begin with the given parts, in key order.

        Opens none of them.

        :raises InvalidKeyError: a part breaks a rule, or is given without the parts before it.
        """
        columns = self._table.c
        statement = select(
            *self._key_columns, columns.key_version, columns.created_at, columns.updated_at
        ).order_by(*self._key_columns)
        for column, part in self._leading(scope, owner_id, provider):
            statement = statement.where(column == part)
        return [_info(row) for row in self._execute(statement).all()]

    def rotate(self, key: SecretKey | str, to: Keyring | None = None) -> str:
        """
        Seal the secret under `key` anew and return the key version that it has then.

        :param to: the keyring whose primary seals; the repository's own if left out.
        :raises SecretNotFoundError: there is none.
        :raises ConflictError: other writers changed it each time in between.
        """
        key = SecretKey.of(key)
        target = to or self._keyring
        for _ in range(_ROTATE_ATTEMPTS):
            sealed = self._load_required(key, lock=True)
            renewed = self._seal(key, self._open(key, sealed), target)
            # `updated_at` is named to switch off its `onupdate`: a rotation is no edit. The old
            # bytes are compared for databases that take no row lock: a concurrent writer wins.
            changed = self._write(
                key,
                update(self._table)
                .where(self._matches(key), self._payload_bytes == bytes(sealed))
                .values(payload=renewed, updated_at=self._table.c.updated_at),
            )
            if changed:
                assert renewed.key_version is not None
                return renewed.key_version
        raise ConflictError(f"the secret {key} was changed by others each time it was rotated")

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _dialect(self) -> Dialect:
        return self._session.get_bind(self._mapper).dialect

    @property
    def _codec(self) -> ColumnCodec:
        type_ = self._table.c.payload.type
        assert isinstance(type_, EncryptedJSON)
        return type_.column_codec(self._dialect)

    @property
    def _payload_bytes(self) -> ColumnElement[bytes]:
        return type_coerce(self._table.c.payload, LargeBinary())

    @property
    def _key_columns(self) -> builtins.list[ColumnElement[str]]:
        return [self._table.c[name] for name in KEY_PART_NAMES]

    def _matches(self, key: SecretKey) -> ColumnElement[bool]:
        return and_(*(column == part for column, part in zip(self._key_columns, key, strict=True)))

    def _leading(self, *parts: str | None) -> Iterator[tuple[ColumnElement[str], str]]:
        for position, (name, part) in enumerate(zip(KEY_PART_NAMES, parts, strict=False)):
            if part is None:
                continue
            if None in parts[:position]:
                raise InvalidKeyError(
                    f"{name}= filters only together with every part before it: "
                    f"{', '.join(KEY_PART_NAMES[:position])}"
                )
            check_part(name, part)
            yield self._table.c[name], part

    def _seal(self, key: SecretKey, value: Any, keyring: Keyring | None) -> Sealed:
        codec = self._codec
        return Sealed(codec.seal(value, encode_row(key), keyring), codec)

    def _open(self, key: SecretKey, sealed: Sealed) -> Any:
        return sealed.open(row=key, keyring=self._keyring)

    def _load(self, key: SecretKey, *, lock: bool = False) -> Sealed | None:
        statement = select(self._table.c.payload).where(self._matches(key))
        if lock:
            statement = statement.with_for_update()
        return cast("Sealed | None", self._execute(statement).scalar())

    def _load_required(self, key: SecretKey, *, lock: bool = False) -> Sealed:
        sealed = self._load(key, lock=lock)
        if sealed is None:
            raise SecretNotFoundError(f"no secret is stored under {key}")
        return sealed

    def _execute(self, statement: Executable) -> Result[Any]:
        # These are Core statements, which a session does not autoflush for by itself.
        if self._session.autoflush:
            self._session.flush()
        return self._session.execute(statement, bind_arguments={"mapper": self._mapper})

    def _write(self, key: SecretKey, statement: Executable) -> int:
        count = cast("CursorResult[Any]", self._execute(statement)).rowcount
        # An object of this secret that the session has loaded is out of date now.
        identity = self._mapper.identity_key_from_primary_key(tuple(key))
        loaded = self._session.identity_map.get(identity)
        if loaded is not None:
            self._session.expire(loaded)
        return count


class AsyncLucentSecrets:
    """
    Secrets under scoped keys, over an :class:`~sqlalchemy.ext.asyncio.AsyncSession`.

    The same methods as :class:`LucentSecrets`, to be awaited.
    """

    generate_master_key = staticmethod(generate_master_key)
    key = staticmethod(SecretKey)

    def __init__(
        self,
        session: AsyncSession,
        *,
        keyring: Keyring | None = None,
        model: type[LucentSecretMixin] = LucentSecret,
    ) -> None:
        self._session = session
        self._secrets = LucentSecrets(session.sync_session, keyring=keyring, model=model)

    def __repr__(self) -> str:
        return repr(self._secrets).replace("<", "<Async", 1)

    async def _run(self, operation: Callable[[LucentSecrets], _T]) -> _T:
        return await self._session.run_sync(lambda _: operation(self._secrets))

    async def set(self, key: SecretKey | str, value: Any) -> None:
        """See :meth:`LucentSecrets.set`."""
        await self._run(lambda secrets: secrets.set(key, value))

    async def get(self, key: SecretKey | str) -> Any:
        """See :meth:`LucentSecrets.get`."""
        return await self._run(lambda secrets: secrets.get(key))

    async def require(self, key: SecretKey | str) -> Any:
        """See :meth:`LucentSecrets.require`."""
        return await self._run(lambda secrets: secrets.require(key))

    async def exists(self, key: SecretKey | str) -> bool:
        """See :meth:`LucentSecrets.exists`."""
        return await self._run(lambda secrets: secrets.exists(key))

    async def delete(self, key: SecretKey | str) -> bool:
        """See :meth:`LucentSecrets.delete`."""
        return await self._run(lambda secrets: secrets.delete(key))

    async def list(
        self,
        *,
        scope: str | None = None,
        owner_id: str | None = None,
        provider: str | None = None,
    ) -> builtins.list[SecretInfo]:
        """See :meth:`LucentSecrets.list`."""
        return await self._run(
            lambda secrets: secrets.list(scope=scope, owner_id=owner_id, provider=provider)
        )

    async def rotate(self, key: SecretKey | str, to: Keyring | None = None) -> str:
        """See :meth:`LucentSecrets.rotate`."""
        return await self._run(lambda secrets: secrets.rotate(key, to))


def _info(row: Row[Any]) -> SecretInfo:
    key = SecretKey(row.scope, row.owner_id, row.provider, row.name)
    return SecretInfo(key, row.key_version, row.created_at, row.updated_at)


def _upsert(table: Table, dialect: Dialect, values: dict[str, Any]) -> Insert:
    """Return the dialect's one-statement upsert; `created_at` stays that of the first write."""
    renewed = ("payload", "updated_at")
    if dialect.name in ("mysql", "mariadb"):
        mysql_insert = mysql.insert(table).values(values)
        return mysql_insert.on_duplicate_key_update(
            {name: mysql_insert.inserted[name] for name in renewed}
        )
    if dialect.name in ("postgresql", "sqlite"):
        module = postgresql if dialect.name == "postgresql" else sqlite
        insert: Any = module.insert(table).values(values)
        upsert: Insert = insert.on_conflict_do_update(
            index_elements=KEY_PART_NAMES,
            set_={name: insert.excluded[name] for name in renewed},
        )
        return upsert
    raise UnsupportedOperationError(
        f"LucentSecrets.set() has no upsert for the dialect {dialect.name!r}; "
        "there is one for sqlite, postgresql, mysql and mariadb"
    )
