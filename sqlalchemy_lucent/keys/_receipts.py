"""Receipts: a line for each step, chained by hashes, each with an HMAC under the primary key.

A line's body is canonical JSON: sorted names, no spaces, ASCII. It names the line before by the
hash of its body and MAC. The MAC proves who wrote a line, the chain that none is missing before it.
So a line whose key is gone is proven by any later line that a known key signed.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from .. import _key_tables
from ..exceptions import ConfigurationError
from ..keyring import Keyring
from ._state import RegisteredKey, data_of, json_ready, signer_of

_PURPOSE: Final = "receipts"
_FIRST: Final = "0" * 64
"""The hash before the first line."""


@dataclass(frozen=True)
class KeyReceipt:
    """One step, as it was written down."""

    seq: int
    at: datetime
    action: str
    version: str
    body: str
    """Canonical JSON, as it was signed."""
    mac: str

    @property
    def hash(self) -> str:
        """What the next line names this one by."""
        return hashlib.sha256(self.body.encode() + bytes.fromhex(self.mac)).hexdigest()

    @property
    def head(self) -> str:
        """The line's number and hash. Kept elsewhere, it proves the lines up to this one."""
        return f"{self.seq}:{self.hash}"

    @property
    def details(self) -> dict[str, Any]:
        """The body as data; empty if it is not JSON any more."""
        with suppress(ValueError):
            found = json.loads(self.body)
            if isinstance(found, dict):
                return found
        return {}

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as data that :func:`json.dumps` takes."""
        return {**data_of(self), "body": self.details or self.body, "hash": self.hash}


@dataclass(frozen=True)
class ReceiptFault:
    """What is wrong with one line."""

    seq: int
    fault: str
    """``changed``, ``removed``, ``reordered``, ``replaced``, ``unproven`` or ``cut``."""
    reason: str


@dataclass(frozen=True)
class ReceiptsReport:
    """The result of proving the receipts."""

    lines: int
    head: str | None
    """The head of the last line; ``None`` if there is none. Keep it elsewhere."""
    faults: tuple[ReceiptFault, ...]

    @property
    def ok(self) -> bool:
        """Whether every line is as it was written, where it was written."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that :func:`json.dumps` takes."""
        return {**data_of(self), "ok": self.ok}


def append_receipt(
    connection: sa.Connection,
    keyring: Keyring,
    keys: Mapping[str, RegisteredKey],
    action: str,
    version: str,
    at: datetime,
    **details: Any,
) -> None:
    """Write the next line, in the transaction of its step.

    :raises UnknownKeyVersionError: the keyring lacks the primary, which signs it.
    :raises sqlalchemy.exc.IntegrityError: another process has just written a line.
    """
    signer = signer_of(keys, keyring)
    table = _key_tables.receipts
    last = _lines(connection, sa.select(table).order_by(table.c.seq.desc()).limit(1))
    seq, previous = (last[0].seq + 1, last[0].hash) if last else (1, _FIRST)
    facts = {
        "seq": seq,
        "at": json_ready(at),
        "action": action,
        "version": version,
        "key": signer,
        "previous": previous,
        "who": _who(connection),
        **details,
    }
    body = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    mac = keyring.mac(signer, _PURPOSE, body.encode())
    connection.execute(
        sa.insert(table).values(seq=seq, at=at, action=action, version=version, body=body, mac=mac)
    )


def _who(connection: sa.Connection) -> dict[str, str]:
    user = f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"
    with suppress(Exception):  # a container may have no name for its user
        user = getpass.getuser()
    who = {"user": user, "host": socket.gethostname()}
    if connection.dialect.name != "sqlite":
        who["database_user"] = str(connection.scalar(sa.text("SELECT CURRENT_USER")))
    return who


def read_receipts(connection: sa.Connection) -> tuple[KeyReceipt, ...]:
    """Return all lines in the order of their numbers."""
    table = _key_tables.receipts
    return _lines(connection, sa.select(table).order_by(table.c.seq))


def _lines(connection: sa.Connection, statement: sa.Select[Any]) -> tuple[KeyReceipt, ...]:
    return tuple(
        KeyReceipt(row.seq, row.at, row.action, row.version, row.body, bytes(row.mac).hex())
        for row in connection.execute(statement)
    )


# -- proof -----------------------------------------------------------------------------------------


