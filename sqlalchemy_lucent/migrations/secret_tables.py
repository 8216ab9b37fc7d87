"""The operations that create and drop the tables of versions and states beside one of secrets."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from .operations import LucentOp, registered, typed


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


upgrade_lucent_secrets = typed(UpgradeLucentSecretsOp)
downgrade_lucent_secrets = typed(DowngradeLucentSecretsOp)
