"""Start the service on a SQLite database in a temporary folder, under a key made for it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import tempfile
from pathlib import Path

import uvicorn

from sqlalchemy_lucent import Keyring, generate_master_key

from .app import Settings, create_app

HOST = "127.0.0.1"
"""Not reachable from other machines: the pages have no log-in."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="webapp", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port")
    parser.add_argument("--rows", type=int, default=10_000, help="integrations to begin with")
    parser.add_argument("--max-rate", type=int, default=1_000, help="rows per second in a rotation")
    options = parser.parse_args()

    try:
        listener = socket.create_server((HOST, options.port))
    except (OSError, OverflowError) as error:
        sys.exit(
            f"cannot listen on port {options.port}: {error}. Choose another with --port, as in "
            'make demo-web DEMO_ARGS="--port 8001"'
        )

    with listener, tempfile.TemporaryDirectory(prefix="lucent-demo-") as folder:
        # The database is deleted with the process, so the key may be made here. If data is to stay,
        # take the key from the environment: Keyring.from_env(), which is also the default.
        settings = Settings(
            database=f"sqlite:///{Path(folder) / 'demo.db'}",
            keyring=Keyring({"v1": generate_master_key()}),
            rows=options.rows,
            max_rate=options.max_rate,
        )
        print(f"http://{HOST}:{listener.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(create_app(settings), log_level="warning")
        # uvicorn shuts down cleanly and then raises the signal again. As an exception, the signal
        # leaves time to delete the folder.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
