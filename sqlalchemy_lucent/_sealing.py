"""How a column's values are sealed and opened: its codec, ``Sealed`` and ``Bound``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from sqlalchemy import JSON
from sqlalchemy.sql.elements import Null
from sqlalchemy.types import TypeDecorator

from ._envelope import parse
from ._json import DECODE_ERRORS, STRICT, Codec, decode, unreadable
from ._redacted import REDACTED
from ._row import RowPart, encode_row
from ._schema import Schema
from .exceptions import (
    ConfigurationError,
    LucentError,
    PicklingRefusedError,
    SerializationError,
    TamperedError,
    hide_locals,
)
from .keyring import Keyring, context_keys

_JSON_NULL: Final = b"null"

_DOCUMENT_TYPES: Final = frozenset({dict, list, str, int, float, bool})
"""Types whose values are documents. ``None``, ``JSON.NULL``, ``null()``, `Sealed` and `Bound` have
a meaning of their own."""


class SealedType(TypeDecorator[Any]):
    """What the rest of the package asks of a sealed column's type: the base of `EncryptedJSON`."""

    context: str | None
    accept_contexts: tuple[str, ...]
    bound_to: tuple[str, ...]

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context that values are sealed in, then the others that they are opened in.

        :raises ConfigurationError: the type has no context.
        """
        if self.context is None:
            raise ConfigurationError(
                "this EncryptedJSON belongs to no column of a table, so it has no context to bind "
                'values to; give it one: EncryptedJSON(context="table.column")'
            )
        return (self.context, *self.accept_contexts)


class ColumnCodec:
    """Seals and opens the values of one column as one engine sees it. Internal."""

    __slots__ = ("_load", "_redacted", "bound_to", "codec", "contexts", "dump", "schema")

    def __init__(
        self,
        contexts: tuple[str, ...],
        codec: Codec,
        bound_to: tuple[str, ...],
        redacts: bool,
        schema: Schema[Any] | None = None,
    ) -> None:
        self.contexts = contexts
        self.codec = codec
        self.bound_to = bound_to
        self.schema = schema
        self._redacted = REDACTED if redacts else {}
        self.dump: Callable[[Any], bytes] = self._dump_typed
        self._load: Callable[[bytes], Any] = self._load_typed
        if schema is None:
            self.dump = codec.dumps
            self._load = decode if codec is STRICT else codec.loads  # without a call in between

    def seal(self, value: Any, row: bytes = b"", keyring: Keyring | None = None) -> bytes:
        """Return the stored bytes of a document."""
        try:
            return context_keys(self.contexts, keyring).seal(self.dump(value), row)
        except LucentError as error:
            fault = self.fault_of_document(error)
        del value  # an error reporter would send it
        raise fault

    def fault_of_document(self, error: LucentError) -> LucentError:
        """Return an error that a document met, with the column that it was for."""
        if isinstance(error, SerializationError):
            return SerializationError(f"{self.contexts[0]}: {error}")
        return error.with_traceback(None)

    def open(self, data: Any, row: bytes = b"", keyring: Keyring | None = None) -> Any:
        """Return the value of stored bytes; ``None`` for SQL NULL."""
        if data is None:
            return None
        fault: LucentError
        try:
            value = self._load(context_keys(self.contexts, keyring).open(data, row))
        except LucentError as error:
            fault = error.with_traceback(None)
        except DECODE_ERRORS as error:
            fault = unreadable(error)
        else:
            redacted = self._redacted.get(type(value))
            return value if redacted is None else redacted(value)
        del data  # an error reporter would send it, and it may be plaintext
        raise fault

    # NULL has the same rules with a schema as without one.

    def _dump_typed(self, value: Any) -> bytes:
        assert self.schema is not None
        return self.codec.dumps(None if value is None else self.schema.dump(value))

    def _load_typed(self, document: bytes) -> Any:
        assert self.schema is not None
        if document == _JSON_NULL:
            return None
        return self.schema.load(document if self.codec is STRICT else self.codec.loads(document))

    def __reduce__(self) -> tuple[type[ColumnCodec], tuple[object, ...]]:
        redacts = bool(self._redacted)
        return type(self), (self.contexts, self.codec, self.bound_to, redacts, self.schema)

    def __deepcopy__(self, memo: object) -> ColumnCodec:
        return self


class Sealed:
    """A stored value that has not been opened, as lazy and row-bound columns give it.

    Holds ciphertext only; ``repr`` and pickles show no plaintext. Equal and hashed by its bytes.
    """

    __slots__ = ("_codec", "_data", "_opened", "_sealed_for")

    _opened: Any

    def __init__(self, data: bytes, codec: ColumnCodec, sealed_for: bytes | None = None) -> None:
        self._data = data
        self._codec = codec
        self._sealed_for = sealed_for
        """The row context, if this process has just sealed the value."""

    def open(self, *, row: Sequence[RowPart] | None = None, keyring: Keyring | None = None) -> Any:
        """Open the value.

        :param row: for a row-bound column only: the values of the columns in ``bound_to``, in that
            order.
        :param keyring: the keyring to use, instead of the default one.
        :raises DecryptionError: it does not open; the subclass says why.
        :raises ConfigurationError: `row` is missing, or given for a column that is not row-bound.
        """
        names = self._codec.bound_to
        if len(names) != (0 if row is None else len(row)):
            raise ConfigurationError(
                f"a value of {self._codec.contexts[0]} opens with "
                + (f"row=({', '.join(names)})" if names else "no row=")
            )
        return self._codec.open(self._data, encode_row(row or (), names), keyring)

    def _open_once(self, row: Sequence[RowPart]) -> Any:
        # Kept here so that it goes when the ORM replaces this object on refresh, and so that a
        # pickle of the model leaves it out.
        if not self._is_open():
            self._opened = self.open(row=row)
        return self._opened

    def _is_open(self) -> bool:
        return hasattr(self, "_opened")

    @property
    def key_version(self) -> str | None:
        """The version of the key that sealed the value; ``None`` if the bytes are not sealed."""
        envelope = parse(self._data)
        return None if envelope is None else envelope.version

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of that key; ``None`` if the bytes are not sealed."""
        envelope = parse(self._data)
        return None if envelope is None else envelope.key_id.hex()

    def __bytes__(self) -> bytes:
        return self._data

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, Sealed) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return (
            f"<Sealed {self._codec.contexts[0]} key_version={self.key_version} "
            f"{len(self._data)} bytes>"
        )

    def __getstate__(self) -> tuple[bytes, ColumnCodec]:
        return self._data, self._codec

    def __setstate__(self, state: tuple[bytes, ColumnCodec]) -> None:
        self._data, self._codec = state
        self._sealed_for = None


