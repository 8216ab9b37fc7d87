"""What autogenerate finds: conversions, values to re-encrypt, renames, unencrypted secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import (
    AddColumnOp,
    AlterColumnOp,
    CreateTableOp,
    DropColumnOp,
    DropConstraintOp,
    DropIndexOp,
    DropTableOp,
    MigrateOperation,
    ModifyTableOps,
    UpgradeOps,
)
from alembic.runtime.plugins import Plugin
from alembic.util import DispatchPriority, PriorityDispatchResult
from sqlalchemy.exc import NoSuchTableError, UnreflectableTableError
from sqlalchemy.types import _Binary

from .. import _sql
from .._database.reflection import has_row
from .._database.relations import relation_of
from .._row import tells_its_values
from ..keyring import default_keyring
from ..models import lifecycle_tables
from ..rotation import needs_rotation
from ..rotation.jobs import Rebind
from ..rotation.targets import resolve_targets
from ..types import EncryptedJSON, has_check
from ._checks import find_check, logger
from ._run import is_empty
from .operations import (
    BoundTo,
    ColumnOp,
    ConvertColumnOp,
    CreateSealedCheckOp,
    DecryptColumnOp,
    DropSealedCheckOp,
    EncryptColumnOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
)
from .tables import UpgradeLucentSecretsOp

PLUGIN_NAME = "sqlalchemy_lucent.autogenerate"
"""The name to select in ``autogenerate_plugins``, or to exclude there with ``~``."""

LINT_PLUGIN_NAME = "lucent_lint"
"""The name that adds warnings about columns that look like secrets and are not encrypted.
``sqlalchemy_lucent.*`` does not select it."""

_SAMPLE: Final = 20
"""How many values are opened to tell whether a column's values are of its context."""


def setup(plugin: Plugin) -> None:
    """Add the comparators to an Alembic plugin."""
    plugin.add_autogenerate_comparator(
        _compare_columns, "autogenerate", "lucent", priority=DispatchPriority.LAST
    )


def _compare_columns(autogen_context: AutogenContext, upgrade_ops: UpgradeOps) -> Any:
    """Replace bare type changes by conversions; if the schema is up to date, look at the values.

    A rotation must not share its revision with a change of the schema, whose tables may not exist
    yet.
    """
    connection = autogen_context.connection
    assert connection is not None
    _warn_of_renames(upgrade_ops)
    _name_upgrades(autogen_context, upgrade_ops)
    conversions = list(_take_conversions(connection, upgrade_ops))
    drops = list(_take_drops(autogen_context, upgrade_ops, conversions))
    if conversions and not upgrade_ops.is_empty():
        logger.warning(
            "This revision changes the schema and converts values. It converts first; if it is "
            "killed after that, it may have to be finished by hand. Two revisions are safer"
        )
    if connection.dialect.name == "sqlite" and autogen_context.opts.get("render_as_batch"):
        _free_columns_of_checks(connection, upgrade_ops)
    # First, so that a revision killed during a conversion can be run again from its start.
    upgrade_ops.ops[:0] = [*drops, *conversions]
    if not upgrade_ops.is_empty():
        tables = autogen_context.sorted_tables
        if any(isinstance(column.type, EncryptedJSON) for each in tables for column in each.c):
            logger.info("rotations need their own revision: run autogenerate after the upgrade")
        return PriorityDispatchResult.CONTINUE
    sealed = [
        column
        for column in _included_columns(autogen_context)
        if isinstance(column.type, EncryptedJSON) and _is_in_a_table(connection, column)
    ]
    upgrade_ops.ops.extend(_missing_checks(connection, sealed))
    for column in sealed:
        if not is_empty(connection, column):
            upgrade_ops.ops.extend(_work_on_values(connection, column))
    return PriorityDispatchResult.CONTINUE


