"""Schemas: values of the user's types in and out, and errors that do not quote the document."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import pickle
import subprocess
import sys
import traceback
import uuid
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pydantic
import pytest

from sqlalchemy_lucent import ConfigurationError, SchemaMismatchError, SerializationError
from sqlalchemy_lucent._schema import Schema

MARKER = "MARKER-9f2c"


NIL = uuid.UUID(int=0)


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Token:
    value: str
    expiry: dt.datetime | None = None


@dataclasses.dataclass
class Account:
    email: str
    tokens: list[Token] = dataclasses.field(default_factory=list)
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    balance: decimal.Decimal = decimal.Decimal(0)
    id: uuid.UUID = NIL
    raw: bytes = b""
    color: Color = Color.RED
    kind: Literal["a", "b"] = "a"


class Keys(TypedDict):
    public: str
    private: NotRequired[str]


class Settings(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    api_key: str
    rate_limit: Annotated[int, msgspec.Meta(ge=1)] = 1


class Credentials(pydantic.BaseModel):
    user_name: str = pydantic.Field(alias="userName")
    password: pydantic.SecretStr | None = None
    scopes: list[str] = []
    expires: dt.datetime | None = None


class Nested(pydantic.BaseModel, extra="forbid"):
    inner: dict[str, list[int]]


@pydantic.dataclasses.dataclass
class Checked:
    port: Annotated[int, pydantic.Field(gt=0)]


NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=dt.UTC)

VALUES: list[tuple[Any, Any]] = [
    (Account, Account("a@b", [Token("t", NOW)], {"x": 2**70}, decimal.Decimal("1.50"), raw=b"\0")),
    (Keys, {"public": "p"}),
    (Keys, {"public": "p", "private": "q"}),
    (Settings, Settings("k", 5)),
    (Credentials, Credentials(userName="u", scopes=["a"], expires=NOW)),
    (Nested, Nested(inner={"a": [1, 2]})),
    (Checked, Checked(port=5)),
    (list[Token], [Token("a"), Token("b", NOW)]),
    (dict[str, Credentials], {"x": Credentials(userName="u")}),
    (Account | None, None),
    (Account | None, Account("x")),
    (list[int], [1, 2**80]),
    (dict[int, str], {1: "a"}),
]


@pytest.mark.parametrize("type_, value", VALUES)
def test_a_value_comes_back_equal_and_of_its_type(type_: Any, value: Any) -> None:
    schema = Schema(type_)
    loaded = schema.load(schema.dump(value))
    assert loaded == value
    assert type(loaded) is type(value)
    assert pickle.loads(pickle.dumps(schema)).load(schema.dump(value)) == value


def test_a_document_is_loaded_from_bytes_too() -> None:
    assert Schema(Token).load(b'{"value":"x"}') == Token("x")


@pytest.mark.parametrize(
    "type_, value",
    [
        (Account, {"email": MARKER}),
        (Account, Token(MARKER)),
        (Account, Account(5)),  # type: ignore[arg-type]
        (Account, Account("x", limits={"a": MARKER})),  # type: ignore[dict-item]
        (Account, MARKER),
        (Account, object()),
        (Keys, {"public": "x", "unknown": MARKER}),
        (Keys, {"private": MARKER}),
        (Settings, Settings(MARKER, 0)),
        (Credentials, {"userName": MARKER}),
        (Credentials, Settings(MARKER)),
        (Credentials, Credentials.model_construct(user_name=5, scopes=MARKER)),
        # The model writes it as "**********", which would lose it.
        (Credentials, Credentials(userName="u", password=pydantic.SecretStr(MARKER))),
        (Credentials, Credentials(userName="\ud800" + MARKER)),
        (list[float], [float("nan")]),
        (list[Token], [Token("a"), MARKER]),
    ],
)
def test_a_value_that_is_not_of_the_type_or_would_change_is_refused(type_: Any, value: Any) -> None:
    with pytest.raises(SerializationError) as caught:
        Schema(type_).dump(value)
    assert_clean(caught.value)


def test_the_refusal_of_a_secret_str_says_what_it_needs() -> None:
    value = Credentials(userName="u", password=pydantic.SecretStr(MARKER))
    for type_, given in ((Credentials, value), (list[Credentials], [value])):
        with pytest.raises(SerializationError, match="SecretStr needs a field_") as caught:
            Schema[Any](type_).dump(given)
        assert_clean(caught.value)


@dataclasses.dataclass
class OtherToken:
    value: str


def test_the_refusal_of_another_class_with_the_same_fields_names_it() -> None:
    with pytest.raises(SerializationError, match=r"as Token: .* an equal OtherToken$"):
        Schema[Any](Token).dump(OtherToken("x"))


@pytest.mark.parametrize(
    "type_, document, path",
    [
        (Account, {"email": 5}, r"\$\.email: Expected `str`, got `int`"),
        (Account, {}, r"\$: Object missing required field `email`"),
        (Account, [MARKER], r"\$: Expected `object`, got `array`"),
        (Account, {"email": "x", "tokens": [{"value": 1}]}, r"\$\.tokens\[0\]\.value: Expected"),
        (Account, {"email": "x", "limits": {MARKER: "x"}}, r"\$\.limits\[\.\.\.\]: Expected"),
        (Account, {"email": "x", "color": MARKER}, r"\$\.color: the value breaks a rule"),
        (Account, {"email": "x", "kind": MARKER}, r"\$\.kind: the value breaks a rule"),
        (Account, {"email": "x", "balance": MARKER}, r"\$\.balance: the value breaks a rule"),
        (Account, {"email": "x", "id": MARKER}, r"\$\.id: the value breaks a rule"),
        (Keys, {"private": MARKER}, r"\$: Object missing required field `public`"),
        (Settings, {"apiKey": "x", "rateLimit": 0}, r"\$\.rateLimit: the value breaks a rule"),
        (Settings, {"apiKey": "x", MARKER: 0}, r"\$: the value breaks a rule"),
        (dict[int, str], {MARKER: "x"}, r"a key in \$: "),
        (Credentials, {"userName": 5}, r"\$\.userName: string_type"),
        (Credentials, {"password": MARKER}, r"\$\.userName: missing"),
        (Nested, {"inner": {MARKER: [MARKER]}}, r"\$\.inner\[\.\.\.\]\[0\]: int_type"),
        (Nested, {"inner": {}, MARKER.replace("-", "_"): 1}, r"\$\[\.\.\.\]: extra_forbidden"),
        (dict[str, Credentials], {MARKER[:6]: {}}, r"\$\[\.\.\.\]\.userName: missing"),
        (dict[str, Token], {MARKER[:6]: {}}, r"\$\[\.\.\.\]: Object missing"),
        (Nested, {"inner": {"a": [[MARKER]]}}, r"\$\.inner\[\.\.\.\]\[0\]: int_type"),
        (Checked, {"port": 0}, r"\$\.port: greater_than"),
        (Credentials, MARKER, r"\$: model_type"),
        (list[Credentials], [{"userName": 5}], r"\$\[0\]\.userName: string_type"),
    ],
)
def test_a_document_that_does_not_fit_is_named_by_path_and_never_quoted(
    type_: Any, document: Any, path: str
) -> None:
    with pytest.raises(SchemaMismatchError, match=path) as caught:
        Schema(type_).load(document)
    assert_clean(caught.value)


@dataclasses.dataclass
class Forging:
    """Its error looks like one of msgspec's, with a path that is made of the document."""

    token: str

    def __post_init__(self) -> None:
        raise ValueError(f"no - at `$.{self.token}`")


