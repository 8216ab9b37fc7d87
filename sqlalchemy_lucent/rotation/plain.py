"""Read and write a plaintext column, value by value, as the documents that are sealed.

A document is UTF-8 JSON. Text that is a JSON document already is sealed as it is, so that it comes
back to the letter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine

from .._json import Codec, JSONValue, same_value
from ..exceptions import LucentError, SerializationError

Reader = Callable[[Any], JSONValue]
"""Turns a value, as the plaintext column's type gives it, into the JSON value to seal."""

Writer = Callable[[JSONValue], Any]
"""Turns an opened JSON value into a value that the plaintext column's type takes."""


class ConversionError(LucentError):
    """A value could not be read from a plaintext column, or would change if written to one."""


class _Unread:
    """A value that was fetched, and that its type has not read yet.

    It does not print itself, because SQLAlchemy logs every row under ``echo="debug"``.
    """

    __slots__ = ("_process", "raw")

    def __init__(self, raw: Any, process: Callable[[Any], Any] | None) -> None:
        self.raw = raw
        self._process = process

    def read(self) -> Any:
        """Return the value, as its type gives it."""
        return self.raw if self._process is None else self._process(self.raw)

    def __len__(self) -> int:
        return len(self.raw) if hasattr(self.raw, "__len__") else 0

    def __repr__(self) -> str:
        return "<value not shown>"


class _DeferredRead(TypeDecorator[Any]):
    """Another type, whose values are fetched as :class:`_Unread`.

    So a value that its type cannot read fails alone, and not with its batch.
    """

    impl = NullType
    cache_ok = False

    def __init__(self, type_: TypeEngine[Any]) -> None:
        super().__init__()
        self._type = type_

    def load_dialect_impl(self, dialect: sa.Dialect) -> TypeEngine[Any]:
        return self._type.dialect_impl(dialect)

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[Any], Any]:
        process = self._type.dialect_impl(dialect).result_processor(dialect, coltype)
        return lambda value: None if value is None else _Unread(value, process)


_JSON_TYPES: Final = frozenset({str, int, float, bool, list, dict})
_UNTOLD: Final = frozenset({"YEAR", "OID", "MACADDR", "MACADDR8", "MONEY", "HSTORE"})
"""Types that give a number, a text or a dict, though SQLAlchemy has no ``python_type`` for them."""


def _has_json_values(type_: TypeEngine[Any]) -> bool | None:
    """Say whether a type's Python values are JSON values; ``None`` if only the values can tell."""
    if isinstance(type_, sa.JSON) or type_.__visit_name__ in _UNTOLD:
        return True
    if isinstance(type_, sa.ARRAY):
        return _has_json_values(type_.item_type)
    if type_.__visit_name__ == "SET":  # says str, and gives a set
        return False
    try:
        kind: type[Any] = type_.python_type
    except NotImplementedError:
        kind = object
    if kind is not object:
        return kind in _JSON_TYPES
    is_own = type(type_).__module__.startswith("sqlalchemy.")
    return None if isinstance(type_, TypeDecorator) or not is_own else False


class PlainColumn:
    """Reads and writes a plaintext column of one type, one value at a time.

    Errors show nothing of the value.
    """

    def __init__(
        self,
        name: str,
        type_: TypeEngine[Any],
        codec: Codec,
        dialect: sa.Dialect,
        reader: Reader | None,
        writer: Writer | None,
    ) -> None:
        self.name = name
        self.type = type_ = type_._variant_mapping.get(dialect.name, type_)
        self.has_json_values = _has_json_values(type_)
        """Whether its values need no reader; ``None`` if only the values can tell."""
        self._codec = codec
        self._dialect = dialect
        self._reader = reader
        self._writer = writer
        self._is_json = isinstance(type_, sa.JSON)
        names_members = isinstance(type_, sa.Enum) or self.has_json_values is False
        self._is_text = isinstance(type_, sa.String) and not names_members
        # Drivers read JSON in their own ways. SQLite's fails on text that is not UTF-8, and gives a
        # number where the JSON is one.
        self._cast: type[TypeEngine[Any]] | None = None
        if dialect.name == "sqlite":
            self._cast = sa.LargeBinary if self._is_json or self._is_text else None
        elif self._is_json:
            self._cast = sa.Text
        self._bind = type_.dialect_impl(dialect).bind_processor(dialect)

    def expression(self) -> sa.ColumnElement[Any]:
        """What to select."""
        raw: sa.ColumnElement[Any] = sa.column(self.name)
        if self._cast is None:
            return sa.type_coerce(raw, _DeferredRead(self.type))
        return sa.type_coerce(sa.cast(raw, self._cast), _DeferredRead(self._cast()))

    def size(self) -> sa.ColumnElement[int]:
        """How many bytes a value has, roughly."""
        # PostgreSQL has a length() for few types.
        length = sa.func.pg_column_size if self._dialect.name == "postgresql" else sa.func.length
        return length(sa.column(self.name))

    def kind_unless_json(self, stored: _Unread) -> str | None:
        """Return the name of a value's type if the value can be read and is not a JSON value."""
        try:
            value = stored.read()
        except Exception:  # noqa: BLE001  (its row is named when it is converted)
            return None
        try:
            self._codec.dumps(value)
        except SerializationError:
            return type(value).__name__
        return None

    def read(self, stored: _Unread) -> bytes:
        """Return the document that `stored` holds, or raise `ConversionError`."""
        try:
            return self._read(stored)
        except Exception as error:  # noqa: BLE001  (a reader or type may raise anything)
            fault = type(error).__name__
        # Not chained: a parser's error carries the text that it could not read.
        raise ConversionError(f"a value of {self.name} cannot be read as JSON ({fault})")

    def _read(self, stored: _Unread) -> bytes:
        value = stored.read()
        if self._is_json or self._is_text:
            document = value.encode("utf-8") if isinstance(value, str) else bytes(value)
            if self._is_text and self._reader is not None:
                return self._codec.dumps(self._reader(document.decode("utf-8")))
            value = self._codec.loads(document)
            if self._is_text:
                self._codec.dumps(value)  # refuses what could not come back
                return document
        return self._codec.dumps(value if self._reader is None else self._reader(value))

    def write(self, document: bytes) -> Any:
        """Return what to bind for `document`, or raise `ConversionError`."""
        try:
            value = self._write(document)
            if self._bind is not None:
                # SQLAlchemy does this again. An error then would show the value.
                self._bind(value)
        except Exception as error:  # noqa: BLE001
            fault = type(error).__name__
        else:
            if value is not None and self._fits(value):
                return value
            fault = "it is NULL there" if value is None else "it is too long"
        raise ConversionError(f"a value cannot be written to {self.name} ({fault})")

    def _write(self, document: bytes) -> Any:
        if self._is_text and self._writer is None:
            return document.decode("utf-8")
        value = self._codec.loads(document)
        if self._writer is not None:
            value = self._writer(value)
        return sa.JSON.NULL if value is None and self._is_json else value

    def _fits(self, value: Any) -> bool:
        """Say whether text fits into the column: some databases would truncate it."""
        length = self.type.length if isinstance(self.type, sa.String) else None
        return length is None or not isinstance(value, str) or len(value) <= length

    def agree(self, one: bytes, other: bytes) -> bool:
        """Say whether two documents hold the same value."""
        return one == other or same_value(self._codec.loads(one), self._codec.loads(other))
