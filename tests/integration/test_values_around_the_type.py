"""Values that a sealed column is given and that its type does not bind: none is stored unsealed."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    PickleType,
    String,
    Table,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    EncryptedJSON,
    SerializationError,
    UnsupportedOperationError,
    row_bound,
)
from tests.databases import everywhere

MARKER = "sk_live_MARKER"


class Base(DeclarativeBase):
    pass


class Model(Base):
    __tablename__ = "models"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(99))
    raw: Mapped[bytes | None] = mapped_column(LargeBinary)
    # The attribute, the column's key and its name in the database differ.
    data: Mapped[Any] = mapped_column("stored", EncryptedJSON(True), key="k", nullable=True)
    other: Mapped[Any] = mapped_column(EncryptedJSON(True), nullable=True)


class Owned(Base):
    __tablename__ = "owned"
    owner: Mapped[str] = mapped_column(String(20), primary_key=True)
    data: Mapped[Any] = row_bound("owner")


table: Any = Model.__table__
D = table.c.k

EXPRESSIONS: dict[str, Callable[[], Any]] = {
    "a typed parameter": lambda: bindparam("p", {"a": MARKER}, type_=JSON),
    "a parameter of text": lambda: bindparam("p", MARKER, type_=String),
    "a pickled parameter": lambda: bindparam("p", MARKER, type_=PickleType),
    "a typed literal": lambda: literal({"a": MARKER}, JSON),
    "a literal": lambda: literal(MARKER),
    "a parameter of another column": lambda: literal({"a": MARKER}, table.c.other.type),
    "a cast": lambda: cast({"a": MARKER}, JSON),
    "a cast to bytes": lambda: cast(literal(MARKER), LargeBinary),
    "a coerced value": lambda: type_coerce({"a": MARKER}, JSON),
    "a coerced text": lambda: type_coerce(text(f"'{MARKER}'"), D.type),
    "SQL text": lambda: text(f"'{MARKER}'"),
    "a literal column": lambda: literal_column(f"'{MARKER}'"),
    "a typed literal column": lambda: literal_column(f"'{MARKER}'", D.type),
    "a function": lambda: func.lower(MARKER),
    "a typed function": lambda: func.lower(MARKER, type_=D.type),
    "a function of the column": lambda: func.hex(D),
    "a concatenation": lambda: literal(MARKER) + "x",
    "a scalar subquery": lambda: select(literal(MARKER)).scalar_subquery(),
    "a UNION": lambda: union_all(select(null()), select(literal(MARKER))).scalar_subquery(),
    "coalesce": lambda: func.coalesce(D, MARKER),
    "a CASE": lambda: case((D.is_(None), MARKER), else_=D),
    "a column of another type": lambda: table.c.name,
    "another sealed column": lambda: table.c.other,
    "a label": lambda: literal(MARKER).label("l"),
}

ALLOWED: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "null()": null,
    "JSON.NULL": lambda: JSON.NULL,
    "text NULL": lambda: text("NULL"),
    "literal NULL": lambda: literal_column(" null "),
    "a cast NULL": lambda: cast(null(), LargeBinary),
    "a value": lambda: {"a": 1},
    "an untyped parameter": lambda: bindparam("p", {"a": 1}),
    "a parameter of the column's type": lambda: literal({"a": 1}, D.type),
    "a parameter of the same context": lambda: literal({"a": 1}, EncryptedJSON(context=CONTEXT)),
    "the column": lambda: D,
    "coalesce": lambda: func.coalesce(D, literal({"a": 1}, D.type)),
    "a CASE": lambda: case((table.c.id == 1, D), (table.c.id > 5, null()), else_=None),
    "a scalar subquery": lambda: select(table.alias().c.k).limit(1).scalar_subquery(),
    "bytes": lambda: literal(None, LargeBinary),
    "a column of bytes": lambda: table.c.raw,
}
CONTEXT = "models.stored"


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.execute(insert(table).values(id=1, k={"a": 1}, other={"b": 1}))
        session.commit()
        yield session


def refused(session: Session, work: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"models\.stored") as caught:
        work()
    assert MARKER not in "".join(traceback.format_exception(caught.value))
    session.rollback()
    stored = session.connection().exec_driver_sql("SELECT stored FROM models").scalars().all()
    assert len(stored) == 1
    assert MARKER.encode() not in bytes(stored[0])


@everywhere("spelling", EXPRESSIONS, on_servers=list(EXPRESSIONS)[::8])
def test_an_expression_is_refused_in_every_statement(session: Session, spelling: str) -> None:
    def value() -> Any:
        return EXPRESSIONS[spelling]()

    def upsert(set_: Any) -> Any:
        name = session.get_bind().dialect.name
        if name == "mysql":
            return mysql.insert(table).values(id=1).on_duplicate_key_update(set_)
        dialect = sqlite if name == "sqlite" else postgresql
        return (
            dialect.insert(table)
            .values(id=1)
            .on_conflict_do_update(index_elements=["id"], set_=set_)
        )

    def assign() -> None:
        session.get_one(Model, 1).data = value()
        session.flush()

    def add() -> None:
        session.add(Model(id=2, data=value()))
        session.flush()

    for work in (
        lambda: session.execute(update(table).values({"k": value()})),
        lambda: session.execute(update(table).values({D: value()})),
        lambda: session.execute(update(table).ordered_values(("k", value()), ("id", 1))),
        lambda: session.execute(update(Model).values(data=value())),
        lambda: session.execute(update(Model).values({Model.data: value()})),
        lambda: session.query(Model).update({"data": value()}, synchronize_session=False),
        lambda: session.execute(upsert({"k": value()})),
        lambda: session.execute(upsert({D: value()})),
        assign,
    ):
        refused(session, work)
    if spelling in ("a function of the column", "coalesce", "a CASE") or "column of" in spelling:
        return  # no INSERT has the column
    for work in (
        lambda: session.execute(insert(table).values(id=2, k=value())),
        lambda: session.execute(insert(table).values(k=value()), [{"id": 2}, {"id": 3}]),
        lambda: session.execute(
            insert(table).values([{"id": 2, "k": {}}, {"id": 3, "k": value()}])
        ),
        lambda: session.execute(insert(table).values([(2, "n", None, value(), None)])),
        lambda: session.execute(
            insert(table).from_select(["id", "k"], select(literal(2), value()))
        ),
        lambda: session.execute(insert(Model).values(id=2, data=value())),
        lambda: session.execute(insert(Model).values(id=2, data=value()), [{"name": "n"}]),
        add,
    ):
        refused(session, work)


@pytest.mark.parametrize("spelling", ALLOWED)
def test_what_is_sealed_or_null_is_stored(session: Session, spelling: str) -> None:
    def value() -> Any:
        return ALLOWED[spelling]()

    session.execute(update(table).values(k=value()))
    session.execute(
        update(Model).values(data=value()), execution_options={"synchronize_session": False}
    )
    session.execute(update(table).ordered_values((D, value())))
    session.get_one(Model, 1).data = value()
    session.commit()
    assert session.get_one(Model, 1).data in (None, {"a": 1})
    (stored,) = session.connection().exec_driver_sql("SELECT stored FROM models").scalars()
    assert stored is None or bytes(stored).startswith(b"v1:")


def test_an_untyped_parameter_is_sealed_in_every_statement(session: Session) -> None:
    session.execute(insert(table).values(id=bindparam("i"), k=bindparam("p")), {"i": 2, "p": [2]})
    session.execute(
        insert(table).values(k=bindparam("p")), [{"id": 3, "p": [3]}, {"id": 4, "p": [4]}]
    )
    session.execute(
        update(table).where(D.is_not(None), table.c.id == 1).values(k=bindparam("p")), {"p": [1]}
    )
    session.execute(insert(Model), [{"id": 5, "data": [5]}])
    session.bulk_insert_mappings(Model.__mapper__, [{"id": 6, "data": [6]}])
    session.execute(update(Model), [{"id": 6, "data": [7]}])
    assert session.scalars(select(D).order_by(table.c.id)).all() == [[1], [2], [3], [4], [5], [7]]


@pytest.mark.parametrize("value", [literal(MARKER, JSON), func.lower(MARKER)])
def test_an_expression_among_the_parameters_is_no_document(session: Session, value: Any) -> None:
    mapper: Any = Model.__mapper__
    for work in (
        lambda: session.execute(insert(table), [{"id": 2, "k": value}]),
        lambda: session.execute(insert(Model), [{"id": 2, "data": value}]),
        lambda: session.execute(update(Model), [{"id": 1, "data": value}]),
        lambda: session.bulk_insert_mappings(mapper, [{"id": 2, "data": value}]),
        lambda: session.bulk_update_mappings(mapper, [{"id": 1, "data": value}]),
    ):
        with pytest.raises(SerializationError) as caught:
            work()
        assert MARKER not in str(caught.value)
        session.rollback()


def test_an_untyped_parameter_that_sqlalchemy_does_not_type_is_refused(session: Session) -> None:
    """It gives parameters of the first row of VALUES the column's type, and no other one."""
    rows = [{"id": 2, "k": bindparam("a", MARKER)}, {"id": 3, "k": bindparam("b", MARKER)}]
    refused(session, lambda: session.execute(insert(table).values(rows)))
    statement = update(table).values(k=func.coalesce(D, bindparam("p", MARKER, unique=True)))
    refused(session, lambda: session.execute(statement))


