"""Whoever watches or changes the statements of a session gets those of the repository too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, Executable, Select, create_engine, event, false
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker

from sqlalchemy_lucent import LucentBase, LucentSecrets
from tests.secret_tables import KEY

Watch = Callable[[Engine, list[Executable]], Session]


def with_a_listener(engine: Engine, seen: list[Executable]) -> Session:
    session = Session(engine)
    event.listen(session, "do_orm_execute", lambda state: seen.append(state.statement))
    return session


def with_a_listener_of_its_class(engine: Engine, seen: list[Executable]) -> Session:
    factory = sessionmaker(engine)

    @event.listens_for(factory, "do_orm_execute")
    def note(state: ORMExecuteState) -> None:
        seen.append(state.statement)

    return factory()


def with_its_own_execute(engine: Engine, seen: list[Executable]) -> Session:
    class Watching(Session):
        def execute(self, statement: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(statement)
            return super().execute(statement, *args, **kwargs)

    return Watching(engine)


def with_a_replaced_execute(engine: Engine, seen: list[Executable]) -> Session:
    session = Session(engine)
    given: Any = session.execute

    def execute(statement: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(statement)
        return given(statement, *args, **kwargs)

    session.execute = execute  # type: ignore[method-assign]
    return session


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://")
    LucentBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    "watch",
    [
        with_a_listener,
        with_a_listener_of_its_class,
        with_its_own_execute,
        with_a_replaced_execute,
    ],
)
def test_every_statement_is_seen(engine: Engine, watch: Watch) -> None:
    seen: list[Executable] = []
    with watch(engine, seen) as session:
        secrets = LucentSecrets(session)
        for do in (
            lambda: secrets.set(KEY, "t-1"),
            lambda: secrets.require(KEY),
            lambda: secrets.get_many([KEY]),
            lambda: secrets.list(),
            lambda: secrets.delete(KEY),
        ):
            before = len(seen)
            do()
            assert len(seen) == before + 1


def test_a_listener_decides_what_a_read_returns(engine: Engine) -> None:
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        secrets.set(KEY, "t-1")

        @event.listens_for(session, "do_orm_execute")
        def hide_rows(state: ORMExecuteState) -> None:
            if isinstance(state.statement, Select):
                state.statement = state.statement.where(false())

        assert secrets.get(KEY) is None
