"""SQLAlchemy's dataclasses: models with row-bound fields, on every database."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from sqlalchemy import Engine, String, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    registry,
)

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    LucentSecretMixin,
    LucentSecrets,
    row_bound,
)


class Base(MappedAsDataclass, DeclarativeBase):
    type_annotation_map: ClassVar = {str: String(50)}


class Bound(MappedAsDataclass):
    """A mixin, which has to be a dataclass too."""

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    secret: Mapped[dict[str, Any]] = row_bound("name")


class Device(Bound, Base):
    __tablename__ = "devices"

    colour: Mapped[str] = mapped_column(default="grey", kw_only=True)
    spare: Mapped[Any] = row_bound(
        "name", nullable=True, default=None, kw_only=True, none_as_null=True
    )
    made: Mapped[Any] = row_bound("name", default_factory=dict, kw_only=True, compare=False)
    late: Mapped[Any] = row_bound("name", init=False, nullable=True)
    tags: Mapped[list[str]] = mapped_column(
        EncryptedJSON.mutable(), default_factory=list, kw_only=True
    )


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def test_fields_are_stored_and_loaded(session: Session) -> None:
    device = Device("d", {"n": 1})
    assert (device.secret, device.spare, device.made) == ({"n": 1}, None, {})
    session.add(device)
    session.commit()
    session.expunge_all()
    device = session.scalars(select(Device)).one()
    assert (device.secret, device.spare, device.made) == ({"n": 1}, None, {})
    device.tags.append("x")
    device.late = {"n": 2}
    device.secret = {"n": 3}
    session.commit()
    session.refresh(device, ["secret", "tags"])
    assert (device.secret, device.late, device.tags) == ({"n": 3}, {"n": 2}, ["x"])


def test_repr_and_asdict_are_those_of_a_dataclass(session: Session) -> None:
    session.add(Device("d", {"token": "hunter2"}, spare={"token": "hunter2"}))
    session.commit()
    device = session.scalars(select(Device)).one()
    assert "hunter2" not in repr(device)
    assert "secret" not in repr(device)
    assert dataclasses.asdict(device)["secret"] == {"token": "hunter2"}
    names = [field.name for field in dataclasses.fields(Device)]
    assert names[:2] == ["name", "secret"]
    assert Device("d", {"n": 1}) == Device("d", {"n": 1}, made={"n": 2})
    assert Device("d", {"n": 1}) != Device("d", {"n": 2})


def test_decorated_class_is_a_dataclass_too(engine: Engine) -> None:
    own = registry()

    @own.mapped_as_dataclass
    class Lamp:
        __tablename__ = "lamps"

        name: Mapped[str] = mapped_column(String(50), primary_key=True)
        secret: Mapped[dict[str, Any]] = row_bound("name")

    own.metadata.create_all(engine)
    make: Any = Lamp
    with Session(engine) as session:
        session.add(make("x", {"n": 1}))
        session.commit()
        assert session.scalars(select(Lamp)).one().secret == {"n": 1}
    own.dispose()


@pytest.mark.parametrize(
    "bases",
    [
        (LucentSecretMixin, Base),
        (MappedAsDataclass, LucentSecretMixin, DeclarativeBase),
    ],
)
def test_mixin_of_the_store_is_refused_and_says_what_works(bases: tuple[type, ...]) -> None:
    with pytest.raises(ConfigurationError, match="a base of its own in the same metadata"):
        type("Secret", bases, {"__tablename__": "app_secrets"})


def test_store_of_secrets_is_in_the_same_metadata(engine: Engine) -> None:
    class SecretsBase(DeclarativeBase):
        metadata = Base.metadata

    class Secret(LucentSecretMixin, SecretsBase):
        __tablename__ = "app_secrets"

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        LucentSecrets(session, model=Secret).set("tenant:a:stripe:apiKey", {"n": 1})
        session.commit()
        assert session.scalars(select(Secret)).one().payload == {"n": 1}
    Base.metadata.remove(Secret.__table__)  # type: ignore[arg-type]
