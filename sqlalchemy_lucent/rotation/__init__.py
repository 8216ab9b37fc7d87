"""Rotation: re-encrypt under the primary key, count rows per key, prove that every row opens.

``targets`` finds the columns; ``_table`` reads and re-seals rows, ``_write`` writes them back;
``_link`` talks to the database, ``_faults`` knows its errors, ``_throttle`` has the throttle;
``_scan`` goes through a table to count; ``engine`` runs a rotation; ``census`` counts and verifies;
``report`` holds what they return.
"""

from ._run import DEFAULT_BATCH_SIZE, arotate, rotate
from ._status import aretire_check, astatus, averify, needs_rotation, retire_check, status, verify
from .report import (
    FailedRow,
    RotationProgress,
    RotationReport,
    StatusReport,
    StatusRow,
    VerifyReport,
)

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "FailedRow",
    "RotationProgress",
    "RotationReport",
    "StatusReport",
    "StatusRow",
    "VerifyReport",
    "aretire_check",
    "arotate",
    "astatus",
    "averify",
    "needs_rotation",
    "retire_check",
    "rotate",
    "status",
    "verify",
]
