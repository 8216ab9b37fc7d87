"""Keyrings: what they take and refuse, where they come from, and that they show no key."""

from __future__ import annotations

import base64
import copy
import copyreg
import dataclasses
import enum
import gc
import inspect
import json
import multiprocessing
import os
import pickle
import pprint
import re
import reprlib
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, MetaData, Table, create_engine

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    InvalidKeyError,
    Keyring,
    Lucent,
    LucentConfig,
    LucentSecrets,
    PicklingRefusedError,
    RetiredKeyError,
    SecretsConfig,
    TamperedError,
    UnknownKeyVersionError,
    default_keyring,
    generate_master_key,
    set_default_keyring,
)
from sqlalchemy_lucent._envelope import is_older
from sqlalchemy_lucent._subkeys import NO_RULES, RegistryRules
from sqlalchemy_lucent.keyring import context_keys
from tests.conftest import KEY_1, KEY_2
from tests.frames import texts_in_frames
from tests.strategies import KEY_VERSIONS, MASTER_KEYS

ROOT = Path(__file__).parents[2]
URLSAFE_1 = base64.urlsafe_b64encode(KEY_1).decode()
URLSAFE_2 = base64.urlsafe_b64encode(KEY_2).decode()


def forms(key: bytes) -> dict[str, bytes | str]:
    """Return every form in which a key may be given."""
    standard = base64.b64encode(key).decode()
    urlsafe = base64.urlsafe_b64encode(key).decode()
    return {
        "bytes": key,
        "base64": standard,
        "unpadded base64": standard.rstrip("="),
        "base64url": urlsafe,
        "unpadded base64url": urlsafe.rstrip("="),
        "hex": key.hex(),
        "upper-case hex": key.hex().upper(),
    }


def markers(key: bytes) -> set[str]:
    """Return what must not be found in any text: the key in every form that text can have."""
    texts = {form for form in forms(key).values() if isinstance(form, str)}
    return texts | {repr(key)[2:-1], repr(list(key))[1:-1], key.decode("latin-1")}


def shows(text: str, key: bytes) -> bool:
    return any(marker in text for marker in markers(key))


