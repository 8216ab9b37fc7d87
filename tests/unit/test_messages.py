"""What errors about keys, sealed values and documents say, word for word.

A person reads these sentences when something is broken, so a change of one is a change of the
package: it is made here too.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_lucent import Keyring, LucentError, default_keyring, set_default_keyring
from sqlalchemy_lucent._aead import MasterKey
from sqlalchemy_lucent._envelope import pack_header
from sqlalchemy_lucent._json import STRICT, EngineCodec
from tests.conftest import KEY_1, KEY_2

FORMS = (
    "a key is 32 bytes, or their base64, base64url (43 or 44 characters) "
    "or hex (64 characters) text"
)
VERIFY = "verify() lists the rows that do not open"
VERSION = "the key version is not 1 to 32 characters of A-Z a-z 0-9 . _ -"


def sentence(action: Callable[[], object]) -> str:
    with pytest.raises((LucentError, AttributeError)) as caught:
        action()
    return str(caught.value)


# -- keys and keyrings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, fault",
    [
        (b"", "has 0 bytes"),
        (b"k" * 31, "has 31 bytes"),
        ("", "has 0 characters"),
        ("k" * 42, "has 42 characters"),
        ("k" * 45, "has 45 characters"),
        ("k" * 63, "has 63 characters"),
        ("k" * 65, "has 65 characters"),
        ("k" * 42 + "!", "has a character that its alphabet lacks, or mixes two alphabets"),
        ("k" * 43 + "!", "has a character that its alphabet lacks, or mixes two alphabets"),
        ("k" * 64, "has a character that its alphabet lacks, or mixes two alphabets"),
        (5, "is of type int"),
        (None, "is of type NoneType"),
    ],
)
def test_a_refused_key(key: Any, fault: str) -> None:
    assert sentence(lambda: Keyring({"v1": key})) == f"the master key {fault}; {FORMS}"


def test_a_refused_entry_of_several() -> None:
    for name, key, fault in (
        ("v 2", KEY_2, VERSION),
        ("v2", b"", f"the master key has 0 bytes; {FORMS}"),
    ):
        made = sentence(lambda name=name, key=key: Keyring({"v1": KEY_1, name: key}))  # type: ignore[misc]
        assert made == f"key 2 of 2: {fault}"
    assert sentence(lambda: Keyring({"v 1": KEY_1})) == VERSION
    twice = {"LUCENT_SECRETS_KEYS": f"v1:{KEY_1.hex()},v1:{KEY_2.hex()}"}
    assert sentence(lambda: Keyring.from_env(twice)) == (
        "LUCENT_SECRETS_KEYS: key 2 of 2: duplicate version"
    )


def test_a_refused_keyring() -> None:
    assert sentence(lambda: Keyring("v1")) == (  # type: ignore[arg-type]
        'a keyring is made from a mapping of versions to keys, such as {"v1": key}, not from str'
    )
    assert sentence(lambda: Keyring({})) == "a keyring needs at least one key"
    assert sentence(lambda: Keyring({"v1": KEY_1, "v2": KEY_2})) == (
        "a keyring of 2 keys needs primary=, the version that seals: one of 'v1', 'v2'"
    )


def test_a_keyring_that_will_not_do_as_it_is_told(promoted: Keyring) -> None:
    assert sentence(lambda: promoted.fingerprint("v3")) == (
        "the keyring has no key of the given version; it has 'v1', 'v2'"
    )
    assert sentence(lambda: promoted.adding("v1", KEY_1)) == (
        "the keyring already has a key of version 'v1'; give the new key a version of its own"
    )
    assert sentence(lambda: promoted.without("v2")) == (
        "version 'v2' is the primary and cannot be removed; make another version primary first"
    )
    immutable = "a Keyring is immutable; with_primary(), adding() and without() copy"
    assert sentence(lambda: setattr(promoted, "primary", "v1")) == immutable
    assert sentence(lambda: delattr(promoted, "primary")) == immutable


def test_what_is_not_pickled(keyring: Keyring) -> None:
    assert sentence(lambda: pickle.dumps(MasterKey(KEY_1))) == "a master key cannot be pickled"
    refused = (
        "a Keyring cannot be pickled, because its keys would be in the pickle. Let the other "
        "process build its own, for instance with Keyring.from_env()"
    )
    assert sentence(lambda: pickle.dumps(keyring)) == refused
    assert sentence(keyring.__getstate__) == refused


# -- the environment -------------------------------------------------------------------------------


def test_an_environment_without_a_key() -> None:
    assert sentence(lambda: Keyring.from_env({})) == (
        "no keyring is configured: set LUCENT_SECRETS_KEY (and LUCENT_SECRETS_KEY_VERSION, "
        "if it is not 'v1'), or "
        'LUCENT_SECRETS_KEYS="v2:KEY,v1:KEY" with the primary first, or the same names with '
        "_FILE and a path, or call set_default_keyring()"
    )


@pytest.mark.parametrize(
    "variables, expected",
    [
        (
            {"KEYS": "v1:k", "KEY_VERSION": "v1"},
            (
                "both LUCENT_SECRETS_KEYS and LUCENT_SECRETS_KEY_VERSION are set; "
                "LUCENT_SECRETS_KEYS has its versions in it, so keep only one of the forms"
            ),
        ),
        (
            {"KEY": "k", "KEY_FILE": "k"},
            "both LUCENT_SECRETS_KEY and LUCENT_SECRETS_KEY_FILE are set; keep only one of them",
        ),
        ({"KEYS": "k"}, "LUCENT_SECRETS_KEYS: entry 1 is not of the form VERSION:KEY"),
        ({"KEY": "k"}, f"LUCENT_SECRETS_KEY: the master key has 1 characters; {FORMS}"),
        (
            {"KEY": KEY_1.hex(), "KEY_VERSION": "v 1"},
            f"LUCENT_SECRETS_KEY, LUCENT_SECRETS_KEY_VERSION: {VERSION}",
        ),
        ({"KEY": " "}, "LUCENT_SECRETS_KEY is set but empty"),
        ({"KEY": 5}, "LUCENT_SECRETS_KEY is of type int, not str"),
        (
            {"KEY_FILE": "\0"},
            (
                "LUCENT_SECRETS_KEY_FILE: the file cannot be read: "
                "it is not a text file, or its name is not a path"
            ),
        ),
    ],
)
def test_a_refused_environment(variables: dict[str, Any], expected: str) -> None:
    environ = {f"LUCENT_SECRETS_{name}": value for name, value in variables.items()}
    assert sentence(lambda: Keyring.from_env(environ)) == expected


def test_an_unreadable_key_file(tmp_path: Path) -> None:
    environ = {"LUCENT_SECRETS_KEY_FILE": str(tmp_path / "missing")}
    assert sentence(lambda: Keyring.from_env(environ)) == (
        "LUCENT_SECRETS_KEY_FILE: the file cannot be read: No such file or directory"
    )


def test_a_refused_default() -> None:
    assert sentence(lambda: set_default_keyring(5)) == (  # type: ignore[arg-type]
        "the default keyring is a Keyring, a callable that returns one, or None"
    )

    def fail() -> Keyring:
        raise TimeoutError

    set_default_keyring(fail)
    assert sentence(default_keyring) == (
        "the callable given to set_default_keyring() raised TimeoutError; "
        "call it yourself to see why"
    )
    set_default_keyring(lambda: 5)  # type: ignore[arg-type, return-value]
    assert sentence(default_keyring) == (
        "the callable given to set_default_keyring() returned int instead of a Keyring"
    )


# -- sealed values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, shape",
    [
        (b"", "it is empty"),
        (
            b"v1:\x02",
            "it begins as a sealed value, but was cut short, changed, or made by a later release",
        ),
        (b"gAAAAAB", "it has the shape of a Fernet token"),
        (b"{", "it has the shape of JSON text"),
        (b"[", "it has the shape of JSON text"),
        (b"a", "it is ASCII text"),
        (b"\xff", "it is binary"),
    ],
)
def test_foreign_bytes(keyring: Keyring, data: bytes, shape: str) -> None:
    assert sentence(lambda: keyring.for_context("t.c").open(data)) == (
        f"a value in t.c is {len(data)} bytes that EncryptedJSON did not write ({shape}); "
        "if the column held data before it was encrypted, "
        f"seal that data first with a migration that encrypts the column. {VERIFY}"
    )


def test_a_sealed_value_that_does_not_open(keyring: Keyring, promoted: Keyring) -> None:
    keys = promoted.for_context("t.c")
    assert sentence(lambda: keys.open(pack_header("v3", bytes(4)))) == (
        "a value in t.c is sealed under key version 'v3'; the keyring has 'v1', 'v2'. "
        f"Add the key of 'v3' to it. {VERIFY}"
    )
    assert sentence(lambda: keys.open(pack_header("v1", bytes(4)))) == (
        "a value in t.c was sealed under another key named 'v1': the value has fingerprint "
        f"00000000, the keyring's key has {keyring.fingerprint('v1')}. "
        f"A new key needs a new version. {VERIFY}"
    )
    assert sentence(lambda: keys.open(keys.seal(b"{}") + b" ")) == (
        "a value in t.c does not open, though the keyring has its key: it was sealed for another "
        "column, table or row, or its bytes were changed. If one result column takes values from "
        "several columns (UNION, concrete inheritance, coalesce), select from a subquery or give "
        "them one context. If the table or column was renamed, pass the old name as "
        f"EncryptedJSON(context=). {VERIFY}"
    )


# -- documents -------------------------------------------------------------------------------------


class Untrue(dict[str, Any]):
    """Shows other members to whoever iterates over it than it holds."""

    def __iter__(self) -> Any:
        return iter(["b"])

    def keys(self) -> Any:
        return ["b"]

    def items(self) -> Any:
        return [("b", 2)]

    def __getitem__(self, name: str) -> Any:
        return 2


class Failing(dict[str, Any]):
    def __iter__(self) -> Any:
        raise LookupError

    keys = items = __iter__


def nest(levels: int) -> Any:
    return [nest(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    "value, expected",
    [
        (float("nan"), "$: a float is NaN or infinite, which JSON cannot carry"),
        ([float("-inf")], "$[0]: a float is NaN or infinite, which JSON cannot carry"),
        ({"a": "\ud800"}, "$.{1st}: a string has a lone surrogate, which UTF-8 cannot carry"),
        ({"a": {"\ud800": 1}}, "$.{1st}: an object has a key with a lone surrogate"),
        ({"a b": [{1: 1}]}, "$.{1st}[0]: an object has a key of type int, not str"),
        ([10**4299], "$[0]: an integer has more than 4299 digits"),
        (nest(255), f"${'[0]' * 16}...: the document is nested more than 254 levels deep"),
        (
            {"tokens": [1, (2,)]},
            (
                "$.{1st}[1]: a value of type tuple is not a JSON value; "
                "convert it to str, int, float, bool, None, list or dict first"
            ),
        ),
        (Untrue(a=1), "$: the value cannot be written as JSON (TypeError)"),
        (Failing(a=1), "$: the value cannot be written as JSON (LookupError)"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_refused_document(value: Any, expected: str) -> None:
    assert sentence(lambda: STRICT.dumps(value)) == expected


def test_an_integer_that_the_interpreter_will_not_write() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert sentence(lambda: STRICT.dumps([10**1000])) == (
            "$: the value cannot be written as JSON (ValueError)"
        )
    finally:
        sys.set_int_max_str_digits(before)


def test_a_document_that_is_not_read() -> None:
    assert sentence(lambda: STRICT.loads(b"{")) == (
        "a document opened, but is not JSON that can be read (DecodeError): was it written "
        "through an engine with a json_serializer, and this engine lacks the "
        "json_deserializer that goes with it?"
    )


def fail(value: Any) -> Any:
    raise LookupError


@pytest.mark.parametrize(
    "serializer, deserializer, expected",
    [
        (
            fail,
            None,
            "$: the engine's json_serializer raised LookupError for a value of type list",
        ),
        (
            lambda value: 5,
            None,
            "$: the engine's json_serializer returned int instead of str for a value of type list",
        ),
        (
            lambda value: "[2]",
            None,
            (
                "$: a value of type list does not come back equal through the "
                "engine's json_serializer and json_deserializer"
            ),
        ),
        (
            None,
            fail,
            (
                "the engine's json_deserializer raised LookupError on a document that was written "
                "or opened"
            ),
        ),
    ],
)
def test_a_document_that_an_engines_functions_spoil(
    serializer: Any, deserializer: Any, expected: str
) -> None:
    assert sentence(lambda: EngineCodec(serializer, deserializer).dumps([1])) == expected
