"""Rotation: re-encrypt under the primary key, count values per key, prove that every value opens.

``targets`` finds the columns, ``rows`` reads their rows, ``jobs`` computes new values, ``_updates``
writes them, and ``_run`` repeats that in batches, at the pace of ``throttle``. ``_status`` counts
and verifies. ``plain`` reads and writes plaintext columns.
"""

from ._options import DEFAULT_BATCH_SIZE, check_rows, is_wait, keyring_of, names_of
from ._run import arotate, rotate, run_in_transaction, run_jobs
from ._status import (
    aretire_check,
    astatus,
    averify,
    count_version,
    needs_rotation,
    require_unused,
    retire_check,
    status,
    verify,
)
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
    "check_rows",
    "count_version",
    "is_wait",
    "keyring_of",
    "names_of",
    "needs_rotation",
    "require_unused",
    "retire_check",
    "rotate",
    "run_in_transaction",
    "run_jobs",
    "status",
    "verify",
]
