"""Opened values are real dicts, lists and strings that do not print themselves, and what they print
instead is never stored.
"""

from __future__ import annotations

import base64
import configparser
import copy
import csv
import hmac
import html
import http.cookies
import io
import json
import logging
import pickle
import plistlib
import pprint
import re
import reprlib
import string
import sys
import traceback
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any
from xml.sax import saxutils

import msgspec
import orjson
import ormsgpack
import pydantic
import pytest
from hypothesis import given
from rich.console import Console
from rich.pretty import pretty_repr
from rich.traceback import Traceback

from sqlalchemy_lucent import Bound, Keyring, SerializationError
from sqlalchemy_lucent._json import STRICT, Codec, EngineCodec
from sqlalchemy_lucent._redacted import RedactedStr, redact
from sqlalchemy_lucent._sealing import ColumnCodec, Sealed
from tests.strategies import JSON_VALUES, TEXT

MARKER = "MARKER"
LONG = MARKER + " and more" * 40
DOCUMENTS: list[Any] = [
    {"key": MARKER, "nested": {"key": MARKER}},
    {MARKER: 1},
    [MARKER, [MARKER]],
]
VALUES: list[Any] = [*DOCUMENTS, MARKER, LONG]


def kind(value: object) -> str:
    return type(value).__name__


each_value = pytest.mark.parametrize("value", VALUES, ids=kind)
each_document = pytest.mark.parametrize("value", DOCUMENTS, ids=kind)


# -- what hides ------------------------------------------------------------------------------------


def with_locals(value: Any) -> str:
    try:
        raise LookupError
    except LookupError as error:
        lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
        return "".join(lines)