def prove(lines: Sequence[KeyReceipt], keyring: Keyring, head: str | None) -> ReceiptsReport:
    """Say of each line whether it is as it was written, where it was written.

    :param head: a :attr:`KeyReceipt.head` that was kept elsewhere.
    :raises ConfigurationError: `head` is not one.
    """
    kept = None if head is None else _parse_head(head)
    faults: list[ReceiptFault] = []
    placed: dict[int, KeyReceipt] = {}  # what holds, by the number that it was written under
    unsigned: set[int] = set()  # those that this keyring has no key for
    for line in lines:
        fault = _fault_of(line, keyring)
        if fault is not None:
            faults.append(fault)
        if fault is None or fault.fault != "reordered":
            placed[line.seq] = line
        else:
            placed.setdefault(line.details["seq"], line)
        if fault is None and line.details["key"] not in keyring.versions:
            unsigned.add(line.seq)
    last = max(placed, default=0)
    faults += [
        ReceiptFault(seq, "removed", f"line {seq} is missing")
        for seq in range(1, last + 1)
        if seq not in placed
    ]
    faulty = {fault.seq for fault in faults}
    for seq in range(last, 0, -1):
        found = _fault_of_link(placed, seq, faulty, unsigned)
        if found is not None:
            faulty.add(seq)
            faults.append(found)
    if kept is not None:
        faults += _fault_of_head(placed, last, *kept)
    faults.sort(key=lambda fault: fault.seq)
    return ReceiptsReport(len(lines), lines[-1].head if lines else None, tuple(faults))


def _fault_of(line: KeyReceipt, keyring: Keyring) -> ReceiptFault | None:
    """Return what is wrong with a line by itself."""
    body = line.details
    signer = body.get("key")
    if not isinstance(signer, str) or not isinstance(body.get("seq"), int):
        return ReceiptFault(line.seq, "changed", f"line {line.seq} is not a receipt any more")
    if signer in keyring.versions:
        mac = keyring.mac(signer, _PURPOSE, line.body.encode())
        if not hmac.compare_digest(mac.hex(), line.mac):
            return ReceiptFault(
                line.seq,
                "changed",
                f"line {line.seq} was changed or forged: its MAC is not that of key {signer!r}",
            )
    if body["seq"] != line.seq:
        return ReceiptFault(
            line.seq, "reordered", f"line {line.seq} was written as line {body['seq']}"
        )
    columns = {"at": json_ready(line.at), "action": line.action, "version": line.version}
    wrong = [name for name, value in columns.items() if body.get(name) != value]
    if wrong:
        return ReceiptFault(
            line.seq,
            "changed",
            f"line {line.seq} was changed: {', '.join(wrong)} differ from what was signed",
        )
    return None


def _fault_of_link(
    placed: Mapping[int, KeyReceipt], seq: int, faulty: set[int], unsigned: set[int]
) -> ReceiptFault | None:
    """Return what the line after `seq` says against the line at `seq`, which looks right alone."""
    line, after = placed.get(seq), placed.get(seq + 1)
    if line is None or seq in faulty:
        return None
    if after is None or seq + 1 in faulty:
        if seq not in unsigned:
            return None
        return ReceiptFault(
            seq,
            "unproven",
            f"line {seq} was signed by key {line.details['key']!r}, which this keyring lacks, and "
            "no later line proves it. Verify with that key",
        )
    expected = line.hash
    if after.details["previous"] == expected and (seq > 1 or line.details["previous"] == _FIRST):
        return None
    return ReceiptFault(
        seq, "replaced", f"line {seq} is not the one that line {seq + 1} was written after"
    )


def _parse_head(head: str) -> tuple[int, str]:
    number, _, digest = head.partition(":") if isinstance(head, str) else ("", "", "")
    if not number.isdecimal() or len(digest) != len(_FIRST):
        raise ConfigurationError(
            "head= takes the head of a receipt, a number and a hash, as verify_receipts() and "
            "receipts()[-1].head give it"
        )
    return int(number), digest.lower()


def _fault_of_head(
    placed: Mapping[int, KeyReceipt], last: int, seq: int, digest: str
) -> list[ReceiptFault]:
    if seq > last:
        return [
            ReceiptFault(each, "cut", f"line {each} is missing, and the head names line {seq}")
            for each in range(last + 1, seq + 1)
        ]
    found = placed.get(seq)
    if found is None or found.hash == digest:
        return []
    return [ReceiptFault(seq, "replaced", f"line {seq} is not the one that the head names")]
