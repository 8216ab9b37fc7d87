"""Fixtures of the documentation's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oauth import oauth_server

from . import key_managers as servers


@pytest.fixture
def key_managers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AWS KMS, HashiCorp Vault and Google Cloud KMS on this machine, for their own clients."""
    with (
        servers.aws() as aws_environ,
        servers.vault() as vault_environ,
        servers.google(tmp_path) as google_environ,
    ):
        for name, value in {**aws_environ, **vault_environ, **google_environ}.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def oauth_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An OAuth server on this machine, whose refresh tokens work once."""
    with oauth_server() as server:
        monkeypatch.setenv("PROVIDER_URL", server.url)
        yield
