"""Binds and options that are none: each is refused by an error of this package, or a TypeError of
Python that names the argument.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_lucent import (
    ConfigurationError,
    KeyRegistry,
    RotationError,
    arotate,
    retire_check,
    rotate,
    status,
    verify,
)
from tests.registries import create, rotated
from tests.registries import documents as table

asked: Any = arotate  # with arguments that its types refuse


@pytest.fixture
def bind(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/test.db")
    create(engine, rows=0)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("function", [rotate, status, verify])
def test_the_engine_below_an_async_one_is_refused(function: Callable[..., Any]) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(RotationError, match=r"an async one.*such as arotate\(\)"):
        function(engine.sync_engine, table)
    with pytest.raises(RotationError, match="an async one"):
        KeyRegistry(engine.sync_engine, targets=table).check()


def test_a_connection_that_was_detached_is_refused(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        table.create(connection)
        connection.commit()
        connection.detach()
        with pytest.raises(RotationError, match="the connection is detached from its pool"):
            rotate(connection, table)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.detach()
        assert rotate(connection, table).ok


@pytest.mark.parametrize("exclude", [None, 5, [[]], [5], b"view"], ids=str)
def test_names_that_are_none_are_refused(bind: sa.Engine, exclude: Any) -> None:
    with pytest.raises(RotationError, match="exclude is a name, or several in a list"):
        retire_check(bind, "v1", table, exclude=exclude)
    with pytest.raises(RotationError, match="exclude is a name, or several in a list"):
        rotated(bind).retire("v1", exclude=exclude)


@pytest.mark.parametrize("seconds", [1e300, -1, None, "1", True, float("nan"), 10**400], ids=repr)
def test_a_wait_that_no_clock_can_wait_is_refused(bind: sa.Engine, seconds: Any) -> None:
    with pytest.raises(RotationError, match="settle is a number of seconds"):
        retire_check(bind, "v1", table, settle=seconds)
    with pytest.raises(RotationError, match="pause is a number of seconds"):
        rotate(bind, table, pause=seconds)
    registry = KeyRegistry(bind, targets=table)
    with pytest.raises(ConfigurationError, match="interval= is a number of seconds"):
        registry.announce("web", interval=seconds)
    with pytest.raises(ConfigurationError, match="quiet= is a number of seconds"):
        registry.readiness("v1", quiet=seconds)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: asked(), "missing a required argument: 'bind'"),
        (lambda: asked(bind=None), "'bind'"),
        (lambda: asked(None, table, nonsense=1), "unexpected keyword argument 'nonsense'"),
    ],
)
def test_what_an_async_function_lacks_is_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        asyncio.run(call())
