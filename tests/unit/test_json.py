"""The strict codec: what goes in comes out equal, or is refused by path and type."""

from __future__ import annotations

import collections
import copy
import dataclasses
import decimal
import enum
import json
import sys
import traceback
import types
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time
from typing import Any, NamedTuple, Self

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.ext.mutable import MutableDict, MutableList

from sqlalchemy_lucent import SerializationError
from sqlalchemy_lucent._json import (
    MAX_DEPTH,
    MAX_INTEGER_DIGITS,
    STRICT,
    EngineCodec,
    path_of,
    same_document,
    same_value,
)
from sqlalchemy_lucent._redacted import RedactedDict, RedactedList, RedactedStr, redact
from tests.strategies import JSON_VALUES

MARKER = "MARKER"


def round_trip(value: Any) -> Any:
    return STRICT.loads(STRICT.dumps(value))


def nested(levels: int, wrap: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


def refusal(value: Any, codec: Any = STRICT) -> str:
    """Return the message that refuses `value`, having looked for the value in all of the error."""
    with pytest.raises(SerializationError) as caught:
        codec.dumps(value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    message = str(caught.value)
    assert MARKER not in "".join(traceback.format_exception(caught.value))
    return message


# -- what goes in comes out equal ------------------------------------------------------------------


@given(JSON_VALUES)
@example({"b": 1, "a": 2, "": {"\0": "\ufeff\u2028\U0001f511"}})
@example([0, -0.0, 0.0, 1, 1.0, True, False, None, 2**64, -(2**63) - 1, 1e16, 5e-324])
@example("\ud7ff\ue000\uffff")
def test_every_json_value_comes_back_with_types_order_and_bits(value: Any) -> None:
    # `repr` shows the types, the order of keys, the sign of zero and every bit of a float.
    assert repr(round_trip(value)) == repr(value)


@given(JSON_VALUES)
def test_documents_mean_the_same_to_the_json_of_python(value: Any) -> None:
    assert repr(json.loads(STRICT.dumps(value))) == repr(value)
    assert repr(STRICT.loads(json.dumps(value).encode())) == repr(value)


def test_documents_are_compact_utf_8() -> None:
    for big in (0, 2**70):  # one is written by orjson, the other is not
        document = STRICT.dumps({"é": [big, None, {"b": True, "a": "\U0001f511"}]})
        assert document == f'{{"é":[{big},null,{{"b":true,"a":"\U0001f511"}}]}}'.encode()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_keeps_its_bits(value: float) -> None:
    assert round_trip([value])[0].hex() == value.hex()


@pytest.mark.parametrize("digits", [19, 20, 21, 309, MAX_INTEGER_DIGITS])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_come_back_up_to_the_limit(digits: int, sign: int) -> None:
    value = sign * (10**digits - 1)
    assert round_trip({"n": [value]}) == {"n": [value]}
    assert type(round_trip(value)) is int


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: [0, {"a": v}]])
def test_documents_nest_up_to_the_limit(wrap: Callable[[Any], Any]) -> None:
    levels = MAX_DEPTH // 2 if isinstance(wrap(1), list) and len(wrap(1)) == 2 else MAX_DEPTH
    value = nested(levels, wrap)
    assert round_trip(value) == value
    value = nested(levels, lambda inner: MutableDict(a=inner))
    assert round_trip(value) == value


def test_a_large_document_comes_back() -> None:
    value = {f"name {number}": [number, str(number) * 5, None] for number in range(20_000)}
    assert round_trip(value) == value


class Number(int):
    pass


class Real(float):
    pass


class Text(str):
    __slots__ = ()


class Level(enum.IntEnum):
    HIGH = 3


class Color(enum.StrEnum):
    RED = "red"


class Mixed(str, enum.Enum):  # noqa: UP042  (its `str()` is not its text)
    RED = "red"


