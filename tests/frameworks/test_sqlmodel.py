"""SQLModel: tables with sealed and row-bound fields, and the store of secrets beside them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, String
from sqlalchemy.orm import DeclarativeBase, registry
from sqlmodel import Field, Session, SQLModel, select

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    LucentSecretMixin,
    LucentSecrets,
    Sealed,
    SerializationError,
    TamperedError,
    rotate,
    row_bound,
    verify,
)


class Models(SQLModel, registry=registry()):
    """A base with a registry of its own, so that no other test's tables are in it."""


class Hero(Models, table=True):
    __tablename__ = "heroes"

    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    tenant: str = Field(sa_type=String(50))
    credentials: dict[str, Any] = Field(sa_type=EncryptedJSON)
    bound: dict[str, Any] = Field(sa_type=EncryptedJSON(bound_to=["id", "tenant"]))
    spare: dict[str, Any] | None = Field(
        default=None, sa_type=EncryptedJSON(none_as_null=True, bound_to=["id"])
    )


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Models.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Hero(tenant="a", credentials={"n": 1}, bound={"n": 1}))
        session.commit()
        yield session


def test_fields_are_stored_and_loaded(session: Session) -> None:
    hero = session.exec(select(Hero)).one()
    assert (hero.credentials, hero.bound, hero.spare) == ({"n": 1}, {"n": 1}, None)
    engine: Any = session.get_bind()
    assert verify(engine, Models).opened == 2


def test_fields_are_validated(session: Session) -> None:
    given = {"tenant": "b", "credentials": {"n": 1}, "bound": {"n": 2}}
    hero = Hero.model_validate(given)
    session.add(hero)
    session.commit()
    assert hero.bound == {"n": 2}


@pytest.mark.parametrize("read_before_flush", [True, False])
def test_row_bound_field_is_set_again(session: Session, read_before_flush: bool) -> None:
    hero = session.exec(select(Hero)).one()
    hero.bound = {"n": 2}
    hero.spare = {"n": 3}
    if read_before_flush:
        assert (hero.bound, hero.spare) == ({"n": 2}, {"n": 3})
    session.commit()
    assert (hero.bound, hero.spare) == ({"n": 2}, {"n": 3})
    session.refresh(hero, ["bound"])
    assert hero.bound == {"n": 2}


def test_row_bound_field_moves_with_its_row(session: Session) -> None:
    hero = session.exec(select(Hero)).one()
    assert hero.bound == {"n": 1}
    hero.tenant = "b"
    session.commit()
    assert (hero.tenant, hero.bound) == ("b", {"n": 1})


def test_row_bound_field_does_not_open_in_another_row(session: Session) -> None:
    session.add(Hero(tenant="b", credentials={}, bound={"n": 2}))
    session.commit()
    first, second = session.exec(select(Hero).order_by(Hero.tenant)).all()
    sealed = session.exec(select(Hero.bound).where(Hero.id == first.id)).one()
    assert isinstance(sealed, Sealed)
    with pytest.raises(TamperedError):
        sealed.open(row=(second.id, "b"))
    assert sealed.open(row=(first.id, "a")) == {"n": 1}


def test_binding_field_in_another_form_is_refused(session: Session) -> None:
    seven: Any = 7
    session.add(Hero(tenant=seven, credentials={}, bound={}))
    with pytest.raises(ConfigurationError, match="was given one of type int"):
        session.commit()


def test_value_that_is_no_json_is_refused(session: Session) -> None:
    session.add(Hero(tenant="b", credentials={}, bound={"at": object()}))
    with pytest.raises(SerializationError):
        session.commit()


def test_repr_and_dump_show_no_value_that_was_not_read(session: Session) -> None:
    hero = session.exec(select(Hero)).one()
    session.refresh(hero)
    assert "'n'" not in repr(hero)


def test_rotation_finds_the_fields(session: Session, promoted: Any) -> None:
    engine: Any = session.get_bind()
    assert rotate(engine, Models, keyring=promoted).rotated == 2


# -- what does not mix with pydantic ---------------------------------------------------------------


@pytest.mark.parametrize("table", [True, False])
def test_row_bound_in_a_class_body_is_refused_and_says_what_works(table: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"Field\(sa_type=EncryptedJSON\(bound_to="):

        class Refused(Models, table=table):
            __tablename__ = "refused"

            id: str = Field(primary_key=True)
            credentials: Any = row_bound("id")


@pytest.mark.parametrize("bases", [(LucentSecretMixin, Models), (Models, LucentSecretMixin)])
def test_mixin_of_the_store_is_refused_and_says_what_works(bases: tuple[type, ...]) -> None:
    metaclass: Any = type(Models)
    with pytest.raises(ConfigurationError, match="a base of its own in the same metadata"):
        metaclass("Secret", bases, {"__module__": __name__, "__tablename__": "s"}, table=True)


def test_store_of_secrets_is_in_the_same_metadata(engine: Engine) -> None:
    class Own(SQLModel, registry=registry()):
        pass

    class SecretsBase(DeclarativeBase):
        metadata = Own.metadata

    class Secret(LucentSecretMixin, SecretsBase):
        __tablename__ = "app_secrets"

    assert isinstance(Own.metadata, MetaData)
    Own.metadata.create_all(engine)
    with Session(engine) as session:
        secrets = LucentSecrets(session, model=Secret)
        secrets.set("tenant:a:stripe:apiKey", {"n": 1})
        session.commit()
        assert session.exec(select(Secret)).one().payload == {"n": 1}
    assert verify(engine, Own.metadata).opened == 1
