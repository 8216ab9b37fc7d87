"""Scoped keys: `parse` is the inverse of `str`, and every broken rule is named."""

from __future__ import annotations

import copy
import enum
import pickle
import traceback
import unicodedata
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sqlalchemy_lucent import InvalidKeyError, LucentSecrets, SecretKey
from sqlalchemy_lucent.secret_key import KEY_PART_NAMES
from tests.strategies import KEY_PARTS

KEY = SecretKey("tenant", "tenant_123", "googleDrive", "serviceAccount")
KEYS = st.builds(SecretKey, KEY_PARTS, KEY_PARTS, KEY_PARTS, KEY_PARTS)


def with_part(name: str, value: Any) -> tuple[Any, ...]:
    return tuple(value if part == name else "x" for part in KEY_PART_NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "tenant:tenant_123:googleDrive:serviceAccount",
        "user:user_456:stripe:apiKey",
        "app:default:resend:apiKey",
        "a:b:c:d",
        "%:_:*:?",
        "tenant:Zürich 1:世界:\U0001f511",
    ],
)
def test_text_of_the_documented_form_is_a_key(text: str) -> None:
    key = SecretKey.parse(text)
    assert str(key) == text
    assert list(key) == text.split(":")
    assert key == SecretKey(key.scope, key.owner_id, key.provider, key.name)


@given(KEYS)
def test_parse_is_the_inverse_of_str(key: SecretKey) -> None:
    assert SecretKey.parse(str(key)) == key
    assert str(SecretKey.parse(str(key))) == str(key)


@given(KEYS, KEYS)
@example(SecretKey("a", "b", "c", "d"), SecretKey("a", "b", "c", "D"))
def test_keys_are_equal_when_their_texts_are(left: SecretKey, right: SecretKey) -> None:
    assert (left == right) == (str(left) == str(right))
    assert (left < right) == (tuple(left) < tuple(right))
    if left == right:
        assert hash(left) == hash(right)


@given(st.text(max_size=40) | st.lists(st.text(max_size=6), max_size=6).map(":".join))
def test_any_text_is_a_key_or_refused(text: str) -> None:
    try:
        key = SecretKey.parse(text)
    except InvalidKeyError as error:
        refused = error
    else:
        assert str(key) == text
        return
    assert refused.__context__ is None


@given(st.text(max_size=140))
def test_a_part_is_kept_as_it_is_or_refused(part: str) -> None:
    valid = (
        1 <= len(part) <= 128
        and ":" not in part
        and part == part.strip()
        and part == unicodedata.normalize("NFC", part)
        and not any(unicodedata.category(c) in {"Cc", "Cs"} for c in part)
    )
    if valid:
        assert SecretKey("s", "o", "p", part).name == part
    else:
        with pytest.raises(InvalidKeyError):
            SecretKey("s", "o", "p", part)


BROKEN_RULES: list[tuple[Any, str]] = [
    ("", "is empty"),
    ("x" * 129, "has 129 characters; 128 is the most"),
    ("a:b", "has a colon"),
    (":", "has a colon"),
    ("a\x00b", "control character"),
    ("a\nb", "control character"),
    ("\t", "control character"),
    ("a\x7f", "control character"),
    ("a\x85b", "control character"),
    ("\ud800", "lone surrogate"),
    (" a", "leading or trailing white space"),
    ("a ", "leading or trailing white space"),
    ("a\u00a0", "leading or trailing white space"),
    ("\u2028a", "leading or trailing white space"),
    (" ", "leading or trailing white space"),
    ("u\u0308", "not in Unicode normalisation form NFC"),
    ("\u212b", "not in Unicode normalisation form NFC"),
    (None, "is of type NoneType, not str"),
    (b"a", "is of type bytes, not str"),
    (True, "is of type bool, not str"),
    (1.5, "is of type float, not str"),
    (["a"], "is of type list, not str"),
]


@pytest.mark.parametrize("part", KEY_PART_NAMES)
@pytest.mark.parametrize("value, rule", BROKEN_RULES, ids=[f"{v!r:.12}" for v, _ in BROKEN_RULES])
def test_a_broken_rule_is_named_with_its_part(part: str, value: Any, rule: str) -> None:
    with pytest.raises(InvalidKeyError) as caught:
        SecretKey(*with_part(part, value))
    assert str(caught.value).startswith(f"the {part} of a secret key ")
    assert rule in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("part", ["scope", "provider", "name"])
@pytest.mark.parametrize("value", [5, uuid.UUID(int=5)])
def test_only_the_owner_may_be_a_number_or_uuid(part: str, value: Any) -> None:
    with pytest.raises(InvalidKeyError, match=f"the {part} of a secret key is of type"):
        SecretKey(*with_part(part, value))


class Owner(enum.IntEnum):
    FIRST = 7


