"""Flask-SQLAlchemy: sealed and row-bound columns on ``db.Model``, over one database and several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, jsonify, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import URL, String, inspect, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    LucentSecretMixin,
    LucentSecrets,
    row_bound,
)
from tests.databases import drop_everything


@pytest.fixture
def db(url: URL, tmp_path: Any) -> Iterator[Any]:
    """One database of each kind as the application's own, and one of SQLite beside it."""

    class Base(DeclarativeBase):
        pass

    db: Any = SQLAlchemy(model_class=Base)
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_BINDS"] = {"vault": f"sqlite:///{tmp_path}/vault.db"}
    db.init_app(app)

    class Account(db.Model):  # type: ignore[misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(String(50))
        credentials: Mapped[Any] = mapped_column(EncryptedJSON.mutable())

    class Vault(db.Model):  # type: ignore[misc]
        __bind_key__ = "vault"

        tenant: Mapped[str] = mapped_column(String(50), primary_key=True)
        secret: Mapped[Any] = row_bound("tenant")

    class Secret(LucentSecretMixin, db.Model):  # type: ignore[misc]
        __tablename__ = "secrets"
        __bind_key__ = "vault"

    db.account, db.vault, db.secret, db.app = Account, Vault, Secret, app
    with app.app_context():
        db.create_all()
        yield db
        db.session.remove()
        for engine in db.engines.values():
            drop_everything(engine)
            engine.dispose()


def test_each_model_is_stored_in_its_own_database(db: Any) -> None:
    db.session.add(db.account(name="a", credentials={"n": [1]}))
    db.session.add(db.vault(tenant="a", secret={"n": 1}))
    LucentSecrets(db.session, model=db.secret).set("tenant:a:stripe:apiKey", {"n": 1})
    db.session.commit()
    assert set(inspect(db.engine).get_table_names()) == {"account"}
    assert set(inspect(db.engines["vault"]).get_table_names()) == {"vault", "secrets"}
    account = db.session.scalars(db.select(db.account)).one()
    account.credentials["n"].append(2)
    vault = db.session.scalars(db.select(db.vault)).one()
    assert vault.secret == {"n": 1}
    vault.tenant = "b"
    db.session.commit()
    assert (account.credentials, vault.secret) == ({"n": [1, 2]}, {"n": 1})
    assert LucentSecrets(db.session, model=db.secret).get("tenant:a:stripe:apiKey") == {"n": 1}
    with db.engines["vault"].connect() as connection:
        stored = connection.scalars(text("SELECT secret FROM vault")).one()
    assert bytes(stored).startswith(b"v1:")


def test_paginated_and_first_or_404_give_opened_values(db: Any) -> None:
    db.session.add_all([db.vault(tenant=f"t{n}", secret={"n": n}) for n in range(5)])
    db.session.commit()
    page = db.paginate(db.select(db.vault).order_by(db.vault.tenant), page=1, per_page=2)
    assert [vault.secret["n"] for vault in page] == [0, 1]
    assert db.get_or_404(db.vault, "t3").secret == {"n": 3}


def test_views_store_and_show(db: Any) -> None:
    app: Flask = db.app

    @app.put("/vaults/<tenant>")
    def put(tenant: str) -> tuple[str, int]:
        db.session.merge(db.vault(tenant=tenant, secret=request.get_json()))
        db.session.commit()
        return "", 204

    @app.get("/vaults/<tenant>")
    def show(tenant: str) -> Any:
        return jsonify(db.get_or_404(db.vault, tenant).secret)

    client = app.test_client()
    assert client.get("/vaults/a").status_code == 404
    for number in (1, 2):
        assert client.put("/vaults/a", json={"n": number}).status_code == 204
        assert client.get("/vaults/a").json == {"n": number}


def test_binding_value_in_another_form_is_refused(db: Any) -> None:
    db.session.add(db.vault(tenant=7, secret={}))
    with pytest.raises(ConfigurationError, match="was given one of type int"):
        db.session.commit()
    db.session.rollback()
