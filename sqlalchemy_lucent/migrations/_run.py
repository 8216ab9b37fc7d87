"""How the operations are carried out, on the connection of the migration."""

from __future__ import annotations

import inspect as python_inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from alembic.operations import Operations, ops, toimpl
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    MetaData,
    Table,
    func,
    literal,
    select,
)
from sqlalchemy import column as column_clause
from sqlalchemy import table as table_clause
from sqlalchemy.types import TypeEngine, to_instance

from .. import _sql
from .._database.faults import Fault, errors_of, fault_of
from .._database.relations import is_binary
from .._database.visibility import require_full_visibility
from ..exceptions import RotationError
from ..keyring import default_keyring
from ..models import secrets_table
from ..rotation import RotationProgress, RotationReport, needs_rotation, rotate, run_jobs
from ..rotation.jobs import Rebind
from ..rotation.targets import resolve_targets
from ..types import EncryptedJSON, refuse_server_default
from ._checks import create_check, declared_check, drop_check
from ._convert import convert_column, log_failures
from ._reflect import reflect_table, translated
from .operations import (
    ColumnOp,
    ConvertColumnOp,
    CreateLucentSecretsOp,
    CreateSealedCheckOp,
    DecryptColumnOp,
    DropLucentSecretsOp,
    DropSealedCheckOp,
    EncryptColumnOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
    SealedCheckOp,
    bound_types,
)

logger = logging.getLogger("alembic.runtime.migration.lucent")


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
        connection = operations.get_bind()
        schema = translated(connection, operation.schema)
        require_full_visibility(connection, name, schema)
        counted = select(func.count()).select_from(table_clause(name, schema=schema))
        count = connection.scalar(counted)
        if count:
            raise RotationError(
                f"{name} holds {count} secrets, which nothing could bring back; "
                "to drop them all the same, pass force=True"
            )
    operations.impl.drop_table(secrets_table(MetaData(), name, schema=operation.schema))


_Op = TypeVar("_Op", bound=ColumnOp | SealedCheckOp)
_Implementation = Callable[[Operations, _Op], None]


def _in_our_words(implementation: _Implementation[_Op]) -> _Implementation[_Op]:
    """Have `implementation` raise an error of ours where the database or its driver ends it."""
    name = implementation.__name__.removeprefix("_")

    def carry_out(operations: Operations, operation: _Op) -> None:
        context = operations.migration_context
        connection = context.connection
        if context.as_sql or connection is None:
            return implementation(operations, operation)
        errors: tuple[type[Exception], ...] = (Fault, *errors_of(connection.dialect))
        try:
            return implementation(operations, operation)
        except errors as error:
            fault = (
                error
                if isinstance(error, Fault)
                else fault_of(error, connection.dialect, lost=connection.invalidated)
            )
            names = (operation.schema, operation.table_name, operation.column_name)
            message = (
                f"the database ended {name} of {'.'.join(filter(None, names))}: {fault.message}. "
                "Batches that were committed stay, and the revision is not stamped. "
                f"{fault.next_step()}"
            )
        # Not chained: SQLAlchemy's error has the parameters.
        raise RotationError(message)

    return carry_out


@Operations.implementation_for(RotateEncryptedColumnOp)
@_in_our_words
def _rotate_encrypted_column(operations: Operations, operation: RotateEncryptedColumnOp) -> None:
    context = operations.migration_context
    name = operation.full_name
    _refuse_where_batches_cannot_commit(context, f"rotate_encrypted_column of {name}")
    with _autocommit_block(context):
        assert context.connection is not None
        column = _reflect(context.connection, operation, operation.accept_contexts)
        if is_empty(context.connection, column):
            logger.info("%s holds no value; nothing to re-encrypt", name)
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
        _finish(report, name, context.connection, column)
    logger.info(
        "re-encrypted %d values of %s under key version %s",
        report.rotated,
        name,
        report.key_version,
    )


