"""Conversions and rebindings by ``alembic upgrade`` and ``downgrade`` that are killed.

The rotation is killed in ``test_alembic_environment.py``.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Engine, Integer, MetaData, Table

from sqlalchemy_lucent import EncryptedJSON, TamperedError
from tests.command import exit_code, request_run
from tests.conftest import KEY_1, LONG

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
ROWS = 3_000 if LONG else 1_000
KILLS = 50 if LONG else 2
VALUES = {n: {"n": n, "padding": "x" * 50} for n in range(ROWS)}

ENV = """
import logging
import os
import sys
print("pid", os.getpid(), flush=True)
from alembic import context
from sqlalchemy import create_engine, pool
import sqlalchemy_lucent.migrations

logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
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
    {upgrade}

def downgrade():
    print("begun", flush=True)
    {downgrade}
"""


class Run:
    """`alembic` as a process of its own, all of whose output is read here."""

    def __init__(self, folder: Path, environ: Mapping[str, str], arguments: Sequence[str]) -> None:
        reading, writing = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        streams = (nothing, writing, writing)
        self._code = request_run("alembic", arguments, folder, environ, streams)
        os.close(nothing)
        os.close(writing)
        self.output = os.fdopen(reading, encoding="utf-8")
        word, _, number = self.output.readline().partition(" ")
        assert word == "pid", word + self.output.read()
        self._pid = int(number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self._pid, signal.SIGKILL)
        self.end()

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit code, and what it still had to say."""
        with self.output:
            rest = self.output.read()
        return exit_code(self._code), rest


def is_said(line: str) -> bool:
    """Whether a line is of the operation: when it begins, and after each batch."""
    return line == "begun\n" or line.endswith(" so far\n")


OLD_CONTEXT, CONTEXT = "users.creds", "users.credentials"
COMMANDS = (("upgrade", "head"), ("downgrade", "base"))


def users(type_: Any) -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("credentials", type_, nullable=False),
    )


class Project:
    """An environment with one revision, which is run up and down once, to time its parts."""

    def __init__(self, folder: Path, engine: Engine, operations: Sequence[str]) -> None:
        self.engine = engine
        self.folder = folder
        upgrade, downgrade = operations
        (folder / "versions").mkdir()
        (folder / "env.py").write_text(ENV)
        (folder / "versions" / "0001.py").write_text(
            REVISION.format(upgrade=upgrade, downgrade=downgrade)
        )
        (folder / "alembic.ini").write_text("[alembic]\nscript_location = .\n")
        self._moments = {command: self.run(*command) for command in COMMANDS}
        self._random = random.Random(engine.dialect.name)  # the machine adds its own chance

    def start(self, *arguments: str) -> Run:
        environ = {
            **os.environ,
            "DATABASE_URL": self.engine.url.render_as_string(hide_password=False),
            "LUCENT_SECRETS_KEY": KEY_1.hex(),
            "PYTHONPATH": str(ROOT),
        }
        return Run(self.folder, environ, arguments)

    def run(self, *arguments: str) -> list[float]:
        """Run to the end; return the seconds at which each line was said, and at which it ended."""
        process = self.start(*arguments)
        moments = [time.monotonic() for line in process.output if is_said(line)]
        assert process.end() == (0, "")
        moments.append(time.monotonic())
        return [moment - moments[0] for moment in moments]

    def kill(self, command: tuple[str, str], *, half_way: bool) -> None:
        """Run, and end it by SIGKILL: half-way through its batches, or at any moment.

        A moment is so long after so many lines, because the machine is not always as fast.
        """
        moments = self._moments[command]
        lines, seconds = len(moments) // 2, 0.0
        if not half_way:
            moment = self._random.uniform(0, moments[-1])
            lines = bisect_right(moments, moment)
            seconds = moment - moments[lines - 1]
        process = self.start(*command)
        said = (line for line in process.output if is_said(line))
        for _ in itertools.islice(said, lines):
            pass
        time.sleep(seconds)
        process.kill()

    def finish(self, *arguments: str) -> None:
        """Run once more: the work ends, and the revision is stamped."""
        code, output = self.start(*arguments).end()
        assert code == 0, output
        assert self.revision() == ("0001" if arguments[0] == "upgrade" else None)

    def revision(self) -> str | None:
        with self.engine.connect() as connection:
            found: str | None = connection.scalar(
                sa.text("SELECT version_num FROM alembic_version")
            )
            return found


