"""What is no table: it is left out and named, and no key goes because of what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    create_engine,
    insert,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

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

on_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)
on_mysql = pytest.mark.parametrize("url", ["mysql"], indirect=True)
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    payload: Mapped[Any] = mapped_column(EncryptedJSON)


class ViewBase(DeclarativeBase):
    pass


class SomeUser(ViewBase):
    __tablename__ = "some_users"
    id: Mapped[int] = mapped_column(primary_key=True)
    payload: Mapped[Any] = mapped_column(EncryptedJSON(context="users.payload"))


view = SomeUser.__table__


@pytest.fixture
def viewed(engine: Engine) -> Iterator[Engine]:
    """30 rows, of which the view shows 10."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(User.__table__), [{"id": n, "payload": n} for n in range(1, 31)])  # type: ignore[arg-type]
        connection.execute(text("CREATE VIEW some_users AS SELECT * FROM users WHERE id < 11"))
    yield engine
    drop(engine, "VIEW some_users")


def drop(engine: Engine, *what: str) -> None:
    with engine.begin() as connection:
        for each in what:
            connection.execute(text(f"DROP {each}"))


def test_a_view_is_left_out_and_named(viewed: Engine, promoted: Keyring) -> None:
    targets = [Base, ViewBase]
    report = rotate(viewed, targets, keyring=promoted)
    assert (report.ok, report.rotated, report.left_out) == (True, 30, ("some_users",))
    assert report.as_dict()["left_out"] == ["some_users"]
    counted = status(viewed, targets)
    assert [(row.table, row.count) for row in counted.rows] == [("users", 30)]
    opened = verify(viewed, targets, keyring=promoted)
    assert (opened.opened, opened.left_out, counted.left_out) == (30, *2 * [("some_users",)])
    assert not needs_rotation(viewed, targets, keyring=promoted)


def test_a_view_alone_is_nothing_to_work_on(viewed: Engine) -> None:
    for work in (rotate, status, verify, needs_rotation):
        with pytest.raises(RotationError, match=r"no table is left: some_users"):
            work(viewed, ViewBase)
    with pytest.raises(RotationError, match=r"no table is left: some_users"):
        retire_check(viewed, "v1", ViewBase, exclude=["some_users"])


def test_a_key_goes_past_a_view_only_if_its_table_is_a_target_or_it_is_excluded(
    viewed: Engine, promoted: Keyring
) -> None:
    other = Table(
        "other", MetaData(), Column("id", Integer, primary_key=True), Column("p", EncryptedJSON)
    )
    other.create(viewed)
    rotate(viewed, other, keyring=promoted)
    with pytest.raises(RotationError, match=r"some_users is a view.*users\.payload is no target"):
        retire_check(viewed, "v1", [other, ViewBase])
    retire_check(viewed, "v1", [other, ViewBase], exclude=["some_users"])
    retire_check(viewed, "v1", [other, ViewBase], exclude="some_users")

    with pytest.raises(KeyInUseError, match=r"30 in users\.payload"):
        retire_check(viewed, "v1", [Base, ViewBase])
    rotate(viewed, Base, keyring=promoted)
    retire_check(viewed, "v1", [Base, ViewBase])
    for name in ("users", "nothing"):
        with pytest.raises(RotationError, match=f"exclude= names {name}"):
            retire_check(viewed, "v1", [Base, ViewBase], exclude=[name])