def whole(error: BaseException) -> str:
    """Return all that a logger could print of an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))


def assert_shows_nothing(error: BaseException, *secrets: str) -> None:
    assert error.__cause__ is None
    assert error.__context__ is None
    for secret in secrets:
        assert secret not in whole(error)


def environ_of(**variables: str) -> dict[str, str]:
    return {f"LUCENT_SECRETS_{name}": value for name, value in variables.items()}


# -- keys ------------------------------------------------------------------------------------------


def test_generated_key_is_32_bytes_as_unpadded_base64url() -> None:
    key = generate_master_key()
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", key)
    assert len(base64.urlsafe_b64decode(key + "=")) == 32
    Keyring({"v1": key})


def test_generated_keys_differ_and_the_repository_generates_them_too() -> None:
    keys = [generate_master_key() for _ in range(50)]
    keys += [LucentSecrets.generate_master_key() for _ in range(50)]
    assert len(set(keys)) == 100


@given(MASTER_KEYS)
def test_every_form_of_a_key_is_the_same_key(key: bytes) -> None:
    sealed = Keyring({"v1": key}).for_context("c").seal(b"text")
    for form in forms(key).values():
        assert Keyring({"v1": form}).for_context("c").open(sealed) == b"text"


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"k" * 31,
        b"k" * 33,
        URLSAFE_1.encode(),
        "",
        "k" * 32,
        "k" * 42,
        "k" * 45,
        "k" * 44,
        "k" * 42 + "é",
        "k" * 42 + "\n",
        "k" * 43 + "\n",
        "k" * 43 + "==",
        " " + "k" * 43,
        "k" * 42 + "!",
        "+" * 21 + "-" * 22,
        "/" * 21 + "_" * 22,
        "g" * 64,
        "ab" * 31 + "٣٣",
        "ab" * 31,
        "ab" * 33,
        bytearray(KEY_1),
        memoryview(KEY_1),
        list(KEY_1),
        int.from_bytes(KEY_1),
        None,
        True,
    ],
    ids=lambda key: f"{type(key).__name__}-{len(key) if hasattr(key, '__len__') else key!s:.4}",
)
def test_a_key_that_breaks_a_rule_is_refused_without_being_shown(key: Any) -> None:
    attempts: list[Callable[[], Keyring]] = [
        lambda: Keyring({"v1": key}),
        lambda: Keyring({"v1": KEY_2, "v2": key}, primary="v1"),
        lambda: Keyring({"v1": KEY_2}).adding("v2", key),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidKeyError) as caught:
            attempt()
        if isinstance(key, (bytes, str)) and key.strip():
            text = key if isinstance(key, str) else key.decode()
            assert_shows_nothing(caught.value, text, text[:12], repr(text))
        else:
            assert_shows_nothing(caught.value, KEY_1.hex(), repr(KEY_1), repr(list(KEY_1)))


@given(st.binary(max_size=100) | st.text(max_size=100))
def test_any_bytes_or_text_are_a_key_or_refused(key: bytes | str) -> None:
    try:
        keyring = Keyring({"v1": key})
    except InvalidKeyError as error:
        assert_shows_nothing(error)
    else:
        assert len(keyring.fingerprint("v1")) == 8


# -- versions --------------------------------------------------------------------------------------

BAD_VERSIONS = [
    "",
    " ",
    "v 1",
    "v1 ",
    "v1\n",
    "v:1",
    "v/1",
    "v\x001",
    "vé",
    "٣",
    "v" * 33,
    b"v1",
    1,
    None,
    ("v1",),
]


@pytest.mark.parametrize("version", BAD_VERSIONS, ids=repr)
def test_a_malformed_version_is_refused(version: Any) -> None:
    with pytest.raises(InvalidKeyError, match="key version is not 1 to 32 characters"):
        Keyring({version: KEY_1})
    with pytest.raises(InvalidKeyError, match="key version is not 1 to 32 characters"):
        Keyring({"v1": KEY_1}).adding(version, KEY_2)


@given(KEY_VERSIONS)
def test_a_well_formed_version_is_taken(version: str) -> None:
    keyring = Keyring({version: KEY_1})
    assert keyring.primary == version
    assert keyring.for_context("c").seal(b"").startswith(version.encode() + b":")


class Version(str, enum.Enum):  # noqa: UP042  (its `str()` is not its text)
    OLD = "v1"
    NEW = "v2"


def test_versions_given_as_an_enum_become_plain_text() -> None:
    keyring = Keyring({Version.OLD: KEY_1}).adding(Version.NEW, KEY_2).with_primary(Version.NEW)
    assert [type(version) for version in keyring.versions] == [str, str]
    assert keyring.versions == ("v2", "v1")
    assert keyring.fingerprint(Version.NEW) == keyring.fingerprint("v2")
    assert "Version" not in repr(keyring)


@pytest.mark.parametrize("key", list(forms(KEY_1).values()), ids=list(forms(KEY_1)))
def test_keys_exchanged_with_versions_are_refused_without_being_shown(key: Any) -> None:
    with pytest.raises(InvalidKeyError) as caught:
        Keyring({key: "v1"})
    assert not shows(whole(caught.value), KEY_1)
    with pytest.raises(InvalidKeyError) as caught:
        Keyring({"v1": KEY_2}).adding(key, "v2")
    assert not shows(whole(caught.value), KEY_1)


def test_a_short_key_exchanged_with_its_version_is_refused_without_being_shown() -> None:
    # 16 bytes in hexadecimal have the form of a version.
    short = KEY_1[:16].hex()
    for make in (
        lambda: Keyring({short: "v1"}),
        lambda: Keyring({"v1": KEY_2, short: "v2"}, primary="v1"),
        lambda: Keyring({"v1": KEY_2}).adding(short, "v2"),
        lambda: Keyring({"v1": KEY_2}, primary=short),
        lambda: Keyring({"v1": KEY_2}).with_primary(short),
        lambda: Keyring({"v1": KEY_2}).without(short),
        lambda: Keyring({"v1": KEY_2}).fingerprint(short),
        lambda: Keyring.from_env(environ_of(KEYS=f"{short}:v1")),
        lambda: Keyring.from_env(environ_of(KEYS=f"{short}:v1,{short}:v2")),
        lambda: Keyring.from_env(environ_of(KEY="v1", KEY_VERSION=short)),
    ):
        with pytest.raises((InvalidKeyError, ConfigurationError)) as caught:
            make()
        assert_shows_nothing(caught.value, short)


# -- keyrings --------------------------------------------------------------------------------------


def test_the_primary_stands_first_and_the_others_in_order() -> None:
    keyring = Keyring({"a": KEY_1, "b": KEY_2, "c": bytes(32)}, primary="b")
    assert keyring.primary == "b"
    assert keyring.versions == ("b", "a", "c")


@pytest.mark.parametrize("keys", [None, "v1", b"v1", [("v1", KEY_1)], KEY_1, {"v1"}])
def test_a_keyring_of_something_else_than_a_mapping_is_refused(keys: Any) -> None:
    with pytest.raises(InvalidKeyError, match="mapping of versions to keys") as caught:
        Keyring(keys)
    assert not shows(whole(caught.value), KEY_1)


def test_a_keyring_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one key"):
        Keyring({})


def test_a_keyring_of_several_keys_must_be_told_its_primary() -> None:
    with pytest.raises(ConfigurationError, match=r"primary=.* one of 'v1', 'v2'"):
        Keyring({"v1": KEY_1, "v2": KEY_2})


UNKNOWN_VERSIONS = ["v3", "", KEY_1.hex(), b"v1", 1, ["v1"], {}, object]


@pytest.mark.parametrize("version", UNKNOWN_VERSIONS, ids=lambda v: f"{v!s:.8}")
def test_an_unknown_version_is_refused_with_the_versions_at_hand(
    version: Any, promoted: Keyring
) -> None:
    questions: list[Callable[[Any], object]] = [
        promoted.fingerprint,
        promoted.with_primary,
        promoted.without,
        lambda unknown: Keyring({"v1": KEY_1, "v2": KEY_2}, primary=unknown),
    ]
    for ask in questions:
        with pytest.raises(ConfigurationError, match="it has 'v1', 'v2'") as caught:
            ask(version)
        assert not shows(whole(caught.value), KEY_1)


def test_a_version_is_bound_to_its_values() -> None:
    sealed = Keyring({"v1": KEY_1}).for_context("c").seal(b"{}")
    with pytest.raises(TamperedError):
        Keyring({"v2": KEY_1}).for_context("c").open(b"v2" + sealed[2:])


@pytest.mark.parametrize("other", [KEY_1, URLSAFE_1, URLSAFE_1.rstrip("="), KEY_1.hex().upper()])
def test_one_key_under_two_versions_is_refused_in_any_spelling(other: bytes | str) -> None:
    with pytest.raises(ConfigurationError, match="'v1' and 'v2' have the same key"):
        Keyring({"v1": KEY_1, "v2": other}, primary="v2")
    with pytest.raises(ConfigurationError, match="'v1' and 'v2' have the same key"):
        Keyring({"v1": KEY_1}).adding("v2", other)
    if isinstance(other, str):
        with pytest.raises(ConfigurationError, match=r"LUCENT_SECRETS_KEYS: .* the same key"):
            Keyring.from_env({"LUCENT_SECRETS_KEYS": f"v2:{other},v1:{URLSAFE_1}"})


def test_adding_keeps_the_primary_and_leaves_the_original_alone(keyring: Keyring) -> None:
    more = keyring.adding("v2", KEY_2)
    assert more.versions == ("v1", "v2")
    assert keyring.versions == ("v1",)
    assert more.fingerprint("v2") == Keyring({"x": KEY_2}).fingerprint("x")


def test_adding_never_replaces_a_key(keyring: Keyring) -> None:
    for key in (KEY_1, KEY_2):
        with pytest.raises(ConfigurationError, match="already has a key of version 'v1'"):
            keyring.adding("v1", key)


def test_with_primary_seals_under_it_and_leaves_the_original_alone(keyring: Keyring) -> None:
    both = keyring.adding("v2", KEY_2)
    promoted = both.with_primary("v2")
    assert (both.primary, promoted.primary) == ("v1", "v2")
    assert promoted.versions == ("v2", "v1")
    assert promoted.for_context("c").seal(b"").startswith(b"v2:")
    assert both.for_context("c").seal(b"").startswith(b"v1:")


def test_without_no_longer_opens(promoted: Keyring, keyring: Keyring) -> None:
    sealed = keyring.for_context("c").seal(b"text")
    rest = promoted.without("v1")
    assert rest.versions == ("v2",)
    assert promoted.for_context("c").open(sealed) == b"text"
    with pytest.raises(UnknownKeyVersionError):
        rest.for_context("c").open(sealed)


def test_the_primary_cannot_be_taken_away(promoted: Keyring) -> None:
    with pytest.raises(ConfigurationError, match="'v2' is the primary"):
        promoted.without("v2")


def test_a_fingerprint_is_the_key_id_that_sealed_values_carry(keyring: Keyring) -> None:
    assert keyring.for_context("c").seal(b"")[4:8].hex() == keyring.fingerprint("v1")


def test_a_keyring_is_immutable(keyring: Keyring) -> None:
    for name in ("primary", "versions", "_primary", "_master_keys", "other"):
        with pytest.raises(AttributeError):
            setattr(keyring, name, "v2")
        with pytest.raises(AttributeError):
            delattr(keyring, name)
    keyring.__init__({"v1": KEY_2})  # type: ignore[misc]
    assert keyring.fingerprint("v1") == Keyring({"v1": KEY_1}).fingerprint("v1")


def test_a_keyring_does_not_follow_the_mapping_that_it_was_made_from() -> None:
    keys: dict[str, bytes | str] = {"v1": KEY_1}
    keyring = Keyring(keys)
    keys["v2"] = KEY_2
    keys["v1"] = KEY_2
    assert keyring.versions == ("v1",)
    assert keyring.fingerprint("v1") == Keyring({"v1": KEY_1}).fingerprint("v1")


def test_copies_of_a_keyring_are_the_keyring(keyring: Keyring) -> None:
    assert copy.copy(keyring) is keyring
    assert copy.deepcopy(keyring) is keyring
    assert copy.deepcopy({"keyring": [keyring]})["keyring"][0] is keyring


def test_subkeys_are_derived_once_for_all_threads(keyring: Keyring) -> None:
    found = in_threads(lambda: keyring.for_context("c"))
    assert all(keys is found[0] for keys in found)


# -- nothing shows a key ---------------------------------------------------------------------------


def holders(key: bytes, other: bytes) -> Iterator[object]:
    """Return everything that holds a key, used once, so that what it caches is there."""
    keyring = Keyring({"v1": key, "v2": other}, primary="v2")
    config = SecretsConfig(enabled=True, master_key=key.hex(), key_version="v1")
    keys = keyring.for_context("c")
    keys.open(keys.seal(b"text"))
    yield from (keyring, keys, keys.primary, keyring._master_keys, keyring._contexts)
    yield from (config, SecretsConfig(keyring=keyring), LucentConfig(secrets=config))
    yield Lucent({"secrets": {"enabled": True, "masterKey": key, "keyVersion": "v1"}})
    yield keyring.without("v1")


def reduce_as_object(holder: object, protocol: int) -> object:
    return object.__reduce_ex__(holder, protocol)


def renderings() -> dict[str, Callable[[Any], object]]:
    """Return every way to look at an object that people and their tools have."""
    ways: dict[str, Callable[[Any], object]] = {
        "repr": repr,
        "str": str,
        "format": format,
        "percent": lambda holder: "%s %r %a" % (holder, holder, holder),  # noqa: UP031
        "pformat": pprint.pformat,
        "reprlib": reprlib.repr,
        "vars": vars,
        "asdict": dataclasses.asdict,
        "dir": dir,
        "getmembers": inspect.getmembers,
        "slots": lambda holder: [
            getattr(holder, name, None) for name in getattr(type(holder), "__slots__", ())
        ],
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "json": json.dumps,
        "json of repr": lambda holder: json.dumps(holder, default=repr),
        "__getstate__": lambda holder: holder.__getstate__(),
        "object.__getstate__": lambda holder: object.__getstate__(holder),
        "copyreg": lambda holder: copyreg._reduce_ex(holder, 1),  # type: ignore[attr-defined]
        "__reduce__": lambda holder: holder.__reduce__(),
        "object.__reduce__": lambda holder: object.__reduce__(holder),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        ways[f"pickle {protocol}"] = partial(pickle.dumps, protocol=protocol)
        ways[f"reduce {protocol}"] = methodcaller("__reduce_ex__", protocol)
        ways[f"object reduce {protocol}"] = partial(reduce_as_object, protocol=protocol)
    return ways


def rendered(way: Callable[[Any], object], holder: object) -> str:
    try:
        shown = way(holder)
    except Exception as error:
        # Refusing is an answer too, and its message is one more place to look at.
        return whole(error)
    return shown.decode("latin-1") if isinstance(shown, bytes) else f"{shown!r} {shown!s}"


@pytest.mark.parametrize("way", list(renderings()))
def test_no_way_to_look_at_a_holder_of_keys_shows_one(way: str) -> None:
    for holder in holders(KEY_1, KEY_2):
        text = rendered(renderings()[way], holder)
        assert not shows(text, KEY_1), type(holder)
        assert not shows(text, KEY_2), type(holder)


@given(MASTER_KEYS, MASTER_KEYS)
def test_no_key_is_ever_shown(key: bytes, other: bytes) -> None:
    if key == other:
        return
    for holder in holders(key, other):
        for way in renderings().values():
            text = rendered(way, holder)
            assert not shows(text, key)
            assert not shows(text, other)


def reachable(start: object) -> Iterator[object]:
    """Go wherever references lead, but not into code, which leads to the whole process."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(found))
        yield found
        waiting.extend(gc.get_referents(found))