def test_a_path_that_the_document_made_is_not_shown() -> None:
    for type_, document in ((Forging, {"token": "MARKER"}), (list[Forging], [{"token": "MARKER"}])):
        with pytest.raises(SchemaMismatchError) as caught:
            Schema(type_).load(document)
        assert "MARKER" not in str(caught.value)


class Tree(msgspec.Struct):
    children: list[Tree] = []
    value: int = 0


class Branch(pydantic.BaseModel):
    children: list[Branch] = []
    value: int = 0


@pytest.mark.parametrize("type_", [Tree, Branch])
def test_a_long_path_is_cut_off(type_: Any) -> None:
    document: dict[str, Any] = {"value": MARKER}
    for _ in range(60):
        document = {"children": [document]}
    with pytest.raises(SchemaMismatchError, match=r"children\[0\]\.\.\.: ") as caught:
        Schema(type_).load(document)
    assert len(str(caught.value)) < 300


class Shape(TypedDict):
    name: str
    nested: dict[str, list[int | None]]
    at: dt.datetime
    pair: tuple[str, tuple[int, ...]]
    anything: Any
    color: Annotated[Color | None, msgspec.Meta(title="c")]
    keys: NotRequired[Keys]


class Loop(TypedDict):
    parts: list[Loop]


class Frozen(msgspec.Struct, frozen=True):
    parts: list[int]


