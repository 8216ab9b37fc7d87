"""create the tables of versions and states beside lucent_secrets

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-26
"""

from __future__ import annotations

from alembic import context, op

from sqlalchemy_lucent import RotationError

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.upgrade_lucent_secrets()


def downgrade() -> None:
    """Drop the tables if they hold no version; with ``-x drop_secrets=yes``, drop versions too."""
    told = context.get_x_argument(as_dictionary=True).get("drop_secrets") == "yes"
    try:
        op.downgrade_lucent_secrets(force=told)
    except RotationError as error:
        fault = f"{error}. In this environment that is: alembic -x drop_secrets=yes downgrade 0002"
    else:
        return
    raise RotationError(fault)
