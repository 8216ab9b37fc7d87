"""
EncryptedJSON against sqlalchemy.JSON: the same operations through both types, the same outcome.

SQLAlchemy's own suite for dialects has such a test of its JSON type; this one covers the same
ground, without what needs the database to look into a document.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import pytest
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    inspect,
    null,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    aliased,
    column_property,
    declarative_base,
    declared_attr,
    defer,
    load_only,
    mapped_column,
    undefer,
    with_loader_criteria,
)
from sqlmodel import Field, SQLModel

from sqlalchemy_lucent import EncryptedJSON

Make: TypeAlias = Any


@pytest.fixture(params=[JSON, EncryptedJSON], ids=["JSON", "EncryptedJSON"])
def json_type(request: pytest.FixtureRequest) -> Make:
    """Each test runs through both types and expects one outcome."""
    return request.param


# -- Core ------------------------------------------------------------------------------------------


@pytest.fixture
def table(engine: Engine, json_type: Make) -> Table:
    table = Table(
        "data_table",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("name", String(30)),
        Column("data", json_type, nullable=False),
        Column("nulldata", json_type(none_as_null=True)),
    )
    table.create(engine)
    return table


@pytest.fixture
def connection(engine: Engine, table: Table) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        None,
        15,
        0,
        -1,
        -1.0,
        15.052,
        1234567.89,
        "a string",
        "",
        "réve illé",
        "réve🐍 illé",
        '"quoted" \\ \u2028 </script>',
        {},
        [],
        [[], {}, [{}]],
        {"key1": "value1", "key2": "value2"},
        {"key1": {"subkey1": [1, 2.5, None, True, "x"]}},
        {"réve🐍 illé": "réve🐍 illé", "data": {"k1": "drôl🐍e"}, "": 0},
        {"a": ["réve🐍illé" * 1000, "x" * 9000]},
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_comes_back_equal_and_of_its_type(
    connection: Connection, table: Table, value: Any
) -> None:
    connection.execute(insert(table), {"name": "row", "data": value, "nulldata": value})
    row = connection.execute(select(table.c.data, table.c.nulldata)).one()
    assert row == (value, value)
    if not isinstance(value, float) or isinstance(table.c.data.type, EncryptedJSON):
        for opened in row:
            assert isinstance(opened, type(value))


INSERTS: dict[str, Callable[[Connection, Table, Any], object]] = {
    "parameters": lambda c, t, v: c.execute(insert(t), {"name": "r", "data": 1, "nulldata": v}),
    "many": lambda c, t, v: c.execute(
        insert(t), [{"name": str(i), "data": 1, "nulldata": v} for i in range(3)]
    ),
    "values": lambda c, t, v: c.execute(insert(t).values(name="r", data=1, nulldata=v)),
    "many values": lambda c, t, v: c.execute(
        insert(t).values([{"name": str(i), "data": 1, "nulldata": v} for i in range(3)])
    ),
    "update": lambda c, t, v: (
        c.execute(insert(t), {"name": "r", "data": 1, "nulldata": 2}),
        c.execute(update(t).values(nulldata=v)),
    ),
}


@pytest.mark.parametrize("how", INSERTS)
def test_none_is_sql_null_where_the_column_says_so(
    connection: Connection, table: Table, how: str
) -> None:
    INSERTS[how](connection, table, None)
    nulls = connection.scalars(select(table.c.id).where(table.c.nulldata.is_(None))).all()
    assert len(nulls) in (1, 3)
    assert connection.scalars(select(table.c.nulldata)).first() is None


@pytest.mark.parametrize("value", [None, JSON.NULL])
def test_none_and_json_null_are_a_json_null_otherwise(
    connection: Connection, table: Table, value: Any
) -> None:
    connection.execute(insert(table), {"name": "a", "data": value})
    connection.execute(insert(table).values(name="b", data=value))
    assert connection.scalars(select(table.c.data)).all() == [None, None]
    assert connection.scalars(select(table.c.data).where(table.c.data.is_(None))).all() == []
    assert len(connection.scalars(select(table.c.id).where(table.c.data.is_not(None))).all()) == 2


def test_json_null_is_stored_where_none_would_be_sql_null(
    connection: Connection, table: Table
) -> None:
    connection.execute(insert(table), {"name": "a", "data": 1, "nulldata": JSON.NULL})
    assert connection.scalars(select(table.c.nulldata)).all() == [None]
    assert connection.scalars(select(table.c.id).where(table.c.nulldata == None)).all() == []  # noqa: E711


def test_sql_null_is_sql_null(connection: Connection, table: Table) -> None:
    connection.execute(insert(table).values(name="a", data=1, nulldata=null()))
    connection.execute(insert(table), {"name": "b", "data": 1})
    assert len(connection.scalars(select(table.c.id).where(table.c.nulldata == None)).all()) == 2  # noqa: E711
    assert connection.scalars(select(table.c.id).where(table.c.nulldata != None)).all() == []  # noqa: E711


def test_the_engines_serializer_and_deserializer_are_used(url: Any, json_type: Make) -> None:
    dumped, loaded = [], []

    def dumps(value: Any) -> str:
        dumped.append(value)
        return json.dumps({"wrapped": value})

    def loads(data: Any) -> Any:
        loaded.append(data)
        return json.loads(data)["wrapped"]

    engine = create_engine(url, json_serializer=dumps, json_deserializer=loads)
    table = Table(
        "custom", MetaData(), Column("id", Integer, primary_key=True), Column("d", json_type)
    )
    table.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(table), {"d": {"key": "data"}})
        assert connection.scalar(select(table.c.d)) == {"key": "data"}
    table.drop(engine)
    assert dumped == [{"key": "data"}]
    assert json.loads(loaded[-1]) == {"wrapped": {"key": "data"}}
    engine.dispose()


def test_insert_from_select_and_returning(connection: Connection, table: Table) -> None:
    connection.execute(insert(table), {"name": "a", "data": {"a": 1}, "nulldata": [1]})
    copied = insert(table).from_select(
        ["name", "data", "nulldata"], select(text("'b'"), table.c.data, table.c.nulldata)
    )
    connection.execute(copied)
    rows = connection.execute(select(table.c.data, table.c.nulldata)).all()
    assert rows == [({"a": 1}, [1])] * 2
    if connection.dialect.insert_returning:
        returned = connection.execute(
            insert(table).returning(table.c.data), {"name": "c", "data": {"r": 1}}
        )
        assert returned.scalar_one() == {"r": 1}
        many = connection.execute(
            insert(table).returning(table.c.data, sort_by_parameter_order=True),
            [{"name": str(i), "data": {"i": i}} for i in range(5)],
        )
        assert many.scalars().all() == [{"i": i} for i in range(5)]
    if connection.dialect.update_returning:
        statement = update(table).where(table.c.name == "c").values(data=[9])
        assert connection.execute(statement.returning(table.c.data)).scalar_one() == [9]


def test_aliases_subqueries_ctes_and_unions(connection: Connection, table: Table) -> None:
    connection.execute(insert(table), [{"name": n, "data": {"n": n}} for n in "ab"])
    alias = table.alias()
    data = select(table.c.data)
    for statement in (
        select(alias.c.data),
        select(data.subquery().c.data),
        select(data.cte().c.data),
        union_all(data.where(table.c.name == "a"), data.where(table.c.name == "b")),
        select(data.where(table.c.name == "a").scalar_subquery()).union_all(
            data.where(table.c.name == "b")
        ),
        select(table.c.data.label("renamed")),
    ):
        rows = connection.scalars(statement).all()
        assert sorted(row["n"] for row in rows) == ["a", "b"]


def test_unique_results_are_made_of_unhashable_values(connection: Connection, table: Table) -> None:
    connection.execute(insert(table), [{"name": n, "data": {"same": 1}} for n in "ab"])
    assert table.c.data.type.hashable is False
    result = connection.execute(select(table.c.name, table.c.data))
    with pytest.raises(TypeError, match="unhashable"):
        result.unique().all()


def test_a_reflected_table_with_an_overriding_column(
    connection: Connection, table: Table, json_type: Make
) -> None:
    connection.execute(insert(table), {"name": "a", "data": {"a": 1}})
    reflected = Table(
        "data_table",
        MetaData(),
        Column("data", json_type),
        Column("nulldata", json_type(none_as_null=True)),
        autoload_with=connection,
    )
    assert connection.scalar(select(reflected.c.data)) == {"a": 1}
    connection.execute(insert(reflected), {"name": "b", "data": {"b": 1}})
    assert connection.scalars(select(table.c.data)).all()[-1] == {"b": 1}


# -- the ORM ---------------------------------------------------------------------------------------


def make_models(json_type: Make) -> Any:
    class Base(DeclarativeBase):
        type_annotation_map = {dict[str, Any]: json_type()}  # noqa: RUF012

    class Mixin:
        mixed: Mapped[Any] = mapped_column(json_type, nullable=True)

        @declared_attr
        def declared(cls) -> Mapped[Any]:
            return mapped_column(json_type, nullable=True)

    class Abstract(Base):
        __abstract__ = True
        inherited: Mapped[Any] = mapped_column(json_type, nullable=True)

    class Node(Mixin, Abstract):
        __tablename__ = "nodes"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        kind: Mapped[str] = mapped_column(String(10), default="node")
        data: Mapped[dict[str, Any]]
        default: Mapped[Any] = mapped_column(json_type, default=lambda: {"made": []})
        nulls: Mapped[Any] = mapped_column(json_type(none_as_null=True), nullable=True)
        evaluated: Mapped[Any] = mapped_column(
            json_type(none_as_null=True).evaluates_none(), nullable=True
        )
        omitted: Mapped[Any] = mapped_column(json_type, nullable=True)
        late: Mapped[Any] = mapped_column(json_type, deferred=True, nullable=True)
        mutable: Mapped[Any] = mapped_column(MutableDict.as_mutable(json_type()), nullable=True)
        mutable_list: Mapped[Any] = mapped_column(
            MutableList.as_mutable(json_type()), nullable=True
        )
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "node"}  # noqa: RUF012

    class Leaf(Node):
        __tablename__ = "leaves"
        id: Mapped[int] = mapped_column(ForeignKey(Node.id), primary_key=True)
        own: Mapped[dict[str, Any]]
        __mapper_args__ = {"polymorphic_identity": "leaf"}  # noqa: RUF012

    inner = aliased(Node)
    Leaf.first = column_property(
        select(inner.data).where(inner.id == 1).correlate_except(inner).scalar_subquery()
    )
    return dataclasses.make_dataclass("Models", ["Base", "Node", "Leaf"])(Base, Node, Leaf)


@pytest.fixture
def models(json_type: Make) -> Any:
    return make_models(json_type)


@pytest.fixture
def session(engine: Engine, models: Any) -> Iterator[Session]:
    models.Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def raw_nulls(session: Session, model: Any, name: str) -> int:
    return len(session.scalars(select(model.id).where(getattr(model, name).is_(None))).all())


def test_null_rules_of_the_orm(session: Session, models: Any) -> None:
    node = models.Node
    session.add(node(id=1, data={}, nulls=None, evaluated=None, mixed=None, declared=JSON.NULL))
    session.add(node(id=2, data={}, mixed=null()))
    session.bulk_insert_mappings(node, [{"id": 3, "data": {}, "nulls": None, "mixed": None}])
    session.commit()
    # `mixed`: JSON null for 1 and 3, SQL NULL for 2. Left out: `None` is inserted as SQL NULL.
    counted = {
        name: raw_nulls(session, node, name)
        for name in ("nulls", "evaluated", "mixed", "declared", "omitted", "data")
    }
    assert counted == {
        "nulls": 3, "evaluated": 2, "mixed": 1, "declared": 2, "omitted": 3, "data": 0,
    }  # fmt: skip
    for loaded in session.scalars(select(node)):
        assert loaded.nulls is loaded.evaluated is loaded.mixed is loaded.declared is None


def test_defaults_declared_everywhere_and_inheritance(session: Session, models: Any) -> None:
    session.add(models.Leaf(id=1, data={"a": 1}, own={"o": 1}, mixed=[1], inherited="x"))
    session.commit()
    (leaf,) = session.scalars(select(models.Node))
    assert isinstance(leaf, models.Leaf)
    assert (leaf.data, leaf.own, leaf.mixed, leaf.inherited) == ({"a": 1}, {"o": 1}, [1], "x")
    assert leaf.default == {"made": []}
    assert leaf.first == {"a": 1}
    leaf.own = {"o": 2}
    leaf.mixed = None
    session.commit()
    assert (leaf.own, leaf.mixed) == ({"o": 2}, None)


def test_deferred_load_only_and_undefer(session: Session, models: Any) -> None:
    node = models.Node
    session.add(node(id=1, data={"a": 1}, late={"late": 1}))
    session.commit()
    session.expunge_all()
    (loaded,) = session.scalars(select(node))
    assert "late" in inspect(loaded).unloaded
    assert loaded.late == {"late": 1}
    session.expunge_all()
    (loaded,) = session.scalars(select(node).options(undefer(node.late), defer(node.data)))
    assert {"data", "late"} & inspect(loaded).unloaded == {"data"}
    session.expunge_all()
    (loaded,) = session.scalars(select(node).options(load_only(node.data)))
    assert "default" in inspect(loaded).unloaded
    assert (loaded.data, loaded.default) == ({"a": 1}, {"made": []})


def test_bulk_writes(session: Session, models: Any) -> None:
    node = models.Node
    session.execute(insert(node), [{"id": i, "data": {"i": i}} for i in range(1, 6)])
    session.bulk_save_objects([node(id=i, data={"i": i}) for i in range(6, 9)])
    session.execute(update(node), [{"id": i, "data": {"u": i}} for i in (1, 2)])
    session.bulk_update_mappings(node, [{"id": 3, "data": {"u": 3}}])
    (fourth,) = session.scalars(select(node).where(node.id == 4))
    session.execute(update(node).where(node.id == 4).values(data={"u": 4}))
    assert fourth.data == {"u": 4}
    session.commit()
    rows = session.scalars(select(node.data).order_by(node.id)).all()
    assert rows == [{"u": i} if i < 5 else {"i": i} for i in range(1, 9)]
    if session.get_bind().dialect.insert_returning:
        made = session.scalars(
            insert(node).returning(node, sort_by_parameter_order=True),
            [{"id": i, "data": {"i": i}} for i in (20, 21)],
        ).all()
        assert [n.data for n in made] == [{"i": 20}, {"i": 21}]


def test_merge_refresh_expire_and_change_detection(session: Session, models: Any) -> None:
    node = models.Node
    session.add(node(id=1, data={"a": [1]}))
    session.commit()
    merged = session.merge(node(id=1, data={"a": [1]}))
    assert not session.is_modified(merged)
    merged = session.merge(node(id=1, data={"a": [2]}))
    assert session.is_modified(merged)
    session.commit()
    merged.data = {"lost": 1}
    session.refresh(merged)
    assert merged.data == {"a": [2]}
    merged.data = {"lost": 1}
    session.expire(merged, ["data"])
    assert merged.data == {"a": [2]}
    merged.data = {"a": [2]}
    assert not session.is_modified(merged)
    merged.data = {"a": [2.5]}
    session.rollback()
    assert merged.data == {"a": [2]}


def test_sqlalchemys_own_mutable_types(session: Session, models: Any) -> None:
    session.add(models.Node(id=1, data={}, mutable={"a": 1}, mutable_list=[1]))
    session.commit()
    node = session.get_one(models.Node, 1)
    assert isinstance(node.mutable, MutableDict)
    assert isinstance(node.mutable_list, MutableList)
    node.mutable["b"] = 2
    node.mutable_list.append(2)
    session.commit()
    assert (node.mutable, node.mutable_list) == ({"a": 1, "b": 2}, [1, 2])


def test_queries_over_entities(session: Session, models: Any) -> None:
    node = models.Node
    session.add_all([node(id=1, data={"n": 1}), node(id=2, data={"n": 2}, mixed=1)])
    session.commit()
    other = aliased(node)
    subquery = select(node).subquery()
    from_subquery = aliased(node, subquery)
    criteria = with_loader_criteria(node, node.mixed.is_not(None))
    for statement, expected in (
        (select(other).order_by(other.id), [1, 2]),
        (select(from_subquery).order_by(from_subquery.id), [1, 2]),
        (select(node).from_statement(select(node).order_by(node.id)), [1, 2]),
        (select(node).options(criteria), [2]),
    ):
        assert [found.data["n"] for found in session.scalars(statement).unique()] == expected
    pairs = session.execute(select(node.id, node.data, other.data).where(node.id == other.id))
    assert sorted(tuple(row) for row in pairs.unique(lambda row: row[0])) == [
        (1, {"n": 1}, {"n": 1}),
        (2, {"n": 2}, {"n": 2}),
    ]


Classic = declarative_base()


def make_pickled(json_type: Make, suffix: str) -> Any:
    columns = {
        "__tablename__": f"pickled_{suffix}",
        "__module__": __name__,
        "id": Column(Integer, primary_key=True),
        "data": Column(json_type),
    }
    return type(f"Pickled{suffix}", (Classic,), columns)


PickledJSON = make_pickled(JSON, "JSON")
PickledEncrypted = make_pickled(EncryptedJSON, "Encrypted")


@pytest.mark.parametrize("model", [PickledJSON, PickledEncrypted])
def test_a_pickled_model_comes_back(engine: Engine, model: Any) -> None:
    Classic.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(model(id=1, data={"a": [1]}))
        session.commit()
        loaded = session.scalars(select(model)).one()
        session.expunge(loaded)
        restored = pickle.loads(pickle.dumps(loaded))
        assert restored.data == {"a": [1]}
        session.add(restored)
        restored.data = {"b": 2}
        session.commit()
        assert session.scalars(select(model.data)).one() == {"b": 2}


def test_a_model_mapped_as_a_dataclass(engine: Engine, json_type: Make) -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Model(Base):
        __tablename__ = "dataclass_models"
        id: Mapped[int] = mapped_column(primary_key=True)
        data: Mapped[dict[str, Any]] = mapped_column(json_type, default_factory=dict)
        more: Mapped[list[int] | None] = mapped_column(json_type(none_as_null=True), default=None)

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Model(id=1), Model(id=2, data={"a": 1}, more=[1])])
        session.commit()
        rows = session.scalars(select(Model).order_by(Model.id)).all()
        assert [(row.data, row.more) for row in rows] == [({}, None), ({"a": 1}, [1])]
        assert rows[1] == Model(id=2, data={"a": 1}, more=[1])


class JSONHero(SQLModel, table=True):
    __tablename__ = "json_heroes"
    id: int | None = Field(default=None, primary_key=True)
    data: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    tags: list[str] = Field(default_factory=list, sa_column=Column(JSON))


class EncryptedHero(SQLModel, table=True):
    __tablename__ = "encrypted_heroes"
    id: int | None = Field(default=None, primary_key=True)
    data: dict[str, Any] = Field(default_factory=dict, sa_type=EncryptedJSON)
    tags: list[str] = Field(default_factory=list, sa_column=Column(EncryptedJSON))


@pytest.mark.parametrize("model", [JSONHero, EncryptedHero])
def test_sqlmodel_fields(engine: Engine, model: Any) -> None:
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(model(id=1, data={"a": {"b": 1}}, tags=["x"]))
        session.commit()
        hero = session.scalars(select(model)).one()
        assert hero.model_dump() == {"id": 1, "data": {"a": {"b": 1}}, "tags": ["x"]}
        assert json.loads(hero.model_dump_json())["data"] == {"a": {"b": 1}}
        hero.data = {"c": 2}
        session.commit()
        session.refresh(hero)
        assert hero.data == {"c": 2}


# -- asynchronous drivers --------------------------------------------------------------------------


def test_the_essentials_over_async_drivers(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any], json_type: Make
) -> None:
    models = make_models(json_type)
    node = models.Node

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(models.Base.metadata.create_all)
        async with AsyncSession(engine, expire_on_commit=False) as session:
            session.add_all(
                [node(id=1, data={"a": [1, None, "é🐍"]}), models.Leaf(id=2, data={}, own={})]
            )
            await session.commit()
            await session.execute(insert(node), [{"id": i, "data": {"i": i}} for i in (3, 4)])
            await session.execute(update(node), [{"id": 3, "data": {"u": 3}, "nulls": None}])
            await session.execute(update(node).where(node.id == 4).values(data={"u": 4}))
            await session.commit()
            session.expunge_all()
            rows = (await session.scalars(select(node).order_by(node.id))).all()
            assert [row.data for row in rows] == [{"a": [1, None, "é🐍"]}, {}, {"u": 3}, {"u": 4}]
            assert [row.default for row in rows] == [{"made": []}] * 4
            await session.refresh(rows[0], ["data"])
            streamed = await session.stream_scalars(select(node.data).where(node.id > 2))
            assert sorted([d["u"] async for d in streamed]) == [3, 4]

    run_async(work)