def derived(key: bytes) -> bytes:
    """Return the subkey of the context that `holders` uses."""
    info = b"sqlalchemy-lucent/1/aes-256-gcm" + b"c"
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(key)


def test_no_reference_leads_from_a_holder_of_keys_to_a_key() -> None:
    keys = [KEY_1, KEY_2, derived(KEY_1), derived(KEY_2)]
    for holder in holders(KEY_1, KEY_2):
        for found in reachable(holder):
            if isinstance(found, (bytes, bytearray, str)):
                text = found if isinstance(found, str) else found.decode("latin-1")
                assert not any(shows(text, key) for key in keys), type(holder)


def test_the_search_for_references_finds_a_key_where_there_is_one() -> None:
    class Holder:
        def __init__(self) -> None:
            self.nested = [{"key": (KEY_1,)}]

    assert KEY_1 in list(reachable(Holder()))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_a_keyring_is_refused(keyring: Keyring, protocol: int) -> None:
    with pytest.raises(PicklingRefusedError, match="build its own"):
        pickle.dumps(keyring, protocol)
    with pytest.raises(PicklingRefusedError):
        pickle.dumps({"nested": [keyring]}, protocol)


def test_repr_shows_versions_and_fingerprints(promoted: Keyring) -> None:
    one, two = promoted.fingerprint("v1"), promoted.fingerprint("v2")
    assert repr(promoted) == f"<Keyring primary=v2 v2={two}, v1={one}>"


