"""What a rotation, a count and a verification return: plain data, never a value of a row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FailedRow:
    """A value that did not open, and was left as it is."""

    table: str
    column: str
    primary_key: tuple[Any, ...]
    error: str
    """Name of the error's class, such as ``TamperedError``."""


@dataclass(frozen=True)
class RotationProgress:
    """Where a rotation stands after a batch."""

    table: str
    rotated: int
    """Values re-encrypted so far, over all tables."""
    failed: int
    """Values in this table that did not open, in the current pass."""


@dataclass(frozen=True)
class RotationReport:
    """The end of a rotation."""

    key_version: str
    """The version that everything is sealed under now, but for what failed or remains."""
    rotated: int
    """Values re-encrypted by this run."""
    failed: tuple[FailedRow, ...]
    """Values that did not open."""
    remaining: int
    """Values that are still not under the primary key, those in `failed` included."""

    @property
    def ok(self) -> bool:
        """Whether nothing is left to do."""
        return self.remaining == 0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data (primary keys as the driver gave them)."""
        return {**dataclasses.asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class StatusRow:
    """
    How many values of a column are sealed under one key.

    ``key_version`` and ``fingerprint`` are ``None`` for values that are not sealed.
    """

    table: str
    column: str
    key_version: str | None
    fingerprint: str | None
    count: int


@dataclass(frozen=True)
class StatusReport:
    """Values per table, column and key."""

    rows: tuple[StatusRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class VerifyReport:
    """The end of a verification."""

    opened: int
    """Values that opened."""
    failed: tuple[FailedRow, ...]
    """Values that did not."""

    @property
    def ok(self) -> bool:
        """Whether every value opened."""
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data (primary keys as the driver gave them)."""
        return {**dataclasses.asdict(self), "ok": self.ok}