def with_rich_locals(value: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    try:
        raise LookupError
    except LookupError:
        console.print(Traceback(show_locals=True))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


REPRS: dict[str, Callable[[Any], str]] = {
    "repr": repr,
    "ascii": ascii,
    "percent": lambda value: "%r %a" % (value, value),  # noqa: UP031
    "f-string": lambda value: f"{value!r}",
    "pformat": pprint.pformat,
    "reprlib": reprlib.repr,
    "rich": pretty_repr,
    "rich, cut": lambda value: pretty_repr(value, max_string=10),
    "in a list": lambda value: str([value, (value,)]),
    "in a dict": lambda value: pprint.pformat({"value": value}),
    "rich, in a dict": lambda value: pretty_repr({"value": [value]}, expand_all=True),
    "traceback with locals": with_locals,
    "rich traceback with locals": with_rich_locals,
}

STRS: dict[str, Callable[[Any], str]] = {
    "str": str,
    "percent": lambda value: "%s" % (value,),  # noqa: UP031
    "f-string": lambda value: f"{value} {value!s}",
    "format": format,
    "exception": lambda value: "".join(traceback.format_exception(ValueError(value))),
}


@each_value
@pytest.mark.parametrize("printer", list(REPRS))
def test_repr_shows_nothing_of_the_value(value: Any, printer: str) -> None:
    text = REPRS[printer](redact(value))
    assert MARKER not in text
    assert "<redacted " in text


@each_document
@pytest.mark.parametrize("printer", list(STRS))
def test_str_shows_nothing_of_a_dict_or_list(value: Any, printer: str) -> None:
    text = STRS[printer](redact(value))
    assert MARKER not in text
    assert "redacted " in text


@each_document
def test_logging_does_not_show_a_dict_or_list(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").debug("row %r, value %s", (1, redact(value)), redact(value))
    assert "row (1, <redacted" in caplog.text
    assert MARKER not in caplog.text


def test_a_slice_of_a_text_is_redacted_and_other_parts_are_ordinary_objects() -> None:
    assert repr(redact("text")[:2]) == repr(redact("text")[0]) == "<redacted str>"
    assert str(redact("text")[:3]) == "tex"
    assert type(redact("text").upper()) is str
    assert type(redact({"a": {}})["a"]) is dict
    assert type(redact([[]])[0]) is list


@pytest.mark.parametrize("value", [None, True, 1, 1.5])
def test_values_of_other_types_are_left_as_they_are(value: Any) -> None:
    assert redact(value) is value


# -- what does not ---------------------------------------------------------------------------------


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
        again = pickle.loads(pickle.dumps(redacted, protocol))
        assert again == value
        assert type(again) is type(redacted)


@given(TEXT)
def test_text_can_be_used_as_text(text: str) -> None:
    redacted = redact(text)
    assert hash(redacted) == hash(text)
    assert f"Bearer {redacted}" == "Bearer " + redacted == f"Bearer {text}"
    assert f"{redacted:>10}|{redacted:.3}" == f"{text:>10}|{text:.3}"
    assert "".join([redacted]) == text
    assert redacted.encode() == text.encode()
    assert {text: 1}[redacted] == 1
    assert str(redacted) == text
    assert type(str(redacted)) is str


def printed(value: str) -> str:
    stream = io.StringIO()
    print(value, file=stream)
    return stream.getvalue()


def logged(value: str) -> str:
    record = logging.LogRecord("a", 1, "b", 1, "token %s", (value,), None)
    return logging.Formatter("%(message)s").format(record)


def in_csv(value: str) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerow([value, 1])
    return stream.getvalue()


def in_an_ini_file(value: str) -> str:
    parser = configparser.RawConfigParser()
    parser["section"] = {"token": value}
    stream = io.StringIO()
    parser.write(stream)
    return stream.getvalue()


def in_xml(value: str) -> bytes:
    element = ET.Element("a", {"b": value})
    element.text = value
    return bytes(ET.tostring(element))


def in_a_cookie(value: str) -> str:
    cookie = http.cookies.SimpleCookie()
    cookie["token"] = value
    return cookie.output()


class Model(pydantic.BaseModel):
    token: str


SERIALISERS: dict[str, Callable[[str], Any]] = {
    **STRS,
    "print": printed,
    "logging": logged,
    "Template": lambda value: string.Template("${token}").substitute(token=value),
    "join": "-".join,
    "re": lambda value: re.sub("a", value, "banana"),
    "bytes": lambda value: bytes(value, "utf-8"),
    "hmac": lambda value: hmac.digest(value.encode(), b"", "sha256"),
    "base64": lambda value: base64.b64encode(value.encode()),
    "html": html.escape,
    "quote": lambda value: urllib.parse.quote(value) + urllib.parse.quote_plus(value),
    "urlencode": lambda value: urllib.parse.urlencode({"a": value, "b": [value]}, doseq=True),
    "cookie": in_a_cookie,
    "path": lambda value: str(PurePosixPath("/", value)),
    "csv": in_csv,
    "ini": in_an_ini_file,
    "plist": lambda value: plistlib.dumps({"a": value}),
    "xml": in_xml,
    "saxutils": lambda value: saxutils.escape(value) + saxutils.quoteattr(value),
    "json": lambda value: json.dumps({"a": value, value: 1}),
    "orjson": lambda value: orjson.dumps([value]),
    "ormsgpack": lambda value: ormsgpack.packb([value]),
    "msgspec": lambda value: msgspec.json.encode({"a": value}, enc_hook=str),
    "pydantic": lambda value: Model(token=value).model_dump_json(),
    "intern, of str()": lambda value: sys.intern(str(value)),
}


@pytest.mark.parametrize("serialise", list(SERIALISERS))
def test_a_text_is_its_text_to_all_that_writes_it(serialise: str) -> None:
    text = "token/é&%s<1>"
    assert SERIALISERS[serialise](redact(text)) == SERIALISERS[serialise](text)


@pytest.mark.parametrize("refuse", [msgspec.json.encode, sys.intern])
def test_what_takes_no_subclass_of_str_says_so_and_writes_nothing(refuse: Any) -> None:
    with pytest.raises(TypeError):
        refuse(redact("text"))


# -- what they print is never stored ---------------------------------------------------------------

SEALED = Sealed(
    Keyring({"v1": bytes(32)}).for_context("users.credentials").seal(b"{}"),
    ColumnCodec(("users.credentials",), STRICT, (), True),
)
PRINTS = [
    "<redacted dict>",
    "<redacted list>",
    "<redacted str>",
    repr(SEALED),
    repr(Bound({}, row=("a",))),
    "<redacted object>",  # the command line's
]

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in quotes": repr,
    "in a longer text": lambda text: f"Bearer {text}, and more",
    "in a list that was printed": lambda text: f"{{'a': [{text}, 1]}}",
    "html": html.escape,
    "html, twice": lambda text: html.escape(html.escape(text)),
    "html, by number": lambda text: text.replace("<", "&#60;").replace(">", "&#62;"),
    "html, by hexadecimal number": lambda text: text.replace("<", "&#x3C;"),
    "html, read as a tag": lambda text: text.lower().replace(" ", " ", 1).replace(">", '="">'),
    "html, with its own space": lambda text: text.replace(" ", "\xa0"),
    "quote": urllib.parse.quote,
    "quote, twice": lambda text: urllib.parse.quote(urllib.parse.quote(text)),
    "urlencode": lambda text: urllib.parse.urlencode({"a": 1, "token": text}),
    "lower case": lambda text: urllib.parse.quote_plus(text).lower(),
    "json": json.dumps,
    "json in html": lambda text: json.dumps(text).replace("<", "\\u003c").replace(">", "\\u003e"),
    "json in json": lambda text: json.dumps(json.dumps(text).replace("<", "\\u003c")),
}

PLACES: dict[str, Callable[[str], Any]] = {
    "document": str,
    "item": lambda text: [1, text],
    "member": lambda text: {"a": {"b": [{"c": text}]}, "d": 1.5},
    "name": lambda text: {"a": [{text: 1}]},
    "beside a wide integer": lambda text: {"a": text, "b": 2**70},
    "redacted itself": lambda text: redact([redact(text)]),
}

CODECS: dict[str, Codec] = {
    "strict": STRICT,
    "json": EngineCodec(json.dumps, json.loads),
    "deserializer only": EngineCodec(None, json.loads),
    "orjson": EngineCodec(lambda value: orjson.dumps(value, default=str).decode(), None),
    "escaping": EngineCodec(
        lambda value: json.dumps(value).replace("<", "\\u003c").replace("&", "\\u0026"), None
    ),
}


def spellings_of_prints() -> Iterator[tuple[str, str]]:
    for text in PRINTS:
        for name, spell in SPELLINGS.items():
            if name != "html, read as a tag" or "Bound" not in text:
                yield name, spell(text)


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("place", list(PLACES))
def test_a_print_is_refused_in_every_spelling(place: str, codec: str) -> None:
    for _, text in spellings_of_prints():
        value = PLACES[place](text)
        if codec == "orjson" and place == "beside a wide integer":
            continue
        with pytest.raises(SerializationError, match="place of a hidden value") as caught:
            CODECS[codec].dumps(value)
        assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "text",
    [
        "redacted",
        "<redacted>",
        "<redacted by the court>",
        "<redacted list of names>",
        "<redacted dictionary>",
        "the <dict> was redacted",
        "a < b, and the redacted list > c",
        "Sealed <b>users</b> key_version",
        "<Sealed>",
        "<sealed air>",
        "<Bound: 5>",
        "100 % redacted & sealed \\ dict",
        "https://example.com/?a=%3Credacted&b=dict",
    ],
)
@pytest.mark.parametrize("place", list(PLACES))
def test_other_text_of_these_words_is_stored(place: str, text: str) -> None:
    value = PLACES[place](text)
    assert STRICT.loads(STRICT.dumps(value)) == value


def test_a_redacted_text_that_holds_no_print_is_stored() -> None:
    assert STRICT.dumps({"a": RedactedStr("text")}) == b'{"a":"text"}'
