"""What a rotation does to rows of every shape, on every database."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    JSON,
    URL,
    Column,
    Connection,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Uuid,
    create_engine,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, registry
from sqlalchemy.types import TypeDecorator, TypeEngine

from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    Keyring,
    LucentBase,
    LucentSecrets,
    RetiredKeyError,
    RotationError,
    RotationProgress,
    RotationReport,
    arotate,
    rotate,
    row_bound,
    set_default_keyring,
    status,
    verify,
)
from tests.databases import create_extension
from tests.primary_keys import CASES, keys_of


def documents_table(*columns: Column[Any], name: str = "documents", **options: Any) -> Table:
    return Table(
        name,
        MetaData(),
        *(columns or (Column("id", Integer, primary_key=True, autoincrement=False),)),
        # Without the CHECK constraint: some tests put what is not sealed into it.
        Column("payload", EncryptedJSON(create_constraint=False)),
        **options,
    )


def fill(engine: Engine, table: Table, count: int = 25) -> None:
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(table), [{"id": number, "payload": {"n": number}} for number in range(count)]
        )


def raw(engine: Engine, table: Table, name: str = "payload") -> list[Any]:
    with engine.connect() as connection:
        value = type_coerce(table.c[name], LargeBinary)
        statement = select(value).order_by(*table.primary_key.columns)
        return [None if v is None else bytes(v) for v in connection.scalars(statement)]


def counts(engine: Engine, targets: Any) -> dict[tuple[str, str | None], int]:
    return {(row.column, row.key_version): row.count for row in status(engine, targets).rows}


# -- The main job ----------------------------------------------------------------------------------


@pytest.fixture
def alone(engine: Engine) -> Iterator[Engine]:
    """An engine over the same database that has no second connection to read ahead with."""
    alone = create_engine(engine.url, pool_size=1)
    yield alone
    alone.dispose()


def test_every_row_is_re_encrypted_and_opens(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)
    report = rotate(engine, table, keyring=promoted, batch_size=10)
    assert (report.ok, report.rotated, report.remaining, report.failed) == (True, 25, 0, ())
    assert counts(engine, table) == {("payload", "v2"): 25}
    set_default_keyring(promoted.without("v1"))
    with engine.connect() as connection:
        found = connection.execute(select(table.c.id, table.c.payload)).all()
    assert {row.id: row.payload for row in found} == {n: {"n": n} for n in range(25)}


def test_values_under_a_retired_version_are_left_with_the_way_back(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table, 3)
    limited = promoted.with_oldest("v2")
    before = raw(engine, table)
    report = rotate(engine, table, keyring=limited)
    assert (report.ok, report.rotated, report.remaining) == (False, 0, 3)
    assert {row.error for row in report.failed} == {"RetiredKeyError"}
    assert all("with_oldest(None)" in str(row.reason) for row in report.failed)
    assert {row.error for row in verify(engine, table, keyring=limited).failed} == {
        "RetiredKeyError"
    }
    assert raw(engine, table) == before
    set_default_keyring(limited)
    with (
        engine.connect() as connection,
        pytest.raises(RetiredKeyError, match=r"documents\.payload"),
    ):
        connection.execute(select(table.c.payload)).all()

    assert rotate(engine, table, keyring=limited.with_oldest(None)).ok
    with engine.connect() as connection:
        assert len(connection.execute(select(table.c.payload)).all()) == 3


def test_a_second_run_finds_nothing(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)
    rotate(engine, table, keyring=promoted)
    before = raw(engine, table)
    report = rotate(engine, table, keyring=promoted)
    assert (report.ok, report.rotated) == (True, 0)
    assert raw(engine, table) == before


@pytest.mark.parametrize("batch_size", [1, 7, 25, 26])
def test_each_batch_is_committed_by_itself(
    engine: Engine, alone: Engine, promoted: Keyring, batch_size: int
) -> None:
    table = documents_table()
    fill(engine, table)
    seen: list[int] = []

    def count_from_elsewhere(progress: RotationProgress) -> None:
        seen.append(counts(engine, table).get(("payload", "v2"), 0))
        assert seen[-1] == progress.rotated

    rotate(alone, table, keyring=promoted, batch_size=batch_size, on_progress=count_from_elsewhere)
    assert seen == [min(n, 25) for n in range(batch_size, 25 + batch_size, batch_size)]


def test_a_run_that_broke_off_is_gone_on_with(
    engine: Engine, alone: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)

    def break_off(progress: RotationProgress) -> None:
        if progress.rotated == 20:
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        rotate(alone, table, keyring=promoted, batch_size=10, on_progress=break_off)
    assert counts(engine, table) == {("payload", "v1"): 5, ("payload", "v2"): 20}
    assert rotate(engine, table, keyring=promoted, batch_size=10).rotated == 5


def test_null_is_not_touched(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table, 3)
    with engine.begin() as connection:
        connection.execute(insert(table).values(id=5, payload=literal_column("NULL")))
    assert rotate(engine, table, keyring=promoted).rotated == 3
    assert raw(engine, table)[-1] is None


def test_the_same_version_under_another_key_is_named_and_left(
    engine: Engine, keyring: Keyring
) -> None:
    table = documents_table()
    fill(engine, table, 3)
    before = raw(engine, table)
    report = rotate(engine, table, keyring=Keyring({"v1": bytes(32)}))
    assert [(row.primary_key, row.error) for row in report.failed] == [
        ((number,), "WrongKeyError") for number in range(3)
    ]
    assert (report.ok, report.remaining) == (False, 3)
    assert raw(engine, table) == before


# -- Asynchronous engines --------------------------------------------------------------------------


def test_an_async_engine_is_rotated(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any], promoted: Keyring
) -> None:
    table = documents_table()

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(table.metadata.create_all)
            await connection.execute(
                insert(table), [{"id": n, "payload": {"n": n}} for n in range(25)]
            )
        report = await arotate(engine, table, keyring=promoted, batch_size=10, max_rate=1000)
        assert (report.ok, report.rotated) == (True, 25)
        set_default_keyring(promoted.without("v1"))
        async with engine.connect() as connection:
            found = (await connection.execute(select(table.c.id, table.c.payload))).all()
            assert {row.id: row.payload for row in found} == {n: {"n": n} for n in range(25)}
            await connection.rollback()
            assert (await arotate(connection, table, keyring=promoted)).rotated == 0

    run_async(work)


def test_the_event_loop_runs_while_an_async_rotation_waits(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any], promoted: Keyring
) -> None:
    table = documents_table()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(table.metadata.create_all)
            await connection.execute(
                insert(table), [{"id": n, "payload": {"n": n}} for n in range(3)]
            )
        ticking = asyncio.create_task(tick())
        await arotate(engine, table, keyring=promoted, batch_size=1, pause=0.1)
        ticking.cancel()

    run_async(work)
    assert ticks >= 5


def test_a_synchronous_engine_is_refused_by_arotate_and_the_reverse() -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(RotationError, match="AsyncEngine"):
        asyncio.run(arotate(engine))  # type: ignore[arg-type]
    with pytest.raises(RotationError, match="not str"):
        rotate("sqlite://")  # type: ignore[arg-type]
    engine.dispose()


# -- Tables of every shape -------------------------------------------------------------------------


MOMENT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).replace(tzinfo=None)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("url", "shape"), CASES, indirect=["url"])
@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
@pytest.mark.filterwarnings("ignore:Type object .* does not refer to an OperatorClass")
def test_any_primary_key_serves(
    engine: Engine, promoted: Keyring, shape: str, batch_size: int
) -> None:
    keys = keys_of(shape)
    table = documents_table(*keys.columns())
    with engine.begin() as connection:
        if keys.extension is not None:
            create_extension(connection, keys.extension)
        table.metadata.create_all(connection)
        connection.execute(
            insert(table),
            [{**keys.row(key), "payload": n} for n, key in enumerate(keys.values)],
        )
    report = rotate(engine, table, keyring=promoted, batch_size=batch_size)
    assert (report.ok, report.rotated) == (True, len(keys.values))
    set_default_keyring(promoted.without("v1"))
    with engine.connect() as connection:
        for *key, payload in connection.execute(select(table)):
            assert keys.values[payload] == tuple(key)
    table.metadata.drop_all(engine)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    "type_, actual, keys",
    [
        (String(4), "varchar(50)", ["ab", "abcd", "abcdef", "abcdeg", "b" * 50]),
        (Numeric(10, 1), "numeric(10, 3)", [Decimal(n) for n in ("1.240", "1.260", "1.290")]),
        (
            postgresql.TIMESTAMP(precision=0),
            "timestamp",
            [MOMENT + dt.timedelta(milliseconds=n) for n in (240, 260, 700, 900)],
        ),
    ],
    ids=["text", "decimal", "moment"],
)
@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_key_may_be_wider_than_the_model_says(
    engine: Engine,
    promoted: Keyring,
    driver: str,
    type_: TypeEngine[Any],
    actual: str,
    keys: list[Any],
    batch_size: int,
) -> None:
    table = documents_table(Column("id", type_, primary_key=True, autoincrement=False))
    table.metadata.create_all(engine)
    statement = f"ALTER TABLE documents ALTER id TYPE {actual}"
    with engine.begin() as connection:
        connection.execute(text(statement))
        for key in keys:
            sealed = insert(table).values(id=text("CAST(:key AS " + actual + ")"), payload={"n": 1})
            connection.execute(sealed, {"key": key})
    if driver == "psycopg":
        report = rotate(engine, table, keyring=promoted, batch_size=batch_size)
    else:

        async def run() -> RotationReport:
            asynchronous = create_async_engine(engine.url.set(drivername="postgresql+asyncpg"))
            try:
                return await arotate(asynchronous, table, keyring=promoted, batch_size=batch_size)
            finally:
                await asynchronous.dispose()

        report = asyncio.run(run())
    assert (report.ok, report.rotated) == (True, len(keys))
    assert counts(engine, table) == {("payload", "v2"): len(keys)}


@pytest.mark.parametrize("url", ["mysql"], indirect=True)
@pytest.mark.parametrize("collation", ["latin1_bin", "utf8mb4_bin", "utf8mb3_bin"])
def test_text_keys_of_any_binary_collation_serve(
    engine: Engine, promoted: Keyring, collation: str
) -> None:
    type_ = String(20, collation=collation)
    table = documents_table(Column("id", type_, primary_key=True))
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": key, "payload": key} for key in ("a", "é", "ü")])
    report = rotate(engine, table, keyring=promoted)
    assert (report.ok, report.rotated) == (True, 3)


def test_values_of_every_size_are_rotated_in_one_batch(engine: Engine, promoted: Keyring) -> None:
    table = Table(
        "100% mine",
        MetaData(),
        Column("id %s", Integer, primary_key=True, autoincrement=False),
        Column("value %", EncryptedJSON(context="sizes")),
    )
    table.metadata.create_all(engine)
    # MariaDB cuts values of 64 KiB and more in a derived table, without a word.
    sizes = [0, 1, 200, 32_000, 33_000, 65_500, 65_600, 70_000, 300_000, 2 << 20, 100, 6 << 20, 3]
    documents = {number: "é" * (size // 2) for number, size in enumerate(sizes)}
    with engine.begin() as connection:
        for number, document in documents.items():  # not all in one packet
            connection.execute(insert(table), {"id %s": number, "value %": document})
    assert rotate(engine, table, keyring=promoted).rotated == len(sizes)
    set_default_keyring(promoted.without("v1"))
    with engine.connect() as connection:
        found = {row[0]: row[1] for row in connection.execute(select(table))}
    assert found == documents


def test_names_are_quoted(engine: Engine, promoted: Keyring) -> None:
    table = Table(
        'Select "all" %s',
        MetaData(),
        Column("Order By", Integer, primary_key=True, autoincrement=False),
        Column("Group-Id", String(20)),
        Column("100% secret", EncryptedJSON(bound_to=["Group-Id"])),
        Column("lucent_new_0", EncryptedJSON),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(table),
            [
                {
                    "Order By": n,
                    "Group-Id": "g",
                    "100% secret": Bound({"n": n}, row=("g",)),
                    "lucent_new_0": [n],
                }
                for n in range(5)
            ],
        )
    assert rotate(engine, table, keyring=promoted, batch_size=2).rotated == 10
    assert verify(engine, table, keyring=promoted.without("v1")).opened == 10


def test_several_columns_are_written_by_one_update(engine: Engine, promoted: Keyring) -> None:
    table = documents_table(
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("other", EncryptedJSON),
        Column("third", EncryptedJSON(lazy=True, none_as_null=True)),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(table),
            [
                {"id": n, "payload": n, "other": [n], "third": None if n % 2 else {"n": n}}
                for n in range(6)
            ],
        )
    set_default_keyring(promoted)
    with engine.begin() as connection:  # so that not all of a row is stale
        connection.execute(update(table).where(table.c.id == 3).values(other=["new"]))
    updates: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE"):
            updates.append(statement)

    report = rotate(engine, table, keyring=promoted)
    assert (report.ok, report.rotated) == (True, 6 + 5 + 3)
    assert len(updates) == 3  # one for each set of columns that are stale together
    set_default_keyring(promoted.without("v1"))
    with engine.connect() as connection:
        assert [row.other for row in connection.execute(select(table).order_by(table.c.id))] == [
            [0],
            [1],
            [2],
            ["new"],
            [4],
            [5],
        ]


def test_row_bound_values_stay_bound(engine: Engine, promoted: Keyring) -> None:
    class Base(DeclarativeBase):
        pass

    class Grant(Base):
        __tablename__ = "grants"
        id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
        tenant: Mapped[str] = mapped_column("tenant_name", String(40))
        credentials: Mapped[Any] = row_bound("id", "tenant_name")

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Grant(tenant=f"t{n}", credentials={"n": n}) for n in range(8))
        session.commit()
    report = rotate(engine, Grant.credentials, keyring=promoted, batch_size=3)
    assert (report.ok, report.rotated) == (True, 8)
    set_default_keyring(promoted.without("v1"))
    with Session(engine) as session:
        for grant in session.scalars(select(Grant)):
            assert grant.tenant == f"t{grant.credentials['n']}"


def test_a_bound_row_without_its_identity_is_named_and_left(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table(
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("tenant", String(20)),
        Column("bound", EncryptedJSON(bound_to=["tenant"])),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            insert(table),
            [{"id": n, "tenant": "t", "bound": Bound(n, row=("t",))} for n in range(3)],
        )
        connection.execute(update(table).where(table.c.id == 1).values(tenant=None))
    report = rotate(engine, table.c.bound, keyring=promoted)
    assert [(row.primary_key, row.error) for row in report.failed] == [((1,), "ConfigurationError")]
    assert report.rotated == 2


def test_lucent_secrets_are_rotated_by_default(engine: Engine, promoted: Keyring) -> None:
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        for n in range(5):
            LucentSecrets(session).set(f"tenant:t{n % 2}:provider:Name{n}", {"n": n})
        session.commit()
    assert rotate(engine, keyring=promoted, batch_size=2).rotated == 5
    with Session(engine) as session:
        secrets = LucentSecrets(session, keyring=promoted.without("v1"))
        assert secrets.require("tenant:t1:provider:Name3") == {"n": 3}
        assert {info.key_version for info in secrets.list()} == {"v2"}


def test_columns_with_onupdate_are_untouched(engine: Engine, promoted: Keyring) -> None:
    table = documents_table(
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("changes", Integer, default=0, onupdate=lambda: 1 / 0),
        Column("note", String(20), default="as it was", onupdate="changed"),
    )
    fill(engine, table, 5)
    if engine.dialect.name == "mysql":
        with engine.begin() as connection:
            connection.execute(
                text(
                    "ALTER TABLE documents ADD touched TIMESTAMP NOT NULL"
                    " DEFAULT '2020-01-01' ON UPDATE CURRENT_TIMESTAMP"
                )
            )
    assert rotate(engine, table, keyring=promoted).rotated == 5
    with engine.connect() as connection:
        assert set(connection.scalars(select(table.c.note))) == {"as it was"}
        if engine.dialect.name == "mysql":
            touched = connection.scalars(text("SELECT DISTINCT touched FROM documents")).all()
            assert touched == [dt.datetime(2020, 1, 1)]  # noqa: DTZ001


@pytest.mark.parametrize("url", ["mysql"], indirect=True)
def test_columns_that_mysql_renews_stay_with_text_keys_too(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table(Column("id", String(20), primary_key=True))
    fill(engine, table, 5)
    with engine.begin() as connection:
        connection.execute(
            text(
                "ALTER TABLE documents ADD `touched at` TIMESTAMP NOT NULL"
                " DEFAULT '2020-01-01' ON UPDATE CURRENT_TIMESTAMP"
            )
        )
    assert rotate(engine, table, keyring=promoted).rotated == 5
    with engine.connect() as connection:
        touched = connection.scalars(text("SELECT DISTINCT `touched at` FROM documents")).all()
    assert touched == [dt.datetime(2020, 1, 1)]  # noqa: DTZ001


def test_joined_inheritance_reaches_the_tables_of_the_parents(
    engine: Engine, promoted: Keyring
) -> None:
    class Base(DeclarativeBase):
        pass

    class Account(Base):
        __tablename__ = "accounts"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(20))
        login: Mapped[Any] = mapped_column(EncryptedJSON)
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "account"}  # noqa: RUF012

    class Admin(Account):
        __tablename__ = "admins"
        id: Mapped[int] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
        token: Mapped[Any] = mapped_column(EncryptedJSON)
        __mapper_args__ = {"polymorphic_identity": "admin"}  # noqa: RUF012

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Admin(login={"n": n}, token=[n]) for n in range(4)])
        session.commit()
    assert rotate(engine, Admin, keyring=promoted).rotated == 8
    set_default_keyring(promoted.without("v1"))
    with Session(engine) as session:
        assert [(a.login["n"], a.token) for a in session.scalars(select(Admin))] == [
            (n, [n]) for n in range(4)
        ]


def test_a_table_in_a_schema_is_rotated(engine: Engine, promoted: Keyring, tmp_path: Path) -> None:
    schema = f"{engine.url.database}_Other" if engine.dialect.name == "mysql" else "Other"
    quoted = engine.dialect.identifier_preparer.quote_identifier(schema)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def attach(driver: Any, _record: Any) -> None:
            driver.execute(f"ATTACH '{tmp_path}/other.db' AS {quoted}")

    else:
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {quoted}"))
    try:
        table = documents_table(schema=schema)
        fill(engine, table)
        assert rotate(engine, table, keyring=promoted, batch_size=10).rotated == 25
        assert status(engine, table).rows[0].table == f"{schema}.documents"
        unnamed = documents_table()
        translated = engine.execution_options(schema_translate_map={None: schema})
        assert rotate(translated, unnamed, keyring=promoted.with_primary("v1")).rotated == 25
    finally:
        table.metadata.drop_all(engine)
        if engine.dialect.name != "sqlite":
            with engine.begin() as connection:
                connection.execute(text(f"DROP SCHEMA {quoted}"))


def test_earlier_contexts_open_and_are_left_behind(engine: Engine, promoted: Keyring) -> None:
    fill(engine, documents_table(), 4)
    renamed = Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("payload", EncryptedJSON(context="new", accept_contexts=["x", "documents.payload"])),
    )
    assert rotate(engine, renamed, keyring=promoted).rotated == 4
    only_new = Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("payload", EncryptedJSON(context="new")),
    )
    assert verify(engine, only_new, keyring=promoted.without("v1")).opened == 4


@pytest.mark.parametrize(
    "type_",
    [
        MutableDict.as_mutable(EncryptedJSON()),
        EncryptedJSON.mutable(),
        EncryptedJSON(schema=dict[str, int]),
        EncryptedJSON.mutable(schema=dict[str, int]),
    ],
    ids=["of SQLAlchemy", "mutable", "with a schema", "mutable with a schema"],
)
def test_columns_that_track_or_check_their_values_are_rotated(
    engine: Engine, promoted: Keyring, type_: TypeEngine[Any]
) -> None:
    table = Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("payload", type_),
    )
    fill(engine, table, 3)
    assert rotate(engine, table, keyring=promoted).rotated == 3
    set_default_keyring(promoted.without("v1"))
    with engine.connect() as connection:
        found = connection.scalars(select(table.c.payload).order_by(table.c.id)).all()
    assert found == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_large_values_are_rotated_in_small_batches(
    engine: Engine, alone: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        for number in range(12):
            connection.execute(insert(table).values(id=number, payload={"x": "y" * 3_000_000}))
    rotated: list[int] = []
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    report = rotate(
        alone,
        table,
        keyring=promoted,
        batch_size=6,
        on_progress=lambda progress: rotated.append(progress.rotated),
    )
    assert (report.ok, report.rotated) == (True, 12)
    assert rotated == [5, 10, 12]  # 16 MiB hold five of them
    rotated.clear()
    back = promoted.with_primary("v1")
    rotate(
        engine, table, keyring=back, on_progress=lambda progress: rotated.append(progress.rotated)
    )
    if engine.dialect.name == "sqlite":
        assert rotated == [5, 10, 12]
    else:  # with a second connection, each has half of it
        assert rotated == [5, 7, 9, 11, 12]


# -- Targets ---------------------------------------------------------------------------------------


def test_what_may_be_named(engine: Engine, promoted: Keyring) -> None:
    mapping = registry()
    table = Table(
        "documents",
        mapping.metadata,
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("payload", EncryptedJSON),
        Column("other", EncryptedJSON),
    )
    Table("plain", mapping.metadata, Column("id", Integer, primary_key=True))

    @mapping.mapped
    class Document:
        __table__ = table

    mapping.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": n, "payload": n, "other": [n]} for n in range(2)])
    old, new = promoted.with_primary("v1"), promoted
    targets: list[Any] = [mapping, mapping.metadata, table, Document, [table, table.c.payload]]
    for number, target in enumerate(targets):
        assert rotate(engine, target, keyring=old if number % 2 else new).rotated == 4
    assert rotate(engine, table.c.payload, keyring=old).rotated == 2
    attribute = Document.payload  # type: ignore[attr-defined]
    assert rotate(engine, attribute, keyring=new).rotated == 2


def test_every_encrypted_column_of_a_metadata_is_found(engine: Engine, promoted: Keyring) -> None:
    metadata = MetaData()
    for name, types in (
        ("typed", [EncryptedJSON(schema=dict[str, int]), EncryptedJSON(lazy=True)]),
        ("plain", [JSON()]),
        ("tracked", [EncryptedJSON.mutable(), EncryptedJSON(context="elsewhere"), JSON()]),
    ):
        columns = [Column(f"c{number}", type_) for number, type_ in enumerate(types)]
        key = Column("id", Integer, primary_key=True, autoincrement=False)
        Table(name, metadata, key, *columns)
    metadata.create_all(engine)
    with engine.begin() as connection:
        for table in metadata.tables.values():
            values = {column.name: {"n": 1} for column in table.c if column.name != "id"}
            connection.execute(insert(table), [{"id": n, **values} for n in range(3)])
    assert rotate(engine, metadata, keyring=promoted).rotated == 4 * 3
    assert {
        (row.table, row.column, row.key_version, row.count) for row in status(engine, metadata).rows
    } == {
        ("typed", "c0", "v2", 3),
        ("typed", "c1", "v2", 3),
        ("tracked", "c0", "v2", 3),
        ("tracked", "c1", "v2", 3),
    }


# -- Connections -----------------------------------------------------------------------------------


def test_a_connection_is_given_back_as_it_was(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)
    with engine.connect() as connection:
        level = connection.get_isolation_level()
        connection.rollback()
        assert rotate(connection, table, keyring=promoted).rotated == 25
        assert not connection.in_transaction()
        assert connection.get_isolation_level() == level
        connection.rollback()
        connection.execute(table.delete())
        connection.rollback()
        assert connection.scalar(select(func.count()).select_from(table)) == 25


def test_a_connection_in_a_transaction_is_refused(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table, 3)
    with (
        engine.connect() as connection,
        connection.begin(),
        pytest.raises(RotationError, match="inside a transaction"),
    ):
        rotate(connection, table, keyring=promoted)
    assert counts(engine, table) == {("payload", "v1"): 3}


def test_an_autocommit_connection_is_rotated_batch_by_batch(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text("SELECT 1"))
        seen: list[int] = []
        rotate(
            connection,
            table,
            keyring=promoted,
            batch_size=10,
            on_progress=lambda _: seen.append(counts(engine, table)["payload", "v2"]),
        )
    assert seen == [10, 20, 25]


def begin_recipe(url: URL) -> Engine:
    """An engine with the listeners that SQLAlchemy documents for SQLite's transactions."""
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def leave_it_to_us(driver: Any, _record: Any) -> None:
        driver.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


