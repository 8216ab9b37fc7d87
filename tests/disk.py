"""What tests share that search the files of a database."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection


def run(engine: Engine, *statements: str) -> None:
    """Execute statements outside of transactions."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def sqlite_engine(directory: Path, **pragmas: str) -> Engine:
    """Return an engine over ``app.db``, each of whose connections has `pragmas`."""
    engine = create_engine(f"sqlite:///{directory}/app.db")

    @event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _: object) -> None:
        cursor = connection.cursor()
        for name, value in pragmas.items():
            cursor.execute(f"PRAGMA {name} = {value}")
        cursor.close()

    return engine


def data_directory(engine: Engine, statement: str) -> Path:
    """Return the server's folder, if it is on this machine and may be read."""
    with engine.connect() as connection:
        folder = Path(str(connection.scalar(text(statement))))
    if not os.access(folder, os.R_OK | os.X_OK):
        pytest.skip(f"{folder}, where the server keeps its data, cannot be read from here")
    return folder
