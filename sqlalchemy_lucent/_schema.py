"""Typed values: a dataclass, TypedDict, msgspec Struct or pydantic model in place of plain JSON.

msgspec converts all of them but pydantic models, which convert themselves. Messages of either
library are not passed on, because they may quote the document: only the path and the types are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, Generic, TypeVar, get_args

import msgspec
from msgspec import inspect

from ._json import STRICT, path_of
from .exceptions import ConfigurationError, SchemaMismatchError, SerializationError

T = TypeVar("T")

# These name types and fields of the schema only. Other messages (an enum's, a constraint's, one
# raised by the type itself) may quote the value.
_SPEAKABLE_FAULT: Final = re.compile(
    r"(Expected `[a-z0-9_ |-]+`, got `[a-z]+`|Object missing required field `\w+`)(?= - at |$)"
)
_PATH: Final = re.compile(r" - at (?:`(?P<part>key|value)` in )?`\$(?P<path>[^`]*)`$")
_STEP: Final = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")

_IMMUTABLE: Final = (
    inspect.NoneType,
    inspect.BoolType,
    inspect.IntType,
    inspect.FloatType,
    inspect.StrType,
    inspect.BytesType,
    inspect.DateTimeType,
    inspect.DateType,
    inspect.TimeType,
    inspect.TimeDeltaType,
    inspect.UUIDType,
    inspect.DecimalType,
    inspect.EnumType,
    inspect.LiteralType,
    # Their members are checked separately.
    inspect.UnionType,
    inspect.Metadata,
)
_COLLECTIONS: Final = (inspect.DictType, inspect.ListType, inspect.TypedDictType, inspect.AnyType)
_TUPLES: Final = (inspect.TupleType, inspect.VarTupleType, inspect.FrozenSetType)


class Schema(Generic[T]):
    """Converts between JSON documents and values of one type.

    :param type_: the type, or an annotation made of such types: ``list[Account]``.
    :raises ConfigurationError: the type is not supported.

    The type must define equality, as dataclasses, Structs and models do by default.
    """

    __slots__ = ("_decode", "_describe", "_encode", "type")

    def __init__(self, type_: type[T]) -> None:
        self.type = type_
        self._decode: Callable[[bytes], T]
        self._encode: Callable[[T], Any]
        self._describe: Callable[[], Any] = partial(inspect.type_info, type_)
        if _is_pydantic(type_):
            from pydantic import TypeAdapter

            adapter = TypeAdapter(type_)
            self._describe = lambda: adapter.core_schema
            self._decode = partial(adapter.validate_json, strict=True)
            self._encode = partial(
                adapter.dump_python, mode="json", by_alias=True, round_trip=True, warnings="error"
            )
            return
        try:
            self._decode = msgspec.json.Decoder(type_).decode
        except (TypeError, NameError) as error:
            fault = str(error)
        else:
            self._encode = partial(msgspec.to_builtins, str_keys=True)
            return
        raise ConfigurationError(f"{_name(type_)} cannot be used as a schema: {fault}")

    def load(self, document: Any) -> T:
        """Return the value that `document` holds: a JSON value, or its UTF-8 text as bytes.

        :raises SchemaMismatchError: it does not fit the type; the message gives the path of the
            fault, never the value.
        """
        data = document if isinstance(document, bytes) else STRICT.dumps(document)
        try:
            return self._decode(data)
        except Exception as error:  # noqa: BLE001  (the type's own code may raise anything)
            fault = self._explain(error)
        del document, data  # an error reporter would send them
        raise SchemaMismatchError(f"a document does not fit {_name(self.type)}: {fault}")

    def dump(self, value: T) -> Any:
        """Return `value` as a JSON value.

        :raises SerializationError: it is not of the type, or would not come back equal.
        """
        document = None
        try:
            document = self._encode(value)
        except Exception as error:  # noqa: BLE001
            fault = f"it is of type {_name(type(value))}, and raised {type(error).__name__}"
        else:
            try:
                if self.load(document) == value:
                    return document
                fault = f"JSON would not return an equal {_name(type(value))}"
                if _is_pydantic(self.type):
                    fault += "; a SecretStr needs a field_serializer"
            except SchemaMismatchError as error:
                fault = str(error)
        del value, document  # an error reporter would send them
        raise SerializationError(f"$: a value cannot be stored as {_name(self.type)}: {fault}")

    def untracked_part(self) -> str | None:
        """Return the name of a type in this one whose values can be edited without being tracked;
        ``None`` if only dicts and lists can be edited.
        """
        root = self._describe()
        if not isinstance(root, msgspec.Struct):
            return _name(self.type)  # pydantic's
        for node in _walk(root):
            if not isinstance(node, inspect.Type):
                continue
            # A dict or list in a tuple is not tracked either.
            is_tuple = isinstance(node, _TUPLES)
            parts = [n for n in _walk(node) if isinstance(n, inspect.Type)] if is_tuple else [node]
            allowed = (*(_TUPLES if is_tuple else _COLLECTIONS), *_IMMUTABLE)
            if not all(isinstance(part, allowed) for part in parts):
                class_ = getattr(node, "cls", None)
                return _name(class_) if class_ else type(node).__name__.removesuffix("Type").lower()
        return None

    def _explain(self, error: Exception) -> str:
        """Return the path and the kind of a fault, without any of the document."""
        if isinstance(error, msgspec.MsgspecError):
            message = str(error)
            found = _PATH.search(message)
            steps = _STEP.finditer(found["path"]) if found else ()
            path = self._path(int(s["index"]) if s["index"] else s["name"] for s in steps)
            if found and found["part"]:
                path = f"a {found['part']} in {path}"
            fault = _SPEAKABLE_FAULT.match(message)
            return f"{path}: {fault[1] if fault else 'the value breaks a rule of its type'}"
        pydantic = sys.modules.get("pydantic")
        if pydantic is not None and isinstance(error, pydantic.ValidationError):
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            return f"{self._path(first['loc'])}: {first['type']}"
        return f"$: {type(error).__name__}"

    def _path(self, parts: Iterable[int | str | None]) -> str:
        """Return a path with the names that the type has; other names are data and are hidden."""
        names: set[str] = set()
        steps = []
        for part in parts:
            if isinstance(part, int):
                steps.append(f"[{part}]")
                continue
            names = names or set(_field_names(self._describe()))
            steps.append(f".{part}" if part in names else "[...]")
        return path_of(steps)

    def __reduce__(self) -> tuple[type[Schema[T]], tuple[type[T]]]:
        # The converters cannot be pickled.
        return type(self), (self.type,)

    def __repr__(self) -> str:
        return f"<Schema of {_name(self.type)}>"


def _is_pydantic(type_: Any) -> bool:
    return hasattr(type_, "__pydantic_core_schema__") or any(map(_is_pydantic, get_args(type_)))


def _name(type_: Any) -> str:
    return type_.__name__ if isinstance(type_, type) else str(type_)


def _walk(root: object) -> Iterator[object]:
    """Walk through the description of a type that msgspec or pydantic returned."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, msgspec.Struct):
            waiting.extend(getattr(node, name) for name in node.__struct_fields__)
        elif isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple)):
            waiting.extend(node)


def _field_names(root: object) -> Iterator[str]:
    for node in _walk(root):
        if isinstance(node, inspect.Field):
            yield node.encode_name
        elif isinstance(node, dict):
            fields, aliases = node.get("fields"), node.get("validation_alias")
            yield from fields if isinstance(fields, dict) else ()
            # A field with an alias accepts its name only if the model says so.
            yield from (part for part in _walk([aliases, node.get("name")]) if type(part) is str)
