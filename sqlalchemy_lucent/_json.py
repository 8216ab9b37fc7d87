"""The strict JSON codec: what goes in comes out equal, or is refused.

No fast encoder of JSON is strict: orjson turns NaN into ``null``, and a tuple, a UUID or an Enum
into something else. ormsgpack, which shares orjson's design, can be told to refuse all of these. So
a document is packed by ormsgpack too, to learn that it has only JSON's own types, and the packed
bytes are dropped. That costs about as much as writing the document, a quarter of reading it back
and comparing. What ormsgpack refuses is tried again with a function that returns the plain value of
a subclass, such as MutableDict. If that is refused too, Python walks through the document, to find
the fault or to write integers past 64 bits. It passes over parts that the libraries take.

msgspec reads, because orjson reads an integer past 64 bits as a float.
"""

from __future__ import annotations

import enum
import math
import operator
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import orjson
import ormsgpack

from ._redacted import PRINT_FAULT, PRINT_MARKS, holds_print
from .exceptions import SerializationError

MAX_DEPTH: Final = 254
"""Levels of lists and objects in a document: as many as orjson writes."""

MAX_INTEGER_DIGITS: Final = 4299
"""Digits of an integer: msgspec reads as many characters as Python converts to text by default,
4300 (``sys.int_info``), and counts the sign."""

JSONValue: TypeAlias = Any
"""``None``, bool, int, float, str, and lists and string-keyed dicts of them."""

_FIRST_INTEGER_TOO_LONG: Final = 10**MAX_INTEGER_DIGITS

# What these pass on goes to `_unwrapped_fast`, which refuses all but subclasses of JSON's types.
_ORJSON_OPTIONS: Final = (
    orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)

_PLAIN_ONLY: Final = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
)
# MessagePack writes a float as 0xCB and eight bytes, big-endian. If all bits of its exponent are
# set, it is NaN or infinite (IEEE 754). Other bytes may look the same, and are then searched in
# vain.
_FLOAT: Final = 0xCB
_may_be_infinite_or_nan = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]").search

_LESS, _AMPERSAND, _PERCENT, _BACKSLASH = PRINT_MARKS

# Global names, because an attribute of a module would be looked up for each value.
_pack, _write = ormsgpack.packb, orjson.dumps
decode = msgspec.json.Decoder().decode
DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


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
            packed = _pack(value, None, _PLAIN_ONLY)
            if _FLOAT not in packed or not _may_be_infinite_or_nan(packed):
                data = _write(value)
                # Single bytes, because looking for a word takes ten times as long. JSON's own
                # escapes, as in a PEM key, have backslashes that the value does not have.
                if (
                    _LESS in data
                    or _PERCENT in data
                    or _AMPERSAND in data
                    or (_BACKSLASH in packed and _BACKSLASH in data)
                ) and holds_print(data):
                    raise SerializationError  # below, where nothing is in the frame
                return data
        except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
            pass  # a type that is not JSON's own, an integer past 64 bits, or a print
        written = _write_unusual(value)
        if isinstance(written, bytes):
            if not holds_print(written):
                return written
            written = PRINT_FAULT
        value = packed = data = b""  # an error reporter would send them
        raise SerializationError(written)

    def loads(self, data: bytes) -> JSONValue:
        """Return the value that `data` holds."""
        try:
            return decode(data)
        except DECODE_ERRORS as error:
            fault = unreadable(error)
        raise fault

    def __reduce__(self) -> str:
        return "STRICT"


STRICT: Final = StrictCodec()


def unreadable(error: Exception) -> SerializationError:
    """Return what is raised in place of one of `DECODE_ERRORS`, which may hold the document."""
    return SerializationError(
        f"a document opened, but is not JSON that can be read ({type(error).__name__}): was it "
        "written through an engine with a json_serializer, and this engine lacks the "
        "json_deserializer that goes with it?"
    )


