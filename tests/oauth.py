"""A local OAuth server: refresh tokens that work once, and a grant that is revoked on reuse.

It is a small ASGI application in a process of its own. Each test makes its own grants, says how
they behave, and reads what was asked for them.

``python -m tests.oauth`` serves on a free port of 127.0.0.1, which it prints.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# -- the server ------------------------------------------------------------------------------------


@dataclass
class Grant:
    """What one user allowed; `on_reuse` and the lists say how the server behaves for it."""

    expires_in: float = 3600
    on_reuse: str = "revoke"
    """A refresh token that was used: ``revoke`` the grant, ``refuse`` it, or ``allow`` it."""
    delays: list[float] = field(default_factory=list)
    """Seconds that the next answers take, after the token was exchanged."""
    failures: list[int] = field(default_factory=list)
    """The status of the next answers, with nothing exchanged; 0 answers as usual."""
    serial: int = 0
    revoked: bool = False
    refresh_token: str = ""
    access_token: str = ""
    calls: int = 0
    answers: int = 0
    invalid_grant: int = 0
    revocations: int = 0
    used: list[str] = field(default_factory=list)

    def issue(self) -> dict[str, Any]:
        self.serial += 1
        if self.refresh_token:
            self.used.append(self.refresh_token)
        self.refresh_token = f"refresh-{self.serial}-{secrets.token_hex(8)}"
        self.access_token = f"access-{self.serial}-{secrets.token_hex(8)}"
        return {
            "access_token": self.access_token,
            "refresh_token": self.refresh_token,
            "expires_in": self.expires_in,
            "token_type": "Bearer",
            "serial": self.serial,
        }


GRANTS: dict[str, Grant] = {}
INVALID_GRANT = 400, {"error": "invalid_grant"}


async def token(form: dict[str, str]) -> tuple[int, Any]:
    """Answer ``POST /token``, RFC 6749, section 6."""
    presented = form.get("refresh_token", "")
    grant = next(
        (g for g in GRANTS.values() if presented == g.refresh_token or presented in g.used), None
    )
    if form.get("grant_type") != "refresh_token" or grant is None:
        return 400, {"error": "invalid_request"}
    grant.calls += 1
    failure = grant.failures.pop(0) if grant.failures else 0
    delay = grant.delays.pop(0) if grant.delays else 0.0
    if failure:
        answer: tuple[int, Any] = failure, {"error": "temporarily_unavailable"}
    elif grant.revoked:
        answer = INVALID_GRANT
    elif presented in grant.used and grant.on_reuse != "allow":
        if grant.on_reuse == "revoke":
            grant.revoked = True
            grant.revocations += 1
        answer = INVALID_GRANT
    else:
        answer = 200, grant.issue()
    if answer is INVALID_GRANT:
        grant.invalid_grant += 1
    await asyncio.sleep(delay)
    grant.answers += 1
    return answer


async def respond(method: str, path: str, body: bytes, bearer: str) -> tuple[int, Any]:
    name = path.rpartition("/")[2]
    if (method, path) == ("POST", "/token"):
        return await token(dict(urllib.parse.parse_qsl(body.decode())))
    if (method, path) == ("GET", "/me"):
        holder = next((n for n, g in GRANTS.items() if bearer == f"Bearer {g.access_token}"), None)
        return (200, {"grant": holder}) if holder else (401, {"error": "invalid_token"})
    if (method, path) == ("POST", "/grants"):
        name = secrets.token_hex(8)
        GRANTS[name] = Grant(**json.loads(body))
        return 200, {"grant": name, **GRANTS[name].issue()}
    if name not in GRANTS:
        return 404, {}
    if method == "PATCH":
        for attribute, value in json.loads(body).items():
            setattr(GRANTS[name], attribute, value)
    return 200, asdict(GRANTS[name])


async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """The ASGI application."""
    assert scope["type"] == "http"
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    bearer = dict(scope["headers"]).get(b"authorization", b"").decode()
    status, answer = await respond(scope["method"], scope["path"], body, bearer)
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


# -- clients ---------------------------------------------------------------------------------------


class OAuthError(Exception):
    """What the server says, as the errors of OAuth libraries have it: in `error`."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


def ask(method: str, url: str, data: bytes | None = None) -> Any:
    request = urllib.request.Request(url, data, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            said = json.load(error)["error"]
    raise OAuthError(said)


def refreshed(url: str, refresh_token: str) -> Any:
    """Exchange a refresh token for new tokens, as a client library does."""
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token}
    return ask("POST", f"{url}/token", urllib.parse.urlencode(form).encode())


@dataclass(frozen=True)
class Server:
    """The running server, as a test sees it."""

    url: str

    def grant(self, **behaviour: Any) -> tuple[str, dict[str, Any]]:
        """Make a grant; return its name and its first tokens."""
        tokens = ask("POST", f"{self.url}/grants", json.dumps(behaviour).encode())
        return tokens.pop("grant"), tokens

    def seen(self, grant: str) -> Grant:
        """Return what the server knows of a grant: how often it was asked for it."""
        return Grant(**ask("GET", f"{self.url}/grants/{grant}"))

    def change(self, grant: str, **behaviour: Any) -> None:
        ask("PATCH", f"{self.url}/grants/{grant}", json.dumps(behaviour).encode())


@contextmanager
def oauth_server() -> Iterator[Server]:
    """Run the server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.oauth"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the OAuth server did not start"
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
