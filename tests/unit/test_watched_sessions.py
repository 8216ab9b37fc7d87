"""Whoever watches or changes the statements of a session gets those of the repository too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    Select,
    create_engine,
    event,
    false,
    inspect,
)
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker

from sqlalchemy_lucent import LucentBase, LucentSecret, LucentSecrets
from tests.secret_tables import KEY, OTHER

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


def with_the_execute_of_another(engine: Engine, seen: list[Executable]) -> Session:
    session = Session(engine)
    session.execute = with_a_listener(engine, seen).execute  # type: ignore[method-assign]
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
        with_the_execute_of_another,
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


def test_a_listener_of_all_sessions_sees_those_that_exist(engine: Engine) -> None:
    seen: list[Executable] = []

    def note(state: ORMExecuteState) -> None:
        seen.append(state.statement)

    with Session(engine) as session:
        secrets = LucentSecrets(session)
        secrets.get(KEY)
        event.listen(Session, "do_orm_execute", note)
        try:
            secrets.get(KEY)
        finally:
            event.remove(Session, "do_orm_execute", note)
        secrets.get(KEY)
    assert len(seen) == 1


def test_a_function_put_in_place_of_execute_is_called(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Executable] = []
    given = Session.execute

    def execute(self: Session, statement: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(statement)
        return given(self, statement, *args, **kwargs)

    monkeypatch.setattr(Session, "execute", execute)
    with Session(engine) as session:
        LucentSecrets(session).get(KEY)
    assert len(seen) == 1


def test_a_session_that_gives_no_connection_away_serves_the_repository(engine: Engine) -> None:
    class Closed(Session):
        def connection(self, *args: Any, **kwargs: Any) -> Connection:
            raise AssertionError("no one gets the connection of this session")

    with Closed(engine) as session:
        secrets = LucentSecrets(session)
        secrets.set(KEY, "t-1")
        assert secrets.require(KEY) == "t-1"

    with Session(engine) as plain:
        plain.connection = Closed().connection  # type: ignore[method-assign]
        assert LucentSecrets(plain).get(KEY) is None


def options_of_statements(engine: Engine) -> list[Any]:
    seen: list[Any] = []

    @event.listens_for(engine, "before_execute")
    def note(
        connection: Connection, statement: Executable, many: Any, one: Any, options: Any
    ) -> None:
        seen.append(options.get("mark"))

    return seen


@pytest.mark.skipif(not hasattr(Session, "execution_options"), reason="of SQLAlchemy 2.1")
def test_the_options_of_a_session_go_with_its_statements(engine: Engine) -> None:
    given: Any = {"execution_options": {"mark": "of the session"}}
    seen = options_of_statements(engine)
    with Session(engine, **given) as session:
        session.connection(execution_options={"mark": "of the connection"})
        LucentSecrets(session).get(KEY)
    assert seen == ["of the session"]


def test_the_options_of_the_connection_go_with_the_statements(engine: Engine) -> None:
    seen = options_of_statements(engine)
    with Session(engine) as session:
        session.connection(execution_options={"mark": "of the connection"})
        LucentSecrets(session).get(KEY)
    assert seen == ["of the connection"]


@pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_flush_postexec"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_handler_of_a_flush_uses_the_repository(engine: Engine, name: str, watched: bool) -> None:
    with Session(engine) as session:
        secrets = LucentSecrets(session, on_access=(lambda *_: None) if watched else None)
        secrets.set(OTHER, "t-2")
        found: list[Any] = []

        def use_the_repository(*_: Any) -> None:
            secrets.set(KEY, "t-1")
            found.append(secrets.require(KEY))

        event.listen(session, name, use_the_repository, once=True)
        row = session.get_one(LucentSecret, tuple(OTHER))
        row.updated_at = row.created_at
        session.flush()
        assert found == ["t-1"]
        session.commit()
        assert secrets.require(KEY) == "t-1"
        assert not inspect(row).modified
