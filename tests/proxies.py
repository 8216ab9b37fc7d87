"""What stands between a program and its database: a proxy that cuts connections, and poolers."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from sqlalchemy import URL

from tests.servers import free_port, private_directory, program, running


class Proxy:
    """Passes on what a server and its clients say, and cuts where it is told to.

    :param url: leads to the server.
    :param idle: seconds after which a connection is cut that nobody says anything on.
    """

    def __init__(self, url: URL, *, idle: float | None = None) -> None:
        self._server = (url.host or "127.0.0.1", url.port or 0)
        self._idle = idle
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.url = url.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.connections = 0
        self.answers: Counter[int] = Counter()
        """What the server said so far, by the number of the connection, from 1."""
        self.cuts: set[tuple[int, int]] = set()
        """The answers not to pass on but to cut the connection at, by connection and number."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()

    def begin(self, cuts: set[tuple[int, int]]) -> None:
        """Count from 1 again, and cut there."""
        self.connections = 0
        self.answers.clear()
        self.cuts = cuts

    def cut_all(self) -> None:
        """Cut every connection."""
        for each in list(self._open):
            _cut(each)

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self.connections += 1
            self._open |= {client, server}
            for each in (client, server):
                each.settimeout(self._idle)
            for pair in ((client, server, 0), (server, client, self.connections)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, number: int) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if number:
                    self.answers[number] += 1
                    if (number, self.answers[number]) in self.cuts:
                        break
                sink.sendall(data)
        self._open -= {source, sink}
        for each in (source, sink):
            _cut(each)


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        # At once, and so that who writes to it is told.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def pgbouncer(url: URL, *, mode: str = "transaction", servers: int = 4) -> Iterator[URL]:
    """Put a PgBouncer before a database, with so many connections to it; give its URL."""
    bouncer = program("pgbouncer")
    with private_directory() as directory:
        port = free_port()
        settings = directory / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={url.host} port={url.port} user={url.username}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
            f"unix_socket_dir =\npool_mode = {mode}\n"
            # Who comes next gets the server that has waited longest: not the one of before.
            f"server_round_robin = 1\ndefault_pool_size = {servers}\nmin_pool_size = {servers}\n"
            f"ignore_startup_parameters = extra_float_digits\n"
        )
        with running([bouncer, settings], port, directory):
            yield url.set(host="127.0.0.1", port=port)


@contextmanager
def haproxy(url: URL, *, idle: float) -> Iterator[URL]:
    """Put a HAProxy before a server that cuts idle connections; give its URL."""
    balancer = program("haproxy")
    with private_directory() as directory:
        port = free_port()
        settings = directory / "haproxy.cfg"
        milliseconds = round(idle * 1000)
        settings.write_text(
            f"defaults\n mode tcp\n timeout connect 5s\n"
            f" timeout client {milliseconds}ms\n timeout server {milliseconds}ms\n"
            f"listen database\n bind 127.0.0.1:{port}\n server one {url.host}:{url.port}\n"
        )
        with running([balancer, "-db", "-f", settings], port, directory):
            yield url.set(host="127.0.0.1", port=port)
