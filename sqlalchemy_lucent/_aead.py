"""AES-256-GCM and HKDF-SHA256: the only module that imports ``cryptography``.

No algorithm here is ours. A subkey is RFC 5869's HKDF of the master key with the column's context
as ``info``; AES-256-GCM (NIST SP 800-38D) seals values under that subkey.

No attribute or slot holds the bytes of a key: a subkey is inside its AESGCM object, a master key in
a closure. Debuggers, error reporters and serializers that walk attributes find neither.
"""

from __future__ import annotations

import hmac
import os
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ._envelope import KEY_ID_SIZE, NONCE_SIZE, length_prefixed, pack_header
from .exceptions import PicklingRefusedError, SerializationError

MASTER_KEY_SIZE: Final = 32
"""Bytes of a master key: AES-256 strength all the way down."""

_SUBKEY_INFO: Final = b"sqlalchemy-lucent/1/aes-256-gcm"
_KEY_ID_INFO: Final = b"sqlalchemy-lucent/1/key-id"
_CHECK_ID_INFO: Final = b"sqlalchemy-lucent/1/registry"
_MAC_INFO: Final = b"sqlalchemy-lucent/1/mac/"

CHECK_ID_SIZE: Final = 16
"""Bytes that tell master keys apart for ever. The four bytes of a key id may meet by chance."""


class MasterKey:
    """A master key. Only keys derived from it can be read.

    ``key_id`` is the 4 bytes that tell one master key from another without showing either.
    """

    __slots__ = ("_derive", "key_id")

    def __init__(self, key: bytes) -> None:
        def derive(info: bytes) -> bytes:
            # No salt: the key is uniformly random already (RFC 5869, 3.3).
            hkdf = HKDF(algorithm=SHA256(), length=MASTER_KEY_SIZE, salt=None, info=info)
            return hkdf.derive(key)

        self._derive = derive
        self.key_id = derive(_KEY_ID_INFO)[:KEY_ID_SIZE]

    def subkey(self, version: str, context: bytes) -> Subkey:
        """Return the AES key of `context`; `version` is the name of this master key."""
        return Subkey(
            self._derive(_SUBKEY_INFO + context),
            header=pack_header(version, self.key_id),
            context=context,
        )

    def check_id(self) -> bytes:
        """Return the 16 bytes that the key registry knows the key by. They do not show it."""
        return self._derive(_CHECK_ID_INFO)[:CHECK_ID_SIZE]

    def mac(self, purpose: str, message: bytes) -> bytes:
        """Return the HMAC-SHA256 of `message` under a key that serves only `purpose`."""
        return hmac.digest(self._derive(_MAC_INFO + purpose.encode()), message, "sha256")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PicklingRefusedError("a master key cannot be pickled")


class Subkey:
    """The AES key of one (master key, context), ready to use.

    Each column has its own, so that the bound of 2^32 random nonces under one key
    (NIST SP 800-38D, 8.3) holds per column and key version, not for a whole database.
    """

    __slots__ = ("_aead", "_nonce_at", "_nonce_end", "associated_data", "header")

    def __init__(self, key: bytes, *, header: bytes, context: bytes) -> None:
        self._aead = AESGCM(key)
        self._nonce_at = len(header)
        self._nonce_end = len(header) + NONCE_SIZE
        self.header = header
        self.associated_data = length_prefixed(header, context)

    def seal(self, plaintext: bytes, row: bytes = b"") -> bytes:
        """Return the stored bytes for `plaintext`; `row` is the length-prefixed row context.

        :raises SerializationError: `plaintext` has 2^31 bytes or more, which the cipher's library
            does not take.
        """
        nonce = os.urandom(NONCE_SIZE)
        try:
            associated_data = self.associated_data + row if row else self.associated_data
            ciphertext = self._aead.encrypt(nonce, plaintext, associated_data)
        except OverflowError:
            pass
        else:
            return self.header + nonce + ciphertext
        raise SerializationError(f"$: a document of {len(plaintext)} bytes is too long to seal")

    def open(self, sealed: bytes, row: bytes = b"") -> bytes | None:
        """Return the plaintext, or ``None`` if `sealed` is not authentic here.

        `sealed` must begin with this subkey's header.
        """
        end = self._nonce_end
        associated_data = self.associated_data + row if row else self.associated_data
        try:
            return self._aead.decrypt(sealed[self._nonce_at : end], sealed[end:], associated_data)
        except (InvalidTag, ValueError):  # ValueError: the value was cut short in its nonce
            return None
