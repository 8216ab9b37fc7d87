"""Run the operations on the connection of the migration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic.operations import Operations, ops, toimpl
from alembic.operations.batch import BatchOperationsImpl
from alembic.runtime.migration import MigrationContext
from sqlalchemy.schema import conv
from sqlalchemy.types import TypeEngine, to_instance

from .. import _sql
from .._database.faults import Fault, errors_of, fault_of
from .._database.reflection import dotted, has_row, reflect_table, translated
from .._database.relations import is_binary
from .._database.visibility import require_full_visibility
from .._key_tables import key_tables
from .._statements import refuse_server_default
from ..exceptions import ConfigurationError, RotationError
from ..keyring import default_keyring
from ..models import secrets_table, upgrade_tables
from ..rotation import RotationReport, needs_rotation, rotate, run_jobs
from ..rotation.jobs import Rebind
from ..rotation.targets import TargetColumn, TargetTable, resolve_targets
from ..types import EncryptedJSON
from ._checks import SealedCheck, logger, not_encrypted
from ._convert import convert_column, log_failures, log_progress
from .fence import Fence, fence_triggers
from .operations import (
    ColumnOp,
    ConvertColumnOp,
    CreateSealedCheckOp,
    DropSealedCheckOp,
    FenceKeyVersionOp,
    FenceOp,
    LucentOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
    UnfenceKeyVersionOp,
    ValuesOp,
)
from .tables import (
    CreateLucentKeysOp,
    CreateLucentSecretsOp,
    DowngradeLucentSecretsOp,
    DropLucentKeysOp,
    DropLucentSecretsOp,
    UpgradeLucentSecretsOp,
)


@Operations.implementation_for(CreateLucentSecretsOp)
def _create_lucent_secrets(operations: Operations, operation: CreateLucentSecretsOp) -> None:
    table = secrets_table(sa.MetaData(), operation.table_name, schema=operation.schema)
    operations.impl.create_table(table)


@Operations.implementation_for(DropLucentSecretsOp)
def _drop_lucent_secrets(operations: Operations, operation: DropLucentSecretsOp) -> None:
    name = operation.table_name
    if not operation.force:
        _require_empty(operations, operation, name, "secrets, which cannot be restored")
    operations.impl.drop_table(secrets_table(sa.MetaData(), name, schema=operation.schema))


def _require_empty(operations: Operations, operation: LucentOp, name: str, contents: str) -> None:
    """Refuse to drop a table that holds something."""
    if operations.migration_context.as_sql:
        raise RotationError(
            f"offline, nothing can tell whether {name} holds {contents.partition(',')[0]}; "
            "to drop it with any that it holds, pass force=True"
        )
    connection = operations.get_bind()
    schema = translated(connection, operation.schema)
    require_full_visibility(connection, name, schema)
    counted = sa.select(sa.func.count()).select_from(sa.table(name, schema=schema))
    count = connection.scalar(counted)
    if count:
        raise RotationError(
            f"{name} holds {count} {contents}; to drop them all the same, pass force=True"
        )


@Operations.implementation_for(CreateLucentKeysOp)
def _create_lucent_keys(operations: Operations, operation: CreateLucentKeysOp) -> None:
    for table in key_tables(sa.MetaData(), schema=operation.schema):
        operations.impl.create_table(table)


@Operations.implementation_for(DropLucentKeysOp)
def _drop_lucent_keys(operations: Operations, operation: DropLucentKeysOp) -> None:
    tables = key_tables(sa.MetaData(), schema=operation.schema)
    if not operation.force:
        contents = "receipts, which prove what was done to keys"
        _require_empty(operations, operation, "lucent_key_receipts", contents)
    for table in tables:
        operations.impl.drop_table(table)


@Operations.implementation_for(UpgradeLucentSecretsOp)
def _upgrade_lucent_secrets(operations: Operations, operation: UpgradeLucentSecretsOp) -> None:
    for table in upgrade_tables(sa.MetaData(), operation.table_name, schema=operation.schema):
        operations.impl.create_table(table)


@Operations.implementation_for(DowngradeLucentSecretsOp)
def _downgrade_lucent_secrets(operations: Operations, operation: DowngradeLucentSecretsOp) -> None:
    tables = upgrade_tables(sa.MetaData(), operation.table_name, schema=operation.schema)
    if not operation.force:
        contents = "versions of secrets, which cannot be restored"
        _require_empty(operations, operation, tables.versions.name, contents)
    for table in tables:
        operations.impl.drop_table(table)


_Op = TypeVar("_Op", bound=ColumnOp)
_Implementation = Callable[[Operations, _Op], None]


def _in_batches(implementation: _Implementation[_Op]) -> _Implementation[_Op]:
    """Have `implementation` commit as it goes, in the schema of the database.

    Errors of the database or its driver are raised as errors of ours.
    """

    def carry_out(operations: Operations, operation: _Op) -> None:
        context = operations.migration_context
        what = f"{operation.name} of {operation.full_name}"
        _refuse_where_batches_cannot_commit(context, what)
        connection = operations.get_bind()
        errors: tuple[type[Exception], ...] = (Fault, *errors_of(connection.dialect))
        translated_operation = copy(operation)
        translated_operation.schema = translated(connection, operation.schema)
        try:
            with _autocommit_block(context):
                return implementation(operations, translated_operation)
        except errors as error:
            fault = fault_of(error, connection.dialect, lost=connection.invalidated)
            message = (
                f"the database ended {what}: {fault.message}. Committed batches stay, and the "
                f"revision is not stamped. {fault.next_step()}"
            )
        # Not chained: SQLAlchemy's error has the parameters.
        raise RotationError(message)

    return carry_out


@Operations.implementation_for(RotateEncryptedColumnOp)
@_in_batches
def _rotate_encrypted_column(operations: Operations, operation: RotateEncryptedColumnOp) -> None:
    name = operation.full_name
    connection = operations.get_bind()
    column = _reflect(connection, operation, operation.accept_contexts)
    if is_empty(connection, column):
        logger.info("%s holds no value; nothing to re-encrypt", name)
        return
    if operation.assert_only:
        if needs_rotation(connection, column):
            raise RotationError(
                f"{name} holds values that are not under the primary key; this migration only "
                "checks. Re-encrypt them with sqlalchemy_lucent.rotate(), then run it again"
            )
        return
    on_progress = partial(log_progress, "re-encrypted", name)
    report = rotate(connection, column, batch_size=operation.batch_size, on_progress=on_progress)
    _finish(report, name, connection, column)
    logger.info(
        "re-encrypted %d values of %s under key version %s",
        report.rotated,
        name,
        report.key_version,
    )


@Operations.implementation_for(RebindEncryptedColumnOp)
@_in_batches
def _rebind_encrypted_column(operations: Operations, operation: RebindEncryptedColumnOp) -> None:
    name = operation.full_name
    connection = operations.get_bind()
    column = _reflect(connection, operation, accept_contexts=[operation.from_context])
    if is_empty(connection, column):
        logger.info("%s holds no value; nothing to re-seal", name)
        return
    keyring = default_keyring()
    (target,) = resolve_targets(column, connection)
    report = run_jobs(
        connection,
        [Rebind(target, keyring, connection.dialect)],
        keyring,
        batch_size=operation.batch_size,
        on_progress=partial(log_progress, "re-sealed", name),
    )
    _finish(report, name, connection, column)
    logger.info(
        "re-sealed %d values of %s in context %s", report.rotated, name, operation.own_context
    )


Operations.implementation_for(ConvertColumnOp)(_in_batches(convert_column))


@Operations.implementation_for(CreateSealedCheckOp)
def _create_sealed_check(operations: Operations, operation: CreateSealedCheckOp) -> None:
    if _is_written_as_sql(operations, operation):
        operations.impl.add_constraint(_check(operations, operation).declared())
    else:
        _in_batches(lambda *arguments: _check(*arguments).create())(operations, operation)


@Operations.implementation_for(DropSealedCheckOp)
def _drop_sealed_check(operations: Operations, operation: DropSealedCheckOp) -> None:
    if _is_written_as_sql(operations, operation):
        name = conv(str(_check(operations, operation).declared().name))
        table_name, schema = operation.table_name, operation.schema
        operations.invoke(ops.DropConstraintOp(name, table_name, "check", schema=schema))
    else:
        _in_batches(lambda *arguments: _check(*arguments).drop())(operations, operation)


@Operations.implementation_for(FenceKeyVersionOp)
def _fence_key_version(operations: Operations, operation: FenceKeyVersionOp) -> None:
    if operations.migration_context.as_sql:
        for check in _fence_as_sql(operations, operation):
            operations.impl.add_constraint(check)
    else:
        _in_batches(_add_fence)(operations, operation)


@Operations.implementation_for(UnfenceKeyVersionOp)
def _unfence_key_version(operations: Operations, operation: UnfenceKeyVersionOp) -> None:
    if operations.migration_context.as_sql:
        for check in _fence_as_sql(operations, operation):
            operations.impl.drop_constraint(check)
    else:
        _in_batches(_drop_fence)(operations, operation)


def _add_fence(operations: Operations, operation: FenceKeyVersionOp) -> None:
    version = operation.version
    with suppress(ConfigurationError):  # no key is needed
        if default_keyring().primary == version:
            raise RotationError(
                f"key version {version!r} is the primary of this process's keyring, so the fence "
                "would refuse every value that is sealed. Promote another key and rotate first"
            )
    connection = operations.get_bind()
    fence = _fence(connection, operation)
    fence.add(connection)
    fence.validate(connection)
    logger.info("%s refuses values under key version %s", operation.full_name, version)


def _drop_fence(operations: Operations, operation: UnfenceKeyVersionOp) -> None:
    connection = operations.get_bind()
    _fence(connection, operation).drop(connection)


def _fence(connection: sa.Connection, operation: FenceOp) -> Fence:
    name = operation.column_name
    _, table = reflect_table(connection, operation.table_name, operation.schema, name, {})
    table.append_column(sa.Column(name, EncryptedJSON()))
    (target,) = resolve_targets(table, connection)
    return Fence(
        target, operation.version, lock_timeout=operation.lock_timeout, retries=operation.retries
    )


def _fence_as_sql(operations: Operations, operation: FenceOp) -> list[sa.CheckConstraint]:
    if operations.migration_context.dialect.name == "sqlite":
        raise RotationError(
            f"{operation.name} of {operation.full_name} cannot be written as SQL (--sql) for "
            "SQLite, where a fence is made of triggers, which do not look at the values that are "
            "there. Run the migration online"
        )
    owner = sa.table(operation.table_name, schema=operation.schema)
    column = TargetColumn(operation.column_name, EncryptedJSON(), ())
    target = TargetTable(operation.full_name, owner, (), (column,))
    return Fence(target, operation.version).constraints()


def _check(operations: Operations, operation: ColumnOp) -> SealedCheck:
    return SealedCheck(operations, operation.table_name, operation.column_name, operation.schema)


def _is_written_as_sql(operations: Operations, operation: ColumnOp) -> bool:
    context = operations.migration_context
    if context.as_sql and context.dialect.name == "sqlite":
        raise RotationError(
            f"{operation.name} of {operation.full_name} cannot be written as SQL (--sql) for "
            "SQLite, where it copies the table. Run the migration online"
        )
    return context.as_sql


@contextmanager
def _autocommit_block(context: MigrationContext) -> Iterator[None]:
    """Raise the cause when Alembic's block ends on a connection that is gone.

    SQLAlchemy gives up a connection that is interrupted (Ctrl-C) or lost. The block then fails at
    its end, and that failure would hide the cause.
    """
    assert context.connection is not None
    errors = errors_of(context.connection.dialect)
    cause: BaseException | None = None
    try:
        with context.autocommit_block():
            try:
                yield
            except BaseException as error:
                cause = error
                if isinstance(error, KeyboardInterrupt):
                    logger.warning(
                        "interrupted; the current batch is rolled back, earlier ones are kept, and "
                        "the revision is not stamped. Run it again to go on"
                    )
                raise
    except errors:
        if cause is None:
            raise
    if cause is not None:
        raise cause


def _finish(
    report: RotationReport, name: str, connection: sa.Connection, column: sa.Column[Any]
) -> None:
    """Log the values that do not open; fail if any value is left to do."""
    log_failures(name, "does not open", report.failed, report.failed_count)
    if report.ok:
        return
    cause = (
        "because they do not open (the first were logged by primary key) or because a process "
        "still seals with another key or context. The others are re-encrypted; the revision is "
        "not stamped. Mend these rows, then run it again"
    )
    if {row.error for row in report.failed} == {"TamperedError"}:
        values = connection.scalar(sa.select(sa.func.count(column)).select_from(column.table))
        if values == report.failed_count:
            cause = (
                "and none of the column opens, though the keyring has their keys. Pass bound_to= "
                "if it is row-bound, and context= if that is not table.column: as its model says"
            )
    raise RotationError(
        f"{report.remaining} values of {name} are not under key version {report.key_version!r} "
        f"and in the column's context, {cause}"
    )


def is_empty(connection: sa.Connection, column: sa.Column[Any]) -> bool:
    """Say whether the column has no value, and so needs no key."""
    owner = column.table
    require_full_visibility(connection, owner.name, owner.schema)
    return not has_row(connection, owner, column.is_not(None))


def _is_plain(connection: sa.Connection, operation: ColumnOp, type_: TypeEngine[Any]) -> bool:
    """Say whether a column holds no sealed value, by its type or, on SQLite, by its values."""
    if is_binary(type_):
        return False
    if connection.dialect.name != "sqlite":
        return True
    # SQLite keeps values of any type in any column.
    value: sa.ColumnElement[Any] = sa.column(operation.column_name)
    owner = sa.table(operation.table_name, schema=operation.schema)
    has_sealed = has_row(connection, owner, _sql.key_version(value).is_not(None))
    return not has_sealed and has_row(connection, owner, value.is_not(None))


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
    connection: sa.Connection, operation: ValuesOp, accept_contexts: Iterable[str]
) -> sa.Column[Any]:
    """Return the column with the operation's type, in its table as the database has it."""
    name = operation.column_name
    columns, table = reflect_table(
        connection, operation.table_name, operation.schema, name, operation.bound_types
    )
    type_ = columns[name]["type"]
    if _is_plain(connection, operation, type_):
        raise not_encrypted(operation.full_name, type_)
    sealed_type = EncryptedJSON(
        context=operation.own_context,
        accept_contexts=accept_contexts,
        bound_to=tuple(operation.bound_to),
    )
    table.append_column(sa.Column(name, sealed_type))
    return table.c[name]