@pytest.mark.parametrize("on_connection", [False, True])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_sqlite_engine_that_begins_by_itself_is_rotated(
    tmp_path: Path, promoted: Keyring, on_connection: bool, dry_run: bool
) -> None:
    engine = begin_recipe(URL.create("sqlite", database=f"{tmp_path}/recipe.db"))
    table = documents_table()
    fill(engine, table)
    if on_connection:
        with engine.connect() as connection:
            report = rotate(connection, table, keyring=promoted, batch_size=10, dry_run=dry_run)
            connection.execution_options(isolation_level="AUTOCOMMIT")
            rotate(connection, table, keyring=promoted, batch_size=10, dry_run=dry_run)
    else:
        report = rotate(engine, table, keyring=promoted, batch_size=10, dry_run=dry_run)
    assert (report.ok, report.rotated) == (True, 25)
    assert counts(engine, table) == {("payload", "v1" if dry_run else "v2"): 25}
    engine.dispose()


# -- Dry run, throttle, progress, stop -------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_says_what_a_run_would_do(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    spoil(engine, table, 7, b"v1:\x01plain wrong")
    before = raw(engine, table)
    report = rotate(engine, table, keyring=promoted, batch_size=10, dry_run=True)
    assert (report.rotated, report.remaining, report.failed_count) == (24, 1, 1)
    assert (report.dry_run, report.ok) == (True, False)
    assert raw(engine, table) == before
    real = rotate(engine, table, keyring=promoted, batch_size=10)
    assert (real.rotated, real.remaining, real.failed) == (24, 1, report.failed)


