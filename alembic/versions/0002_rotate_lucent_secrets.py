"""re-encrypt lucent_secrets under the primary key

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-23
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.rotate_encrypted_column(
        "lucent_secrets", "payload", bound_to=("scope", "owner_id", "provider", "name")
    )


def downgrade() -> None:
    """Nothing to undo: every value stays readable under any key of the keyring."""