@pytest.mark.parametrize(
    "owner, text",
    [
        (42, "42"),
        (0, "0"),
        (-7, "-7"),
        (2**64, "18446744073709551616"),
        (10**127, "1" + "0" * 127),
        (Owner.FIRST, "7"),
        (
            uuid.UUID("00112233-4455-6677-8899-AABBCCDDEEFF"),
            "00112233-4455-6677-8899-aabbccddeeff",
        ),
    ],
)
def test_a_numeric_or_uuid_owner_is_taken_by_its_exact_text(owner: Any, text: str) -> None:
    key = SecretKey("tenant", owner, "stripe", "apiKey")
    assert type(key.owner_id) is str
    assert key == SecretKey("tenant", text, "stripe", "apiKey")
    assert SecretKey.parse(str(key)) == key


@pytest.mark.parametrize("owner", [10**128, -(10**128), 10**5000], ids=["129", "-129", "5001"])
def test_a_number_too_long_for_an_owner_is_refused(owner: int) -> None:
    with pytest.raises(InvalidKeyError, match="the owner_id of a secret key") as caught:
        SecretKey("tenant", owner, "stripe", "apiKey")
    assert caught.value.__context__ is None


class Scope(str, enum.Enum):  # noqa: UP042  (its `str()` is not its text)
    TENANT = "tenant"


def test_parts_given_as_an_enum_become_plain_text() -> None:
    key = SecretKey(Scope.TENANT, Scope.TENANT, Scope.TENANT, Scope.TENANT)
    assert [type(part) for part in key] == [str] * 4
    assert str(key) == "tenant:tenant:tenant:tenant"
    assert "Scope" not in repr(key)


@pytest.mark.parametrize("text", ["", "a", "a:b", "a:b:c", "a:b:c:d:e", ":", "::", "a:b:c:d:"])
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidKeyError, match="has the form scope:ownerId:provider:name"):
        SecretKey.parse(text)


@pytest.mark.parametrize(
    "text, part",
    [(":b:c:d", "scope"), ("a::c:d", "owner_id"), ("a:b::d", "provider"), ("a:b:c:", "name")],
)
def test_an_empty_part_of_text_is_named(text: str, part: str) -> None:
    with pytest.raises(InvalidKeyError, match=f"the {part} of a secret key is empty"):
        SecretKey.parse(text)


@pytest.mark.parametrize("key", [None, 5, b"a:b:c:d", ("a", "b", "c", "d"), ["a", "b", "c", "d"]])
def test_something_else_than_a_key_or_its_text_is_refused(key: Any) -> None:
    for take in (SecretKey.parse, SecretKey.of):
        with pytest.raises(InvalidKeyError, match=f"not {type(key).__name__}"):
            take(key)


def test_of_takes_a_key_or_its_text() -> None:
    assert SecretKey.of(KEY) is KEY
    assert SecretKey.of(str(KEY)) == KEY
    assert LucentSecrets.key("tenant", "tenant_123", "googleDrive", "serviceAccount") == KEY


def test_refused_text_is_not_repeated() -> None:
    # It may be a secret that stands where its key should.
    for text in ("MARKER", "MARKER:", "a:b:c:MARKER\n", "a:b:c: MARKER"):
        with pytest.raises(InvalidKeyError) as caught:
            SecretKey.parse(text)
        assert "MARKER" not in str(caught.value)
        assert "MARKER" not in "".join(traceback.format_exception_only(caught.value))


def test_a_key_is_immutable() -> None:
    for name in (*KEY_PART_NAMES, "other"):
        with pytest.raises(AttributeError):
            setattr(KEY, name, "x")


REPLACEMENTS: dict[str, Callable[[str], SecretKey]] = {
    "_replace": lambda name: KEY._replace(name=name),
    "_make": lambda name: SecretKey._make([*KEY[:3], name]),
}


@pytest.mark.parametrize("way", list(REPLACEMENTS))
def test_a_key_made_from_another_one_is_checked_too(way: str) -> None:
    made = REPLACEMENTS[way]("apiKey")
    assert type(made) is SecretKey
    assert made == SecretKey("tenant", "tenant_123", "googleDrive", "apiKey")
    with pytest.raises(InvalidKeyError, match="the name of a secret key has a colon"):
        REPLACEMENTS[way]("a:b")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_key_survives_pickle_and_copy(protocol: int) -> None:
    for again in (pickle.loads(pickle.dumps(KEY, protocol)), copy.copy(KEY), copy.deepcopy(KEY)):
        assert type(again) is SecretKey
        assert again == KEY


def test_keys_are_ordered_by_their_parts_in_turn() -> None:
    texts = ["b:a:a:a", "a:c:a:a", "a:b:d:a", "a:b:c:e", "a:b:c:d"]
    keys = [SecretKey.parse(text) for text in texts]
    assert [str(key) for key in sorted(keys)] == texts[::-1]


def test_repr_gives_the_key_back() -> None:
    assert repr(KEY) == "SecretKey('tenant', 'tenant_123', 'googleDrive', 'serviceAccount')"
    assert eval(repr(KEY)) == KEY
