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
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Final, Literal

import alembic.op
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import _repr_type, renderers
from alembic.operations import AbstractOperations, BatchOperations, MigrateOperation, Operations
from alembic.operations.ops import (
    AddColumnOp,
    AlterColumnOp,
    DropColumnOp,
    ModifyTableOps,
    UpgradeOps,
)
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    func,
    inspect,
    literal,
    select,
)
from sqlalchemy import table as table_clause
from sqlalchemy.types import TypeEngine, _Binary, to_instance

from . import _sql
from ._conversion import Plan, convert_column
from .exceptions import RotationError
from .keyring import default_keyring
from .models import UTCDateTime, secrets_table
from .rotation import (
    DEFAULT_BATCH_SIZE,
    RotationProgress,
    RotationReport,
    needs_rotation,
    rotate,
)
from .rotation.convert import Reader, RebindWorker, Writer
from .rotation.engine import run_workers
from .types import EncryptedJSON

_logger = logging.getLogger("alembic.runtime.migration.lucent")

BoundTo = Iterable[str] | Mapping[str, TypeEngine[Any]]
"""The columns that a row-bound value is bound to, in order; or the type of each by its name."""

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
    bound_to: BoundTo = (),
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
    :param bound_to: the columns that a row-bound value is bound to, in order; or a dict that has
        the type of each, for columns whose type the database does not tell (``sa.Uuid()``).
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


def encrypt_column(
    table_name: str,
    column_name: str,
    *,
    existing_type: TypeEngine[Any] | type[TypeEngine[Any]],
    schema: str | None = None,
    context: str | None = None,
    bound_to: BoundTo = (),
    reader: Reader | None = None,
    writer: Writer | None = None,
    through: str | None = None,
    swap: bool = True,
    drop: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    operations: AbstractOperations | None = None,
) -> None:
    """Turn a plaintext column into an encrypted one, as ``op.encrypt_column()``.

    ::

        def upgrade() -> None:
            op.encrypt_column("users", "credentials", existing_type=sa.JSON())


        def downgrade() -> None:
            op.decrypt_column("users", "credentials", existing_type=sa.JSON())

    Adds a second column, fills it in committed batches, and lets it take the first one's name and
    ``NOT NULL`` under a lock of the table, in which every row is compared once more. Killed at any
    instant, it goes on when it is run again; a column that is encrypted already is left alone. A
    value that cannot be read is logged by primary key, and ends it before anything is swapped.

    A document in a text column is sealed to the letter; other values as their type reads them.

    :param table_name: the table.
    :param column_name: its plaintext column.
    :param existing_type: what the column is: JSON, text that holds JSON, or any other type, such
        as another library's encrypted one, whose Python values are sealed.
    :param schema: the table's schema.
    :param context: the context of the column from now on, if it is not ``table.column``.
    :param bound_to: the columns that a row-bound value is bound to, in order; or a dict that has
        the type of each, for columns whose type the database does not tell (``sa.Uuid()``).
    :param reader: turns a value, as `existing_type` gives it, into the JSON value to seal:
        ``str`` for text that is not JSON.
    :param writer: what the reverse needs to undo `reader`.
    :param through: name of the second column; ``<column>__sealed`` if left out.
    :param swap: ``False`` ends when the second column is filled and agrees with the first one.
    :param drop: ``False`` keeps the plaintext, nullable, in the column `through`. A later call
        drops it.
    :param batch_size: rows per transaction.
    :raises RotationError: something is missing or in the way, the migration runs offline or inside
        somebody else's transaction, or there are values that cannot be read.
    :raises ConfigurationError: there is no keyring, and there are values.
    """
    operation = EncryptColumnOp(
        table_name,
        column_name,
        existing_type=existing_type,
        schema=schema,
        context=context,
        bound_to=bound_to,
        reader=reader,
        writer=writer,
        through=through,
        swap=swap,
        drop=drop,
        batch_size=batch_size,
    )
    _invoke(operation, operations)