def test_another_binary_column_behind_a_view_may_need_the_key(
    engine: Engine, promoted: Keyring
) -> None:
    Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("payload", LargeBinary),
        Column("old_payload", LargeBinary),
    ).create(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE VIEW inner_view AS SELECT * FROM users"))
        connection.execute(
            text("CREATE VIEW some_users AS SELECT id, old_payload AS payload FROM inner_view")
        )
    try:
        rotate(engine, Base, keyring=promoted)
        with pytest.raises(RotationError, match=r"users\.old_payload is no target"):
            retire_check(engine, "v1", [Base, ViewBase])
    finally:
        drop(engine, "VIEW some_users", "VIEW inner_view")


def test_a_join_with_tables_that_hold_no_bytes_is_told(engine: Engine, promoted: Keyring) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orgs (id INTEGER PRIMARY KEY, name VARCHAR(9))"))
        connection.execute(
            text(
                "CREATE VIEW some_users AS SELECT u.id, u.payload FROM users u "
                "JOIN orgs o ON o.id = u.id WHERE o.name = 'users'"
            )
        )
    try:
        rotate(engine, Base, keyring=promoted)
        retire_check(engine, "v1", [Base, ViewBase])
    finally:
        drop(engine, "VIEW some_users")


@on_postgresql
def test_what_a_function_or_a_materialized_view_shows_is_not_known(
    engine: Engine, promoted: Keyring
) -> None:
    Base.metadata.create_all(engine)
    made = {
        "FUNCTION everybody()": (
            "CREATE FUNCTION everybody() RETURNS SETOF users LANGUAGE sql AS 'SELECT * FROM users'"
        ),
        "VIEW some_users": "CREATE VIEW some_users AS SELECT * FROM everybody()",
        "MATERIALIZED VIEW some_users": "CREATE MATERIALIZED VIEW some_users AS TABLE users",
    }
    function, of_function, materialized = made
    for statements, kind in (([function, of_function], "view"), ([materialized], "materialized")):
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(made[statement]))
        try:
            assert rotate(engine, [Base, ViewBase], keyring=promoted).left_out == ("some_users",)
            with pytest.raises(RotationError, match=f"some_users is a {kind}.*are not known"):
                retire_check(engine, "v1", [Base, ViewBase])
            retire_check(engine, "v1", [Base, ViewBase], exclude=["some_users"])
        finally:
            drop(engine, *reversed(statements))


@on_postgresql
def test_a_foreign_table_is_left_out_and_partitions_are_not(
    engine: Engine, promoted: Keyring
) -> None:
    with engine.begin() as connection:
        for statement in (
            "CREATE TABLE users (id int PRIMARY KEY, payload bytea) PARTITION BY RANGE (id)",
            "CREATE TABLE users_1 PARTITION OF users FOR VALUES FROM (0) TO (10)",
            "CREATE TABLE users_2 PARTITION OF users FOR VALUES FROM (10) TO (99)",
            "CREATE EXTENSION postgres_fdw",
            "CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw",
            "CREATE FOREIGN TABLE some_users (id int, payload bytea) SERVER elsewhere",
        ):
            connection.execute(text(statement))
        connection.execute(insert(User.__table__), [{"id": n, "payload": n} for n in range(1, 31)])  # type: ignore[arg-type]
    try:
        report = rotate(engine, [Base, ViewBase], keyring=promoted)
        assert (report.rotated, report.left_out) == (30, ("some_users",))
        with pytest.raises(RotationError, match="some_users is a foreign table"):
            retire_check(engine, "v1", [Base, ViewBase])
    finally:
        drop(engine, "EXTENSION postgres_fdw CASCADE", "TABLE users")


@on_postgresql
def test_children_of_a_table_are_its_rows(engine: Engine, promoted: Keyring) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE child (PRIMARY KEY (id)) INHERITS (users)"))
        connection.execute(insert(User.__table__), [{"id": 1, "payload": 1}])  # type: ignore[arg-type]
        connection.execute(text("INSERT INTO child SELECT id + 1, payload FROM ONLY users"))
    assert rotate(engine, Base, keyring=promoted).rotated == 2
    drop(engine, "TABLE child")


@on_sqlite
def test_a_virtual_table_is_left_out(engine: Engine, promoted: Keyring) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE VIRTUAL TABLE some_users USING fts5(id, payload)"))
    try:
        assert rotate(engine, [Base, ViewBase], keyring=promoted).left_out == ("some_users",)
        with pytest.raises(RotationError, match="are not known"):
            retire_check(engine, "v1", [Base, ViewBase])
    finally:
        drop(engine, "TABLE some_users")


@on_mysql
def test_what_a_view_reads_and_this_user_does_not_see_is_not_known(
    engine: Engine, promoted: Keyring
) -> None:
    Base.metadata.create_all(engine)
    database, user = engine.url.database, f"r_{engine.url.database}"
    with engine.begin() as connection:
        for statement in (
            f"CREATE DATABASE hidden_{database}",
            f"CREATE TABLE hidden_{database}.users LIKE users",
            f"CREATE VIEW some_users AS SELECT h.* FROM users JOIN hidden_{database}.users h",
            f"CREATE USER {user}@'%'",
            f"GRANT ALL ON {database}.* TO {user}@'%'",
        ):
            connection.exec_driver_sql(statement.replace("%", "%%"))
    reader = create_engine(engine.url.set(username=user, host="127.0.0.1"))
    try:
        rotate(reader, [Base, ViewBase], keyring=promoted)
        with pytest.raises(RotationError, match="are not known"):
            retire_check(reader, "v1", [Base, ViewBase])
    finally:
        reader.dispose()
        drop(engine, "VIEW some_users", f"DATABASE hidden_{database}", f"USER {user}")
