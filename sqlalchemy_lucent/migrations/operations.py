"""The operations, each as one class: its signature, documentation, defaults, diff and reverse.

The functions at the end are typed for callers. The methods of ``op`` do the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, MISSING, InitVar, dataclass, fields, replace
from typing import Any, ClassVar, ParamSpec, TypeVar

import alembic.op
from alembic.operations import AbstractOperations, BatchOperations, MigrateOperation, Operations
from sqlalchemy.types import TypeEngine, to_instance

from .._database.connection import DEFAULT_LOCK_TIMEOUT, DEFAULT_RETRIES
from .._database.reflection import dotted
from ..rotation import DEFAULT_BATCH_SIZE
from ..rotation.plain import Reader, Writer
from ..types import EncryptedJSON

BoundTo = Iterable[str] | Mapping[str, TypeEngine[Any]]
"""The columns that a row-bound value is bound to, in order; or the type of each by its name."""


@dataclass(eq=False)
class LucentOp(MigrateOperation):
    """What the operations share. The fields of a subclass are its arguments.

    `operations` is for the functions of this module, which run the operation on it.
    """

    name: ClassVar[str]

    table_name: str
    _: KW_ONLY
    schema: str | None = None
    operations: InitVar[AbstractOperations | None] = None

    @classmethod
    def invoke(cls, operations: Operations, *args: Any, **kw: Any) -> None:
        """Run the operation: the method of ``op``."""
        operations.invoke(cls(*args, **kw))

    @property
    def full_name(self) -> str:
        """The table's name with its schema."""
        return dotted(self.schema, self.table_name)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """Return what ``alembic check`` shows: the names and the required arguments."""
        shown = [f.name for f in fields(self) if not f.kw_only or f.default is MISSING]
        return (self.name, self.schema, *(getattr(self, name) for name in shown))

    def _as(self, operation: Callable[..., _Op], **changes: Any) -> _Op:
        """Return another operation with the arguments of this one, but for `changes`."""
        return operation(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)


@dataclass(eq=False)
class ColumnOp(LucentOp):
    """An operation on one column."""

    column_name: str

    @classmethod
    def invoke_in_batch(cls, operations: BatchOperations, *args: Any, **kw: Any) -> None:
        """Run the operation on the table of a batch, at once: a batch defers its own to its end.

        SQL (``--sql``) is written in order.
        """
        batch, context = operations.impl, operations.migration_context
        run_on = operations if context.as_sql else Operations(context)
        run_on.invoke(cls(batch.table_name, *args, schema=batch.schema, **kw))

    @property
    def full_name(self) -> str:
        """The column's name with its table and schema."""
        return dotted(self.schema, self.table_name, self.column_name)


@dataclass(eq=False, kw_only=True)
class ValuesOp(ColumnOp):
    """An operation on the values of one column."""

    context: str | None = None
    bound_to: BoundTo = ()
    batch_size: int = DEFAULT_BATCH_SIZE

    def __post_init__(self, operations: AbstractOperations | None) -> None:
        bound_to = self.bound_to
        self.bound_to = dict(bound_to) if isinstance(bound_to, Mapping) else tuple(bound_to)

    @property
    def own_context(self) -> str:
        """The context of the column."""
        return self.context or f"{self.table_name}.{self.column_name}"

    @property
    def bound_types(self) -> dict[str, TypeEngine[Any] | None]:
        """The type of each binding column by its name; ``None`` has the database tell it."""
        given = self.bound_to
        return {**given} if isinstance(given, Mapping) else dict.fromkeys(given)


_Op = TypeVar("_Op", bound=LucentOp)
_P = ParamSpec("_P")


def registered(operation: type[_Op]) -> type[_Op]:
    """Make the operation a method of ``op``; one on a column, a method of a batch as well."""
    methods: list[tuple[type[AbstractOperations], str]] = [(Operations, "invoke")]
    if issubclass(operation, ColumnOp):
        methods.append((BatchOperations, "invoke_in_batch"))
    for owner, source in methods:
        owner.register_operation(operation.name, source)(operation)
        getattr(owner, operation.name).__doc__ = operation.__doc__
    return operation


