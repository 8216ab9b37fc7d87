"""The row context: what ties a value to its row, and the columns that it is made of.

A value is sealed for what Python passes to the database and opened with what the database returns.
If the two differ by a letter, the value is lost. So columns that may change their values are
refused, and so are values that would not come back as they were given.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator, TypeEngine

from ._envelope import pack_length
from ._sql import is_mysql
from .exceptions import ConfigurationError

RowPart = str | int | uuid.UUID
"""A value of a binding column: each has one exact text form."""


def encode_row(parts: Sequence[RowPart], names: Sequence[str] = ()) -> bytes:
    """Return the row context: each part's text form, length-prefixed.

    :raises ConfigurationError: a part is missing or of another type. Floats, decimals and dates
        are refused, because databases return them in forms of their own.
    """
    row = b""
    for position, part in enumerate(parts):
        text = part.encode("utf-8", "surrogatepass") if type(part) is str else _text_of(part)
        if text is None:
            raise _no_part(part, position, names)
        row += pack_length(len(text)) + text  # as `length_prefixed` does, without its call
    return row


def _text_of(part: object) -> bytes | None:
    """Return the exact text of a value; ``None`` if it has none."""
    # Not str(): a subclass may print itself as something else, as an Enum member does.
    if isinstance(part, str):
        return str.encode(part, "utf-8", "surrogatepass")
    if isinstance(part, int) and not isinstance(part, bool):
        return int.__repr__(part).encode("ascii")
    if isinstance(part, uuid.UUID):
        return str(part).encode("ascii")
    return None


def _no_part(part: object, position: int, names: Sequence[str]) -> ConfigurationError:
    name = names[position] if position < len(names) else f"number {position + 1}"
    fault = "has no value yet" if part is None else f"is of type {type(part).__name__}"
    return ConfigurationError(
        f"binding column {name} {fault}; a row-bound value needs a str, int or UUID that is "
        "known before the row is written (a natural key, or a UUID generated in Python)"
    )


# -- columns ---------------------------------------------------------------------------------------

_ANY_CASE: Final = re.compile(r"_ci$|^(nocase|rtrim)$", re.IGNORECASE)


def binding_column(table: sa.FromClause, name: str, bound: str) -> sa.Column[Any]:
    """Return the column that values of `bound` are bound to.

    :raises ConfigurationError: there is none, or values cannot be bound to it, whatever they are.
    """
    column: Any = table.columns.get(name)
    fault = "which its table does not have" if column is None else _fault_of_type(column)
    if fault is not None:
        raise ConfigurationError(f"{bound} is bound to {name!r}, {fault}")
    return cast("sa.Column[Any]", column)


def _fault_of_type(column: sa.Column[Any]) -> str | None:
    type_ = column.type
    if type_.bind_expression(sa.bindparam(None, type_=type_)) is not None or (
        type_.column_expression(sa.literal_column("x", type_)) is not None
    ):
        return "whose type changes its values in SQL; bind to another column"
    collation = getattr(type_, "collation", None)
    if type_.__visit_name__ == "CITEXT" or (collation and _ANY_CASE.search(collation)):
        return (
            "where the database treats several spellings as one value; give it a collation that "
            "compares bytes, or bind to another column"
        )
    if isinstance(type_, TypeDecorator):
        return None  # each of its values is tried, see `value_check`
    python_type = _python_type(type_)
    if python_type is None:
        return (
            f"whose type {type(type_).__name__} does not declare its Python type; bind to str, int "
            "or UUID columns"
        )
    if issubclass(python_type, (str, int, uuid.UUID)) and python_type is not bool:
        return None
    return f"whose values are of type {python_type.__name__}; bind to str, int or UUID columns"


def _python_type(type_: TypeEngine[Any]) -> type[Any] | None:
    try:
        return type_.python_type
    except NotImplementedError:
        return None


def tells_its_values(type_: TypeEngine[Any]) -> bool:
    """Say whether a type reflected from the database returns the same values as the model's type.

    A CHAR may hold a UUID without its hyphens, and an ENUM the names of members.
    """
    return isinstance(type_, (sa.Integer, sa.String, sa.Uuid)) and not isinstance(
        type_, (sa.CHAR, sa.NCHAR, sa.Enum)
    )


def type_as_bound(
    name: str, given: TypeEngine[Any] | None, reflected: TypeEngine[Any]
) -> TypeEngine[Any]:
    """Return the type to read binding column `name` by: the one given, or the database's."""
    if given is not None or tells_its_values(reflected):
        return given or reflected
    raise ConfigurationError(
        f"binding column {name} is of type {reflected!r} in the database, which does not say what "
        "the model's values are, and a value sealed for another form would never open. Give the "
        f"model's type: bound_to={{{name!r}: Uuid()}}"
    )


# -- values ----------------------------------------------------------------------------------------

