"""Start programs often at the cost of once: imported once, forked for each run.

``lucent``, ``alembic``, and the scripts of ``tests/integration/workers``.

Each run is a process of its own, with its own streams, directory, environment and terminal. The
tests of what others see of a process (its arguments, its exit by a signal) start it themselves.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import termios
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import alembic.config

# Imported here, they need not be in each run.
import sqlalchemy.ext.asyncio  # noqa: F401

import sqlalchemy_lucent.migrations  # noqa: F401
from sqlalchemy_lucent import cli
from sqlalchemy_lucent._cli import run  # noqa: F401
from tests import registries  # noqa: F401
from tests.integration import workers  # noqa: F401

# What a run imports when it needs it, where there is such a module.
for name in (
    "logging.config",
    "psycopg",
    "pymysql",
    "pydantic",
    "sqlalchemy.dialects.mysql.pymysql",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
    "typer._adapters",
    "typer._click.decorators",
):
    with suppress(ImportError):
        importlib.import_module(name)

STREAMS = 3


def run_alembic(arguments: Sequence[str]) -> int:
    sys.path.insert(0, os.getcwd())  # as `python -m` does  # noqa: PTH109
    alembic.config.main(arguments, prog="alembic")
    return 0


def run_worker(arguments: Sequence[str]) -> int:
    sys.argv = list(arguments)
    runpy.run_module(f"tests.integration.workers.{arguments[0]}", run_name="__main__")
    return 0


PROGRAMS = {"lucent": cli.main, "alembic": run_alembic, "worker": run_worker}


def serve(channel: socket.socket) -> None:
    """Fork a run for each request, until nobody is there to make one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are nobody's business
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, STREAMS + 1)
        if not message:
            return
        if os.fork() == 0:
            channel.close()
            supervise(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def supervise(request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Fork the run itself; tell its process number, and its exit code once it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = descriptors
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os._exit(run_command(request, streams))
    os.write(told, f"{pid}\n".encode())
    for descriptor in streams:
        os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run_command(request: dict[str, Any], streams: Sequence[int]) -> int:
    """Run the command as a process that was just started would; return its exit code."""
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environ"])
    random.seed()  # or each run would draw the same numbers
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    lines = 1 if "PYTHONUNBUFFERED" in os.environ else -1
    sys.stdout = open(1, "w", lines, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = PROGRAMS[request["program"]](request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # ready: whoever waits may ask
    serve(socket.socket(fileno=int(sys.argv[1])))