# -- the oldest version that opens -----------------------------------------------------------------

FOUR = {f"v{n}": bytes([n]) * 32 for n in (1, 2, 9, 10)}


@pytest.mark.parametrize("version", FOUR)
@pytest.mark.parametrize("oldest", FOUR)
def test_values_under_an_older_version_are_refused_though_the_key_is_there(
    version: str, oldest: str
) -> None:
    sealed = Keyring(FOUR, primary=version).for_context("c").seal(b"text")
    keyring = Keyring(FOUR, primary="v10", oldest=oldest)
    assert keyring.oldest == oldest
    for keys in (keyring.for_context("c"), keyring.for_context("d", "c")):
        if int(version[1:]) >= int(oldest[1:]):
            assert keys.open(sealed) == b"text"
            continue
        with pytest.raises(RetiredKeyError, match=f"'{version}'.*'{oldest}' and later") as caught:
            keys.open(sealed)
        assert "with_oldest(None)" in str(caught.value)
    assert keyring.with_oldest(None).for_context("c").open(sealed) == b"text"


def test_an_older_version_is_retired_whether_or_not_its_key_is_there() -> None:
    sealed = Keyring({"v1": KEY_1}).for_context("c").seal(b"text")
    with pytest.raises(RetiredKeyError):
        Keyring({"v2": KEY_2}, oldest="v2").for_context("c").open(sealed)
    with pytest.raises(UnknownKeyVersionError):
        Keyring({"v2": KEY_2}).for_context("c").open(sealed)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("v9", "v10"),
        ("v1", "v1.1"),
        ("2024-09", "2024-10"),
        ("a", "b"),
        ("9", "v1"),
        ("k-2", "k-11"),
    ],
)
def test_versions_are_compared_in_natural_order(older: str, newer: str) -> None:
    keys = {older: KEY_1, newer: KEY_2}
    sealed = Keyring(keys, primary=older).for_context("c").seal(b"text")
    with pytest.raises(RetiredKeyError):
        Keyring(keys, primary=newer, oldest=newer).for_context("c").open(sealed)
    assert Keyring(keys, primary=newer, oldest=older).for_context("c").open(sealed) == b"text"


@given(KEY_VERSIONS, KEY_VERSIONS)
def test_any_two_versions_can_be_compared(one: str, other: str) -> None:
    assert not (is_older(one, other) and is_older(other, one))
    assert not is_older(one, one)


def test_every_copy_of_a_keyring_keeps_its_oldest() -> None:
    keyring = Keyring({"v3": KEY_1, "v2": KEY_2}, primary="v3", oldest="v2")
    copies = [
        keyring.with_primary("v2"),
        keyring.adding("v1", b"k" * 32),
        keyring.without("v2"),
        copy.copy(keyring),
        copy.deepcopy(keyring),
    ]
    assert [each.oldest for each in copies] == ["v2"] * len(copies)
    assert keyring.with_oldest("v3").oldest == "v3"
    assert keyring.with_oldest(None).oldest is None
    assert Keyring({"v1": KEY_1}).oldest is None
    assert "primary=v3 oldest=v2 v3=" in repr(keyring)


@pytest.mark.parametrize("oldest", [*UNKNOWN_VERSIONS, ""], ids=lambda v: f"{v!s:.8}")
def test_an_oldest_version_that_the_keyring_lacks_is_refused_without_being_shown(
    oldest: Any,
) -> None:
    with pytest.raises(ConfigurationError, match="it has 'v2', 'v1'") as caught:
        Keyring({"v2": KEY_1, "v1": KEY_2}, primary="v2", oldest=oldest)
    assert_shows_nothing(caught.value, URLSAFE_1[:8])


