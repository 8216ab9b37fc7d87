"""Opened values are real dicts, lists and strings that do not print themselves."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import pprint
import reprlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from rich.pretty import pretty_repr

from sqlalchemy_lucent._redacted import redact
from tests.strategies import JSON_VALUES, TEXT

MARKER = "MARKER"
VALUES: list[Any] = [
    {"key": MARKER, "nested": {"key": MARKER}},
    {MARKER: 1},
    [MARKER, [MARKER]],
    MARKER,
]
each_value = pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)

PRINTERS: dict[str, Callable[[Any], str]] = {
    "repr": repr,
    "str": str,
    "ascii": ascii,
    "percent": lambda value: "%s %r %a" % (value, value, value),  # noqa: UP031
    "f-string repr": lambda value: f"{value!r} {value!s}",
    "pformat": pprint.pformat,
    "reprlib": reprlib.repr,
    "rich": pretty_repr,
    "in a list": lambda value: str([value, (value,)]),
    "in a dict": lambda value: pprint.pformat({"value": value}),
    "rich, in a dict": lambda value: pretty_repr({"value": [value]}, expand_all=True),
    "exception": lambda value: "".join(traceback.format_exception(ValueError(value))),
}


@each_value
@pytest.mark.parametrize("printer", list(PRINTERS))
def test_nothing_that_prints_shows_the_value(value: Any, printer: str) -> None:
    text = PRINTERS[printer](redact(value))
    assert MARKER not in text
    assert "<redacted " in text


@each_value
def test_logging_does_not_show_the_value(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").debug("row %r, value %s", (1, redact(value)), redact(value))
    assert "row (1, <redacted" in caplog.text
    assert MARKER not in caplog.text


@given(JSON_VALUES)
def test_a_redacted_value_is_the_value_to_everything_but_printing(value: Any) -> None:
    redacted = redact(value)
    assert redacted == value
    assert isinstance(redacted, type(value))
    assert json.dumps(redacted) == json.dumps(value)
    for again in (copy.copy(redacted), copy.deepcopy(redacted)):
        assert type(again) is type(redacted)
        assert again == value
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(redacted, protocol)) == value


@given(TEXT)
def test_text_can_be_used_as_text(text: str) -> None:
    redacted = redact(text)
    assert hash(redacted) == hash(text)
    assert f"Bearer {redacted}" == "Bearer " + redacted == f"Bearer {text}"
    assert f"{redacted:>10}|{redacted:.3}" == f"{text:>10}|{text:.3}"
    assert "".join([redacted]) == text
    assert redacted.encode() == text.encode()
    assert {text: 1}[redacted] == 1


def test_parts_are_ordinary_objects() -> None:
    assert type(redact({"a": {}})["a"]) is dict
    assert type(redact([[]])[0]) is list
    assert type(redact("text")[:2]) is str


@pytest.mark.parametrize("value", [None, True, 1, 1.5])
def test_values_of_other_types_are_left_as_they_are(value: Any) -> None:
    assert redact(value) is value
