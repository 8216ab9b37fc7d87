"""Sealing and opening: what holds of the cryptography, and which error each damage gives."""

from __future__ import annotations

import base64
import hmac
import os
import pickle
import traceback
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import example, given
from hypothesis import strategies as st

from sqlalchemy_lucent import (
    DecryptionError,
    Keyring,
    NotSealedError,
    SerializationError,
    TamperedError,
    UnknownKeyVersionError,
    WrongKeyError,
    generate_master_key,
)
from sqlalchemy_lucent._aead import MasterKey
from sqlalchemy_lucent._envelope import length_prefixed, pack_header
from sqlalchemy_lucent._subkeys import ContextKeys
from tests.conftest import KEY_1, KEY_2
from tests.strategies import MASTER_KEYS

PLAINTEXT = b'{"private_key":"MARKER"}'
ROW = length_prefixed(b"tenant", b"tenant_123")

HEADER_SIZE = len(b"v1") + 1 + 1 + 4
NONCE_END = HEADER_SIZE + 12


@pytest.fixture
def keys(keyring: Keyring) -> ContextKeys:
    return keyring.for_context("integrations.credentials")


@pytest.fixture
def sealed(keys: ContextKeys) -> bytes:
    return keys.seal(PLAINTEXT, ROW)


def refusal(keys: ContextKeys, data: bytes, row: bytes = ROW) -> type[DecryptionError]:
    """Return the class of the error that opening `data` gives, having looked for leaks in it."""
    with pytest.raises(DecryptionError) as caught:
        keys.open(data, row)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "MARKER" not in "".join(traceback.format_exception(caught.value))
    return type(caught.value)


@given(MASTER_KEYS, st.text(max_size=40), st.binary(max_size=2000), st.binary(max_size=40))
@example(bytes(32), "", b"", b"")
def test_what_was_sealed_opens(master: bytes, context: str, plaintext: bytes, row: bytes) -> None:
    keys = Keyring({"v1": master}).for_context(context)
    assert keys.open(keys.seal(plaintext, row), row) == plaintext


@given(MASTER_KEYS, st.binary(max_size=60), st.binary(max_size=60))
@example(bytes(32), b"", b"")
def test_subkeys_and_key_ids_are_those_of_hkdf(
    master: bytes, context: bytes, plaintext: bytes
) -> None:
    def hkdf(info: bytes) -> bytes:
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(master)

    key = MasterKey(master)
    assert key.key_id == hkdf(b"sqlalchemy-lucent/1/key-id")[:4]
    subkey = key.subkey("v1", context)
    sealed = subkey.seal(plaintext)[len(subkey.header) :]
    aead = AESGCM(hkdf(b"sqlalchemy-lucent/1/aes-256-gcm" + context))
    assert aead.decrypt(sealed[:12], sealed[12:], subkey.associated_data) == plaintext


@given(MASTER_KEYS, st.binary(max_size=60))
@example(bytes(32), b"")
def test_check_ids_and_macs_are_those_of_hkdf_and_hmac(master: bytes, message: bytes) -> None:
    def hkdf(info: bytes) -> bytes:
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(master)

    key = MasterKey(master)
    assert key.check_id() == hkdf(b"sqlalchemy-lucent/1/registry")[:16]
    for purpose in ("receipts", "leaks"):
        own = hkdf(b"sqlalchemy-lucent/1/mac/" + purpose.encode())
        assert key.mac(purpose, message) == hmac.new(own, message, "sha256").digest()


def test_a_subkey_opens_what_it_sealed_without_a_row() -> None:
    subkey = MasterKey(KEY_1).subkey("v1", b"c")
    assert subkey.open(subkey.seal(PLAINTEXT)) == PLAINTEXT


@pytest.mark.parametrize("context", ["", "tables.é", "t.\U0001f511", "t.\ud800"])
def test_any_text_is_a_context(keyring: Keyring, context: str) -> None:
    keys = keyring.for_context(context)
    assert keys.open(keys.seal(PLAINTEXT)) == PLAINTEXT


def test_two_seals_of_one_value_differ(keys: ContextKeys) -> None:
    assert len({keys.seal(PLAINTEXT) for _ in range(1000)}) == 1000


def test_sealed_bytes_do_not_hold_the_plaintext(keys: ContextKeys) -> None:
    assert b"MARKER" not in keys.seal(PLAINTEXT)