class Odd(str, enum.Enum):  # noqa: UP042
    """Its `value` is not its text."""

    TEXT = 5

    def __new__(cls, value: int) -> Self:
        self = str.__new__(cls, "text")
        self._value_ = value
        return self


class OddNumber(float, enum.Enum):
    ZERO = 0

    def __new__(cls, value: int) -> Self:
        self = float.__new__(cls, -0.0)
        self._value_ = value
        return self


def moved_to_end() -> collections.OrderedDict[str, int]:
    ordered = collections.OrderedDict(a=1, b=2, c=3)
    ordered.move_to_end("a")
    return ordered


SUBCLASSES: list[tuple[Any, Any]] = [
    (moved_to_end(), {"b": 2, "c": 3, "a": 1}),
    ([moved_to_end()], [{"b": 2, "c": 3, "a": 1}]),
    (collections.defaultdict(list, a=[1]), {"a": [1]}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (MutableDict(a=MutableList([1, {"b": None}])), {"a": [1, {"b": None}]}),
    (RedactedDict(a=1), {"a": 1}),
    (RedactedList([1, "x"]), [1, "x"]),
    (RedactedStr("text"), "text"),
    ([RedactedStr("text"), Text("é")], ["text", "é"]),
    ({Text("name"): 1, "other": 2}, {"name": 1, "other": 2}),
    ({Color.RED: Color.RED}, {"red": "red"}),
    ({Mixed.RED: Mixed.RED}, {"red": "red"}),
    ({"a": Level.HIGH}, {"a": 3}),
    ({"a": [Odd.TEXT], "b": Odd.TEXT}, {"a": ["text"], "b": "text"}),
    ({Odd.TEXT: [OddNumber.ZERO]}, {"text": [-0.0]}),
    ([Odd.TEXT, 2**70, MutableDict(a=-(2**70))], ["text", 2**70, {"a": -(2**70)}]),
    ({Color.RED: 2**70}, {"red": 2**70}),
    (Number(2**70), 2**70),
    ([Number(-5), Real(1.5), Real(-0.0)], [-5, 1.5, -0.0]),
    (types.SimpleNamespace(a=1).__dict__, {"a": 1}),
]


@pytest.mark.parametrize("value, plain", SUBCLASSES)
def test_instances_of_subclasses_come_back_as_the_plain_value(value: Any, plain: Any) -> None:
    assert repr(round_trip(value)) == repr(plain)
    assert round_trip(value) == value


def test_writing_changes_nothing_of_the_value() -> None:
    value = MutableDict(a=[1, moved_to_end()])
    before = repr(value)
    STRICT.dumps(value)
    assert repr(value) == before
    assert type(value["a"][1]) is collections.OrderedDict


# -- or is refused ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Account:
    email: str = MARKER


class Plain(enum.Enum):
    RED = MARKER


class Pair(NamedTuple):
    left: str
    right: int


class HasRepr:
    def __repr__(self) -> str:
        return MARKER


def circular() -> list[Any]:
    value: list[Any] = [MARKER]
    value.append(value)
    return value


FAULTS: list[tuple[Any, str, str]] = [
    (float("nan"), "$", "float is NaN"),
    ([1, float("inf")], "$[1]", "infinite"),
    ({"a": [0, {"b": float("-inf")}]}, "$.{1st}[1].{1st}", "infinite"),
    ([Real("nan")], "$[0]", "NaN"),
    ((MARKER, 1), "$", "type tuple"),
    ({"tokens": [1, 2, {"expiry": (MARKER,)}]}, "$.{1st}[2].{1st}", "type tuple"),
    ([Pair(MARKER, 1)], "$[0]", "type Pair"),
    ({MARKER}, "$", "type set"),
    (frozenset({MARKER}), "$", "type frozenset"),
    ({"a": MARKER.encode()}, "$.{1st}", "type bytes"),
    ([bytearray(MARKER, "ascii")], "$[0]", "type bytearray"),
    ([memoryview(b"MARKER")], "$[0]", "type memoryview"),
    ({"at": datetime(2024, 1, 2, tzinfo=UTC)}, "$.{1st}", "type datetime"),
    ([date(2024, 1, 2)], "$[0]", "type date"),
    ([time(1, 2)], "$[0]", "type time"),
    ([decimal.Decimal("1.5")], "$[0]", "type Decimal"),
    ([uuid.UUID(int=5)], "$[0]", "type UUID"),
    ({"color": Plain.RED}, "$.{1st}", "type Plain"),
    ({"account": Account()}, "$.{1st}", "type Account"),
    ([HasRepr()], "$[0]", "type HasRepr"),
    ([HasRepr], "$[0]", "type type"),
    ([complex(1, 2)], "$[0]", "type complex"),
    ([range(3)], "$[0]", "type range"),
    ([iter([MARKER])], "$[0]", "type list_iterator"),
    ({"a": {"b": 1}.keys()}, "$.{1st}", "type dict_keys"),
    (types.MappingProxyType({"a": MARKER}), "$", "type mappingproxy"),
    ([orjson.Fragment(b'"MARKER"')], "$[0]", "type Fragment"),
    ({1: MARKER}, "$", "key of type int"),
    ({"a": [{None: MARKER}]}, "$.{1st}[0]", "key of type NoneType"),
    ({True: MARKER}, "$", "key of type bool"),
    ({1.5: MARKER}, "$", "key of type float"),
    ({b"a": MARKER}, "$", "key of type bytes"),
    ({("a",): MARKER}, "$", "key of type tuple"),
    ({Plain.RED: 1}, "$", "key of type Plain"),
    ({"a": "MARKER\ud800"}, "$.{1st}", "lone surrogate"),
    (["\udfff"], "$[0]", "lone surrogate"),
    ([{"MARKER\ud800": 1}], "$[0]", "key with a lone surrogate"),
    ([10**MAX_INTEGER_DIGITS], "$[0]", f"more than {MAX_INTEGER_DIGITS} digits"),
    ({"n": -(10**MAX_INTEGER_DIGITS)}, "$.{1st}", f"more than {MAX_INTEGER_DIGITS} digits"),
    ([10**100_000], "$[0]", f"more than {MAX_INTEGER_DIGITS} digits"),
]


@pytest.mark.parametrize("value, path, fault", FAULTS, ids=lambda part: f"{type(part).__name__}")
def test_a_faulty_value_is_refused_by_path_and_type(value: Any, path: str, fault: str) -> None:
    message = refusal(value)
    assert message.startswith(f"{path}: ")
    assert fault in message


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: MutableDict(a=v)])
def test_documents_past_the_depth_limit_are_refused(wrap: Callable[[Any], Any]) -> None:
    for levels in (MAX_DEPTH + 1, MAX_DEPTH + 50, 50_000):
        assert f"more than {MAX_DEPTH} levels" in refusal(nested(levels, wrap))