@Operations.implementation_for(EncryptColumnOp)
@_in_our_words
def _encrypt_column(operations: Operations, operation: EncryptColumnOp) -> None:
    _convert(operations, operation, f"encrypt_column of {operation.full_name}")


@Operations.implementation_for(DecryptColumnOp)
@_in_our_words
def _decrypt_column(operations: Operations, operation: DecryptColumnOp) -> None:
    _convert(operations, operation, f"decrypt_column of {operation.full_name}")


def _convert(operations: Operations, operation: ConvertColumnOp, what: str) -> None:
    context = operations.migration_context
    _refuse_where_batches_cannot_commit(context, what)
    with _autocommit_block(context):
        plan = operation.plan()
        schema = translated(operations.get_bind(), plan.schema)
        convert_column(operations, replace(plan, schema=schema))


@Operations.implementation_for(CreateSealedCheckOp)
@_in_our_words
def _create_sealed_check(operations: Operations, operation: CreateSealedCheckOp) -> None:
    where = _place_of_check(operations, operation)
    if operations.migration_context.as_sql:
        operations.impl.add_constraint(declared_check(operations, *where))
        return
    with _autocommit_block(operations.migration_context):
        create_check(operations, *where)


@Operations.implementation_for(DropSealedCheckOp)
@_in_our_words
def _drop_sealed_check(operations: Operations, operation: DropSealedCheckOp) -> None:
    where = _place_of_check(operations, operation)
    if operations.migration_context.as_sql:
        check = declared_check(operations, *where)
        operations.drop_constraint(
            str(check.name), operation.table_name, type_="check", schema=operation.schema
        )
        return
    with _autocommit_block(operations.migration_context):
        drop_check(operations, *where)


def _place_of_check(
    operations: Operations, operation: SealedCheckOp
) -> tuple[str, str, str | None]:
    context = operations.migration_context
    if not context.as_sql or context.dialect.name == "sqlite":
        _refuse_where_batches_cannot_commit(
            context, f"{operation.name} of {operation.table_name}.{operation.column_name}"
        )
    schema = operation.schema
    if not context.as_sql:
        schema = translated(operations.get_bind(), schema)
    return operation.table_name, operation.column_name, schema


@Operations.implementation_for(RebindEncryptedColumnOp)
@_in_our_words
def _rebind_encrypted_column(operations: Operations, operation: RebindEncryptedColumnOp) -> None:
    context = operations.migration_context
    name = operation.full_name
    _refuse_where_batches_cannot_commit(context, f"rebind_encrypted_column of {name}")
    with _autocommit_block(context):
        connection = context.connection
        assert connection is not None
        column = _reflect(connection, operation, accept_contexts=[operation.from_context])
        if is_empty(connection, column):
            logger.info("%s holds no value; nothing to seal anew", name)
            return
        keyring = default_keyring()
        (target,) = resolve_targets(column, connection)
        report = run_jobs(
            connection,
            [Rebind(target, keyring, connection.dialect)],
            keyring,
            batch_size=operation.batch_size,
            on_progress=_log,
        )
        _finish(report, name, connection, column)
    logger.info(
        "sealed %d values of %s anew in context %s", report.rotated, name, operation.own_context
    )