def decrypt_column(
    table_name: str,
    column_name: str,
    *,
    existing_type: TypeEngine[Any] | type[TypeEngine[Any]],
    schema: str | None = None,
    context: str | None = None,
    bound_to: BoundTo = (),
    reader: Reader | None = None,
    writer: Writer | None = None,
    through: str | None = None,
    swap: bool = True,
    drop: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    operations: AbstractOperations | None = None,
) -> None:
    """Turn an encrypted column into a plaintext one, as ``op.decrypt_column()``.

    ::

        def downgrade() -> None:
            op.decrypt_column("users", "credentials", existing_type=sa.JSON())

    The way and the parameters are those of :func:`encrypt_column`, in the other direction. What
    :func:`encrypt_column` left half-way is cleared away.

    :param existing_type: what the column is to be: what it was before it was encrypted.
    :param writer: turns a JSON value into what `existing_type` takes.
    :param reader: undoes `writer`: what was written is read again and compared before the sealed
        values are dropped.
    :raises RotationError: as for :func:`encrypt_column`.
    :raises ConfigurationError: there is no keyring, and there are values.
    """
    operation = DecryptColumnOp(
        table_name,
        column_name,
        existing_type=existing_type,
        schema=schema,
        context=context,
        bound_to=bound_to,
        reader=reader,
        writer=writer,
        through=through,
        swap=swap,
        drop=drop,
        batch_size=batch_size,
    )
    _invoke(operation, operations)


def rebind_encrypted_column(
    table_name: str,
    column_name: str,
    *,
    from_context: str,
    context: str | None = None,
    schema: str | None = None,
    bound_to: BoundTo = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
    operations: AbstractOperations | None = None,
) -> None:
    """Seal values anew after a rename, as ``op.rebind_encrypted_column()``.

    ::

        def upgrade() -> None:
            op.rebind_encrypted_column("users", "credentials", from_context="users.creds")

    Values are bound to their column's context, ``table.column``. What was sealed under the old
    name opens through ``EncryptedJSON(accept_contexts=["users.creds"])`` until this has run.

    :param table_name: the table, as it is called now.
    :param column_name: its :class:`EncryptedJSON` column, as it is called now.
    :param from_context: the context that values were sealed in: ``table.column`` of the old names.
    :param context: the context to seal them in, if it is not ``table.column``.
    :param schema: the table's schema.
    :param bound_to: as for :func:`encrypt_column`.
    :param batch_size: rows per transaction.
    :raises RotationError: as for :func:`rotate_encrypted_column`.
    :raises ConfigurationError: there is no keyring, and there are values.
    """
    operation = RebindEncryptedColumnOp(
        table_name,
        column_name,
        from_context=from_context,
        context=context,
        schema=schema,
        bound_to=bound_to,
        batch_size=batch_size,
    )
    _invoke(operation, operations)


def _invoke(operation: MigrateOperation, operations: AbstractOperations | None) -> None:
    # Without `operations`, the migration that is running: what the names in `alembic.op` go to.
    invoke = alembic.op.invoke if operations is None else operations.invoke
    invoke(operation)


def _in_batch(
    function: Callable[..., None], operations: BatchOperations, column_name: str, kw: dict[str, Any]
) -> None:
    """Call one of the functions above for the table and schema of a batch."""
    batch = operations.impl
    function(batch.table_name, column_name, schema=batch.schema, **kw, operations=operations)


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


def _bound_to(bound_to: BoundTo) -> tuple[str, ...] | dict[str, TypeEngine[Any]]:
    return dict(bound_to) if isinstance(bound_to, Mapping) else tuple(bound_to)


def _bound_types(
    bound_to: tuple[str, ...] | dict[str, TypeEngine[Any]],
) -> dict[str, TypeEngine[Any] | None]:
    return dict(bound_to) if isinstance(bound_to, dict) else dict.fromkeys(bound_to)


