"""The keys of a column: seal a value, find the key that opens one, or say why none does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from ._aead import MasterKey
from ._envelope import as_bytes, header_size, is_older, parse
from .exceptions import (
    ConfigurationError,
    DecryptionError,
    NotSealedError,
    RetiredKeyError,
    TamperedError,
    UnknownKeyVersionError,
    WrongKeyError,
)

_VERIFY: Final = "verify() lists the rows that do not open"
_OTHER_FORMAT: Final = re.compile(rb"[A-Za-z0-9._-]{1,32}:[\x00-\x08]")


class Seal(Protocol):
    """Seals a plaintext; `row` is the length-prefixed row context."""

    def __call__(self, plaintext: bytes, row: bytes = b"") -> bytes:
        """Return the stored bytes."""


class RegistryRules(NamedTuple):
    """What the key registry allows a process that follows it."""

    retired: frozenset[str] = frozenset()
    """Versions whose values do not open."""
    refusal: str | None = None
    """Why nothing may be sealed."""


NO_RULES: Final = RegistryRules()


class ContextKeys:
    """The subkeys of one context under every key of a keyring, made by `Keyring.for_context`.

    :param accepted: the keys of other contexts whose values open as well.
    :param oldest: the oldest version whose values open; ``None`` opens those of every key.
    :param rules: what the key registry adds.
    """

    __slots__ = (
        "_accepted",
        "_context",
        "_master_keys",
        "_oldest",
        "_rules",
        "primary",
        "primary_header_size",
        "seal",
        "subkeys",
    )

    def __init__(
        self,
        master_keys: Mapping[str, MasterKey],
        primary: str,
        context: str,
        accepted: Sequence[ContextKeys] = (),
        oldest: str | None = None,
        rules: RegistryRules = NO_RULES,
    ) -> None:
        self._accepted = accepted
        self._context = context
        self._master_keys = master_keys
        self._oldest = oldest
        self._rules = rules
        encoded = context.encode("utf-8", "surrogatepass")
        # Without the subkeys of retired versions, no value pays for the test of its version.
        subkeys = {
            v: key.subkey(v, encoded) for v, key in master_keys.items() if not self._is_retired(v)
        }
        # A header holds the version, the format and the key id, so one look-up finds the right key
        # or nothing. No key is ever tried on the chance that it fits.
        self.subkeys = {subkey.header: subkey for subkey in subkeys.values()}
        self.primary = subkeys[primary]
        self.primary_header_size = len(self.primary.header)
        self.seal: Seal = self.primary.seal
        if rules.refusal is not None:
            self.seal = _refusing(rules.refusal)

    def open(self, sealed: object, row: bytes = b"") -> bytes:
        """Return the plaintext of `sealed`, or raise the `DecryptionError` that says why not."""
        data = sealed if type(sealed) is bytes else as_bytes(sealed)
        # Most headers are as long as the primary's, which saves looking for where this one ends.
        subkey = self.subkeys.get(data[: self.primary_header_size])
        if subkey is None:
            subkey = self.subkeys.get(data[: header_size(data)])
            if subkey is None:
                raise self._diagnose(data)
        plaintext = subkey.open(data, row)
        if plaintext is not None:
            return plaintext
        for other in self._accepted:
            plaintext = other.subkeys[subkey.header].open(data, row)
            if plaintext is not None:
                return plaintext
        raise TamperedError(
            f"a value in {self._context} does not open, though the keyring has its key: it was "
            "sealed for another column, table or row, or its bytes were changed. If one result "
            "column takes values from several columns (UNION, concrete inheritance, coalesce), "
            "select from a subquery or give them one context. If the table or column was renamed, "
            f"pass the old name as EncryptedJSON(context=). {_VERIFY}"
        )

    def _is_retired(self, version: str) -> bool:
        is_too_old = self._oldest is not None and is_older(version, self._oldest)
        return is_too_old or version in self._rules.retired

    def _diagnose(self, data: bytes) -> DecryptionError:
        envelope = parse(data)
        where = f"a value in {self._context}"
        if envelope is None:
            return NotSealedError(
                f"{where} is {len(data)} bytes that EncryptedJSON did not write ({_shape(data)}); "
                "if the column held data before it was encrypted, seal that data first with a "
                f"migration that encrypts the column. {_VERIFY}"
            )
        version = envelope.version
        if version in self._rules.retired:
            return RetiredKeyError(
                f"{where} is sealed under key version {version!r}, which the key registry says is "
                "retired. If it is from a restored backup, unretire() the version, and rotate. "
                f"{_VERIFY}"
            )
        if self._is_retired(version):
            return RetiredKeyError(
                f"{where} is sealed under key version {version!r}, which is retired: the keyring "
                f"opens {self._oldest!r} and later (oldest=). If it is from a restored backup, "
                "rotate it once with a keyring that has the old key and no such limit, "
                f"with_oldest(None). {_VERIFY}"
            )
        master = self._master_keys.get(version)
        if master is None:
            return UnknownKeyVersionError(
                f"{where} is sealed under key version {version!r}; the keyring has "
                f"{', '.join(map(repr, self._master_keys))}. Add the key of {version!r} to it. "
                f"{_VERIFY}"
            )
        return WrongKeyError(
            f"{where} was sealed under another key named {version!r}: the value has fingerprint "
            f"{envelope.key_id.hex()}, the keyring's key has {master.key_id.hex()}. "
            f"A new key needs a new version. {_VERIFY}"
        )


def _refusing(reason: str) -> Seal:
    def seal(plaintext: bytes, row: bytes = b"") -> bytes:
        del plaintext, row
        raise ConfigurationError(reason)

    return seal


def _shape(data: bytes) -> str:
    """Say what `data` looks like, from its first bytes alone and without repeating any."""
    if not data:
        return "it is empty"
    if _OTHER_FORMAT.match(data):
        return "it begins as a sealed value, but was cut short, changed, or made by a later release"
    if data.startswith(b"gAAAA"):
        return "it has the shape of a Fernet token"
    if data[:1] in (b"{", b"["):
        return "it has the shape of JSON text"
    return "it is ASCII text" if data.isascii() else "it is binary"