class EngineCodec:
    """The codec of an engine made with ``json_serializer=`` or ``json_deserializer=``.

    These functions may write a value as they like, as long as it comes back equal: each document is
    read back and compared before it is sealed.
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
        """Return `value` as the engine's serializer writes it."""
        write = self._serializer
        data = STRICT.dumps(value) if write is None else _serialize(write, value)
        restored = self.loads(data)
        fault = (
            f"$: a value of type {type(value).__name__} does not come back equal through the "
            "engine's json_serializer and json_deserializer"
        )
        try:
            if holds_print(data):
                fault = PRINT_FAULT
            elif same_value(restored, value):
                return data
        except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
            pass
        del value, data, restored  # an error reporter would send them
        raise SerializationError(fault)

    def loads(self, data: bytes) -> JSONValue:
        """Return `data` as the engine's deserializer reads it."""
        if self._deserializer is None:
            return STRICT.loads(data)
        if self._deserializer is _lost:
            raise SerializationError(
                "a Sealed value was pickled that only its engine's json_deserializer can read, and "
                "a pickle cannot hold that function: define it in a module (no lambda, no method), "
                "open the value before you pickle it, or load it again here"
            )
        try:
            return self._deserializer(data.decode("utf-8"))
        except Exception as error:  # noqa: BLE001
            fault = type(error).__name__
        raise SerializationError(
            f"the engine's json_deserializer raised {fault} on a document that was written or "
            "opened"
        )

    def __reduce__(self) -> tuple[Callable[..., Codec], tuple[object, object]]:
        # A pickled value is only opened, which needs no serializer. Pickles refer to functions by
        # name, and a lambda has none.
        return type(self), (None, self._deserializer if _has_name(self._deserializer) else _lost)


def _lost(text: str) -> JSONValue:
    """Stand in a pickle for a deserializer that has no name."""