def typed(operation: Callable[_P, LucentOp]) -> Callable[_P, None]:
    """Return a function that runs the operation, with its signature and documentation."""

    def function(*args: _P.args, **kw: _P.kwargs) -> None:
        # Without `operations`, run it in the current migration, as `alembic.op` does.
        where: Any = kw.get("operations") or alembic.op
        where.invoke(operation(*args, **kw))

    described: Any = operation
    function.__name__ = function.__qualname__ = described.name
    function.__doc__ = described.__doc__
    parameters = sorted(
        inspect.signature(described).parameters.values(),
        key=lambda p: (p.default is not p.empty, p.name == "operations"),
    )
    annotation = parameters[-1].annotation.removeprefix("InitVar[")[:-1]
    parameters[-1] = parameters[-1].replace(annotation=annotation)
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": "None"}
    function.__signature__ = inspect.Signature(parameters, return_annotation="None")  # type: ignore[attr-defined]
    return function


@registered
@dataclass(eq=False)
class CreateSealedCheckOp(ColumnOp):
    """Have the database refuse values that are not sealed, as ``op.create_sealed_check()``.

    ::

        def upgrade() -> None:
            op.create_sealed_check("users", "credentials")

    Adds the CHECK constraint that a new table has, under the same name. A column that has it is
    left alone. PostgreSQL reads the rows while others write; MariaDB, MySQL and SQLite copy the
    table, and nobody can write to it meanwhile.

    :param column_name: its :class:`EncryptedJSON` column.
    :raises RotationError: some values are not sealed, or SQLite's copy of the table would lose
        something. Nothing was changed.
    """

    name = "create_sealed_check"

    def reverse(self) -> DropSealedCheckOp:
        """Return the operation that drops the constraint."""
        return self._as(DropSealedCheckOp)


@registered
@dataclass(eq=False)
class DropSealedCheckOp(ColumnOp):
    """Drop what :func:`create_sealed_check` adds, as ``op.drop_sealed_check()``."""

    name = "drop_sealed_check"

    def reverse(self) -> CreateSealedCheckOp:
        """Return the operation that adds the constraint."""
        return self._as(CreateSealedCheckOp)


@dataclass(eq=False)
class FenceOp(ColumnOp):
    """An operation on the fence of one column."""

    version: str
    _: KW_ONLY
    lock_timeout: float = DEFAULT_LOCK_TIMEOUT
    retries: int = DEFAULT_RETRIES


@registered
@dataclass(eq=False)
class FenceKeyVersionOp(FenceOp):
    """Have the database refuse values under an old key version, as ``op.fence_key_version()``.

    ::

        def upgrade() -> None:
            op.fence_key_version("users", "credentials", "v1")

    For the time after a rotation: a process that still has the old key as its primary gets an
    error for each write, instead of a value that is lost with the key. Adds a CHECK constraint, or
    two triggers on SQLite, and then proves that no value is left. A column that has this fence is
    left alone. Offline (``--sql``), the database finds the values that are left. The proof reads
    the table while others write.

    :param column_name: its :class:`EncryptedJSON` column.
    :param version: the key version to refuse.
    :param lock_timeout: seconds to wait for the table, 1 if left out; whole seconds on MariaDB and
        MySQL. Others queue behind a change that waits, so it gives up soon, lets them through and
        tries again. On SQLite nobody queues.
    :param retries: further attempts, up to 4 seconds apart: about half a minute if left out.
    :raises KeyInUseError: there are values under the version. Nothing was changed.
    :raises RotationError: the table, the column or its primary key is missing, `version` is the
        primary of the process's keyring, or the database refuses.
    """

    name = "fence_key_version"

    def reverse(self) -> UnfenceKeyVersionOp:
        """Return the operation that drops the fence."""
        return self._as(UnfenceKeyVersionOp)


@registered
@dataclass(eq=False)
class UnfenceKeyVersionOp(FenceOp):
    """Drop what :func:`fence_key_version` adds, as ``op.unfence_key_version()``."""

    name = "unfence_key_version"

    def reverse(self) -> FenceKeyVersionOp:
        """Return the operation that adds the fence."""
        return self._as(FenceKeyVersionOp)


