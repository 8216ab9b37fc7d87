"""SQLAdmin over models with sealed columns, driven over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sqladmin import Admin, ModelView
from sqladmin.fields import TextAreaField
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request

from .admin import (
    MARKER,
    OPENED,
    PRINTED,
    REPLACED,
    VALUES,
    Form,
    Plain,
    Secret,
    each_case,
    fill,
    stored,
)

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


def visit(
    engine: Engine, view: type[ModelView], visitor: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> None:
    """Let `visitor` use the application in which `view` is at the root of the client's URLs."""

    async def main() -> None:
        app = Starlette()
        Admin(app, engine).add_view(view)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        base_url = f"http://test/admin/{view.identity}"
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            await visitor(client)

    asyncio.run(main())


def view_of(model_: type[Any]) -> type[ModelView]:
    """A view with every column, and no option beside."""

    class View(ModelView, model=model_):
        column_list = "__all__"
        column_details_list = "__all__"

    return View


def identity(model: type[Any]) -> str:
    return "tenant;t1;stripe;apiKey" if model is Secret else "1"


@each_case
def test_who_edits_another_field_leaves_the_credential_as_it_is(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)
    before, _ = stored(engine, model)
    # Pages show the `str()` of a value: that of a text is the text, that of a typed value its own.
    shown = (model in OPENED and kind == "str") or kind == "typed"

    async def edit(client: httpx.AsyncClient) -> None:
        for page in ("/list", f"/details/{identity(model)}", f"/edit/{identity(model)}"):
            answer = await client.get(page)
            assert answer.status_code == 200
            assert (MARKER in answer.text) is shown
        fields = Form(answer.text).fields | {"note": "after"}
        answer = await client.post(f"/edit/{identity(model)}", data=fields)
        value, note = stored(engine, model)
        assert value == before
        if answer.status_code == 302:
            assert note == "after"
        else:
            assert answer.status_code == 400
            assert note == "before"
            assert ": $: " in answer.text

    visit(engine, view_of(model), edit)


def test_a_form_that_is_sent_back_without_being_read_as_html_is_refused_too(
    engine: Engine,
) -> None:
    fill(engine, Plain, "dict")

    async def edit(client: httpx.AsyncClient) -> None:
        for text in ("&lt;redacted dict&gt;", "%3Credacted+dict%3E", '{"a": "<redacted dict>"}'):
            answer = await client.post("/edit/1", data={"note": "after", "credentials": text})
            assert answer.status_code == 400
            assert "printed in place" in answer.text

    visit(engine, view_of(Plain), edit)


def test_a_browser_sends_back_a_text_with_other_line_ends(engine: Engine) -> None:
    fill(engine, Plain, "str")

    async def edit(client: httpx.AsyncClient) -> None:
        await client.post("/edit/1", data={"credentials": "one\ntwo"})
        fields = Form((await client.get("/edit/1")).text).fields
        await client.post("/edit/1", data=fields)

    visit(engine, view_of(Plain), edit)
    assert stored(engine, Plain)[0] == "one\r\ntwo"


@pytest.mark.parametrize("model, value", PRINTED)
def test_what_prints_itself_is_stored_as_its_text(
    engine: Engine, model: type[Any], value: Any
) -> None:
    fill(engine, model, "str")

    async def edit(client: httpx.AsyncClient) -> None:
        with Session(engine) as session:
            session.get_one(model, 1).credentials = value
            session.commit()
        fields = Form((await client.get("/edit/1")).text).fields
        assert (await client.post("/edit/1", data=fields)).status_code == 302

    visit(engine, view_of(model), edit)
    assert stored(engine, model)[0] == str(value)


# -- the recipe of docs/admin-and-logs.md ----------------------------------------------------------


def replacing(model_: type[Any]) -> type[ModelView]:
    class View(ModelView, model=model_):
        column_exclude_list = ("credentials",)
        column_details_exclude_list = ("credentials",)
        form_excluded_columns = ("credentials",)

        async def scaffold_form(self, rules: list[str] | None = None) -> Any:
            form = await super().scaffold_form(rules)
            form.new_credentials = TextAreaField("New credentials (JSON)")
            return form

        async def on_model_change(
            self, data: dict[str, Any], model: Any, is_created: bool, request: Request
        ) -> None:
            text = data.pop("new_credentials")
            if text.strip():
                data["credentials"] = json.loads(text)

    return View


@pytest.mark.parametrize("model, kind", REPLACED)
def test_a_form_that_replaces_shows_nothing_and_keeps_what_it_is_not_given(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)

    async def edit(client: httpx.AsyncClient) -> None:
        for page in ("/list", "/details/1", "/edit/1"):
            answer = await client.get(page)
            assert answer.status_code == 200
            assert MARKER not in answer.text
        fields = Form(answer.text).fields
        assert fields == {"note": "before", "new_credentials": ""}
        answer = await client.post("/edit/1", data=fields | {"note": "after"})
        assert answer.status_code == 302
        assert stored(engine, model) == (VALUES[kind], "after")
        answer = await client.post("/edit/1", data=fields | {"new_credentials": '{"token": "new"}'})
        assert answer.status_code == 302
        assert stored(engine, model) == ({"token": "new"}, "before")

    visit(engine, replacing(model), edit)
