"""The operations that create and drop the tables of the key registry."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from .operations import LucentOp, registered, typed


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


create_lucent_keys = typed(CreateLucentKeysOp)
drop_lucent_keys = typed(DropLucentKeysOp)