def _included_columns(autogen_context: AutogenContext) -> Iterator[sa.Column[Any]]:
    """Give the columns that the environment's filters include.

    As in Alembic, a filter gets the models' object and the database's.
    """
    assert autogen_context.connection is not None
    inspector = autogen_context.inspector
    default_schema = autogen_context.connection.dialect.default_schema_name
    for table in autogen_context.sorted_tables:
        schema = None if table.schema == default_schema else table.schema
        if not (
            (schema is None or autogen_context.opts.get("include_schemas"))
            and autogen_context.run_name_filters(schema, "schema", {})
            and autogen_context.run_name_filters(table.name, "table", {"schema_name": schema})
        ):
            continue
        found = sa.Table(table.name, sa.MetaData(), schema=schema)
        with suppress(NoSuchTableError, UnreflectableTableError):
            inspector.reflect_table(found, None, resolve_fks=False)
        existing = found if len(found.columns) else None
        if not autogen_context.run_object_filters(table, table.name, "table", False, existing):
            continue
        for column in table.columns:
            name, existing_column = column.name, found.columns.get(column.name)
            if autogen_context.run_name_filters(
                name, "column", {"table_name": table.name, "schema_name": schema}
            ) and autogen_context.run_object_filters(
                column, name, "column", False, existing_column
            ):
                yield column


def _is_in_a_table(connection: sa.Connection, column: sa.Column[Any]) -> bool:
    (target,) = resolve_targets(column, connection)
    found = relation_of(connection, target.clause.name, target.clause.schema)
    if found is not None and found.is_table:
        return True
    what = "not in this database" if found is None else f"a {found.kind}"
    logger.info("left out %s, which is %s", target.name, what)
    return False


def _modifications(upgrade_ops: UpgradeOps) -> Iterator[ModifyTableOps]:
    """Give the changes of each table; drop those that the caller leaves empty."""
    for table_ops in list(upgrade_ops.ops):
        if isinstance(table_ops, ModifyTableOps):
            yield table_ops
            if not table_ops.ops:
                upgrade_ops.ops.remove(table_ops)


def _free_columns_of_checks(connection: sa.Connection, upgrade_ops: UpgradeOps) -> None:
    """Drop a CHECK before its column, where batch mode copies a SQLite table.

    Batch mode reflects the constraint as text, and would write it into a table without the column.
    """
    for table_ops in _modifications(upgrade_ops):
        name, schema = table_ops.table_name, table_ops.schema
        for operation in table_ops.ops:
            if isinstance(operation, DropColumnOp):
                dropped = operation.column_name
                if find_check(sa.inspect(connection), name, dropped, schema):
                    upgrade_ops.ops.insert(0, DropSealedCheckOp(name, dropped, schema=schema))
            elif isinstance(operation, AddColumnOp) and has_check(
                operation.column, connection.dialect
            ):
                # Adding the column adds the constraint: this is for its reverse.
                added = operation.column.name
                upgrade_ops.ops.append(CreateSealedCheckOp(name, added, schema=schema))


def _missing_checks(
    connection: sa.Connection, columns: Iterable[sa.Column[Any]]
) -> Iterator[CreateSealedCheckOp]:
    """Offer the CHECK constraint where the table was made before there was one."""
    for column in columns:
        table = column.table
        if has_check(column, connection.dialect) and not find_check(
            sa.inspect(connection), table.name, column.name, table.schema
        ):
            logger.info("Detected that %s takes values that are not sealed", column)
            yield CreateSealedCheckOp(table.name, column.name, schema=table.schema)


def _name_upgrades(autogen_context: AutogenContext, upgrade_ops: UpgradeOps) -> None:
    """Write one operation for the two tables beside a table of secrets.

    They are dropped by one that refuses to drop versions.
    """
    created = {
        (op.schema, op.table_name) for op in upgrade_ops.ops if isinstance(op, CreateTableOp)
    }
    for table in autogen_context.sorted_tables:
        names = {(each.schema, each.name) for each in lifecycle_tables(table) or ()}
        if names and names <= created:
            replaced = [
                op
                for op in upgrade_ops.ops
                if isinstance(op, (CreateTableOp, ModifyTableOps))  # their indexes
                and (op.schema, op.table_name) in names
            ]
            upgrade = UpgradeLucentSecretsOp(table.name, schema=table.schema)
            upgrade_ops.ops.insert(upgrade_ops.ops.index(replaced[0]), upgrade)
            upgrade_ops.ops[:] = [op for op in upgrade_ops.ops if op not in replaced]


