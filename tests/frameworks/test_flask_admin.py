"""Flask-Admin over models with sealed columns, driven by Flask's test client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_admin import Admin  # type: ignore[import-untyped]
from flask_admin.contrib.sqla import ModelView  # type: ignore[import-untyped]
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine
from wtforms import TextAreaField  # type: ignore[import-untyped]

from .admin import (
    MARKER,
    OPENED,
    REPLACED,
    VALUES,
    Form,
    Lazy,
    Mutable,
    Plain,
    RowBound,
    Secret,
    each_case,
    fill,
    stored,
)

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


class View(ModelView):  # type: ignore[misc]
    can_view_details = True


@contextmanager
def visiting(engine: Engine, view: type[ModelView], model: type[Any]) -> Iterator[FlaskClient]:
    """A client of an application that has the view under ``/admin/rows``."""
    app = Flask(__name__)
    app.secret_key = "k" * 32
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    db = SQLAlchemy(app)
    Admin(app).add_view(view(model, db, endpoint="rows"))
    yield app.test_client()
    with app.app_context():
        db.engine.dispose()


def query(model: type[Any]) -> dict[str, str]:
    return {"id": "tenant,t1,stripe,apiKey" if model is Secret else "1"}


@each_case
def test_who_edits_another_field_leaves_the_credential_as_it_is(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)
    before, _ = stored(engine, model)
    # Its lists and details write a dict or list out themselves; the form has no such column.
    shown = model in OPENED or kind == "typed"
    with visiting(engine, View, model) as client:
        for page in ("/admin/rows/", "/admin/rows/details/"):
            answer = client.get(page, query_string=query(model))
            assert answer.status_code == 200
            assert (MARKER in answer.text) is shown
        answer = client.get("/admin/rows/edit/", query_string=query(model))
        assert answer.status_code == 200
        assert MARKER not in answer.text
        fields = Form(answer.text).fields | {"note": "after"}
        answer = client.post("/admin/rows/edit/", query_string=query(model), data=fields)
        assert answer.status_code == 302
    assert stored(engine, model) == (before, "after")


@pytest.mark.parametrize("model", [Plain, Lazy, Mutable, RowBound])
@pytest.mark.parametrize("kind", ["dict", "list"])
def test_a_form_that_is_told_of_the_column_is_refused(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)

    class WithColumn(View):
        form_overrides = {"credentials": TextAreaField}  # noqa: RUF012

    with visiting(engine, WithColumn, model) as client:
        answer = client.get("/admin/rows/edit/", query_string=query(model))
        assert MARKER not in answer.text
        fields = Form(answer.text).fields
        assert "credentials" in fields
        answer = client.post(
            "/admin/rows/edit/", query_string=query(model), data=fields | {"note": "after"}
        )
        assert "printed in place" in answer.text
    assert stored(engine, model) == (VALUES[kind], "before")


# -- the recipe of docs/admin-and-logs.md ----------------------------------------------------------


class Replacing(View):
    column_exclude_list = ("credentials",)
    column_details_exclude_list = ("credentials",)
    form_excluded_columns = ("credentials",)
    form_extra_fields = {"new_credentials": TextAreaField("New credentials (JSON)")}  # noqa: RUF012

    def on_model_change(self, form: Any, model: Any, is_created: bool) -> None:
        text = form.new_credentials.data
        if text.strip():
            model.credentials = json.loads(text)


@pytest.mark.parametrize("model, kind", REPLACED)
def test_a_form_that_replaces_shows_nothing_and_keeps_what_it_is_not_given(
    engine: Engine, model: type[Any], kind: str
) -> None:
    fill(engine, model, kind)
    with visiting(engine, Replacing, model) as client:
        for page in ("/admin/rows/", "/admin/rows/details/", "/admin/rows/edit/"):
            answer = client.get(page, query_string=query(model))
            assert answer.status_code == 200
            assert MARKER not in answer.text
        fields = Form(answer.text).fields
        assert fields == {"note": "before", "new_credentials": ""}
        for changed, expected in (
            ({"note": "after"}, (VALUES[kind], "after")),
            ({"new_credentials": '{"token": "new"}'}, ({"token": "new"}, "before")),
        ):
            answer = client.post(
                "/admin/rows/edit/", query_string=query(model), data=fields | changed
            )
            assert answer.status_code == 302
            assert stored(engine, model) == expected