def test_a_seal_adds_the_same_number_of_bytes_to_any_plaintext(keys: ContextKeys) -> None:
    overhead = {len(keys.seal(os.urandom(size))) - size for size in (0, 1, 15, 16, 17, 1000)}
    assert overhead == {HEADER_SIZE + 12 + 16}


def test_random_master_keys_are_32_bytes_and_differ() -> None:
    keys = {base64.urlsafe_b64decode(f"{generate_master_key()}=") for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {32}


def expected_class(position: int, changed: int) -> type[DecryptionError]:
    """The class for one changed byte: the header says more than that something was changed."""
    if position < 2:
        return NotSealedError if not _in_version(changed) else UnknownKeyVersionError
    if position < 4:  # the separator and the format byte
        return NotSealedError
    return WrongKeyError if position < HEADER_SIZE else TamperedError


def _in_version(byte: int) -> bool:
    return chr(byte) in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"


def changed_bytes(sealed: bytes) -> Iterator[tuple[int, int, bytes]]:
    for position, byte in enumerate(sealed):
        for bit in range(8):
            changed = byte ^ (1 << bit)
            yield position, changed, sealed[:position] + bytes([changed]) + sealed[position + 1 :]


def test_every_flipped_bit_is_refused_by_the_class_that_fits(
    keys: ContextKeys, sealed: bytes
) -> None:
    for position, changed, data in changed_bytes(sealed):
        assert refusal(keys, data) is expected_class(position, changed), position


def test_every_truncation_is_refused(keys: ContextKeys, sealed: bytes) -> None:
    for length in range(len(sealed)):
        expected = NotSealedError if length < HEADER_SIZE else TamperedError
        assert refusal(keys, sealed[:length]) is expected, length


def test_bytes_cut_from_the_front_are_refused(keys: ContextKeys, sealed: bytes) -> None:
    assert refusal(keys, sealed[1:]) is UnknownKeyVersionError  # "1:" is a version's form
    for start in range(2, len(sealed)):
        with pytest.raises(DecryptionError):
            keys.open(sealed[start:], ROW)


def test_appended_bytes_are_refused(keys: ContextKeys, sealed: bytes) -> None:
    for byte in range(256):
        assert refusal(keys, sealed + bytes([byte])) is TamperedError
    assert refusal(keys, sealed + sealed) is TamperedError


def test_every_exchange_of_two_neighbours_is_refused(keys: ContextKeys, sealed: bytes) -> None:
    for first in range(len(sealed) - 1):
        swapped = bytearray(sealed)
        swapped[first], swapped[first + 1] = swapped[first + 1], swapped[first]
        if swapped != sealed:
            with pytest.raises(DecryptionError):
                keys.open(bytes(swapped), ROW)


@pytest.mark.parametrize("part", ["nonce", "ciphertext", "tag"])
def test_parts_of_two_seals_exchanged_are_refused(keys: ContextKeys, part: str) -> None:
    spans = {"nonce": (HEADER_SIZE, NONCE_END), "ciphertext": (NONCE_END, -16), "tag": (-16, None)}
    start, end = spans[part]
    one, other = keys.seal(PLAINTEXT, ROW), keys.seal(b'{"private_key":"OTHERS"}', ROW)
    mixed = bytearray(one)
    mixed[start:end] = other[start:end]
    assert refusal(keys, bytes(mixed)) is TamperedError


@given(
    st.binary(max_size=80)
    | st.binary(max_size=60).map(lambda rest: b"v1:\x01" + rest)
    | st.binary(max_size=60).map(lambda rest: pack_header("v1", MasterKey(KEY_1).key_id) + rest)
)
@example(b"")
@example(pack_header("v1", MasterKey(KEY_1).key_id) + bytes(27))
@example(pack_header("v1", MasterKey(KEY_1).key_id) + bytes(28))
def test_any_bytes_are_refused_by_a_decryption_error(data: bytes) -> None:
    keys = Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v1").for_context("integrations.credentials")
    with pytest.raises(DecryptionError) as caught:
        keys.open(data)
    assert type(caught.value) is not DecryptionError
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_value_of_another_context_is_refused(keyring: Keyring, sealed: bytes) -> None:
    for context in ("integrations.token", "other.credentials", "", "integrations.credentials "):
        assert refusal(keyring.for_context(context), sealed) is TamperedError


@pytest.mark.parametrize(
    "row",
    [
        b"",
        length_prefixed(b"tenant", b"tenant_124"),
        length_prefixed(b"tenant_123", b"tenant"),
        length_prefixed(b"tenant"),
        length_prefixed(b"tenant", b"tenant_123", b""),
        length_prefixed(b"tenan", b"ttenant_123"),
    ],
)
def test_a_value_of_another_row_is_refused(keys: ContextKeys, sealed: bytes, row: bytes) -> None:
    assert refusal(keys, sealed, row) is TamperedError


def test_a_value_without_a_row_is_refused_where_a_row_is_given(keys: ContextKeys) -> None:
    assert refusal(keys, keys.seal(PLAINTEXT), ROW) is TamperedError


def test_another_key_under_the_same_version_is_refused_with_both_fingerprints(
    sealed: bytes, keyring: Keyring
) -> None:
    other = Keyring({"v1": KEY_2})
    with pytest.raises(WrongKeyError) as caught:
        other.for_context("integrations.credentials").open(sealed, ROW)
    assert keyring.fingerprint("v1") in str(caught.value)
    assert other.fingerprint("v1") in str(caught.value)


def test_an_unknown_version_is_refused_with_the_versions_at_hand(sealed: bytes) -> None:
    other = Keyring({"v2": KEY_2, "v3": bytes(32)}, primary="v3")
    with pytest.raises(UnknownKeyVersionError) as caught:
        other.for_context("integrations.credentials").open(sealed, ROW)
    for version in ("'v1'", "'v2'", "'v3'"):
        assert version in str(caught.value)


def test_every_key_of_a_keyring_opens_and_the_primary_seals(
    keyring: Keyring, promoted: Keyring
) -> None:
    old = keyring.for_context("c").seal(PLAINTEXT)
    keys = promoted.for_context("c")
    new = keys.seal(PLAINTEXT)
    assert old.startswith(b"v1:")
    assert new.startswith(b"v2:")
    assert keys.open(old) == keys.open(new) == PLAINTEXT


def test_keys_whose_versions_are_longer_or_shorter_than_the_primary_open() -> None:
    versions = ("v1", "v", "v10", "v" * 32)
    keys = {version: bytes([number]) + KEY_1[1:] for number, version in enumerate(versions, 1)}
    keyring = Keyring(keys, primary="v1")
    for version in versions:
        sealed = keyring.with_primary(version).for_context("c").seal(PLAINTEXT)
        for primary in versions:
            assert keyring.with_primary(primary).for_context("c").open(sealed) == PLAINTEXT


def test_a_header_moved_to_the_other_key_of_the_keyring_is_refused(promoted: Keyring) -> None:
    keys = promoted.for_context("c")
    sealed = keys.seal(PLAINTEXT)
    relabelled = pack_header("v1", bytes.fromhex(promoted.fingerprint("v1"))) + sealed[8:]
    assert refusal(keys, relabelled, b"") is TamperedError
    assert refusal(keys, b"v1" + sealed[2:], b"") is WrongKeyError


@pytest.mark.parametrize(
    "data, shape",
    [
        (b"", "empty"),
        (b'{"private_key": "MARKER"}', "JSON text"),
        (b'["MARKER"]', "JSON text"),
        (b"gAAAAABkMARKERMARKERMARKER", "Fernet token"),
        (b"MARKER", "ASCII text"),
        (b"MARKER:MARKER", "ASCII text"),
        (b"a-user:MARKERMARKERMARKER", "ASCII text"),
        ("é:MARKER".encode(), "binary"),
        (b"\x00MARKER\xff", "binary"),
        (b"v1:\x02keyid_nonce_MARKER", "later release"),
        (b"v1:\x01k", "cut short"),
    ],
)
def test_foreign_bytes_are_named_by_shape_and_not_by_content(
    keys: ContextKeys, data: bytes, shape: str
) -> None:
    with pytest.raises(NotSealedError) as caught:
        keys.open(data)
    assert shape in str(caught.value)
    assert "MARKER" not in str(caught.value)
    assert "a-user" not in str(caught.value)


def test_a_document_that_the_cipher_does_not_take_is_refused(keys: ContextKeys) -> None:
    # The pages of these two gibibytes are never touched: the length is looked at first.
    with pytest.raises(SerializationError, match="2147483648 bytes is too long"):
        keys.seal(bytes(2**31))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_keys_are_not_pickled(keys: ContextKeys, protocol: int) -> None:
    for holder in (keys, keys.primary, MasterKey(KEY_1)):
        with pytest.raises(TypeError, match="pickle") as caught:
            pickle.dumps(holder, protocol)
        assert KEY_1.hex() not in str(caught.value)
