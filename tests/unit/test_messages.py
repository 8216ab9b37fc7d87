"""Errors about keys and sealed values name what is wrong, where, and what to do, and show no key.

How they word it is theirs. What a document did wrong is in ``test_json.py``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from sqlalchemy_lucent import (
    ConfigurationError,
    InvalidKeyError,
    Keyring,
    LucentError,
    NotSealedError,
    PicklingRefusedError,
    TamperedError,
    UnknownKeyVersionError,
    WrongKeyError,
    default_keyring,
    set_default_keyring,
)
from sqlalchemy_lucent._envelope import pack_header
from tests.conftest import KEY_1, KEY_2

ONE = Keyring({"v1": KEY_1})
TWO = ONE.adding("v2", KEY_2).with_primary("v2")
VALUE = b'{"token": "MARKER"}'
FORMS = ("32 bytes", "43", "base64url", "64", "hex")


def using_default(given: Any) -> Callable[[], object]:
    def use() -> object:
        set_default_keyring(given)
        return default_keyring()

    return use


def opening(sealed: bytes) -> Callable[[], object]:
    return lambda: TWO.for_context("users.token").open(sealed)


CASES: dict[str, tuple[Callable[[], object], type[LucentError], tuple[str, ...]]] = {
    "key too short": (lambda: Keyring({"v1": KEY_1[:31]}), InvalidKeyError, ("31 bytes", *FORMS)),
    "key of another alphabet": (
        lambda: Keyring({"v1": KEY_1.hex()[:42] + "!"}), InvalidKeyError, ("alphabet", *FORMS)
    ),
    "one key of several": (
        lambda: Keyring({"v1": KEY_1, "v2": b""}), InvalidKeyError, ("key 2 of 2", "0 bytes")
    ),
    "no mapping": (lambda: Keyring("v1"), InvalidKeyError, ("mapping", '{"v1": key}', "str")),  # type: ignore[arg-type]
    "no primary": (
        lambda: Keyring({"v1": KEY_1, "v2": KEY_2}),
        ConfigurationError,
        ("primary=", "'v1', 'v2'"),
    ),
    "version unknown": (lambda: TWO.fingerprint("v3"), ConfigurationError, ("'v1', 'v2'",)),
    "version taken": (lambda: TWO.adding("v1", KEY_1), ConfigurationError, ("'v1'", "new key")),
    "primary taken away": (
        lambda: TWO.without("v2"), ConfigurationError, ("'v2'", "make another version primary")
    ),
    "pickled": (
        lambda: pickle.dumps(ONE), PicklingRefusedError, ("its keys", "Keyring.from_env()")
    ),
    "empty environment": (
        lambda: Keyring.from_env({}),
        ConfigurationError,
        ("LUCENT_SECRETS_KEY", "LUCENT_SECRETS_KEYS", "_FILE", "set_default_keyring()"),
    ),
    "two forms in the environment": (
        lambda: Keyring.from_env({"LUCENT_SECRETS_KEY": "k", "LUCENT_SECRETS_KEY_FILE": "k"}),
        ConfigurationError,
        ("LUCENT_SECRETS_KEY", "LUCENT_SECRETS_KEY_FILE", "keep only one"),
    ),
    "default is no keyring": (
        using_default(lambda: 5), ConfigurationError, ("set_default_keyring()", "int", "Keyring")
    ),
    "default raises": (
        using_default(lambda: dict[str, int]()["v1"]),
        ConfigurationError,
        ("set_default_keyring()", "KeyError"),
    ),
    "value never sealed": (
        opening(VALUE),
        NotSealedError,
        ("users.token", f"{len(VALUE)} bytes", "JSON", "migration", "encrypts", "verify()"),
    ),
    "value of a key that is missing": (
        opening(pack_header("v3", bytes(4))),
        UnknownKeyVersionError,
        ("users.token", "'v3'", "'v1', 'v2'", "Add the key", "verify()"),
    ),
    "value of another key": (
        opening(pack_header("v1", bytes(4))),
        WrongKeyError,
        ("users.token", "'v1'", "00000000", ONE.fingerprint("v1"), "new version", "verify()"),
    ),
    "value of another place": (
        opening(TWO.for_context("users.other").seal(VALUE)),
        TamperedError,
        ("users.token", "EncryptedJSON(context=", "verify()"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_what_is_wrong_and_the_remedy_and_no_secret(name: str) -> None:
    action, class_, parts = CASES[name]
    with pytest.raises(class_) as caught:
        action()
    assert type(caught.value) is class_
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    for secret in ("MARKER", KEY_1.hex()[:8], KEY_2.hex()[:8], repr(KEY_1)[2:12]):
        assert secret not in message