@pytest.mark.parametrize(
    "type_",
    [Shape, Loop, Keys, Any, int, str, None, list[Shape], dict[str, Any], dict[int, Keys] | None],
)
def test_a_type_of_dicts_and_lists_is_tracked(type_: Any) -> None:
    assert Schema(type_).untracked_part() is None


@pytest.mark.parametrize(
    "type_, name",
    [
        (Account, "Account"), (Token | None, "Token"), (list[Token], "Token"),
        (dict[str, list[Settings]], "Settings"), (Frozen, "Frozen"), (set[int], "set"),
        (bytearray, "bytearray"), (tuple[list[int], int], "tuple"), (tuple[Any, ...], "vartuple"),
        (Credentials, "Credentials"), (list[Credentials], "list[test_schema.Credentials]"),
        (Checked, "Checked"), (msgspec.Raw, "raw"),
    ],
)  # fmt: skip
def test_a_type_whose_edits_cannot_be_seen_is_named(type_: Any, name: str) -> None:
    found = Schema(type_).untracked_part()
    assert found is not None
    assert name in found or name.partition("[")[0] in found


def assert_clean(error: Exception) -> None:
    assert MARKER not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None


def test_strict_means_no_conversion_between_json_types() -> None:
    for type_, document in ((list[int], ["1"]), (list[str], [1]), (list[bool], [1])):
        with pytest.raises(SchemaMismatchError):
            Schema(type_).load(document)
    for port in ("5", 5.0, True):
        with pytest.raises(SchemaMismatchError):
            Schema(Checked).load({"port": port})


def test_an_error_of_the_types_own_code_is_not_quoted() -> None:
    @dataclasses.dataclass
    class Picky:
        value: str

        def __post_init__(self) -> None:
            raise ValueError(self.value) if self.value == MARKER else KeyError(self.value)

    for value in (MARKER, MARKER + "x"):
        with pytest.raises(SchemaMismatchError) as caught:
            Schema(Picky).load({"value": value})
        assert_clean(caught.value)


@pytest.mark.parametrize("type_", [Token | Keys, set[list[int]] | list[int], "Token"])
def test_a_type_that_cannot_be_converted_is_refused_at_once(type_: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used as a schema"):
        Schema(type_)


def test_pydantic_is_imported_only_for_types_that_need_it() -> None:
    program = (
        "import dataclasses, sys\n"
        "from sqlalchemy_lucent import EncryptedJSON\n"
        "T = dataclasses.make_dataclass('T', [('a', int)])\n"
        "EncryptedJSON(schema=T)\n"
        "assert 'pydantic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_error_that_has_errors_of_its_own_is_not_quoted() -> None:
    class ManyError(Exception):
        errors = ("x",)

    @dataclasses.dataclass
    class Refusing:
        a: str

        def __post_init__(self) -> None:
            raise ManyError(self.a)

    marker = uuid.uuid4().hex
    with pytest.raises(SchemaMismatchError) as caught:
        Schema(Refusing).load({"a": marker})
    assert marker not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


def test_a_schema_shows_its_type() -> None:
    assert repr(Schema(dict[str, int])) == "<Schema of dict[str, int]>"
