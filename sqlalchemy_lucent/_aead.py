"""
AES-256-GCM and HKDF-SHA256: the only module that imports ``cryptography``.

Nothing here is an algorithm of ours. A subkey is RFC 5869's HKDF of the master key with the
column's context as ``info``; a value is sealed by AES-256-GCM (NIST SP 800-38D) under that subkey.

Keys are held by OpenSSL and not by Python objects: nothing that walks attributes, slots or
references, as debuggers, error reporters and serializers do, comes upon the bytes of one.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from ._envelope import KEY_ID_SIZE, NONCE_SIZE, TAG_SIZE, length_prefixed, pack_header
from .exceptions import SerializationError

MASTER_KEY_SIZE: Final = 32
"""Bytes of a master key: AES-256 strength all the way down."""

_SUBKEY_INFO: Final = b"sqlalchemy-lucent/1/aes-256-gcm"
_KEY_ID_INFO: Final = b"sqlalchemy-lucent/1/key-id"


def random_master_key() -> bytes:
    """Return 32 bytes from the operating system's generator."""
    return os.urandom(MASTER_KEY_SIZE)


class MasterKey:
    """
    One master key, as what is derived from it: HKDF-SHA256 (RFC 5869) after its first step.

    ``key_id`` is the 4 bytes that tell one master key from another without showing either.
    """

    __slots__ = ("_hmac", "key_id")

    def __init__(self, key: bytes) -> None:
        # RFC 5869, 2.2 and 3.3: extract. No salt, which is as many zeros as SHA-256 has bytes:
        # the key is uniformly random already.
        extract = HMAC(bytes(SHA256.digest_size), SHA256())
        extract.update(key)
        self._hmac = HMAC(extract.finalize(), SHA256())
        self.key_id = self._expand(_KEY_ID_INFO)[:KEY_ID_SIZE]

    def _expand(self, info: bytes) -> bytes:
        # RFC 5869, 2.3: expand. 32 bytes are one block of it, T(1).
        block = self._hmac.copy()
        block.update(info + b"\x01")
        return block.finalize()

    def subkey(self, version: str, context: bytes) -> Subkey:
        """Return the AES key of `context`; `version` is the name of this master key."""
        return Subkey(
            self._expand(_SUBKEY_INFO + context),
            header=pack_header(version, self.key_id),
            context=context,
        )


class Subkey:
    """
    The AES key of one (master key, context), ready to use.

    Each column has its own, so that the bound of 2^32 random nonces under one key
    (NIST SP 800-38D, 8.3) holds per column and key version, not for a whole database.
    """

    __slots__ = ("_aead", "associated_data", "header")

    def __init__(self, key: bytes, *, header: bytes, context: bytes) -> None:
        self._aead = AESGCM(key)
        self.header = header
        self.associated_data = length_prefixed(header, context)

    def seal(self, plaintext: bytes, row: bytes = b"") -> bytes:
        """
        Return the stored bytes for `plaintext`; `row` is the length-prefixed row context.

        :raises SerializationError: `plaintext` has 2^31 bytes or more, past what the library of
            the cipher takes.
        """
        return self._seal(plaintext, row, os.urandom(NONCE_SIZE))

    def _seal(self, plaintext: bytes, row: bytes, nonce: bytes) -> bytes:
        # Apart from `seal` so that golden vectors can fix the nonce. Nothing else may.
        try:
            ciphertext = self._aead.encrypt(nonce, plaintext, self.associated_data + row)
        except OverflowError:
            pass
        else:
            return self.header + nonce + ciphertext
        raise SerializationError(f"$: a document of {len(plaintext)} bytes is too long to seal")

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
