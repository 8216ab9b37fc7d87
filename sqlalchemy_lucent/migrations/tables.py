"""The operations on tables: of secrets, of their versions and states, of the key registry."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from .operations import LucentOp, registered, typed


@registered
@dataclass(eq=False)
class CreateLucentSecretsOp(LucentOp):
    """Create the table of scoped secrets, as ``op.create_lucent_secrets()``.

    ::

        def upgrade() -> None:
            op.create_lucent_secrets()

    Pass `table_name` for a model of your own made with :class:`LucentSecretMixin`.
    """

    name = "create_lucent_secrets"

    table_name: str = "lucent_secrets"

    def reverse(self) -> DropLucentSecretsOp:
        """Return the operation that drops the table if it is empty."""
        return DropLucentSecretsOp(self.table_name, schema=self.schema)


@registered
@dataclass(eq=False)
class DropLucentSecretsOp(LucentOp):
    """Drop the table of scoped secrets, as ``op.drop_lucent_secrets()``.

    ::

        def downgrade() -> None:
            op.drop_lucent_secrets()

    :param force: drop it even if it holds secrets.
    :raises RotationError: it holds secrets, or may hold some (offline), and `force` is not set.
    """

    name = "drop_lucent_secrets"

    table_name: str = "lucent_secrets"
    _: KW_ONLY
    force: bool = False

    def reverse(self) -> CreateLucentSecretsOp:
        """Return the operation that creates the table."""
        return CreateLucentSecretsOp(self.table_name, schema=self.schema)


@registered
@dataclass(eq=False)
class UpgradeLucentSecretsOp(LucentOp):
    """Create what versions, due dates and soft delete need, as ``op.upgrade_lucent_secrets()``.

    ::

        def upgrade() -> None:
            op.upgrade_lucent_secrets()

    It creates two tables beside the table of secrets, which does not change. Programs that do not
    use them go on as before. Pass `table_name` for a model of your own.
    """

    name = "upgrade_lucent_secrets"

    table_name: str = "lucent_secrets"

    def reverse(self) -> DowngradeLucentSecretsOp:
        """Return the operation that drops the tables if they have no version."""
        return DowngradeLucentSecretsOp(self.table_name, schema=self.schema)


@registered
@dataclass(eq=False)
class DowngradeLucentSecretsOp(LucentOp):
    """Drop the tables of versions and states, as ``op.downgrade_lucent_secrets()``.

    ::

        def downgrade() -> None:
            op.downgrade_lucent_secrets()

    The secrets stay. When they expire is lost.

    :param force: drop the tables even if they hold versions.
    :raises RotationError: they hold versions, or may hold some (offline), and `force` is not set.
    """

    name = "downgrade_lucent_secrets"

    table_name: str = "lucent_secrets"
    _: KW_ONLY
    force: bool = False

    def reverse(self) -> UpgradeLucentSecretsOp:
        """Return the operation that creates the tables."""
        return UpgradeLucentSecretsOp(self.table_name, schema=self.schema)


@registered
@dataclass(eq=False)
class CreateLucentKeysOp(LucentOp):
    """Create the tables of the key registry, as ``op.create_lucent_keys()``.

    ::

        def upgrade() -> None:
            op.create_lucent_keys()

    Add ``KeyRegistry.metadata`` to the ``target_metadata`` of your ``env.py`` as well, so that
    autogenerate knows them.
    """

    name = "create_lucent_keys"

    table_name: str = field(default="lucent_keys", init=False)

    def reverse(self) -> DropLucentKeysOp:
        """Return the operation that drops the tables if they have no receipt."""
        return DropLucentKeysOp(schema=self.schema)


@registered
@dataclass(eq=False)
class DropLucentKeysOp(LucentOp):
    """Drop the tables of the key registry, as ``op.drop_lucent_keys()``.

    ::

        def downgrade() -> None:
            op.drop_lucent_keys()

    :param force: drop them even if they hold receipts, which prove what was done.
    :raises RotationError: they hold receipts, or may hold some (offline), and `force` is not set.
    """

    name = "drop_lucent_keys"

    table_name: str = field(default="lucent_keys", init=False)
    _: KW_ONLY
    force: bool = False

    def reverse(self) -> CreateLucentKeysOp:
        """Return the operation that creates the tables."""
        return CreateLucentKeysOp(schema=self.schema)


create_lucent_secrets = typed(CreateLucentSecretsOp)
drop_lucent_secrets = typed(DropLucentSecretsOp)
upgrade_lucent_secrets = typed(UpgradeLucentSecretsOp)
downgrade_lucent_secrets = typed(DowngradeLucentSecretsOp)
create_lucent_keys = typed(CreateLucentKeysOp)
drop_lucent_keys = typed(DropLucentKeysOp)