def test_upserts_take_the_row_that_was_proposed(session: Session) -> None:
    name = session.get_bind().dialect.name
    if name == "mysql":
        proposed = mysql.insert(table).values(id=1, k={"b": 2})
        statement: Any = proposed.on_duplicate_key_update(k=proposed.inserted.k)
    else:
        dialect: Any = sqlite if name == "sqlite" else postgresql
        proposed = dialect.insert(table).values(id=1, k={"b": 2})
        statement = proposed.on_conflict_do_update(
            index_elements=["id"], set_={"k": func.coalesce(proposed.excluded.k, D)}
        )
    session.execute(statement)
    assert session.scalar(select(D)) == {"b": 2}


def test_a_column_of_the_same_context_is_copied(session: Session) -> None:
    copied = Table(
        "copies",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("d", EncryptedJSON(context=CONTEXT)),
        Column("e", EncryptedJSON),
    )
    copied.create(session.get_bind())
    source = select(table.c.id, D)
    for query in (
        source,
        union_all(source, source.where(table.c.id > 9)),
        select(source.subquery()),
    ):
        session.execute(insert(copied).from_select(["id", "d"], query))
        assert session.scalar(select(copied.c.d)) == {"a": 1}
        with pytest.raises(UnsupportedOperationError, match=r"copies\.e"):
            session.execute(insert(copied).from_select(["id", "e"], query))
        session.execute(copied.delete())
    session.rollback()
    copied.drop(session.get_bind())


