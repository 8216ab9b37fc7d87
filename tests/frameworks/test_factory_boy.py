"""factory_boy over models with sealed columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import factory as factory_boy
import pytest
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from .admin import Account, Base, Lazy, Mutable, Plain, RowBound, Secret, Typed

factory: Any = factory_boy
Factory: Any = SQLAlchemyModelFactory

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def factory_of(model_: type[Any], session: Session, **fields: Any) -> Any:
    """A factory of `model_`, as a class statement would make it."""

    class Meta:
        model = model_
        sqlalchemy_session = session
        sqlalchemy_session_persistence = "commit"

    return type(Factory)(f"{model_.__name__}Factory", (Factory,), {"Meta": Meta, **fields})


def token() -> Any:
    return factory.Dict({"token": factory.Sequence("t-{}".format), "scopes": ["read"]})


@pytest.mark.parametrize("model", [Plain, Mutable, Lazy, RowBound])
def test_documents_are_made_and_stored(session: Session, model: type[Any]) -> None:
    made = factory_of(model, session, id=factory.Sequence(int), credentials=token())
    rows = made.create_batch(2)
    session.expire_all()
    values = [row.credentials.open() if model is Lazy else row.credentials for row in rows]
    assert values == [{"token": f"t-{number}", "scopes": ["read"]} for number in (0, 1)]


def test_typed_values_are_made_and_stored(session: Session) -> None:
    made = factory_of(Typed, session, credentials=factory.LazyFunction(lambda: Account("t-1")))
    row = made()
    session.expire_all()
    assert row.credentials == Account("t-1")


def test_secrets_are_made_and_stored(session: Session) -> None:
    made = factory_of(
        Secret,
        session,
        scope="tenant",
        owner_id=factory.Sequence("t{}".format),
        provider="stripe",
        name="apiKey",
        payload=token(),
    )
    rows = made.create_batch(2)
    session.expire_all()
    assert [row.payload["token"] for row in rows] == ["t-0", "t-1"]
    found = factory_of(Secret, session).create
    with pytest.raises(ValueError, match="scope"):
        found(scope="a:b", owner_id="c", provider="d", name="e", payload=1)
