"""
The strict JSON codec: what goes in comes out equal, or is refused.

No quick encoder is strict: orjson turns NaN into ``null``, and a tuple, a UUID or an Enum into
something else. So a value is looked at before it is written. Writing is orjson's, the quickest;
reading is msgspec's, because orjson reads an integer past 64 bits as a float without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import orjson

from .exceptions import SerializationError

MAX_DEPTH: Final = 200
"""Levels of lists and objects in a document: safely below orjson's own limit, 254."""

MAX_INTEGER_DIGITS: Final = 4300
"""Digits of an integer: what Python converts to text by default (``sys.int_info``)."""

JSONValue: TypeAlias = Any
"""``None``, bool, int, float, str, and lists and string-keyed dicts of them."""

_LEAVES: Final = frozenset({str, int, bool, NoneType})
_NAMES: Final = frozenset({str})
_FIRST_INTEGER_TOO_LONG: Final = 10**MAX_INTEGER_DIGITS
_SPEAKABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", re.ASCII)

_decode = msgspec.json.Decoder().decode


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
        if _is_plain(value, 0):
            try:
                return orjson.dumps(value)
            except TypeError:
                pass  # an integer past 64 bits, or a string that is no Unicode text
        return _dumps_carefully(value)

    def loads(self, data: bytes) -> JSONValue:
        """Return the value that `data` holds."""
        try:
            return _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
        raise SerializationError(
            "a document opened, but is not JSON: it was written through an engine with a "
            "json_serializer, and this engine lacks the json_deserializer that goes with it"
        )


STRICT: Final = StrictCodec()


class EngineCodec:
    """
    The codec of an engine made with ``json_serializer=`` or ``json_deserializer=``.

    What these functions make of a value is their own affair, except that it must come back equal:
    each write is read back and compared.
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
        if self._serializer is None:
            return STRICT.dumps(value)
        try:
            text = self._serializer(value)
            data = text if isinstance(text, bytes) else text.encode("utf-8")
        except Exception as error:  # noqa: BLE001  (the user's function may raise anything)
            fault = f"raised {type(error).__name__} for a value of type {type(value).__name__}"
        else:
            if _same(self.loads(data), value):
                return data
            fault = "makes something of this value that does not come back equal"
        raise SerializationError(f"$: the engine's json_serializer {fault}")

    def loads(self, data: bytes) -> JSONValue:
        """Return what the engine's deserializer makes of `data`."""
        if self._deserializer is None:
            return STRICT.loads(data)
        try:
            return self._deserializer(data.decode("utf-8"))
        except Exception as error:  # noqa: BLE001
            fault = type(error).__name__
        raise SerializationError(
            f"a document opened, but the engine's json_deserializer raised {fault} on it"
        )


def _is_plain(value: JSONValue, depth: int) -> bool:
    """
    Say whether `value` is made of nothing but what orjson gives back equal.

    Looks at the set of types in a container first, so that a flat document costs a handful of
    calls whatever its size. Integers past 64 bits and lone surrogates are left to orjson, which
    refuses both.
    """
    children: Iterable[JSONValue]
    if isinstance(value, dict):
        if not _NAMES.issuperset(map(type, value)):
            return False
        children = value.values()
    elif isinstance(value, list):
        children = value
    else:
        kind = type(value)
        return kind in _LEAVES or (kind is float and math.isfinite(value))
    if depth >= MAX_DEPTH:
        return False
    if _LEAVES.issuperset(map(type, children)):
        return True
    return all(type(child) in _LEAVES or _is_plain(child, depth + 1) for child in children)


def _dumps_carefully(value: JSONValue) -> bytes:
    """Write the rare value that orjson does not take, or say where its fault is."""
    fault = _find_fault(value, "$", 0)
    if fault is None:
        try:
            return json.dumps(
                value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
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


def _same(left: JSONValue, right: JSONValue) -> bool:
    """Compare with types: ``1``, ``1.0`` and ``True`` differ, and so do ``0.0`` and ``-0.0``."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    return bool(left == right) and isinstance(left, (bool, float)) == isinstance(
        right, (bool, float)
    )
