"""SQLModel puts values into an object's dict, past SQLAlchemy's events: no edit is lost."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, StaticPool, create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import registry
from sqlmodel import Field, Session, SQLModel, col

from sqlalchemy_lucent import EncryptedJSON


class Root(SQLModel, registry=registry()):
    pass


class Hero(Root, table=True):
    id: int | None = Field(default=None, primary_key=True)
    creds: dict[str, Any] = Field(sa_type=EncryptedJSON.mutable())
    made: dict[str, Any] = Field(
        default_factory=lambda: {"t": {}}, sa_column=Column(EncryptedJSON.mutable())
    )
    plain: Any = Field(default=None, sa_type=EncryptedJSON)


def creds() -> dict[str, Any]:
    return {"t": {"v": 1, "list": [1]}}


@pytest.fixture(params=[True, False], ids=["expiring", "not expiring"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    # No database has a part in this; a session over async drivers is tried on each, below.
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Root.metadata.create_all(engine)
    with Session(engine, expire_on_commit=request.param) as session:
        yield session
    engine.dispose()


def constructed(session: Session) -> Hero:
    return Hero(id=1, creds=creds())


def validated(session: Session) -> Hero:
    return Hero.model_validate({"id": 1, "creds": creds()})


def added(session: Session) -> Hero:
    hero = constructed(session)
    session.add(hero)
    return hero


def flushed(session: Session) -> Hero:
    hero = added(session)
    session.flush()
    return hero


def committed(session: Session) -> Hero:
    hero = added(session)
    session.commit()
    return hero


def refreshed(session: Session) -> Hero:
    hero = committed(session)
    session.refresh(hero)
    return hero


def set_again(session: Session) -> Hero:
    hero = committed(session)
    hero.creds = creds()
    return hero


def set_again_and_flushed(session: Session) -> Hero:
    hero = committed(session)
    hero.creds = {"t": {"v": 0, "list": [1]}}
    session.flush()
    return hero


def set_again_and_committed(session: Session) -> Hero:
    hero = set_again_and_flushed(session)
    session.commit()
    return hero


def updated(session: Session) -> Hero:
    hero = committed(session)
    hero.sqlmodel_update({"creds": {"t": {"v": 0, "list": [1]}}})
    session.add(hero)
    session.flush()
    return hero


def merged(session: Session) -> Hero:
    committed(session)
    return session.merge(constructed(session))


def merged_without_loading(session: Session) -> Hero:
    hero = refreshed(session)
    session.expunge(hero)
    return session.merge(hero, load=False)


def selected(session: Session) -> Hero:
    committed(session)
    session.expunge_all()
    return session.scalars(select(Hero)).one()


def populated(session: Session) -> Hero:
    hero = committed(session)
    hero.creds["t"]["v"] = "lost"
    with session.no_autoflush:
        session.scalars(select(Hero), execution_options={"populate_existing": True}).one()
    return hero


def pickled(session: Session) -> Hero:
    hero: Hero = pickle.loads(pickle.dumps(constructed(session)))
    session.add(hero)
    session.flush()
    return hero


def pickled_when_loaded(session: Session) -> Hero:
    hero = refreshed(session)
    session.expunge(hero)
    restored: Hero = pickle.loads(pickle.dumps(hero))
    session.add(restored)
    return restored


def rolled_back(session: Session) -> Hero:
    hero = flushed(session)
    with session.begin_nested() as savepoint:
        hero.creds["t"]["v"] = "lost"
        session.flush()
        savepoint.rollback()
    return hero


def set_and_rolled_back(session: Session) -> Hero:
    hero = flushed(session)
    with session.begin_nested() as savepoint:
        hero.creds = {}
        savepoint.rollback()
    return hero


STATES: list[Callable[[Session], Hero]] = [
    constructed, validated, added, flushed, committed, refreshed, set_again, set_again_and_flushed,
    set_again_and_committed, updated, merged, merged_without_loading, selected, populated, pickled,
    pickled_when_loaded, rolled_back, set_and_rolled_back,
]  # fmt: skip


def stored(session: Session, name: str = "creds") -> Any:
    """What a new session reads."""
    with Session(session.get_bind()) as another:
        return another.scalar(select(getattr(Hero, name)))


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_an_edit_is_written_whatever_the_object_went_through(
    session: Session, state: Callable[[Session], Hero]
) -> None:
    hero = state(session)
    for step in (2, 3):
        hero.creds["t"]["v"] = step
        hero.creds["t"]["list"].append(step)
        hero.made["t"]["n"] = step
        session.add(hero)
        session.commit()
        assert stored(session) == {"t": {"v": step, "list": [1, *range(2, step + 1)]}}
        assert stored(session, "made") == {"t": {"n": step}}
    hero.creds["t"]["v"] = 4
    session.flush()
    hero.creds["t"]["v"] = 5
    session.commit()
    assert stored(session)["t"]["v"] == 5


def test_a_value_that_is_set_in_two_objects_is_two_values_once_they_are_written(
    session: Session,
) -> None:
    shared = creds()
    heroes = [Hero(id=number, creds=shared) for number in (1, 2)]
    session.add_all(heroes)
    session.flush()
    heroes[0].creds["t"]["v"] = "first"
    session.commit()
    assert [hero.creds["t"]["v"] for hero in heroes] == ["first", 1]


def test_reading_and_setting_the_same_writes_nothing(session: Session) -> None:
    hero = refreshed(session)
    hero.plain = {"on": True}
    session.commit()
    statements: list[str] = []
    event.listen(session.get_bind(), "before_cursor_execute", lambda *a: statements.append(a[2]))
    hero.creds["t"].get("v")
    hero.creds = creds()
    session.commit()
    assert not [statement for statement in statements if statement.startswith("UPDATE")]
    hero.plain = {"on": 1}
    session.commit()
    assert repr(stored(session, "plain")["on"]) == "1"


def test_edits_are_written_over_async_sessions(run_async: Callable[..., Any]) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Root.metadata.create_all)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            hero = Hero(id=1, creds=creds())
            session.add(hero)
            await session.commit()
            hero.creds["t"]["v"] = 2
            await session.commit()
            read = (await session.scalars(select(col(Hero.creds)))).one()
            assert read["t"]["v"] == 2

    run_async(work)
