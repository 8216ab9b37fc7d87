"""Rotation: re-encrypt under the primary key, count values per key, prove that every value opens.

``targets`` finds the columns, ``rows`` reads their rows, ``jobs`` says what becomes of them,
``_updates`` writes them back, and ``_run`` drives all that in batches. ``_status`` counts and
verifies; ``report`` has what all of them return; ``plain`` reads and writes plaintext columns.
"""

from ._options import DEFAULT_BATCH_SIZE
from ._rotate import arotate, rotate
from ._run import run_in_transaction, run_jobs
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
    "run_in_transaction",
    "run_jobs",
    "status",
    "verify",
]
