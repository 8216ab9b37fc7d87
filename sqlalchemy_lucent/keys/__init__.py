"""A key's life: registered, ready, primary, draining, fenced, retired, as the database knows it.

``registry`` has the steps and ``_async`` runs them over an async engine. ``_store`` is the way to
the tables, ``_state`` reads keys, ``_receipts`` writes and proves what was done, ``_holders`` knows
which process has which key, ``_leaks`` what a leaked key sealed, and ``_following`` gives a process
the primary that the registry names.
"""

from ._async import AsyncAnnouncement, AsyncKeyRegistry
from ._following import FollowingKeyring
from ._holders import DEFAULT_QUIET, Announcement, KeyHolder, Readiness
from ._leaks import LeakedValue, LeakReport
from ._receipts import KeyReceipt, ReceiptFault, ReceiptsReport
from ._state import KeyCheck, RegisteredKey
from .registry import KeyRegistry

__all__ = [
    "DEFAULT_QUIET",
    "Announcement",
    "AsyncAnnouncement",
    "AsyncKeyRegistry",
    "FollowingKeyring",
    "KeyCheck",
    "KeyHolder",
    "KeyReceipt",
    "KeyRegistry",
    "LeakReport",
    "LeakedValue",
    "Readiness",
    "ReceiptFault",
    "ReceiptsReport",
    "RegisteredKey",
]
