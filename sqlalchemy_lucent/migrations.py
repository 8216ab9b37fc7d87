"""Alembic's side: operations, renderers, and what autogenerate looks at.

In a migration environment's ``env.py``::

    import sqlalchemy_lucent.migrations as lucent_migrations

    context.configure(
        ...,
        render_item=lucent_migrations.render_item,
        autogenerate_plugins=["alembic.autogenerate.*", "sqlalchemy_lucent.*"],
        transaction_per_migration=True,
    )

The import registers the operations with Alembic (and, from Alembic 1.18 on, the comparators as a
plugin that is used only where ``autogenerate_plugins`` names it), in the ways that Alembic
documents for its users; nothing is patched. Each operation is a method of ``op`` and, for type
checkers, a function of this module.

Operations on data commit batch by batch on Alembic's own connection, so keep them in revisions of
their own, apart from changes of the schema, and configure ``transaction_per_migration=True``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import alembic.op
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import renderers
from alembic.operations import AbstractOperations, BatchOperations, MigrateOperation, Operations
from alembic.operations.ops import UpgradeOps
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, MetaData, Table, func, inspect, literal, select
from sqlalchemy import table as table_clause

from .exceptions import RotationError
from .models import UTCDateTime, secrets_table
from .rotation import DEFAULT_BATCH_SIZE, RotationProgress, needs_rotation, rotate
from .types import EncryptedJSON

_logger = logging.getLogger("alembic.runtime.migration.lucent")

# -- Operations ------------------------------------------------------------------------------------


def create_lucent_secrets(
    table_name: str = "lucent_secrets",
    *,
    schema: str | None = None,
    operations: AbstractOperations | None = None,
) -> None:
    """Create the table of scoped secrets, as ``op.create_lucent_secrets()``.

    ::

        def upgrade() -> None:
            op.create_lucent_secrets()

    Pass `table_name` for a model of your own made with :class:`LucentSecretMixin`.
    """
    _invoke(CreateLucentSecretsOp(table_name, schema=schema), operations)


def drop_lucent_secrets(
    table_name: str = "lucent_secrets",
    *,
    schema: str | None = None,
    force: bool = False,
    operations: AbstractOperations | None = None,
) -> None:
    """Drop the table of scoped secrets, as ``op.drop_lucent_secrets()``.

    ::

        def downgrade() -> None:
            op.drop_lucent_secrets()

    :param force: drop it even if it holds secrets.
    :raises RotationError: it holds secrets, or nothing can tell (offline), and `force` is not set.
    """
    _invoke(DropLucentSecretsOp(table_name, schema=schema, force=force), operations)


def rotate_encrypted_column(
    table_name: str,
    column_name: str,
    *,
    schema: str | None = None,
    context: str | None = None,
    accept_contexts: Iterable[str] = (),
    bound_to: Iterable[str] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
    assert_only: bool = False,
    operations: AbstractOperations | None = None,
) -> None:
    """Re-encrypt a column under the keyring's primary key, as ``op.rotate_encrypted_column()``.

    ::

        def upgrade() -> None:
            op.rotate_encrypted_column("users", "credentials")

    A migration that was killed goes on where it was when it is run again; its revision is stamped
    only when a count finds nothing left to do. A column without values needs no key.

    :param table_name: the table.
    :param column_name: its :class:`EncryptedJSON` column.
    :param schema: the table's schema.
    :param context: the column's context, if it is not ``table.column``.
    :param accept_contexts: earlier contexts whose values still open.
    :param bound_to: the columns that a row-bound value is bound to, in order.
    :param batch_size: rows per transaction.
    :param assert_only: re-encrypt nothing; fail while there is something to re-encrypt. For very
        large tables, which are better rotated by :func:`sqlalchemy_lucent.rotate` beforehand.
    :raises RotationError: the table, the column or its primary key is missing, the migration runs
        offline or inside somebody else's transaction, or values are left that do not open.
    :raises ConfigurationError: there is no keyring.
    """
    operation = RotateEncryptedColumnOp(
        table_name,
        column_name,
        schema=schema,
        context=context,
        accept_contexts=accept_contexts,
        bound_to=bound_to,
        batch_size=batch_size,
        assert_only=assert_only,
    )
    _invoke(operation, operations)


def _invoke(operation: MigrateOperation, operations: AbstractOperations | None) -> None:
    # Without `operations`, the migration that is running: what the names in `alembic.op` go to.
    invoke = alembic.op.invoke if operations is None else operations.invoke
    invoke(operation)


@Operations.register_operation("create_lucent_secrets")
class CreateLucentSecretsOp(MigrateOperation):
    """Create the table of scoped secrets."""

    def __init__(self, table_name: str = "lucent_secrets", *, schema: str | None = None) -> None:
        self.table_name = table_name
        self.schema = schema

    @classmethod
    def create_lucent_secrets(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`create_lucent_secrets`."""
        create_lucent_secrets(*args, **kw, operations=operations)

    def reverse(self) -> DropLucentSecretsOp:
        """Return the operation that drops the table if it is empty."""
        return DropLucentSecretsOp(self.table_name, schema=self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return ("create_lucent_secrets", self.schema, self.table_name)


@Operations.register_operation("drop_lucent_secrets")
class DropLucentSecretsOp(MigrateOperation):
    """Drop the table of scoped secrets, unless it holds any."""

    def __init__(
        self,
        table_name: str = "lucent_secrets",
        *,
        schema: str | None = None,
        force: bool = False,
    ) -> None:
        self.table_name = table_name
        self.schema = schema
        self.force = force

    @classmethod
    def drop_lucent_secrets(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`drop_lucent_secrets`."""
        drop_lucent_secrets(*args, **kw, operations=operations)

    def reverse(self) -> CreateLucentSecretsOp:
        """Return the operation that creates the table."""
        return CreateLucentSecretsOp(self.table_name, schema=self.schema)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return ("drop_lucent_secrets", self.schema, self.table_name)


@Operations.register_operation("rotate_encrypted_column")
@BatchOperations.register_operation("rotate_encrypted_column", "batch_rotate_encrypted_column")
class RotateEncryptedColumnOp(MigrateOperation):
    """Re-encrypt a column under the primary key."""

    DEFAULTS: ClassVar[dict[str, object]] = {
        "schema": None,
        "context": None,
        "accept_contexts": (),
        "bound_to": (),
        "batch_size": DEFAULT_BATCH_SIZE,
        "assert_only": False,
    }

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
        context: str | None = None,
        accept_contexts: Iterable[str] = (),
        bound_to: Iterable[str] = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
        assert_only: bool = False,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.schema = schema
        self.context = context
        self.accept_contexts = tuple(accept_contexts)
        self.bound_to = tuple(bound_to)
        self.batch_size = batch_size
        self.assert_only = assert_only

    @classmethod
    def rotate_encrypted_column(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`rotate_encrypted_column`."""
        rotate_encrypted_column(*args, **kw, operations=operations)

    @classmethod
    def batch_rotate_encrypted_column(
        cls, operations: BatchOperations, column_name: str, **kw: Any
    ) -> None:
        """See :func:`rotate_encrypted_column`; the table and schema are those of the batch."""
        batch = operations.impl
        rotate_encrypted_column(
            batch.table_name, column_name, schema=batch.schema, **kw, operations=operations
        )

    @property
    def full_name(self) -> str:
        """The column's name with its table and schema."""
        return ".".join(filter(None, (self.schema, self.table_name, self.column_name)))

    def reverse(self) -> RotateEncryptedColumnOp:
        """Return the same operation: a rotation goes to the primary, whichever that is then."""
        return self

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return ("rotate_encrypted_column", self.schema, self.table_name, self.column_name)

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments that are not at their defaults."""
        return {
            name: getattr(self, name)
            for name, default in self.DEFAULTS.items()
            if getattr(self, name) != default
        }


# -- Implementations -------------------------------------------------------------------------------


@Operations.implementation_for(CreateLucentSecretsOp)
def _create_lucent_secrets(operations: Operations, operation: CreateLucentSecretsOp) -> None:
    table = secrets_table(MetaData(), operation.table_name, schema=operation.schema)
    operations.impl.create_table(table)


@Operations.implementation_for(DropLucentSecretsOp)
def _drop_lucent_secrets(operations: Operations, operation: DropLucentSecretsOp) -> None:
    name = operation.table_name
    if not operation.force:
        if operations.migration_context.as_sql:
            raise RotationError(
                f"offline, nothing can tell whether {name} holds secrets; "
                "to drop it whatever it holds, pass force=True"
            )
        counted = select(func.count()).select_from(table_clause(name, schema=operation.schema))
        count = operations.get_bind().scalar(counted)
        if count:
            raise RotationError(
                f"{name} holds {count} secrets, which nothing could bring back; "
                "to drop them all the same, pass force=True"
            )
    operations.impl.drop_table(secrets_table(MetaData(), name, schema=operation.schema))


@Operations.implementation_for(RotateEncryptedColumnOp)
def _rotate_encrypted_column(operations: Operations, operation: RotateEncryptedColumnOp) -> None:
    context = operations.migration_context
    name = operation.full_name
    _refuse_where_batches_cannot_commit(context, f"rotate_encrypted_column of {name}")
    with context.autocommit_block():
        assert context.connection is not None
        column = _reflect(context.connection, operation)
        if _is_empty(context.connection, column):
            _logger.info("%s holds no value; nothing to re-encrypt", name)
            return
        if operation.assert_only:
            if needs_rotation(context.connection, column):
                raise RotationError(
                    f"{name} holds values that are not under the primary key; this migration only "
                    "checks. Re-encrypt them with sqlalchemy_lucent.rotate(), then run it again"
                )
            return
        report = rotate(
            context.connection, column, batch_size=operation.batch_size, on_progress=_log
        )
    for failed in report.failed:
        _logger.error(
            "%s of the row with primary key %r does not open: %s",
            name,
            failed.primary_key,
            failed.error,
        )
    if not report.ok:
        raise RotationError(
            f"{report.remaining} values of {name} are not under key version "
            f"{report.key_version!r}, because they do not open (they were logged by primary key) "
            "or because a process still seals under another key. The others are re-encrypted; the "
            "revision is not stamped, so run it again when these rows are dealt with"
        )
    _logger.info(
        "re-encrypted %d values of %s under key version %s",
        report.rotated,
        name,
        report.key_version,
    )


def _is_empty(connection: Connection, column: Column[Any]) -> bool:
    """Say whether there is nothing that a key could be needed for, as in a database made anew."""
    statement = select(literal(1)).where(column.is_not(None)).limit(1)
    return connection.execute(statement).first() is None


def _log(progress: RotationProgress) -> None:
    _logger.info("re-encrypted %d values of %s so far", progress.rotated, progress.table)


def _refuse_where_batches_cannot_commit(context: MigrationContext, what: str) -> None:
    if context.as_sql:
        raise RotationError(
            f"{what} cannot be written as SQL (--sql): the values are opened and sealed by this "
            "process, with keys that the database never sees. Run the migration online"
        )
    if context._in_external_transaction:
        raise RotationError(
            f"{what} commits batch by batch, and this migration runs in a transaction that was "
            "begun outside of Alembic (before context.configure(), or on a shared connection). "
            "Give Alembic a connection that is in no transaction"
        )


def _reflect(connection: Connection, operation: RotateEncryptedColumnOp) -> Column[Any]:
    """Return the column, in its table as the database has it, with the type of the migration."""
    inspector = inspect(connection)
    full_name = ".".join(filter(None, (operation.schema, operation.table_name)))
    if not inspector.has_table(operation.table_name, schema=operation.schema):
        raise RotationError(f"there is no table {full_name} in this database")
    types = {
        column["name"]: column["type"]
        for column in inspector.get_columns(operation.table_name, schema=operation.schema)
    }
    missing = {operation.column_name, *operation.bound_to} - types.keys()
    if missing:
        raise RotationError(f"table {full_name} has no column {', '.join(sorted(missing))}")
    key = inspector.get_pk_constraint(operation.table_name, schema=operation.schema)
    keys = key["constrained_columns"]
    types[operation.column_name] = EncryptedJSON(
        context=operation.context,
        accept_contexts=operation.accept_contexts,
        bound_to=operation.bound_to,
    )
    names = dict.fromkeys([*keys, *operation.bound_to, operation.column_name])
    table = Table(
        operation.table_name,
        MetaData(),
        *(Column(name, types[name], primary_key=name in keys) for name in names),
        schema=operation.schema,
    )
    return table.c[operation.column_name]


# -- Render ----------------------------------------------------------------------------------------


@renderers.dispatch_for(CreateLucentSecretsOp)
def _render_create(autogen_context: AutogenContext, operation: CreateLucentSecretsOp) -> str:
    return f"op.create_lucent_secrets({_rendered_name(operation)})"


@renderers.dispatch_for(DropLucentSecretsOp)
def _render_drop(autogen_context: AutogenContext, operation: DropLucentSecretsOp) -> str:
    return f"op.drop_lucent_secrets({_rendered_name(operation)})"


def _rendered_name(operation: CreateLucentSecretsOp | DropLucentSecretsOp) -> str:
    arguments = [] if operation.table_name == "lucent_secrets" else [repr(operation.table_name)]
    if operation.schema is not None:
        arguments.append(f"schema={operation.schema!r}")
    return ", ".join(arguments)


@renderers.dispatch_for(RotateEncryptedColumnOp)
def _render_rotate(autogen_context: AutogenContext, operation: RotateEncryptedColumnOp) -> str:
    arguments = [repr(operation.table_name), repr(operation.column_name)]
    arguments += [f"{name}={value!r}" for name, value in operation.arguments().items()]
    return f"op.rotate_encrypted_column({', '.join(arguments)})"


def render_item(type_: str, item: object, autogen_context: AutogenContext) -> str | Literal[False]:
    """Render this package's column types with the import that they need.

    Pass it to ``context.configure(render_item=…)``; a hook of your own calls it for what it does
    not render itself.
    """
    if type_ == "type" and isinstance(item, EncryptedJSON):
        autogen_context.imports.add("from sqlalchemy_lucent import EncryptedJSON")
        return repr(item)
    if type_ == "type" and isinstance(item, UTCDateTime):
        autogen_context.imports.add("from sqlalchemy_lucent.models import UTCDateTime")
        return "UTCDateTime()"
    return False


# -- Autogenerate ----------------------------------------------------------------------------------

PLUGIN_NAME = "sqlalchemy_lucent.autogenerate"
"""The name to select in ``autogenerate_plugins``, or to exclude there with ``~``."""


def setup(plugin: Any) -> None:
    """Add the comparators to an Alembic plugin (Alembic 1.18 and later)."""
    plugin.add_autogenerate_comparator(
        _compare_key_versions, "autogenerate", "lucent", priority=DispatchPriority.LAST
    )


def _compare_key_versions(autogen_context: AutogenContext, upgrade_ops: UpgradeOps) -> Any:
    """Add a rotation for each column with values that are not under the primary key.

    Only where nothing else is to be done: a rotation shares its revision with no change of schema,
    and the tables may not be there yet.
    """
    connection = autogen_context.connection
    columns = [
        column
        for table in autogen_context.sorted_tables
        for column in table.columns
        if isinstance(column.type, EncryptedJSON)
    ]
    assert connection is not None
    if not upgrade_ops.is_empty():
        if columns:
            _logger.info("the schema differs; run autogenerate again afterwards for rotations")
        return PriorityDispatchResult.CONTINUE
    for column in columns:
        type_ = column.type
        assert isinstance(type_, EncryptedJSON)
        if not _is_empty(connection, column) and needs_rotation(connection, column):
            _logger.info("Detected values of %s that are not under the primary key", column)
            upgrade_ops.ops.append(
                RotateEncryptedColumnOp(
                    column.table.name,
                    column.name,
                    schema=column.table.schema,
                    context=type_.explicit_context,
                    accept_contexts=type_.accept_contexts,
                    bound_to=type_.bound_to,
                )
            )
    return PriorityDispatchResult.CONTINUE


try:
    from alembic.runtime.plugins import Plugin
    from alembic.util import DispatchPriority, PriorityDispatchResult
except ImportError:  # Alembic before 1.18 has no plugins, and so no comparators of others
    pass
else:
    Plugin.setup_plugin_from_module(sys.modules[__name__], PLUGIN_NAME)