def test_a_primary_that_is_older_than_the_oldest_is_refused() -> None:
    keyring = Keyring({"v2": KEY_1, "v1": KEY_2}, primary="v2", oldest="v2")
    for refused in (
        partial(Keyring, {"v2": KEY_1, "v1": KEY_2}, primary="v1", oldest="v2"),
        partial(keyring.with_primary, "v1"),
        partial(keyring.with_oldest(None).with_primary("v1").with_oldest, "v2"),
    ):
        with pytest.raises(ConfigurationError, match=r"'v1' cannot be the primary.*'v2'"):
            refused()


def test_the_oldest_version_comes_from_the_environment(tmp_path: Path) -> None:
    keys = f"v2:{URLSAFE_2},v1:{URLSAFE_1}"
    assert Keyring.from_env(environ_of(KEYS=keys)).oldest is None
    assert Keyring.from_env(environ_of(KEYS=keys, OLDEST_VERSION=" v2\n")).oldest == "v2"
    path = tmp_path / "oldest"
    path.write_text("v1\n")
    assert Keyring.from_env(environ_of(KEYS=keys, OLDEST_VERSION_FILE=str(path))).oldest == "v1"
    assert Keyring.from_env(environ_of(KEY=URLSAFE_1, OLDEST_VERSION="v1")).oldest == "v1"
    config = LucentConfig.from_env(environ_of(KEYS=keys, OLDEST_VERSION="v2")).secrets
    assert config.keyring is not None
    assert config.keyring.oldest == "v2"


# -- the environment -------------------------------------------------------------------------------


def test_one_key_from_the_environment_is_v1() -> None:
    keyring = Keyring.from_env(environ_of(KEY=URLSAFE_1))
    assert keyring.versions == ("v1",)
    assert keyring.fingerprint("v1") == Keyring({"v1": KEY_1}).fingerprint("v1")


def test_one_key_from_the_environment_takes_the_version_given() -> None:
    assert Keyring.from_env(environ_of(KEY=URLSAFE_1, KEY_VERSION="v7")).versions == ("v7",)


def test_the_first_of_several_keys_from_the_environment_is_the_primary() -> None:
    keyring = Keyring.from_env(environ_of(KEYS=f"v2:{URLSAFE_2},v1:{KEY_1.hex()}"))
    assert keyring.versions == ("v2", "v1")
    assert keyring.fingerprint("v1") == Keyring({"x": KEY_1}).fingerprint("x")


def test_white_space_around_values_from_the_environment_is_not_part_of_them() -> None:
    assert Keyring.from_env(environ_of(KEY=f" {URLSAFE_1}\n", KEY_VERSION=" v7\t")).primary == "v7"
    keyring = Keyring.from_env(environ_of(KEYS=f"\n v2 : {URLSAFE_2} ,\n v1 : {URLSAFE_1}\n"))
    assert keyring.versions == ("v2", "v1")


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCENT_SECRETS_KEYS", f"v9:{URLSAFE_1}")
    assert Keyring.from_env().versions == ("v9",)


@pytest.mark.parametrize("name", ["KEY", "KEYS", "KEY_VERSION"])
def test_each_variable_may_be_a_file(name: str, tmp_path: Path) -> None:
    values = {"KEY": URLSAFE_1, "KEY_VERSION": "v7"}
    if name == "KEYS":
        values = {"KEYS": f"v7:{URLSAFE_1}"}
    path = tmp_path / "secret"
    path.write_text(values.pop(name) + "\r\n")
    keyring = Keyring.from_env(environ_of(**values, **{f"{name}_FILE": str(path)}))
    assert keyring.fingerprint(keyring.primary) == Keyring({"v1": KEY_1}).fingerprint("v1")
    assert keyring.primary == ("v1" if name == "KEY" and "KEY_VERSION" not in values else "v7")


def test_no_keyring_is_refused_with_the_variables_to_set() -> None:
    for environ in ({}, environ_of(KEY_VERSION="v1")):
        with pytest.raises(ConfigurationError, match="no keyring is configured") as caught:
            Keyring.from_env(environ)
        for name in ("LUCENT_SECRETS_KEY ", "LUCENT_SECRETS_KEYS=", "KEY_VERSION", "_FILE"):
            assert name in str(caught.value)


