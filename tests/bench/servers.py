"""A database of this process's own to measure on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL

from tests.databases import own_database


@contextmanager
def bench_database(kind: str) -> Iterator[URL]:
    """Give the URL of an empty database: as in the tests, but dropped with its directory."""
    with (
        tempfile.TemporaryDirectory(prefix="lucent-bench-") as directory,
        own_database(kind, Path(directory)) as url,
    ):
        yield url
