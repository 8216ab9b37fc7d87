"""Find the encrypted columns of what the caller names, table by table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import Column, MetaData, Table, column, table
from sqlalchemy.orm import QueryableAttribute, registry
from sqlalchemy.sql.expression import ColumnClause, TableClause

from ..exceptions import RotationError
from ..models import LucentBase
from ..types import EncryptedJSON

Target: TypeAlias = (
    "MetaData | registry | type[Any] | Table | Column[Any] | QueryableAttribute[Any]"
)
"""What may be named: all tables of a MetaData, registry or Declarative base; a mapped class or
Table; or one column."""


@dataclass(frozen=True)
class TargetTable:
    """
    A table with the encrypted columns to work on.

    `clause` is a light copy of the table, whose sealed columns are what the driver gives: it has
    no ``onupdate``, so that writing through it changes nothing but what is named.
    """

    name: str
    clause: TableClause
    primary_key: tuple[ColumnClause[Any], ...]
    types: dict[str, EncryptedJSON]


def resolve_targets(targets: Target | Iterable[Target] | None) -> list[TargetTable]:
    """
    Return the tables to work on; the metadata of :class:`LucentBase` if `targets` is ``None``.

    :raises RotationError: there is no encrypted column among them, or a table has no primary key.
    """
    columns = list(_columns(LucentBase.metadata if targets is None else targets))
    if not columns:
        raise RotationError(
            "found no EncryptedJSON column in the targets; pass the MetaData, Declarative base, "
            "tables or columns that hold them (and import the modules that define the models)"
        )
    by_table: dict[Table, dict[str, Column[Any]]] = {}
    for found in columns:
        by_table.setdefault(found.table, {})[found.name] = found
    return [_target_table(owner, list(named.values())) for owner, named in by_table.items()]


def _columns(target: Any) -> Iterator[Column[Any]]:
    if isinstance(target, QueryableAttribute):
        target = target.property.columns[0]
    if isinstance(target, Column):
        if not isinstance(target.type, EncryptedJSON):
            raise RotationError(f"column {target} is not an EncryptedJSON column")
        yield target
    elif isinstance(target, Table):
        yield from (c for c in target.columns if isinstance(c.type, EncryptedJSON))
    elif isinstance(target, MetaData):
        for owner in target.sorted_tables:
            yield from _columns(owner)
    elif isinstance(target, registry):
        yield from _columns(target.metadata)
    elif isinstance(target, type) and isinstance(getattr(target, "__table__", None), Table):
        yield from _columns(target.__table__)  # type: ignore[attr-defined]
    elif isinstance(target, type) and isinstance(getattr(target, "metadata", None), MetaData):
        yield from _columns(target.metadata)  # type: ignore[attr-defined]
    elif isinstance(target, Iterable) and not isinstance(target, (str, bytes)):
        for member in target:
            yield from _columns(member)
    else:
        raise RotationError(
            "a rotation's target is a MetaData, registry, Declarative base, mapped class, Table, "
            f"Column or an iterable of them, not {type(target).__name__}"
        )


def _target_table(owner: Table, columns: list[Column[Any]]) -> TargetTable:
    name = owner.fullname
    if not owner.primary_key.columns:
        raise RotationError(
            f"table {name} has no primary key; a rotation needs one to go through the rows in order"
        )
    types = {c.name: c.type for c in columns if isinstance(c.type, EncryptedJSON)}
    bound = [owner.c[bound_name] for type_ in types.values() for bound_name in type_.bound_to]
    plain = dict.fromkeys([*owner.primary_key.columns, *bound])
    clause = table(
        owner.name,
        *(column(c.name, c.type) for c in plain),
        *(column(c.name) for c in columns),
        schema=owner.schema,
    )
    primary_key = tuple(clause.c[c.name] for c in owner.primary_key.columns)
    return TargetTable(name, clause, primary_key, types)
