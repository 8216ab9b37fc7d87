"""What takes an engine refuses everything else, and says what takes an async one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_lucent import ConfigurationError, KeyRegistry, Renewals, purge


@pytest.mark.parametrize(
    "take, sentence",
    [
        (purge, "purge() takes an Engine, not {}; apurge() takes it"),
        (Renewals, "Renewals takes an Engine, not {}; AsyncRenewals takes it"),
        (KeyRegistry, "a key registry takes an Engine, not {}; AsyncKeyRegistry takes it"),
    ],
)
def test_what_is_no_engine_is_refused(take: Callable[[Any], object], sentence: str) -> None:
    engine = create_async_engine("postgresql+psycopg://")
    bare = sentence.partition(";")[0]
    for given, expected in ((engine, sentence), (engine.connect(), bare), ("postgresql://", bare)):
        with pytest.raises(ConfigurationError) as raised:
            take(given)
        assert str(raised.value) == expected.format(type(given).__name__)
