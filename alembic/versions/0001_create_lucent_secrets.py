"""create lucent_secrets

Revision ID: 0001
Revises:
Create Date: 2026-11-23
"""

from __future__ import annotations

from alembic import context, op

from sqlalchemy_lucent import RotationError

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_lucent_secrets()


def downgrade() -> None:
    """Drop the table if it is empty; with ``-x drop_secrets=yes``, drop its secrets too."""
    told = context.get_x_argument(as_dictionary=True).get("drop_secrets") == "yes"
    try:
        op.drop_lucent_secrets(force=told)
    except RotationError as error:
        fault = f"{error}. In this environment that is: alembic -x drop_secrets=yes downgrade base"
    else:
        return
    raise RotationError(fault)
