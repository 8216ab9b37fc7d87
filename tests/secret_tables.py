"""The tables of scoped secrets, and two keys, for the tests that share them."""

from __future__ import annotations

import sqlalchemy as sa

from sqlalchemy_lucent import LucentSecret, SecretKey
from sqlalchemy_lucent._lifecycle import required_tables

KEY = SecretKey("tenant", "t1", "stripe", "apiKey")
OTHER = SecretKey("tenant", "t2", "stripe", "apiKey")
SECRETS: sa.Table = LucentSecret.__table__  # type: ignore[assignment]
VERSIONS, STATES = required_tables(SECRETS)