def _has_name(function: Any) -> bool:
    """Say whether a function can be found by its module and name. ``None`` can."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return function is None or getattr(module, getattr(function, "__name__", ""), None) is function


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


def _write_unusual(value: JSONValue) -> bytes | str:
    """Write a value with subclasses or integers past 64 bits; return a fault as a sentence.

    The caller raises it, so that no frame that holds the value is in the traceback.
    """
    try:
        packed = ormsgpack.packb(value, _unwrapped_fast, _PLAIN_ONLY)
        if not _may_be_infinite_or_nan(packed):
            return orjson.dumps(value, _unwrapped_fast, _ORJSON_OPTIONS)
    except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
        pass  # the fault is found below
    try:
        return msgspec.json.encode(_plain(value, 0))
    except _FaultError as error:
        return f"{path_of(error.steps[::-1])}: {error.fault}"
    except Exception as error:  # noqa: BLE001
        return f"$: the value cannot be written as JSON ({type(error).__name__})"


def _unwrapped_fast(value: object) -> JSONValue:
    """Return the plain value of what orjson and ormsgpack do not take by themselves."""
    if type(value) is int:
        raise TypeError  # past 64 bits
    plain = _unwrapped(value)
    if isinstance(value, enum.Enum) and not same_value(plain, value.value):
        raise TypeError  # orjson would write the member's `value`
    return plain


def _unwrapped(value: object) -> JSONValue:
    """Return an instance of a subclass, such as a MutableDict, as JSON's own type.

    Its own methods give the order, as OrderedDict's do. If they return anything but its contents,
    the value is refused.
    """
    if isinstance(value, dict):
        members = dict(value)
        if len(members) == dict.__len__(value) and all(
            dict.get(value, name, members) is child for name, child in members.items()
        ):
            return members
    elif isinstance(value, list):
        items = list(value)
        if len(items) == list.__len__(value) and all(map(operator.is_, items, list.copy(value))):
            return items
    elif isinstance(value, str):
        return str.__str__(value)
    elif isinstance(value, float):
        return float.__float__(value)
    elif isinstance(value, int):
        return int.__int__(value)
    raise TypeError


class _FaultError(Exception):
    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.steps: list[str] = []
        """The way to the fault, innermost step first."""


_CHECKED_LEVELS: Final = 6
"""Levels on which a part is tried as a whole first, so that most of a document is not walked."""
_AT_A_TIME: Final = 100
"""Parts of a long list or object that are tried together."""


def _plain(value: JSONValue, depth: int) -> JSONValue:
    """Return `value` in JSON's own types, or raise its first fault."""
    kind = type(value)
    if isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            raise _FaultError(f"the document is nested more than {MAX_DEPTH} levels deep")
        if kind is not dict and kind is not list:
            value = _unwrapped(value)
        if isinstance(value, list):
            return _plain_items(value, depth + 1, "[{}]".format)
        names = [_plain_name(name) for name in value]
        if len(set(names)) != len(names):
            raise KeyError  # two names of equal text
        children = _plain_items(list(value.values()), depth + 1, member_step)
        return dict(zip(names, children, strict=True))
    if value is None or kind is bool:
        return value
    if not isinstance(value, (str, int, float)):
        raise _FaultError(
            f"a value of type {kind.__name__} is not a JSON value; "
            "convert it to str, int, float, bool, None, list or dict first"
        )
    value = _unwrapped(value)
    if isinstance(value, str):
        if not _is_unicode(value):
            raise _FaultError("a string has a lone surrogate, which UTF-8 cannot carry")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _FaultError("a float is NaN or infinite, which JSON cannot carry")
    elif abs(value) >= _FIRST_INTEGER_TOO_LONG:
        raise _FaultError(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    return value


def _plain_items(items: list[Any], depth: int, step: Callable[[int], str]) -> list[Any]:
    is_tried = depth <= _CHECKED_LEVELS
    done: list[Any] = []
    try:
        for start in range(0, len(items), _AT_A_TIME):
            some = items[start : start + _AT_A_TIME]
            if is_tried and len(items) > _AT_A_TIME and _is_plain(some, depth - 1):
                done += some
                continue
            for item in some:
                is_plain = is_tried and isinstance(item, (dict, list)) and _is_plain(item, depth)
                done.append(item if is_plain else _plain(item, depth))
    except _FaultError as error:
        error.steps.append(step(len(done)))
        raise
    return done


def _is_plain(part: JSONValue, depth: int) -> bool:
    """Say whether a part that is `depth` levels down can be written as it is."""
    try:
        for _ in range(depth):
            part = [part]
        packed = _pack(part, None, _PLAIN_ONLY)
        return not _may_be_infinite_or_nan(packed) and bool(_write(part))
    except Exception:  # noqa: BLE001  (a value's own methods may raise anything)
        return False


def _plain_name(name: object) -> str:
    if not isinstance(name, str):
        raise _FaultError(f"an object has a key of type {type(name).__name__}, not str")
    text = str.__str__(name)
    if not _is_unicode(text):
        raise _FaultError("an object has a key with a lone surrogate")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_SHOWN_STEPS: Final = 16


def path_of(steps: Sequence[str]) -> str:
    """Return the path to a part of a document, shortened if it is long."""
    return "".join(("$", *steps[:_SHOWN_STEPS], "..." if len(steps) > _SHOWN_STEPS else ""))


def member_step(position: int) -> str:
    """Return the step to a member of an object: its position, because its name may be a secret."""
    number = position + 1
    teen = number % 100 in (11, 12, 13)
    suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f".{{{number}{suffix}}}"


def same_value(left: JSONValue, right: JSONValue) -> bool:
    """Compare with types: ``1``, ``1.0`` and ``True`` differ, and so do ``0.0`` and ``-0.0``.

    `left` was read from JSON. `right` may be of any type, so its own methods are not trusted.
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


def same_document(left: JSONValue, right: JSONValue) -> bool:
    """Say whether two values are the same JSON, to the bit, and share no dict or list.

    A part that they share may have been edited after the old value was stored.
    """
    try:
        return STRICT.dumps(right) == STRICT.dumps(left) and _parts(left).isdisjoint(_parts(right))
    except SerializationError:
        return False


def _parts(value: JSONValue) -> set[int]:
    """Return the ids of the dicts and lists in a document."""
    parts: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (dict, list)) and id(part) not in parts:
            parts.add(id(part))
            waiting.extend(dict.values(part) if isinstance(part, dict) else list.__iter__(part))
    return parts
