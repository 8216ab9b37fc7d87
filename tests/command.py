"""Run ``lucent`` and other programs as processes: redirected, piped, or in a pseudo-terminal.

Most are forked from one process that has the package imported; see ``tests/command_server.py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import URL

from sqlalchemy_lucent._environment import ENV_VARIABLES

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "sqlalchemy_lucent")

ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])")
_NOT_INHERITED = (
    *ENV_VARIABLES,
    "DATABASE_URL",
    "LUCENT_METADATA",
    "ALEMBIC_CONFIG",
    "NO_COLOR",
    "FORCE_COLOR",
)


class Done(NamedTuple):
    """What became of a run through pipes."""

    code: int
    out: str
    err: str


class Shown(NamedTuple):
    """What became of a run on a terminal."""

    code: int
    raw: str

    @property
    def text(self) -> str:
        """What is to be read, without colours and movements of the cursor."""
        return ESCAPE.sub("", self.raw).replace("\r\n", "\n")


def request_run(
    program: str,
    arguments: Sequence[str],
    directory: Path,
    environ: Mapping[str, str],
    streams: Sequence[int],
    *,
    terminal: bool = False,
) -> int:
    """Have a program run; return the descriptor from which its end can be read."""
    request = {
        "program": program,
        "arguments": arguments,
        "directory": str(directory),
        "environ": environ,
        "terminal": terminal,
    }
    code, told = os.pipe()
    socket.send_fds(server(), [json.dumps(request).encode()], [*streams, told])
    os.close(told)
    return code


@dataclass
class Lucent:
    """The command, in a directory, with a database and keys in its environment."""

    directory: Path
    url: URL | str | None = None
    keys: str | None = None

    def environ(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        environ = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        environ["PYTHONPATH"] = str(ROOT)
        environ.pop("COLUMNS", None)
        if self.url is not None:
            url = self.url
            environ["DATABASE_URL"] = (
                url if isinstance(url, str) else url.render_as_string(hide_password=False)
            )
        if self.keys is not None:
            environ["LUCENT_SECRETS_KEYS"] = self.keys
        return {**environ, **(more or {})}

    def __call__(
        self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> Done:
        """Run it with its streams redirected."""
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            given.write(stdin.encode())
            given.seek(0)
            streams = (given.fileno(), out.fileno(), err.fileno())
            code = exit_code(self._request(arguments, env, streams, terminal=False))
            out.seek(0)
            err.seek(0)
            return Done(code, out.read().decode(), err.read().decode())

    def _request(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None,
        streams: Sequence[int],
        *,
        terminal: bool,
    ) -> int:
        return request_run(
            "lucent", arguments, self.directory, self.environ(env), streams, terminal=terminal
        )

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start it as a program of its own, its three streams being pipes."""
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.directory,
            env=self.environ(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def on_terminal(
        self,
        *arguments: str,
        columns: int = 40,
        typed: Sequence[tuple[str, str]] = (),
        env: Mapping[str, str] | None = None,
    ) -> Shown:
        """Run it in a pseudo-terminal.

        :param typed: what to wait for, and what to type then; one after the other.
        """
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environ = {"TERM": "xterm-256color", **(env or {})}
        code = self._request(arguments, environ, (theirs, theirs, theirs), terminal=True)
        os.close(theirs)
        raw, waiting = b"", list(typed)
        try:
            while True:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
                raw += piece
                if waiting and waiting[0][0].encode() in raw:
                    os.write(ours, waiting.pop(0)[1].encode())
        finally:
            os.close(ours)  # it is told by SIGHUP, should it still be there
        done = exit_code(code)
        assert not waiting, f"{waiting[0][0]!r} was never shown, but\n{raw.decode()}"
        return Shown(done, raw.decode())


def exit_code(descriptor: int) -> int:
    """Wait for a run to end; return its exit code."""
    with open(descriptor, "rb") as told:
        _pid, code = told.read().split()
        return int(code)


class Forked:
    """A run that goes on meanwhile: what tests need of ``subprocess.Popen``."""

    def __init__(
        self, program: str, arguments: Sequence[str], environ: Mapping[str, str], directory: Path
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        given, stdin = os.pipe()
        stdout, out = os.pipe()
        streams = (given, out, self._errors.fileno())
        self._told = open(request_run(program, arguments, directory, environ, streams))  # noqa: SIM115
        os.close(given)
        os.close(out)
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.pid = int(self._told.readline())
        self.returncode: int | None = None
        self._output: tuple[str, str] | None = None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Return the exit code, or ``None`` while it runs."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Return the exit code once there is one."""
        if self.returncode is None:
            self.returncode = int(self._told.read())
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Return what it prints until it ends, and what it printed to stderr."""
        if self._output is None:
            watch = threading.Timer(timeout, self.kill)
            watch.start()
            self.stdin.close()
            output = self.stdout.read()
            self.wait()
            watch.cancel()
            self._errors.seek(0)
            self._output = output, self._errors.read()
            for stream in (self.stdout, self._errors, self._told):
                stream.close()
        return self._output


def script(program: str) -> str:
    """Return a shell script that runs a program as others here; it inherits :func:`server`."""
    client = ROOT / "tests" / "command_client.py"
    return f'#!/bin/sh\nexec {sys.executable} -IS {client} {server().fileno()} {program} "$@"\n'


@cache
def server() -> socket.socket:
    """Return the socket of the process that runs are forked from, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.run(
        [sys.executable, "-m", "tests.command_server", str(theirs.fileno())],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in _NOT_INHERITED},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        check=True,
    )
    theirs.close()
    return ours
