"""What structlog writes of opened values."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from sqlalchemy import Column, Engine, MetaData, String, Table, insert, select

from sqlalchemy_lucent import EncryptedJSON

MARKER = "sk_live_51H8"
VALUES: dict[str, Any] = {
    "dict": {"token": MARKER, MARKER: [MARKER]},
    "list": [MARKER, {"token": MARKER}],
    "str": MARKER + "-and-more" * 40,
}

table = Table(
    "services", MetaData(), Column("kind", String(9), primary_key=True), Column("d", EncryptedJSON)
)

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
each_kind = pytest.mark.parametrize("kind", list(VALUES))


@pytest.fixture
def opened(engine: Engine) -> dict[str, Any]:
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"kind": kind, "d": value} for kind, value in VALUES.items()]
        connection.execute(insert(table), rows)
        return {row.kind: row.d for row in connection.execute(select(table))}


@contextmanager
def logging_with(*processors: Any) -> Iterator[tuple[Any, io.StringIO]]:
    stream = io.StringIO()
    logger = structlog.PrintLogger(stream)
    yield structlog.wrap_logger(logger, processors=list(processors)), stream


def written(renderer: Any, value: Any) -> str:
    with logging_with(renderer) as (logger, stream):
        logger.info("opened", value=value)
        logger.info("opened %r" % (value,), inside=[value], row={"value": value})  # noqa: UP031
    return stream.getvalue()


def fail(value: Any, inside: list[Any]) -> None:
    raise LookupError(len(inside))


def written_of_an_error(value: Any, *processors: Any) -> str:
    with logging_with(*processors) as (logger, stream):
        try:
            fail(value, [value])
        except LookupError:
            logger.exception("failed")
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())  # without the colours


@each_kind
def test_a_renderer_of_reprs_shows_nothing(opened: dict[str, Any], kind: str) -> None:
    text = written(structlog.processors.KeyValueRenderer(), opened[kind])
    assert f"<redacted {kind}>" in text
    assert MARKER not in text


@each_kind
@pytest.mark.parametrize(
    "renderer", [structlog.dev.ConsoleRenderer(), structlog.processors.LogfmtRenderer()]
)
def test_a_renderer_of_texts_shows_a_text_and_no_dict_or_list(
    opened: dict[str, Any], kind: str, renderer: Any
) -> None:
    value = opened[kind]
    assert (MARKER in written(renderer, value)) is (kind == "str")


@each_kind
def test_a_renderer_of_json_shows_all(opened: dict[str, Any], kind: str) -> None:
    assert MARKER in written(structlog.processors.JSONRenderer(), opened[kind])


@each_kind
@pytest.mark.parametrize(
    "processors",
    [
        [structlog.dev.ConsoleRenderer()],
        [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()],
        [
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=True, use_rich=False)
            ),
            structlog.processors.JSONRenderer(),
        ],
    ],
    ids=["rich", "dict", "dict without rich"],
)
def test_the_local_variables_of_a_traceback_show_nothing(
    opened: dict[str, Any], kind: str, processors: Any
) -> None:
    text = written_of_an_error(opened[kind], *processors)
    assert f"<redacted {kind}>" in text
    assert MARKER not in text
