"""Edits inside a document, at any depth, are written at the next flush."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from sqlalchemy import Engine, ForeignKey, LargeBinary, String, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declared_attr,
    mapped_column,
)

from sqlalchemy_lucent import EncryptedJSON, SerializationError, UnsupportedOperationError
from sqlalchemy_lucent.mutable import TrackedDict, TrackedList


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: EncryptedJSON.mutable()}  # noqa: RUF012


class WithSettings:
    settings: Mapped[Any] = mapped_column(EncryptedJSON.mutable(), nullable=True)

    @declared_attr
    def history(cls) -> Mapped[Any]:
        return mapped_column(EncryptedJSON.mutable(redact=False), nullable=True)


class Account(WithSettings, Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), default="account")
    data: Mapped[dict[str, Any]]
    other: Mapped[Any] = mapped_column(EncryptedJSON.mutable(none_as_null=True), nullable=True)
    untracked: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "account"}  # noqa: RUF012


class Robot(Account):
    __tablename__ = "robots"
    id: Mapped[int] = mapped_column(ForeignKey(Account.id), primary_key=True)
    firmware: Mapped[Any] = mapped_column(EncryptedJSON.mutable())
    __mapper_args__ = {"polymorphic_identity": "robot"}  # noqa: RUF012


class Second(WithSettings, Base):
    __tablename__ = "seconds"
    id: Mapped[int] = mapped_column(primary_key=True)


class Plain(MappedAsDataclass, DeclarativeBase):
    pass


class Card(Plain):
    __tablename__ = "cards"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON.mutable(), default_factory=dict)


DOCUMENT = {"a": [{"b": 1, "c": [3, 1, 2]}, "x"], "d": {"e": {"f": None}}, "g": "text"}


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    Plain.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


@pytest.fixture
def account(session: Session) -> Account:
    account = Account(id=1, data=DOCUMENT, other=[1, [2]])
    session.add(account)
    session.commit()
    return account


def stored(session: Session, model: Any = Account, name: str = "data") -> Any:
    """What a new session reads."""
    with Session(session.get_bind()) as another:
        return another.scalar(select(getattr(model, name)))


EDITS = [
    "d['a'][0]['b'] = 2",
    "d['a'][0]['c'].append({}); d['a'][0]['c'][-1]['x'] = [1]",
    "d['d'] |= {'i': [1]}",
    "del d['a'][:]",
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_at_any_depth_is_written(session: Session, account: Account, edit: str) -> None:
    expected = copy.deepcopy(DOCUMENT)
    exec(edit, {"d": expected})
    exec(edit, {"d": account.data})
    session.commit()
    assert stored(session) == expected


def test_reading_writes_nothing(session: Session, account: Account) -> None:
    copy.deepcopy(account.data), json.dumps(account.data), account.data.get("a"), account.data | {}
    list(account.data["a"])
    assert account not in session.dirty
    assert not session.is_modified(account)


def test_a_failed_edit_writes_nothing(session: Session, account: Account) -> None:
    with pytest.raises(KeyError):
        del account.data["missing"]
    with pytest.raises(IndexError):
        account.data["a"][0]["c"].pop(10)
    assert not session.is_modified(account)


def test_a_list_and_a_scalar_are_documents_too(session: Session, account: Account) -> None:
    account.other[1].append(3)
    account.settings = "text"
    session.commit()
    assert stored(session, name="other") == [1, [2, 3]]
    assert account.settings == "text"
    account.settings = 5
    session.commit()
    assert account.settings == 5
    account.settings = None
    session.commit()
    assert account.settings is None


def test_each_column_tracks_for_itself(session: Session, account: Account) -> None:
    account.other = account.data
    session.commit()
    account.other["a"][0]["b"] = "other"
    account.data["a"][0]["b"] = "data"
    session.commit()
    assert stored(session)["a"][0]["b"] == "data"
    assert stored(session, name="other")["a"][0]["b"] == "other"


def test_a_part_set_as_the_whole_is_a_document_of_its_own(
    session: Session, account: Account
) -> None:
    account.data = account.data["d"]
    account.data["e"]["f"] = 1
    session.commit()
    assert stored(session) == {"e": {"f": 1}}


def test_a_part_put_into_another_document_is_copied(session: Session, account: Account) -> None:
    another = Account(id=2, data={"taken": account.data["d"]})
    session.add(another)
    session.flush()
    another.data["taken"]["e"]["f"] = 2
    session.commit()
    assert another.data == {"taken": {"e": {"f": 2}}}
    assert account.data == DOCUMENT


def test_a_default_and_a_value_given_to_the_constructor_are_tracked(session: Session) -> None:
    card, filled = Card(id=1), Card(id=2, data={"a": {}})
    session.add_all([card, filled])
    session.flush()
    card.data["x"] = 1
    filled.data["a"]["b"] = 2
    session.commit()
    assert card.data == {"x": 1}
    assert filled.data == {"a": {"b": 2}}


def test_a_mixin_tracks_in_each_class(session: Session, account: Account) -> None:
    second = Second(id=1, settings={"a": []}, history=[])
    session.add(second)
    account.settings = {"b": []}
    session.commit()
    second.settings["a"].append(1)
    second.history.append("h")
    account.settings["b"].append(2)
    session.commit()
    assert stored(session, Second, "settings") == {"a": [1]}
    assert stored(session, Second, "history") == ["h"]
    assert stored(session, Account, "settings") == {"b": [2]}


def test_a_subclass_tracks_inherited_and_own_columns(session: Session) -> None:
    session.add(Robot(id=1, data={"a": {}}, firmware={"f": {}}))
    session.commit()
    for robot in (session.get(Robot, 1), session.scalars(select(Account)).one()):
        assert isinstance(robot, Robot)
        robot.data["a"]["n"] = robot.data["a"].get("n", 0) + 1
        robot.firmware["f"]["n"] = robot.firmware["f"].get("n", 0) + 1
        session.commit()
    assert stored(session) == {"a": {"n": 2}}
    assert stored(session, Robot, "firmware") == {"f": {"n": 2}}


@pytest.mark.parametrize("load", [True, False])
def test_a_merged_object_tracks_its_own_document(
    session: Session, account: Account, load: bool
) -> None:
    account.data  # noqa: B018  (loads it)
    session.expunge(account)
    merged = session.merge(account, load=load)
    merged.data["a"][0]["b"] = "merged"
    session.commit()
    assert stored(session)["a"][0]["b"] == "merged"
    assert account.data["a"][0]["b"] == 1
    account.data["a"][0]["b"] = "detached"
    assert merged.data["a"][0]["b"] == "merged"


def test_what_refresh_loads_is_tracked(session: Session, account: Account) -> None:
    account.data["a"][0]["b"] = "lost"
    session.refresh(account)
    assert account.data == DOCUMENT
    account.data["a"][0]["b"] = "kept"
    session.refresh(account, ["other"])
    session.commit()
    assert stored(session)["a"][0]["b"] == "kept"


def test_what_bulk_update_evaluates_is_tracked(session: Session, account: Account) -> None:
    account.data  # noqa: B018
    session.execute(
        update(Account).where(Account.id == 1).values(data={"n": {}}),
        execution_options={"synchronize_session": "evaluate"},
    )
    account.data["n"]["m"] = 1
    session.commit()
    assert stored(session) == {"n": {"m": 1}}


@pytest.mark.parametrize("end", ["commit", "rollback", "expire_all"])
def test_editing_a_value_read_before_the_object_expired_is_refused(
    session: Session, account: Account, end: str
) -> None:
    data = account.data
    getattr(session, end)()
    for _ in range(2):
        with pytest.raises(
            UnsupportedOperationError, match=r"Account\.data.*[Rr]ead the attribute"
        ):
            data["a"][0]["b"] = 2
        account.data  # noqa: B018  (loads another)
    assert account.data == DOCUMENT


def test_rollback_brings_the_stored_value_back(session: Session, account: Account) -> None:
    account.data["a"] = []
    session.flush()
    session.rollback()
    assert account.data == DOCUMENT
    account.data["a"][0]["b"] = 2
    session.commit()
    assert stored(session)["a"][0]["b"] == 2


def test_a_value_that_was_replaced_or_whose_object_is_gone_is_free(
    session: Session, account: Account
) -> None:
    replaced = account.data
    account.data = {}
    session.commit()
    replaced["a"].clear()
    assert not session.is_modified(account)
    with Session(session.get_bind()) as another:
        orphan = another.scalars(select(Account)).one().other
    orphan.append(1)
    assert orphan == [1, [2], 1]


def test_a_pickled_model_tracks_when_it_is_back(session: Session, account: Account) -> None:
    account.data, account.other  # noqa: B018
    session.expunge(account)
    restored = pickle.loads(pickle.dumps(account))
    session.add(restored)
    assert restored.data == DOCUMENT
    assert not session.is_modified(restored)
    restored.data["a"][0]["b"] = "back"
    restored.other.append(3)
    session.commit()
    assert stored(session)["a"][0]["b"] == "back"
    assert stored(session, name="other") == [1, [2], 3]


def test_a_tracked_value_is_a_real_dict_or_list(session: Session, account: Account) -> None:
    data = account.data
    assert isinstance(data, dict)
    assert isinstance(data["a"], list)
    assert data == DOCUMENT
    assert json.loads(json.dumps(data)) == DOCUMENT
    assert orjson.loads(orjson.dumps(data)) == DOCUMENT
    assert {**data} == DOCUMENT
    assert list(data) == list(DOCUMENT)
    assert data["a"][:1] == DOCUMENT["a"][:1]  # type: ignore[index]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_a_copy_is_equal_and_detached(
    session: Session, account: Account, duplicate: Callable[[Any], Any]
) -> None:
    detached = duplicate(account.data)
    assert detached == DOCUMENT
    detached["a"][0]["b"] = 2
    assert account.data == DOCUMENT
    assert not session.is_modified(account)
    assert "text" not in repr(detached)


def test_a_deep_copy_holds_nothing_tracked(session: Session, account: Account) -> None:
    detached = copy.deepcopy(account.data)
    assert type(detached["a"]) is list
    assert type(detached["a"][0]) is dict
    assert type(account.data.copy()) is dict
    assert copy.copy(account.data["a"]) == DOCUMENT["a"]


def test_a_tracked_value_prints_nothing_unless_told(session: Session, account: Account) -> None:
    account.history = [{"text": 1}]
    assert repr(account.history) == str(account.history) == "[{'text': 1}]"
    account.settings = {"text": [1]}
    for value in (account.data, account.data["d"], account.settings, account.settings["text"]):
        kind = "dict" if isinstance(value, dict) else "list"
        assert repr(value) == str(value) == f"<redacted {kind}>"
    session.commit()
    assert repr(account.history) == "[{'text': 1}]"
    assert "text" not in repr(account.data)


def test_a_value_that_json_refuses_is_refused_at_flush(session: Session, account: Account) -> None:
    account.data["a"][0]["when"] = object()
    with pytest.raises(SerializationError, match=r"\$\.\{1st\}\[0\]\.\{3rd\}: "):
        session.flush()


def test_a_document_that_holds_itself_is_refused(session: Session, account: Account) -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    account.data = loop
    with pytest.raises(SerializationError, match="nested more than"):
        session.flush()
    session.rollback()
    account.data["loop"] = account.data
    with pytest.raises(SerializationError, match="nested more than"):
        session.flush()


def test_an_untracked_column_is_left_alone(session: Session, account: Account) -> None:
    account.untracked = {"a": 1}
    session.commit()
    account.untracked["a"] = 2
    assert not session.is_modified(account)
    assert not isinstance(account.untracked, (TrackedDict, TrackedList))


def test_only_a_changed_column_is_sealed_again(session: Session, account: Account) -> None:
    before = session.execute(
        select(type_coerce(Account.data, LargeBinary), type_coerce(Account.other, LargeBinary))
    ).one()
    account.other.append(1)
    session.flush()
    after = session.execute(
        select(type_coerce(Account.data, LargeBinary), type_coerce(Account.other, LargeBinary))
    ).one()
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_edits_are_written_over_async_sessions(run_async: Callable[..., Any]) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Account(id=1, data=DOCUMENT))
            await session.commit()
            account = (await session.scalars(select(Account))).one()
            account.data["a"][0]["b"] = 2
            await session.commit()
            data = (await session.scalars(select(Account.data))).one()
            assert data["a"][0]["b"] == 2

    run_async(work)
