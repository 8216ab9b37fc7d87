"""create lucent_secrets

Revision ID: 0001
Revises:
Create Date: 2026-11-23
"""

from __future__ import annotations

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_lucent_secrets()


def downgrade() -> None:
    """Drop the table if it is empty; with ``-x drop_secrets=yes``, whatever it holds."""
    told = context.get_x_argument(as_dictionary=True).get("drop_secrets") == "yes"
    op.drop_lucent_secrets(force=told)