class _ColumnOp(MigrateOperation):
    """An operation on the values of one column."""

    DEFAULTS: ClassVar[dict[str, object]]

    table_name: str
    column_name: str
    schema: str | None
    context: str | None
    bound_to: tuple[str, ...] | dict[str, TypeEngine[Any]]
    batch_size: int

    @property
    def full_name(self) -> str:
        """The column's name with its table and schema."""
        return ".".join(filter(None, (self.schema, self.table_name, self.column_name)))

    @property
    def own_context(self) -> str:
        """The context of the column."""
        return self.context or f"{self.table_name}.{self.column_name}"

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments that are not at their defaults."""
        return {
            name: getattr(self, name)
            for name, default in self.DEFAULTS.items()
            if getattr(self, name) != default
        }


@Operations.register_operation("rotate_encrypted_column")
@BatchOperations.register_operation("rotate_encrypted_column", "batch_rotate_encrypted_column")
class RotateEncryptedColumnOp(_ColumnOp):
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
        bound_to: BoundTo = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
        assert_only: bool = False,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.schema = schema
        self.context = context
        self.accept_contexts = tuple(accept_contexts)
        self.bound_to = _bound_to(bound_to)
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
        _in_batch(rotate_encrypted_column, operations, column_name, kw)

    def reverse(self) -> RotateEncryptedColumnOp:
        """Return the same operation: a rotation goes to the primary, whichever that is then."""
        return self

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return ("rotate_encrypted_column", self.schema, self.table_name, self.column_name)


class _ConvertColumnOp(_ColumnOp):
    """What encryption and decryption of a column share."""

    to_sealed: ClassVar[bool]

    DEFAULTS: ClassVar[dict[str, object]] = {
        "schema": None,
        "context": None,
        "bound_to": (),
        "through": None,
        "swap": True,
        "drop": True,
        "batch_size": DEFAULT_BATCH_SIZE,
    }

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        existing_type: TypeEngine[Any] | type[TypeEngine[Any]],
        schema: str | None = None,
        context: str | None = None,
        bound_to: BoundTo = (),
        reader: Reader | None = None,
        writer: Writer | None = None,
        through: str | None = None,
        swap: bool = True,
        drop: bool = True,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.existing_type: TypeEngine[Any] = to_instance(existing_type)
        self.schema = schema
        self.context = context
        self.bound_to = _bound_to(bound_to)
        self.reader = reader
        self.writer = writer
        self.through = through
        self.swap = swap
        self.drop = drop
        self.batch_size = batch_size

    def plan(self) -> Plan:
        """Return what is to be done."""
        return Plan(
            to_sealed=self.to_sealed,
            table_name=self.table_name,
            column_name=self.column_name,
            schema=self.schema,
            existing_type=self.existing_type,
            sealed_type=EncryptedJSON(context=self.own_context, bound_to=tuple(self.bound_to)),
            bound_types=_bound_types(self.bound_to),
            reader=self.reader,
            writer=self.writer,
            through=self.through or f"{self.column_name}__sealed",
            swap=self.swap,
            drop=self.drop,
            batch_size=self.batch_size,
        )

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        name = "encrypt_column" if self.to_sealed else "decrypt_column"
        return (name, self.schema, self.table_name, self.column_name, self.existing_type)

    def options_of_reverse(self) -> dict[str, Any]:
        """Return the arguments of the reverse: whatever this left, it ends where this began."""
        names = ("existing_type", "schema", "context", "bound_to", "reader", "writer", "through")
        return {name: getattr(self, name) for name in (*names, "batch_size")}


@Operations.register_operation("encrypt_column")
@BatchOperations.register_operation("encrypt_column", "batch_encrypt_column")
class EncryptColumnOp(_ConvertColumnOp):
    """Turn a plaintext column into an encrypted one."""

    to_sealed = True

    @classmethod
    def encrypt_column(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`encrypt_column`."""
        encrypt_column(*args, **kw, operations=operations)

    @classmethod
    def batch_encrypt_column(cls, operations: BatchOperations, column_name: str, **kw: Any) -> None:
        """See :func:`encrypt_column`; the table and schema are those of the batch."""
        _in_batch(encrypt_column, operations, column_name, kw)

    def reverse(self) -> DecryptColumnOp:
        """Return the operation that brings the plaintext column back."""
        return DecryptColumnOp(self.table_name, self.column_name, **self.options_of_reverse())


