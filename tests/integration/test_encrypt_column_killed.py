"""An encryption by ``alembic upgrade``, and its downgrade, as processes that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Engine, Integer, MetaData, Table

from sqlalchemy_lucent import EncryptedJSON
from tests.conftest import KEY_1

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROWS = 3_000
VALUES = {n: {"n": n, "padding": "x" * 50} for n in range(ROWS)}

ENV = """
import os
from alembic import context
from sqlalchemy import create_engine, pool
import sqlalchemy_lucent.migrations

engine = create_engine(os.environ["DATABASE_URL"], poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()
"""

REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None

def upgrade():
    print("begun", flush=True)
    op.encrypt_column("users", "credentials", existing_type=sa.JSON(), batch_size=100)

def downgrade():
    print("begun", flush=True)
    op.decrypt_column("users", "credentials", existing_type=sa.JSON(), batch_size=100)
"""


def users(type_: Any) -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("credentials", type_, nullable=False),
    )


class Project:
    def __init__(self, folder: Path, engine: Engine) -> None:
        self.engine = engine
        self.folder = folder
        (folder / "versions").mkdir()
        (folder / "env.py").write_text(ENV)
        (folder / "versions" / "0001.py").write_text(REVISION)
        (folder / "alembic.ini").write_text("[alembic]\nscript_location = .\n")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environ = {
            **os.environ,
            "DATABASE_URL": self.engine.url.render_as_string(hide_password=False),
            "LUCENT_SECRETS_KEY": KEY_1.hex(),
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> float:
        """Run to the end; return the seconds from when the operation began."""
        process = self.start(*arguments)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return time.monotonic() - began

    def kill(self, seconds: float, *arguments: str) -> None:
        process = self.start(*arguments)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def state(self) -> tuple[str, bool]:
        """What the column holds, and whether there is a second one; nothing is ever lost."""
        columns = {c["name"]: c for c in sa.inspect(self.engine).get_columns("users")}
        assert columns.keys() - {"credentials__sealed"} == {"id", "credentials"}
        assert not columns["credentials"]["nullable"]
        sealed = isinstance(columns["credentials"]["type"], sa.types._Binary)
        table = users(EncryptedJSON() if sealed else sa.JSON())
        with self.engine.connect() as connection:
            rows = connection.execute(table.select()).all()
        assert {row.id: row.credentials for row in rows} == VALUES
        return "sealed" if sealed else "plain", "credentials__sealed" in columns

    def revision(self) -> str | None:
        with self.engine.connect() as connection:
            found: str | None = connection.scalar(
                sa.text("SELECT version_num FROM alembic_version")
            )
            return found


def test_killed_at_any_moment_nothing_is_lost_and_the_next_run_goes_on(
    engine: Engine, tmp_path: Path
) -> None:
    plain = users(sa.JSON())
    plain.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "credentials": value} for n, value in VALUES.items()]
        connection.execute(plain.insert(), rows)
    project = Project(tmp_path, engine)
    duration = {
        ("upgrade", "head"): project.run("upgrade", "head"),
        ("downgrade", "base"): project.run("downgrade", "base"),
    }
    assert project.state() == ("plain", False)
    moments = random.Random(engine.dialect.name)  # the machine adds its own chance

    half_way = 0
    for command, wanted, revision in (
        (("upgrade", "head"), "sealed", "0001"),
        (("downgrade", "base"), "plain", None),
    ):
        for _ in range(6):
            project.kill(moments.uniform(0, duration[command]), *command)
            half_way += project.state()[1]
        process = project.start(*command)
        process.communicate()
        assert process.returncode == 0
        assert project.state() == (wanted, False)
        assert project.revision() == revision
    assert half_way