_EXACT: Final = frozenset({str, int, uuid.UUID})

_DDL: Final = re.compile(
    r"(?:NATIONAL )?(?P<word>[A-Z]+)(?:\((?P<size>\d+)\))?(?P<rest>.*)", re.DOTALL
)
_MYSQL_BITS: Final = {"TINYINT": 8, "SMALLINT": 16, "MEDIUMINT": 24, "INT": 32, "INTEGER": 32}
_MYSQL_CHARACTERS: Final = {"TINYTEXT": 63, "TEXT": 16_383}
"""Characters that always fit these types, which are limited in bytes."""
_SQLITE_TEXT: Final = re.compile("CHAR|CLOB|TEXT|BLOB")


def row_checks(
    table: sa.Table | None, names: Sequence[str], context: str, dialect: sa.Dialect
) -> list[Callable[[Any], str | None]]:
    """Return the :func:`value_check` of each binding column; none if their table is not known."""
    if table is None:
        return []
    return [value_check(binding_column(table, name, context), dialect) for name in names]


def value_check(column: sa.Column[Any], dialect: sa.Dialect) -> Callable[[Any], str | None]:
    """Return a function that says why a value would not come back from `column` as it was given."""
    type_ = column.type
    impl = type_.dialect_impl(dialect)
    bind, result = impl.bind_processor(dialect), impl.result_processor(dialect, None)
    expected = None if isinstance(type_, TypeDecorator) else _python_type(type_)
    fault_when_stored = _fault_when_stored(type_, dialect)

    def check(value: Any) -> str | None:
        if type(value) is expected and bind is None and result is None:
            return fault_when_stored(value)
        if value is None:
            return None  # `encode_row` refuses it
        kind, text = type(value), _text_of(value)
        if expected is not None and not isinstance(value, expected):
            return (
                f"has values of type {expected.__name__} but was given one of type {kind.__name__}"
            )
        try:
            sent = value if bind is None else bind(value)
        except Exception:  # noqa: BLE001
            return None  # the statement will raise it
        try:
            back = sent if result is None else result(sent)
        except Exception:  # noqa: BLE001
            if expected is not None and isinstance(sent, str):
                return "has a type that cannot read back what it was given"
            back = _returned(impl, value, dialect)
        if back is not value and _text_of(back) != text:
            return "has a type that changes the value that it was given"
        if type(sent) not in _EXACT and _text_of(sent) not in (None, _text_of(str(sent))):
            # Drivers differ on which of the two they take.
            return f"was given a {kind.__name__} whose str() is not the text that it holds"
        return fault_when_stored(sent)

    return check


def _returned(type_: Any, value: Any, dialect: sa.Dialect) -> Any:
    """Return a value after a type converted it both ways, without the driver's own conversions."""
    try:
        return type_.process_result_value(type_.process_bind_param(value, dialect), dialect)
    except Exception:  # noqa: BLE001
        return value  # the type converts only the driver's forms, which are not known here


def _fault_when_stored(type_: TypeEngine[Any], dialect: sa.Dialect) -> Callable[[Any], str | None]:
    """Return a function that says how the database would change a value, judged by the DDL."""
    try:
        ddl = _DDL.match(type_.compile(dialect))
    except Exception:  # noqa: BLE001  (a type that only exists in Python, or lacks a length)
        ddl = None
    if ddl is None:
        return lambda value: None
    word, rest = ddl["word"], ddl["rest"]
    pads = word in ("CHAR", "NCHAR")
    on_sqlite, on_mysql = dialect.name == "sqlite", is_mysql(dialect)
    size = int(ddl["size"]) if ddl["size"] else 1 if pads else None
    if on_mysql:
        size = _MYSQL_CHARACTERS.get(word, size)
    is_number_there = _SQLITE_TEXT.search(word) is None
    bits = _MYSQL_BITS.get(word, 64)
    is_unsigned = "UNSIGNED" in rest or "ZEROFILL" in rest

    def fault(value: Any) -> str | None:
        if isinstance(value, int):
            if on_mysql and not 0 <= value + (0 if is_unsigned else 2**bits // 2) < 2**bits:
                return "was given an integer that it cannot hold"
        elif not isinstance(value, str):
            return None
        elif on_sqlite:
            if is_number_there and _is_number(value):
                return f"is of type {word}, and SQLite would turn the text into a number"
        elif word == "UUID":
            if value != _canonical(value):
                return "was given a UUID spelled otherwise than str(uuid.UUID(text))"
        elif size is not None and len(value) > size:
            return "was given a longer text than it can hold"
        elif pads and (value.endswith(" ") if on_mysql else len(value) != size):
            return "is a CHAR, where the database adds or drops spaces at the end; use VARCHAR"
        return None

    return fault


def _canonical(text: str) -> str | None:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
