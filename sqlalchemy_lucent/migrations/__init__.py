"""Alembic operations, their rendering, and what autogenerate compares.

In a migration environment's ``env.py``::

    import sqlalchemy_lucent.migrations as lucent_migrations

    context.configure(
        ...,
        render_item=lucent_migrations.render_item,
        autogenerate_plugins=["alembic.autogenerate.*", "sqlalchemy_lucent.*"],
        transaction_per_migration=True,
    )

The import registers the operations with Alembic, and the comparators as a plugin that runs only
where ``autogenerate_plugins`` names it. Each operation is a method of ``op`` and, typed, a function
of this module.

Operations on data commit batch by batch on Alembic's own connection. Keep them in revisions of
their own, apart from changes of the schema, and configure ``transaction_per_migration=True``.
"""

from __future__ import annotations

from . import _run as _run
from ._autogenerate import LINT_PLUGIN_NAME, PLUGIN_NAME, setup
from ._render import render_item
from .operations import (
    BoundTo,
    CreateSealedCheckOp,
    DecryptColumnOp,
    DropSealedCheckOp,
    EncryptColumnOp,
    FenceKeyVersionOp,
    RebindEncryptedColumnOp,
    RotateEncryptedColumnOp,
    UnfenceKeyVersionOp,
    create_sealed_check,
    decrypt_column,
    drop_sealed_check,
    encrypt_column,
    fence_key_version,
    rebind_encrypted_column,
    rotate_encrypted_column,
    unfence_key_version,
)
from .tables import (
    CreateLucentKeysOp,
    CreateLucentSecretsOp,
    DowngradeLucentSecretsOp,
    DropLucentKeysOp,
    DropLucentSecretsOp,
    UpgradeLucentSecretsOp,
    create_lucent_keys,
    create_lucent_secrets,
    downgrade_lucent_secrets,
    drop_lucent_keys,
    drop_lucent_secrets,
    upgrade_lucent_secrets,
)

__all__ = [
    "LINT_PLUGIN_NAME",
    "PLUGIN_NAME",
    "BoundTo",
    "CreateLucentKeysOp",
    "CreateLucentSecretsOp",
    "CreateSealedCheckOp",
    "DecryptColumnOp",
    "DowngradeLucentSecretsOp",
    "DropLucentKeysOp",
    "DropLucentSecretsOp",
    "DropSealedCheckOp",
    "EncryptColumnOp",
    "FenceKeyVersionOp",
    "RebindEncryptedColumnOp",
    "RotateEncryptedColumnOp",
    "UnfenceKeyVersionOp",
    "UpgradeLucentSecretsOp",
    "create_lucent_keys",
    "create_lucent_secrets",
    "create_sealed_check",
    "decrypt_column",
    "downgrade_lucent_secrets",
    "drop_lucent_keys",
    "drop_lucent_secrets",
    "drop_sealed_check",
    "encrypt_column",
    "fence_key_version",
    "rebind_encrypted_column",
    "render_item",
    "rotate_encrypted_column",
    "setup",
    "unfence_key_version",
    "upgrade_lucent_secrets",
]
