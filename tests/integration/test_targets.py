"""Which tables a target stands for: all of them, in whatever MetaData, and of one database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    text,
)
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    declarative_base,
    mapped_column,
    registry,
    relationship,
)

from sqlalchemy_lucent import (
    EncryptedJSON,
    KeyInUseError,
    Keyring,
    RotationError,
    retire_check,
    rotate,
    status,
    verify,
)
from sqlalchemy_lucent.rotation import needs_rotation


def names(engine: Engine, targets: Any) -> set[str]:
    return {row.table for row in status(engine, targets).rows}


def sealed_table(name: str, metadata: MetaData, **options: Any) -> Table:
    columns = Column("id", Integer, primary_key=True), Column("payload", EncryptedJSON)
    return Table(name, metadata, *columns, **options)


def fill(engine: Engine, *tables: Table) -> None:
    for table in tables:
        table.create(engine)
        with engine.begin() as connection:
            connection.execute(insert(table), [{"id": n, "payload": n} for n in (1, 2, 3)])


def test_a_base_is_all_of_its_classes_whatever_their_metadata(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    class Root(DeclarativeBase):
        pass

    class User(Root):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        payload: Mapped[Any] = mapped_column(EncryptedJSON)

    class Rep(Root):
        __abstract__ = True
        metadata = MetaData()

    class Report(Rep):
        __tablename__ = "reports"
        id: Mapped[int] = mapped_column(primary_key=True)
        payload: Mapped[Any] = mapped_column(EncryptedJSON)

    class Archive(Root):
        __table__ = sealed_table("archives", MetaData())

    class Imperative:
        pass

    sealed_table("events", Rep.metadata)  # which no class is mapped on
    Root.registry.map_imperatively(Imperative, sealed_table("imperative", MetaData()))
    every = [*Root.metadata.tables.values(), *Rep.metadata.tables.values()]
    fill(engine, *every, Archive.__table__, Imperative.__table__)  # type: ignore[attr-defined]
    all_names = {"users", "reports", "archives", "events", "imperative"}

    assert names(engine, Root) == names(engine, Root.registry) | {"events"} == all_names
    assert names(engine, Rep) == {"reports", "events"}
    with pytest.raises(KeyInUseError, match=r"3 in reports\.payload"):
        retire_check(engine, "v1", Root)
    assert needs_rotation(engine, Root, keyring=promoted)
    rotate(engine, Root.metadata, keyring=promoted)
    assert not verify(engine, Root, keyring=promoted.without("v1")).ok
    assert rotate(engine, Root, keyring=promoted).rotated == 12
    assert verify(engine, Root, keyring=promoted.without("v1")).opened == 15
    retire_check(engine, "v1", Root)


def test_bases_of_every_make(engine: Engine) -> None:
    classic = declarative_base()
    first, second = registry(), registry(metadata=classic.metadata)

    class Classic(classic):  # type: ignore[misc, valid-type]
        __table__ = sealed_table("classic", classic.metadata)

    @first.mapped
    class First:
        __table__ = sealed_table("first", MetaData())

    @second.mapped
    class Second:
        __table__ = sealed_table("second", MetaData())

    fill(engine, Classic.__table__, First.__table__, Second.__table__)
    assert names(engine, classic) == {"classic"}
    assert names(engine, first) == {"first"}
    # Of a registry, its own MetaData and those of its classes.
    assert names(engine, second) == {"classic", "second"}
    assert names(engine, [classic, first, second]) == {"classic", "first", "second"}


def test_mixins_inheritance_and_what_is_beside(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Sealed:
        payload: Mapped[Any] = mapped_column(EncryptedJSON)

    class Parent(Sealed, Base):
        __tablename__ = "parents"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(9))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "parent"}  # noqa: RUF012

    class Joined(Parent):
        __tablename__ = "joined"
        id: Mapped[int] = mapped_column(ForeignKey("parents.id"), primary_key=True)
        more: Mapped[Any] = mapped_column(EncryptedJSON)
        __mapper_args__ = {"polymorphic_identity": "joined"}  # noqa: RUF012

    class Single(Parent):
        __mapper_args__ = {"polymorphic_identity": "single"}  # noqa: RUF012
        extra: Mapped[Any] = mapped_column(EncryptedJSON, nullable=True)

    class Concrete(ConcreteBase, Sealed, Base):
        __tablename__ = "concrete"
        id: Mapped[int] = mapped_column(primary_key=True)
        __mapper_args__ = {"concrete": True, "polymorphic_identity": "concrete"}  # noqa: RUF012

    class Below(Concrete):
        __tablename__ = "below"
        id: Mapped[int] = mapped_column(primary_key=True)
        payload: Mapped[Any] = mapped_column(EncryptedJSON)
        __mapper_args__ = {"concrete": True, "polymorphic_identity": "below"}  # noqa: RUF012

    secondary = sealed_table("association", Base.metadata)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Joined(id=1, payload=1, more=1), Single(id=2, payload=1, extra=1)])
        session.add_all([Concrete(id=1, payload=1), Below(id=1, payload=1)])
        session.execute(insert(secondary), [{"id": 1, "payload": 1}])
        session.commit()

    mapped = {"parents", "joined", "concrete", "below"}
    assert names(engine, Base) == {*mapped, "association"}
    assert names(engine, Sealed) == mapped
    assert names(engine, Parent) == names(engine, Joined) == {"parents", "joined"}
    assert names(engine, Concrete) == {"concrete", "below"}
    assert {row.column for row in status(engine, Parent).rows} == {"payload", "more", "extra"}


def test_a_class_that_leads_to_no_table_is_no_target(engine: Engine) -> None:
    class Alone:
        pass

    with pytest.raises(RotationError, match="target is a MetaData"):
        status(engine, Alone)


def test_two_tables_of_one_name_are_refused(engine: Engine) -> None:
    one, other = sealed_table("users", MetaData()), sealed_table("users", MetaData())
    fill(engine, one)
    with pytest.raises(RotationError, match="two tables users"):
        rotate(engine, [one, other])


@pytest.mark.parametrize("work", [rotate, status, verify, needs_rotation])
def test_a_table_that_is_missing_is_named(engine: Engine, work: Any) -> None:
    metadata = MetaData()
    there, missing = sealed_table("there", metadata), sealed_table("missing", metadata)
    fill(engine, there)
    with pytest.raises(RotationError, match=r"not in this database: missing\. "):
        work(engine, metadata)
    with pytest.raises(RotationError, match=r"not in this database: missing\. "):
        retire_check(engine, "v1", missing)


# -- several databases -----------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Any) -> Iterator[Flask]:
    app = Flask("app")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/main.db"
    app.config["SQLALCHEMY_BINDS"] = {"other": f"sqlite:///{tmp_path}/other.db"}
    with app.app_context():
        yield app


def test_what_is_behind_another_bind_key_is_refused_by_name(app: Flask, promoted: Keyring) -> None:
    db = SQLAlchemy(app)

    class User(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)
        payload = Column(EncryptedJSON)

    class Meter(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "meters"
        __bind_key__ = "other"
        id = Column(Integer, primary_key=True)
        payload = Column(EncryptedJSON)

    db.create_all()
    db.session.add_all([User(id=1, payload=1), Meter(id=1, payload=1)])
    db.session.commit()
    every: list[Any] = [db.Model, [User, Meter], [db.metadata, Meter]]
    for targets in every:
        for work in (rotate, status, verify, lambda *given: retire_check(given[0], "v1", given[1])):
            with pytest.raises(RotationError, match=r"meters .*db\.metadatas\['other'\]") as caught:
                work(db.engine, targets)
            assert "users" not in str(caught.value)
    for key in (None, "other"):
        rotate(db.engines[key], db.metadatas[key], keyring=promoted)
        retire_check(db.engines[key], "v1", db.metadatas[key])
    for engine in db.engines.values():
        engine.dispose()


def test_bind_keys_of_tables_without_secrets_do_not_matter(app: Flask, promoted: Keyring) -> None:
    db = SQLAlchemy(app)

    class User(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "users"
        id = Column(Integer, primary_key=True)
        payload = Column(EncryptedJSON)

    class Meter(db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "other"
        id = Column(Integer, primary_key=True)

    db.create_all()
    assert rotate(db.engine, db.Model, keyring=promoted).ok
    for engine in db.engines.values():
        engine.dispose()


def test_a_base_of_two_databases_is_refused_by_what_is_missing(tmp_path: Any) -> None:
    class Root(DeclarativeBase):
        pass

    class Local(Root):
        __tablename__ = "local"
        id: Mapped[int] = mapped_column(primary_key=True)
        payload: Mapped[Any] = mapped_column(EncryptedJSON)

    class Remote(Root):
        __tablename__ = "remote"
        id: Mapped[int] = mapped_column(primary_key=True)
        payload: Mapped[Any] = mapped_column(EncryptedJSON)

    here, there = (create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("here", "there"))
    Root.metadata.create_all(here, tables=[Local.__table__])  # type: ignore[list-item]
    Root.metadata.create_all(there, tables=[Remote.__table__])  # type: ignore[list-item]
    with Session(binds={Local: here, Remote: there}) as session:
        session.add_all([Local(payload=1), Remote(payload=1)])
        session.commit()
    with pytest.raises(RotationError, match=r"not in this database: remote\."):
        rotate(here, Root)
    assert rotate(here, Local).ok
    assert rotate(there, Remote).ok
    here.dispose()
    there.dispose()


def test_a_temporary_table_does_not_pass_for_the_one_that_it_hides(
    engine: Engine, promoted: Keyring
) -> None:
    table = sealed_table("users", MetaData())
    fill(engine, table)
    with engine.connect() as connection:
        connection.execute(text("CREATE TEMPORARY TABLE users (id INTEGER PRIMARY KEY)"))
        connection.commit()
        for work in (rotate, status, verify):
            with pytest.raises(RotationError, match="users is a temporary table"):
                work(connection, table)
            connection.rollback()
        connection.invalidate()
    assert rotate(engine, table, keyring=promoted).rotated == 3


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
    with pytest.raises(
        RotationError, match=r"t\.secret is bound to 'tenant', which its table does"
    ):
        verify(engine, table)
    engine.dispose()