def test_a_document_that_holds_itself_is_refused() -> None:
    by_name: dict[str, Any] = {"secret": MARKER}
    by_name["a"] = {"b": by_name}
    for value in (circular(), by_name):
        assert f"more than {MAX_DEPTH} levels" in refusal(value)


@pytest.mark.parametrize("name", ["MARKER", "api_key_MARKER", "M" * 65, "MÄRKER", "1MARKER", ""])
def test_a_name_is_data_and_its_place_is_shown(name: str) -> None:
    faulty = (
        float("nan"), (1,), "\ud800", 10**MAX_INTEGER_DIGITS, {1: 2}, {"\ud800": 1}, nested(254)
    )  # fmt: skip
    for fault in faulty:
        for value in ({name: fault}, {name: [{"x": 1, name: fault}]}, MutableDict({name: fault})):
            message = refusal(value)
            assert "MARKER" not in message
            assert "M" * 65 not in message
    assert refusal({"a": 1, name: {"b": [0, {1}]}}).startswith("$.{2nd}.{1st}[1]: ")


def test_the_first_fault_is_named() -> None:
    message = refusal({"ok": 1, "private_key": [()], "also": {2}})
    assert message.startswith("$.{2nd}[0]: ")


def test_places_are_counted_as_one_reads_them() -> None:
    for place in ("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "111th"):
        number = int(place[:-2])
        value = {str(n): n for n in range(1, number)} | {"x": {1}, "y": 0}
        assert refusal(value).startswith(f"$.{{{place}}}: ")


def test_a_long_path_is_cut_off() -> None:
    for wrap in (lambda inner: [0, inner], lambda inner: {"MARKER": 1, "b": inner}):
        for fault in ({1}, float("nan")):
            value: Any = fault
            for _ in range(200):
                value = wrap(value)
            path = refusal(value).partition(": ")[0]
            assert path.endswith("...")
            assert len(path) < 200


class Counting(list[Any]):
    """Counts how often any of its kind is read."""

    reads = 0

    def __iter__(self) -> Iterator[Any]:
        Counting.reads += 1
        return super().__iter__()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fault", [float("nan"), (1,), "\ud800", 2**70, "none"])
def test_the_work_for_a_document_grows_as_the_document(first: bool, fault: Any) -> None:
    """A fault at the bottom, and the most of the document beside it on each way down."""
    value = Counting([*(Counting([n]) for n in range(500)), fault])
    lists = 501
    for _ in range(200):
        value = Counting([value, Counting([1])] if first else [Counting([1]), value])
        lists += 2
    Counting.reads = 0
    try:
        STRICT.dumps(value)
    except SerializationError:
        pass
    assert Counting.reads < 20 * lists


class Lying(dict[str, Any]):
    """Shows other members to whoever iterates over it than it is compared by."""

    def __iter__(self) -> Iterator[str]:
        return iter(["b"])

    def keys(self) -> Any:
        return ["b"]

    def items(self) -> Any:
        return [("b", 2)]

    def __getitem__(self, name: str) -> Any:
        return 2


class Failing(dict[str, Any]):
    def __iter__(self) -> Iterator[str]:
        raise LookupError(MARKER)

    def keys(self) -> Any:
        raise LookupError(MARKER)

    def items(self) -> Any:
        raise LookupError(MARKER)


@pytest.mark.parametrize("value", [Lying(a=1), Failing(a=1)])
def test_a_value_that_misleads_or_fails_is_refused(value: Any) -> None:
    refusal([value])
    refusal({"a": value})


class EqualToAll(list[Any]):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


class PairOfNumbers(enum.Enum):
    HERE = (1, 2)

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = enum.Enum.__hash__


@pytest.mark.parametrize("value", [EqualToAll([float("nan")]), [PairOfNumbers.HERE]])
def test_a_value_that_says_it_is_equal_to_everything_is_not_believed(value: Any) -> None:
    refusal(value)
    refusal({"a": [value]})


def test_two_names_of_equal_text_are_refused() -> None:
    class Apart(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    refusal({Apart("a"): 1, Apart("a"): 2})


@given(
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters()),
            st.binary(), st.tuples(st.integers()), st.uuids(), st.decimals(), st.datetimes(),
            st.sampled_from([*Plain, *Level, *Color]),
        ),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(st.characters()) | st.integers(), inner, max_size=4)
        ),
        max_leaves=8,
    )
)  # fmt: skip
def test_whatever_goes_in_comes_out_equal_or_is_refused(value: Any) -> None:
    try:
        data = STRICT.dumps(value)
    except SerializationError:
        data = None
    if data is None:
        assert refusal(value).startswith("$")
    else:
        assert STRICT.loads(data) == value


