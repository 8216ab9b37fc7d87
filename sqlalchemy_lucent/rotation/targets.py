"""Find the encrypted columns in what the caller passes as targets, table by table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import ARRAY, Column, Connection, Engine, MetaData, Table, column, inspect, table
from sqlalchemy.orm import ColumnProperty, Mapper, QueryableAttribute, registry
from sqlalchemy.sql.expression import ColumnClause, TableClause
from sqlalchemy.types import TypeDecorator, TypeEngine

from .._database.reflection import no_primary_key
from .._database.relations import Relation, binary_columns, relation_of, tables_beneath
from .._pagination import key_type
from .._sql import key_version
from ..exceptions import RotationError
from ..models import LucentBase, is_versions_table, lifecycle_tables
from ..types import EncryptedJSON

Target: TypeAlias = (
    "MetaData | registry | type[Any] | Table | Column[Any] | QueryableAttribute[Any]"
)
"""What may be a target: a MetaData, with all its tables; a registry or Declarative base, with the
tables of each MetaData that its classes use; a mapped class or a mixin, with the tables of the
classes that derive from it; a Table; or one column. A table of secrets includes that of its kept
versions."""


@dataclass(frozen=True)
class TargetColumn:
    """An encrypted column to work on."""

    name: str
    type: EncryptedJSON
    bound_to: tuple[str, ...]
    """The database's names of the columns that its values are bound to."""
    version_column: str | None = None
    """The generated column that, by the model, has the key version."""


@dataclass(frozen=True)
class TargetTable:
    """A table with the encrypted columns to work on.

    `clause` is a bare copy of the table. Its sealed columns have no type, so they hold what the
    driver gives. It has no ``onupdate``, so an UPDATE sets only the columns that it names.
    """

    name: str
    clause: TableClause
    primary_key: tuple[ColumnClause[Any], ...]
    columns: tuple[TargetColumn, ...]
    may_be_missing: bool = False
    """Whether it may be missing in the database: it has the versions of a table of secrets."""