@Operations.register_operation("decrypt_column")
@BatchOperations.register_operation("decrypt_column", "batch_decrypt_column")
class DecryptColumnOp(_ConvertColumnOp):
    """Turn an encrypted column into a plaintext one."""

    to_sealed = False

    @classmethod
    def decrypt_column(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`decrypt_column`."""
        decrypt_column(*args, **kw, operations=operations)

    @classmethod
    def batch_decrypt_column(cls, operations: BatchOperations, column_name: str, **kw: Any) -> None:
        """See :func:`decrypt_column`; the table and schema are those of the batch."""
        _in_batch(decrypt_column, operations, column_name, kw)

    def reverse(self) -> EncryptColumnOp:
        """Return the operation that encrypts the column again."""
        return EncryptColumnOp(self.table_name, self.column_name, **self.options_of_reverse())


@Operations.register_operation("rebind_encrypted_column")
@BatchOperations.register_operation("rebind_encrypted_column", "batch_rebind_encrypted_column")
class RebindEncryptedColumnOp(_ColumnOp):
    """Seal values of an earlier context under another."""

    DEFAULTS: ClassVar[dict[str, object]] = {
        "context": None,
        "schema": None,
        "bound_to": (),
        "batch_size": DEFAULT_BATCH_SIZE,
    }

    def __init__(
        self,
        table_name: str,
        column_name: str,
        *,
        from_context: str,
        context: str | None = None,
        schema: str | None = None,
        bound_to: BoundTo = (),
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.from_context = from_context
        self.context = context
        self.schema = schema
        self.bound_to = _bound_to(bound_to)
        self.batch_size = batch_size

    @classmethod
    def rebind_encrypted_column(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`rebind_encrypted_column`."""
        rebind_encrypted_column(*args, **kw, operations=operations)

    @classmethod
    def batch_rebind_encrypted_column(
        cls, operations: BatchOperations, column_name: str, **kw: Any
    ) -> None:
        """See :func:`rebind_encrypted_column`; the table and schema are those of the batch."""
        _in_batch(rebind_encrypted_column, operations, column_name, kw)

    def reverse(self) -> RebindEncryptedColumnOp:
        """Return the operation with the contexts exchanged."""
        return RebindEncryptedColumnOp(
            self.table_name,
            self.column_name,
            from_context=self.own_context,
            context=self.from_context,
            schema=self.schema,
            bound_to=self.bound_to,
            batch_size=self.batch_size,
        )

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return (
            "rebind_encrypted_column",
            self.schema,
            self.table_name,
            self.column_name,
            self.from_context,
        )


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
        column = _reflect(context.connection, operation, operation.accept_contexts)
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
    _finish(report, name)
    _logger.info(
        "re-encrypted %d values of %s under key version %s",
        report.rotated,
        name,
        report.key_version,
    )


@Operations.implementation_for(EncryptColumnOp)
def _encrypt_column(operations: Operations, operation: EncryptColumnOp) -> None:
    _convert(operations, operation, f"encrypt_column of {operation.full_name}")


@Operations.implementation_for(DecryptColumnOp)
def _decrypt_column(operations: Operations, operation: DecryptColumnOp) -> None:
    _convert(operations, operation, f"decrypt_column of {operation.full_name}")


def _convert(operations: Operations, operation: _ConvertColumnOp, what: str) -> None:
    context = operations.migration_context
    _refuse_where_batches_cannot_commit(context, what)
    with context.autocommit_block():
        convert_column(operations, operation.plan())


@Operations.implementation_for(RebindEncryptedColumnOp)
def _rebind_encrypted_column(operations: Operations, operation: RebindEncryptedColumnOp) -> None:
    context = operations.migration_context
    name = operation.full_name
    _refuse_where_batches_cannot_commit(context, f"rebind_encrypted_column of {name}")
    with context.autocommit_block():
        connection = context.connection
        assert connection is not None
        column = _reflect(connection, operation, accept_contexts=[operation.from_context])
        if _is_empty(connection, column):
            _logger.info("%s holds no value; nothing to seal anew", name)
            return
        keyring = default_keyring()
        report = run_workers(
            connection,
            [RebindWorker(column.table, column, lambda: keyring, connection.dialect)],
            keyring,
            batch_size=operation.batch_size,
            on_progress=_log,
        )
    _finish(report, name)
    _logger.info(
        "sealed %d values of %s anew in context %s", report.rotated, name, operation.own_context
    )


def _finish(report: RotationReport, name: str) -> None:
    """Log what does not open, and fail while something is left to do."""
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
            f"{report.key_version!r} and in the column's context, because they do not open (they "
            "were logged by primary key) or because a process still seals otherwise. The others "
            "are re-encrypted; the revision is not stamped, so run it again when these rows are "
            "dealt with"
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


def _reflect(
    connection: Connection, operation: _ColumnOp, accept_contexts: Iterable[str]
) -> Column[Any]:
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
    if not keys:
        raise RotationError(
            f"table {full_name} has no primary key; a rotation needs one to go through the rows "
            "in order"
        )
    types.update({n: t for n, t in _bound_types(operation.bound_to).items() if t is not None})
    types[operation.column_name] = EncryptedJSON(
        context=operation.own_context,
        accept_contexts=accept_contexts,
        bound_to=tuple(operation.bound_to),
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
    return _rendered_call("rotate_encrypted_column", autogen_context, operation)


@renderers.dispatch_for(EncryptColumnOp)
def _render_encrypt(autogen_context: AutogenContext, operation: EncryptColumnOp) -> str:
    return _rendered_call("encrypt_column", autogen_context, operation)


@renderers.dispatch_for(DecryptColumnOp)
def _render_decrypt(autogen_context: AutogenContext, operation: DecryptColumnOp) -> str:
    return _rendered_call("decrypt_column", autogen_context, operation)


@renderers.dispatch_for(RebindEncryptedColumnOp)
def _render_rebind(autogen_context: AutogenContext, operation: RebindEncryptedColumnOp) -> str:
    return _rendered_call("rebind_encrypted_column", autogen_context, operation)


def _rendered_call(name: str, autogen_context: AutogenContext, operation: _ColumnOp) -> str:
    """Render a call; a `reader` or `writer` is a function, which has no text: add it by hand."""
    arguments = [repr(operation.table_name), repr(operation.column_name)]
    if isinstance(operation, _ConvertColumnOp):
        rendered = _repr_type(operation.existing_type, autogen_context)
        arguments.append(f"existing_type={rendered}")
    if isinstance(operation, RebindEncryptedColumnOp):
        arguments.append(f"from_context={operation.from_context!r}")
    for argument, value in operation.arguments().items():
        if isinstance(value, dict):
            members = (f"{n!r}: {_repr_type(t, autogen_context)}" for n, t in value.items())
            arguments.append(f"{argument}={{{', '.join(members)}}}")
        else:
            arguments.append(f"{argument}={value!r}")
    return f"op.{name}({', '.join(arguments)})"


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

LINT_PLUGIN_NAME = "lucent_lint"
"""The name that adds warnings about columns that look like secrets and are not encrypted.
``sqlalchemy_lucent.*`` does not select it."""

_SAMPLE: Final = 20
"""Values that are opened to tell which context a column's values are of."""


def setup(plugin: Any) -> None:
    """Add the comparators to an Alembic plugin (Alembic 1.18 and later)."""
    plugin.add_autogenerate_comparator(
        _compare_columns, "autogenerate", "lucent", priority=DispatchPriority.LAST
    )


def _compare_columns(autogen_context: AutogenContext, upgrade_ops: UpgradeOps) -> Any:
    """Put conversions in the place of bare type changes.

    Where the schema is up to date, add what is to be done for values.

    A rotation shares its revision with no change of schema, and the tables may not be there yet.
    """
    connection = autogen_context.connection
    assert connection is not None
    _warn_of_renames(upgrade_ops)
    conversions = list(_take_conversions(connection, upgrade_ops))
    if conversions and not upgrade_ops.is_empty():
        _logger.warning(
            "This revision changes the schema and converts values. It converts first; if it is "
            "killed later on, it may have to be finished by hand. Two revisions are safer"
        )
    # First, so that a run that was killed while it converted can begin at the beginning again.
    upgrade_ops.ops[:0] = conversions
    columns = [
        column
        for table in autogen_context.sorted_tables
        for column in table.columns
        if isinstance(column.type, EncryptedJSON)
    ]
    if not upgrade_ops.is_empty():
        if columns:
            _logger.info("the schema differs; run autogenerate again afterwards for rotations")
        return PriorityDispatchResult.CONTINUE
    for column in columns:
        if not _is_empty(connection, column):
            upgrade_ops.ops.extend(_work_on_values(connection, column))
    return PriorityDispatchResult.CONTINUE


def _warn_of_renames(upgrade_ops: UpgradeOps) -> None:
    """Autogenerate takes a renamed column for one that was added and one that was dropped."""
    for table_ops in upgrade_ops.ops:
        if not isinstance(table_ops, ModifyTableOps):
            continue
        added = [
            operation.column.name
            for operation in table_ops.ops
            if isinstance(operation, AddColumnOp)
            and isinstance(operation.column.type, EncryptedJSON)
        ]
        dropped = [
            operation.column_name
            for operation in table_ops.ops
            if isinstance(operation, DropColumnOp)
            and isinstance(operation.to_column().type, _Binary)
        ]
        for name in added if dropped else ():
            _logger.warning(
                "%s.%s is added and %s is dropped, with its values. If it was renamed, write "
                "op.alter_column(..., new_column_name=%r) instead, and declare the column as "
                "EncryptedJSON(accept_contexts=[%r]) so that its values open",
                table_ops.table_name,
                name,
                " or ".join(dropped),
                name,
                f"{table_ops.table_name}.{dropped[0]}",
            )


def _take_conversions(
    connection: Connection, upgrade_ops: UpgradeOps
) -> Iterator[_ConvertColumnOp]:
    """Take the type changes from or to `EncryptedJSON` out of `upgrade_ops`."""
    for table_ops in list(upgrade_ops.ops):
        if not isinstance(table_ops, ModifyTableOps):
            continue
        for operation in list(table_ops.ops):
            if not isinstance(operation, AlterColumnOp):
                continue
            conversion = _conversion_for(connection, operation)
            if conversion is None:
                continue
            yield conversion
            operation.existing_type, operation.modify_type = operation.modify_type, None
            if not operation.has_changes():
                table_ops.ops.remove(operation)
        if not table_ops.ops:
            upgrade_ops.ops.remove(table_ops)


def _conversion_for(connection: Connection, operation: AlterColumnOp) -> _ConvertColumnOp | None:
    old, new = operation.existing_type, operation.modify_type
    name, schema = operation.column_name, operation.schema
    if old is not None and isinstance(new, EncryptedJSON) and not isinstance(old, _Binary):
        _logger.info("Detected that %s.%s is to be encrypted", operation.table_name, name)
        return EncryptColumnOp(
            operation.table_name,
            name,
            existing_type=old,
            schema=schema,
            context=new.explicit_context,
            bound_to=new.bound_to,
        )
    if isinstance(new, (JSON, String)) and isinstance(old, _Binary):
        owner = table_clause(operation.table_name, Column(name, LargeBinary), schema=schema)
        sealed = select(literal(1)).where(_sql.key_version(owner.c[name]).is_not(None)).limit(1)
        if connection.execute(sealed.select_from(owner)).first() is not None:
            _logger.info("Detected that %s.%s is to be decrypted", operation.table_name, name)
            return DecryptColumnOp(operation.table_name, name, existing_type=new, schema=schema)
    return None


def _work_on_values(connection: Connection, column: Column[Any]) -> Iterator[_ColumnOp]:
    """Give the operations that the values of a column ask for: one at most."""
    type_ = column.type
    assert isinstance(type_, EncryptedJSON)
    table = column.table
    assert isinstance(table, Table)
    bound = _bound_to_with_types(column)
    if needs_rotation(connection, column):
        _logger.info("Detected values of %s that are not under the primary key", column)
        yield RotateEncryptedColumnOp(
            table.name,
            column.name,
            schema=table.schema,
            context=type_.explicit_context,
            accept_contexts=type_.accept_contexts,
            bound_to=bound,
        )
        return
    worker = RebindWorker(table, column, cache(default_keyring), connection.dialect)
    found = worker.contexts_of(connection, _SAMPLE)
    earlier = [context for context in found if context not in (None, type_.contexts[0])]
    if earlier:
        _logger.info("Detected values of %s in the context %s", column, earlier[0])
        assert earlier[0] is not None
        yield RebindEncryptedColumnOp(
            table.name,
            column.name,
            from_context=earlier[0],
            context=type_.explicit_context,
            schema=table.schema,
            bound_to=bound,
        )
    elif found and not any(found):
        _logger.warning(
            "None of the first values of %s opens in the context %s. If the table or column was "
            "renamed, declare it as EncryptedJSON(accept_contexts=[...]) with its earlier "
            "table.column, and run autogenerate again",
            column,
            type_.contexts[0],
        )


def _bound_to_with_types(column: Column[Any]) -> BoundTo:
    """Return the names, with the types if the database cannot tell how values look in Python."""
    type_ = column.type
    assert isinstance(type_, EncryptedJSON)
    bound = [column.table.c[key] for key in type_.bound_to]
    if all(
        type(c.type).__mro__[0].__module__.startswith("sqlalchemy.")
        and isinstance(c.type, (Integer, String))
        for c in bound
    ):
        return [c.name for c in bound]
    return {c.name: c.type for c in bound}


_LOOKS_SECRET: Final = re.compile(
    r"(?:^|_)(?:api_?key|access_?key|private_?key|secret(?:_?key)?|password|passwd|token"
    r"|credentials?)s?$",
    re.IGNORECASE,
)


def _setup_lint(plugin: Any) -> None:
    plugin.add_autogenerate_comparator(
        _warn_of_plain_secrets, "autogenerate", "lucent_lint", priority=DispatchPriority.LAST
    )


def _warn_of_plain_secrets(autogen_context: AutogenContext, upgrade_ops: UpgradeOps) -> Any:
    """Warn of columns that are named like secrets and hold JSON, text or bytes as they are."""
    for table in autogen_context.sorted_tables:
        for column in table.columns:
            if isinstance(column.type, (JSON, String, _Binary)) and _LOOKS_SECRET.search(
                column.name
            ):
                _logger.warning(
                    "%s looks like a secret and is stored as it is (%s); "
                    "consider EncryptedJSON and op.encrypt_column()",
                    column,
                    type(column.type).__name__,
                )
    return PriorityDispatchResult.CONTINUE


try:
    from alembic.runtime.plugins import Plugin
    from alembic.util import DispatchPriority, PriorityDispatchResult
except ImportError:  # Alembic before 1.18 has no plugins, and so no comparators of others
    pass
else:
    Plugin.setup_plugin_from_module(sys.modules[__name__], PLUGIN_NAME)
    _setup_lint(Plugin(LINT_PLUGIN_NAME))