def _warn_of_renames(upgrade_ops: UpgradeOps) -> None:
    """Warn that autogenerate writes a rename as something added and something dropped."""
    template = (
        "%s is %s and %s is dropped, with its values. If it was renamed, write %s instead, and "
        "declare %s as EncryptedJSON(accept_contexts=[%r]) so that its values open"
    )
    dropped = [op.to_table() for op in upgrade_ops.ops if isinstance(op, DropTableOp)]
    created = [op.to_table() for op in upgrade_ops.ops if isinstance(op, CreateTableOp)]
    for table, new in [(owner, column) for owner in created for column in owner.columns]:
        names = [t.name for t in dropped if new.name in t.c and _may_replace(t.c[new.name], new)]
        if names:
            fix = f"op.rename_table({names[0]!r}, {table.name!r})"
            old = f"{names[0]}.{new.name}"
            logger.warning(template, table.name, "created", " or ".join(names), fix, new, old)
    for table_ops in _modifications(upgrade_ops):
        owner = table_ops.table_name
        gone = [op.to_column() for op in table_ops.ops if isinstance(op, DropColumnOp)]
        for new in [op.column for op in table_ops.ops if isinstance(op, AddColumnOp)]:
            names = [column.name for column in gone if _may_replace(column, new)]
            if names:
                fix = f"op.alter_column(..., new_column_name={new.name!r})"
                full = f"{owner}.{new.name}"
                old = f"{owner}.{names[0]}"
                logger.warning(template, full, "added", " or ".join(names), fix, full, old)


def _may_replace(old: sa.Column[Any], new: sa.Column[Any]) -> bool:
    return isinstance(new.type, EncryptedJSON) and isinstance(old.type, _Binary)


def _take_conversions(
    connection: sa.Connection, upgrade_ops: UpgradeOps
) -> Iterator[ConvertColumnOp]:
    """Take the type changes from or to `EncryptedJSON` out of `upgrade_ops`."""
    for table_ops in _modifications(upgrade_ops):
        for operation in list(table_ops.ops):
            if not isinstance(operation, AlterColumnOp):
                continue
            conversion = _conversion_for(connection, operation)
            if conversion is not None:
                yield conversion
                operation.existing_type, operation.modify_type = operation.modify_type, None
                if not operation.has_changes():
                    table_ops.ops.remove(operation)


def _take_drops(
    autogen_context: AutogenContext, upgrade_ops: UpgradeOps, conversions: Iterable[ConvertColumnOp]
) -> Iterator[MigrateOperation]:
    """Take out what drops an index or constraint of a table that is converted.

    These go first, since a conversion refuses a column that has one. It also commits them, so they
    have IF EXISTS, where Alembic and the database know it, for a revision that is run again after
    a kill.
    """
    assert autogen_context.dialect is not None
    dialect = autogen_context.dialect
    index_if_exists = not _sql.is_mysql(dialect) or _sql.is_mariadb(dialect)
    constraint_if_exists = dialect.name == "postgresql" and not autogen_context.opts.get(
        "render_as_batch"
    )
    converted = {(operation.table_name, operation.schema) for operation in conversions}
    for table_ops in _modifications(upgrade_ops):
        if (table_ops.table_name, table_ops.schema) not in converted:
            continue
        constraints = ModifyTableOps(table_ops.table_name, [], schema=table_ops.schema)
        indexes: list[DropIndexOp] = []
        for operation in list(table_ops.ops):
            if isinstance(operation, DropIndexOp):
                operation.if_exists = index_if_exists or None
                indexes.append(operation)
            elif isinstance(operation, DropConstraintOp):
                operation.if_exists = constraint_if_exists or None
                constraints.ops.append(operation)
            else:
                continue
            table_ops.ops.remove(operation)
        if constraints.ops:
            yield constraints  # first: MySQL keeps an index that a foreign key needs
        yield from indexes  # not in a batch, which does not take `if_exists`