def test_a_statement_inside_a_cte_is_seen(session: Session) -> None:
    if session.get_bind().dialect.name != "postgresql":
        pytest.skip("only PostgreSQL has INSERT and UPDATE inside WITH")
    for inner in (
        update(table).values(k=literal(MARKER)),
        insert(table).values(id=2, k=literal(MARKER)),
        insert(table).values([{"id": 2, "k": None}, {"id": 3, "k": literal(MARKER)}]),
        update(table).ordered_values((D, literal(MARKER))),
        insert(table).from_select(["id", "k"], select(literal(2), literal(MARKER))),
        update(Model).values(data=literal(MARKER)),
        update(Model).values({Model.data: literal(MARKER)}),
        insert(Model).values([{"id": 2, "data": literal(MARKER)}]),
    ):
        cte = inner.returning(table.c.id).cte()
        refused(session, partial(session.execute, select(cte.c.id)))
        refused(
            session,
            partial(
                session.execute,
                update(table).values(name="x").where(table.c.id.in_(select(cte.c.id))),
            ),
        )
    cte = update(table).values(k=bindparam("p", {"a": 2})).returning(table.c.id).cte()
    session.execute(select(cte.c.id)).all()


def test_an_update_of_several_tables_is_seen(session: Session) -> None:
    if session.get_bind().dialect.name != "mysql":
        pytest.skip("only MySQL and MariaDB write into several tables")
    other: Any = Owned.__table__
    statement = update(other).values({D: literal(MARKER)}).where(other.c.owner == table.c.name)
    refused(session, lambda: session.execute(statement))


def test_a_statement_is_refused_each_time(session: Session) -> None:
    """The statement cache has it from the second time on."""
    for _ in range(3):
        refused(session, lambda: session.execute(update(table).values(k=literal(MARKER))))


def test_a_typed_parameter_is_refused_when_its_value_is_given_later(session: Session) -> None:
    statement = update(table).values(k=bindparam("p", type_=JSON))
    for parameters in ({"p": {"a": MARKER}}, [{"p": {"a": MARKER}}] * 2):
        refused(session, partial(session.connection().execute, statement, parameters))


def test_async_drivers_refuse_alike(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any],
) -> None:
    async def work(engine: AsyncEngine) -> Any:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            for statement in (
                insert(table).values(id=1, k=bindparam("p", type_=JSON)),
                update(table).values(k=bindparam("p", type_=JSON)),
            ):
                for parameters in ({"p": MARKER}, [{"p": MARKER}, {"p": MARKER}]):
                    with pytest.raises(UnsupportedOperationError, match=r"models\.stored"):
                        await connection.execute(statement, parameters)
            await connection.execute(insert(table).values(id=1, k={"a": 1}))
            return await connection.scalar(select(D))

    assert run_async(work) == {"a": 1}
