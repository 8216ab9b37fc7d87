"""The strict JSON codec: what goes in comes out equal, or is refused.

No quick encoder of JSON is strict: orjson turns NaN into ``null``, and a tuple, a UUID or an Enum
into something else. ormsgpack, which has orjson's design, can be told to refuse all of these; so a
document is packed by it too, to learn that it has nothing else than JSON's own types, and what was
packed is dropped. That costs about as much as writing the document: a quarter of reading it back
and comparing, and less than looking at every value in Python. What it refuses is read back and
compared after all: a MutableDict is as good as a dict.

Reading is msgspec's, because orjson reads an integer past 64 bits as a float without a word.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import orjson
import ormsgpack

from .exceptions import SerializationError

MAX_DEPTH: Final = 254
"""Levels of lists and objects in a document: what orjson writes."""

MAX_INTEGER_DIGITS: Final = 4299
"""Digits of an integer: msgspec reads no more than Python converts to text by default, 4300
(``sys.int_info``), and counts the sign."""

JSONValue: TypeAlias = Any
"""``None``, bool, int, float, str, and lists and string-keyed dicts of them."""

_FIRST_INTEGER_TOO_LONG: Final = 10**MAX_INTEGER_DIGITS
_SPEAKABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", re.ASCII)

# Subclasses go through `_unwrap`; the others are refused here rather than after reading back.
_ORJSON_OPTIONS: Final = (
    orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)

_PLAIN_ONLY: Final = (
    ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
)
# How MessagePack writes a float: 0xCB and eight bytes, big-endian; an exponent of ones only is NaN
# or infinite (IEEE 754). Other bytes may look like that, and are then compared for nothing.
_FLOAT: Final = 0xCB
_may_be_infinite_or_nan = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]").search

decode = msgspec.json.Decoder().decode


class Codec(Protocol):
    """Turns a JSON value into UTF-8 bytes and back."""

    def dumps(self, value: JSONValue) -> bytes:
        """Return `value` as JSON, or raise `SerializationError`."""

    def loads(self, data: bytes) -> JSONValue:
        """Return the value that `data` holds, or raise `SerializationError`."""


class StrictCodec:
    """The default codec."""

    __slots__ = ()

    def dumps(self, value: JSONValue) -> bytes:
        """Return `value` as compact JSON; refuse what JSON would not give back equal."""
        try:
            packed = ormsgpack.packb(value, None, _PLAIN_ONLY)
            if _FLOAT not in packed or not _may_be_infinite_or_nan(packed):
                return orjson.dumps(value)
        except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
            pass  # a type that is not JSON's own, or an integer past 64 bits
        return _dumps_compared(value)

    def loads(self, data: bytes) -> JSONValue:
        """Return the value that `data` holds."""
        try:
            return decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fault = type(error).__name__
        raise SerializationError(
            f"a document opened, but is not JSON that can be read ({fault}): was it written "
            "through an engine with a json_serializer, and this engine lacks the "
            "json_deserializer that goes with it?"
        )

    def __reduce__(self) -> str:
        return "STRICT"


STRICT: Final = StrictCodec()


class EngineCodec:
    """The codec of an engine made with ``json_serializer=`` or ``json_deserializer=``.

    What these functions make of a value is their own affair, except that it must come back equal:
    each document is read back and compared before it is sealed.
    """

    __slots__ = ("_deserializer", "_serializer")

    def __init__(
        self,
        serializer: Callable[[JSONValue], str | bytes] | None,
        deserializer: Callable[[str], JSONValue] | None,
    ) -> None:
        self._serializer = serializer
        self._deserializer = deserializer

    def dumps(self, value: JSONValue) -> bytes:
        """Return what the engine's serializer makes of `value`."""
        data = (
            STRICT.dumps(value) if self._serializer is None else _serialize(self._serializer, value)
        )
        restored = self.loads(data)
        try:
            if same_value(restored, value):
                return data
        except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
            pass
        raise SerializationError(
            f"$: a value of type {type(value).__name__} does not come back equal through the "
            "engine's json_serializer and json_deserializer"
        )

    def loads(self, data: bytes) -> JSONValue:
        """Return what the engine's deserializer makes of `data`."""
        if self._deserializer is None:
            return STRICT.loads(data)
        try:
            return self._deserializer(data.decode("utf-8"))
        except Exception as error:  # noqa: BLE001
            fault = type(error).__name__
        raise SerializationError(
            f"the engine's json_deserializer raised {fault} on a document that was written or "
            "opened"
        )

    def __reduce__(self) -> tuple[Callable[..., Codec], tuple[object]]:
        # A pickle is for opening, which needs no serializer; and it holds functions by their
        # names, which a lambda does not have.
        return _unpickled, (self._deserializer if _has_name(self._deserializer) else _NAMELESS,)


class _LostCodec:
    """That of a pickled value whose engine has a ``json_deserializer`` without a name."""

    __slots__ = ()

    def dumps(self, value: JSONValue) -> bytes:
        """Refuse."""
        raise self._refusal()

    def loads(self, data: bytes) -> JSONValue:
        """Refuse."""
        raise self._refusal()

    @staticmethod
    def _refusal() -> SerializationError:
        return SerializationError(
            "a Sealed value was pickled, and only its engine's json_deserializer can read it, "
            "which a pickle cannot hold: make that function one of a module (no lambda, no "
            "method), open the value before you pickle it, or load it again here"
        )