# -- operations of Alembic -------------------------------------------------------------------------


def _keeping_fences(implementation: _Implementation[Any]) -> _Implementation[Any]:
    """Have `implementation` refuse batch mode's copy of a SQLite table that has a fence.

    The copy would lack the fence, because Alembic copies no triggers. Batch mode only notes an
    operation until the block ends, so nothing has been done when this refuses.
    """

    def carry_out(operations: Operations, operation: Any) -> None:
        implementation(operations, operation)
        batch: object = operations.impl
        if not isinstance(batch, BatchOperationsImpl) or not batch._should_recreate():
            return
        connection = batch.impl.connection
        is_offline = operations.migration_context.as_sql
        if batch.dialect.name != "sqlite" or connection is None or is_offline:
            return
        for name, owner in fence_triggers(connection, translated(connection, batch.schema)):
            if owner.lower() == batch.table_name.lower():
                raise RotationError(
                    f"SQLite makes this change of {dotted(batch.schema, owner)} only on a copy of "
                    f"the table, and Alembic's copy would lose its fence, the trigger {name}. Run "
                    "op.unfence_key_version() in a revision before this one, and "
                    "op.fence_key_version() in one after it"
                )

    return carry_out


def _alter_column(operations: Operations, operation: ops.AlterColumnOp) -> None:
    """Run Alembic's own operation, unless it gives a sealed column a server default."""
    type_ = to_instance(operation.modify_type or operation.existing_type)
    default = operation.modify_server_default
    if isinstance(type_, EncryptedJSON) and default is not False:
        column = f"{operation.table_name}.{operation.column_name}"
        refuse_server_default(column, "server_default", default)
    toimpl.alter_column(operations, operation)


for _operation, _implementation in (
    (ops.AddColumnOp, toimpl.add_column),
    (ops.AlterColumnOp, _alter_column),
    (ops.DropColumnOp, toimpl.drop_column),
    (ops.AddConstraintOp, toimpl.create_constraint),
    (ops.DropConstraintOp, toimpl.drop_constraint),
    (ops.CreateIndexOp, toimpl.create_index),
    (ops.DropIndexOp, toimpl.drop_index),
):
    Operations.implementation_for(_operation, replace=True)(_keeping_fences(_implementation))
