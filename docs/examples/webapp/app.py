"""The pages: the routes, who may call them, and what they send to a browser.

Routes are ordinary functions over the synchronous :class:`~sqlalchemy.orm.Session`, which FastAPI
runs in threads. So :func:`~sqlalchemy_lucent.rotate` can share the engine. With an
``AsyncSession``, use ``AsyncLucentSecrets`` and ``arotate`` instead.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from pydantic import BaseModel, ConfigDict, Field, Json
from sqlalchemy import URL, Engine, create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sqlalchemy_lucent import (
    DecryptionError,
    KeyInUseError,
    KeyRegistry,
    Keyring,
    KeyStateError,
    LucentBase,
    LucentSecrets,
    SerializationError,
    set_default_keyring,
    status,
)

from .keys import BusyError, Keys
from .models import TARGETS, Base, Integration, Tenant, signing_secret_key
from .seed import PROVIDERS, new_signing_secret, seed

HERE: Final = Path(__file__).parent

LISTED: Final = 12
"""How many of the latest integrations the first page shows."""

HEADERS: Final = {
    # Load nothing from elsewhere, no inline script or style, and allow no frame around the page.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # A revealed value must not stay in a cache or come back with the Back button.
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
"""Sent with every answer."""

templates = Jinja2Templates(HERE / "templates")


# -- Dependencies ----------------------------------------------------------------------------------


def get_session(request: Request) -> Iterator[Session]:
    with request.app.state.sessions.begin() as session:
        yield session


def get_secrets(session: DatabaseSession) -> LucentSecrets:
    return LucentSecrets(session)


def get_keys(request: Request) -> Keys:
    keys: Keys = request.app.state.keys
    return keys


def refuse_other_sites(request: Request) -> None:
    """Refuse a form that another site made the browser send.

    Browsers name the origin of a request in Sec-Fetch-Site, older ones in Origin. A client that
    sends neither is no browser, and has no user whose rights another site could borrow.
    """
    if request.method in ("GET", "HEAD"):
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        allowed = site in ("same-origin", "none")
    else:
        allowed = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not allowed:
        raise HTTPException(403, "This form was sent by another site.")


# With scope="function", the commit comes before the answer. With the default, the browser could
# follow a redirect to a page without the new row, and a COMMIT could fail after an answer that says
# all is well.
DatabaseSession = Annotated[Session, Depends(get_session, scope="function")]
Secrets = Annotated[LucentSecrets, Depends(get_secrets, scope="function")]
KeysInUse = Annotated[Keys, Depends(get_keys)]

router = APIRouter(dependencies=[Depends(refuse_other_sites)])


# -- Forms -----------------------------------------------------------------------------------------


class Credentials(BaseModel):
    """A JSON document that somebody typed."""

    model_config = ConfigDict(str_strip_whitespace=True, hide_input_in_errors=True)

    credentials: Annotated[Json[dict[str, Any]], Field(repr=False)]


class NewIntegration(Credentials):
    """The form under the list."""

    tenant: str
    provider: str
    name: Annotated[str, Field(min_length=1, max_length=80)]


# -- Integrations ----------------------------------------------------------------------------------

# Select columns, not objects: the list needs only the key version of the credentials, which the
# database reads from the stored bytes. So no sealed value is fetched or opened.
_OVERVIEW: Final = select(
    Integration.id,
    Integration.provider,
    Integration.name,
    Integration.tenant_id,
    Tenant.name.label("tenant"),
    Integration.credentials.key_version.label("key_version"),
).join(Tenant)


@router.get("/")
def index(
    request: Request, session: DatabaseSession, keys: KeysInUse, tenant: str = ""
) -> Response:
    return _index(request, session, keys, tenant)


@router.post("/integrations")
def create(form: Annotated[NewIntegration, Form()], session: DatabaseSession) -> Response:
    if session.get(Tenant, form.tenant) is None or form.provider not in PROVIDERS:
        raise HTTPException(422, "There is no such tenant or provider.")
    integration = Integration(
        tenant_id=form.tenant,
        provider=form.provider,
        name=form.name,
        credentials=form.credentials,
    )
    session.add(integration)
    session.flush()
    return _see(f"/integrations/{integration.id}")


@router.get("/integrations/{id_}")
def show(request: Request, id_: uuid.UUID, session: DatabaseSession) -> Response:
    return _integration(request, session, id_)


@router.post("/integrations/{id_}/reveal")
def reveal(request: Request, id_: uuid.UUID, session: DatabaseSession) -> Response:
    # The only route that opens a value for a browser. It is a POST, so that no link, preloading or
    # history entry triggers it. A service with users would record who asked.
    opened = _found(session, id_).credentials
    return _integration(request, session, id_, json.dumps(opened, indent=2, ensure_ascii=False))


@router.post("/integrations/{id_}/replace")
def replace(
    id_: uuid.UUID, form: Annotated[Credentials, Form()], session: DatabaseSession
) -> Response:
    _found(session, id_).credentials = form.credentials
    return _see(f"/integrations/{id_}")


@router.post("/integrations/{id_}/delete")
def delete(id_: uuid.UUID, session: DatabaseSession) -> Response:
    session.delete(_found(session, id_))
    return _see("/")


@router.post("/tenants/{tenant_id}/signing-secret")
def renew_signing_secret(tenant_id: str, session: DatabaseSession, secrets: Secrets) -> Response:
    if session.get(Tenant, tenant_id) is None:
        raise HTTPException(404, "There is no such tenant.")
    secrets.set(signing_secret_key(tenant_id), new_signing_secret())
    return _see("/#secrets")


def _found(session: Session, id_: uuid.UUID) -> Integration:
    integration = session.get(Integration, id_)
    if integration is None:
        raise HTTPException(404, "There is no such integration. Somebody may have deleted it.")
    return integration


def _integration(
    request: Request, session: Session, id_: uuid.UUID, revealed: str | None = None
) -> Response:
    row = session.execute(_OVERVIEW.where(Integration.id == id_)).one_or_none()
    if row is None:
        raise HTTPException(404, "There is no such integration. Somebody may have deleted it.")
    return templates.TemplateResponse(
        request, "integration.html", {"integration": row, "revealed": revealed}
    )


# -- Keys ------------------------------------------------------------------------------------------


@router.post("/keys")
def add_key_version(keys: KeysInUse) -> Response:
    keys.add_version()
    return _see("/")


@router.post("/rotation")
def rotate(keys: KeysInUse) -> Response:
    keys.rotate()
    return _see("/")


@router.post("/keys/{version}/{step}")
def change_key(
    request: Request,
    version: str,
    step: Literal["promote", "retire"],
    session: DatabaseSession,
    keys: KeysInUse,
) -> Response:
    try:
        keys.promote(version) if step == "promote" else keys.retire(version)
    except (KeyInUseError, KeyStateError) as error:
        return _index(request, session, keys, refusal=str(error))
    return _see("/")


def _index(
    request: Request, session: Session, keys: Keys, tenant: str = "", refusal: str | None = None
) -> Response:
    # Ask before counting rows, so that a page that says "Done" has the final counts.
    running = keys.rotating
    keyring = keys.current()
    # What `lucent status` prints. A fingerprint tells keys apart and reveals nothing about them.
    values = status(session.connection(), TARGETS).rows
    primary = keyring.primary, keyring.fingerprint(keyring.primary)
    chosen = [Integration.tenant_id == tenant] if tenant else []
    count = session.scalar(select(func.count()).select_from(Integration).where(*chosen))
    latest = _OVERVIEW.where(*chosen).order_by(Integration.created_at.desc(), Integration.id)
    return templates.TemplateResponse(
        request,
        "index.html",
        {
            "keys": keys.registry.registered(),
            "values": values,
            "stale": any((row.key_version, row.fingerprint) != primary for row in values),
            "rotation": keys.rotation,
            "running": running,
            "refusal": refusal,
            "tenants": session.scalars(select(Tenant).order_by(Tenant.name)).all(),
            "tenant": tenant,
            "providers": sorted(PROVIDERS),
            "count": count,
            "integrations": session.execute(latest.limit(LISTED)).all(),
            "signing_secrets": LucentSecrets(session).list(scope="tenant"),
        },
        status_code=200 if refusal is None else 409,
    )


def _see(url: str) -> Response:
    """Redirect after a form, so that reloading the page does not send the form again."""
    return RedirectResponse(url, status_code=303)


# -- Errors ----------------------------------------------------------------------------------------


def _message(request: Request, status_code: int, message: str) -> Response:
    context = {"message": message, "status_code": status_code}
    return templates.TemplateResponse(request, "message.html", context, status_code=status_code)


def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _message(request, error.status_code, error.detail)


def on_invalid_form(request: Request, error: Exception) -> Response:
    # FastAPI's own answer would repeat the input, which may be a credential.
    assert isinstance(error, RequestValidationError)
    faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
    return _message(request, 422, faults)


def on_refused_value(request: Request, error: Exception) -> Response:
    return _message(request, 422, str(error))


def on_unopened_value(request: Request, error: Exception) -> Response:
    return _message(request, 500, f"{type(error).__name__}: {error}")


def on_busy(request: Request, error: Exception) -> Response:
    return _message(request, 409, str(error))


# -- The application -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What differs between one start of the service and another."""

    database: str | URL
    keyring: Keyring
    rows: int = 10_000
    """How many integrations to put into an empty database."""
    max_rate: int = 1_000
    """Most rows per second in a rotation. Without a limit, it ends before anybody can watch."""