def store(engine: Engine, table: Table) -> None:
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"id": n, "credentials": value} for n, value in VALUES.items()]
        connection.execute(table.insert(), rows)


def state(engine: Engine) -> tuple[str, bool]:
    """What the column holds, and whether there is a second one; nothing is ever lost."""
    columns = {c["name"]: c for c in sa.inspect(engine).get_columns("users")}
    assert columns.keys() - {"credentials__sealed"} == {"id", "credentials"}
    assert not columns["credentials"]["nullable"]
    sealed = isinstance(columns["credentials"]["type"], sa.types._Binary)
    table = users(EncryptedJSON() if sealed else sa.JSON())
    with engine.connect() as connection:
        rows = connection.execute(table.select()).all()
    assert {row.id: row.credentials for row in rows} == VALUES
    return "sealed" if sealed else "plain", "credentials__sealed" in columns


def test_a_conversion_killed_at_any_moment_loses_nothing_and_the_next_run_goes_on(
    engine: Engine, tmp_path: Path
) -> None:
    store(engine, users(sa.JSON()))
    rest = '("users", "credentials", existing_type=sa.JSON(), batch_size=100)'
    project = Project(tmp_path, engine, [f"op.encrypt_column{rest}", f"op.decrypt_column{rest}"])
    assert state(engine) == ("plain", False)

    half_way = 0
    for command, wanted in zip(COMMANDS, ("sealed", "plain"), strict=True):
        for number in range(KILLS):
            project.kill(command, half_way=number == 0)
            half_way += state(engine)[1]
        project.finish(*command)
        assert state(engine) == (wanted, False)
    assert half_way


def in_context(engine: Engine, context: str) -> int:
    """How many values open in `context`; every one of them opens in one of the two."""
    both = users(EncryptedJSON(context=CONTEXT, accept_contexts=[OLD_CONTEXT]))
    with engine.connect() as connection:
        rows = connection.execute(both.select()).all()
        assert {row.id: row.credentials for row in rows} == VALUES
        raw = sa.type_coerce(both.c.credentials, sa.LargeBinary)
        stored = connection.scalars(sa.select(raw)).all()
    codec = EncryptedJSON(context=context).column_codec(engine.dialect)
    return sum(opens(codec, value) for value in stored)


def opens(codec: Any, value: bytes) -> bool:
    try:
        codec.open(value)
    except TamperedError:
        return False
    return True


def test_a_rebinding_killed_at_any_moment_loses_nothing_and_the_next_run_goes_on(
    engine: Engine, tmp_path: Path
) -> None:
    store(engine, users(EncryptedJSON(context=OLD_CONTEXT)))
    operations = [
        f'op.rebind_encrypted_column("users", "credentials", from_context="{a}", context="{b}", '
        "batch_size=100)"
        for a, b in ((OLD_CONTEXT, CONTEXT), (CONTEXT, OLD_CONTEXT))
    ]
    project = Project(tmp_path, engine, operations)
    assert in_context(engine, OLD_CONTEXT) == ROWS

    half_way = 0
    for command, wanted in zip(COMMANDS, (CONTEXT, OLD_CONTEXT), strict=True):
        for number in range(KILLS):
            project.kill(command, half_way=number == 0)
            half_way += 0 < in_context(engine, wanted) < ROWS
        project.finish(*command)
        assert in_context(engine, wanted) == ROWS
    assert half_way
