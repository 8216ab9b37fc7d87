"""SQLAlchemy-Continuum: each version of a row has its values sealed for the version's own row."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import sqlalchemy_continuum as continuum
from sqlalchemy import Engine, LargeBinary, String, select, type_coerce, update
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    SerializationError,
    TamperedError,
    retire_check,
    rotate,
    row_bound,
    set_default_keyring,
    status,
    verify,
)


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    continuum.make_versioned(user_cls=None)

    class Base(DeclarativeBase):
        type_annotation_map: ClassVar = {str: String(50)}

    class Account(Base):
        __tablename__ = "accounts"
        __versioned__: ClassVar[dict[str, Any]] = {}

        id: Mapped[int] = mapped_column(primary_key=True)
        credentials: Mapped[Any] = mapped_column(EncryptedJSON.mutable())
        shared: Mapped[Any] = mapped_column(
            EncryptedJSON(lazy=True, context="accounts.shared"), nullable=True
        )

    class Lazy(Base):
        __tablename__ = "lazies"
        __versioned__: ClassVar[dict[str, Any]] = {}

        id: Mapped[int] = mapped_column(primary_key=True)
        note: Mapped[str]
        credentials: Mapped[Any] = mapped_column(EncryptedJSON(lazy=True))

    class Integration(Base):
        __tablename__ = "integrations"
        __versioned__: ClassVar[dict[str, Any]] = {}

        id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
        tenant: Mapped[str]
        credentials: Mapped[Any] = row_bound("id", "tenant")

    configure_mappers()
    Base.account = Account
    Base.lazy = Lazy
    Base.integration = Integration
    yield Base
    continuum.remove_versioning()


@pytest.fixture
def session(engine: Engine, models: Any) -> Iterator[Session]:
    models.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


def commit(session: Session) -> None:
    with warnings.catch_warnings():
        # Continuum's own, from its hook on flush.
        warnings.simplefilter("ignore", SAWarning)
        session.commit()


def test_versions_open_and_go_back(session: Session, models: Any) -> None:
    account = models.account(credentials={"n": 1})
    session.add(account)
    commit(session)
    account.credentials["n"] = 2
    commit(session)
    assert [version.credentials for version in account.versions] == [{"n": 1}, {"n": 2}]
    account.versions[0].revert()
    commit(session)
    assert account.credentials == {"n": 1}


def test_row_bound_versions_open_in_their_own_rows(session: Session, models: Any) -> None:
    integration = models.integration(tenant="a", credentials={"n": 1})
    session.add(integration)
    commit(session)
    integration.credentials = {"n": 2}
    commit(session)
    assert integration.credentials == {"n": 2}
    integration.tenant = "b"
    commit(session)
    versions = [(v.tenant, v.credentials["n"]) for v in integration.versions]
    assert versions == [("a", 1), ("a", 2), ("b", 2)]
    integration.versions[0].revert()
    commit(session)
    assert (integration.tenant, integration.credentials) == ("a", {"n": 1})

    version = continuum.version_class(models.integration)
    copied = select(type_coerce(models.integration.__table__.c.credentials, LargeBinary()))
    bytes_of_the_row = session.scalars(copied).one()
    session.execute(
        update(version.__table__).values(credentials=type_coerce(bytes_of_the_row, LargeBinary()))
    )
    session.expire_all()
    with pytest.raises(TamperedError):
        assert integration.versions[0].credentials


def test_rotation_finds_the_version_tables(
    session: Session, models: Any, promoted: Keyring
) -> None:
    engine: Any = session.get_bind()
    account = models.account(credentials={"n": 1}, shared={"n": 1})
    integration = models.integration(tenant="a", credentials={"n": 1})
    session.add_all([account, integration])
    commit(session)
    account.credentials["n"] = 2
    integration.credentials = {"n": 2}
    commit(session)
    tables = {row.table for row in status(engine, models).rows}
    assert tables == {"accounts", "accounts_version", "integrations", "integrations_version"}
    set_default_keyring(promoted)
    assert rotate(engine, models).ok
    assert verify(engine, models, keyring=promoted.without("v1")).ok
    retire_check(engine, "v1", models, settle=0)
    session.expire_all()
    assert [version.credentials["n"] for version in integration.versions] == [1, 2]


def test_lazy_column_has_versions_if_it_shares_its_context(session: Session, models: Any) -> None:
    account = models.account(credentials={}, shared={"n": 1})
    session.add(account)
    commit(session)
    account.credentials["n"] = 2
    commit(session)
    assert [version.shared.open() for version in account.versions] == [{"n": 1}] * 2


def test_lazy_column_with_another_context_is_refused(session: Session, models: Any) -> None:
    lazy = models.lazy(note="a", credentials={"n": 1})
    session.add(lazy)
    commit(session)
    assert lazy.credentials.open() == {"n": 1}
    lazy.note = "b"
    with pytest.raises(SerializationError, match=r"given to lazies_version\.credentials"):
        commit(session)
