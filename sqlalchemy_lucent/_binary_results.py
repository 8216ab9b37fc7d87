"""Results of psycopg in PostgreSQL's binary format, where a statement selects sealed values.

In text, the server sends bytes as hexadecimal digits: twice as many, and both sides convert them.
psycopg can ask for binary results, but only for all columns of a result at once. So a statement's
first result is read as text, and shows the types of its columns. If psycopg reads all of them to
the same values in both formats, later results are read in binary. Each of these is checked before a
row is read from it. If a type was altered, or the search path leads to another table, the SELECT is
executed again as text, now and from then on.

A statement that has an effect must not be executed twice. So what a write returns is always read as
text. So is a SELECT that calls a function, except a rotation's, whose functions have no effect.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final
from weakref import WeakKeyDictionary

import psycopg
from psycopg.abc import Loader
from psycopg.adapt import AdaptersMap
from psycopg.postgres import register_default_adapters
from psycopg.pq import Format
from sqlalchemy import CompoundSelect, Select, event
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import iterate

from ._sealing import SealedType
from ._statements import BINARY_RESULTS, REPEATABLE

_TEXT, _BINARY = Format

_TYPES: Final = frozenset({16, 17, 20, 21, 23, 25, 1042, 1043, 1082, 1114, 1184, 2950})
"""The types that psycopg reads to the same Python value in both formats, by OID: bool, bytea, int8,
int2, int4, text, char, varchar, date, timestamp, timestamptz, uuid. Not float4, for one: as text it
has fewer digits. A domain has the OID of its type; an extension's types have OIDs of their own."""


def reads_alike(cursor: Any) -> bool:
    """Say whether `cursor` would read its result to the same values in both formats."""
    result, loader_of = cursor.pgresult, cursor.adapters.get_loader
    if result is None:
        return False
    own = _own_loaders()
    for position in range(result.nfields):
        oid = result.ftype(position)
        if oid not in own or (loader_of(oid, _TEXT), loader_of(oid, _BINARY)) != own[oid]:
            return False
    return True


@cache
def _own_loaders() -> dict[int, tuple[type[Loader] | None, type[Loader] | None]]:
    """Return psycopg's own loaders: a user may have registered others, for one format only."""
    adapters = AdaptersMap(types=psycopg.postgres.types)
    register_default_adapters(adapters)
    return {
        oid: (adapters.get_loader(oid, _TEXT), adapters.get_loader(oid, _BINARY)) for oid in _TYPES
    }


class _Format:
    """Whether the results of one statement are read in binary."""

    is_binary: bool | None = None
    """``None`` until the first result is there."""

    def accepts(self, cursor: Any) -> bool:
        """Say whether the result of `cursor` may be in binary, and remember it."""
        is_alike = reads_alike(cursor)
        if not is_alike:
            self.is_binary = False
        elif self.is_binary is None:
            self.is_binary = True
        return is_alike


class _Cursor(psycopg.Cursor[Any]):
    """psycopg's usual cursor, but for a statement that selects sealed values."""

    offered: tuple[str, _Format] | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        format_ = _take_format(self, query, options)
        if format_ is None:
            return super().execute(query, params, **options)
        in_binary = bool(format_.is_binary)
        super().execute(query, params, binary=in_binary)
        if not format_.accepts(self) and in_binary:
            super().execute(query, params, binary=False)
        return self


class _AsyncCursor(psycopg.AsyncCursor[Any]):
    """The same for asyncio."""

    offered: tuple[str, _Format] | None = None

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        format_ = _take_format(self, query, options)
        if format_ is None:
            return await super().execute(query, params, **options)
        in_binary = bool(format_.is_binary)
        await super().execute(query, params, binary=in_binary)
        if not format_.accepts(self) and in_binary:
            await super().execute(query, params, binary=False)
        return self


def _take_format(
    cursor: _Cursor | _AsyncCursor, query: Any, options: dict[str, Any]
) -> _Format | None:
    """Take the format offered for `query`.

    A listener of the user may execute something else with this cursor, or choose the format.
    """
    offered = cursor.offered
    if offered is None or offered[0] != query or options or cursor.format:
        return None
    cursor.offered = None
    return offered[1]


_OURS: Final = {psycopg.Cursor: _Cursor, psycopg.AsyncCursor: _AsyncCursor}


def read_in_binary(dialect: Dialect) -> None:
    """Have `dialect` read the results of statements that select sealed values in binary."""
    formats: WeakKeyDictionary[Compiled, _Format] = WeakKeyDictionary()

    def offer_format(cursor: Any, statement: str, _parameters: Any, context: Any) -> None:
        compiled = context.compiled
        if compiled is None:
            return
        option = context.execution_options.get(BINARY_RESULTS, True)
        format_ = formats.get(compiled)
        if format_ is None:
            format_ = formats[compiled] = _Format()
            if option != REPEATABLE and not _selects_sealed_values(compiled):
                format_.is_binary = False
        if format_.is_binary is False or not option:
            return
        cursor = getattr(cursor, "_cursor", cursor)  # what SQLAlchemy's async cursor drives
        if isinstance(cursor, (_Cursor, _AsyncCursor)):
            cursor.offered = statement, format_
        elif type(cursor) in _OURS and cursor.connection.cursor_factory is type(cursor):
            # For the next cursor of this connection. A factory of the user's stays.
            cursor.connection.cursor_factory = _OURS[type(cursor)]

    event.listen(dialect, "do_execute", offer_format)


def _selects_sealed_values(compiled: Any) -> bool:
    """Say whether a statement returns sealed values and may be executed twice."""
    statement = compiled.statement
    parts = [statement, *(cte.element for cte in getattr(compiled, "ctes", None) or ())]
    return (
        all(isinstance(part, (Select, CompoundSelect)) for part in parts)
        and any(isinstance(column.type, SealedType) for column in compiled._result_columns)
        and not any(isinstance(part, _MAY_WRITE) for part in iterate(statement))
    )


_MAY_WRITE: Final = (FunctionElement, TextClause)
"""What may have an effect within a SELECT."""
