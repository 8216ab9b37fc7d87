"""What tests of the key registry share: a table with sealed values, and a registry beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from sqlalchemy_lucent import EncryptedJSON, KeyRegistry, Keyring, rotate, set_default_keyring
from tests.conftest import KEY_1, KEY_2

metadata = sa.MetaData()
documents = sa.Table(
    "documents",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("owner_id", sa.String(20)),
    sa.Column("body", EncryptedJSON()),
)

V1 = Keyring({"v1": KEY_1})
BOTH = V1.adding("v2", KEY_2)
V2 = BOTH.with_primary("v2")


def put(engine: sa.Engine, keyring: Keyring, *ids: int, **value: Any) -> None:
    """Insert rows as a process with that keyring does."""
    with using(keyring), engine.begin() as connection:
        body = value or {"token": "MARKER-plaintext"}
        connection.execute(documents.insert(), [{"id": n, "body": body} for n in ids])


@contextmanager
def using(keyring: Keyring) -> Iterator[None]:
    """Make it the default keyring for a while."""
    set_default_keyring(keyring)
    try:
        yield
    finally:
        set_default_keyring(V1)


def create(engine: sa.Engine, rows: int = 3) -> None:
    """Create the tables, with rows under v1."""
    metadata.create_all(engine)
    KeyRegistry.metadata.create_all(engine)
    if rows:
        put(engine, V1, *range(1, rows + 1))


def registry(engine: sa.Engine, keyring: Keyring = BOTH) -> KeyRegistry:
    """Return the registry, as a process with that keyring has it."""
    return KeyRegistry(engine, targets=metadata, keyring=keyring)


def promoted(engine: sa.Engine) -> KeyRegistry:
    """Return a registry in which v2 was promoted, with v1 draining; nothing is rotated yet."""
    own = registry(engine)
    own.register()
    with own.announce("web"):
        own.promote("v2", kinds=["web"])
    return own


def rotated(engine: sa.Engine) -> KeyRegistry:
    """Return a registry in which v2 was promoted, and every value is under it."""
    own = promoted(engine)
    assert rotate(engine, metadata, keyring=V2).ok
    return own


def states(own: KeyRegistry) -> dict[str, str]:
    return {key.version: key.state for key in own.registered()}


def under(engine: sa.Engine, version: str) -> int:
    """How many values are under a version."""
    body = documents.c.body
    with engine.connect() as connection:
        counted = sa.select(sa.func.count()).where(body.key_version == version)
        return connection.scalar(counted) or 0


def take(own: KeyRegistry, step: str) -> None:
    """Take one step."""
    arguments = {"register": (), "promote": ("v2",)}.get(step, ("v1",))
    getattr(own, step)(*arguments)
