"""The strict JSON codec: what goes in comes out equal, or is refused.

No quick encoder of JSON is strict: orjson turns NaN into ``null``, and a tuple, a UUID or an Enum
into something else. ormsgpack, which has orjson's design, can be told to refuse all of these; so a
document is packed by it too, to learn that it has nothing else than JSON's own types, and what was
packed is dropped. That costs about as much as writing the document: a quarter of reading it back
and comparing, and less than looking at every value in Python. What it refuses is tried again with
a function that gives both libraries the plain value of a subclass (a MutableDict is as good as a
dict); a document that has a fault is searched with their help. Neither takes more than some three
times as long as an ordinary document, whoever sends it.

Reading is msgspec's, because orjson reads an integer past 64 bits as a float without a word.
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
"""Levels of lists and objects in a document: what orjson writes."""

MAX_INTEGER_DIGITS: Final = 4299
"""Digits of an integer: msgspec reads no more than Python converts to text by default, 4300
(``sys.int_info``), and counts the sign."""

JSONValue: TypeAlias = Any
"""``None``, bool, int, float, str, and lists and string-keyed dicts of them."""

_FIRST_INTEGER_TOO_LONG: Final = 10**MAX_INTEGER_DIGITS

# What these pass on goes through `_Unwrap`, which refuses all but subclasses of JSON's own types.
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
# How MessagePack writes a float: 0xCB and eight bytes, big-endian; an exponent of ones only is NaN
# or infinite (IEEE 754). Other bytes may look like that, and are then searched for nothing.
_FLOAT: Final = 0xCB
_may_be_infinite_or_nan = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]").search

_LESS, _AMPERSAND, _PERCENT, _BACKSLASH = PRINT_MARKS

# Names of their own, because an attribute of a module is looked up for each value.
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
                # Single bytes, because looking for a word takes ten times as long. The backslashes
                # of JSON's own escapes, as in a PEM key, are not among those of the value.
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
        value = packed = data = b""  # a tracker of errors would send them
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
        del value, data, restored  # a tracker of errors would send them
        raise SerializationError(fault)

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


def _write_unusual(value: JSONValue) -> bytes | str:
    """Write what has subclasses, integers past 64 bits or a fault; return the fault as a sentence.

    The caller raises it, so that no frame that holds the value is in the traceback.
    """
    unwrap = _Unwrap()
    is_faultless = _is_packed
    try:
        packed = ormsgpack.packb(value, unwrap, _PLAIN_ONLY)
        if not _may_be_infinite_or_nan(packed):
            is_faultless = _is_written
            if not unwrap.met_big_integer and not unwrap.met_odd_enum:
                return orjson.dumps(value, unwrap, _ORJSON_OPTIONS)
            if not unwrap.met_subclass:
                # With `None` for these integers: it may be nested too deep, or have bytes in it.
                orjson.dumps(ormsgpack.unpackb(packed))
                return msgspec.json.encode(value)
    except Exception:  # noqa: BLE001, S110  (a value's own methods may raise anything)
        pass  # a fault that is found below
    try:
        found = _find_fault(value, 0, is_faultless)
        if found is None:
            return msgspec.json.encode(_plain(value, 0))
        steps, fault = found
    except _TooDeepError:
        steps, fault = [], _TOO_DEEP
    except Exception as error:  # noqa: BLE001
        steps, fault = [], f"the value cannot be written as JSON ({type(error).__name__})"
    return f"{path_of(steps[::-1])}: {fault}"


class _Unwrap:
    """Gives orjson and ormsgpack the plain value of what they do not take by themselves.

    It vouches for a value too: ormsgpack, told to pass on all that is not JSON's own, fails if
    this refuses one.
    """

    __slots__ = ("met_big_integer", "met_odd_enum", "met_subclass")

    def __init__(self) -> None:
        self.met_big_integer = False
        self.met_odd_enum = False
        self.met_subclass = False

    def __call__(self, value: object) -> JSONValue:
        if type(value) is int:
            self.met_big_integer = True
            if abs(value) >= _FIRST_INTEGER_TOO_LONG:
                raise TypeError
            return None  # what is packed is only looked at
        self.met_subclass = True
        plain = _unwrapped(value)
        if isinstance(value, enum.Enum) and not same_value(plain, value.value):
            self.met_odd_enum = True  # orjson would write the member's `value`
        return plain


def _unwrapped(value: object) -> JSONValue:
    """Return what an instance of a subclass, such as a MutableDict, is as JSON's own type.

    Its own methods give the order, as OrderedDict's do; they are not believed if they give
    anything else than what it holds.
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


class _TooDeepError(Exception):
    pass


