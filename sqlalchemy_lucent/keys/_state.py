"""The keys of the registry and their states, and the check of a process's own keys against them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa

from .. import _key_tables
from .._envelope import length_prefixed
from ..exceptions import (
    DecryptionError,
    KeyStateError,
    TamperedError,
    UnknownKeyVersionError,
    WrongKeyError,
    hide_locals,
)
from ..keyring import Keyring

State = Literal["registered", "ready", "primary", "draining", "fenced", "retired"]

VERBS: Final[Mapping[str, str]] = {"fenced": "fence", "retired": "retire"}
"""The step that leads to a state."""

_CANARY_CONTEXT: Final = "lucent_keys.canary"


@dataclass(frozen=True)
class RegisteredKey:
    """A key as the registry has it."""

    version: str
    state: State
    check_id: str
    """32 hex digits that tell the key from every other one. They do not show it."""
    registered_at: datetime
    promoted_at: datetime | None
    fenced_at: datetime | None
    retired_at: datetime | None
    leaked_since: datetime | None
    canary: bytes = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the key as data that :func:`json.dumps` takes."""
        return {name: value for name, value in data_of(self).items() if name != "canary"}


@dataclass(frozen=True)
class KeyCheck:
    """The result of a check that found nothing wrong."""

    keys: tuple[RegisteredKey, ...]
    notes: tuple[str, ...]
    """What does not fail this process, and should be put right: a missing fence, for instance."""


def json_ready(value: object) -> object:
    """Return a time as text, and anything else as it is."""
    return value.isoformat(timespec="microseconds") if isinstance(value, datetime) else value


def data_of(result: object) -> dict[str, Any]:
    """Return the attributes of a result as data that :func:`json.dumps` takes."""
    return {name: _data(value) for name, value in vars(result).items()}


def _data(value: object) -> object:
    if is_dataclass(value):
        return data_of(value)
    return [_data(member) for member in value] if isinstance(value, tuple) else json_ready(value)


def read_keys(connection: sa.Connection) -> dict[str, RegisteredKey]:
    """Return the keys by version, in the order of their registration."""
    table = _key_tables.keys
    rows = connection.execute(sa.select(table).order_by(table.c.registered_at, table.c.version))
    return {
        row.version: RegisteredKey(
            row.version,
            row.state,
            bytes(row.check_id).hex(),
            row.registered_at,
            row.promoted_at,
            row.fenced_at,
            row.retired_at,
            row.leaked_since,
            bytes(row.canary),
        )
        for row in rows
    }


def primary_of(keys: Mapping[str, RegisteredKey]) -> str | None:
    """Return the version of the primary; ``None`` if no key was registered yet."""
    return next((key.version for key in keys.values() if key.state == "primary"), None)


def add_key(
    connection: sa.Connection, keyring: Keyring, version: str, state: State, now: datetime
) -> None:
    """Register the keyring's key of `version`."""
    connection.execute(
        sa.insert(_key_tables.keys).values(
            version=version,
            check_id=keyring.check_id(version),
            state=state,
            canary=_seal_canary(keyring, version),
            registered_at=now,
            promoted_at=now if state == "primary" else None,
        )
    )


def change_state(connection: sa.Connection, version: str, state: State, **times: Any) -> None:
    """Write the state of a key, and the times that go with it."""
    table = _key_tables.keys
    statement = sa.update(table).where(table.c.version == version)
    connection.execute(statement.values(state=state, **times))


def require_key(keys: Mapping[str, RegisteredKey], version: object) -> RegisteredKey:
    """Return the key of `version`.

    :raises KeyStateError: the registry lacks it.
    """
    found = keys.get(version) if isinstance(version, str) else None
    if found is None:
        known = ", ".join(map(repr, keys)) or "no key"
        raise KeyStateError(
            f"the key registry does not know the given version; it has {known}. Add the key to the "
            "keyring, and register() it"
        )
    return found


