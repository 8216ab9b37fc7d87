"""Tracked documents: every method of dict and list that edits, against a plain copy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, delete, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    make_transient,
    make_transient_to_detached,
    mapped_column,
)
from sqlalchemy.orm.attributes import flag_modified, set_committed_value

from sqlalchemy_lucent import ConfigurationError, EncryptedJSON
from sqlalchemy_lucent.mutable import TrackedDict, TrackedList

DOCUMENT = {"a": [{"b": 1, "c": [3, 1, 2]}, "x"], "d": {"e": {"f": None}}, "g": "text"}


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[Any] = mapped_column(EncryptedJSON.mutable())


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


EDITS = [
    "d['a'][0]['b'] = 2",
    "d['new'] = {'x': [1]}; d['new']['x'].append(2)",
    "del d['d']['e']['f']",
    "d['d']['e'].update(f=1, g={'h': 2})",
    "d['d']['e'].update([('f', 1)])",
    "d['d'] |= {'i': [1]}",
    "d['a'][0]['c'].sort()",
    "d['a'][0]['c'].sort(reverse=True, key=str)",
    "d['a'][0]['c'].reverse()",
    "d['a'][0]['c'][1:] = [[9], 8]; d['a'][0]['c'][1].append(7)",
    "d['a'][0]['c'] += [4]",
    "d['a'][0]['c'] *= 2",
    "d['a'].append({'z': []}); d['a'][-1]['z'].append(1)",
    "d['a'].extend([1, {'y': 1}]); d['a'][-1]['y'] = 2",
    "d['a'].insert(0, [])",
    "d['a'].pop()",
    "d['a'].remove('x')",
    "d['a'].clear()",
    "del d['a'][0]",
    "del d['a'][:]",
    "d['d'].pop('e')",
    "d['d'].pop('missing', None)",
    "d['d'].popitem()",
    "d['d'].clear()",
    "d['d'].setdefault('n', []).append(1)",
    "d['d'].setdefault('e', 0)['q'] = 1",
    "d['a'][0], d['a'][1] = d['a'][1], d['a'][0]; d['a'][1]['b'] = 5",
    "x = d['a'].pop(0); d['a'].append(x); x['b'] = 7",
    "d['same'] = d['d']; d['d']['e'] = 1",
]


@pytest.mark.parametrize("loaded", [False, True], ids=["put in", "loaded"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_at_any_depth_is_written(session: Session, edit: str, loaded: bool) -> None:
    expected = copy.deepcopy(DOCUMENT)
    account = Account(id=1, data=DOCUMENT)
    session.add(account)
    if loaded:
        session.commit()
    else:
        session.flush()
    exec(edit, {"d": expected})
    exec(edit, {"d": account.data})
    assert account.data == expected
    assert session.is_modified(account)
    session.commit()
    assert account.data == expected


scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from("abc")
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)
EDITING_METHODS = {
    dict: ("__setitem__", "__delitem__", "update", "setdefault", "pop", "popitem", "clear"),
    list: ("__setitem__", "__delitem__", "append", "extend", "insert", "pop", "remove", "clear",
           "reverse", "__iadd__", "__imul__"),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(document=values, data=st.data())
def test_a_tracked_document_does_what_a_plain_one_does(document: Any, data: st.DataObject) -> None:
    account = Account(data=document)
    plain = copy.deepcopy(document)
    for _ in range(4):
        tracked_part, plain_part = account.data, plain
        while isinstance(plain_part, (dict, list)) and plain_part and data.draw(st.booleans()):
            keys = list(plain_part) if isinstance(plain_part, dict) else range(len(plain_part))
            key = data.draw(st.sampled_from(keys))
            tracked_part, plain_part = tracked_part[key], plain_part[key]
        if not isinstance(plain_part, (dict, list)):
            continue
        method = data.draw(st.sampled_from(EDITING_METHODS[type(plain_part)]))
        arguments = data.draw(st.lists(values | st.sampled_from("abc"), max_size=2))
        if method == "update":
            # A plain dict that refuses the second of two pairs has taken the first; ours has not.
            arguments = [data.draw(st.dictionaries(st.sampled_from("abc"), values))]
        outcomes = []
        for part in (tracked_part, plain_part):
            try:
                outcomes.append(getattr(part, method)(*copy.deepcopy(arguments)))
            except Exception as error:
                outcomes.append(type(error))
        if method not in ("__iadd__", "__imul__"):
            assert outcomes[0] == outcomes[1]
        assert account.data == plain
        assert_tracked(account.data)


def assert_tracked(value: Any) -> None:
    if isinstance(value, dict):
        assert isinstance(value, TrackedDict)
        for child in value.values():
            assert_tracked(child)
    elif isinstance(value, list):
        assert isinstance(value, TrackedList)
        for child in value:
            assert_tracked(child)


def test_no_method_that_edits_is_left_untracked() -> None:
    """A later Python that gives dict or list another editing method must show up here."""
    reading = {
        dict: {"copy", "fromkeys", "get", "items", "keys", "values"},
        list: {"copy", "count", "index"},
    }
    for plain, tracked in ((dict, TrackedDict), (list, TrackedList)):
        public = {name for name in vars(plain) if not name.startswith("_")}
        for name in public - reading[plain]:
            assert name in vars(tracked), name


def test_one_listener_serves_every_mutable_column() -> None:
    for _ in range(3):
        EncryptedJSON.mutable()

    class Later(Base):
        __tablename__ = "later"
        id: Mapped[int] = mapped_column(primary_key=True)
        data: Mapped[Any] = mapped_column(EncryptedJSON.mutable())

    Base.registry.configure()
    # A second listener would copy each document that is set again.
    assert len(list(Later.data.dispatch.set)) == 1


def test_a_container_made_by_hand_belongs_to_nothing() -> None:
    made = TrackedDict({"a": [1]}, b={})
    made["a"].append(2)
    made["b"]["c"] = 1
    assert made == {"a": [1, 2], "b": {"c": 1}}
    assert TrackedDict.fromkeys("ab", 0) == {"a": 0, "b": 0}
    assert TrackedList([1, [2]]) == [1, [2]]


@pytest.mark.parametrize("options", [{"lazy": True}, {"bound_to": ["id"]}])
def test_a_lazy_or_row_bound_column_is_not_mutable(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="does not track changes"):
        EncryptedJSON.mutable(**options)


def made_transient(session: Session, account: Account) -> Account:
    account.data  # noqa: B018  (loads it)
    session.execute(delete(Account))
    make_transient(account)
    session.add(account)
    return account


def made_detached(session: Session, account: Account) -> Account:
    session.expunge(account)
    detached = Account(id=1, data=DOCUMENT)
    make_transient_to_detached(detached)
    session.add(detached)
    return detached


def populated(session: Session, account: Account) -> Account:
    account.data["g"] = "lost"
    with session.no_autoflush:
        session.scalars(select(Account), execution_options={"populate_existing": True}).one()
    return account


def after_a_savepoint(session: Session, account: Account) -> Account:
    with session.begin_nested() as savepoint:
        account.data["g"] = "lost"
        session.flush()
        savepoint.rollback()
    return account


def copied(session: Session, account: Account) -> Account:
    account.data = copy.deepcopy(account.data)
    return account


def copied_at_the_top(session: Session, account: Account) -> Account:
    account.data = copy.copy(account.data)
    return account


def put_past_the_events(session: Session, account: Account) -> Account:
    set_committed_value(account, "data", copy.deepcopy(DOCUMENT))
    flag_modified(account, "data")
    session.flush()
    return account


def expired(session: Session, account: Account) -> Account:
    account.data["g"] = "lost"
    session.expire(account, ["data"])
    return account


@pytest.mark.parametrize(
    "through",
    [
        made_transient, made_detached, populated, after_a_savepoint, copied, copied_at_the_top,
        put_past_the_events, expired,
    ],
)  # fmt: skip
def test_an_edit_is_written_whatever_the_object_went_through(
    session: Session, through: Callable[[Session, Account], Account]
) -> None:
    account = Account(id=1, data=DOCUMENT)
    session.add(account)
    session.commit()
    account = through(session, account)
    expected = copy.deepcopy(DOCUMENT)
    assert account.data == expected
    for step in ("first", "second"):
        account.data["d"]["e"]["f"] = step
        expected["d"]["e"]["f"] = step  # type: ignore[index]
        session.flush()
        session.expire(account)
        assert account.data == expected


@dataclasses.dataclass
class Token:
    value: str


class Shape(TypedDict):
    names: list[str]


@pytest.mark.parametrize("schema", [Token, list[Token], dict[str, Token | None], set[str]])
def test_a_schema_whose_edits_cannot_be_seen_is_refused(schema: Any) -> None:
    EncryptedJSON(schema=schema)
    with pytest.raises(ConfigurationError, match="sees edits of dicts and lists"):
        EncryptedJSON.mutable(schema=schema)


@pytest.mark.parametrize("schema", [Shape, dict[str, Shape], list[list[int]], Any])
def test_a_schema_of_dicts_and_lists_tracks(schema: Any) -> None:
    assert EncryptedJSON.mutable(schema=schema).tracks_changes


def test_copies_of_a_tracked_document_are_tracked_no_more() -> None:
    class Base(DeclarativeBase): ...

    class Row(Base):
        __tablename__ = "rows"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(EncryptedJSON.mutable())

    row = Row(value={"a": [1]})
    for tracked in (row.value, row.value["a"]):
        shallow = copy.copy(tracked)
        assert shallow == tracked
        assert shallow is not tracked
    shallow = copy.copy(row.value)
    shallow["b"] = 1
    assert row.value == {"a": [1]}