def test_a_lower_limit_of_the_interpreter_on_digits_is_an_error_of_ours() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert "ValueError" in refusal([10**1000])
    finally:
        sys.set_int_max_str_digits(before)


# -- comparing -------------------------------------------------------------------------------------

EQUAL: list[tuple[Any, Any]] = [
    (1, 1), (2**70, 2**70), (True, True), (0.0, 0.0), (-0.0, -0.0), ("a", "a"), (None, None),
    ([], []), ({}, {}), ([1, [2.0]], [1, [2.0]]), ({"a": [None]}, {"a": [None]}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (1, Number(1)), (1.5, Real(1.5)), ("a", Text("a")),
    (3, Level.HIGH), ({"a": 1}, MutableDict(a=1)), ([1], MutableList([1])),
    (decimal.Decimal("1.5"), decimal.Decimal("1.5")),
]  # fmt: skip
DIFFERENT: list[tuple[Any, Any]] = [
    (1, 1.0), (1.0, 1), (1, True), (True, 1), (1.0, True), (True, 1.0), (True, False), (0.0, -0.0),
    (1, 2), (1.0, 2.0), ("a", "b"), ("1", 1), (1, "1"), (None, 0), (0, None), (None, False),
    (True, None), ("a", None), (None, "a"), (1.5, None), ([], {}), ({}, []), ([], None), ({}, None),
    (None, []), ([1], [1, 2]), ([1, 2], [1]), ([1, 2], [2, 1]), ([1], (1,)), ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}), ({"a": 1}, {}), ({}, {"a": 1}), ({"a": 1}, 1), (1, [1]), (1.0, "1.0"),
    ([{"a": 1}], [{"a": 1.0}]), (decimal.Decimal("1.5"), 1.5), (decimal.Decimal(1), True),
    (decimal.Decimal(1), None), (decimal.Decimal(1), decimal.Decimal(2)),
]  # fmt: skip


