"""A database of this process's own to measure on, and in the same state before each turn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Engine, text

from tests.databases import own_database


@contextmanager
def bench_database(kind: str) -> Iterator[URL]:
    """Give the URL of an empty database: as in the tests, but dropped with its directory."""
    with (
        tempfile.TemporaryDirectory(prefix="lucent-bench-") as directory,
        own_database(kind, Path(directory), "lucent_bench") as url,
    ):
        yield url


def tidy_up(engine: Engine) -> None:
    """Have PostgreSQL do now what it would do at a moment of its own.

    Who reads a table after its rows were changed marks each old version as dead, cleans its pages
    and writes them: without this, a turn would pay for the one before it.
    """
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
            connection.execute(text("CHECKPOINT"))