@registered
@dataclass(eq=False, kw_only=True)
class RotateEncryptedColumnOp(ValuesOp):
    """Re-encrypt a column under the keyring's primary key, as ``op.rotate_encrypted_column()``.

    ::

        def upgrade() -> None:
            op.rotate_encrypted_column("users", "credentials")

    A migration that was killed continues where it stopped when it is run again. Its revision is
    stamped only after a count finds nothing left to do. A column without values needs no key.

    :param column_name: its :class:`EncryptedJSON` column.
    :param context: the column's context, if it is not ``table.column``.
    :param accept_contexts: earlier contexts whose values still open.
    :param bound_to: the columns that a row-bound value is bound to, in order; or a dict with the
        type of each, for columns whose type the database does not tell (``sa.Uuid()``).
    :param batch_size: rows per transaction.
    :param assert_only: re-encrypt nothing; fail while there is something to re-encrypt. For very
        large tables, which are better rotated by :func:`sqlalchemy_lucent.rotate` beforehand.
    :raises RotationError: the table, the column or its primary key is missing, the column's type
        says that it was never encrypted, the migration runs offline or inside somebody else's
        transaction, or some values do not open.
    :raises ConfigurationError: there is no keyring.
    """

    name = "rotate_encrypted_column"

    accept_contexts: Iterable[str] = ()
    assert_only: bool = False

    def __post_init__(self, operations: AbstractOperations | None) -> None:
        super().__post_init__(operations)
        self.accept_contexts = tuple(self.accept_contexts)

    def reverse(self) -> RotateEncryptedColumnOp:
        """Return the same operation: it goes to the primary key, whichever that is then."""
        return self


@dataclass(eq=False, kw_only=True)
class ConvertColumnOp(ValuesOp):
    """What encryption and decryption of a column share."""

    to_sealed: ClassVar[bool]

    existing_type: TypeEngine[Any] | type[TypeEngine[Any]]
    reader: Reader | None = None
    writer: Writer | None = None
    through: str | None = None
    swap: bool = True
    drop: bool = True
    create_constraint: bool = True

    def __post_init__(self, operations: AbstractOperations | None) -> None:
        super().__post_init__(operations)
        self.existing_type = to_instance(self.existing_type)

    @property
    def plain_type(self) -> TypeEngine[Any]:
        """The type of the plaintext column."""
        return to_instance(self.existing_type)

    @property
    def sealed_type(self) -> EncryptedJSON:
        """The type of the encrypted column."""
        return EncryptedJSON(
            context=self.own_context,
            bound_to=tuple(self.bound_to),
            create_constraint=self.create_constraint,
        )

    @property
    def second(self) -> str:
        """The name of the second column."""
        return self.through or f"{self.column_name}__sealed"

    @property
    def wants_check(self) -> bool:
        """Whether the column gets a CHECK constraint."""
        return self.to_sealed and self.create_constraint

    @property
    def verb(self) -> str:
        """What is done to values, for messages."""
        return "sealed" if self.to_sealed else "opened"

    def _undone_by(self, operation: Callable[..., _Op]) -> _Op:
        # Whatever part of the way this went, the reverse goes back to where it began.
        return self._as(operation, swap=True, drop=True)