@pytest.mark.parametrize("left, right", EQUAL)
def test_values_of_the_same_type_and_content_are_the_same(left: Any, right: Any) -> None:
    assert same_value(left, right) is True


@pytest.mark.parametrize("left, right", DIFFERENT)
def test_values_that_differ_in_type_or_content_are_not_the_same(left: Any, right: Any) -> None:
    assert same_value(left, right) is False


@pytest.mark.parametrize(
    "left, right",
    [({"a": 1}, Lying(a=2)), ({"a": 1}, Lying(a=1, b=2)), ({"b": 2}, Lying(a=1))],
)
def test_what_a_value_says_of_itself_is_not_asked(left: Any, right: Any) -> None:
    assert same_value(left, right) is False


SAME_DOCUMENT: list[Any] = [
    None, True, 1, 2**70, 1.0, -0.0, "a", [], {}, [1, [2.0, {}]], {"a": [None], "b": {"c": -0.0}},
]  # fmt: skip


@pytest.mark.parametrize("value", SAME_DOCUMENT)
def test_a_copy_is_the_same_document(value: Any) -> None:
    assert same_document(copy.deepcopy(value), value) is True
    assert same_document({"a": [copy.deepcopy(value)]}, {"a": [value]}) is True
    assert same_document(copy.deepcopy(value), redact(copy.deepcopy(value))) is True


@pytest.mark.parametrize("left, right", DIFFERENT)
def test_what_differs_in_a_bit_is_another_document(left: Any, right: Any) -> None:
    for pair in ((left, right), ([left], [right]), ({"a": [left]}, {"a": [right]})):
        assert same_document(*pair) is False


def test_another_order_of_names_is_another_document() -> None:
    assert same_document({"a": 1, "b": 2}, {"b": 2, "a": 1}) is False
    assert same_document([moved_to_end()], [{"a": 1, "b": 2, "c": 3}]) is False