_TOO_DEEP: Final = f"the document is nested more than {MAX_DEPTH} levels deep"
_CHECKED_LEVELS: Final = 6
"""Levels on which a part is tried as a whole before it is gone through."""
_AT_A_TIME: Final = 100
"""Parts of a long list or object that are tried together."""

_Fault: TypeAlias = tuple[list[str], str]
"""The steps to a fault, innermost first, and what it is."""


def _find_fault(
    value: JSONValue, depth: int, is_faultless: Callable[[JSONValue], bool]
) -> _Fault | None:
    """Return a fault of `value`.

    `is_faultless` passes over parts as fast as they would be written. It is asked near the top
    only, so that no part is gone through more than a few times, however deep it is nested.
    """
    kind = type(value)
    if kind is str:
        return None if value.isascii() or _is_unicode(value) else ([], _SURROGATE)
    if isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            return [], _TOO_DEEP
        if kind is not dict and kind is not list:
            value = _unwrapped(value)
        if isinstance(value, list):
            children = value
        else:
            for name in value:
                if not isinstance(name, str):
                    return [], f"an object has a key of type {type(name).__name__}, not str"
                if not _is_unicode(name):
                    return [], "an object has a key with a lone surrogate"
            children = list(value.values())
        is_asked = depth < _CHECKED_LEVELS
        for start in range(0, len(children), _AT_A_TIME):
            some = children[start : start + _AT_A_TIME]
            if is_asked and len(children) > _AT_A_TIME and is_faultless(some):
                continue
            for position, child in enumerate(some, start):
                if is_asked and isinstance(child, (dict, list)) and is_faultless(child):
                    continue
                found = _find_fault(child, depth + 1, is_faultless)
                if found is not None:
                    is_list = isinstance(value, list)
                    found[0].append(f"[{position}]" if is_list else member_step(position))
                    return found
        return None
    if isinstance(value, str):
        return None if _is_unicode(value) else ([], _SURROGATE)
    if isinstance(value, float):
        if not math.isfinite(value):
            return [], "a float is NaN or infinite, which JSON cannot carry"
    elif isinstance(value, int):
        if abs(value) >= _FIRST_INTEGER_TOO_LONG:
            return [], f"an integer has more than {MAX_INTEGER_DIGITS} digits"
    elif value is not None:
        return [], (
            f"a value of type {kind.__name__} is not a JSON value; "
            "convert it to str, int, float, bool, None, list or dict first"
        )
    return None


def _is_packed(value: JSONValue) -> bool:
    """Say whether `value` has no fault that ormsgpack finds."""
    try:
        return not _may_be_infinite_or_nan(ormsgpack.packb(value, _Unwrap(), _PLAIN_ONLY))
    except Exception:  # noqa: BLE001  (a value's own methods may raise anything)
        return False


def _is_written(value: JSONValue) -> bool:
    """Say whether `value` has no fault that orjson finds: bytes, or too many levels."""
    try:
        return bool(orjson.dumps(value, _Unwrap(), _ORJSON_OPTIONS))
    except Exception:  # noqa: BLE001
        return False


def _plain(value: JSONValue, depth: int) -> JSONValue:
    """Return a copy of a faultless value in JSON's own types."""
    if isinstance(value, (dict, list)):
        if depth >= MAX_DEPTH:
            raise _TooDeepError
        if type(value) is not dict and type(value) is not list:
            value = _unwrapped(value)
        if isinstance(value, list):
            return [_plain(child, depth + 1) for child in value]
        members = {str.__str__(name): _plain(child, depth + 1) for name, child in value.items()}
        if len(members) != len(value):
            raise KeyError  # two names of one text
        return members
    return value if value is None or type(value) in _SCALARS else _unwrapped(value)


_SCALARS: Final = frozenset({bool, int, float, str})
_SURROGATE: Final = "a string has a lone surrogate, which UTF-8 cannot carry"


def _is_unicode(text: str) -> bool:
    try:
        str.encode(text, "utf-8")
    except UnicodeEncodeError:
        return False
    return True


_SHOWN_STEPS: Final = 16


def path_of(steps: Sequence[str]) -> str:
    """Return the path to a part of a document, cut off where it gets long."""
    return "".join(("$", *steps[:_SHOWN_STEPS], "..." if len(steps) > _SHOWN_STEPS else ""))


def member_step(position: int) -> str:
    """Return the step to a member of an object: its place, because its name may be a secret."""
    number = position + 1
    teen = number % 100 in (11, 12, 13)
    suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f".{{{number}{suffix}}}"


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


def same_document(left: JSONValue, right: JSONValue) -> bool:
    """Say whether two values are the same JSON, to the bit, and share no dict or list.

    A part that they share may have been edited in both, after one of them was stored.
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
