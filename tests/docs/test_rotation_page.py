"""Run the script of ``docs/rotation.md`` whose workers share a rotation, on PostgreSQL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, text

from sqlalchemy_lucent import EncryptedJSON, status
from sqlalchemy_lucent._environment import ENV_KEYS, ENV_VARIABLES
from tests.conftest import Databases
from tests.databases import drop_everything
from tests.integration.workers import keys

from .pages import ROOT, blocks
from .shell import Terminal

PAGE = ROOT / "docs" / "rotation.md"
ROWS = 2500

# Notes which connection writes.
TRIGGER = """
CREATE TABLE writers (pid int);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO writers VALUES (pg_backend_pid()); RETURN NEW; END $$;
CREATE TRIGGER note AFTER UPDATE ON integrations FOR EACH ROW EXECUTE FUNCTION note();
"""


@pytest.mark.slow
def test_the_workers_of_the_script_do_the_work_once(databases: Databases, tmp_path: Path) -> None:
    files = [block.file for block in blocks(PAGE) if block.file is not None]
    ((name, script),) = files
    (tmp_path / name).write_text(script)
    (command,) = [b.text for b in blocks(PAGE) if b.info == "console" and name in b.text]

    table = Table(
        "integrations",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("credentials", EncryptedJSON),
    )
    url = databases.url("postgresql")
    engine = create_engine(url)
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"credentials": {"n": n}} for n in range(ROWS)])
        connection.execute(text(TRIGGER))
    environ = {name: value for name, value in os.environ.items() if name not in ENV_VARIABLES}
    environ[ENV_KEYS] = keys("v2")
    environ["DATABASE_URL"] = url.render_as_string(hide_password=False)
    try:
        assert Terminal(tmp_path, tmp_path / "state", environ).run(command) == 1
        rows = [(row.key_version, row.count) for row in status(engine, table).rows]
        assert rows == [("v2", ROWS)]
        with engine.connect() as connection:
            counted = text("SELECT count(DISTINCT pid), count(*) FROM writers")
            writers, updates = connection.execute(counted).one()
            # Each of the two processes may read ahead on a second connection.
            assert (0 < writers <= 4, updates) == (True, ROWS)
    finally:
        drop_everything(engine)
        with engine.begin() as connection:
            connection.execute(text("DROP FUNCTION IF EXISTS note"))
        engine.dispose()
