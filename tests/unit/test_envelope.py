"""
The stored bytes, held to the golden vectors of ``tests/vectors``.

A vector is never changed once released: its bytes are in somebody's database. To add one, write
its inputs with ``"sealed": ""`` (and ``"key_id": ""``); the test that fails shows the bytes that
`recompute` makes of them, from the text of the format and the primitives of ``cryptography``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.dialects.sqlite.pysqlite import dialect as sqlite_dialect

from sqlalchemy_lucent import EncryptedJSON, Keyring, set_default_keyring
from sqlalchemy_lucent._envelope import (
    NONCE_SIZE,
    as_bytes,
    header_size,
    length_prefixed,
    pack_header,
    parse,
)
from sqlalchemy_lucent._row import encode_row
from tests.strategies import KEY_VERSIONS

Vector = dict[str, Any]

VECTORS: list[Vector] = [
    vector
    for path in sorted((Path(__file__).parents[1] / "vectors").glob("*.json"))
    for vector in json.loads(path.read_text("utf-8"))["vectors"]
]
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])


def prefixed(part: bytes) -> bytes:
    return struct.pack(">I", len(part)) + part


def hkdf(master_key: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(master_key)


def recompute(vector: Vector) -> tuple[str, str]:
    """Return key id and stored bytes as the format's text has it, with none of our code."""
    master_key = bytes.fromhex(vector["master_key"])
    nonce = bytes.fromhex(vector["nonce"])
    context = vector["context"].encode("utf-8")
    key_id = hkdf(master_key, b"sqlalchemy-lucent/1/key-id", 4)
    header = vector["version"].encode("ascii") + b":" + b"\x01" + key_id
    associated_data = prefixed(header) + prefixed(context)
    for part in vector["row"] or ():
        associated_data += prefixed(part.encode("utf-8"))
    subkey = hkdf(master_key, b"sqlalchemy-lucent/1/aes-256-gcm" + context, 32)
    plaintext = vector["plaintext"].encode("utf-8")
    sealed = header + nonce + AESGCM(subkey).encrypt(nonce, plaintext, associated_data)
    return key_id.hex(), sealed.hex()


def row_of(vector: Vector) -> bytes:
    return length_prefixed(*(part.encode("utf-8") for part in vector["row"] or ()))


def keyring_of(vector: Vector) -> Keyring:
    return Keyring({vector["version"]: vector["master_key"]})


def test_there_are_vectors_with_and_without_a_row() -> None:
    assert {vector["row"] is None for vector in VECTORS} == {True, False}


def test_the_names_and_nonces_of_vectors_are_unique() -> None:
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS)
    assert len({vector["nonce"] for vector in VECTORS}) == len(VECTORS)


@each_vector
def test_vector_is_what_the_format_says_and_what_the_package_opens_and_seals(
    vector: Vector, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed, row = bytes.fromhex(vector["sealed"]), row_of(vector)
    plaintext = vector["plaintext"].encode("utf-8")
    keyring = keyring_of(vector)
    assert (vector["key_id"], vector["sealed"]) == recompute(vector)

    envelope = parse(sealed)
    assert envelope is not None
    assert envelope.version == vector["version"]
    assert envelope.key_id.hex() == vector["key_id"] == keyring.fingerprint(vector["version"])
    assert envelope.nonce.hex() == vector["nonce"]

    keys = keyring.for_context(vector["context"])
    assert keys.open(sealed, row) == plaintext
    monkeypatch.setattr("os.urandom", {12: bytes.fromhex(vector["nonce"])}.__getitem__)
    assert keys.primary.seal(plaintext, row) == sealed


@each_vector
def test_column_type_gives_the_value_of_vector(vector: Vector) -> None:
    set_default_keyring(keyring_of(vector))
    row = vector["row"]
    names = [f"column_{number}" for number in range(len(row or ()))]
    type_ = EncryptedJSON(context=vector["context"], bound_to=names)
    process = type_.result_processor(sqlite_dialect(), None)
    assert process is not None
    value = process(bytes.fromhex(vector["sealed"]))
    assert (value.open(row=row) if row else value) == json.loads(vector["plaintext"])


@given(KEY_VERSIONS, st.binary(min_size=4, max_size=4), st.binary(min_size=NONCE_SIZE))
def test_parse_is_the_inverse_of_packing(version: str, key_id: bytes, rest: bytes) -> None:
    header = pack_header(version, key_id)
    assert header_size(header + rest) == len(header)
    envelope = parse(header + rest)
    assert envelope is not None
    assert envelope == (version, key_id, rest[:NONCE_SIZE], rest[NONCE_SIZE:])


@pytest.mark.parametrize("rest", [b"", b"n", bytes(NONCE_SIZE - 1)])
def test_a_value_cut_short_behind_its_header_is_parsed(rest: bytes) -> None:
    assert parse(pack_header("v1", b"key_") + rest) == ("v1", b"key_", rest, b"")


def test_the_longest_version_is_parsed() -> None:
    header = pack_header("v" * 32, b"key_")
    assert header_size(header + b":") == len(header)
    assert parse(header) == ("v" * 32, b"key_", b"", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b":",
        b":\x01key_",
        b"v1",
        b"v1:",
        b"v1:\x01",
        b"v1:\x01key",
        b"v1:\x02key_nonce_nonce_",
        b"v1:password-of-somebody",
        b"v 1:\x01key_nonce_nonce_",
        "vé:\x01key_nonce_nonce_".encode(),
        "٣:\x01key_nonce_nonce_".encode(),
        b"v1\n:\x01key_nonce_nonce_",
        b"v" * 33 + b":\x01key_nonce_nonce_",
    ],
)
def test_what_does_not_begin_as_a_sealed_value_is_not_parsed(data: bytes) -> None:
    assert parse(data) is None


@given(st.binary())
@example(b":" * 40)
def test_parse_takes_any_bytes(data: bytes) -> None:
    envelope = parse(data)
    if envelope is not None:
        joined = pack_header(envelope.version, envelope.key_id) + envelope.nonce + envelope.body
        assert joined == data


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
@example([b"a", b"bc"], [b"ab", b"c"])
@example([], [b""])
@example([b"", b""], [b"\0\0\0\0"])
def test_different_tuples_of_parts_give_different_bytes(
    left: list[bytes], right: list[bytes]
) -> None:
    assert (length_prefixed(*left) == length_prefixed(*right)) == (left == right)


@given(st.lists(st.text() | st.integers() | st.uuids(), max_size=4))
def test_a_row_context_is_the_texts_of_its_parts_length_prefixed(
    parts: list[str | int | UUID],
) -> None:
    texts = [str(part).encode("utf-8", "surrogatepass") for part in parts]
    assert encode_row(parts) == length_prefixed(*texts)


@pytest.mark.parametrize(
    "stored, data",
    [
        (b"v1", b"v1"),
        (bytearray(b"v1"), b"v1"),
        (memoryview(b"v1"), b"v1"),
        ("v1:é", "v1:é".encode()),
        ("a\udc00b", b"a?b"),
        (12, b"12"),
    ],
)
def test_whatever_a_driver_gives_is_read_as_bytes(stored: object, data: bytes) -> None:
    assert as_bytes(stored) == data
