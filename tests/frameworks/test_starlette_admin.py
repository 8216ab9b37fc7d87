"""starlette-admin over models with sealed columns, driven over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette_admin import IntegerField, StringField, TextAreaField
from starlette_admin.contrib.sqla import Admin, ModelView

from .admin import (
    MARKER,
    PRINTED,
    REPLACED,
    VALUES,
    Form,
    Mutable,
    Plain,
    RowBound,
    Secret,
    each_case,
    fill,
    stored,
)

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


def visit(
    engine: Engine, view: ModelView, visitor: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> None:
    """Let `visitor` use the application in which `view` is at the root of the client's URLs."""

    async def main() -> None:
        app = Starlette()
        admin = Admin(engine, secret_key="k" * 32)
        admin.add_view(view)
        admin.mount_to(app)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        base_url = f"http://test/admin/{view.key}"
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            await visitor(client)

    asyncio.run(main())


def identity(model: type[Any]) -> str:
    return "tenant,t1,stripe,apiKey" if model is Secret else "1"


@each_case
def test_who_edits_another_field_leaves_the_credential_as_it_is(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)
    before, _ = stored(engine, model)
    # Pages show the `str()` of a value: that of a text is the text, that of a typed value its own.
    shown = (model in (Plain, Mutable) and kind == "str") or kind == "typed"

    async def edit(client: httpx.AsyncClient) -> None:
        query = {"pk": identity(model)}
        for page in ("/list", "/detail", "/edit"):
            answer = await client.get(page, params=query)
            assert answer.status_code == 200
            assert (MARKER in answer.text) is shown
        fields = Form(answer.text).fields | {"note": "after"}
        answer = await client.post("/edit", params=query, data=fields)
        value, note = stored(engine, model)
        assert value == before
        # It answers an error that is not its own, such as ours, with a page of status 500.
        assert (answer.status_code, note) in [(303, "after"), (500, "before")]
        is_text = kind == "str" and model in (Plain, Mutable)
        # It leaves out an attribute whose class is not SQLAlchemy's own; and it would write the
        # column of a Secret that the database computes.
        assert (answer.status_code == 303) is (is_text or model is RowBound)

    visit(engine, ModelView(model), edit)


@pytest.mark.parametrize("model, value", PRINTED)
def test_what_prints_itself_is_stored_as_its_text(
    engine: Engine, model: type[Any], value: Any
) -> None:
    fill(engine, model, "str")

    async def edit(client: httpx.AsyncClient) -> None:
        with Session(engine) as session:
            session.get_one(model, 1).credentials = value
            session.commit()
        fields = Form((await client.get("/edit", params={"pk": 1})).text).fields
        answer = await client.post("/edit", params={"pk": 1}, data=fields)
        assert answer.status_code == 303

    visit(engine, ModelView(model), edit)
    assert stored(engine, model)[0] == str(value)


# -- the recipe of docs/admin-and-logs.md ----------------------------------------------------------


class Replacing(ModelView):
    async def before_edit(self, request: Request, data: dict[str, Any], obj: Any) -> None:
        text = data["new_credentials"] or ""
        if text.strip():
            obj.credentials = json.loads(text)

    before_create = before_edit


@pytest.mark.parametrize("model, kind", REPLACED)
def test_a_form_that_replaces_shows_nothing_and_keeps_what_it_is_not_given(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)

    class View(Replacing):
        fields = [  # noqa: RUF012
            IntegerField("id", exclude_from_edit=True),
            StringField("note"),
            TextAreaField(
                "new_credentials",
                label="New credentials (JSON)",
                exclude_from_list=True,
                exclude_from_detail=True,
            ),
        ]

    async def edit(client: httpx.AsyncClient) -> None:
        query = {"pk": "1"}
        for page in ("/list", "/detail", "/edit"):
            answer = await client.get(page, params=query)
            assert answer.status_code == 200
            assert MARKER not in answer.text
        fields = Form(answer.text).fields
        assert set(fields) == {"csrftoken", "note", "new_credentials"}
        answer = await client.post("/edit", params=query, data=fields | {"note": "after"})
        assert answer.status_code == 303
        assert stored(engine, model) == (VALUES[kind], "after")
        new = {"new_credentials": '{"token": "new"}'}
        answer = await client.post("/edit", params=query, data=fields | new)
        assert answer.status_code == 303
        assert stored(engine, model) == ({"token": "new"}, "before")
        if model is not RowBound:
            answer = await client.post("/create", data=fields | new)
            assert answer.status_code == 303

    visit(engine, View(model), edit)
