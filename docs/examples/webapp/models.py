"""What is stored: tenants, their integrations, and a signing secret for each."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import DateTime, ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_lucent import LucentBase, LucentSecrets, SecretKey, row_bound


def utc_now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """The service's own models."""


class Tenant(Base):
    """A customer of the service."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(80))


class Integration(Base):
    """Credentials that a tenant gave the service for a third party."""

    __tablename__ = "integrations"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    provider: Mapped[str] = mapped_column(String(40))
    name: Mapped[str] = mapped_column(String(80))
    # An EncryptedJSON column, sealed together with the row's id and tenant. Bytes copied into the
    # row of another tenant do not open there.
    credentials: Mapped[dict[str, Any]] = row_bound("id", "tenant_id")
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), default=utc_now, index=True
    )


TARGETS: Final = (Base, LucentBase)
"""All that the keys seal. A model that is not named here is neither rotated nor counted."""


def signing_secret_key(tenant_id: str) -> SecretKey:
    """Return the key of the secret that signs the webhooks to a tenant."""
    return LucentSecrets.key("tenant", tenant_id, "webhooks", "signingSecret")