def resolve_targets(
    targets: Target | Iterable[Target] | None, bind: Engine | Connection
) -> list[TargetTable]:
    """Return the tables to work on; ``None`` stands for the metadata of :class:`LucentBase`.

    :param bind: its option ``schema_translate_map`` applies.
    :raises RotationError: `targets` has no encrypted column, or a table has no primary key.
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
    _refuse_other_databases(by_table, _bind_key(columns[0].table))
    schemas = bind.get_execution_options().get("schema_translate_map") or {}
    tables = [
        _target_table(owner, list(named.values()), schemas.get(owner.schema, owner.schema))
        for owner, named in by_table.items()
    ]
    known = Counter((target.clause.schema, target.clause.name) for target in tables)
    ((_, name), number) = known.most_common(1)[0]
    if number > 1:
        raise RotationError(
            f"the targets have two tables {name}, each in a MetaData of its own. If they are one "
            "table, pass one of them. If they are in two databases, call this once for each "
            "database, with its engine and its MetaData"
        )
    return tables


def columns_in(target: Any) -> Iterator[Column[Any]]:
    """Yield the encrypted columns of `target`.

    :raises RotationError: a table or mapped class has none, or the tables of a base or registry are
        in several databases.
    """
    if isinstance(target, QueryableAttribute):
        if not isinstance(target.property, ColumnProperty):
            raise RotationError(f"{target} is not a column attribute")
        target = target.property.columns[0]
    if isinstance(target, Column):
        if not isinstance(target.type, EncryptedJSON):
            raise RotationError(f"column {target} is not an EncryptedJSON column")
        if not isinstance(target.table, Table):
            raise RotationError(f"column {target} is not a column of a table, but of an expression")
        yield target
    elif isinstance(target, Table):
        yield from _columns_of(_with_versions([target]), f"table {target.fullname}")
    elif isinstance(target, type) and isinstance(inspect(target, raiseerr=False), Mapper):
        yield from _columns_of(tables_in(target), f"class {target.__name__}")
    elif isinstance(target, (MetaData, registry, type)):
        tables = tables_in(target)
        sealed = [owner for owner in tables if _encrypted(owner)]
        own = target if isinstance(target, MetaData) else getattr(target, "metadata", None)
        if isinstance(own, MetaData):
            _refuse_other_databases(sealed, own.info.get("bind_key"))
        for owner in sealed:
            yield from _encrypted(owner)
    elif isinstance(target, Iterable) and not isinstance(target, (str, bytes)):
        for member in target:
            yield from columns_in(member)
    else:
        raise _not_a_target(type(target))


def tables_in(target: MetaData | registry | type[Any]) -> list[Table]:
    """Return the tables of `target`, with and without encrypted columns.

    :raises RotationError: it is a class without a table.
    """
    if isinstance(target, MetaData):
        return target.sorted_tables
    mapper = inspect(target, raiseerr=False)
    if isinstance(mapper, Mapper):
        # With joined inheritance, a class has columns in the tables of its parents too.
        return _tables_of(mapper.self_and_descendants)
    if isinstance(target, registry):
        return _with_all_beside([target.metadata], _tables_of(target.mappers))
    # SQLModel has the second name only.
    classes = [target, *_classes_below(target)]
    registries = [vars(c).get(n) for c in classes for n in ("registry", "_sa_registry")]
    mappers = {m for found in registries if isinstance(found, registry) for m in found.mappers}
    mappers.update(m for c in classes if isinstance(m := inspect(c, raiseerr=False), Mapper))
    if isinstance(getattr(target, "metadata", None), MetaData):
        own = [getattr(c, "metadata", None) for c in classes]
        return _with_all_beside([m for m in own if isinstance(m, MetaData)], _tables_of(mappers))
    if not mappers:
        raise _not_a_target(target)
    return _tables_of(mappers)  # of a mixin


def _classes_below(class_: type[Any]) -> Iterator[type[Any]]:
    for below in type.__subclasses__(class_):
        yield below
        yield from _classes_below(below)


def _tables_of(mappers: Iterable[Mapper[Any]]) -> list[Table]:
    found = {owner for mapper in mappers for owner in mapper.tables if isinstance(owner, Table)}
    return _with_versions(sorted(found, key=lambda owner: owner.fullname))


def _with_versions(tables: list[Table]) -> list[Table]:
    """Return `tables`, each table of secrets followed by that of its kept versions.

    Whoever names a model of secrets means all of its values.
    """
    every: dict[Table, None] = {}
    for owner in tables:
        every[owner] = None
        beside = lifecycle_tables(owner)
        if beside is not None:
            every[beside.versions] = None
    return list(every)


def _with_all_beside(metadatas: list[MetaData], tables: list[Table]) -> list[Table]:
    """Return all tables of `metadatas` and of those of `tables`, mapped or not.

    A table that is not mapped may be an association's.
    """
    every = dict.fromkeys([*metadatas, *(owner.metadata for owner in tables)])
    beside = (owner for metadata in every for owner in metadata.sorted_tables)
    return list(dict.fromkeys([*beside, *tables]))


def _bind_key(owner: Any) -> object:
    """Return Flask-SQLAlchemy's name of the table's database."""
    return owner.info.get("bind_key", owner.metadata.info.get("bind_key"))


def _refuse_other_databases(tables: Iterable[Table], key: object) -> None:
    others = {owner.fullname: _bind_key(owner) for owner in tables if _bind_key(owner) != key}
    if others:
        named = ", ".join(f"{name} (bind key {other!r})" for name, other in others.items())
        other = next(iter(others.values()))
        raise RotationError(
            f"the targets have tables in another database: {named}. Call this once for each "
            "database, with its MetaData and its engine: in Flask-SQLAlchemy, "
            f"db.metadatas[{other!r}] with db.engines[{other!r}], and db.metadatas[{key!r}] with "
            f"db.engines[{key!r}]"
        )


def _columns_of(tables: list[Table], named: str) -> Iterator[Column[Any]]:
    found = [column for owner in tables for column in _encrypted(owner)]
    if not found:
        raise RotationError(f"{named} has no EncryptedJSON column")
    yield from found


def _encrypted(owner: Table) -> list[Column[Any]]:
    for found in owner.columns:
        if _seals_beneath(found.type):
            raise RotationError(
                f"{found} seals its values through a type that cannot be rotated: a variant, an "
                "ARRAY or a TypeDecorator over EncryptedJSON. Declare the column as EncryptedJSON "
                "itself"
            )
    return [column for column in owner.columns if isinstance(column.type, EncryptedJSON)]


def _seals_beneath(type_: TypeEngine[Any]) -> bool:
    """Say whether the type seals values by another type inside it."""
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
        raise no_primary_key(name)
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
    return TargetTable(name, clause, primary_key, encrypted, is_versions_table(owner))


def _target_column(owner: Table, column: Column[Any]) -> TargetColumn:
    assert isinstance(column.type, EncryptedJSON)
    missing = [key for key in column.type.bound_to if key not in owner.columns]
    if missing:
        raise RotationError(f"{column} is bound to {missing[0]!r}, which its table does not have")
    bound_to = tuple(owner.columns[key].name for key in column.type.bound_to)
    version_columns = (c.name for c in owner.columns if _computes_version_of(c, column.name))
    return TargetColumn(column.name, column.type, bound_to, next(version_columns, None))


def _computes_version_of(candidate: Column[Any], name: str) -> bool:
    computed = candidate.computed
    if computed is None or not isinstance(computed.sqltext, key_version):
        return False
    (argument,) = computed.sqltext.clauses
    return getattr(argument, "name", None) == name


# -- in the database -------------------------------------------------------------------------------


class Survey(NamedTuple):
    """The targets, and what each name means in the database."""

    found: list[tuple[TargetTable, Relation]]

    @property
    def tables(self) -> list[TargetTable]:
        """The targets that are tables."""
        return [target for target, relation in self.found if relation.is_table]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names of views and foreign tables, which are not read."""
        return tuple(target.name for target, relation in self.found if not relation.is_table)