@hide_locals
def require_same_keys(keys: Mapping[str, RegisteredKey], keyring: Keyring) -> None:
    """Refuse a keyring that has another key under a version's name, or a line that was changed.

    :raises WrongKeyError: it has another key.
    :raises TamperedError: the registry's line was changed, or its canary was replaced.
    """
    for version, key in keys.items():
        if version not in keyring.versions:
            continue
        opens = _opens_canary(keyring, key)
        if keyring.check_id(version).hex() == key.check_id:
            if not opens:
                raise TamperedError(
                    f"the canary of key version {version!r} in lucent_keys does not open, though "
                    "this process has the key that was registered: the canary was replaced. "
                    "Restore the line from a backup, and find out who wrote it"
                )
        elif opens:
            raise TamperedError(
                f"the check id of key version {version!r} in lucent_keys is not that of its key, "
                "which opens its canary: the line was changed. Restore it from a backup, and find "
                "out who wrote it"
            )
        else:
            raise WrongKeyError(
                f"this process has another key under the name {version!r} than the one that was "
                f"registered (fingerprint {keyring.fingerprint(version)}; its check id is "
                f"{keyring.check_id(version).hex()}, the registry's {key.check_id}). Put the "
                "registered key back; a new key needs a new version"
            )


def require_own(keyring: Keyring, version: str, purpose: str) -> None:
    """Refuse a step for which this process lacks a key.

    :raises UnknownKeyVersionError: it does.
    """
    if version not in keyring.versions:
        raise UnknownKeyVersionError(
            f"this process lacks key version {version!r}, {purpose}; it has "
            f"{', '.join(map(repr, keyring.versions))}. Add the key to its keyring"
        )


def refuse_primary(key: RegisteredKey, verb: str) -> None:
    """Refuse to end the key that seals."""
    if key.state == "primary":
        raise KeyStateError(
            f"key version {key.version!r} is the primary, under which processes seal: promote() "
            f"another key and rotate, then {verb} this one"
        )


def signer_of(keys: Mapping[str, RegisteredKey], keyring: Keyring) -> str:
    """Return the version whose key signs receipts: the primary."""
    signer = primary_of(keys)
    if signer is None:
        raise KeyStateError("no key is registered yet: call register() first")
    require_own(keyring, signer, "the primary, which signs the receipt of this step")
    return signer


def notes_on(
    keys: Mapping[str, RegisteredKey],
    keyring: Keyring,
    fenced: Mapping[str, tuple[list[str], list[str]]],
) -> Iterator[str]:
    """Say what does not fail a process that has `keyring`, and should be put right.

    :param fenced: by version, the columns that refuse it, and those that do not.
    """
    for version in keyring.versions:
        if version not in keys:
            yield f"key version {version!r} is not registered: register() it"
    primary = primary_of(keys)
    if primary not in (None, keyring.primary):
        yield (
            f"this process's primary is {keyring.primary!r}, the registry's {primary!r}: use "
            "Keyring.following(), or deploy the keyring with that primary"
        )
    for key in keys.values():
        if key.leaked_since is not None:
            yield f"key version {key.version!r} has leaked: leaked() lists what to replace"
        if key.state == "retired" and key.version in keyring.versions:
            yield f"key version {key.version!r} is retired: take its key out of this process"
        refusing, others = fenced[key.version]
        is_ended = key.state in ("fenced", "retired")
        if is_ended and others:
            yield (
                f"key version {key.version!r} is {key.state}, and {', '.join(others)} has no "
                f"fence against it: call {VERBS[key.state]}() again"
            )
        if not is_ended and refusing:
            yield (
                f"key version {key.version!r} is {key.state}, and {', '.join(refusing)} has a "
                "fence against it: a step did not end, or a migration added it. Call fence() "
                "or retire() to go on, or unfence() to drop it"
            )


# -- the canary ------------------------------------------------------------------------------------


def _canary_row(version: str) -> bytes:
    return length_prefixed(version.encode("ascii"))


def _seal_canary(keyring: Keyring, version: str) -> bytes:
    """Seal an ordinary value, in a context of its own, bound to the version."""
    document = json.dumps({"canary": version}).encode()
    keys = keyring.with_oldest(None).with_primary(version).for_context(_CANARY_CONTEXT)
    return keys.seal(document, _canary_row(version))


def _opens_canary(keyring: Keyring, key: RegisteredKey) -> bool:
    version = key.version
    try:
        keys = keyring.with_oldest(None).for_context(_CANARY_CONTEXT)  # whatever is retired
        opened = keys.open(key.canary, _canary_row(version))
    except DecryptionError:
        return False
    sealed_under = key.canary.partition(b":")[0]
    return sealed_under == version.encode("ascii") and json.loads(opened) == {"canary": version}