BAD_ENVIRONMENTS: list[tuple[dict[str, str], str]] = [
    (environ_of(KEY=""), "LUCENT_SECRETS_KEY is set but empty"),
    (environ_of(KEY=" \n"), "LUCENT_SECRETS_KEY is set but empty"),
    (environ_of(KEYS=""), "LUCENT_SECRETS_KEYS is set but empty"),
    (environ_of(KEY_FILE=""), "LUCENT_SECRETS_KEY_FILE is set but empty"),
    (environ_of(KEY=URLSAFE_1, KEY_VERSION=""), "LUCENT_SECRETS_KEY_VERSION is set but empty"),
    (environ_of(KEY=URLSAFE_1[:30]), "LUCENT_SECRETS_KEY: the master key has 30 characters"),
    (environ_of(KEY=URLSAFE_1[:-2] + "!"), "LUCENT_SECRETS_KEY: .* a character that its alphabet"),
    (environ_of(KEY=URLSAFE_1, KEY_VERSION="v 1"), "LUCENT_SECRETS_KEY_VERSION: the key version"),
    (
        environ_of(KEY=URLSAFE_1, KEYS=f"v1:{URLSAFE_1}"),
        "both LUCENT_SECRETS_KEYS and LUCENT_SECRETS_KEY are set",
    ),
    (
        environ_of(KEY_VERSION="v1", KEYS=f"v1:{URLSAFE_1}"),
        "both LUCENT_SECRETS_KEYS and LUCENT_SECRETS_KEY_VERSION are set",
    ),
    (
        environ_of(KEY_FILE=__file__, KEYS=f"v1:{URLSAFE_1}"),
        "both LUCENT_SECRETS_KEYS and LUCENT_SECRETS_KEY_FILE are set",
    ),
    (
        environ_of(KEY=URLSAFE_1, KEY_FILE=__file__),
        "both LUCENT_SECRETS_KEY and LUCENT_SECRETS_KEY_FILE are set",
    ),
    (environ_of(KEYS=URLSAFE_1), "LUCENT_SECRETS_KEYS: entry 1 is not of the form VERSION:KEY"),
    (environ_of(KEYS=f"v1:{URLSAFE_1},"), "LUCENT_SECRETS_KEYS: entry 2 is not of the form"),
    (environ_of(KEYS=f"v1={URLSAFE_1}"), "LUCENT_SECRETS_KEYS: entry 1 is not of the form"),
    (environ_of(KEYS=f"v1:{URLSAFE_1};v2:{URLSAFE_2}"), "LUCENT_SECRETS_KEYS: the master key"),
    (environ_of(KEYS=f":{URLSAFE_1}"), "LUCENT_SECRETS_KEYS: the key version"),
    (environ_of(KEYS="v1:"), "LUCENT_SECRETS_KEYS: the master key has 0 characters"),
    (
        environ_of(KEYS=f"v1:{URLSAFE_1},v1:{URLSAFE_2}"),
        "LUCENT_SECRETS_KEYS: key 2 of 2: duplicate version",
    ),
    (environ_of(KEYS=f"{URLSAFE_1}:v1"), "LUCENT_SECRETS_KEYS: the key version"),
    (environ_of(KEYS=f"v2:{URLSAFE_2},v1:short"), "key 2 of 2: the master key has 5 characters"),
    (
        environ_of(KEYS=f"v1:{URLSAFE_1},v2:{URLSAFE_2}", OLDEST_VERSION="v2"),
        "LUCENT_SECRETS_OLDEST_VERSION: version 'v1' cannot be the primary",
    ),
    (
        environ_of(KEY=URLSAFE_1, OLDEST_VERSION=URLSAFE_2),
        "LUCENT_SECRETS_OLDEST_VERSION: the keyring has no key of the given version",
    ),
    (environ_of(KEY=URLSAFE_1, OLDEST_VERSION=""), "LUCENT_SECRETS_OLDEST_VERSION is set but"),
    (environ_of(OLDEST_VERSION="v1"), "no keyring is configured"),
]


@pytest.mark.parametrize("environ, fault", BAD_ENVIRONMENTS)
def test_a_bad_environment_is_refused_by_variable_and_fault_and_shows_no_key(
    environ: dict[str, str], fault: str
) -> None:
    with pytest.raises(ConfigurationError, match=fault) as caught:
        Keyring.from_env(environ)
    assert_shows_nothing(caught.value, URLSAFE_1[:8], URLSAFE_2[:8])


@pytest.mark.parametrize("value", [None, b"bytes", 5])
def test_a_value_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="LUCENT_SECRETS_KEY is of type"):
        Keyring.from_env({"LUCENT_SECRETS_KEY": value})


def make_file(directory: Path, kind: str) -> str:
    path = directory / "secret"
    if kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe" + KEY_1)
    elif kind == "empty":
        path.write_text("\n")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "NUL in the path":
        return f"{path}\0"
    elif kind == "a key for a path":
        return URLSAFE_1
    elif kind == "an endless path":
        return "k" * 5000
    return str(path)


@pytest.mark.parametrize(
    "kind, fault",
    [
        ("missing", "No such file"),
        ("directory", "Is a directory"),
        ("binary", "not a text file"),
        ("empty", "is set but empty"),
        ("loop", "symbolic link"),
        ("NUL in the path", "not a path"),
        ("a key for a path", "No such file"),
        ("an endless path", "name too long"),
    ],
)
@pytest.mark.parametrize("name", ["KEY", "KEYS", "KEY_VERSION"])
def test_a_file_that_cannot_be_read_is_refused(
    kind: str, fault: str, name: str, tmp_path: Path
) -> None:
    environ = environ_of(**{f"{name}_FILE": make_file(tmp_path, kind)})
    with pytest.raises(ConfigurationError, match=f"LUCENT_SECRETS_{name}_FILE.*{fault}") as caught:
        Keyring.from_env(environ)
    assert_shows_nothing(caught.value, URLSAFE_1[:8], repr(KEY_1)[2:12], str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="there are no user ids on this system")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(URLSAFE_1)
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root reads a file without permission
    try:
        with pytest.raises(ConfigurationError, match="Permission denied"):
            Keyring.from_env(environ_of(KEY_FILE=str(path)))
    finally:
        os.seteuid(user)


@given(
    st.dictionaries(
        st.sampled_from(["KEY", "KEYS", "KEY_VERSION"]),
        st.text(max_size=60) | st.sampled_from([URLSAFE_1, f"v1:{URLSAFE_1}", "v1"]),
    )
)
def test_any_environment_gives_a_keyring_or_a_configuration_error(
    variables: Mapping[str, str],
) -> None:
    try:
        Keyring.from_env(environ_of(**variables))
    except ConfigurationError as error:
        assert_shows_nothing(error, URLSAFE_1[:8])


# -- the default keyring ---------------------------------------------------------------------------