def test_a_part_that_is_shared_may_have_been_edited() -> None:
    part: list[Any] = [1]
    value = {"part": part, "n": 1}
    assert same_document(value, value) is False
    assert same_document({**value}, value) is False
    assert same_document(value["part"], part) is False
    assert same_document(RedactedDict(value), value) is False


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise LookupError(MARKER)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value", [float("nan"), (1,), "\ud800", {1: 2}, Unequal(), Failing(a=1), circular()]
)
def test_what_cannot_be_written_is_no_document(value: Any) -> None:
    assert same_document(value, value) is False
    assert same_document({"a": value}, {"a": value}) is False


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MARKER",
        b'{"a": MARKER}',
        b'{"a": "MARKER',
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b"[1,]",
        b"1 2",
        b'"\xff\xfe"',
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        b"-" + b"1" * (MAX_INTEGER_DIGITS + 1),
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_a_document_that_is_no_json_is_refused_without_being_shown(data: bytes) -> None:
    with pytest.raises(SerializationError, match="not JSON that can be read") as caught:
        STRICT.loads(data)
    assert caught.value.__context__ is None
    assert MARKER not in "".join(traceback.format_exception(caught.value))


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        value = STRICT.loads(data)
    except SerializationError as error:
        refused = error
    else:
        assert repr(value) == repr(json.loads(data))
        return
    assert refused.__context__ is None


# -- engines with functions of their own -----------------------------------------------------------


