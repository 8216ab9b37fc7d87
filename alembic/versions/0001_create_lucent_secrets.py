"""create lucent_secrets

Revision ID: 0001
Revises:
Create Date: 2026-11-23
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

from sqlalchemy_lucent import EncryptedJSON, LucentError
from sqlalchemy_lucent.models import (
    UTCDateTime,
    byte_wise_string,
    computed_key_version,
    key_version_type,
)

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lucent_secrets",
        sa.Column("scope", byte_wise_string(128), primary_key=True),
        sa.Column("owner_id", byte_wise_string(128), primary_key=True),
        sa.Column("provider", byte_wise_string(128), primary_key=True),
        sa.Column("name", byte_wise_string(128), primary_key=True),
        sa.Column("payload", EncryptedJSON(), nullable=False),
        sa.Column("key_version", key_version_type(), computed_key_version("payload"), index=True),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("updated_at", UTCDateTime(), nullable=False),
    )


def downgrade() -> None:
    if context.get_x_argument(as_dictionary=True).get("drop_secrets") != "yes":
        if context.is_offline_mode():
            raise LucentError(
                "offline, nothing can tell whether lucent_secrets holds secrets; "
                "to drop it whatever it holds, add: -x drop_secrets=yes"
            )
        secrets = sa.table("lucent_secrets")
        count = op.get_bind().scalar(sa.select(sa.func.count()).select_from(secrets))
        if count:
            raise LucentError(
                f"lucent_secrets holds {count} secrets, which nothing could bring back; "
                "to drop them all the same, add: -x drop_secrets=yes"
            )
    op.drop_table("lucent_secrets")
