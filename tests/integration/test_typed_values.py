"""Values of the user's own types, and values that are not opened at all, over real databases."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import pickle
from collections.abc import Callable
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    DecryptionError,
    EncryptedJSON,
    Keyring,
    SchemaMismatchError,
    Sealed,
    SerializationError,
    UnknownKeyVersionError,
    set_default_keyring,
)
from tests.conftest import KEY_2


@dataclasses.dataclass
class Account:
    email: str
    expires: dt.datetime | None = None


class Keys(TypedDict):
    public: str


class Settings(msgspec.Struct):
    rate: int


class Credentials(pydantic.BaseModel):
    user: str
    scopes: list[str] = []


class Base(DeclarativeBase):
    pass


class Typed(Base):
    __tablename__ = "typed"
    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[Account] = mapped_column(EncryptedJSON(schema=Account))
    keys: Mapped[Keys] = mapped_column(EncryptedJSON.mutable(schema=Keys), nullable=True)
    settings: Mapped[Settings | None] = mapped_column(EncryptedJSON(True, schema=Settings))
    credentials: Mapped[Credentials | None] = mapped_column(EncryptedJSON(schema=Credentials))
    several: Mapped[list[Account] | None] = mapped_column(EncryptedJSON(schema=list[Account]))
    lazy: Mapped[Any] = mapped_column(EncryptedJSON(lazy=True, schema=Account), nullable=True)


NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=dt.UTC)


def full() -> Typed:
    return Typed(
        id=1,
        account=Account("a@b", NOW),
        keys={"public": "p"},
        settings=Settings(5),
        credentials=Credentials(user="u", scopes=["a"]),
        several=[Account("c"), Account("d", NOW)],
        lazy=Account("lazy"),
    )


def check(typed: Typed) -> None:
    assert typed.account == Account("a@b", NOW)
    assert typed.keys == {"public": "p"}
    assert typed.settings == Settings(5)
    assert typed.credentials == Credentials(user="u", scopes=["a"])
    assert typed.several == [Account("c"), Account("d", NOW)]
    assert typed.lazy.open() == Account("lazy")


def test_values_of_each_kind_of_type_come_back(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(full())
        session.commit()
        typed = session.scalars(select(Typed)).one()
        check(typed)
        check(pickle.loads(pickle.dumps(typed)))
        assert "public" not in repr(typed.keys)
        typed.keys["public"] = "edited"
        typed.settings = None
        typed.credentials = None
        session.commit()
        assert (typed.keys, typed.settings, typed.credentials) == ({"public": "edited"}, None, None)


def test_values_come_back_over_async_drivers(run_async: Callable[..., Any]) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(full())
            await session.commit()
            check((await session.scalars(select(Typed))).one())

    run_async(work)


def documents(type_: EncryptedJSON) -> Table:
    return Table(
        "documents", MetaData(), Column("id", Integer, primary_key=True), Column("d", type_)
    )


@pytest.mark.parametrize("schema", [Account, Settings, Credentials, Keys, list[Account]])
def test_a_stored_document_that_no_longer_fits_names_its_path(engine: Engine, schema: Any) -> None:
    plain, typed = documents(EncryptedJSON()), documents(EncryptedJSON(schema=schema))
    plain.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(plain), {"d": {"unknown": "MARKER"}})
        with pytest.raises(SchemaMismatchError, match=r"\$") as caught:
            connection.scalar(select(typed.c.d))
        assert "MARKER" not in str(caught.value)


def test_a_value_of_another_type_is_refused(engine: Engine) -> None:
    typed = documents(EncryptedJSON(schema=Account))
    typed.create(engine)
    with engine.connect() as connection:
        for value in ({"email": "MARKER"}, Settings(1), Account(5)):  # type: ignore[arg-type]
            with pytest.raises(SerializationError) as caught:
                connection.execute(insert(typed), {"d": value})
            assert "MARKER" not in str(caught.value)
        assert connection.scalars(select(typed.c.id)).all() == []


def test_a_schema_goes_with_the_engines_own_serializer(url: Any) -> None:
    engine = create_engine(
        url,
        json_serializer=lambda value: json.dumps([value]),
        json_deserializer=lambda text: json.loads(text)[0],
    )
    typed = documents(EncryptedJSON(schema=Account))
    typed.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(typed), {"d": Account("x", NOW)})
        assert connection.scalar(select(typed.c.d)) == Account("x", NOW)
    typed.drop(engine)
    engine.dispose()


# -- lazy ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_selecting_100_000_rows_lazily_opens_none() -> None:
    """The keyring that reads has no key for a single row, so opening one would fail."""
    table = documents(EncryptedJSON(lazy=True))
    engine = create_engine("sqlite://")
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"d": {"n": n}} for n in range(100_000)])
        set_default_keyring(Keyring({"other": KEY_2}))
        rows = connection.scalars(select(table.c.d)).all()
        assert len(rows) == 100_000
        assert {row.key_version for row in rows} == {"v1"}
        assert len(set(rows)) == 100_000
        with pytest.raises(UnknownKeyVersionError):
            rows[77].open()
    engine.dispose()


def test_lazy_values_open_one_by_one(engine: Engine, keyring: Keyring) -> None:
    table = documents(EncryptedJSON(lazy=True))
    table.create(engine)
    with engine.connect() as connection:
        connection.execute(insert(table), [{"d": {"n": n}} for n in range(10)])
        connection.execute(insert(table).values(d=None))
        sealed = connection.scalars(select(table.c.d).order_by(table.c.id)).all()
        assert [value.open() for value in sealed] == [*({"n": n} for n in range(10)), None]
        assert all(isinstance(value, Sealed) for value in sealed)
        assert {value.fingerprint for value in sealed} == {keyring.fingerprint("v1")}
        assert sealed[3].open(keyring=keyring) == {"n": 3}
        with pytest.raises(DecryptionError):
            sealed[3].open(keyring=Keyring({"v1": KEY_2}))
        connection.execute(insert(table), {"id": 50, "d": sealed[3]})
        copied = connection.scalars(select(table.c.d).where(table.c.id == 50)).one()
        assert copied == sealed[3]