def decimal_default(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return {"$decimal": str(value)}
    raise TypeError(f"{value}")


def decimal_hook(value: dict[str, Any]) -> Any:
    return decimal.Decimal(value["$decimal"]) if "$decimal" in value else value


def decimals_out(value: Any) -> str:
    return json.dumps(value, default=decimal_default)


def decimals_in(text: str) -> Any:
    return json.loads(text, object_hook=decimal_hook)


def test_functions_that_fit_together_carry_more_than_json() -> None:
    codec = EngineCodec(decimals_out, decimals_in)
    value = {"price": [decimal.Decimal("1.10"), 1.5, None]}
    assert codec.loads(codec.dumps(value)) == value


@pytest.mark.parametrize(
    "serializer",
    [json.dumps, orjson.dumps, lambda value: json.dumps(value, sort_keys=True, indent=2)],
)
@pytest.mark.parametrize("deserializer", [None, json.loads, orjson.loads])
def test_the_usual_functions_are_used(serializer: Any, deserializer: Any) -> None:
    codec = EngineCodec(serializer, deserializer)
    value = {"b": [1, 1.5, True, None], "a": "é"}
    written = serializer(value)
    assert codec.dumps(value) == (written if isinstance(written, bytes) else written.encode())
    assert codec.loads(codec.dumps(value)) == value


def test_one_function_alone_is_used_with_the_strict_other_one() -> None:
    value = {"b": 1, "a": [2.5]}
    assert EngineCodec(None, json.loads).dumps(value) == STRICT.dumps(value)
    assert EngineCodec(json.dumps, None).loads(b'{"a":1}') == {"a": 1}
    assert EngineCodec(None, lambda text: {"text": text}).loads(b"[]") == {"text": "[]"}


def no_text(value: Any) -> Any:
    return None


def raising(value: Any) -> str:
    raise RuntimeError(value)


SERIALIZER_FAULTS: list[tuple[Any, Any, Any, str]] = [
    (raising, None, {"a": MARKER}, "json_serializer raised RuntimeError for a value of type dict"),
    (no_text, None, {"a": MARKER}, "json_serializer returned NoneType instead of str"),
    (lambda value: value, None, {"a": MARKER}, "returned dict instead of str"),
    (lambda value: "\ud800", None, MARKER, "raised UnicodeEncodeError"),
    (json.dumps, None, {1, MARKER}, "raised TypeError for a value of type set"),
    (json.dumps, None, circular(), "json_serializer raised ValueError"),
    (json.dumps, None, nested(50_000), "json_serializer raised RecursionError"),
    (json.dumps, None, (MARKER,), "a value of type tuple does not come back equal"),
    (json.dumps, None, {1: MARKER}, "does not come back equal"),
    (lambda v: json.dumps(v, default=str), None, {MARKER: uuid.UUID(int=1)}, "not come back equal"),
    (lambda v: json.dumps(v, default=str), json.loads, [date(2024, 1, 2)], "not come back equal"),
    (lambda value: "{}", None, {"a": MARKER}, "does not come back equal"),
    (lambda value: "1.0", None, 1, "does not come back equal"),
    (lambda value: "1", None, True, "does not come back equal"),
    (lambda value: "0.0", None, -0.0, "does not come back equal"),
    (json.dumps, json.loads, float("nan"), "does not come back equal"),
    (json.dumps, orjson.loads, 2**70, "does not come back equal"),
    (None, orjson.loads, [2**70], "does not come back equal"),
    (None, lambda text: json.loads(text, parse_float=decimal.Decimal), 0.1, "not come back equal"),
    (None, raising, {"a": MARKER}, "json_deserializer raised RuntimeError"),
    (None, None, {"a": (MARKER,)}, "$.{1st}: a value of type tuple"),
]


@pytest.mark.parametrize("serializer, deserializer, value, fault", SERIALIZER_FAULTS)
def test_a_value_that_an_engines_functions_change_is_refused(
    serializer: Any, deserializer: Any, value: Any, fault: str
) -> None:
    assert fault in refusal(value, EngineCodec(serializer, deserializer))


class LyingText(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class LyingInteger(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class LyingObject:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value, text, deserializer",
    [
        (LyingText(MARKER), '"another"', json.loads),
        (LyingInteger(5), "6", json.loads),
        (None, "null", lambda text: LyingObject()),
    ],
)
def test_what_a_value_says_of_its_being_equal_is_not_asked(
    value: Any, text: str, deserializer: Any
) -> None:
    codec = EngineCodec(lambda value: text, deserializer)
    assert "does not come back equal" in refusal(value, codec)


def test_a_value_that_cannot_be_compared_is_refused() -> None:
    class Incomparable:
        def __eq__(self, other: object) -> bool:
            raise LookupError(MARKER)

    codec = EngineCodec(lambda value: "1", lambda text: Incomparable())
    assert "does not come back equal" in refusal(Incomparable(), codec)


@pytest.mark.parametrize("data", [b"MARKER", b"\xffMARKER", b""])
def test_a_document_that_the_deserializer_refuses_is_not_shown(data: bytes) -> None:
    with pytest.raises(SerializationError, match="json_deserializer raised") as caught:
        EngineCodec(None, json.loads).loads(data)
    assert caught.value.__context__ is None
    assert MARKER not in "".join(traceback.format_exception(caught.value))


@given(JSON_VALUES)
def test_the_json_of_python_as_the_engines_functions_carries_every_value(value: Any) -> None:
    codec = EngineCodec(json.dumps, json.loads)
    assert repr(codec.loads(codec.dumps(value))) == repr(value)


class _OtherMembers(dict[str, Any]):
    """Says that it has one member, of another name."""

    def keys(self) -> Any:
        return ["b"]

    def __iter__(self) -> Any:
        return iter(self.keys())

    def __getitem__(self, name: str) -> Any:
        return None


class _OtherItems(list[Any]):
    """Says that it has as many items, but others."""

    def __iter__(self) -> Any:
        return iter([2])


@pytest.mark.parametrize("value", [_OtherMembers(a=1), _OtherItems([1])], ids=type)
def test_a_subclass_that_shows_what_it_does_not_hold_is_refused(value: Any) -> None:
    with pytest.raises(SerializationError):
        STRICT.dumps([value])


@pytest.mark.parametrize("steps, is_cut", [(16, False), (17, True)])
def test_a_long_path_is_cut(steps: int, is_cut: bool) -> None:
    assert path_of(["[0]"] * steps) == "$" + "[0]" * 16 + "..." * is_cut


def test_a_document_that_cannot_be_read_is_told_by_the_class_of_the_error() -> None:
    with pytest.raises(SerializationError, match=r"\(\w+Error\)"):
        STRICT.loads(b"{")
