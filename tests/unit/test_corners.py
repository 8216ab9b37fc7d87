"""Small behaviour that no other test comes by: what a class shows, copies, takes or refuses."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Column, DateTime, ForeignKey, Integer, MetaData, Table, create_engine, null
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    RotationError,
    row_bound,
    status,
    verify,
)
from sqlalchemy_lucent._schema import Schema
from sqlalchemy_lucent.migrations import CreateLucentSecretsOp, DropLucentSecretsOp
from sqlalchemy_lucent.models import UTCDateTime


def test_a_schema_shows_its_type() -> None:
    assert repr(Schema(dict[str, int])) == "<Schema of dict[str, int]>"


def test_what_alembic_check_shows_of_the_table_of_secrets() -> None:
    drop = DropLucentSecretsOp("vault", schema="app")
    assert drop.to_diff_tuple() == ("drop_lucent_secrets", "app", "vault")
    create = drop.reverse()
    assert isinstance(create, CreateLucentSecretsOp)
    assert create.to_diff_tuple() == ("create_lucent_secrets", "app", "vault")


def test_a_time_may_be_null() -> None:
    table = Table(
        "t", MetaData(), Column("id", Integer, primary_key=True), Column("at", UTCDateTime)
    )
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        table.create(connection)
        at = datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=UTC)
        connection.execute(table.insert(), [{"at": at}, {"at": None}])
        assert connection.scalars(table.select().with_only_columns(table.c.at)).all() == [at, None]
    engine.dispose()


def test_copies_of_a_tracked_document_are_tracked_no_more() -> None:
    class Base(DeclarativeBase): ...

    class Row(Base):
        __tablename__ = "rows"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[Any] = mapped_column(EncryptedJSON.mutable())

    row = Row(value={"a": [1]})
    for tracked in (row.value, row.value["a"]):
        shallow = copy.copy(tracked)
        assert shallow == tracked
        assert shallow is not tracked
    shallow = copy.copy(row.value)
    shallow["b"] = 1
    assert row.value == {"a": [1]}


# -- the type --------------------------------------------------------------------------------------


def test_a_null_of_sql_may_be_bound_as_a_value() -> None:
    table = Table("t", MetaData(), Column("value", EncryptedJSON))
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), [{"value": null()}])
        assert connection.exec_driver_sql("SELECT value FROM t").scalar() is None
    engine.dispose()


# -- targets ---------------------------------------------------------------------------------------


def test_targets_that_are_no_columns_are_refused_and_a_base_is_taken() -> None:
    class Base(DeclarativeBase): ...

    class Owner(Base):
        __tablename__ = "owners"
        id: Mapped[int] = mapped_column(primary_key=True)
        secret: Mapped[Any] = mapped_column(EncryptedJSON)
        children: Mapped[list[Child]] = relationship()

    class Child(Base):
        __tablename__ = "children"
        id: Mapped[int] = mapped_column(primary_key=True)
        owner_id: Mapped[int] = mapped_column(ForeignKey("owners.id"))

    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with pytest.raises(RotationError, match=r"Owner\.children is not a column attribute"):
        verify(engine, Owner.children)
    assert verify(engine, Owner.secret).ok
    assert status(engine, Base).rows == ()
    engine.dispose()


def test_a_column_bound_to_what_its_table_lacks_is_refused() -> None:
    table = Table(
        "t",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("secret", EncryptedJSON(bound_to=["tenant"])),
    )
    engine = create_engine("sqlite://")
    with pytest.raises(RotationError, match=r"t\.secret is bound to tenant, which its table does"):
        verify(engine, table)
    engine.dispose()


# -- row binding -----------------------------------------------------------------------------------


def test_row_bound_put_on_a_class_afterwards_is_refused() -> None:
    class Plain:
        pass

    Plain.secret = row_bound("id")  # type: ignore[attr-defined]
    for use in (lambda: Plain().secret, lambda: setattr(Plain(), "secret", 1)):  # type: ignore[attr-defined]
        with pytest.raises(ConfigurationError, match="written in the body of a class"):
            use()


def test_a_column_of_dates_is_no_column_to_bind_to() -> None:
    class Base(DeclarativeBase): ...

    class Row(Base):
        __tablename__ = "rows"
        at: Mapped[datetime] = mapped_column(DateTime, primary_key=True)
        secret: Mapped[Any] = row_bound("at")

    with pytest.raises(ConfigurationError, match="bind to str, int or UUID columns"):
        Row(secret=1)
