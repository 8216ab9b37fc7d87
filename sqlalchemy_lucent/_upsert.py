"""The repository's statements, built once: building one takes as long as running it.

The conditions on a secret's key are here too: all statements share them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.sql.dml import Insert

from ._sql import is_mysql
from .exceptions import UnsupportedOperationError
from .secret_key import KEY_PART_NAMES, SecretKey

_KEYS_PER_STATEMENT: Final = 128
"""Each takes four parameters; databases limit these, and plan long for many."""

Execute = Callable[..., sa.CursorResult[Any]]
"""Executes a statement with parameters, as ``Connection.execute`` does."""

KEY_PARAMETERS: Final[list[sa.BindParameter[Any]]] = [sa.bindparam(name) for name in KEY_PART_NAMES]


def key_columns(table: sa.FromClause) -> list[sa.ColumnElement[str]]:
    """Return the columns of `table` that have the parts of the key."""
    return [table.c[name] for name in KEY_PART_NAMES]


def has_key(table: sa.FromClause, parts: Sequence[Any]) -> sa.ColumnElement[bool]:
    """Return the condition that the key of `table` begins with `parts`."""
    columns = key_columns(table)
    return sa.and_(*(column == part for column, part in zip(columns, parts, strict=False)))


def same_key(one: sa.FromClause, other: sa.FromClause) -> sa.ColumnElement[bool]:
    """Return the condition that joins two tables on the key."""
    return has_key(one, key_columns(other))


@lru_cache(maxsize=32)
def select_payload(table: sa.Table) -> sa.Select[Any]:
    """Return the SELECT of one payload, by `KEY_PARAMETERS`."""
    return sa.select(table.c.payload).where(has_key(table, KEY_PARAMETERS))


def select_payloads(
    table: sa.Table, dialect: sa.Dialect, keys: Sequence[SecretKey]
) -> Iterator[tuple[sa.Select[Any], Any]]:
    """Yield statements that select the keys and payloads of `keys`, with their parameters."""
    if dialect.name == "postgresql":
        parts = map(list, zip(*keys, strict=True))
        yield _select_by_arrays(table), dict(zip(KEY_PART_NAMES, parts, strict=True))
        return
    for size, parameters in batches(keys):
        yield _select_by_keys(table, is_mysql(dialect), size), parameters


@lru_cache(maxsize=256)
def _select_by_keys(table: sa.Table, on_mysql: bool, size: int) -> sa.Select[Any]:
    return _select_keys_and_payloads(table).where(is_one_of(table, on_mysql, size))


@lru_cache(maxsize=32)
def _select_by_arrays(table: sa.Table) -> sa.Select[Any]:
    """Use one array for each part of the keys: PostgreSQL plans any number of them as a join."""
    wanted = (
        sa.func.unnest(*(sa.bindparam(name, type_=sa.ARRAY(sa.String)) for name in KEY_PART_NAMES))
        .table_valued(*(sa.column(name, sa.String) for name in KEY_PART_NAMES), name="wanted")
        .render_derived()
    )
    return _select_keys_and_payloads(table).where(same_key(table, wanted))


def _select_keys_and_payloads(table: sa.Table) -> sa.Select[Any]:
    columns = *key_columns(table), table.c.payload
    return sa.select(*columns)


@lru_cache(maxsize=256)
def is_one_of(table: sa.Table, on_mysql: bool, size: int) -> sa.ColumnElement[bool]:
    """Return the condition that a key is one of `size` keys, the parameters of `batches`.

    MySQL and MariaDB are faster with ``(a, b, …) IN (…)``. SQLite would scan the table for it, and
    PostgreSQL plans it for twice as long.
    """
    columns = key_columns(table)
    keys = [
        [sa.bindparam(f"{column.name}_{position}", type_=column.type) for column in columns]
        for position in range(size)
    ]
    if on_mysql:
        return sa.tuple_(*columns).in_([sa.tuple_(*key) for key in keys])
    return sa.or_(*(has_key(table, key) for key in keys))


def batches(keys: Sequence[SecretKey]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the size and the parameters of :func:`is_one_of` for `keys`, batch by batch.

    The last key of a batch fills it up to a power of two, so that there are few sizes.
    """
    for start in range(0, len(keys), _KEYS_PER_STATEMENT):
        batch = keys[start : start + _KEYS_PER_STATEMENT]
        size = 1 << (len(batch) - 1).bit_length()
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        parameters = {
            f"{name}_{position}": part
            for position, key in enumerate(filled)
            for name, part in zip(KEY_PART_NAMES, key, strict=True)
        }
        yield size, parameters