def in_threads(work: Callable[[], Any], count: int = 16) -> list[Any]:
    """Run `work` in many threads at once and return what each gave."""
    barrier = threading.Barrier(count)
    results: list[Any] = []

    def run() -> None:
        barrier.wait()
        results.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def in_fresh_process(code: str, *arguments: str, **environ: str) -> str:
    """Run Python code in a process of its own, with no key but those in `environ`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("LUCENT_SECRETS")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def no_default() -> None:
    set_default_keyring(None)


def test_what_is_set_is_the_default(promoted: Keyring) -> None:
    set_default_keyring(promoted)
    assert default_keyring() is promoted


def test_the_subkeys_of_a_value_are_those_of_the_keyring_at_hand(
    keyring: Keyring, promoted: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # derived, and kept
        set_default_keyring(promoted)
        assert context_keys(("c",)) is promoted.for_context("c")
        assert context_keys(("c",), keyring) is keyring.for_context("c")
        set_default_keyring(lambda: keyring)
        assert context_keys(("c",)) is keyring.for_context("c")
        assert context_keys(("d",)) is keyring.for_context("d") is not context_keys(("c",))
    monkeypatch.setenv("LUCENT_SECRETS_KEY", KEY_2.hex())
    set_default_keyring(None)
    assert context_keys(("c",)) is default_keyring().for_context("c")
    assert context_keys(("c",)).primary.header.startswith(b"v1:")


@pytest.mark.usefixtures("no_default")
def test_the_default_is_read_from_the_environment_once_and_at_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LUCENT_SECRETS_KEYS", f"v5:{URLSAFE_1}")
    first = default_keyring()
    assert first.primary == "v5"
    monkeypatch.setenv("LUCENT_SECRETS_KEYS", f"v6:{URLSAFE_2}")
    assert default_keyring() is first
    set_default_keyring(None)
    assert default_keyring().primary == "v6"


@pytest.mark.usefixtures("no_default")
def test_no_default_is_refused_and_may_be_set_later(
    monkeypatch: pytest.MonkeyPatch, keyring: Keyring
) -> None:
    for name in list(os.environ):
        if name.startswith("LUCENT_SECRETS"):
            monkeypatch.delenv(name)
    with pytest.raises(ConfigurationError, match="no keyring is configured"):
        default_keyring()
    set_default_keyring(keyring)
    assert default_keyring() is keyring


def test_a_callable_default_is_called_at_each_use(keyring: Keyring, promoted: Keyring) -> None:
    keyrings = [keyring, promoted]
    set_default_keyring(lambda: keyrings[0])
    assert default_keyring() is keyring
    keyrings.reverse()
    assert default_keyring() is promoted


def test_a_callable_that_returns_something_else_is_refused() -> None:
    set_default_keyring(lambda: URLSAFE_1)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigurationError, match="returned str instead of a Keyring") as caught:
        default_keyring()
    assert_shows_nothing(caught.value, URLSAFE_1)


def test_an_error_of_the_callable_is_named_by_its_type_and_not_let_through() -> None:
    def fail() -> Keyring:
        raise TimeoutError(URLSAFE_1)

    set_default_keyring(fail)
    with pytest.raises(ConfigurationError, match="raised TimeoutError") as caught:
        default_keyring()
    assert_shows_nothing(caught.value, URLSAFE_1)


def test_an_error_of_the_callable_does_not_make_sqlalchemy_show_the_value() -> None:
    def fail() -> Keyring:
        raise TimeoutError

    set_default_keyring(fail)
    table = Table("t", MetaData(), Column("secret", EncryptedJSON))
    row = {"secret": {"a": "MARKER"}}
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        table.create(connection)
        with pytest.raises(ConfigurationError) as caught:
            connection.execute(table.insert(), row)
    engine.dispose()
    assert "MARKER" not in whole(caught.value)


def test_an_error_of_the_package_from_the_callable_is_let_through() -> None:
    set_default_keyring(lambda: Keyring.from_env({}))
    with pytest.raises(ConfigurationError, match="no keyring is configured"):
        default_keyring()


@pytest.mark.parametrize("wrong", [URLSAFE_1, KEY_1, {"v1": KEY_1}, 5, False])
def test_a_default_that_is_no_keyring_is_refused(wrong: Any, keyring: Keyring) -> None:
    with pytest.raises(ConfigurationError, match="a Keyring, a callable") as caught:
        set_default_keyring(wrong)
    assert not shows(whole(caught.value), KEY_1)
    assert default_keyring() is keyring


@pytest.mark.usefixtures("no_default")
def test_threads_that_use_the_default_first_get_keyrings_of_the_same_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not always the same object: there is no lock, and two threads may both read the environment.
    monkeypatch.setenv("LUCENT_SECRETS_KEY", URLSAFE_1)
    for _ in range(20):
        set_default_keyring(None)
        found = in_threads(default_keyring)
        assert {(k.versions, k.fingerprint("v1")) for k in found} == {
            (("v1",), Keyring({"v1": KEY_1}).fingerprint("v1"))
        }
        assert default_keyring() is default_keyring()


# -- processes -------------------------------------------------------------------------------------

NONCES = """
import os, sys
from sqlalchemy_lucent import Keyring, set_default_keyring, default_keyring
from sqlalchemy_lucent._envelope import parse

forks, seals, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
set_default_keyring(Keyring({"v1": bytes(32)}))
keys = default_keyring().for_context("c")

def nonces(count):
    return [parse(keys.seal(b"text")).nonce for _ in range(count)]