_NAMELESS: Final = "no name"


def _has_name(function: Any) -> bool:
    """Say whether a function is what its module has under its name, or none was given."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return function is None or getattr(module, getattr(function, "__name__", ""), None) is function


def _unpickled(deserializer: Any) -> Codec:
    if deserializer == _NAMELESS:
        return _LostCodec()
    return STRICT if deserializer is None else EngineCodec(None, deserializer)


def _serialize(serializer: Callable[[JSONValue], str | bytes], value: JSONValue) -> bytes:
    try:
        text: object = serializer(value)
        if isinstance(text, bytes):
            return text
        if isinstance(text, str):
            return text.encode("utf-8")
    except Exception as error:  # noqa: BLE001  (the user's function may raise anything)
        fault = f"raised {type(error).__name__}"
    else:
        fault = f"returned {type(text).__name__} instead of str"
    raise SerializationError(
        f"$: the engine's json_serializer {fault} for a value of type {type(value).__name__}"
    )


def _dumps_compared(value: JSONValue) -> bytes:
    try:
        data = orjson.dumps(value, _unwrap, _ORJSON_OPTIONS)
        if same_value(decode(data), value):
            return data
    except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
        pass  # an integer past 64 bits, or a fault that is reported below
    return _dumps_carefully(value)


def _unwrap(value: object) -> JSONValue:
    """Give orjson the plain value of an instance of a subclass, such as a MutableDict.

    orjson would take it by itself, but an OrderedDict in the wrong order; and the careful way
    takes ten times as long for what is written back after every edit.
    """
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list):
        return list(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        return int.__int__(value)
    raise TypeError


def _dumps_carefully(value: JSONValue) -> bytes:
    """Write the rare value that orjson does not take, or say where its fault is."""
    try:
        fault = _find_fault(value, "$", 0)
        if fault is None:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            data = text.encode("utf-8")
            if same_value(decode(data), value):
                return data
            fault = f"$: a value of type {type(value).__name__} does not come back equal from JSON"
    except Exception as error:  # noqa: BLE001  (a value's own methods may raise anything)
        fault = f"$: the value cannot be written as JSON ({type(error).__name__})"
    raise SerializationError(fault)


def _find_fault(value: JSONValue, path: str, depth: int) -> str | None:
    """Return a sentence on the first fault of `value`: its path and type, never the value."""
    if isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            return f"{path}: the document is nested more than {MAX_DEPTH} levels deep"
        if isinstance(value, list):
            items = ((f"{path}[{index}]", child) for index, child in enumerate(value))
        else:
            for name in value:
                if not isinstance(name, str):
                    return f"{path}: an object has a key of type {type(name).__name__}, not str"
                if not _is_unicode(name):
                    return f"{path}: an object has a key with a lone surrogate"
            items = ((member_path(path, name), child) for name, child in value.items())
        for child_path, child in items:
            fault = _find_fault(child, child_path, depth + 1)
            if fault is not None:
                return fault
        return None
    if isinstance(value, str):
        if not _is_unicode(value):
            return f"{path}: a string has a lone surrogate, which UTF-8 cannot carry"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return f"{path}: a float is NaN or infinite, which JSON cannot carry"
    elif isinstance(value, int):
        if abs(value) >= _FIRST_INTEGER_TOO_LONG:
            return f"{path}: an integer has more than {MAX_INTEGER_DIGITS} digits"
    elif value is not None:
        return (
            f"{path}: a value of type {type(value).__name__} is not a JSON value; "
            "convert it to str, int, float, bool, None, list or dict first"
        )
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def member_path(path: str, name: str) -> str:
    # A name that could be data rather than a field's name stays out of the message.
    return f"{path}.{name}" if _SPEAKABLE_NAME.fullmatch(name) else f"{path}[?]"


def same_value(left: JSONValue, right: JSONValue) -> bool:
    """Compare with types: ``1``, ``1.0`` and ``True`` differ, and so do ``0.0`` and ``-0.0``.

    `left` was read; `right` is anybody's, so what a subclass of it says of itself is not asked.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        return dict.keys(left) == dict.keys(right) and all(
            same_value(dict.__getitem__(left, name), dict.__getitem__(right, name)) for name in left
        )
    if isinstance(left, list) and isinstance(right, list):
        pairs = zip(list.__iter__(left), list.__iter__(right), strict=False)
        return list.__len__(left) == list.__len__(right) and all(same_value(*p) for p in pairs)
    if isinstance(left, float) and isinstance(right, float):
        return float.__eq__(left, right) and math.copysign(1, left) == math.copysign(1, right)
    if isinstance(left, (dict, list)):
        return False
    if type(left) is str:
        return issubclass(type(right), str) and str.__eq__(left, right)
    if type(left) is int or type(left) is bool:
        equal = issubclass(type(right), int) and int.__eq__(left, right)
        return equal and isinstance(left, bool) == isinstance(right, bool)
    if left is None or right is None:
        return left is right
    if isinstance(right, bool) or isinstance(left, float) != isinstance(right, float):
        return False
    return bool(left == right)