def spoil(engine: Engine, table: Table, identity: Any, value: bytes) -> None:
    key = next(iter(table.primary_key.columns))
    with engine.begin() as connection:
        connection.execute(
            text(f"UPDATE {table.name} SET payload = :value WHERE {key.name} = :id"),
            {"value": value, "id": identity},
        )


def test_stop_when_ends_the_run_after_a_batch(
    engine: Engine, alone: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    report = rotate(
        alone,
        table,
        keyring=promoted,
        batch_size=5,
        stop_when=lambda progress: progress.rotated >= 10,
    )
    assert (report.stopped, report.ok, report.rotated, report.remaining) == (True, False, 10, 15)
    assert counts(engine, table)["payload", "v2"] == 10


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)  # SQLite locks no rows
def test_stop_when_is_asked_before_a_pass_that_may_find_nothing(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    asked: list[int] = []

    def is_done(progress: RotationProgress) -> bool:
        asked.append(progress.rotated)
        return asked.count(24) == 3  # after the batch, and before two passes without any

    with engine.begin() as other:
        other.execute(select(table).where(table.c.id == 3).with_for_update())
        report = rotate(engine, table, keyring=promoted, stop_when=is_done)
    assert (report.stopped, report.rotated, report.remaining) == (True, 24, 1)
    assert asked == [24, 24, 24]


def test_rows_are_taken_in_the_order_of_the_primary_key(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        for number in range(25):  # stored in another order
            connection.execute(insert(table).values(id=number * 7 % 25, payload={"n": number}))
    rotate(engine, table, keyring=promoted, batch_size=10, stop_when=lambda progress: True)
    assert [value[:2] for value in raw(engine, table)] == [b"v2"] * 10 + [b"v1"] * 15


def test_progress_tells_what_is_done_and_what_is_left(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)
    told: list[RotationProgress] = []
    rotate(engine, table, keyring=promoted, batch_size=10, on_progress=told.append)
    assert [(p.table, p.rotated, p.total) for p in told] == [
        ("documents", 10, 25),
        ("documents", 20, 25),
        ("documents", 25, 25),
    ]
    assert told[-1].seconds_left == 0
    assert all(p.rate > 0 for p in told)


def test_a_rate_limit_is_kept(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)
    started = time.monotonic()
    assert rotate(engine, table, keyring=promoted, batch_size=10, max_rate=50).rotated == 25
    assert time.monotonic() - started >= 25 / 50


def test_a_batch_is_never_more_than_a_second_of_the_rate_limit(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table, 12)
    told: list[int] = []
    rotate(
        engine,
        table,
        keyring=promoted,
        max_rate=8,
        on_progress=lambda progress: told.append(progress.rotated),
    )
    assert told == [8, 12]


def test_a_batch_time_makes_batches_grow(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table, 60)
    told: list[int] = []
    rotate(
        engine,
        table,
        keyring=promoted,
        batch_size=4,
        batch_time=60,
        on_progress=lambda progress: told.append(progress.rotated),
    )
    assert told == [4, 12, 28, 60]


# -- Reports ---------------------------------------------------------------------------------------


def test_a_report_is_json_ready_whatever_the_primary_key(engine: Engine, promoted: Keyring) -> None:
    table = documents_table(
        Column("id", Uuid, primary_key=True), Column("at", DateTime, primary_key=True)
    )
    table.metadata.create_all(engine)
    identity = uuid.UUID(int=5)
    with engine.begin() as connection:
        connection.execute(insert(table).values(id=identity, at=MOMENT, payload=1))
        connection.execute(text("UPDATE documents SET payload = :value"), {"value": b"gAAAA..."})
    report = rotate(engine, table, keyring=promoted)
    assert json.loads(json.dumps(report.as_dict())) == {
        "key_version": "v2",
        "rotated": 0,
        "failed": [
            {
                "table": "documents",
                "column": "payload",
                "primary_key": [str(identity), str(MOMENT)],
                "error": "NotSealedError",
                "key_version": None,
                "fingerprint": None,
                "reason": None,
            }
        ],
        "failed_count": 1,
        "remaining": 1,
        "stopped": False,
        "dry_run": False,
        "left_out": [],
        "ok": False,
    }


class Wrapped(TypeDecorator[Any]):
    impl = EncryptedJSON
    cache_ok = True


@pytest.mark.parametrize(
    "type_",
    [
        JSON().with_variant(EncryptedJSON(), "sqlite"),
        EncryptedJSON().with_variant(EncryptedJSON(context="elsewhere"), "sqlite"),
        Wrapped(context="hidden.value"),
        ARRAY(EncryptedJSON(context="hidden.value")),
    ],
    ids=["variant", "other-context", "decorator", "array"],
)
@pytest.mark.parametrize("ask", [rotate, status, verify])
def test_a_column_that_hides_its_encryption_is_refused_and_not_passed_over(
    type_: Any, ask: Callable[..., Any]
) -> None:
    hidden = Table("hidden", MetaData(), Column("id", Integer, primary_key=True))
    hidden.append_column(Column("value", type_))
    hidden.append_column(Column("plain", EncryptedJSON))
    engine = create_engine("sqlite://")
    with pytest.raises(RotationError, match="value seals its values through a type"):
        ask(engine, hidden.metadata)
    engine.dispose()


def test_an_engine_whose_only_connection_is_in_a_transaction_is_refused(keyring: Keyring) -> None:
    engine = create_engine("sqlite://")
    single = Table("single", MetaData(), Column("id", Integer, primary_key=True))
    single.append_column(Column("value", EncryptedJSON))
    single.metadata.create_all(engine)
    with Session(engine) as session:
        session.execute(insert(single).values(id=1, value={"n": 1}))
        with pytest.raises(RotationError, match="inside a transaction already"):
            rotate(engine, single)
        session.rollback()
        assert session.scalars(select(single.c.id)).all() == []
    engine.dispose()


def test_a_primary_key_that_does_not_advance_ends_the_run(
    engine: Engine, promoted: Keyring
) -> None:
    floats = Table("floats", MetaData(), Column("value", EncryptedJSON))
    floats.append_column(Column("id", Float, primary_key=True, autoincrement=False))
    floats.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(floats).values(id=0.1, value={"n": 1}))
    if engine.dialect.name == "mysql":  # whose FLOAT is single: no row has the id that it gives
        with pytest.raises(RotationError, match="cannot be paged by primary key"):
            rotate(engine, floats, keyring=promoted, batch_size=1)
        assert verify(engine, floats, keyring=promoted).opened == 1
    else:
        assert rotate(engine, floats, keyring=promoted, batch_size=1).rotated == 1