@contextmanager
def _autocommit_block(context: MigrationContext) -> Iterator[None]:
    """Alembic's block, except that what ended it is raised also when the connection is gone.

    SQLAlchemy gives a connection up that is interrupted (Ctrl-C) or lost; the block fails to end
    on it, and that failure would be all that is said.
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
                        "interrupted; the batch in hand is rolled back, the others are kept, and "
                        "the revision is not stamped. Run it again to go on"
                    )
                raise
    except errors:
        if cause is None:
            raise
    if cause is not None:
        raise cause


def _finish(report: RotationReport, name: str, connection: Connection, column: Column[Any]) -> None:
    """Log what does not open, and fail while something is left to do."""
    log_failures(name, "does not open", report.failed, report.failed_count)
    if report.ok:
        return
    cause = (
        "because they do not open (the first were logged by primary key) or because a process "
        "still seals otherwise. The others are re-encrypted; the revision is not stamped, so run "
        "it again when these rows are dealt with"
    )
    if {row.error for row in report.failed} == {"TamperedError"}:
        values = connection.scalar(select(func.count(column)).select_from(column.table))
        if values == report.failed_count:
            cause = (
                "and none of the column opens, though the keyring has their keys. Pass bound_to= "
                "if it is row-bound, and context= if that is not table.column: as its model says"
            )
    raise RotationError(
        f"{report.remaining} values of {name} are not under key version {report.key_version!r} "
        f"and in the column's context, {cause}"
    )


def is_empty(connection: Connection, column: Column[Any]) -> bool:
    """Say whether there is nothing that a key could be needed for, as in a database made anew."""
    require_full_visibility(connection, column.table.name, column.table.schema)
    statement = select(literal(1)).where(column.is_not(None)).limit(1)
    return connection.execute(statement).first() is None


def _is_plain(
    connection: Connection, operation: ColumnOp, schema: str | None, type_: TypeEngine[Any]
) -> bool:
    """Say whether the column never held a sealed value, as far as its type tells."""
    if is_binary(type_):
        return False
    if connection.dialect.name != "sqlite":
        return True
    # Whatever type is declared there, a value may be of another.
    value: ColumnElement[Any] = column_clause(operation.column_name)
    owner = table_clause(operation.table_name, schema=schema)
    sealed = _sql.key_version(value).is_not(None)
    statement = select(func.count(), func.count().filter(sealed)).select_from(owner)
    has, has_sealed = connection.execute(statement.where(value.is_not(None))).one()
    return bool(has and not has_sealed)


def _log(progress: RotationProgress) -> None:
    # Writers may have added some since they were counted.
    total = max(progress.total, progress.rotated)
    logger.info(
        "re-encrypted %d of %d values of %s so far", progress.rotated, total, progress.table
    )


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
    connection: Connection, operation: ColumnOp, accept_contexts: Iterable[str]
) -> Column[Any]:
    """Return the column, in its table as the database has it, with the type of the migration."""
    schema = translated(connection, operation.schema)
    needed = (operation.column_name, *operation.bound_to)
    reflected = reflect_table(connection, operation.table_name, schema, needed)
    name, type_ = operation.full_name, reflected.columns[operation.column_name]["type"]
    if _is_plain(connection, operation, schema, type_):
        raise RotationError(
            f"{name} is a column of the type {type(type_).__name__}, and not an encrypted one; "
            "op.encrypt_column() makes it one"
        )
    sealed_type = EncryptedJSON(
        context=operation.own_context,
        accept_contexts=accept_contexts,
        bound_to=tuple(operation.bound_to),
    )
    table = Table(
        operation.table_name,
        MetaData(),
        *reflected.identity(connection, bound_types(operation.bound_to)),
        Column(operation.column_name, sealed_type),
        schema=schema,
    )
    return table.c[operation.column_name]


def _alter_column(operations: Operations, operation: ops.AlterColumnOp) -> None:
    """Carry out Alembic's own operation, unless it gives a sealed column a server default."""
    type_ = to_instance(operation.modify_type or operation.existing_type)
    default = operation.modify_server_default
    if isinstance(type_, EncryptedJSON) and default is not False:
        column = f"{operation.table_name}.{operation.column_name}"
        refuse_server_default(column, "server_default", default)
    toimpl.alter_column(operations, operation)


# From Alembic 1.17.2 on; before, only the column's CHECK constraint refuses such a default.
if "replace" in python_inspect.signature(Operations.implementation_for).parameters:
    Operations.implementation_for(ops.AlterColumnOp, replace=True)(_alter_column)
