"""What prints a value, for each row of the table in docs/admin-and-logs.md."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import pickle
import pprint
import re
import reprlib
import string
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import jinja2
import orjson
import pandas as pd  # type: ignore[import-untyped]
import structlog
from rich.console import Console
from rich.pretty import pretty_repr
from rich.traceback import Traceback
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select
from werkzeug.debug.repr import debug_repr

from sqlalchemy_lucent import EncryptedJSON

VALUES: Final[dict[str, Any]] = {
    "dict": {"token": "MARK-dict", "MARK-dict": [{"token": "MARK-dict"}]},
    "list": ["MARK-list", {"token": "MARK-list"}],
    "str": "MARK-str" + "-and-more" * 40,
}
"""Values of each kind, with text that tells whether they were shown."""

Printer = Callable[[Any], str]


def printed(value: Any) -> str:
    stream = io.StringIO()
    print(value, file=stream)
    return stream.getvalue()


def logged(value: Any) -> str:
    record = logging.LogRecord("a", 1, "b", 1, "value %s", (), None)
    record.args = (value,)
    return logging.Formatter("%(message)s").format(record)


def logged_by_sqlalchemy(value: Any) -> str:
    stream = io.StringIO()
    logger = logging.getLogger("sqlalchemy.engine.Engine.printers")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.propagate = False
    engine = create_engine("sqlite://", echo="debug", logging_name="printers")
    table = Table("t", MetaData(), Column("id", Integer), Column("data", EncryptedJSON))
    try:
        with engine.connect() as connection:
            table.create(connection)
            connection.execute(insert(table), {"data": value})
            connection.execute(select(table)).all()
    finally:
        logger.removeHandler(handler)
        engine.dispose()
    return stream.getvalue()


def in_csv(value: Any) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerow([value])
    return stream.getvalue()


def by_structlog(renderer: Any) -> Printer:
    def write(value: Any) -> str:
        stream = io.StringIO()
        logger: Any = structlog.wrap_logger(structlog.PrintLogger(stream), processors=[renderer])
        logger.info("opened", value=value)
        return stream.getvalue()

    return write


def raising(value: Any) -> None:
    raise LookupError(len(str(type(value))))


def in_a_traceback(value: Any) -> str:
    try:
        raising(value)
    except LookupError as error:
        lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
        return "".join(lines)
    raise AssertionError


def in_a_traceback_of_rich(value: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    try:
        raising(value)
    except LookupError:
        console.print(Traceback(show_locals=True))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def in_a_traceback_of_structlog(value: Any) -> str:
    stream = io.StringIO()
    processors: list[Any] = [
        structlog.processors.dict_tracebacks,
        structlog.processors.JSONRenderer(),
    ]
    logger: Any = structlog.wrap_logger(structlog.PrintLogger(stream), processors=processors)
    try:
        raising(value)
    except LookupError:
        logger.exception("failed")
    return stream.getvalue()


_PYTEST: Final = """
import json
from pathlib import Path

import pytest
from sqlalchemy_lucent._redacted import redact

VALUES = json.loads(Path("values.json").read_text("utf-8"))

@pytest.mark.parametrize("kind", VALUES)
def test_locals(kind):
    value = redact(VALUES[kind])
    assert kind == 0

@pytest.mark.parametrize("kind", VALUES)
def test_assertion(kind):
    value = redact(VALUES[kind])
    assert value == type(value)()
"""


@cache
def _output_of_pytest() -> dict[str, str]:
    with TemporaryDirectory() as directory:
        Path(directory, "values.json").write_text(json.dumps(VALUES), "utf-8")
        Path(directory, "test_it.py").write_text(_PYTEST, "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-vv", "--showlocals", "-p", "no:cacheprovider"],
            cwd=directory,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
    report, _, _ = done.stdout.partition("= short test summary")
    _, *parts = re.split(r"^_+ (test_\w+)\[\w+\] _+$", report, flags=re.MULTILINE)
    assert parts[::2] == ["test_locals"] * 3 + ["test_assertion"] * 3
    return {"test_locals": "".join(parts[1:6:2]), "test_assertion": "".join(parts[7::2])}


def by_pytest(test: str) -> Printer:
    return lambda value: _output_of_pytest()[test]


@cache
def _events_of_sentry() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.frameworks.sentry_events"],
        input=json.dumps(VALUES),
        check=True,
        capture_output=True,
        text=True,
    )
    events: dict[str, Any] = json.loads(done.stdout)
    return events


def by_sentry(case: str) -> Printer:
    return lambda value: json.dumps(_events_of_sentry()[case])


def of_a_frame(method: str) -> Printer:
    return lambda value: str(getattr(pd.DataFrame({"value": [value]}), method)())


PRINTERS: Final[dict[str, list[Printer]]] = {
    "`repr()`, `%r`, `pprint`, rich, structlog's `KeyValueRenderer`": [
        repr,
        lambda value: "%r" % (value,),  # noqa: UP031
        lambda value: pprint.pformat({"value": [value]}),
        lambda value: reprlib.repr([value]),
        lambda value: pretty_repr({"value": [value]}, max_string=20),
        by_structlog(structlog.processors.KeyValueRenderer()),
    ],
    "local variables in tracebacks (Python, rich, structlog, pytest) and in Sentry": [
        in_a_traceback,
        in_a_traceback_of_rich,
        in_a_traceback_of_structlog,
        by_pytest("test_locals"),
        by_sentry("locals"),
    ],
    "Sentry's breadcrumbs and contexts": [by_sentry("breadcrumbs")],
    'SQLAlchemy, `echo="debug"`': [logged_by_sqlalchemy],
    "`str()`, `%s`, f-strings, `print()`, templates, messages of exceptions": [
        str,
        lambda value: "%s" % (value,),  # noqa: UP031
        lambda value: f"{value}",
        printed,
        lambda value: string.Template("$value").substitute(value=value),
        lambda value: jinja2.Template("{{ value }}").render(value=value),
        lambda value: str(ValueError(value)),
    ],
    "`logging` with `%s`, also in Sentry": [logged, by_sentry("logged by %s")],
    "CSV; structlog's `ConsoleRenderer` and `LogfmtRenderer`": [
        in_csv,
        of_a_frame("to_csv"),
        by_structlog(structlog.dev.ConsoleRenderer()),
        by_structlog(structlog.processors.LogfmtRenderer()),
    ],
    "JSON, structlog's `JSONRenderer`, pickle": [
        json.dumps,
        lambda value: orjson.dumps(value).decode(),
        by_structlog(structlog.processors.JSONRenderer()),
        lambda value: pickle.dumps(value).decode("latin-1"),
    ],
    "a printed pandas frame, its HTML and JSON; a failed assertion in pytest": [
        of_a_frame("__repr__"),
        of_a_frame("to_html"),
        of_a_frame("to_json"),
        by_pytest("test_assertion"),
    ],
    "Flask's debugger": [lambda value: re.sub(r"<[^>]*>", "", debug_repr(value))],
}
"""By the first cell of the row."""
