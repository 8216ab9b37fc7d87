"""Values of scoped secrets: sealed for their row, opened, and opened with a report.

The row is that of the secret, or of one of its versions, which has a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import sqlalchemy as sa

from ._row import encode_row
from ._sealing import ColumnCodec, Sealed
from .events import Action
from .exceptions import DecryptionError, SerializationError
from .keyring import Keyring
from .secret_key import SecretKey
from .types import EncryptedJSON

Tell: TypeAlias = Callable[[Action, SecretKey, Sealed | None, str], None]
"""Reports an action on a value, and its outcome."""


@lru_cache(maxsize=32)
def _codec(table: sa.Table, dialect: sa.Dialect) -> ColumnCodec:
    """Return the codec of the payloads; making one takes as long as sealing."""
    type_ = table.c.payload.type
    assert isinstance(type_, EncryptedJSON)
    return type_.column_codec(dialect)


def seal_payload(
    table: sa.Table,
    dialect: sa.Dialect,
    key: SecretKey,
    value: Any,
    keyring: Keyring | None,
    number: int | None = None,
) -> Sealed:
    """Seal a value for its row in `table`."""
    codec = _codec(table, dialect)
    row = encode_row(key if number is None else (*key, number))
    return Sealed(codec.seal(value, row, keyring), codec, row)


def open_payload(
    sealed: Sealed, key: SecretKey, keyring: Keyring | None, number: int | None = None
) -> Any:
    """Open a value that was read from its row."""
    # Sealed.open() would check the row each time.
    row = encode_row(key if number is None else (*key, number))
    return sealed._codec.open(sealed._data, row, keyring)


def read_payload(
    sealed: Sealed, key: SecretKey, keyring: Keyring | None, tell: Tell, number: int | None = None
) -> Any:
    """Open a value for the caller, and report the access."""
    try:
        value = open_payload(sealed, key, keyring, number)
    except (DecryptionError, SerializationError) as error:
        refusal = error
    else:
        tell("read", key, sealed, "ok")
        return value
    tell("read", key, sealed, type(refusal).__name__)
    raise refusal