def create_app(settings: Settings) -> FastAPI:
    """Return the application. It opens its database when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # hide_parameters keeps the values of other columns out of errors and logs.
        engine = create_engine(settings.database, hide_parameters=True)
        app.state.sessions = sessionmaker(engine)
        keys = app.state.keys = await run_in_threadpool(_prepare, engine, settings)
        try:
            yield
        finally:
            await run_in_threadpool(keys.close)
            set_default_keyring(None)
            engine.dispose()

    # No pages of API documentation: they would load their scripts from elsewhere.
    app = FastAPI(title="Integrations", lifespan=lifespan, openapi_url=None)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    for error, handler in (
        (StarletteHTTPException, on_http_error),
        (RequestValidationError, on_invalid_form),
        (SerializationError, on_refused_value),
        (DecryptionError, on_unopened_value),
        (BusyError, on_busy),
    ):
        app.add_exception_handler(error, handler)
    # Refuse a foreign host name that points at 127.0.0.1 (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    @app.middleware("http")
    async def add_headers(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return app


def _prepare(engine: Engine, settings: Settings) -> Keys:
    """Create the tables, and fill them if they are empty. A real service uses migrations."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            # Readers and the writer then do not wait for each other. The file keeps the setting.
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    for metadata in (Base.metadata, LucentBase.metadata, KeyRegistry.metadata):
        metadata.create_all(engine)
    keys = Keys(engine, settings.keyring, max_rate=settings.max_rate)
    set_default_keyring(keys.current)
    with Session(engine) as session, session.begin():
        if session.scalars(select(Tenant).limit(1)).first() is None:
            seed(session, settings.rows)
    return keys
