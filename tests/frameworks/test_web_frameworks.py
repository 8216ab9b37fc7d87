"""The repository in web frameworks and workers, as docs/fastapi.md and docs/flask.md show it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from flask import Flask, jsonify
from flask import request as flask_request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    Keyring,
    LucentBase,
    LucentSecretMixin,
    LucentSecrets,
    SecretNotFoundError,
    generate_master_key,
)
from tests.databases import drop_everything

# -- FastAPI ---------------------------------------------------------------------------------------


async def get_session(request: Request) -> AsyncIterator[AsyncSession]:
    sessions: async_sessionmaker[AsyncSession] = request.app.state.sessions
    async with sessions.begin() as session:
        yield session


def get_secrets(
    session: Annotated[AsyncSession, Depends(get_session)],
) -> AsyncLucentSecrets:
    return AsyncLucentSecrets(session)


Secrets = Annotated[AsyncLucentSecrets, Depends(get_secrets)]


def fastapi_app(engine: AsyncEngine) -> FastAPI:
    app = FastAPI()
    app.state.sessions = async_sessionmaker(engine)

    @app.put("/tenants/{tenant}/stripe", status_code=204)
    async def put(tenant: str, document: dict[str, Any], secrets: Secrets) -> None:
        await secrets.set(secrets.key("tenant", tenant, "stripe", "apiKey"), document)
        if document.get("fail"):
            raise HTTPException(500)

    @app.get("/tenants/{tenant}/stripe/length")
    async def length(tenant: str, secrets: Secrets) -> int:
        try:
            found = await secrets.require(secrets.key("tenant", tenant, "stripe", "apiKey"))
        except SecretNotFoundError:
            raise HTTPException(404) from None
        return len(found["apiKey"])

    return app


def test_fastapi_stores_and_reads_with_one_transaction_per_request(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(LucentBase.metadata.create_all)
        transport = httpx.ASGITransport(fastapi_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/tenants/a/stripe/length")).status_code == 404
            response = await client.put("/tenants/a/stripe", json={"apiKey": "sk_1"})
            assert response.status_code == 204
            assert (await client.get("/tenants/a/stripe/length")).json() == 4
            response = await client.put("/tenants/a/stripe", json={"apiKey": "", "fail": True})
            assert response.status_code == 500
            assert (await client.get("/tenants/a/stripe/length")).json() == 4

    run_async(work)


# -- Flask-SQLAlchemy ------------------------------------------------------------------------------


@pytest.fixture
def flask_app(url: URL) -> Iterator[Flask]:
    class Base(DeclarativeBase):
        pass

    db = SQLAlchemy(model_class=Base)

    class Secret(LucentSecretMixin, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "secrets"

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)
    secrets = LucentSecrets(db.session, model=Secret)

    @app.put("/tenants/<tenant>/stripe")
    def put(tenant: str) -> tuple[str, int]:
        secrets.set(secrets.key("tenant", tenant, "stripe", "apiKey"), flask_request.get_json())
        db.session.commit()
        return "", 204

    @app.get("/tenants/<tenant>/stripe/length")
    def length(tenant: str) -> Any:
        return jsonify(len(secrets.require(f"tenant:{tenant}:stripe:apiKey")["apiKey"]))

    @app.errorhandler(SecretNotFoundError)
    def missing(error: SecretNotFoundError) -> tuple[str, int]:
        return "", 404

    with app.app_context():
        db.create_all()
    yield app
    with app.app_context():
        db.session.remove()
        drop_everything(db.engine)
        db.engine.dispose()


def test_flask_sqlalchemy_stores_and_reads(flask_app: Flask) -> None:
    transport = httpx.WSGITransport(flask_app)
    with httpx.Client(transport=transport, base_url="http://test") as client:
        assert client.get("/tenants/a/stripe/length").status_code == 404
        assert client.put("/tenants/a/stripe", json={"apiKey": "sk_1"}).status_code == 204
        assert client.get("/tenants/a/stripe/length").json() == 4


def test_scoped_session_is_that_of_the_moment(engine: Engine) -> None:
    LucentBase.metadata.create_all(engine)
    registry = scoped_session(sessionmaker(engine))
    told: list[Session] = []
    secrets = LucentSecrets(registry, on_access=lambda _, session: told.append(session))
    secrets.set("tenant:a:stripe:apiKey", 1)
    first = registry()
    registry.remove()
    assert secrets.get("tenant:a:stripe:apiKey") is None
    assert told[0] is first
    assert told[1] is registry()
    assert isinstance(told[1], Session)
    assert told[1] is not first
    registry.remove()


# -- worker processes ------------------------------------------------------------------------------

FORKING = """
import os
from sqlalchemy_lucent import Keyring, generate_master_key

