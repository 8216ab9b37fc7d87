"""The floor: the cipher and the JSON library by themselves, as functions and as a column type."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import orjson
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Dialect, LargeBinary

_AEAD = AESGCM(bytes(range(32)))


def bare_seal() -> Callable[[Any], bytes]:
    encrypt, urandom, dumps = _AEAD.encrypt, os.urandom, orjson.dumps

    def seal(value: Any) -> bytes:
        nonce = urandom(12)
        return nonce + encrypt(nonce, dumps(value), None)

    return seal


def bare_open() -> Callable[[bytes], Any]:
    decrypt, loads = _AEAD.decrypt, orjson.loads

    def open_(data: bytes) -> Any:
        return loads(decrypt(data[:12], data[12:], None))

    return open_


class BareJSON(LargeBinary):
    """A column that is sealed by the floor: one key for everything, and not even SQL NULL."""

    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Any:
        return bare_seal()

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return bare_open()