@lru_cache(maxsize=32)
def insert_or(table: sa.Table, dialect_name: str, *updated: str, numbered: bool = False) -> Insert:
    """Return an INSERT that updates the columns `updated` if the key exists.

    With `numbered`, it also sets `number` and `last_number` to the next number.

    A dialect is imported with its database only: importing all three takes as long as the rest of
    the package.
    """
    module = "mysql" if dialect_name == "mariadb" else dialect_name
    if module not in ("mysql", "postgresql", "sqlite"):
        raise UnsupportedOperationError(
            f"LucentSecrets has no upsert for the dialect {dialect_name!r}; it supports sqlite, "
            "postgresql, mysql and mariadb"
        )
    insert: Any = importlib.import_module(f"sqlalchemy.dialects.{module}").insert(table)
    # MySQL assigns in the order of the columns, where `number` comes first.
    numbers = dict.fromkeys(("number", "last_number"), table.c.last_number + 1) if numbered else {}
    if module == "mysql":
        # Callers that insert one new key at once wait for the first, and continue when it commits.
        # If it rolls back, InnoDB leaves each of them a lock on the gap where the row was, and
        # resolves the deadlock (error 1213) by rolling back one of their transactions. No form of
        # INSERT takes other locks there, and repeating the statement would lose the rest of that
        # transaction; so the error goes to the caller, who has to repeat the transaction.
        #
        # MySQL has no DO NOTHING; assigning a column to itself leaves the row as it is.
        values = {name: insert.inserted[name] for name in updated} or {"scope": table.c.scope}
        values.update(numbers)
        statement: Insert = insert.on_duplicate_key_update(values)
    elif updated:
        values = {**{name: insert.excluded[name] for name in updated}, **numbers}
        statement = insert.on_conflict_do_update(index_elements=KEY_PART_NAMES, set_=values)
    else:
        statement = insert.on_conflict_do_nothing(index_elements=KEY_PART_NAMES)
    return statement


def insert_absent(
    execute: Execute, table: sa.Table, dialect: sa.Dialect, row: Mapping[str, Any]
) -> bool:
    """Insert a secret's row unless there is one; return whether it was inserted."""
    # SQLAlchemy keeps the row count of an INSERT only on request.
    statement = insert_or(table, dialect.name).execution_options(preserve_rowcount=True)
    count = execute(statement, row).rowcount
    if not is_mysql(dialect):
        return count > 0
    # MySQL counts 1 also for a row that it left alone. Compare what is stored: nobody else can have
    # sealed the same bytes. The lock is there already; with it, MySQL reads what is committed now.
    key = {name: row[name] for name in KEY_PART_NAMES}
    stored = execute(select_payload(table).with_for_update(), key).scalar()
    return stored is not None and bytes(stored) == bytes(row["payload"])


def upsert(table: sa.Table, dialect_name: str) -> Insert:
    """Return the one-statement upsert; `created_at` stays that of the first write."""
    return insert_or(table, dialect_name, "payload", "updated_at")


@lru_cache(maxsize=32)
def any_update(table: sa.Table) -> sa.Update:
    """Return an UPDATE of the table, which is never executed: it stands for whatever writes."""
    return sa.update(table)
