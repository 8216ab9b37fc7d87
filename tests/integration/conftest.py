"""Fixtures of the tests of scoped secrets. A file with tables of its own has its own session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import LucentBase


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session over an engine with the tables of :class:`LucentBase`."""
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