def _conversion_for(connection: sa.Connection, operation: AlterColumnOp) -> ConvertColumnOp | None:
    old, new = operation.existing_type, operation.modify_type
    name, schema = operation.column_name, operation.schema
    if old is not None and isinstance(new, EncryptedJSON) and not isinstance(old, _Binary):
        logger.info("Detected that %s.%s is to be encrypted", operation.table_name, name)
        return EncryptColumnOp(
            operation.table_name,
            name,
            existing_type=old,
            schema=schema,
            context=new.explicit_context,
            bound_to=new.bound_to,
            create_constraint=new.create_constraint,
        )
    if isinstance(new, (sa.JSON, sa.String)) and isinstance(old, _Binary):
        value: sa.Column[Any] = sa.Column(name, sa.LargeBinary)
        owner = sa.table(operation.table_name, value, schema=schema)
        if has_row(connection, owner, _sql.key_version(value).is_not(None)):
            logger.info("Detected that %s.%s is to be decrypted", operation.table_name, name)
            return DecryptColumnOp(operation.table_name, name, existing_type=new, schema=schema)
    return None


def _work_on_values(connection: sa.Connection, column: sa.Column[Any]) -> Iterator[ColumnOp]:
    """Give the operation that the values of a column need, if any."""
    type_ = column.type
    assert isinstance(type_, EncryptedJSON)
    (target,) = resolve_targets(column, connection)
    shared: dict[str, Any] = {
        "schema": column.table.schema,
        "context": type_.explicit_context,
        "bound_to": _bound_to_with_types(column),
    }
    if needs_rotation(connection, column):
        logger.info("Detected values of %s that are not under the primary key", column)
        yield RotateEncryptedColumnOp(
            column.table.name, column.name, accept_contexts=type_.accept_contexts, **shared
        )
        return
    job = Rebind(target, default_keyring(), connection.dialect)

    def read(work: Any) -> Any:
        return work(connection)

    # While a column accepts earlier contexts, open all values, not only the first: when none of
    # them needs an earlier context, the user removes `accept_contexts`.
    earlier = job.earlier_context(read) if type_.accept_contexts else None
    if earlier is not None:
        logger.info("Detected values of %s in the context %s", column, earlier)
        yield RebindEncryptedColumnOp(
            column.table.name, column.name, from_context=earlier, **shared
        )
        return
    found = list(job.contexts(read, _SAMPLE))
    if found and not any(found):
        logger.warning(
            "None of the first values of %s opens in the context %s. If the table or column was "
            "renamed, declare it as EncryptedJSON(accept_contexts=[...]) with its earlier "
            "table.column, and run autogenerate again",
            column,
            type_.contexts[0],
        )


def _bound_to_with_types(column: sa.Column[Any]) -> BoundTo:
    """Return the names, with the types if the database cannot tell how values look in Python."""
    type_ = column.type
    assert isinstance(type_, EncryptedJSON)
    bound = [column.table.c[key] for key in type_.bound_to]
    if all(
        type(c.type).__mro__[0].__module__.startswith("sqlalchemy.")
        and tells_its_values(c.type)
        and not isinstance(c.type, sa.Uuid)
        for c in bound
    ):
        return [c.name for c in bound]
    return {c.name: c.type for c in bound}


_LOOKS_SECRET: Final = re.compile(
    r"(?:^|_)(?:api_?key|access_?key|private_?key|secret(?:_?key)?|password|passwd|token"
    r"|credentials?)s?$",
    re.IGNORECASE,
)


def _warn_of_plain_secrets(autogen_context: AutogenContext, upgrade_ops: UpgradeOps) -> Any:
    """Warn of columns that are named like secrets and hold JSON, text or bytes as they are."""
    for column in _included_columns(autogen_context):
        if isinstance(column.type, (sa.JSON, sa.String, _Binary)) and _LOOKS_SECRET.search(
            column.name
        ):
            logger.warning(
                "%s looks like a secret and is stored as it is (%s); "
                "consider EncryptedJSON and op.encrypt_column()",
                column,
                type(column.type).__name__,
            )
    return PriorityDispatchResult.CONTINUE


setup(Plugin(PLUGIN_NAME))
Plugin(LINT_PLUGIN_NAME).add_autogenerate_comparator(
    _warn_of_plain_secrets, "autogenerate", "lucent_lint", priority=DispatchPriority.LAST
)
