"""The demo service: what its pages show and refuse, and a rotation beneath people who work."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.orm import Session

import sqlalchemy_lucent
from sqlalchemy_lucent import (
    Keyring,
    LucentSecret,
    UnknownKeyVersionError,
    set_default_keyring,
    status,
)
from tests.conftest import KEY_1
from webapp.app import HEADERS, Settings, create_app
from webapp.keys import Keys
from webapp.models import TARGETS, Integration, signing_secret_key

from .pages import ROOT

pytestmark = pytest.mark.anyio

URL = "http://127.0.0.1:8000"
ROWS = 200
FAST = 1_000_000
MARKER = "PLAINTEXT-MARKER"
EXAMPLES = ROOT / "docs/examples"
NEW = {
    "tenant": "fjord",
    "provider": "stripe",
    "name": "Billing <b>",
    "credentials": json.dumps({"apiKey": MARKER}),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class Site:
    """The service as a browser reaches it, and its inside."""

    client: httpx.AsyncClient
    app: FastAPI

    @property
    def keys(self) -> Keys:
        keys: Keys = self.app.state.keys
        return keys

    @property
    def session(self) -> Session:
        session: Session = self.app.state.sessions()
        return session

    async def page(self, path: str = "/") -> str:
        answer = await self.client.get(path)
        assert answer.status_code == 200
        return answer.text

    async def post(self, path: str, status: int = 303, /, **form: str) -> httpx.Response:
        answer = await self.client.post(path, data=form)
        assert answer.status_code == status, answer.text
        return answer

    async def create(self) -> uuid.UUID:
        answer = await self.post("/integrations", **NEW)
        return uuid.UUID(answer.headers["location"].removeprefix("/integrations/"))

    def ids(self) -> list[uuid.UUID]:
        with self.session as session:
            return list(session.scalars(select(Integration.id).order_by(Integration.id)))

    def counts(self) -> Counter[str | None]:
        with self.session as session:
            return counts(session.connection())

    def states(self) -> dict[str, str]:
        return {key.version: key.state for key in self.keys.registry.registered()}

    async def new_primary(self, version: str = "v2") -> None:
        await self.post("/keys")
        await self.post(f"/keys/{version}/promote")

    async def until_rotated(self) -> str:
        """Look at the page until it says that the rotation has ended."""
        while 'data-running="true"' in (page := await self.page()):
            await asyncio.sleep(0.02)
        return page


@asynccontextmanager
async def started(
    folder: Path, keyring: Keyring, rows: int = ROWS, max_rate: int = FAST
) -> AsyncIterator[Site]:
    app = create_app(Settings(f"sqlite:///{folder}/service.db", keyring, rows, max_rate))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=URL) as client,
    ):
        yield Site(client, app)


@pytest.fixture
async def site(tmp_path: Path, keyring: Keyring) -> AsyncIterator[Site]:
    async with started(tmp_path, keyring) as site:
        yield site


def counts(bind: Engine | Connection) -> Counter[str | None]:
    counted: Counter[str | None] = Counter()
    for row in status(bind, TARGETS).rows:
        counted[row.key_version] += row.count
    return counted


def can_rotate(page: str) -> bool:
    (button,) = re.findall(r'<button id="rotate"[^>]*>', page)
    return "disabled" not in button


def leaves(value: Any) -> Iterator[str]:
    """Give the strings of a document that are long enough to be looked for in a page."""
    if isinstance(value, dict):
        for member in value.values():
            yield from leaves(member)
    elif isinstance(value, list):
        for member in value:
            yield from leaves(member)
    elif isinstance(value, str) and len(value) > 8:
        yield value


# -- What is shown ---------------------------------------------------------------------------------


async def test_no_page_shows_a_value_or_a_key(site: Site) -> None:
    new = await site.create()
    pages = [await site.page(path) for path in ("/", "/?tenant=fjord", f"/integrations/{new}")]
    with site.session as session:
        documents = [row.credentials for row in session.scalars(select(Integration))]
        documents += [row.payload for row in session.scalars(select(LucentSecret))]
    values = {leaf for document in documents for leaf in leaves(document)}
    assert len(values) > ROWS
    assert MARKER in values
    keys = {KEY_1.hex(), base64.b64encode(KEY_1)[:42].decode(), KEY_1.decode("latin-1")}
    for page in pages:
        assert not [value for value in values | keys if value in page]


async def test_the_list_shows_key_versions_and_the_tenant_that_was_chosen(site: Site) -> None:
    page = await site.page("/?tenant=harbor")
    assert page.count("Harbor Street Books · ") == 12
    assert page.count("Fjord Logistics · ") == 0
    badges = re.findall(r'id="version-[\w-]+" data-live>(\w+)<', page)
    assert badges == ["v1"] * 12
    assert re.findall(r'id="secret-\w+" data-live>(\w+)<', page) == ["v1"] * 8


async def test_a_value_is_shown_when_it_is_asked_for_by_a_form(site: Site) -> None:
    path = f"/integrations/{await site.create()}"
    shown = await site.post(f"{path}/reveal", 200)
    assert MARKER in shown.text
    assert shown.headers["cache-control"] == "no-store"
    assert (await site.client.get(f"{path}/reveal")).status_code == 405
    assert MARKER not in await site.page(path)


async def test_every_answer_has_the_headers(site: Site) -> None:
    answers = [
        await site.client.get("/"),
        await site.client.get("/static/live.js"),
        await site.client.get("/nothing"),
        await site.client.post("/keys"),
        await site.client.post("/integrations", data={}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 303, 422]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS


async def test_what_somebody_typed_is_escaped(site: Site) -> None:
    id_ = await site.create()
    for page in (await site.page(), await site.page(f"/integrations/{id_}")):
        assert "Billing &lt;b&gt;" in page
        assert "Billing <b>" not in page
    await site.post(f"/integrations/{id_}/replace", credentials='{"a": "<script>"}')
    assert "<script>" not in (await site.post(f"/integrations/{id_}/reveal", 200)).text


# -- Create, replace, delete -----------------------------------------------------------------------


async def test_an_integration_is_stored_sealed_replaced_and_deleted(
    site: Site, tmp_path: Path
) -> None:
    id_ = await site.create()
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert id_.hex.encode() in stored
    assert MARKER.encode() not in stored

    await site.post(f"/integrations/{id_}/replace", credentials='{"apiKey": "another"}')
    with site.session as session:
        assert session.get_one(Integration, id_).credentials == {"apiKey": "another"}

    await site.post(f"/integrations/{id_}/delete")
    assert (await site.client.get(f"/integrations/{id_}")).status_code == 404
    assert len(site.ids()) == ROWS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"credentials": f'{{"a": "{MARKER}"'}, "credentials: Invalid JSON"),
        ({"credentials": f'["{MARKER}"]'}, "credentials: Input should be a valid dictionary"),
        ({"credentials": f'{{"a": "{MARKER}", "b": NaN}}'}, "$.{2nd}: "),
        ({"name": "  "}, "name: "),
        ({"name": "n" * 81}, "name: "),
        ({"tenant": "nobody"}, "no such tenant or provider"),
        ({"provider": "nobody"}, "no such tenant or provider"),
    ],
)
async def test_a_wrong_form_is_refused_without_repeating_it(
    site: Site, change: dict[str, str], says: str
) -> None:
    answer = await site.post("/integrations", 422, **(NEW | change))
    assert says in answer.text
    assert MARKER not in answer.text
    assert len(site.ids()) == ROWS


async def test_a_value_that_is_refused_at_the_commit_is_told_too(site: Site) -> None:
    path = f"/integrations/{await site.create()}"
    answer = await site.post(f"{path}/replace", 422, credentials='{"a": 1, "b": [Infinity]}')
    assert "$.{2nd}[0]" in answer.text
    assert MARKER in (await site.post(f"{path}/reveal", 200)).text


async def test_a_signing_secret_is_renewed(site: Site) -> None:
    def secret() -> Any:
        with site.session as session:
            return sqlalchemy_lucent.LucentSecrets(session).require(signing_secret_key("fjord"))

    before = secret()
    await site.post("/tenants/fjord/signing-secret")
    assert secret() != before
    await site.post("/tenants/nobody/signing-secret", 404)


async def test_an_error_of_the_commit_is_not_answered_with_success(site: Site) -> None:
    def fail(_: Session) -> None:
        raise OSError("the disk is full")

    event.listen(site.app.state.sessions, "before_commit", fail, once=True)
    answer = await site.client.post("/integrations", data=NEW)
    assert answer.status_code == 500
    assert len(site.ids()) == ROWS


async def test_bytes_of_another_tenant_are_not_revealed(site: Site) -> None:
    with site.session as session, session.begin():
        session.execute(
            text(
                "UPDATE integrations SET credentials ="
                " (SELECT credentials FROM integrations WHERE tenant_id = 'birch' LIMIT 1)"
                " WHERE tenant_id = 'copper'"
            )
        )
        query = select(Integration.id).where(Integration.tenant_id == "copper")
        id_ = session.scalars(query).first()
    answer = await site.post(f"/integrations/{id_}/reveal", 500)
    assert "TamperedError" in answer.text
    assert "_demo_" not in answer.text


# -- Who may send a form ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": URL},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "null"},
    ],
    ids=str,
)
async def test_a_form_of_another_site_is_refused(site: Site, headers: dict[str, str]) -> None:
    id_ = site.ids()[0]
    for path in (
        "/keys",
        "/rotation",
        f"/integrations/{id_}/delete",
        f"/integrations/{id_}/reveal",
    ):
        answer = await site.client.post(path, headers=headers)
        assert answer.status_code == 403
    assert site.keys.current().versions == ("v1",)
    assert id_ in site.ids()


@pytest.mark.parametrize(
    "headers", [{}, {"sec-fetch-site": "same-origin"}, {"origin": URL}], ids=str
)
async def test_a_form_of_the_page_itself_is_taken(site: Site, headers: dict[str, str]) -> None:
    assert (await site.client.post("/keys", headers=headers)).status_code == 303


async def test_another_name_for_this_machine_is_refused(site: Site) -> None:
    answer = await site.client.get("/", headers={"host": "evil.example"})
    assert answer.status_code == 400


# -- Keys ------------------------------------------------------------------------------------------


async def test_the_page_shows_the_states_of_keys_and_what_lucent_status_counts(site: Site) -> None:
    async def shown() -> tuple[dict[str, str], dict[str, str], bool]:
        page = await site.page()
        states = dict(re.findall(r'id="state-(\w+)">(\w+)<', page))
        values = dict(re.findall(r'class="number" id="([\w-]+)">(\d+)<', page))
        assert states == site.states()
        return states, values, can_rotate(page)

    under_v1 = {"integrations-v1": "200", "lucent_secrets-v1": "8"}
    under_v2 = {"integrations-v2": "200", "lucent_secrets-v2": "8"}
    assert await shown() == ({"v1": "primary"}, under_v1, False)
    await site.post("/keys")
    assert await shown() == ({"v1": "primary", "v2": "registered"}, under_v1, False)
    await site.post("/keys/v2/promote")
    assert await shown() == ({"v1": "draining", "v2": "primary"}, under_v1, True)
    await site.post("/rotation")
    await site.until_rotated()
    assert await shown() == ({"v1": "draining", "v2": "primary"}, under_v2, False)
    await site.post("/keys/v1/retire")
    assert await shown() == ({"v1": "retired", "v2": "primary"}, under_v2, False)
    assert site.keys.registry.verify_receipts().ok


async def test_each_key_is_offered_its_next_step_only(site: Site) -> None:
    def offered(page: str) -> list[str]:
        return re.findall(r'<button id="(promote-\w+|retire-\w+)"', page)

    assert offered(await site.page()) == []
    await site.post("/keys")
    assert offered(await site.page()) == ["promote-v2"]
    await site.post("/keys/v2/promote")
    assert offered(await site.page()) == ["retire-v1"]
    await site.post("/rotation")
    await site.until_rotated()
    site.keys.registry.fence("v1")
    assert offered(await site.page()) == ["retire-v1"]
    await site.post("/keys/v1/retire")
    assert offered(await site.page()) == []


async def test_a_rotation_brings_every_row_under_the_new_key(site: Site, keyring: Keyring) -> None:
    await site.new_primary()
    assert site.counts() == {"v1": ROWS + 8}
    await site.post("/rotation")
    said = " ".join((await site.until_rotated()).split())
    assert site.counts() == {"v2": ROWS + 8}
    assert "Done: 208 values re-encrypted under v2, 0 left;" in said
    assert "208 open with that key alone, 0 do not." in said

    await site.post("/keys/v1/retire")
    assert site.keys.current().versions == ("v2",)
    with site.session as session:
        row = session.get_one(Integration, site.ids()[0])
        assert row.credentials
        session.expire(row)
        set_default_keyring(keyring)
        with pytest.raises(UnknownKeyVersionError):
            _ = row.credentials


async def test_a_key_that_rows_need_is_not_retired(site: Site) -> None:
    await site.new_primary()
    answer = await site.post("/keys/v1/retire", 409)
    assert (
        "key version &#39;v1&#39; is still needed: 200 in integrations.credentials" in answer.text
    )
    assert site.keys.current().versions == ("v2", "v1")
    assert site.states() == {"v1": "draining", "v2": "primary"}


async def test_the_database_refuses_a_retired_key_to_a_process_that_was_left_behind(
    site: Site, keyring: Keyring
) -> None:
    await site.new_primary()
    await site.post("/rotation")
    await site.until_rotated()
    await site.post("/keys/v1/retire")
    set_default_keyring(keyring)
    await site.post("/integrations", 500, **NEW)
    assert site.counts() == {"v2": ROWS + 8}


@pytest.mark.parametrize(
    ("version", "step"), [("v1", "retire"), ("v9", "retire"), ("v9", "promote")]
)
async def test_a_step_that_a_key_cannot_take_is_refused(
    site: Site, version: str, step: str
) -> None:
    answer = await site.post(f"/keys/{version}/{step}", 409)
    assert 'role="alert"' in answer.text
    assert site.keys.current().versions == ("v1",)
    await site.post(f"/keys/{version}/forget", 422)


async def test_the_version_of_a_retired_key_is_not_used_again(site: Site) -> None:
    await site.new_primary()
    await site.post("/keys/v1/retire", 409)
    await site.post("/rotation")
    await site.until_rotated()
    await site.post("/keys/v1/retire")
    await site.new_primary("v3")
    assert site.keys.current().versions == ("v3", "v2")
    assert site.states() == {"v1": "retired", "v2": "draining", "v3": "primary"}


async def test_work_goes_on_during_a_rotation_and_nothing_of_it_is_lost(
    tmp_path: Path, keyring: Keyring
) -> None:
    # Four seconds at the least, and edits from the first moment to the last.
    async with started(tmp_path, keyring, rows=400, max_rate=100) as site:
        ids = site.ids()
        await site.new_primary()
        await site.post("/keys")
        await site.post("/rotation")
        rotation = site.keys.rotation
        assert rotation is not None
        await site.post("/rotation", 409)
        await site.post("/keys/v3/promote", 409)
        assert 'data-running="true"' in await site.page()

        # The run goes through the rows in this order: edit from both ends, before it and behind it.
        deleted, kept = ids[190:210], ids[:190] + ids[210:]
        waiting = [id_ for pair in zip(kept, reversed(kept), strict=True) for id_ in pair]
        created: list[uuid.UUID] = []
        edited: dict[uuid.UUID, dict[str, int]] = {}
        while rotation.running:
            id_ = waiting.pop(0)
            edited[id_] = {"edited": len(edited)}
            await site.post(f"/integrations/{id_}/replace", credentials=json.dumps(edited[id_]))
            if deleted and len(edited) % 5 == 0:
                created.append(await site.create())
                await site.post(f"/integrations/{deleted.pop()}/delete")
            waiting.append(id_)
        assert len(edited) > 10
        assert created

        assert "Done" in await site.page()
        assert site.counts() == {"v2": 400 + 8}
        with site.session as session:
            for id_, document in edited.items():
                assert session.get_one(Integration, id_).credentials == document
            for id_ in created:
                assert session.get_one(Integration, id_).credentials == {"apiKey": MARKER}
        assert set(site.ids()) == {*kept, *deleted, *created}


async def test_a_service_that_ends_in_a_rotation_goes_on_with_it_later(
    tmp_path: Path, keyring: Keyring, promoted: Keyring
) -> None:
    async with started(tmp_path, keyring, rows=1000):
        pass
    async with started(tmp_path, promoted, max_rate=100) as site:
        await site.post("/keys/v2/promote")
        await site.post("/rotation")
        while not site.counts()["v2"]:
            await asyncio.sleep(0.01)
    engine = create_engine(f"sqlite:///{tmp_path}/service.db")
    left = counts(engine)
    engine.dispose()
    assert left["v1"]
    assert left["v2"]
    async with started(tmp_path, promoted) as site:
        await site.post("/rotation")
        await site.until_rotated()
        assert site.counts() == {"v2": 1008}


async def test_a_value_that_does_not_open_is_counted_and_left(site: Site) -> None:
    with site.session as session, session.begin():
        session.execute(
            text(
                "UPDATE integrations SET credentials ="
                " (SELECT credentials FROM integrations WHERE id <> :id LIMIT 1) WHERE id = :id"
            ),
            {"id": site.ids()[0].hex},
        )
    await site.new_primary()
    await site.post("/rotation")
    said = " ".join((await site.until_rotated()).split())
    assert "Not done: 207 values re-encrypted under v2, 1 left;" in said
    assert "207 open with that key alone, 1 do not." in said
    await site.post("/keys/v1/retire", 409)


async def test_a_rotation_that_the_database_ends_says_why(site: Site) -> None:
    with site.session as session, session.begin():
        session.execute(
            text(
                "CREATE TRIGGER refuse BEFORE UPDATE ON integrations BEGIN DELETE FROM nowhere; END"
            )
        )
    await site.new_primary()
    await site.post("/rotation")
    page = await site.until_rotated()
    assert "Stopped: the database ended the rotation: OperationalError: no such" in page
    assert site.counts() == {"v1": ROWS + 8}


# -- The process -----------------------------------------------------------------------------------


def arguments(port: int) -> list[str]:
    return [sys.executable, "-m", "webapp", "--port", str(port), "--max-rate", "100"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_in_the_middle_of_a_rotation_ends_it_and_leaves_nothing(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        arguments(0),
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        for path in ("/keys", "/keys/v2/promote", "/rotation"):
            assert httpx.post(url + path, timeout=60).status_code == 303
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.stdout.read() == ""
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_told_in_a_sentence(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            arguments(taken.getsockname()[1]),
            cwd=EXAMPLES,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("cannot listen on port")
    assert 'make demo-web DEMO_ARGS="--port 8001"' in done.stderr
    assert done.stderr.count("\n") == 1


# -- The code --------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return [*sorted((EXAMPLES / "webapp").glob("*.py")), EXAMPLES / "webapp_screenshot.py"]


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
def test_only_public_names_are_imported_and_used(source: Path) -> None:
    faults = []
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            faults += [a.name for a in node.names if a.name.startswith("sqlalchemy_lucent")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "sqlalchemy_lucent"
        ):
            public = sqlalchemy_lucent.__all__ if node.module == "sqlalchemy_lucent" else []
            faults += [a.name for a in node.names if a.name not in public]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            faults += [] if own or node.attr == "__name__" else [node.attr]
    assert not faults


def test_nothing_is_loaded_from_elsewhere() -> None:
    files = [*(EXAMPLES / "webapp/templates").iterdir(), *(EXAMPLES / "webapp/static").iterdir()]
    assert len(files) >= 7
    for file in files:
        urls = re.findall(r"https?://[\w.]+|[\"'(]//\w+", file.read_text("utf-8"))
        assert set(urls) <= {"http://www.w3.org"}, file.name  # the name of SVG, not an address
