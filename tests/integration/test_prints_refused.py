"""What a redacted value prints is refused by every way of writing, and what was stored stays."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    JSON,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    insert,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    Bound,
    EncryptedJSON,
    LucentBase,
    LucentError,
    LucentSecret,
    LucentSecrets,
    RotationError,
    SerializationError,
    bound_rows,
    row_bound,
)
from sqlalchemy_lucent.migrations import encrypt_column
from tests.databases import everywhere

VALUE = {"token": "sk_live_1", "scopes": ["read"]}
PRINT = "<redacted dict>"
KEY = "tenant:t1:stripe:apiKey"


@dataclass
class Account:
    token: str


class Base(DeclarativeBase):
    pass


class Service(Base):
    __tablename__ = "services"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(String(50))
    plain: Mapped[Any] = mapped_column(EncryptedJSON)
    lazy: Mapped[Any] = mapped_column(EncryptedJSON(lazy=True))
    mutable: Mapped[Any] = mapped_column(EncryptedJSON.mutable())
    theirs: Mapped[Any] = mapped_column(MutableDict.as_mutable(EncryptedJSON()))
    typed: Mapped[Any] = mapped_column(EncryptedJSON(schema=Account))
    names: Mapped[Any] = mapped_column(EncryptedJSON(schema=dict[str, str]))


class Integration(Base):
    __tablename__ = "integrations"

    tenant: Mapped[str] = mapped_column(String(20), primary_key=True)
    credentials: Mapped[Any] = row_bound("tenant")


SERVICES, INTEGRATIONS = Base.metadata.tables["services"], Base.metadata.tables["integrations"]
TABLES = [SERVICES, INTEGRATIONS, LucentBase.metadata.tables["lucent_secrets"]]


def service(id_: int = 1, **values: Any) -> Service:
    given: dict[str, Any] = {
        "plain": VALUE,
        "lazy": VALUE,
        "mutable": VALUE,
        "theirs": VALUE,
        "typed": Account("sk_live_1"),
        "names": {"a": "b"},
    }
    return Service(id=id_, **{**given, **values})


def fill(session: Session) -> None:
    session.add(service())
    session.add(Integration(tenant="t1", credentials=VALUE))
    LucentSecrets(session).set(KEY, VALUE)
    session.commit()


def stored(session: Session) -> list[Any]:
    """The bytes of every value."""
    columns = [column for table in TABLES for column in table.c if str(column.type) == "BLOB"]
    assert len(columns) == 8
    statements: list[sa.Select[Any]] = [
        sa.select(sa.literal_column(c.name)).select_from(c.table) for c in columns
    ]
    return [list(map(bytes, session.scalars(statement).all())) for statement in statements]


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    for metadata in (Base.metadata, LucentBase.metadata):
        metadata.create_all(engine)
    with Session(engine) as session:
        fill(session)
        yield session


def the(session: Session) -> Service:
    return session.get_one(Service, 1)


def bound(session: Session) -> Integration:
    return session.get_one(Integration, "t1")


def set_and_flush(name: str) -> Callable[[Session], None]:
    def write(session: Session) -> None:
        row = the(session)
        setattr(row, name, str(getattr(row, name)))
        row.note = "edited"
        session.flush()

    return write


def edit_inside(session: Session) -> None:
    row = the(session)
    row.mutable["scopes"].append(str(row.mutable))
    session.flush()


def edit_a_name(session: Session) -> None:
    row = the(session)
    row.mutable[str(row.plain)] = 1
    session.flush()


def edit_a_mutable_dict(session: Session) -> None:
    row = the(session)
    row.theirs["a"] = PRINT
    session.flush()


def add_an_object(session: Session) -> None:
    session.add(service(2, plain=[PRINT]))
    session.flush()


def set_a_row_bound(session: Session) -> None:
    row = bound(session)
    row.credentials = str(row.credentials)
    session.flush()


def set_a_payload(session: Session) -> None:
    secret = session.get_one(LucentSecret, tuple(KEY.split(":")))
    secret.payload = {"value": f"{secret.payload}"}
    session.flush()


def expecting(session: Session) -> None:
    secrets = LucentSecrets(session)
    info = secrets.info(KEY)
    assert info is not None
    secrets.set(KEY, str(secrets.get(KEY)), expected=info.token)


def through_json_serializer(session: Session) -> None:
    engine = create_engine(
        session.get_bind().engine.url, json_serializer=json.dumps, json_deserializer=json.loads
    )
    try:
        with engine.connect() as connection:
            connection.execute(update(SERVICES).values(plain={"a": "<redacted dict>"}))
    finally:
        engine.dispose()


WRITES: dict[str, Callable[[Session], object]] = {
    **{f"attribute, {name}": set_and_flush(name) for name in ("plain", "lazy", "mutable", "typed")},
    "MutableDict": edit_a_mutable_dict,
    "typed, inside": lambda s: s.execute(update(Service).values(typed=Account(PRINT))),
    "typed, a name": lambda s: s.execute(update(Service).values(names={PRINT: ""})),
    "edit inside": edit_inside,
    "edit of a name": edit_a_name,
    "row-bound": set_a_row_bound,
    "payload": set_a_payload,
    "new object": add_an_object,
    "orm update": lambda s: s.execute(update(Service).values(plain={"a": [PRINT]})),
    "orm update, bulk": lambda s: s.execute(update(Service), [{"id": 1, "plain": PRINT}]),
    "orm insert, bulk": lambda s: s.execute(
        insert(Integration), bound_rows(Integration, [{"tenant": "t2", "credentials": PRINT}])
    ),
    "bulk_save": lambda s: s.bulk_save_objects([service(2, lazy=PRINT)]),
    "core": lambda s: s.execute(SERVICES.update(), {"plain": {PRINT: 1}}),
    "core, many": lambda s: s.execute(
        SERVICES.update().where(SERVICES.c.id == sa.bindparam("key")),
        [{"key": 1, "plain": 1}, {"key": 1, "plain": PRINT}],
    ),
    "core, literal": lambda s: s.execute(
        SERVICES.update().values(plain=sa.literal(PRINT, SERVICES.c.plain.type))
    ),
    "core, bound": lambda s: s.execute(
        INTEGRATIONS.update().values(credentials=Bound(PRINT, row=("t1",)))
    ),
    "set": lambda s: LucentSecrets(s).set(KEY, PRINT),
    "set, expected": expecting,
    "set_many": lambda s: LucentSecrets(s).set_many(
        {"tenant:t2:stripe:apiKey": 1, KEY: {"a": PRINT}}
    ),
    "json_serializer": through_json_serializer,
}


@everywhere("write", WRITES, on_servers=list(WRITES)[::8])
def test_a_print_is_refused_and_what_was_stored_stays(session: Session, write: str) -> None:
    before = stored(session)
    session.commit()
    with pytest.raises(LucentError) as caught:
        WRITES[write](session)
    assert isinstance(caught.value, SerializationError)
    assert "printed" in str(caught.value) or write == "attribute, typed"
    assert "sk_live_1" not in str(caught.value)
    session.rollback()
    assert stored(session) == before
    assert the(session).plain == VALUE
    assert bound(session).credentials == LucentSecrets(session).get(KEY) == VALUE


def test_the_async_repository_refuses_a_print(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(LucentBase.metadata.create_all)
        async with AsyncSession(engine) as session:
            secrets = AsyncLucentSecrets(session)
            await secrets.set(KEY, VALUE)
            with pytest.raises(SerializationError, match="printed"):
                await secrets.set(KEY, str(await secrets.require(KEY)))
            assert await secrets.require(KEY) == VALUE
            await session.commit()

    run_async(work)


@pytest.mark.parametrize("type_", [JSON(), Text()], ids=["JSON", "Text"])
def test_a_print_in_a_plaintext_column_is_not_sealed(engine: Engine, type_: Any) -> None:
    table = Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("credentials", type_),
    )
    table.metadata.create_all(engine)
    documents = [VALUE, {"token": PRINT}]
    with engine.begin() as connection:
        connection.execute(
            table.insert(),
            [
                {"credentials": json.dumps(each) if isinstance(type_, Text) else each}
                for each in documents
            ],
        )
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with pytest.raises(RotationError, match=r"1 values of users\.credentials"):
            encrypt_column("users", "credentials", existing_type=type_, operations=operations)
    with engine.connect() as connection:
        kept = connection.scalars(sa.select(table.c.credentials).order_by(table.c.id)).all()
    assert [json.loads(each) if isinstance(each, str) else each for each in kept] == documents
