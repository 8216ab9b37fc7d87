"""The tables of the key registry: keys, the processes that hold them, receipts, and leaks.

They are of the core because migrations create them and the registry, above, uses them.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table, Text

from .models import UTCDateTime, key_version_type

key_metadata: Final = MetaData()

keys: Final = Table(
    "lucent_keys",
    key_metadata,
    Column("version", key_version_type(), primary_key=True),
    Column("check_id", LargeBinary, nullable=False),
    Column("state", String(16), nullable=False),
    Column("canary", LargeBinary, nullable=False),
    Column("registered_at", UTCDateTime, nullable=False),
    Column("promoted_at", UTCDateTime),
    Column("fenced_at", UTCDateTime),
    Column("retired_at", UTCDateTime),
    Column("leaked_since", UTCDateTime),
)

holders: Final = Table(
    "lucent_key_holders",
    key_metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(64), nullable=False),
    Column("host", String(255), nullable=False),
    # JSON: the check id of each key by its version, since another key may have the version's name.
    Column("versions", Text, nullable=False),
    Column("primary_version", key_version_type(), nullable=False),
    Column("seen_at", UTCDateTime, nullable=False),
)

receipts: Final = Table(
    "lucent_key_receipts",
    key_metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", UTCDateTime, nullable=False),
    Column("action", String(16), nullable=False),
    Column("version", key_version_type(), nullable=False),
    Column("body", Text, nullable=False),
    Column("mac", LargeBinary, nullable=False),
)

leaks: Final = Table(
    "lucent_key_leaks",
    key_metadata,
    Column("version", key_version_type(), primary_key=True),
    # The hash of the place, because a primary key of any length cannot be a part of this one.
    Column("line", String(64), primary_key=True),
    Column("place", Text, nullable=False),  # JSON: table, column, primary key
    Column("owner", Text),
    Column("mac", LargeBinary, nullable=False),
    Column("mac_version", key_version_type(), nullable=False),
    Column("noted_at", UTCDateTime, nullable=False),
    Column("closed_at", UTCDateTime),
    Column("outcome", String(16)),
)


def key_tables(metadata: MetaData, *, schema: str | None = None) -> list[Table]:
    """Return copies of the tables, for migrations."""
    # mypy knows of no schema `None`, which SQLAlchemy takes.
    own: Any = schema
    return [table.to_metadata(metadata, schema=own) for table in key_metadata.sorted_tables]
