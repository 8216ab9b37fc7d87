"""The key version of a sealed value as SQL, on each database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    func,
    insert,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import oracle
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import EncryptedJSON, Keyring, UnsupportedOperationError, set_default_keyring
from sqlalchemy_lucent._sql import key_id
from sqlalchemy_lucent.models import computed_key_version, key_version_type
from tests.conftest import KEY_2
from tests.databases import create_unguarded

ORACLE: Any = oracle.dialect()  # type: ignore[no-untyped-call]
FOREIGN = [
    b"",
    b":",
    b"v1:",
    b"v1",
    b'{"a":1}',
    b"\xff\xfe:\x01",
    b"v1:\x02" + b"x" * 40,
    b"a b:\x01xxxx",
    b"v\x00\xff:\x01xxxx",
    b"v1\n:\x01xxxx",
]


@pytest.fixture
def table() -> Table:
    return Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("data", EncryptedJSON),
    )


@pytest.fixture
def connection(
    engine: Engine, table: Table, keyring: Keyring, promoted: Keyring
) -> Iterator[Connection]:
    """Rows 1 and 2 under v1, row 3 under v2, row 4 NULL, rows from 10 on that are not sealed."""
    create_unguarded(table.metadata, engine)
    with engine.connect() as connection:
        connection.execute(insert(table), [{"id": 1, "data": 1}, {"id": 2, "data": [2]}])
        set_default_keyring(promoted)
        connection.execute(insert(table), {"id": 3, "data": {"c": 3}})
        connection.execute(insert(table).values(id=4))
        for id_, foreign in enumerate(FOREIGN, 10):
            raw = type_coerce(foreign, LargeBinary)
            connection.execute(insert(table).values(id=id_, data=raw))
        yield connection


def test_it_is_selected_and_is_null_for_what_is_not_sealed(
    connection: Connection, table: Table
) -> None:
    statement = select(table.c.data.key_version).order_by(table.c.id)
    versions = connection.scalars(statement).all()
    assert versions == ["v1", "v1", "v2", None, *[None] * len(FOREIGN)]


def test_it_filters_groups_and_sorts(connection: Connection, table: Table) -> None:
    version = table.c.data.key_version
    stale = select(table.c.id).where(version != "v2").order_by(table.c.id)
    assert connection.scalars(stale).all() == [1, 2]
    assert connection.scalars(select(table.c.id).where(version.in_(["v2"]))).all() == [3]
    assert connection.scalars(select(table.c.id).where(version == "V1")).all() == []
    counts = select(version, func.count()).where(version.is_not(None)).group_by(version)
    assert sorted(map(tuple, connection.execute(counts))) == [("v1", 2), ("v2", 1)]
    ordered = select(table.c.id).where(version.is_not(None)).order_by(version.desc(), table.c.id)
    assert connection.scalars(ordered).all() == [3, 1, 2]


def test_the_key_id_is_the_keys_fingerprint(
    connection: Connection, table: Table, promoted: Keyring
) -> None:
    statement = select(key_id(table.c.data)).order_by(table.c.id).limit(3)
    v1, v2 = promoted.fingerprint("v1"), promoted.fingerprint("v2")
    assert connection.scalars(statement).all() == [v1, v1, v2]


def test_versions_that_differ_in_case_are_two(connection: Connection, table: Table) -> None:
    set_default_keyring(Keyring({"V1": KEY_2}))
    connection.execute(insert(table), {"id": 5, "data": 1})
    version = table.c.data.key_version
    assert connection.scalars(select(table.c.id).where(version == "V1")).all() == [5]
    counts = select(func.count()).where(version.in_(["v1", "V1"])).group_by(version)
    assert sorted(connection.scalars(counts)) == [1, 2]


def test_it_works_on_orm_attributes(engine: Engine, keyring: Keyring, promoted: Keyring) -> None:
    class Base(DeclarativeBase):
        pass

    class Document(Base):
        __tablename__ = "orm_documents"
        id: Mapped[int] = mapped_column(primary_key=True)
        data: Mapped[int] = mapped_column(EncryptedJSON)

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Document(id=1, data=1))
        session.flush()
        set_default_keyring(promoted)
        session.add(Document(id=2, data=2))
        session.flush()
        version = Document.data.key_version
        assert session.scalars(select(Document).where(version == "v2")).one().id == 2
        session.execute(update(Document).where(version == "v1").values(data=3))
        assert session.scalars(select(version)).all() == ["v2", "v2"]


def test_an_index_over_it_is_made_and_used(engine: Engine, table: Table) -> None:
    dialect: Any = engine.dialect
    table.create(engine)
    if dialect.name == "mysql" and dialect.is_mariadb:
        # MariaDB has no indexes over expressions; it has them over generated columns.
        table.drop(engine)
        column = Column("version", key_version_type(), computed_key_version("data"), index=True)
        table.append_column(column)
        table.create(engine)
        version: Any = column
        (index,) = table.indexes
    else:
        version = table.c.data.key_version
        index = Index("ix_version", version)
        index.create(engine)
    with engine.begin() as connection:
        rows = [{"id": id_, "data": {"a": id_}} for id_ in range(1, 6)]
        connection.execute(insert(table), rows)
        found = connection.scalars(select(table.c.id).where(version == "v1")).all()
        assert sorted(found) == [1, 2, 3, 4, 5]
        if dialect.name == "postgresql":
            connection.execute(text("SET enable_seqscan = off"))
        if not (dialect.name == "mysql" and dialect.is_mariadb):
            query = select(table.c.id).where(version == text("'v1'")).compile(connection)
            explain = "EXPLAIN QUERY PLAN" if dialect.name == "sqlite" else "EXPLAIN"
            plan = connection.exec_driver_sql(f"{explain} {query}").all()
            assert "ix_version" in str(plan)
    index.drop(engine)


def test_a_check_constraint_over_it_holds(
    engine: Engine, table: Table, keyring: Keyring, promoted: Keyring
) -> None:
    table.append_constraint(CheckConstraint(table.c.data.key_version == "v2", name="only_v2"))
    table.create(engine)
    with engine.connect() as connection:
        with pytest.raises(DBAPIError, match="only_v2"):
            connection.execute(insert(table), {"id": 1, "data": 1})
        connection.rollback()
        set_default_keyring(promoted)
        connection.execute(insert(table), {"id": 1, "data": 1})
        assert connection.scalar(select(table.c.data)) == 1


def test_another_dialect_gets_an_error_that_names_those_that_work(table: Table) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"'oracle'.*sqlite, postgresql, mysql"):
        select(table.c.data.key_version).compile(dialect=ORACLE)
