"""An opened text is its text to the libraries that put it into a page, a request or a column."""

from __future__ import annotations

import json
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import jinja2
import mako.template  # type: ignore[import-untyped]
import markupsafe
import pytest
import requests
import yaml
from fastapi.encoders import jsonable_encoder
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    bindparam,
    cast,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from sqlalchemy_lucent import EncryptedJSON
from sqlalchemy_lucent._redacted import redact

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of what Litestar imports
    from litestar.serialization import encode_json, get_serializer

TEXT = "token/&%s<1>"

metadata = MetaData()
table = Table(
    "services",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("token", EncryptedJSON),
    Column("name", String(50)),
    Column("notes", Text),
)


def in_a_request(value: str) -> Any:
    request = httpx.Request(
        "POST",
        httpx.URL("https://a", params={"token": value, "all": [value]}),
        headers={"token": value, "authorization": f"Bearer {value}"},
        data={"token": value},
    )
    return request.url, request.headers, request.content


def with_requests(value: str) -> Any:
    request = requests.Request(
        "POST", "https://a", params={"a": value}, data={"b": value}, headers={"c": value}
    ).prepare()
    return request.url, request.headers, request.body


def of_litestar(value: str) -> bytes:
    return encode_json({"token": value}, serializer=get_serializer())


LIBRARIES: dict[str, Callable[[str], Any]] = {
    "jinja": lambda value: jinja2.Template("{{ value }} {{ value|e }}").render(value=value),
    "mako": lambda value: mako.template.Template("${value} ${value | h}").render(value=value),
    "markupsafe": lambda value: markupsafe.Markup("<b>%s</b>") % value + markupsafe.escape(value),
    "httpx": in_a_request,
    "requests": with_requests,
    "litestar": of_litestar,
    "fastapi": lambda value: json.dumps(jsonable_encoder({"a": value})),
    "yaml, of str()": lambda value: yaml.safe_dump({"a": str(value)}),
}


@pytest.mark.parametrize("library", list(LIBRARIES))
def test_a_library_that_writes_a_text_gets_the_text(library: str) -> None:
    assert LIBRARIES[library](redact(TEXT)) == LIBRARIES[library](TEXT)


COPIES: list[Callable[[str], Any]] = [
    lambda token: insert(table).values(id=2, name=token, notes=token),
    lambda token: update(table).values(name=token, notes=bindparam("n", token)),
    lambda token: update(table).values(name=literal(token), notes=cast(token, Text)),
    lambda token: update(table).where(literal(token) == TEXT).values(name=token, notes=token),
]


def copies_of(token: Any, statement: Callable[[str], Any]) -> Any:
    return statement(token), select(table.c.name, table.c.notes).where(table.c.name.is_not(None))


@pytest.mark.parametrize("statement", COPIES)
def test_an_opened_text_is_a_parameter_of_another_column(
    engine: Engine, statement: Callable[[str], Any]
) -> None:
    metadata.create_all(engine)
    with engine.connect() as connection:
        connection.execute(insert(table), {"id": 1, "token": TEXT})
        token = connection.scalar(select(table.c.token))
        assert repr(token) == "<redacted str>"
        write, read = copies_of(token, statement)
        connection.execute(write)
        assert connection.execute(read).all() == [(TEXT, TEXT)]


def test_an_opened_text_is_a_parameter_of_every_async_driver(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.execute(insert(table), {"id": 1, "token": TEXT})
            token = await connection.scalar(select(table.c.token))
            for statement in COPIES[1:]:
                write, read = copies_of(token, statement)
                await connection.execute(write)
                assert (await connection.execute(read)).all() == [(TEXT, TEXT)]
            await connection.commit()

    run_async(work)
