"""The results of a rotation, a count and a verification: plain data, without values of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

MAX_FAILED: Final = 1000
"""Failures that a report names. It counts all of them, in constant memory."""


@dataclass(frozen=True)
class FailedRow:
    """A value that did not open, or that the database did not change. It was left as it is."""

    table: str
    column: str
    primary_key: tuple[Any, ...]
    error: str
    """The name of the error's class, such as ``TamperedError``."""
    key_version: str | None = None
    """The key version that it is sealed under; ``None`` if it is not sealed."""
    fingerprint: str | None = None
    """The fingerprint of that key."""
    reason: str | None = None
    """Why the database refused to change the row, or why no rotation can."""


class Failures:
    """The first failures, and the number of all."""

    def __init__(self) -> None:
        self.named: list[FailedRow] = []
        self.count = 0

    def add(self, failed: Iterable[FailedRow]) -> None:
        """Count `failed`, and name them while there is room."""
        for row in failed:
            self.count += 1
            if len(self.named) < MAX_FAILED:
                self.named.append(row)

    def merge(self, other: Failures) -> None:
        """Add the failures of `other`."""
        self.named += other.named[: MAX_FAILED - len(self.named)]
        self.count += other.count


@dataclass(frozen=True)
class RotationProgress:
    """The state of a rotation after a batch."""

    table: str
    rotated: int
    """Values re-encrypted so far, over all tables."""
    failed: int
    """Values in this table that failed, in the current pass."""
    total: int
    """Values to re-encrypt when the run began, over all tables. Writers may have changed it."""
    rate: float
    """Values re-encrypted per second, since the run began."""
    seconds_left: float | None
    """An estimate from `total` and `rate`; ``None`` until something was re-encrypted."""


@dataclass(frozen=True)
class RotationReport:
    """The result of a rotation."""

    key_version: str
    """The primary key's version."""
    rotated: int
    """Values re-encrypted by this run; in a dry run, those that would be."""
    failed: tuple[FailedRow, ...]
    """Values that did not open, or that the database did not change: the first 1,000 of them."""
    failed_count: int
    """How many values failed."""
    remaining: int
    """Values that are not under the primary key, including those that failed; in a dry run, those
    that a rotation would leave so."""
    stopped: bool = False
    """Whether ``stop_when`` ended the run."""
    dry_run: bool = False
    left_out: tuple[str, ...] = ()
    """Targets that are views, materialized views or foreign tables, which were not read."""

    @property
    def ok(self) -> bool:
        """Whether nothing is left to do."""
        return self.remaining == 0

    def __str__(self) -> str:
        if self.dry_run:
            text = f"dry run: would re-encrypt {_values(self.rotated)} under {self.key_version}"
        else:
            result = "ok" if self.ok else "not ok"
            text = f"{result}: re-encrypted {_values(self.rotated)} under {self.key_version}"
        if self.remaining:
            text += f"; {self.remaining} not under it"
        if self.failed_count:
            text += f"; {self.failed_count} failed"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that :func:`json.dumps` takes."""
        return {**_as_dict(self), "ok": self.ok}


@dataclass(frozen=True)
class StatusRow:
    """How many values of a column are sealed under one key.

    ``key_version`` and ``fingerprint`` are ``None`` for values that are not sealed: plaintext, or
    what another library wrote.
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
    left_out: tuple[str, ...] = ()
    """As in :class:`RotationReport`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that :func:`json.dumps` takes."""
        return _as_dict(self)


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification."""

    opened: int
    """Values that opened."""
    failed: tuple[FailedRow, ...]
    """Values that did not: the first 1,000 of them."""
    failed_count: int
    """How many values did not open."""
    left_out: tuple[str, ...] = ()
    """As in :class:`RotationReport`."""

    @property
    def ok(self) -> bool:
        """Whether every value opened."""
        return self.failed_count == 0

    def __str__(self) -> str:
        text = f"{'ok' if self.ok else 'not ok'}: opened {_values(self.opened)}"
        return text if self.ok else f"{text}; {self.failed_count} did not open"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that :func:`json.dumps` takes."""
        return {**_as_dict(self), "ok": self.ok}


def _values(count: int) -> str:
    return f"{count} value" if count == 1 else f"{count} values"


def _as_dict(report: Any) -> dict[str, Any]:
    return {
        field.name: _json_ready(getattr(report, field.name)) for field in dataclasses.fields(report)
    }


def _json_ready(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _as_dict(value)
    if isinstance(value, (tuple, list)):
        return [_json_ready(member) for member in value]
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    # A primary key may be a UUID, a date, a decimal …: its text identifies the row.
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
