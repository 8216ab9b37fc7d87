"""Made-up tenants and credentials, enough of them to watch a rotation."""

from __future__ import annotations

import itertools
import secrets
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import insert
from sqlalchemy.orm import Session

from sqlalchemy_lucent import LucentSecrets, bound_rows

from .models import Integration, Tenant, signing_secret_key, utc_now

PROVIDERS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "github": lambda: {"appId": secrets.randbelow(10**6), "privateKey": token("pem")},
    "googleDrive": lambda: {
        "type": "service_account",
        "client_email": "sync@example-project.iam.gserviceaccount.com",
        "private_key": token("pem"),
    },
    "slack": lambda: {"botToken": token("xoxb"), "scopes": ["chat:write", "users:read"]},
    "stripe": lambda: {"apiKey": token("sk"), "account": "acct_demo"},
}
"""The third parties, each with a function that makes credentials for it."""

TENANTS: Final = {
    "birch": "Birch & Daughters",
    "copper": "Copper Kettle Tea",
    "fjord": "Fjord Logistics",
    "harbor": "Harbor Street Books",
    "juniper": "Juniper Health",
    "meadow": "Meadow Farms",
    "nimbus": "Nimbus Weather",
    "quarry": "Quarry Stoneworks",
}
"""The tenants: names by id."""

_PURPOSES: Final = ("production", "staging", "reports", "backup", "support desk")


def token(prefix: str) -> str:
    """Return a random token, of no use anywhere."""
    return f"{prefix}_demo_{secrets.token_urlsafe(24)}"


def new_signing_secret() -> dict[str, str]:
    """Return a new secret to sign webhooks with."""
    return {"secret": token("whsec")}


def seed(session: Session, rows: int) -> None:
    """Store the tenants, `rows` integrations, and a signing secret for each tenant."""
    session.add_all(Tenant(id=id_, name=name) for id_, name in TENANTS.items())
    session.flush()
    # One statement for all rows, without an object for each.
    session.execute(insert(Integration), bound_rows(Integration, _integrations(rows)))
    LucentSecrets(session).set_many(
        {signing_secret_key(tenant_id): new_signing_secret() for tenant_id in TENANTS}
    )


def _integrations(rows: int) -> Iterator[dict[str, Any]]:
    latest = utc_now()
    kinds = itertools.cycle(itertools.product(_PURPOSES, PROVIDERS, TENANTS))
    for number, (purpose, provider, tenant_id) in enumerate(itertools.islice(kinds, rows), 1):
        yield {
            "id": uuid.uuid4(),
            "tenant_id": tenant_id,
            "provider": provider,
            "name": f"{purpose} {number}",
            "credentials": PROVIDERS[provider](),
            "created_at": latest - timedelta(minutes=rows - number),
        }
