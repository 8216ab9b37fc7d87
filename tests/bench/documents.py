"""The documents that the benchmarks store: another for each number, the same in each run."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

_ALPHABET = string.ascii_letters + string.digits


def small(number: int) -> dict[str, Any]:
    """An API key: 67 bytes of JSON."""
    rng = random.Random(number)
    return {"apiKey": "sk_live_" + _text(rng, 21), "account": "acct_" + _text(rng, 7)}


def medium(number: int) -> dict[str, Any]:
    """The shape and size of a Google service-account key: some 2.2 kB, with escaped line ends."""
    rng = random.Random(number)
    pem = "\n".join(_text(rng, 64) for _ in range(25))
    account = f"integration-{number}@project-{number % 100}.iam.example.com"
    return {
        "type": "service_account",
        "project_id": f"project-{number % 100}",
        "private_key_id": _text(rng, 40),
        "private_key": f"-----BEGIN PRIVATE KEY-----\n{pem}\n-----END PRIVATE KEY-----\n",
        "client_email": account,
        "client_id": str(rng.randrange(10**20, 10**21)),
        "auth_uri": "https://accounts.example.com/o/oauth2/auth",
        "token_uri": "https://oauth2.example.com/token",
        "auth_provider_x509_cert_url": "https://www.example.com/oauth2/v1/certs",
        "client_x509_cert_url": f"https://www.example.com/robot/v1/metadata/x509/{account}",
        "universe_domain": "example.com",
    }


def large(number: int) -> dict[str, Any]:
    """The settings of many integrations, nested and of every JSON type: some 64 kB."""
    rng = random.Random(number)
    return {
        "version": 3,
        "integrations": [
            {
                "id": f"int_{_text(rng, 16)}",
                "enabled": rng.random() < 0.9,
                "endpoint": f"https://api-{index}.example.com/v2/hooks",
                "credentials": {"user": f"svc-{index}", "password": _text(rng, 32)},
                "scopes": ["read", "write", f"tenant:{index}"],
                "retry": {"attempts": rng.randrange(1, 9), "factor": rng.random() * 4},
                "rotated_at": None,
                "notes": "Zugang für die Buchhaltung",
            }
            for index in range(201)
        ],
    }


DOCUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "small": small,
    "medium": medium,
    "large": large,
}


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(_ALPHABET, k=length))