def survey(connection: Connection, targets: Iterable[TargetTable]) -> Survey:
    """Look `targets` up in the database.

    A missing table of versions is left out: it has no values until the database is upgraded.

    :raises RotationError: another one is missing, or none is a table.
    """
    targets = list(targets)
    found, missing = [], []
    for target in targets:
        relation = relation_of(connection, target.clause.name, target.clause.schema)
        if relation is None and not target.may_be_missing:
            missing.append(target.name)
        elif relation is not None:
            found.append((target, relation))
    if not found:
        missing = [target.name for target in targets]
    if missing:
        raise RotationError(
            f"not in this database: {', '.join(missing)}. Run your migrations (alembic upgrade "
            "head), or pass the right engine; tables in two databases take two calls"
        )
    known = Survey(found)
    if not known.tables:
        raise RotationError(
            f"no table is left: {', '.join(known.left_out)} is a view or foreign table. Pass the "
            "table that has the values"
        )
    return known


def refuse_left_out(connection: Connection, known: Survey, exclude: Iterable[str]) -> None:
    """Refuse a view, unless every sealed column that it may show is a target or it is excluded.

    :raises RotationError: there is such a view, or `exclude` names something else.
    """
    excluded = set(exclude)
    wrong = excluded.difference(known.left_out)
    if wrong:
        raise RotationError(
            f"exclude= names {min(map(str, wrong))}, which was not left out: it is for views and "
            f"foreign tables among the targets ({', '.join(known.left_out) or 'there are none'})"
        )
    fold = str if connection.dialect.name == "postgresql" else str.lower
    covered: dict[tuple[str, str], set[str]] = {}
    for target, relation in known.found:
        names = covered.setdefault((relation.schema, relation.name), set())
        names.update(fold(column.name) for column in target.columns)
    for target, relation in known.found:
        if relation.is_table or target.name in excluded:
            continue
        beneath = tables_beneath(connection, relation)
        unknown = [] if beneath else ["the tables that it reads are not known"]
        for schema, name in sorted(beneath or ()):
            sealed = {fold(column) for column in binary_columns(connection, schema, name)}
            unknown += [
                f"its {schema}.{name}.{column} is no target"
                for column in sorted(sealed - covered.get((schema, name), set()))
            ]
        if unknown:
            raise RotationError(
                f"{target.name} is a {relation.kind}, and values that it shows may need the key: "
                f"{unknown[0]}. Make the tables that it reads targets, or pass "
                f"exclude=[{target.name!r}] if you know that none of its values needs the key"
            )
