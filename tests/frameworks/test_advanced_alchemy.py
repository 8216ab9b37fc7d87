"""advanced-alchemy with Litestar: bases, repositories, services and DTOs on sealed columns."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from advanced_alchemy.base import UUIDAuditBase, create_registry
from advanced_alchemy.extensions.litestar import (
    SQLAlchemyAsyncConfig,
    SQLAlchemyDTO,
    SQLAlchemyDTOConfig,
    SQLAlchemyPlugin,
)
from advanced_alchemy.filters import LimitOffset
from advanced_alchemy.repository import SQLAlchemyAsyncRepository, SQLAlchemySyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from litestar import Litestar, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from litestar.testing import TestClient
from sqlalchemy import URL, Engine, MetaData, NullPool, String, create_engine, insert
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    Keyring,
    LucentSecretMixin,
    LucentSecrets,
    UnsupportedOperationError,
    bound_rows,
    rotate,
    row_bound,
    verify,
)


class Base(UUIDAuditBase):
    """A primary key and times by advanced-alchemy's own types."""

    __abstract__ = True
    registry = create_registry()
    metadata = MetaData()


class Integration(Base):
    __tablename__ = "integrations"

    tenant: Mapped[str] = mapped_column(String(50))
    credentials: Mapped[dict[str, Any]] = mapped_column(EncryptedJSON)
    bound: Mapped[dict[str, Any]] = row_bound("id", "tenant")


class AsyncRepository(SQLAlchemyAsyncRepository[Integration]):
    model_type = Integration


class Service(SQLAlchemyAsyncRepositoryService[Integration, AsyncRepository]):
    repository_type = AsyncRepository


class Repository(SQLAlchemySyncRepository[Integration]):
    model_type = Integration


class Written(SQLAlchemyDTO[Integration]):
    config = SQLAlchemyDTOConfig(exclude={"id", "created_at", "updated_at"})


class Patched(SQLAlchemyDTO[Integration]):
    config = SQLAlchemyDTOConfig(exclude={"id", "created_at", "updated_at"}, partial=True)


class Read(SQLAlchemyDTO[Integration]):
    config = SQLAlchemyDTOConfig(exclude={"created_at", "updated_at"})


class Listed(SQLAlchemyDTO[Integration]):
    config = SQLAlchemyDTOConfig(include={"id", "tenant"})


@post("/integrations", dto=Written, return_dto=Read)
async def create(
    data: JSONBody[Integration], db_session: NamedDependency[AsyncSession]
) -> Integration:
    return await Service(session=db_session).create(data, auto_commit=True)


@get("/integrations", return_dto=Listed)
async def listed(db_session: NamedDependency[AsyncSession]) -> list[Integration]:
    return list(await Service(session=db_session).get_many(LimitOffset(10, 0)))


@get("/integrations/{integration_id:uuid}", return_dto=Read)
async def read(
    integration_id: FromPath[uuid.UUID], db_session: NamedDependency[AsyncSession]
) -> Integration:
    return await Service(session=db_session).get(integration_id)


@patch("/integrations/{integration_id:uuid}", dto=Patched, return_dto=Read)
async def change(
    integration_id: FromPath[uuid.UUID],
    data: JSONBody[Integration],
    db_session: NamedDependency[AsyncSession],
) -> Integration:
    return await Service(session=db_session).update(data, item_id=integration_id, auto_commit=True)


@pytest.fixture
def client(async_url: URL) -> Iterator[TestClient[Litestar]]:
    engine = create_async_engine(async_url, poolclass=NullPool)
    config = SQLAlchemyAsyncConfig(engine_instance=engine, create_all=True, metadata=Base.metadata)
    plugin = SQLAlchemyPlugin(config)
    app = Litestar([create, listed, read, change], plugins=[plugin], debug=False)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


GIVEN = {"tenant": "a", "credentials": {"k": {"deep": [1, None]}}, "bound": {"n": 1}}


