"""
AES-256-GCM and HKDF-SHA256: the only module that imports ``cryptography``.

Nothing here is an algorithm of ours. A subkey is RFC 5869's HKDF of the master key with the
column's context as ``info``; a value is sealed by AES-256-GCM (NIST SP 800-38D) under that subkey.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ._envelope import KEY_ID_SIZE, NONCE_SIZE, TAG_SIZE, length_prefixed, pack_header

MASTER_KEY_SIZE: Final = 32
"""Bytes of a master key: AES-256 strength all the way down."""

_SUBKEY_INFO: Final = b"sqlalchemy-lucent/1/aes-256-gcm"
_KEY_ID_INFO: Final = b"sqlalchemy-lucent/1/key-id"


def random_master_key() -> bytes:
    """Return 32 bytes from the operating system's generator."""
    return os.urandom(MASTER_KEY_SIZE)


def derive_key_id(master_key: bytes) -> bytes:
    """Return the 4 bytes that tell one master key from another without showing either."""
    return _hkdf(master_key, _KEY_ID_INFO)[:KEY_ID_SIZE]


class Subkey:
    """
    The AES key of one (master key, context), ready to use.

    Each column has its own, so that the bound of 2^32 random nonces under one key
    (NIST SP 800-38D, 8.3) holds per column and key version, not for a whole database.
    """

    __slots__ = ("_aead", "associated_data", "header")

    def __init__(self, master_key: bytes, *, version: str, key_id: bytes, context: bytes) -> None:
        self._aead = AESGCM(_hkdf(master_key, _SUBKEY_INFO + context))
        self.header = pack_header(version, key_id)
        self.associated_data = length_prefixed(self.header, context)

    def seal(self, plaintext: bytes, row: bytes = b"") -> bytes:
        """Return the stored bytes for `plaintext`; `row` is the length-prefixed row context."""
        return self._seal(plaintext, row, os.urandom(NONCE_SIZE))

    def _seal(self, plaintext: bytes, row: bytes, nonce: bytes) -> bytes:
        # Apart from `seal` so that golden vectors can fix the nonce. Nothing else may.
        ciphertext = self._aead.encrypt(nonce, plaintext, self.associated_data + row)
        return self.header + nonce + ciphertext

    def open(self, sealed: bytes, row: bytes = b"") -> bytes | None:
        """
        Return the plaintext, or ``None`` if `sealed` is not authentic here.

        `sealed` must begin with this subkey's header.
        """
        nonce_end = len(self.header) + NONCE_SIZE
        if len(sealed) < nonce_end + TAG_SIZE:
            return None
        try:
            return self._aead.decrypt(
                sealed[len(self.header) : nonce_end],
                sealed[nonce_end:],
                self.associated_data + row,
            )
        except InvalidTag:
            return None


def _hkdf(master_key: bytes, info: bytes) -> bytes:
    # No salt: the master key is uniformly random already (RFC 5869, 3.3).
    return HKDF(algorithm=SHA256(), length=MASTER_KEY_SIZE, salt=None, info=info).derive(master_key)
