"""The operations: as functions for type checkers, and as the methods of ``op``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import alembic.op
from alembic.operations import AbstractOperations, BatchOperations, MigrateOperation, Operations
from sqlalchemy.types import TypeEngine, to_instance

from ..rotation import DEFAULT_BATCH_SIZE
from ..rotation.plain import Reader, Writer
from ..types import EncryptedJSON
from ._convert import Plan

BoundTo = Iterable[str] | Mapping[str, TypeEngine[Any]]
"""The columns that a row-bound value is bound to, in order; or the type of each by its name."""

# -- Functions -------------------------------------------------------------------------------------


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
    :raises RotationError: the table, the column or its primary key is missing, the column's type
        says that it was never encrypted, the migration runs offline or inside somebody else's
        transaction, or values are left that do not open.
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
    create_constraint: bool = True,
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
    value that cannot be read is logged by primary key (the first 20 are), and ends it before
    anything is swapped. What uses the column (an index, check, generated column, view, trigger …)
    is named, and ends it before the first write.

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
        ``str`` for text that is not JSON, and for numbers and dates that JSON does not have.
    :param writer: what the reverse needs to undo `reader`.
    :param through: name of the second column; ``<column>__sealed`` if left out.
    :param swap: ``False`` ends when the second column is filled and agrees with the first one.
    :param drop: ``False`` keeps the plaintext, nullable, in the column `through`. A later call
        drops it.
    :param create_constraint: ``False`` leaves the CHECK constraint out, as it does for the type.
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
        create_constraint=create_constraint,
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
    create_constraint: bool = True,
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
    :param create_constraint: what the reverse needs.
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
        create_constraint=create_constraint,
        batch_size=batch_size,
    )
    _invoke(operation, operations)


def create_sealed_check(
    table_name: str,
    column_name: str,
    *,
    schema: str | None = None,
    operations: AbstractOperations | None = None,
) -> None:
    """Have the database refuse what is not sealed, as ``op.create_sealed_check()``.

    ::

        def upgrade() -> None:
            op.create_sealed_check("users", "credentials")

    Adds the CHECK constraint that a new table has, under the same name. A column that has it is
    left alone. PostgreSQL reads the rows while others write; MariaDB, MySQL and SQLite copy the
    table, and nobody writes to it meanwhile.

    :param table_name: the table.
    :param column_name: its :class:`EncryptedJSON` column.
    :param schema: the table's schema.
    :raises RotationError: there are values that are not sealed, or SQLite's copy of the table
        would lose something. Nothing was changed.
    """
    _invoke(CreateSealedCheckOp(table_name, column_name, schema=schema), operations)


def drop_sealed_check(
    table_name: str,
    column_name: str,
    *,
    schema: str | None = None,
    operations: AbstractOperations | None = None,
) -> None:
    """Drop what :func:`create_sealed_check` adds, as ``op.drop_sealed_check()``."""
    _invoke(DropSealedCheckOp(table_name, column_name, schema=schema), operations)


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


# -- Operations ------------------------------------------------------------------------------------


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


def bound_types(
    bound_to: tuple[str, ...] | dict[str, TypeEngine[Any]],
) -> dict[str, TypeEngine[Any] | None]:
    """Return the type of each binding column by its name; ``None`` has the database tell it."""
    return dict(bound_to) if isinstance(bound_to, dict) else dict.fromkeys(bound_to)


class SealedCheckOp(MigrateOperation):
    """What adding and dropping the CHECK constraint of a column share."""

    name: ClassVar[str]

    def __init__(self, table_name: str, column_name: str, *, schema: str | None = None) -> None:
        self.table_name = table_name
        self.column_name = column_name
        self.schema = schema

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows."""
        return (self.name, self.schema, self.table_name, self.column_name)


@Operations.register_operation("create_sealed_check")
class CreateSealedCheckOp(SealedCheckOp):
    """Add the CHECK constraint of a sealed column."""

    name = "create_sealed_check"

    @classmethod
    def create_sealed_check(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`create_sealed_check`."""
        create_sealed_check(*args, **kw, operations=operations)

    def reverse(self) -> DropSealedCheckOp:
        """Return the operation that drops the constraint."""
        return DropSealedCheckOp(self.table_name, self.column_name, schema=self.schema)


@Operations.register_operation("drop_sealed_check")
class DropSealedCheckOp(SealedCheckOp):
    """Drop the CHECK constraint of a sealed column."""

    name = "drop_sealed_check"

    @classmethod
    def drop_sealed_check(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """See :func:`drop_sealed_check`."""
        drop_sealed_check(*args, **kw, operations=operations)

    def reverse(self) -> CreateSealedCheckOp:
        """Return the operation that adds the constraint."""
        return CreateSealedCheckOp(self.table_name, self.column_name, schema=self.schema)


class ColumnOp(MigrateOperation):
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
class RotateEncryptedColumnOp(ColumnOp):
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


class ConvertColumnOp(ColumnOp):
    """What encryption and decryption of a column share."""

    to_sealed: ClassVar[bool]

    DEFAULTS: ClassVar[dict[str, object]] = {
        "schema": None,
        "context": None,
        "bound_to": (),
        "through": None,
        "swap": True,
        "drop": True,
        "create_constraint": True,
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
        create_constraint: bool = True,
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
        self.create_constraint = create_constraint
        self.batch_size = batch_size

    def plan(self) -> Plan:
        """Return what is to be done."""
        return Plan(
            to_sealed=self.to_sealed,
            table_name=self.table_name,
            column_name=self.column_name,
            schema=self.schema,
            existing_type=self.existing_type,
            sealed_type=EncryptedJSON(
                context=self.own_context,
                bound_to=tuple(self.bound_to),
                create_constraint=self.create_constraint,
            ),
            bound_types=bound_types(self.bound_to),
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
        own = ("create_constraint", "batch_size")
        return {name: getattr(self, name) for name in (*names, *own)}


@Operations.register_operation("encrypt_column")
@BatchOperations.register_operation("encrypt_column", "batch_encrypt_column")
class EncryptColumnOp(ConvertColumnOp):
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
class DecryptColumnOp(ConvertColumnOp):
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
class RebindEncryptedColumnOp(ColumnOp):
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