def test_documents_go_in_and_out_through_dtos(client: TestClient[Litestar]) -> None:
    answer = client.post("/integrations", json=GIVEN)
    assert answer.status_code == 201
    created = answer.json()
    assert {name: created[name] for name in GIVEN} == GIVEN
    assert client.get(f"/integrations/{created['id']}").json() == created
    assert client.get("/integrations").json() == [{"id": created["id"], "tenant": "a"}]


def test_partial_updates_change_what_they_name(client: TestClient[Litestar]) -> None:
    created = client.post("/integrations", json=GIVEN).json()
    path = f"/integrations/{created['id']}"
    assert client.patch(path, json={"credentials": {"n": 2}}).status_code == 200
    assert client.patch(path, json={"bound": {"n": 2}}).status_code == 200
    moved = client.patch(path, json={"tenant": "b", "bound": {"n": 3}})
    assert moved.status_code == 200
    expected = {"tenant": "b", "credentials": {"n": 2}, "bound": {"n": 3}}
    assert client.get(path).json() == {**expected, "id": created["id"]}
    # The value was not opened, so it cannot be sealed for another row.
    assert client.patch(path, json={"tenant": "c"}).status_code == 500
    assert client.get(path).json() == {**expected, "id": created["id"]}


# -- without a web framework -----------------------------------------------------------------------


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def test_repository_adds_updates_upserts_and_deletes(session: Session, promoted: Keyring) -> None:
    repository = Repository(session=session)
    added = repository.add_many([Integration(**GIVEN), Integration(**{**GIVEN, "tenant": "b"})])
    session.commit()
    first, second = (each.id for each in added)
    assert [each.bound for each in repository.get_many()] == [{"n": 1}] * 2
    repository.update(Integration(id=first, bound={"n": 2}))
    repository.upsert(Integration(id=second, tenant="b", credentials={}, bound={"n": 3}))
    session.commit()
    session.expunge_all()
    assert repository.get(first).bound == {"n": 2}
    assert repository.get(first).credentials == GIVEN["credentials"]
    assert repository.get(second).bound == {"n": 3}
    repository.delete(second)
    session.commit()
    engine: Any = session.get_bind()
    assert rotate(engine, Base, keyring=promoted).rotated == 2
    assert verify(engine, Base, keyring=promoted.without("v1")).ok


def test_guid_is_bound_to_in_the_one_form_that_comes_back(session: Session) -> None:
    id_ = uuid.uuid4()
    rows = [{**GIVEN, "id": id_}]
    session.execute(insert(Integration), bound_rows(Integration, rows))
    session.commit()
    assert session.get_one(Integration, id_).bound == {"n": 1}
    given: Any = str(id_).upper()
    session.add(Integration(**{**GIVEN, "id": given}))
    with pytest.raises(ConfigurationError, match="binding column id"):
        session.flush()


def test_moved_row_is_refused_unless_its_value_was_read(session: Session) -> None:
    repository = Repository(session=session)
    id_ = repository.add(Integration(**GIVEN)).id
    session.commit()
    session.expunge_all()
    found = repository.get(id_)
    found.tenant = "b"
    with pytest.raises(UnsupportedOperationError, match="sealed for its row"):
        session.flush()
    session.rollback()
    found = repository.get(id_)
    assert found.bound == {"n": 1}
    found.tenant = "b"
    session.commit()
    assert found.bound == {"n": 1}


def test_store_of_secrets_is_on_a_base_of_advanced_alchemy(databases: Any) -> None:
    from advanced_alchemy.base import CommonTableAttributes
    from sqlalchemy.orm import DeclarativeBase

    class Own(CommonTableAttributes, DeclarativeBase):
        metadata = MetaData()

    class Secret(LucentSecretMixin, Own):
        __tablename__ = "app_secrets"

    engine = create_engine(databases.url("sqlite"))
    Own.metadata.create_all(engine)
    with Session(engine) as session:
        LucentSecrets(session, model=Secret).set("tenant:a:stripe:apiKey", {"n": 1})
        session.commit()
        found = session.query(Secret).one()
        assert found.to_dict()["payload"] == {"n": 1}
    Own.metadata.drop_all(engine)
    engine.dispose()
