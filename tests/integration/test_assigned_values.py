"""A value that is set in the place of another is written if the two differ in a bit."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import pytest
from sqlalchemy import JSON, Engine, String, event, null, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import EncryptedJSON, SerializationError, row_bound


@dataclasses.dataclass
class Account:
    user: str
    rate: float = 1
    secret: str = dataclasses.field(default="", compare=False, repr=False)
    tokens: list[str] = dataclasses.field(default_factory=list)


class Settings(TypedDict):
    on: Any


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows"
    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    plain: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    unredacted: Mapped[Any] = mapped_column(EncryptedJSON(redact=False))
    mutable: Mapped[Any] = mapped_column(EncryptedJSON.mutable())
    dictionary: Mapped[Any] = mapped_column(MutableDict.as_mutable(EncryptedJSON()), nullable=True)
    settings: Mapped[Any] = mapped_column(EncryptedJSON(schema=Settings), nullable=True)
    account: Mapped[Any] = mapped_column(EncryptedJSON(schema=Account), nullable=True)
    lazy: Mapped[Any] = mapped_column(EncryptedJSON(lazy=True), nullable=True)
    bound: Mapped[Any] = row_bound("id", nullable=True)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def stored(session: Session, name: str) -> Any:
    """What a new session reads."""
    with Session(session.get_bind()) as another:
        value = getattr(another.scalars(select(Row)).one(), name)
        return value.open() if name == "lazy" else value


def updates(session: Session) -> list[str]:
    statements: list[str] = []

    @event.listens_for(session.get_bind(), "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE"):
            statements.append(statement)

    return statements


DIFFERENT: list[tuple[Any, Any]] = [
    (True, 1), (1, 1.0), (0, False), (0.0, -0.0), (None, False), ("1", 1), ([], {}),
    ([1, [True]], [1, [1]]), ({"a": {"b": [0]}}, {"a": {"b": [False]}}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (2**70, float(2**70)),
]  # fmt: skip
ATTRIBUTES = ("plain", "unredacted", "mutable", "dictionary", "settings", "lazy", "bound")


@pytest.mark.parametrize("old, new", DIFFERENT)
def test_a_value_that_is_equal_in_python_only_is_written(
    session: Session, old: Any, new: Any
) -> None:
    for before, after in ((old, new), (new, old)):
        session.add(Row(id="x", **{name: {"on": before} for name in ATTRIBUTES}))
        session.commit()
        for name in ATTRIBUTES:
            row = session.scalars(select(Row)).one()
            getattr(row, name)
            setattr(row, name, {"on": after})
            session.commit()
            assert json.dumps(stored(session, name)) == json.dumps({"on": after})
        session.delete(session.scalars(select(Row)).one())
        session.commit()


@pytest.mark.parametrize("old, new", [(True, 1), (1, 1.0), (0.0, -0.0), ("a", 1), (None, 0)])
def test_a_document_that_is_no_container_is_written(session: Session, old: Any, new: Any) -> None:
    names = ("plain", "unredacted", "mutable", "lazy", "bound")
    session.add(Row(id="x", **dict.fromkeys(names, old)))
    session.commit()
    row = session.scalars(select(Row)).one()
    for name in names:
        getattr(row, name)
        setattr(row, name, new)
    session.commit()
    for name in names:
        assert repr(stored(session, name)) == repr(new)


def test_an_attribute_that_was_set_is_plain_until_it_is_loaded(session: Session) -> None:
    row = Row(id="x", unredacted=0, plain={"on": 1}, mutable={"on": 1}, lazy={"on": 1})
    session.add(row)
    session.flush()
    assert row.lazy == {"on": 1}
    assert repr(row.plain) == "{'on': 1}"
    assert "on" not in repr(row.mutable)
    session.refresh(row)
    assert row.lazy.open() == {"on": 1}
    assert "on" not in repr(row.plain)


def test_an_equal_document_is_not_written_again(session: Session) -> None:
    document = {"a": [1, {"b": -0.0, "c": 2**70}], "d": "text"}
    names = ("plain", "unredacted", "mutable", "dictionary")
    session.add(Row(id="x", **dict.fromkeys(names, document)))
    session.commit()
    seen = updates(session)
    row = session.scalars(select(Row)).one()
    for name in names:
        getattr(row, name)
        setattr(row, name, copy.deepcopy(document))
    row.mutable = row.mutable
    assert not session.is_modified(row)
    session.merge(Row(id="x", **{name: copy.deepcopy(document) for name in names}))
    session.commit()
    assert seen == []


@pytest.mark.parametrize("name", ["plain", "unredacted", "dictionary", "settings", "bound"])
@pytest.mark.parametrize("assign", [lambda value: value, dict, copy.copy])
def test_a_value_that_was_edited_in_place_and_set_is_written(
    session: Session, name: str, assign: Callable[[Any], Any]
) -> None:
    session.add(Row(id="x", plain=0, unredacted=0, mutable=0))
    row = session.scalars(select(Row)).one()
    setattr(row, name, {"on": {"tokens": ["t-1"]}})
    session.commit()
    value = getattr(row, name)
    value["on"]["tokens"].append("t-2")
    setattr(row, name, assign(value))
    session.commit()
    assert stored(session, name) == {"on": {"tokens": ["t-1", "t-2"]}}


@pytest.mark.parametrize(
    "edit",
    [
        lambda account: [account.__dict__.update(secret="s-2"), account][1],
        lambda account: dataclasses.replace(account, secret="s-2"),
        lambda account: dataclasses.replace(account, rate=True),
        lambda account: [account.tokens.append("t-2"), dataclasses.replace(account)][1],
        lambda account: [account.tokens.append("t-2"), account][1],
    ],
)
def test_a_typed_value_that_is_set_is_written(session: Session, edit: Callable[..., Any]) -> None:
    session.add(Row(id="x", plain=0, unredacted=0, mutable=0, account=Account("u", 1, "s-1")))
    session.commit()
    row = session.scalars(select(Row)).one()
    row.account = edited = edit(row.account)
    if edited.rate is True:
        with pytest.raises(SerializationError):  # a bool is no float
            session.commit()
        return
    session.commit()
    assert repr(dataclasses.astuple(stored(session, "account"))) == repr(
        dataclasses.astuple(dataclasses.replace(edited, rate=1.0))
    )


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise LookupError

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("fault", [float("nan"), (1,), {1: 2}, "\ud800", Unequal(), {1}, b""])
@pytest.mark.parametrize("name", ["plain", "mutable", "dictionary", "bound"])
def test_a_value_that_cannot_be_written_is_refused_by_the_flush(
    session: Session, name: str, fault: Any
) -> None:
    session.add(Row(id="x", plain={}, unredacted={}, mutable={}, dictionary={}, bound={}))
    session.commit()
    row = session.scalars(select(Row)).one()
    for value in ({"a": fault}, {"a": fault}):
        getattr(row, name)
        setattr(row, name, value)
        assert session.is_modified(row)
        with pytest.raises(SerializationError, match=r"\$\.\{1st\}: "):
            session.flush()
        session.rollback()


def test_the_forms_of_null_are_told_apart(session: Session) -> None:
    session.add(Row(id="x", unredacted=0, mutable=0))
    session.commit()
    row = session.scalars(select(Row)).one()
    is_null = select(Row.plain.is_(None))
    for value, is_sql_null in ((null(), True), (JSON.NULL, False), (null(), True)):
        assert row.plain is None
        row.plain = value
        session.commit()
        assert bool(session.scalar(is_null)) is is_sql_null


def test_values_are_told_apart_over_async_sessions(run_async: Callable[..., Any]) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Row(id="x", plain={"on": True}, unredacted=0, mutable={"on": True}))
            await session.commit()
            row = (await session.scalars(select(Row))).one()
            row.plain = row.mutable = {"on": 1}
            await session.commit()
            read = (await session.execute(select(Row.plain, Row.mutable))).one()
            assert [repr(value["on"]) for value in read] == ["1", "1"]

    run_async(work)
