"""The cipher and the JSON library by themselves, and the least that the contract takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import ormsgpack
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Dialect, LargeBinary
from sqlalchemy.types import TypeDecorator

from sqlalchemy_lucent._envelope import length_prefixed, pack_header
from sqlalchemy_lucent._json import _FLOAT, _PLAIN_ONLY, _may_be_infinite_or_nan
from sqlalchemy_lucent._redacted import RedactedDict

_AEAD = AESGCM(bytes(range(32)))
_HEADER = pack_header("v2", b"\0\1\2\3")
_ASSOCIATED_DATA = length_prefixed(_HEADER, b"documents.payload")

STRICT_AND_BOUND = "strict, bound to its column"


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


def steps_of_sealing() -> dict[str, Callable[[Any], bytes]]:
    """What the contract asks for beyond the floor, added one after the other.

    What is left to ours is Python: a function for each layer, and the keyring's look-up.
    """
    encrypt, urandom, dumps, packb = _AEAD.encrypt, os.urandom, orjson.dumps, ormsgpack.packb
    header, associated_data = _HEADER, _ASSOCIATED_DATA

    def check(value: Any) -> None:
        packed = packb(value, None, _PLAIN_ONLY)
        if _FLOAT in packed and _may_be_infinite_or_nan(packed):
            raise ValueError

    def strict(value: Any) -> bytes:
        check(value)
        nonce = urandom(12)
        return nonce + encrypt(nonce, dumps(value), None)

    def bound(value: Any) -> bytes:
        check(value)
        nonce = urandom(12)
        return header + nonce + encrypt(nonce, dumps(value), associated_data)

    return {"strict": strict, STRICT_AND_BOUND: bound}


def steps_of_opening() -> dict[str, Callable[[bytes], Any]]:
    """The same for opening: an exact reader of JSON, the key's look-up by the header."""
    decrypt, loads = _AEAD.decrypt, msgspec.json.Decoder().decode
    keys, size, associated_data = {_HEADER: decrypt}, len(_HEADER), _ASSOCIATED_DATA

    def strict(data: bytes) -> Any:
        return loads(decrypt(data[:12], data[12:], None))

    def bound(data: bytes) -> Any:
        open_ = keys[data[:size]]
        return loads(open_(data[size : size + 12], data[size + 12 :], associated_data))

    return {"strict": strict, STRICT_AND_BOUND: bound}


def floor_seal() -> Callable[[Any], bytes]:
    """What the contract asks for, in one function and with one key."""
    return steps_of_sealing()[STRICT_AND_BOUND]


def floor_open(*, redacted: bool = True) -> Callable[[bytes], Any]:
    """The same for opening; the document is a `dict`."""
    open_ = steps_of_opening()[STRICT_AND_BOUND]
    return (lambda data: RedactedDict(open_(data))) if redacted else open_


class FloorJSON(TypeDecorator[Any]):
    """A column that is sealed by the floor: one key for everything, and not even SQL NULL."""

    impl = LargeBinary
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Any:
        return floor_seal()

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return floor_open()
