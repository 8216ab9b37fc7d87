"""Find the encrypted columns of what the caller names, table by table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import ARRAY, Column, Connection, Engine, MetaData, Table, column, inspect, table
from sqlalchemy.orm import ColumnProperty, Mapper, QueryableAttribute, registry
from sqlalchemy.sql.expression import ColumnClause, TableClause
from sqlalchemy.types import TypeDecorator, TypeEngine

from .._keyset import key_type
from ..exceptions import RotationError
from ..models import LucentBase
from ..types import EncryptedJSON

Target: TypeAlias = (
    "MetaData | registry | type[Any] | Table | Column[Any] | QueryableAttribute[Any]"
)
"""What may be named: all tables of a MetaData, registry or Declarative base; a mapped class or
Table; or one column."""


@dataclass(frozen=True)
class TargetColumn:
    """An encrypted column to work on."""

    name: str
    type: EncryptedJSON
    bound_to: tuple[str, ...]
    """Names in the database of the columns that its values are bound to."""


@dataclass(frozen=True)
class TargetTable:
    """A table with the encrypted columns to work on.

    `clause` is a light copy of the table, whose sealed columns are what the driver gives: it has
    no ``onupdate``, so that writing through it changes nothing but what is named.
    """

    name: str
    clause: TableClause
    primary_key: tuple[ColumnClause[Any], ...]
    columns: tuple[TargetColumn, ...]


def resolve_targets(
    targets: Target | Iterable[Target] | None, bind: Engine | Connection
) -> list[TargetTable]:
    """Return the tables to work on; the metadata of :class:`LucentBase` if `targets` is ``None``.

    :param bind: its option ``schema_translate_map`` says which schemas are meant.
    :raises RotationError: there is no encrypted column among them, or a table has no primary key.
    """
    columns = list(columns_in(LucentBase.metadata if targets is None else targets))
    if not columns:
        raise RotationError(
            "found no EncryptedJSON column in the targets; pass the MetaData, Declarative base, "
            "tables or columns that hold them (and import the modules that define the models)"
        )
    by_table: dict[Table, dict[str, Column[Any]]] = {}
    for found in columns:
        by_table.setdefault(found.table, {})[found.name] = found
    schemas = bind.get_execution_options().get("schema_translate_map") or {}
    return [
        _target_table(owner, list(named.values()), schemas.get(owner.schema, owner.schema))
        for owner, named in by_table.items()
    ]


def columns_in(target: Any) -> Iterator[Column[Any]]:
    """Give the encrypted columns of `target`; a table that is named and has none is an error."""
    if isinstance(target, QueryableAttribute):
        target = _column_of(target)
    if isinstance(target, Column):
        if not isinstance(target.type, EncryptedJSON):
            raise RotationError(f"column {target} is not an EncryptedJSON column")
        if not isinstance(target.table, Table):
            raise RotationError(f"column {target} is not a column of a table, but of an expression")
        yield target
    elif isinstance(target, Table):
        yield from _columns_of([target], f"table {target.fullname}")
    elif isinstance(target, MetaData):
        for owner in target.sorted_tables:
            yield from _encrypted(owner)
    elif isinstance(target, registry):
        yield from columns_in(target.metadata)
    elif isinstance(target, type):
        yield from _columns_of_class(target)
    elif isinstance(target, Iterable) and not isinstance(target, (str, bytes)):
        for member in target:
            yield from columns_in(member)
    else:
        raise _not_a_target(type(target))


def _column_of(attribute: QueryableAttribute[Any]) -> object:
    property_ = attribute.property
    if not isinstance(property_, ColumnProperty):
        raise RotationError(f"{attribute} is not a column attribute")
    return property_.columns[0]


def _columns_of_class(class_: type[Any]) -> Iterator[Column[Any]]:
    mapper = inspect(class_, raiseerr=False)
    if isinstance(mapper, Mapper):
        # With joined inheritance, a class has columns in the tables of its parents too.
        tables = [owner for owner in mapper.tables if isinstance(owner, Table)]
        yield from _columns_of(tables, f"class {class_.__name__}")
    elif isinstance(getattr(class_, "metadata", None), MetaData):
        yield from columns_in(class_.metadata)
    else:
        raise _not_a_target(class_)


def _columns_of(tables: list[Table], named: str) -> Iterator[Column[Any]]:
    found = [column for owner in tables for column in _encrypted(owner)]
    if not found:
        raise RotationError(f"{named} has no EncryptedJSON column")
    yield from found


def _encrypted(owner: Table) -> list[Column[Any]]:
    for found in owner.columns:
        if _seals_beneath(found.type):
            raise RotationError(
                f"{found} seals its values through a type that hides it (a variant, a "
                "TypeDecorator over EncryptedJSON, or an ARRAY of it), which cannot be rotated; "
                "declare the column as EncryptedJSON itself"
            )
    return [column for column in owner.columns if isinstance(column.type, EncryptedJSON)]


def _seals_beneath(type_: TypeEngine[Any]) -> bool:
    """Say whether the type seals some values in a way that it does not tell itself."""
    if isinstance(type_, EncryptedJSON):
        variants = type_._variant_mapping.values()
        return any(
            not isinstance(variant, EncryptedJSON)
            or (variant.contexts, variant.bound_to) != (type_.contexts, type_.bound_to)
            for variant in variants
        )
    beneath = [*type_._variant_mapping.values()]
    if isinstance(type_, TypeDecorator):
        beneath.append(type_.impl)  # type: ignore[arg-type]
    if isinstance(type_, ARRAY):
        beneath.append(type_.item_type)
    return any(isinstance(t, EncryptedJSON) or _seals_beneath(t) for t in beneath)


def _not_a_target(type_: type[Any]) -> RotationError:
    return RotationError(
        "a rotation's target is a MetaData, registry, Declarative base, mapped class, Table, "
        f"Column or an iterable of them, not {type_.__name__}"
    )


def _target_table(owner: Table, columns: list[Column[Any]], schema: str | None) -> TargetTable:
    name = owner.fullname
    if not owner.primary_key.columns:
        raise RotationError(
            f"table {name} has no primary key; a rotation needs one to go through the rows in order"
        )
    encrypted = tuple(_target_column(owner, column) for column in columns)
    plain = {c.name: c for c in owner.primary_key.columns}
    for target in encrypted:
        plain.update((c.name, c) for c in owner.columns if c.name in target.bound_to)
    clause = table(
        owner.name,
        *(column(c.name, key_type(c.type)) for c in plain.values()),
        *(column(c.name) for c in columns),
        schema=schema,
    )
    primary_key = tuple(clause.c[c.name] for c in owner.primary_key.columns)
    return TargetTable(name, clause, primary_key, encrypted)


def _target_column(owner: Table, column: Column[Any]) -> TargetColumn:
    assert isinstance(column.type, EncryptedJSON)
    missing = [key for key in column.type.bound_to if key not in owner.columns]
    if missing:
        raise RotationError(
            f"{column} is bound to {', '.join(missing)}, which its table does not have"
        )
    bound_to = tuple(owner.columns[key].name for key in column.type.bound_to)
    return TargetColumn(column.name, column.type, bound_to)