keys = Keyring({"v1": generate_master_key()}).for_context("t.c")
keys.open(keys.seal(b"warm"))           # the caches are filled before the fork
children = []
for _ in range(8):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        header = len(keys.primary.header)
        with os.fdopen(writer, "wb") as pipe:
            for _ in range(25_000):
                pipe.write(keys.seal(b"x")[header : header + 12])
        os._exit(0)
    os.close(writer)
    children.append(reader)
nonces = []
for reader in children:
    with os.fdopen(reader, "rb") as pipe:
        sent = pipe.read()
    nonces += [sent[i : i + 12] for i in range(0, len(sent), 12)]
for _ in children:
    assert os.wait()[1] == 0
print(len(nonces), len(set(nonces)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_nonces_never_repeat_across_a_fork() -> None:
    # In a process of its own, because pytest's has threads, which do not go well with a fork.
    done = subprocess.run(
        [sys.executable, "-c", FORKING], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["200000", "200000"]


PREFORK = """
import os, sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqlalchemy_lucent import LucentBase, LucentSecrets

engine = create_engine(sys.argv[1])
LucentBase.metadata.create_all(engine)
with Session(engine) as session:
    LucentSecrets(session).set("app:default:resend:apiKey", {"n": 1})
    session.commit()
for number in range(4):
    if os.fork() == 0:
        engine.dispose(close=False)     # the parent's connections are the parent's
        with Session(engine) as session:
            secrets = LucentSecrets(session)
            assert secrets.require("app:default:resend:apiKey") == {"n": 1}
            secrets.set(f"app:default:worker{number}:apiKey", number)
            session.commit()
        os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
with Session(engine) as session:
    print(LucentSecrets(session).count(scope="app", owner_id="default"))
engine.dispose()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
def test_forked_workers_open_and_seal_with_what_the_parent_had(url: URL) -> None:
    rendered = url.update_query_dict(
        {"timeout": "60"} if url.drivername.startswith("sqlite") else {}
    )
    environment = {**os.environ, "LUCENT_SECRETS_KEY": generate_master_key()}
    done = subprocess.run(
        [sys.executable, "-c", PREFORK, rendered.render_as_string(hide_password=False)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    engine = create_engine(url)
    drop_everything(engine)
    engine.dispose()
    assert done.stdout.split() == ["5"]


def spawned(url: str, answers: multiprocessing.SimpleQueue[Any]) -> None:
    engine = create_engine(url)
    with Session(engine) as session:
        answers.put(LucentSecrets(session).require("app:default:resend:apiKey"))
    engine.dispose()


def test_spawned_worker_reads_its_keyring_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUCENT_SECRETS_KEY", generate_master_key())
    url = f"sqlite:///{tmp_path}/spawned.db"
    engine = create_engine(url)
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        LucentSecrets(session, keyring=Keyring.from_env()).set(
            "app:default:resend:apiKey", {"n": 1}
        )
        session.commit()
    engine.dispose()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=spawned, args=(url, answers))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert answers.get() == {"n": 1}
    answers.close()
    process.close()
