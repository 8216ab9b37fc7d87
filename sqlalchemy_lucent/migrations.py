"""
Alembic's side: operations, their renderers, and rendering of this package's types.

In a migration environment's ``env.py``::

    import sqlalchemy_lucent.migrations as lucent_migrations

    context.configure(..., render_item=lucent_migrations.render_item)

The import registers the operations with Alembic, in the way that Alembic documents for its users;
nothing is patched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import renderers
from alembic.operations import MigrateOperation, Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, MetaData, Table, inspect, literal, select

from .exceptions import RotationError
from .models import UTCDateTime
from .rotation import DEFAULT_BATCH_SIZE, RotationProgress, rotate
from .types import EncryptedJSON

_logger = logging.getLogger("alembic.runtime.migration.lucent")

# -- Operations ------------------------------------------------------------------------------------


@Operations.register_operation("rotate_encrypted_column")
class RotateEncryptedColumnOp(MigrateOperation):
    """Re-encrypt a column under the primary key."""

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        schema: str | None = None,
        context: str | None = None,
        accept_contexts: Sequence[str] = (),
        bound_to: Sequence[str] = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.schema = schema
        self.context = context
        self.accept_contexts = tuple(accept_contexts)
        self.bound_to = tuple(bound_to)
        self.batch_size = batch_size

    @classmethod
    def rotate_encrypted_column(
        cls, operations: Operations, table_name: str, column_name: str, **options: Any
    ) -> None:
        """
        Re-encrypt a column under the keyring's primary key, in committed batches.

        ::

            def upgrade() -> None:
                op.rotate_encrypted_column("users", "credentials")

        The work is committed batch by batch, outside the migration's transaction, so keep schema
        changes in revisions of their own. A migration that was killed goes on where it was when
        it is run again; its revision is stamped only when a count finds nothing left to do.

        :param table_name: the table.
        :param column_name: its :class:`EncryptedJSON` column.
        :param schema: the table's schema.
        :param context: the column's context, if it is not ``table.column``.
        :param accept_contexts: earlier contexts whose values still open.
        :param bound_to: the columns that a row-bound value is bound to, in order.
        :param batch_size: rows per transaction.
        :raises RotationError: the table, the column or a primary key is missing, the migration runs
            offline or inside somebody else's transaction, or values are left that do not open.
        :raises ConfigurationError: there is no keyring.
        """
        operations.invoke(cls(table_name, column_name, **options))

    def reverse(self) -> RotateEncryptedColumnOp:
        """Return the same operation: a rotation goes to the primary, whichever that is then."""
        return self

    def to_diff_tuple(self) -> tuple[str, str | None, str, str]:
        """Return what ``alembic check`` shows."""
        return ("rotate_encrypted_column", self.schema, self.table_name, self.column_name)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from their defaults."""
        named = {
            "schema": self.schema,
            "context": self.context,
            "accept_contexts": self.accept_contexts,
            "bound_to": self.bound_to,
            "batch_size": self.batch_size if self.batch_size != DEFAULT_BATCH_SIZE else None,
        }
        return {name: value for name, value in named.items() if value}


# -- Implementations -------------------------------------------------------------------------------


@Operations.implementation_for(RotateEncryptedColumnOp)
def _rotate_encrypted_column(operations: Operations, operation: RotateEncryptedColumnOp) -> None:
    context = operations.migration_context
    name = f"{operation.table_name}.{operation.column_name}"
    _refuse_where_batches_cannot_commit(context, f"rotate_encrypted_column of {name}")
    with context.autocommit_block():
        assert context.connection is not None
        column = _reflect(context.connection, operation).c[operation.column_name]
        if _is_empty(context.connection, column):
            _logger.info("%s holds no value; nothing to re-encrypt", name)
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
            f"{report.key_version!r}, {len(report.failed)} of them because they do not open (each "
            "was logged by its primary key). The others are re-encrypted; the revision is not "
            "stamped, so run it again when these rows are dealt with"
        )
    _logger.info(
        "re-encrypted %d values of %s under key version %s",
        report.rotated,
        name,
        report.key_version,
    )


def _is_empty(connection: Connection, column: Column[Any]) -> bool:
    """Say whether there is nothing that a key could be needed for, as in a database made anew."""
    return (
        connection.execute(select(literal(1)).where(column.is_not(None)).limit(1)).first() is None
    )


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


def _reflect(connection: Connection, operation: RotateEncryptedColumnOp) -> Table:
    """Return the table as the database has it, with the column's type as the migration says."""
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
    return Table(
        operation.table_name,
        MetaData(),
        *(Column(name, types[name], primary_key=name in keys) for name in names),
        schema=operation.schema,
    )


# -- Render ----------------------------------------------------------------------------------------


@renderers.dispatch_for(RotateEncryptedColumnOp)
def _render_rotate(autogen_context: AutogenContext, operation: RotateEncryptedColumnOp) -> str:
    arguments = [repr(operation.table_name), repr(operation.column_name)]
    arguments += [f"{name}={value!r}" for name, value in operation.options().items()]
    return f"op.rotate_encrypted_column({', '.join(arguments)})"


def render_item(type_: str, item: object, autogen_context: AutogenContext) -> str | Literal[False]:
    """
    Render this package's column types with the import that they need.

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