class Bound:
    """A plain value on its way into a row-bound column, with the row that it belongs to.

    The ORM attribute makes these itself; in Core, write
    ``insert(table).values(payload=Bound(value, row=(tenant_id, name)), …)``.

    :param value: the JSON value.
    :param row: the values of the binding columns, or a callable that returns them when the
        statement is executed.
    """

    __slots__ = ("_row", "value")

    def __init__(
        self, value: Any, row: Sequence[RowPart] | Callable[[], Sequence[RowPart]]
    ) -> None:
        self.value = value
        self._row = row

    @property
    def row(self) -> Sequence[RowPart]:
        """The values of the binding columns, as they are now."""
        return self._row() if callable(self._row) else self._row

    def __repr__(self) -> str:
        return "<Bound: a value not yet sealed>"

    @hide_locals
    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PicklingRefusedError(
            "a value that was set and has not been read back from the database cannot be pickled, "
            "because it is plaintext. Flush and refresh the object first"
        )


# -- parameters ------------------------------------------------------------------------------------

RowCheck = Callable[[Any], str | None]
"""Says why a value would not come back from its binding column; ``None`` if it would."""


def parameter_sealer(
    column: ColumnCodec, *, none_as_null: bool, checks: Sequence[RowCheck]
) -> Callable[[Any], bytes | None]:
    """Return the function that turns a parameter for `column` into what is stored.

    :param checks: one for each binding column, or none if the column's table is not known.
    """
    seal, dump, contexts, bound_to = column.seal, column.dump, column.contexts, column.bound_to
    documents = frozenset() if bound_to else _DOCUMENT_TYPES
    json_null = JSON.NULL

    @hide_locals
    def seal_other(value: Any) -> bytes | None:
        row = b""
        if type(value) is Bound:
            row = _row_of(value, column, checks)
            value = value.value
            if type(value) is Sealed:
                return _reuse(value, column, row)
        elif type(value) is Sealed:
            return _reuse(value, column, None)
        elif bound_to:
            if value is None or type(value) is Null:
                return None
            raise ConfigurationError(
                f"{column.contexts[0]} is bound to its row; set the model's attribute, or pass "
                f"Bound(value, row=({', '.join(bound_to)}))"
            )
        if type(value) is Null or (value is None and none_as_null):
            return None
        return seal(None if value is json_null else value, row)

    def process(value: Any) -> bytes | None:
        if type(value) not in documents:
            given, value = [value], None  # not to be in this frame if it is refused
            return seal_other(given.pop())
        try:
            return context_keys(contexts).seal(dump(value))  # as column.seal does, for speed
        except LucentError as error:
            fault = column.fault_of_document(error)
        del value  # an error reporter would send it
        raise fault

    return process


def _row_of(value: Bound, column: ColumnCodec, checks: Sequence[RowCheck]) -> bytes:
    row, names = value.row, column.bound_to
    if len(row) != len(names):
        raise ConfigurationError(
            f"{column.contexts[0]} is bound to {len(names)} columns of its row, "
            f"but was given {len(row)} values for them"
        )
    for name, part, check in zip(names, row, checks, strict=False):
        fault = check(part)
        if fault is not None:
            raise ConfigurationError(
                f"{column.contexts[0]} is sealed for its row, and binding column {name} {fault}: "
                "the database would give back another value than the one that the secret is "
                "sealed for, and the secret would never open"
            )
    return encode_row(row, names)


def _reuse(value: Sealed, column: ColumnCodec, row: bytes | None) -> bytes:
    """Return the bytes of a value that is sealed already, if they open where they go."""
    given = value._codec
    if not set(given.contexts) <= set(column.contexts) or given.bound_to != column.bound_to:
        raise SerializationError(
            f"a Sealed value of {given.contexts[0]} was given to {column.contexts[0]}, "
            "where it would not open; open() it and pass the plain value"
        )
    if not column.bound_to or value._sealed_for is not None:
        return value._data
    if row is None:
        raise SerializationError(
            f"a Sealed value was given to {column.contexts[0]}, which is bound to its row; "
            f"pass Bound(sealed, row=({', '.join(column.bound_to)})), or open() it and pass "
            "the plain value in a Bound"
        )
    try:
        context_keys(column.contexts).open(value._data, row)
    except TamperedError:
        pass
    else:
        return value._data
    raise SerializationError(
        f"a Sealed value of another row was given to {column.contexts[0]}, which is bound to "
        "its row and where it would not open; open() it and pass the plain value"
    )
