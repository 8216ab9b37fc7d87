"""polyfactory over models with sealed columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from polyfactory import Ignore, Use
from polyfactory.factories.sqlalchemy_factory import SQLAlchemyFactory
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import EncryptedJSON, SerializationError

from .admin import Account, Base, Lazy, Mutable, Plain, RowBound, Secret, Typed

pytestmark = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def factory_of(
    model: type[Any], session: Session, base: Any = SQLAlchemyFactory, **fields: Any
) -> Any:
    """A factory of `model`, as ``class Factory(SQLAlchemyFactory[model])`` would be."""
    members = {"__model__": model, "__session__": session, **fields}
    return type(base)(f"{model.__name__}Factory", (base,), members)


@pytest.mark.parametrize("model", [Plain, Mutable, Lazy])
def test_what_it_makes_up_for_a_sealed_column_is_refused_by_name(
    session: Session, model: type[Any]
) -> None:
    # Bytes; or, on SQLAlchemy 2.0, dicts of which next to all hold dates or decimals.
    with pytest.raises(SerializationError, match=r"\.credentials: \$.* convert it") as caught:
        factory_of(model, session).create_batch_sync(20)
    assert caught.value.__context__ is None


def test_a_schema_is_what_it_makes(session: Session) -> None:
    made = factory_of(Typed, session).create_sync()
    session.expire_all()
    assert type(made.credentials) is Account


class JSONFactory(SQLAlchemyFactory[Any]):
    """The recipe of docs/testing.md."""

    __is_base_factory__ = True

    @classmethod
    def get_sqlalchemy_types(cls) -> dict[Any, Callable[[], Any]]:
        def document() -> dict[str, Any]:
            return cls.__faker__.pydict(value_types=(str, int, bool, float))

        return {**super().get_sqlalchemy_types(), EncryptedJSON: document}


@pytest.mark.parametrize("model", [Plain, Mutable, Lazy])
def test_a_base_factory_makes_documents(session: Session, model: type[Any]) -> None:
    rows = factory_of(model, session, JSONFactory).create_batch_sync(3)
    session.expire_all()
    for row in rows:
        value = row.credentials.open() if model is Lazy else row.credentials
        assert isinstance(value, dict)


@pytest.mark.parametrize("model", [Plain, Typed])
def test_a_field_may_be_given(session: Session, model: type[Any]) -> None:
    value = Account("t-1") if model is Typed else ["t-1"]
    made = factory_of(model, session, credentials=Use(lambda: value)).create_sync()
    session.expire_all()
    assert made.credentials == value


def test_row_bound_attributes_are_given_to_the_call(session: Session) -> None:
    made = factory_of(RowBound, session).create_sync(credentials={"token": "t-1"})
    secret = factory_of(Secret, session, created_at=Ignore(), updated_at=Ignore()).create_sync(
        payload={"token": "t-2"}
    )
    session.expire_all()
    assert made.credentials == {"token": "t-1"}
    assert secret.payload == {"token": "t-2"}
    assert secret.key_version == "v1"
