"""SQL expressions over sealed bytes: what a database can say about a value without a key.

One :class:`~sqlalchemy.sql.functions.FunctionElement` each, with a form per dialect, serves the
generated ``key_version`` column, ``column.key_version`` in queries, indexes and the rotation.
Each gives NULL for a value that is not sealed, so that none of them fails on foreign bytes: some
databases raise an error for a substring of negative length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import elements
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ScalarSelect, SelectStatementGrouping

from ._envelope import FORMAT_AES_256_GCM, KEY_ID_SIZE, MAX_VERSION_LENGTH, version_prefix
from .exceptions import UnsupportedOperationError


def is_mysql(dialect: sa.Dialect) -> bool:
    """Say whether `dialect` is MySQL or MariaDB; SQLAlchemy has one dialect for both names."""
    return dialect.name in ("mysql", "mariadb")


def is_mariadb(dialect: sa.Dialect) -> bool:
    """Say whether the server of `dialect` is MariaDB, which is known once it was connected to."""
    return bool(getattr(dialect, "is_mariadb", False))


def is_psycopg(dialect: sa.Dialect) -> bool:
    """Say whether `dialect` is PostgreSQL over psycopg 3, with or without asyncio."""
    return dialect.name == "postgresql" and dialect.driver in ("psycopg", "psycopg_async")


class key_version(FunctionElement[str]):  # noqa: N801  (named as it is used: a SQL function)
    """The key version that a sealed value begins with; NULL if the value is not sealed."""

    name = "lucent_key_version"
    type = sa.String(MAX_VERSION_LENGTH)
    inherit_cache = True


class key_id(FunctionElement[str]):  # noqa: N801
    """The key id of a sealed value as 8 lower-case hex digits; NULL if it is not sealed."""

    name = "lucent_key_id"
    type = sa.String(2 * KEY_ID_SIZE)
    inherit_cache = True


class is_sealed(FunctionElement[bool]):  # noqa: N801
    """Whether a value is sealed, for CHECK constraints; NULL for NULL.

    The same as ``key_version IS NOT NULL``, in less SQL: PostgreSQL parses a constraint for each
    statement, and SQLite calls each function for each row.
    """

    name = "lucent_is_sealed"
    type = sa.Boolean()
    inherit_cache = True


class lacks_version(FunctionElement[bool]):  # noqa: N801
    """Whether a value does not begin with a key version and a colon; NULL for NULL.

    For constraints, which hold for later formats too: what follows the colon does not matter. On
    SQLite, a text counts as its bytes, as it does when a value is read.
    """

    name = "lucent_lacks_version"
    type = sa.Boolean()
    inherit_cache = False  # its SQL has the version in it

    def __init__(self, value: sa.ColumnElement[Any], version: str) -> None:
        super().__init__(value)
        self.prefix = version_prefix(version)


class RefusedComparison(sa.BinaryExpression[bool]):
    """A sealed column compared with a column: an expression that has a truth value, and no SQL.

    SQLAlchemy itself looks for columns in lists and dicts, where Python compares them with ``==``
    and asks the result for its truth. So this one case is refused when it is compiled. Every other
    is refused when it is built.
    """

    inherit_cache = True


@compiles(RefusedComparison)
def _refuse_comparison(element: RefusedComparison, compiler: SQLCompiler, **kw: Any) -> NoReturn:
    raise comparison_refused(element.operator)


def comparison_refused(op: Callable[..., Any]) -> UnsupportedOperationError:
    """Return the error for an operator that cannot mean anything on ciphertext."""
    name = getattr(op, "opstring", None) or getattr(op, "__name__", "this")
    return UnsupportedOperationError(
        f"the operator {name!r} has no meaning on an EncryptedJSON column: every seal of a "
        "value is different, so the database sees nothing to compare, sort or index into. "
        "Look rows up by a column of their own; is_(None), is_not(None) and .key_version work"
    )


# {value} is the expression, {colon} the position of its first colon. A value counts as sealed if a
# version of legal length and alphabet ends at a colon, and the format byte follows, which no text
# format has. SQLite needs the test of the alphabet, because its drivers fail on text that is not
# UTF-8. Each part may use those above it. The parentheses are for CREATE INDEX on PostgreSQL.
_GUARDED: Final = (
    f"(CASE WHEN {{colon}} BETWEEN 2 AND {MAX_VERSION_LENGTH + 1}"
    " AND {format_byte} AND {alphabet} THEN {result} END)"
)
_FORMAT: Final = f"{FORMAT_AES_256_GCM:02x}"

_FORMS: Final[dict[str, dict[str, str]]] = {
    "sqlite": {
        "colon": "instr({value}, x'3A')",
        "format_byte": f"substr({{value}}, {{colon}} + 1, 1) = x'{_FORMAT}'",
        "key_version": "CAST(substr({value}, 1, {colon} - 1) AS TEXT)",
        "key_id": f"lower(hex(substr({{value}}, {{colon}} + 2, {KEY_ID_SIZE})))",
        "alphabet": (  # GLOB stops at a NUL
            "instr(substr({value}, 1, {colon} - 1), x'00') = 0"
            " AND {key_version} NOT GLOB '*[^A-Za-z0-9._-]*'"
        ),
    },
    "postgresql": {
        "colon": r"position('\x3a'::bytea in {value})",
        "format_byte": (rf"substring({{value}} from {{colon}} + 1 for 1) = '\x{_FORMAT}'::bytea"),
        "key_version": "encode(substring({value} from 1 for {colon} - 1), 'escape')",
        "key_id": f"encode(substring({{value}} from {{colon}} + 2 for {KEY_ID_SIZE}), 'hex')",
        "alphabet": "{key_version} !~ '[^A-Za-z0-9._-]'",
    },
    # The collation matters: by default 'V1' and 'v1' would be one version.
    "mysql": {
        "colon": "LOCATE(x'3A', {value})",
        "format_byte": f"SUBSTRING({{value}}, {{colon}} + 1, 1) = x'{_FORMAT}'",
        "key_version": "CONVERT(SUBSTRING({value}, 1, {colon} - 1) USING ascii) COLLATE ascii_bin",
        "key_id": f"LOWER(HEX(SUBSTRING({{value}}, {{colon}} + 2, {KEY_ID_SIZE})))",
        "alphabet": "{key_version} NOT REGEXP '[^A-Za-z0-9._-]'",
    },
}
_FORMS["mariadb"] = _FORMS["mysql"]

# The version has no colon, so the first colon before a format byte is its end.
_END: Final = f"3A{_FORMAT}"
_SEALED: Final[dict[str, str]] = {
    "sqlite": (
        # Fast path: v0 to v9, with one function. Only blobs are greater than the empty blob.
        f"({{value}} >= x'7630' AND {{value}} < x'763A' AND substr({{value}}, 3, 2) = x'{_END}'"
        " OR {value} > x''"
        f" AND instr({{value}}, x'{_END}') BETWEEN 2 AND {MAX_VERSION_LENGTH + 1}"
        f" AND CAST(substr({{value}}, 1, instr({{value}}, x'{_END}') - 1) AS TEXT)"
        " NOT GLOB '*[^A-Za-z0-9._-]*'"
        f" AND instr({{value}}, x'00') NOT BETWEEN 1 AND instr({{value}}, x'{_END}'))"
    ),
    "postgresql": (
        # encode() returns ASCII, so \w does not depend on the locale.
        f"(encode(substr({{value}}, 1, {MAX_VERSION_LENGTH + 2}), 'escape')"
        rf" ~ '^[\w.-]{{{{1,{MAX_VERSION_LENGTH}}}}}:\u00{_FORMAT}')"
    ),
    "mysql": (
        f"(LOCATE(x'{_END}', {{value}}) BETWEEN 2 AND {MAX_VERSION_LENGTH + 1}"
        f" AND CONVERT(SUBSTRING({{value}}, 1, LOCATE(x'{_END}', {{value}}) - 1) USING ascii)"
        " COLLATE ascii_bin NOT REGEXP '[^A-Za-z0-9._-]')"
    ),
}
_SEALED["mariadb"] = _SEALED["mysql"]

_LACKS_VERSION: Final[dict[str, str]] = {
    "sqlite": "(substr(CAST({value} AS BLOB), 1, {size}) <> x'{prefix}')",
    # Of a value that is stored out of line, the first bytes alone are fetched.
    "postgresql": r"(substr({value}, 1, {size}) <> '\x{prefix}'::bytea)",
    "mysql": "(SUBSTRING({value}, 1, {size}) <> x'{prefix}')",
}
_LACKS_VERSION["mariadb"] = _LACKS_VERSION["mysql"]


def has_form(dialect_name: str) -> bool:
    """Say whether these functions have a SQL form for a dialect."""
    return dialect_name in _FORMS


@compiles(key_version)
@compiles(key_id)
@compiles(is_sealed)
@compiles(lacks_version)
def _render(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    result = element.name.removeprefix("lucent_")
    if not has_form(compiler.dialect.name):
        raise UnsupportedOperationError(
            f"{result} does not support the dialect {compiler.dialect.name!r}; "
            f"it supports {', '.join(_FORMS)}"
        )
    (argument,) = element.clauses
    parts = {"value": compiler.process(argument, **kw)}
    if result == "is_sealed":
        return _SEALED[compiler.dialect.name].format(**parts)
    if result == "lacks_version":
        prefix = element.prefix
        return _LACKS_VERSION[compiler.dialect.name].format(
            size=len(prefix), prefix=prefix.hex(), **parts
        )
    for name, template in _FORMS[compiler.dialect.name].items():
        parts[name] = template.format(**parts)
    return _GUARDED.format(result=parts[result], **parts)


# -- where a value comes from ----------------------------------------------------------------------

_WRAPPERS: Final = {
    elements.Grouping: "element",
    elements.Label: "element",
    elements.Over: "element",
    elements.FunctionFilter: "func",
}
"""Expressions with the value and type of an inner expression, and the attribute that holds it."""


def sources(expression: Any) -> Iterator[Any]:
    """Yield the expressions that the value of `expression` may come from: columns of tables,
    parameters, and other expressions that pass on no value of the same type.

    The conditions of a CASE are left out. A function passes on its arguments if it has the type
    of one of them, as ``coalesce`` does.
    """
    inner: Any = ()
    for kind, attribute in _WRAPPERS.items():
        if isinstance(expression, kind):
            inner = [getattr(expression, attribute)]
    if isinstance(expression, elements.Case):
        inner = [value for _, value in expression.whens]
        inner += [] if expression.else_ is None else [expression.else_]
    elif isinstance(expression, FunctionElement):
        arguments = list(expression.clauses)
        inner = arguments if any(a.type is expression.type for a in arguments) else []
    elif isinstance(expression, ScalarSelect):
        yield from selected(expression.element, 0)
        return
    elif isinstance(expression, elements.ColumnClause):
        inner = [base for base in expression.base_columns if base is not expression]
    if not inner:
        yield expression
    for element in inner:
        yield from sources(element)


def selected(query: Any, position: int) -> Iterator[Any]:
    """Yield the sources of a query's column at `position`, in every member of a UNION."""
    for columns in columns_of_members(query):
        yield from sources(columns[position]) if position < len(columns) else [query]


def columns_of_members(query: Any) -> Iterator[list[Any]]:
    """Yield the columns of a query, or those of each member of a UNION."""
    if isinstance(query, SelectStatementGrouping):
        query = query.element
    if isinstance(query, sa.CompoundSelect):
        for member in query.selects:
            yield from columns_of_members(member)
    else:
        yield list(query.inner_columns if isinstance(query, sa.Select) else query.selected_columns)
