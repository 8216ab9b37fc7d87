"""What a leaked key sealed: a list of values to replace, whose lines close when they are.

A line keeps an HMAC of its value and never the value. It closes when another value is stored in its
row. Re-encryption keeps the value, so it closes nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from .. import _key_tables
from .._database.clock import database_time
from .._database.connection import ManagedConnection
from .._envelope import length_prefixed, parse
from ..exceptions import DecryptionError
from ..keyring import Keyring
from ..rotation.jobs import Reseal, SealedColumn
from ..rotation.targets import TargetTable
from ._receipts import KeyReceipt
from ._state import data_of, json_ready

_PURPOSE: Final = "leaks"
_BATCH: Final = 500

Outcome = Literal["replaced", "deleted"]


@dataclass(frozen=True)
class LeakedValue:
    """A value that a leaked key sealed."""

    table: str
    column: str
    primary_key: tuple[str, ...]
    owner: str | None
    """The row's ``owner_id``, if the model has one."""
    outcome: Outcome | None
    """``replaced`` by another value, ``deleted`` with its row, or ``None``: still to be done."""
    noted_at: datetime


@dataclass(frozen=True)
class LeakReport:
    """What a leaked key sealed, as far as the database can tell."""

    version: str
    since: datetime
    values: tuple[LeakedValue, ...]
    rotated_away: Mapping[str, int]
    """By column, how many values left the version before the leak was reported, by the receipts'
    counts. Their rows are not known, and their values may be as exposed."""
    unopened: int
    """Values under the version that did not open, and are in no line."""

    @property
    def open(self) -> tuple[LeakedValue, ...]:
        """The values that are still to be replaced."""
        return tuple(value for value in self.values if value.outcome is None)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as data that :func:`json.dumps` takes."""
        return {**data_of(self), "open": len(self.open)}


def note_leaked(
    database: ManagedConnection, tables: Iterable[TargetTable], version: str, keyring: Keyring
) -> int:
    """Note the values under `version`, and close the lines of those that were replaced.

    Returns how many values under it did not open.
    """
    notes = database.read(lambda connection: _read_notes(connection, version))
    unopened = 0
    open_notes = {line: note for line, note in notes.items() if note.outcome is None}
    gone = set(open_notes)
    changes: list[dict[str, Any]] = []
    for table in tables:
        for value in _values(database, table, keyring):
            gone.discard(value.line)
            try:
                change = _change(value, version, open_notes.get(value.line), keyring)
            except DecryptionError:
                unopened += value.version == version
                continue
            if change is not None:
                changes.append(change)
            if len(changes) == _BATCH:
                _write_notes(database, version, changes, notes.keys())
                changes = []
    changes += [{"line": line, "outcome": "deleted"} for line in sorted(gone)]
    _write_notes(database, version, changes, notes.keys())
    return unopened


@dataclass(frozen=True)
class _Value:
    """A stored value, and its line in the list."""

    place: str
    line: str
    owner: str | None
    version: str | None
    column: SealedColumn
    row: Sequence[Any]

    def mac(self, keyring: Keyring, signer: str) -> bytes:
        """Return the HMAC of the value in its place. Equal documents give equal ones."""
        document = json.loads(self.column.open(self.row) or b"null")
        message = json.dumps(document, sort_keys=True).encode("utf-8", "surrogatepass")
        return keyring.mac(signer, _PURPOSE, length_prefixed(self.line.encode(), message))


def _values(database: ManagedConnection, table: TargetTable, keyring: Keyring) -> Iterator[_Value]:
    job = Reseal(table, keyring, database.dialect, stale_only=False)
    has_owner = "owner_id" in table.clause.c
    for row in job.rows.every(database.read):
        key = [str(json_ready(part)) for part in job.rows.key_of(row)]
        owner = str(row.owner_id) if has_owner else None
        for column in job.sealed:
            stored = column.value(row)
            if stored is not None:
                place = json.dumps([table.name, column.name, key])
                line = hashlib.sha256(place.encode()).hexdigest()
                envelope = parse(stored)
                found = None if envelope is None else envelope.version
                yield _Value(place, line, owner, found, column, row)


def _change(
    value: _Value, version: str, note: sa.Row[Any] | None, keyring: Keyring
) -> dict[str, Any] | None:
    """Return what to write about a value, if anything.

    :param note: its line, if that is open.
    :raises DecryptionError: the value does not open.
    """
    primary = keyring.primary
    if note is None:
        if value.version != version:
            return None
    elif note.mac_version not in keyring.versions:
        return None  # nothing can tell
    else:
        is_same = hmac.compare_digest(value.mac(keyring, note.mac_version), bytes(note.mac))
        if value.version != version and not is_same:
            return {"line": value.line, "outcome": "replaced"}
        if is_same and note.mac_version == primary:
            return None
    return {
        "line": value.line,
        "place": value.place,
        "owner": value.owner,
        "mac": value.mac(keyring, primary),
        "mac_version": primary,
        "outcome": None,
    }


# -- the list --------------------------------------------------------------------------------------


def _read_notes(connection: sa.Connection, version: str) -> dict[str, sa.Row[Any]]:
    table = _key_tables.leaks
    rows = connection.execute(
        sa.select(table).where(table.c.version == version).order_by(table.c.place)
    )
    return {row.line: row for row in rows}


def _write_notes(
    database: ManagedConnection,
    version: str,
    changes: Sequence[dict[str, Any]],
    noted: Collection[str],
) -> None:
    table = _key_tables.leaks

    def write(connection: sa.Connection, known: Collection[str]) -> None:
        now = database_time(connection)
        new = [change for change in changes if change["line"] not in known]
        if new:
            facts = {"version": version, "noted_at": now}
            connection.execute(sa.insert(table), [{**change, **facts} for change in new])
        for change in changes:
            if change["line"] in known:
                closed_at = None if change["outcome"] is None else now
                own = sa.and_(table.c.version == version, table.c.line == change["line"])
                statement = sa.update(table).where(own)
                connection.execute(statement.values(**change, closed_at=closed_at))

    def attempt(_: int) -> None:
        try:
            with database.transaction() as connection:
                write(connection, noted)
        except IntegrityError:  # somebody else has just noted the same
            lines = [change["line"] for change in changes]
            is_line = sa.and_(table.c.version == version, table.c.line.in_(lines))
            with database.transaction() as connection:
                write(connection, set(connection.scalars(sa.select(table.c.line).where(is_line))))

    if changes:
        database.retry(attempt)


def report_leaked(
    connection: sa.Connection,
    version: str,
    since: datetime,
    receipts: Iterable[KeyReceipt],
    unopened: int,
) -> LeakReport:
    """Return the list as it stands."""
    values = []
    for row in _read_notes(connection, version).values():
        table, column, key = json.loads(row.place)
        values.append(LeakedValue(table, column, tuple(key), row.owner, row.outcome, row.noted_at))
    noted = Counter(f"{value.table}.{value.column}" for value in values)
    most = most_under(receipts, version)
    away = {name: count - noted[name] for name, count in most.items() if count > noted[name]}
    return LeakReport(version, since, tuple(values), away, unopened)


def most_under(receipts: Iterable[KeyReceipt], version: str) -> dict[str, int]:
    """Return, by column, the most values under `version` that any receipt counted."""
    most: dict[str, int] = {}
    for receipt in receipts:
        for name, counts in receipt.details.get("counts", {}).items():
            most[name] = max(most.get(name, 0), counts.get(version, 0))
    return most