@registered
@dataclass(eq=False)
class EncryptColumnOp(ConvertColumnOp):
    """Turn a plaintext column into an encrypted one, as ``op.encrypt_column()``.

    ::

        def upgrade() -> None:
            op.encrypt_column("users", "credentials", existing_type=sa.JSON())


        def downgrade() -> None:
            op.decrypt_column("users", "credentials", existing_type=sa.JSON())

    Adds a second column and fills it in committed batches. Under a lock of the table, it compares
    every row once more and gives the second column the first one's name and ``NOT NULL``. Killed
    at any instant, it continues when it is run again; a column that is encrypted already is left
    alone. Values that cannot be read are logged by primary key (the first 20), and nothing is
    swapped. If anything uses the column (an index, check, generated column, view, trigger …), an
    error names it before the first write.

    A document in a text column is sealed to the letter; other values as their type reads them.

    :param column_name: its plaintext column.
    :param existing_type: what the column is: JSON, text that holds JSON, or any other type, such
        as another library's encrypted one, whose Python values are sealed.
    :param context: the context of the column from now on, if it is not ``table.column``.
    :param bound_to: the columns that a row-bound value is bound to, in order; or a dict with the
        type of each, for columns whose type the database does not tell (``sa.Uuid()``).
    :param reader: turns a value, as `existing_type` gives it, into the JSON value to seal:
        ``str`` for text that is not JSON, and for numbers and dates that JSON does not have.
    :param writer: what the reverse needs to undo `reader`.
    :param through: name of the second column; ``<column>__sealed`` by default.
    :param swap: ``False`` ends when the second column is filled and agrees with the first one.
    :param drop: ``False`` keeps the plaintext, nullable, in the column `through`. A later call
        drops it.
    :param create_constraint: ``False`` leaves the CHECK constraint out, as it does for the type.
    :param batch_size: rows per transaction.
    :raises RotationError: something is missing or in the way, the migration runs offline or inside
        somebody else's transaction, or some values cannot be read.
    :raises ConfigurationError: there is no keyring, and there are values.
    """

    name = "encrypt_column"
    to_sealed = True

    def reverse(self) -> DecryptColumnOp:
        """Return the operation that brings the plaintext column back."""
        return self._undone_by(DecryptColumnOp)


@registered
@dataclass(eq=False)
class DecryptColumnOp(ConvertColumnOp):
    """Turn an encrypted column into a plaintext one, as ``op.decrypt_column()``.

    ::

        def downgrade() -> None:
            op.decrypt_column("users", "credentials", existing_type=sa.JSON())

    Works as :func:`encrypt_column` does, with the same parameters, in the other direction. What
    :func:`encrypt_column` left half-way is cleared away.

    :param existing_type: what the column is to be: what it was before it was encrypted.
    :param writer: turns a JSON value into what `existing_type` takes.
    :param create_constraint: what the reverse needs.
    :param reader: undoes `writer`: each written value is read again and compared before the sealed
        values are dropped.
    :raises RotationError: as for :func:`encrypt_column`.
    :raises ConfigurationError: there is no keyring, and there are values.
    """

    name = "decrypt_column"
    to_sealed = False

    def reverse(self) -> EncryptColumnOp:
        """Return the operation that encrypts the column again."""
        return self._undone_by(EncryptColumnOp)


@registered
@dataclass(eq=False, kw_only=True)
class RebindEncryptedColumnOp(ValuesOp):
    """Re-seal values in their new context after a rename, as ``op.rebind_encrypted_column()``.

    ::

        def upgrade() -> None:
            op.rebind_encrypted_column("users", "credentials", from_context="users.creds")

    Values are bound to their column's context, ``table.column``. Until this has run, values sealed
    under the old name open through ``EncryptedJSON(accept_contexts=["users.creds"])``.

    :param table_name: the table, by its current name.
    :param column_name: its :class:`EncryptedJSON` column, by its current name.
    :param from_context: the context that values were sealed in: ``table.column`` of the old names.
    :param context: the context to seal them in, if it is not ``table.column``.
    :param bound_to: as for :func:`encrypt_column`.
    :param batch_size: rows per transaction.
    :raises RotationError: as for :func:`rotate_encrypted_column`.
    :raises ConfigurationError: there is no keyring, and there are values.
    """

    name = "rebind_encrypted_column"

    from_context: str

    def reverse(self) -> RebindEncryptedColumnOp:
        """Return the operation with the contexts exchanged."""
        return replace(self, from_context=self.own_context, context=self.from_context)


create_sealed_check = typed(CreateSealedCheckOp)
drop_sealed_check = typed(DropSealedCheckOp)
fence_key_version = typed(FenceKeyVersionOp)
unfence_key_version = typed(UnfenceKeyVersionOp)
rotate_encrypted_column = typed(RotateEncryptedColumnOp)
encrypt_column = typed(EncryptColumnOp)
decrypt_column = typed(DecryptColumnOp)
rebind_encrypted_column = typed(RebindEncryptedColumnOp)