found = nonces(100)                                 # the parent has sealed before it forks
children = []
for number in range(forks):
    pid = os.fork()
    if pid == 0:
        with open(f"{directory}/{number}", "wb") as file:
            file.write(b"".join(nonces(seals // forks)))
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
found += nonces(100)
for number in range(forks):
    with open(f"{directory}/{number}", "rb") as file:
        data = file.read()
    found += [data[at : at + 12] for at in range(0, len(data), 12)]
print(len(found), len(set(found)))
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_nonces_of_forked_children_never_repeat(tmp_path: Path) -> None:
    seals = 200_000 if os.environ.get("LUCENT_TEST_LONG") == "1" else 20_000
    found, distinct = in_fresh_process(NONCES, "8", str(seals), str(tmp_path)).split()
    assert found == distinct == str(seals + 200)


FORK_WHILE_READING = """
import os, signal, sys, threading
from sqlalchemy_lucent import default_keyring

fifo, key = sys.argv[1], sys.argv[2]
os.mkfifo(fifo)
os.environ["LUCENT_SECRETS_KEY_FILE"] = fifo
reader = threading.Thread(target=default_keyring)
reader.start()
writer = os.open(fifo, os.O_WRONLY)                 # returns when the thread has opened the file
pid = os.fork()
if pid == 0:
    signal.alarm(20)                                # a child that waits for ever is killed
    del os.environ["LUCENT_SECRETS_KEY_FILE"]
    os.environ["LUCENT_SECRETS_KEY"] = key
    os._exit(0 if default_keyring().primary == "v1" else 1)
status = os.waitpid(pid, 0)[1]
os.write(writer, key.encode())
os.close(writer)
reader.join()
print(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_child_forked_while_a_thread_reads_the_environment_has_a_default(tmp_path: Path) -> None:
    output = in_fresh_process(
        FORK_WHILE_READING, str(tmp_path / "fifo"), URLSAFE_1, PYTHONWARNINGS="ignore"
    )
    assert output.strip() == "0"


def open_in_child(sealed: bytes) -> tuple[bytes, bytes]:
    keys = default_keyring().for_context("c")
    return keys.open(sealed), keys.seal(b"from the child")


def test_a_spawned_child_builds_its_own_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCENT_SECRETS_KEY", URLSAFE_1)
    set_default_keyring(None)
    keys = default_keyring().for_context("c")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        opened, sealed = pool.submit(open_in_child, keys.seal(b"from the parent")).result()
    assert opened == b"from the parent"
    assert keys.open(sealed) == b"from the child"


KEYLESS = """
import sqlalchemy_lucent as lucent
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select
from sqlalchemy.schema import CreateTable

table = Table("t", MetaData(), Column("id", Integer, primary_key=True),
              Column("secret", lucent.EncryptedJSON))
engine = create_engine("sqlite://")
with engine.begin() as connection:
    table.metadata.create_all(connection)
    lucent.LucentBase.metadata.create_all(connection)
    assert connection.execute(select(table)).all() == []
    assert connection.execute(select(lucent.LucentSecret.__table__)).all() == []
str(CreateTable(table).compile(engine))
insert(table).values(id=1, secret={"a": 1}).compile(engine)
select(table.c.secret.key_version).compile(engine)
repr(table)
try:
    with engine.begin() as connection:
        table.metadata.create_all(connection)
        connection.execute(insert(table).values(id=1, secret={"a": "MARKER"}))
except lucent.ConfigurationError as error:
    assert "LUCENT_SECRETS_KEY" in str(error) and "MARKER" not in str(error)
    print("refused")
engine.dispose()
"""


def test_importing_ddl_and_compiling_need_no_key() -> None:
    assert in_fresh_process(KEYLESS).strip() == "refused"


# -- the key registry's part -----------------------------------------------------------------------


def test_a_keyring_gives_the_check_id_and_mac_of_each_of_its_keys(promoted: Keyring) -> None:
    assert promoted.check_id("v1").hex() == "080f95d803ffa57de29f38a85f5236c9"
    assert promoted.check_id("v2").hex() == "0bc189cd688496d919d9eac527eac500"
    assert len({promoted.mac(v, p, b"m") for v in ("v1", "v2") for p in ("a", "b")}) == 4
    for missing in (promoted.check_id, lambda v: promoted.mac(v, "a", b"m")):
        with pytest.raises(ConfigurationError, match="has no key of the given version"):
            missing("v3")


def test_a_keyring_under_the_registrys_rules_opens_nothing_that_is_retired(
    keyring: Keyring, promoted: Keyring
) -> None:
    sealed = keyring.for_context("c").seal(b"{}")
    ruled = promoted.ruled("v2", RegistryRules(frozenset({"v1"})))
    with pytest.raises(RetiredKeyError, match="'v1', which the key registry says is retired"):
        ruled.for_context("c").open(sealed)
    assert ruled.for_context("c").open(ruled.for_context("c").seal(b"[]")) == b"[]"
    assert promoted.ruled("v1", NO_RULES).for_context("c").open(sealed) == b"{}"
    with pytest.raises(ConfigurationError, match="has no key of the given version"):
        promoted.ruled("v3", NO_RULES)


def test_a_keyring_under_the_registrys_rules_may_be_kept_from_sealing(promoted: Keyring) -> None:
    sealed = promoted.for_context("c").seal(b"{}")
    keys = promoted.ruled("v2", RegistryRules(refusal="not now")).for_context("c")
    with pytest.raises(ConfigurationError, match="not now") as caught:
        keys.seal(b"MARKER")
    assert not any(b"MARKER" in data for _, data in texts_in_frames(caught.value))
    assert keys.open(sealed) == b"{}"


def test_a_keyring_keeps_its_oldest_version_under_the_registrys_rules(promoted: Keyring) -> None:
    assert promoted.with_oldest("v2").ruled("v2", NO_RULES).oldest == "v2"


def test_following_asks_the_registry(keyring: Keyring) -> None:
    class Registry:
        def following(self) -> Callable[[], Keyring]:
            return lambda: keyring

    assert Keyring.following(Registry())() is keyring


def test_a_value_of_an_accepted_context_opens_for_its_row_only() -> None:
    keyring = Keyring({"v1": KEY_1})
    sealed = keyring.for_context("old").seal(b"text", b"row")
    keys = keyring.for_context("new", "other", "old")
    assert keys.open(sealed, b"row") == b"text"
    assert keys.seal(b"", b"row") != keyring.for_context("old").seal(b"", b"row")
    for row in (b"", b"another"):
        with pytest.raises(TamperedError):
            keys.open(sealed, row)
    with pytest.raises(TamperedError):
        keyring.for_context("new", "other").open(sealed, b"row")


@pytest.mark.parametrize("type_", [bytes, bytearray, memoryview])
def test_a_value_opens_whatever_type_of_bytes_it_is(type_: Callable[[bytes], Any]) -> None:
    keys = Keyring({"v1": KEY_1}).for_context("c")
    assert keys.open(type_(keys.seal(b"text"))) == b"text"


def test_a_variable_of_another_type_is_told_by_its_type() -> None:
    with pytest.raises(ConfigurationError, match="of type int"):
        Keyring.from_env({"LUCENT_SECRETS_KEY": 5})  # type: ignore[dict-item]
