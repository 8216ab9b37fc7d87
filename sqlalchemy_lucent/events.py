"""Access events: they report each use of a secret to an audit, and never its value.

::

    def audit(access: SecretAccess, session: Session) -> None:
        session.execute(insert(audit_log).values(action=access.action, key=str(access.key), …))

    secrets = LucentSecrets(session, on_access=audit)

============  ================================================================  =================
action        reported after                                                    outcomes
============  ================================================================  =================
``read``      a value was opened, or failed to: ``get``, ``require``,           ``ok``,
              ``get_many``, the source of ``copy`` and ``move``, and what       ``missing``, or an
              ``promote``, ``restore`` and ``undelete`` read                    error's class name
``write``     a value was stored: ``set``, ``set_many``, the target of          ``ok``,
              ``copy`` and ``move``                                             ``conflict``
``delete``    a secret was deleted: ``delete``, ``delete_many``, the source     ``ok``,
              of ``move``                                                       ``missing``,
                                                                                ``conflict``
``rotate``    a value was sealed again: ``rotate``, ``rotate_many``             ``ok``
``renew``     a provider's answer was stored, or there was none: ``fresh`` of   ``ok``, ``late``,
              ``Renewals``                                                      ``conflict``, or an
                                                                                error's class name
``stage``     a value was stored to be tried                                    ``ok``
``promote``   the staged value became the secret                                ``ok``,
                                                                                ``missing``
``restore``   an earlier version became the secret                              ``ok``,
                                                                                ``missing``
``undelete``  a deleted secret came back                                        ``ok``,
                                                                                ``missing``,
                                                                                ``conflict``
``purge``     a deleted secret was purged with its versions                     ``ok``
============  ================================================================  =================

A renewal is ``late`` if its lease had passed to another caller, and a ``conflict`` if another value
was stored meanwhile. It is reported after the commit, with a session of its own.

``exists``, ``info``, ``list``, ``due``, ``versions`` and ``count`` open nothing and report nothing.
Errors of the database are raised and not reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from sqlalchemy.orm import Session

from .secret_key import SecretKey

Action: TypeAlias = Literal[
    "read",
    "write",
    "delete",
    "rotate",
    "renew",
    "stage",
    "promote",
    "restore",
    "undelete",
    "purge",
]


@dataclass(frozen=True)
class SecretAccess:
    """One use of one secret.

    `key_version` is that of the value read or written; ``None`` if it was deleted or is missing.
    `time` is in UTC. `outcome` is ``ok``, ``missing``, ``conflict`` (a compare-and-swap lost), or
    the name of the error's class if the value did not open, such as ``TamperedError``.
    """

    action: Action
    key: SecretKey
    key_version: str | None
    time: datetime
    outcome: str


AccessHandler: TypeAlias = Callable[[SecretAccess, Session], None]
"""
Called with each access and the repository's session (of an ``AsyncSession``, its synchronous
session), inside the caller's transaction. If it raises, the operation is undone and the caller gets
the exception.
"""
