"""The strict codec beside Python's own JSON, 20,000 times; 200,000 times in `make test-long`.

That nothing is changed unseen rests on orjson, ormsgpack and msgspec agreeing with each other, so
their newest releases are tried against a judge that knows none of them. The seeds are printed; a
failure is repeated with ``LUCENT_TEST_SEED``.
"""

from __future__ import annotations

import enum
import json
import math
import os
import random
import struct
from collections.abc import Callable
from typing import Any, Final, NoReturn

import pytest

from sqlalchemy_lucent import SerializationError
from sqlalchemy_lucent._json import MAX_DEPTH, MAX_INTEGER_DIGITS, STRICT
from tests.conftest import LONG

TOO_LONG: Final[int] = 10**MAX_INTEGER_DIGITS
TIMES: Final = 10 if LONG else 1
VALUES: Final = TIMES * 12_000
TEXTS: Final = TIMES * 8_200  # a few are passed over
SEEDS: Final = (1, 2, 3, None)
"""``None`` stands for another seed in each run. It is drawn in the test, because pytest-xdist wants
the same parameters in each of its processes."""


def seeded(seed: int | None) -> int:
    if seed is None:
        seed = int(os.environ.get("LUCENT_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"LUCENT_TEST_SEED={seed}")
    return seed


# -- the judge -------------------------------------------------------------------------------------


def is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def is_document(value: Any, depth: int = 0) -> bool:
    """Say whether JSON can carry `value` so that it comes back equal."""
    if value is None or value is True or value is False:
        return True
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, int):
        return abs(value) < TOO_LONG
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return depth < MAX_DEPTH and all(is_document(child, depth + 1) for child in value)
    if isinstance(value, dict):
        return depth < MAX_DEPTH and all(
            isinstance(name, str) and is_text(name) and is_document(child, depth + 1)
            for name, child in value.items()
        )
    return False


def form(value: Any) -> Any:
    """Return something that is equal for values that are the same in type, order and bits."""
    if isinstance(value, dict):
        return ("dict", [(str.__str__(name), form(child)) for name, child in value.items()])
    if isinstance(value, list):
        return ("list", [form(child) for child in value])
    if isinstance(value, float):
        return ("float", struct.pack("d", value))
    if isinstance(value, bool) or value is None:
        return (str(value),)
    if isinstance(value, int):
        return ("int", int.__int__(value))
    assert isinstance(value, str)
    return ("str", str.__str__(value))


# -- values ----------------------------------------------------------------------------------------


class Word(enum.StrEnum):
    ONE = "one"


class Number(enum.IntEnum):
    ONE = 1


class Names(dict[str, Any]):
    pass


class Items(list[Any]):
    pass


ALPHABETS: Final = (
    "abcXYZ019 _-.",
    '\0\x01\x1f\x7f"\\/\b\f\n\r\t{}[]:,',
    "\x80\xe9\u07ff\u0800\u2028\u2029\ud7ff\ue000\ufeff\ufffe\uffff",
    "\U00010000\U0001f511\U0010ffff",
)
INTEGERS: Final = [
    sign * base + offset
    for base in (0, 127, 128, 255, 2**15, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**19)
    for sign in (1, -1)
    for offset in (-1, 0, 1)
]
FLOATS: Final = [
    0.0, -0.0, 1.0, 1e16, 1e15 + 0.5, 1e17, 1e21, 1e22, 1e-5, 1e-7, 5e-324, 2.2250738585072014e-308,
    1.7976931348623157e308, 0.1, 123456789012345680.0,
]  # fmt: skip
REFUSED: Final[list[Callable[[], Any]]] = [
    lambda: float("nan"), lambda: float("inf"), lambda: float("-inf"), lambda: "a\ud800",
    lambda: "\udfffb", lambda: "\ud83d\ude00", lambda: 10**MAX_INTEGER_DIGITS, lambda: (1, 2),
    lambda: b"bytes", lambda: bytearray(b"x"), lambda: {1}, lambda: {1: 1}, lambda: {None: 1},
    lambda: {True: 1}, lambda: {1.5: 1}, lambda: {"\ud800": 1}, lambda: object(), lambda: 1j,
    lambda: {b"a": 1}, lambda: range(3), lambda: {("a",): 1},
]  # fmt: skip
UNUSUAL: Final[list[Callable[[], Any]]] = [
    lambda: Word.ONE, lambda: Number.ONE, lambda: Names(a=[1]), lambda: Items([1, {}]),
    lambda: {Word.ONE: 1}, lambda: 10**MAX_INTEGER_DIGITS - 1, lambda: -(10**40),
]  # fmt: skip


class Generator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        letters = ALPHABETS[0] if self.random.random() < 0.6 else self.random.choice(ALPHABETS)
        return "".join(self.random.choices(letters, k=self.random.randrange(6)))

    def number(self) -> Any:
        kind = self.random.randrange(6)
        if kind == 0:
            return self.random.choice(INTEGERS)
        if kind == 1:
            return self.random.choice(FLOATS)
        if kind == 2:
            return self.random.getrandbits(self.random.randrange(1, 90)) * self.random.choice(
                (1, -1)
            )
        if kind == 3:  # any bits, and so NaN and infinities now and then
            return float(struct.unpack("d", self.random.randbytes(8))[0])
        if kind == 4:
            return round(self.random.random() * 10 ** self.random.randrange(-20, 25), 3)
        return self.random.randrange(1000)

    def value(self, depth: int = 0) -> Any:
        kind = self.random.random()
        if kind < 0.02 * (depth > 0):
            return self.random.choice(REFUSED if self.random.random() < 0.4 else UNUSUAL)()
        if kind < 0.30:
            return self.number()
        if kind < 0.55:
            return self.text()
        if kind < 0.65 or depth > 4:
            return self.random.choice((None, True, False))
        if kind < 0.82:
            return [self.value(depth + 1) for _ in range(self.random.randrange(5))]
        return {self.text(): self.value(depth + 1) for _ in range(self.random.randrange(5))}

    def deep(self) -> Any:
        value = self.value(4)
        for _ in range(self.random.randrange(MAX_DEPTH - 4, MAX_DEPTH + 3)):
            value = [value] if self.random.random() < 0.5 else {"a": value}
        return value


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_accepted_comes_back_to_the_bit_and_the_rest_is_refused(seed: int | None) -> None:
    seed = seeded(seed)
    generator = Generator(seed)
    refused = 0
    for number in range(VALUES // len(SEEDS)):
        value = generator.deep() if number % 1000 == 0 else generator.value()
        case = f"seed {seed}, number {number}"
        try:
            data = STRICT.dumps(value)
        except SerializationError:
            assert not is_document(value), case
            refused += 1
            continue
        assert is_document(value), case
        expected = form(value)
        assert form(STRICT.loads(data)) == expected, case
        assert form(json.loads(data)) == expected, case
        assert form(STRICT.loads(json.dumps(value, ensure_ascii=number % 2 == 0).encode())) == (
            expected
        ), case
    assert refused > VALUES // len(SEEDS) // 100


# -- texts -----------------------------------------------------------------------------------------

PIECES: Final = [
    *(bytes([byte]) for byte in b'"\\{}[]:,.-+eE0123456789 \t\n\r\0\x1f\x7f/utrfnalsIN'),
    b"\x80", b"\xc3", b"\xc3\xa9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\xef\xbb\xbf",
    b"\\u0000", b"\\ud83d\\ude00", b"\\ud83d", b"\\udc00", b"\\u00e9", b"1e5", b"-0", b"-0.0",
    b"1E400",
    b"NaN", b"Infinity", b"null", b"true", b"false", b'""', b"[]", b"{}", b"01", b"1.", b".5",
    b"18446744073709551616", b"9007199254740993", b"1e-400", b"\xc2\x85", b"\xe2\x80\xa8", b"//",
]  # fmt: skip


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def has_integer_too_long_to_write(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(has_integer_too_long_to_write, value.values()))
    if isinstance(value, list):
        return any(map(has_integer_too_long_to_write, value))
    return isinstance(value, int) and value > TOO_LONG // 1000


def judged(data: bytes) -> Any:
    """Read `data` as Python does; raise `ValueError` for all that is no JSON or has no value."""
    value = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    if not is_document(value):
        raise ValueError
    return value


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_texts_are_read_as_python_reads_them_or_refused(seed: int | None) -> None:
    seed = seeded(seed)
    generator = Generator(seed)
    rng = generator.random
    read = 0
    for number in range(TEXTS // len(SEEDS)):
        value = generator.value()
        if has_integer_too_long_to_write(value):
            continue  # reading counts the digits of a positive integer and of a negative one apart
        data = bytearray(json.dumps(value, default=str, skipkeys=True).encode("utf-8", "replace"))
        for _ in range(rng.randrange(4)):
            start = rng.randrange(len(data) + 1)
            end = start + rng.choice((0, 0, 1, 1, 2, 8))
            data[start:end] = rng.choice(PIECES) if rng.random() < 0.8 else b""
        case = f"seed {seed}, number {number}"
        try:
            expected = judged(bytes(data))
        except (ValueError, RecursionError):
            with pytest.raises(SerializationError):
                STRICT.loads(bytes(data))
            continue
        assert form(STRICT.loads(bytes(data))) == form(expected), case
        read += 1
    assert read > TEXTS // len(SEEDS) // 10
