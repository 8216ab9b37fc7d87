"""The CHECK constraint of sealed columns: made, named, kept, moved, and its errors."""

from __future__ import annotations

import io
import pickle
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import alembic
import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table
from sqlalchemy.dialects import mssql, oracle
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateTable

from sqlalchemy_lucent import EncryptedJSON, LucentBase, LucentSecret, RotationError, _sql
from sqlalchemy_lucent import migrations as lucent_migrations
from tests.integration.test_migrations_generated import Project

PLAINTEXT = b'{"token": "MARKER-plaintext"}'
VALUE = {"token": "é"}

needs_comparators = pytest.mark.skipif(
    tuple(map(int, alembic.__version__.split(".")[:2])) < (1, 18),
    reason="Alembic takes comparators of others from 1.18 on",
)


def users(type_: Any = None, metadata: MetaData | None = None, *, nullable: bool = True) -> Table:
    """A table with a sealed column, or with one of another type."""
    return Table(
        "users",
        metadata if metadata is not None else MetaData(),
        Column("id", Integer, primary_key=True),
        Column("email", String(50)),
        Column("creds", EncryptedJSON() if type_ is None else type_, nullable=nullable),
    )


def checks(engine: Engine, name: str = "users", schema: str | None = None) -> list[str]:
    """The names of a table's CHECK constraints."""
    return sorted(
        str(found["name"])
        for found in sa.inspect(engine).get_check_constraints(name, schema=schema)
    )


def insert_raw(engine: Engine, value: Any, name: str = "users", column: str = "creds") -> None:
    """Write a value as a program does that knows nothing of the type."""
    with engine.begin() as connection:
        owner = sa.table(name, sa.column("id"), sa.column(column, sa.LargeBinary))
        highest = connection.scalar(sa.select(sa.func.max(owner.c.id))) or 0
        connection.execute(owner.insert(), {"id": highest + 1, column: value})


def assert_refuses_plaintext(engine: Engine, name: str = "users", column: str = "creds") -> None:
    with pytest.raises(DBAPIError):
        insert_raw(engine, PLAINTEXT, name, column)


class Operate:
    """Runs operations as a migration does, each in a context of its own."""

    def __init__(self, engine: Engine, metadata: MetaData | None = None) -> None:
        self.engine = engine
        self.metadata = metadata or MetaData()

    def __call__(self, work: Callable[[Operations], object]) -> None:
        with self.engine.connect() as connection:
            context = MigrationContext.configure(
                connection,
                opts={"target_metadata": self.metadata, "transaction_per_migration": True},
            )
            with context.begin_transaction():
                work(Operations(context))
            if connection.in_transaction():
                connection.commit()


@pytest.fixture
def operate(engine: Engine) -> Operate:
    return Operate(engine)


# -- what is refused -------------------------------------------------------------------------------

FOREIGN = [
    b"",
    PLAINTEXT,
    b"gAAAAABkMARKER",
    b"\x00\xff" * 20,
    b"v1:",
    b"v1:\x02",
    b":\x01",
    b"v 1:\x01rest",
    b"v\x00:\x01rest",
    b"a" * 33 + b":\x01rest",
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=repr)
def test_no_writer_stores_what_is_not_sealed(engine: Engine, foreign: bytes) -> None:
    table = users()
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"creds": VALUE}, {"creds": sa.null()}])
    with pytest.raises(DBAPIError):
        insert_raw(engine, foreign)
    insert_raw(engine, None)
    with engine.begin() as connection, pytest.raises(DBAPIError):
        connection.execute(sa.text("UPDATE users SET creds = :v WHERE id = 1"), {"v": foreign})
    with engine.connect() as connection:
        assert connection.scalars(sa.select(table.c.creds)).all() == [VALUE, None, None]


def test_the_constraint_says_what_the_key_version_says(engine: Engine) -> None:
    numbers = random.Random(14)
    values = [
        *FOREIGN,
        b"v1:\x01",
        b"v5",
        b"A.z_-9:\x01\x00\xff",
        b"a" * 32 + b":\x01x",
        b"v9:\x01\n",
    ]
    values += [
        b"v\n:\x01",
        b"v1\n:\x01",
        b"\xff1:\x01",
        "é:\x01".encode(),
        b"v:1:\x01",
        b"v\x00:\x01",
    ]
    values += [bytes(numbers.choices(b"v1:\x01\x00a\xff{", k=size % 8)) for size in range(300)]
    table = Table(
        "raw", MetaData(), Column("id", Integer, primary_key=True), Column("v", sa.LargeBinary)
    )
    table.create(engine)
    agrees = sa.case((_sql.is_sealed(table.c.v), 1), else_=0)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"v": value} for value in values])
        rows = connection.execute(sa.select(table.c.v, _sql.key_version(table.c.v), agrees)).all()
    assert {bool(sealed) for _, _, sealed in rows} == {True, False}
    assert [v for v, version, sealed in rows if (version is not None) != bool(sealed)] == []


def test_sqlite_refuses_text_and_numbers(databases: Any) -> None:
    engine = sa.create_engine(databases.url("sqlite"))
    users().create(engine)
    try:
        for sql in ("'v1:' || char(1) || 'x'", "5", "1.5", "''"):
            with engine.begin() as connection, pytest.raises(DBAPIError):
                connection.exec_driver_sql(f"INSERT INTO users (creds) VALUES ({sql})")
    finally:
        users().drop(engine)
        engine.dispose()


def test_the_secrets_table_has_it(engine: Engine, operate: Operate) -> None:
    LucentBase.metadata.create_all(engine)
    made = checks(engine, "lucent_secrets")
    LucentBase.metadata.drop_all(engine)
    operate(lambda op: lucent_migrations.create_lucent_secrets(operations=op))
    assert made == checks(engine, "lucent_secrets") == ["ck_lucent_secrets_payload_sealed"]
    with Session(engine) as session:
        session.add(LucentSecret(scope="t", owner_id="1", provider="p", name="n", payload=VALUE))
        session.commit()
        with pytest.raises(DBAPIError):
            session.execute(sa.text("UPDATE lucent_secrets SET payload = :v"), {"v": PLAINTEXT})


# -- names and settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "name"),
    [
        (None, "ck_users_creds_sealed"),
        ({"ck": "ck_%(table_name)s_%(constraint_name)s"}, "ck_users_creds_sealed"),
        ({"ck": "chk_%(constraint_name)s"}, "chk_creds_sealed"),
        ({"ck": "c_%(table_name)s_%(column_0_name)s"}, "c_users_creds"),
        ({sa.CheckConstraint: "k_%(constraint_name)s"}, "k_creds_sealed"),
        ({"uq": "uq_%(table_name)s"}, "ck_users_creds_sealed"),
    ],
)
def test_the_naming_convention_names_it(
    engine: Engine, convention: dict[Any, str] | None, name: str
) -> None:
    metadata = MetaData(naming_convention=convention)
    users(metadata=metadata)
    metadata.create_all(engine)
    assert checks(engine) == [name]
    metadata.drop_all(engine)
    plain = users(EncryptedJSON(create_constraint=False))
    plain.create(engine)
    Operate(engine, metadata)(
        lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op)
    )
    assert checks(engine) == [name]


def test_each_column_has_its_own_and_long_names_are_cut(engine: Engine) -> None:
    names = ["creds", "tokens", "c" * 60, "c" * 59 + "d"]
    shared = EncryptedJSON()
    table = Table(
        "t" * 40,
        MetaData(),
        Column("id", Integer, primary_key=True),
        *(Column(name, shared) for name in names),
    )
    table.create(engine)
    assert len(set(checks(engine, table.name))) == 4
    for name in names:
        assert_refuses_plaintext(engine, table.name, name)


def test_it_can_be_turned_off(engine: Engine) -> None:
    table = users(EncryptedJSON(create_constraint=False))
    assert not any(isinstance(c, sa.CheckConstraint) for c in table.constraints)
    assert repr(table.c.creds.type) == "EncryptedJSON(create_constraint=False)"
    table.create(engine)
    assert checks(engine) == []
    insert_raw(engine, PLAINTEXT)


def test_a_setting_is_a_part_of_the_cache_key() -> None:
    on, off = EncryptedJSON(context="a.b"), EncryptedJSON(context="a.b", create_constraint=False)
    assert on._static_cache_key != off._static_cache_key


def test_a_subclass_passes_it_on(engine: Engine) -> None:
    class Sealed(EncryptedJSON):
        cache_ok = True

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)

    users(Sealed(create_constraint=False)).create(engine)
    assert checks(engine) == []


def test_a_variant_decides_for_its_database(engine: Engine) -> None:
    off = EncryptedJSON(create_constraint=False)
    users(EncryptedJSON().with_variant(off, engine.dialect.name)).create(engine)
    assert checks(engine) == []
    users().drop(engine)
    users(off.with_variant(EncryptedJSON(), engine.dialect.name)).create(engine)
    assert checks(engine) == ["ck_users_creds_sealed"]
    users().drop(engine)
    users(sa.JSON().with_variant(EncryptedJSON(), engine.dialect.name)).create(engine)
    assert checks(engine) == ["ck_users_creds_sealed"]


@pytest.mark.parametrize("dialect", [oracle, mssql], ids=["oracle", "mssql"])
def test_a_dialect_without_a_form_has_no_constraint(dialect: Any) -> None:
    ddl = str(CreateTable(users()).compile(dialect=dialect.dialect()))
    assert "creds" in ddl
    assert "CHECK" not in ddl


# -- copies ----------------------------------------------------------------------------------------


def made_by_to_metadata(metadata: MetaData) -> None:
    users().to_metadata(metadata)


def made_twice(metadata: MetaData) -> None:
    users().to_metadata(MetaData()).to_metadata(metadata)


def made_by_extend_existing(metadata: MetaData) -> None:
    users(metadata=metadata)
    Table("users", metadata, Column("creds", EncryptedJSON), extend_existing=True)


def made_by_append(metadata: MetaData) -> None:
    table = Table("users", metadata, Column("id", Integer, primary_key=True))
    table.append_column(Column("creds", EncryptedJSON))


def made_by_copied_column(metadata: MetaData) -> None:
    column = users().c.creds._copy()
    Table("users", metadata, Column("id", Integer, primary_key=True), column)


def made_by_pickle(metadata: MetaData) -> None:
    pickle.loads(pickle.dumps(users().metadata)).tables["users"].to_metadata(metadata)


def made_by_mixin(metadata: MetaData) -> None:
    class Base(DeclarativeBase):
        type_annotation_map = {dict[str, Any]: EncryptedJSON()}  # noqa: RUF012

    Base.metadata = metadata

    class Mixin:
        id: Mapped[int] = mapped_column(primary_key=True)
        creds: Mapped[dict[str, Any] | None]

    class Abstract(Mixin, Base):
        __abstract__ = True

    class User(Abstract):
        __tablename__ = "users"

    class Other(Abstract):
        __tablename__ = "others"


@pytest.mark.parametrize(
    "make",
    [
        made_by_to_metadata,
        made_twice,
        made_by_extend_existing,
        made_by_append,
        made_by_copied_column,
        made_by_pickle,
        made_by_mixin,
    ],
)
def test_a_copy_has_it_once(engine: Engine, make: Callable[[MetaData], None]) -> None:
    metadata = MetaData()
    make(metadata)
    metadata.create_all(engine)
    for name in metadata.tables:
        assert checks(engine, name) == [f"ck_{name}_creds_sealed"]


def test_a_column_that_is_replaced_by_a_plain_one_has_none(engine: Engine) -> None:
    metadata = MetaData()
    users(metadata=metadata)
    Table("users", metadata, Column("creds", sa.LargeBinary), extend_existing=True)
    metadata.create_all(engine)
    assert checks(engine) == []


def test_temporary_tables_and_translated_schemas_have_it(engine: Engine) -> None:
    users(metadata=(metadata := MetaData(schema="tenant")))
    translated = engine.execution_options(schema_translate_map={"tenant": None})
    with translated.begin() as connection:
        metadata.create_all(connection)
    assert checks(engine) == ["ck_users_creds_sealed"]
    temporary = Table(
        "passing",
        MetaData(),
        Column("id", Integer),
        Column("creds", EncryptedJSON),
        prefixes=["TEMPORARY"],
    )
    with engine.connect() as connection:
        temporary.create(connection)
        raw = sa.table("passing", sa.column("creds", sa.LargeBinary))
        with pytest.raises(DBAPIError):
            connection.execute(raw.insert(), {"creds": PLAINTEXT})


# -- Alembic's own operations ----------------------------------------------------------------------


def test_an_added_column_has_it_and_can_be_dropped_and_renamed(
    engine: Engine, operate: Operate
) -> None:
    Table("users", MetaData(), Column("id", Integer, primary_key=True)).create(engine)
    insert_first = sa.text("INSERT INTO users (id) VALUES (1)")
    with engine.begin() as connection:
        connection.execute(insert_first)
    operate(lambda op: op.add_column("users", Column("creds", EncryptedJSON(), nullable=True)))
    operate(lambda op: op.add_column("users", Column("more", EncryptedJSON(), nullable=True)))
    assert checks(engine) == ["ck_users_creds_sealed", "ck_users_more_sealed"]
    assert_refuses_plaintext(engine)
    operate(lambda op: op.drop_column("users", "creds"))
    assert checks(engine) == ["ck_users_more_sealed"]
    operate(lambda op: op.rename_table("users", "people"))
    if engine.dialect.name != "mysql" or getattr(engine.dialect, "is_mariadb", False):
        operate(
            lambda op: op.alter_column(
                "people", "more", new_column_name="much", existing_type=EncryptedJSON()
            )
        )
        assert_refuses_plaintext(engine, "people", "much")


def test_a_batch_keeps_it_once(engine: Engine, operate: Operate) -> None:
    users().create(engine)

    def change(op: Operations) -> None:
        with op.batch_alter_table("users", recreate="always") as batch:
            batch.add_column(Column("added", EncryptedJSON(), nullable=True))
            batch.alter_column("email", new_column_name="mail", existing_type=String(50))

    operate(change)
    operate(change_back)
    assert checks(engine) == ["ck_users_added_sealed", "ck_users_creds_sealed"]
    for column in ("creds", "added"):
        assert_refuses_plaintext(engine, column=column)


def change_back(op: Operations) -> None:
    with op.batch_alter_table("users") as batch:
        batch.alter_column("mail", new_column_name="email", existing_type=String(50))
        batch.alter_column("creds", nullable=False, existing_type=EncryptedJSON())


# -- the operations --------------------------------------------------------------------------------


def test_it_is_added_to_a_filled_table_and_dropped(engine: Engine, operate: Operate) -> None:
    table = users(EncryptedJSON(create_constraint=False))
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"creds": VALUE}, {"creds": sa.null()}])

    operate(lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op))
    operate(lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op))
    assert checks(engine) == ["ck_users_creds_sealed"]
    assert_refuses_plaintext(engine)
    if engine.dialect.name == "postgresql":
        (found,) = sa.inspect(engine).get_check_constraints("users")
        assert not found.get("dialect_options", {}).get("not_valid")

    operate(lambda op: lucent_migrations.drop_sealed_check("users", "creds", operations=op))
    operate(lambda op: lucent_migrations.drop_sealed_check("users", "creds", operations=op))
    assert checks(engine) == []
    insert_raw(engine, PLAINTEXT)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(table.c.creds).where(table.c.id == 1)) == VALUE


@pytest.mark.parametrize("recreate", ["auto", "always"])
def test_a_batch_adds_and_drops_it(engine: Engine, operate: Operate, recreate: Any) -> None:
    users(EncryptedJSON(create_constraint=False)).create(engine)

    def add(op: Operations) -> None:
        with op.batch_alter_table("users", recreate=recreate) as batch:
            method: Any = batch
            method.create_sealed_check("creds")

    def drop(op: Operations) -> None:
        with op.batch_alter_table("users", recreate=recreate) as batch:
            method: Any = batch
            method.drop_sealed_check("creds")

    operate(add)
    assert checks(engine) == ["ck_users_creds_sealed"]
    assert_refuses_plaintext(engine)
    operate(drop)
    assert checks(engine) == []


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_plaintext_written_while_it_is_added_keeps_it_from_being_added(
    engine: Engine, operate: Operate
) -> None:
    users(EncryptedJSON(create_constraint=False)).create(engine)
    other = sa.create_engine(engine.url)
    is_written = False

    def write(*arguments: Any) -> None:
        nonlocal is_written
        if "ADD CONSTRAINT" in arguments[2] and not is_written:
            is_written = True
            insert_raw(other, PLAINTEXT)

    def create(op: Operations) -> None:
        sa.event.listen(op.get_bind(), "before_cursor_execute", write)
        lucent_migrations.create_sealed_check("users", "creds", operations=op)

    with pytest.raises(RotationError):
        operate(create)
    assert is_written
    assert checks(engine) == []
    with pytest.raises(RotationError):
        operate(lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op))

    with other.begin() as connection:
        connection.execute(sa.text("DELETE FROM users"))
    other.dispose()
    operate(lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op))
    assert_refuses_plaintext(engine)


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_constraint_that_no_rows_were_read_for_is_counted_for(
    engine: Engine, operate: Operate
) -> None:
    users(EncryptedJSON(create_constraint=False)).create(engine)
    if engine.dialect.name == "mysql" and not getattr(engine.dialect, "is_mariadb", False):
        pytest.skip("MySQL reads the rows itself")
    insert_raw(engine, PLAINTEXT)
    killed_before_the_count = users().constraints
    (check,) = (c for c in killed_before_the_count if isinstance(c, sa.CheckConstraint))
    check.dialect_options["postgresql"]["not_valid"] = True
    with engine.begin() as connection:
        if engine.dialect.name == "mysql":
            connection.exec_driver_sql("SET check_constraint_checks = 0")
        connection.execute(sa.schema.AddConstraint(check))
        if engine.dialect.name == "mysql":
            connection.exec_driver_sql("SET check_constraint_checks = 1")

    def create(op: Operations) -> None:
        lucent_migrations.create_sealed_check("users", "creds", operations=op)

    with pytest.raises(RotationError, match="1 values"):
        operate(create)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM users"))
    operate(create)
    (found,) = sa.inspect(engine).get_check_constraints("users")
    assert not found.get("dialect_options", {}).get("not_valid")


def test_rows_that_are_not_sealed_keep_it_from_being_added(
    engine: Engine, operate: Operate
) -> None:
    users(EncryptedJSON(create_constraint=False)).create(engine)
    for _ in range(3):
        insert_raw(engine, PLAINTEXT)
    with pytest.raises(RotationError, match=r"3 values of users\.creds") as refused:
        operate(lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op))
    assert "verify()" in str(refused.value)
    assert "MARKER" not in "".join(traceback.format_exception(refused.value))
    assert checks(engine) == []


@pytest.mark.parametrize("place", [("nowhere", "creds"), ("users", "nothing"), ("users", "email")])
def test_it_is_not_added_where_there_is_no_sealed_column(
    engine: Engine, operate: Operate, place: tuple[str, str]
) -> None:
    users().create(engine)
    with pytest.raises(RotationError, match=place[0]):
        operate(lambda op: lucent_migrations.create_sealed_check(*place, operations=op))


def test_a_copy_on_sqlite_that_would_lose_something_is_refused(databases: Any) -> None:
    engine = sa.create_engine(databases.url("sqlite"))
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT COLLATE NOCASE, creds BLOB)"
            )
        with pytest.raises(RotationError, match="COLLATE NOCASE"):
            Operate(engine)(
                lambda op: lucent_migrations.create_sealed_check("users", "creds", operations=op)
            )
        assert checks(engine) == []
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE users")
        engine.dispose()


def offline(dialect: str, work: Callable[[Operations], object]) -> list[str]:
    """Return the statements that are written under a naming convention."""
    convention = {"ck": "chk_%(table_name)s_%(constraint_name)s"}
    written = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect,
        opts={
            "as_sql": True,
            "output_buffer": written,
            "target_metadata": MetaData(naming_convention=convention),
        },
    )
    work(Operations(context))
    return [line for line in written.getvalue().splitlines() if line]


def as_it_is(op: Operations) -> None:
    method: Any = op
    method.create_sealed_check("users", "creds", schema="s")
    method.fence_key_version("users", "creds", "v1", schema="s")
    method.unfence_key_version("users", "creds", "v1", schema="s")
    method.drop_sealed_check("users", "creds", schema="s")


def in_a_batch(op: Operations) -> None:
    with op.batch_alter_table("users", schema="s") as batch:
        method: Any = batch
        method.create_sealed_check("creds")
        method.fence_key_version("creds", "v1")
        method.unfence_key_version("creds", "v1")
        method.drop_sealed_check("creds")


@pytest.mark.parametrize("work", [as_it_is, in_a_batch])
@pytest.mark.parametrize(
    "dialect, drop",
    [("postgresql", "CONSTRAINT"), ("mysql", "CHECK"), ("mariadb", "CONSTRAINT")],
)
def test_it_is_written_as_sql_offline(
    dialect: str, drop: str, work: Callable[[Operations], object]
) -> None:
    beginnings = (
        "ADD CONSTRAINT chk_users_creds_sealed CHECK",
        "ADD CONSTRAINT lucent_fence_v1_users_creds CHECK",
        f"DROP {drop} lucent_fence_v1_users_creds;",
        f"DROP {drop} chk_users_creds_sealed;",
    )
    for line, expected in zip(offline(dialect, work), beginnings, strict=True):
        assert line.startswith(f"ALTER TABLE s.users {expected}")


@pytest.mark.parametrize("work", [as_it_is, in_a_batch])
def test_it_is_not_written_as_sql_for_sqlite(work: Callable[[Operations], object]) -> None:
    with pytest.raises(RotationError, match=r"create_sealed_check of s\.users\.creds.*copies"):
        offline("sqlite", work)


def test_offline_a_batch_is_written_in_order() -> None:
    def work(op: Operations) -> None:
        with op.batch_alter_table("users") as batch:
            batch.add_column(Column("creds", EncryptedJSON(create_constraint=False)))
            method: Any = batch
            method.create_sealed_check("creds")

    first, second = offline("postgresql", work)
    assert "ADD COLUMN creds" in first
    assert "ADD CONSTRAINT chk_users_creds_sealed" in second


def test_offline_a_batch_copies_a_table_of_sqlite() -> None:
    def work(op: Operations) -> None:
        with op.batch_alter_table("users", copy_from=users(sa.LargeBinary())) as batch:
            batch.alter_column("email", nullable=False)

    assert offline("sqlite", work)[-1] == "ALTER TABLE _alembic_tmp_users RENAME TO users;"


@pytest.mark.parametrize("drop", [True, False], ids=["dropped", "kept"])
@pytest.mark.parametrize("nullable", [True, False], ids=["", "not null"])
def test_a_conversion_leaves_what_a_new_table_has(
    engine: Engine, operate: Operate, drop: bool, nullable: bool
) -> None:
    plain = users(sa.JSON(), nullable=nullable)
    plain.create(engine)
    with engine.begin() as connection:
        connection.execute(plain.insert(), [{"id": n, "creds": VALUE} for n in range(1, 4)])
    before = checks(engine)
    options: dict[str, Any] = {"existing_type": sa.JSON(), "drop": drop}
    operate(lambda op: lucent_migrations.encrypt_column("users", "creds", **options, operations=op))
    assert "ck_users_creds_sealed" in checks(engine)
    assert_refuses_plaintext(engine)
    with engine.connect() as connection:
        assert set(map(str, connection.scalars(sa.select(users().c.creds)))) != set()
    if not drop:
        operate(lambda op: op.drop_column("users", "creds__sealed"))
    operate(
        lambda op: lucent_migrations.decrypt_column(
            "users", "creds", existing_type=sa.JSON(), operations=op
        )
    )
    assert checks(engine) == before
    with engine.connect() as connection:
        assert connection.scalars(sa.select(plain.c.creds)).all() == [VALUE] * 3
    operate(
        lambda op: lucent_migrations.encrypt_column(
            "users", "creds", existing_type=sa.JSON(), create_constraint=False, operations=op
        )
    )
    assert "ck_users_creds_sealed" not in checks(engine)


# -- autogenerate ----------------------------------------------------------------------------------


@needs_comparators
@pytest.mark.parametrize("batch", [False, True], ids=["", "batch"])
def test_autogenerate_writes_it_for_new_columns_and_offers_it_once_for_old_ones(
    engine: Engine, tmp_path: Path, batch: bool
) -> None:
    own = sa.create_engine(engine.url, poolclass=sa.pool.NullPool)
    project = Project(tmp_path, own, batch=batch)
    off, on = MetaData(), MetaData()
    users(EncryptedJSON(create_constraint=False), off)
    users(metadata=on)

    assert "create_constraint=False" in project.up(off)  # and `alembic check` is content then
    assert checks(engine) == []
    insert_sealed(engine)
    code = project.up(on, "create_sealed_check")
    assert "op.create_sealed_check('users', 'creds')" in code
    assert "op.drop_sealed_check('users', 'creds')" in code
    assert checks(engine) == ["ck_users_creds_sealed"]
    project.down()
    assert checks(engine) == []
    project.up_again()
    assert checks(engine) == ["ck_users_creds_sealed"]

    wider = MetaData()
    users(metadata=wider).append_column(Column("more", EncryptedJSON))
    project.up(wider)
    assert checks(engine) == ["ck_users_creds_sealed", "ck_users_more_sealed"]
    project.up(on)
    assert checks(engine) == ["ck_users_creds_sealed"]
    project.down()
    project.down()
    assert checks(engine) == ["ck_users_creds_sealed"]
    own.dispose()


@needs_comparators
def test_autogenerate_writes_it_with_a_new_table_and_a_conversion(
    engine: Engine, tmp_path: Path
) -> None:
    own = sa.create_engine(engine.url, poolclass=sa.pool.NullPool)
    project = Project(tmp_path, own, batch=False)
    convention = {
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(column_0_label)s",
    }
    plain, sealed = (MetaData(naming_convention=convention) for _ in range(2))
    users(sa.JSON(), plain)
    users(metadata=sealed)
    for metadata in (plain, sealed):
        LucentBase.metadata.tables["lucent_secrets"].to_metadata(metadata)
    project.up(plain)
    assert checks(engine, "lucent_secrets") == ["ck_lucent_secrets_payload_sealed"]
    project.up(sealed, "encrypt_column")
    assert "ck_users_creds_sealed" in checks(engine)
    own.dispose()


def insert_sealed(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(users().insert(), {"creds": VALUE})


# -- errors ----------------------------------------------------------------------------------------


def every_text(error: BaseException) -> Iterator[str]:
    """All that an application or its reporter can read off an error."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        yield "".join(traceback.format_exception(one))
        yield repr(one.args)
        yield repr(vars(one))
        diag = getattr(one, "diag", None)
        for name in dir(diag) if diag is not None else ():
            yield repr(getattr(diag, name))
        todo += [one.__cause__, one.__context__, getattr(one, "orig", None)]


WRITES: list[tuple[str, Any]] = [
    ("INSERT INTO users (id, creds) VALUES (1, :v)", PLAINTEXT),
    ("INSERT INTO users (id, email, creds) VALUES (NULL, 'x', :v)", PLAINTEXT),
    ("INSERT INTO users (id, creds) VALUES (1, :v)", PLAINTEXT.decode()),
    ("UPDATE users SET creds = :v", PLAINTEXT),
    ("INSERT INTO users (id, creds) SELECT 1, :v", PLAINTEXT),
]


def warm(connection: sa.Connection) -> None:
    table = users(nullable=False)
    table.create(connection)
    connection.execute(table.insert(), {"id": 9, "creds": VALUE})


@pytest.mark.parametrize(("sql", "value"), WRITES)
def test_the_error_shows_no_value(engine: Engine, sql: str, value: Any) -> None:
    with engine.begin() as connection:
        warm(connection)
    with engine.begin() as connection, pytest.raises(DBAPIError) as refused:
        connection.execute(sa.text(sql), {"v": value})
    assert_hidden(refused.value)


@pytest.mark.parametrize(("sql", "value"), WRITES)
def test_the_error_of_an_async_driver_shows_no_value(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any], sql: str, value: Any
) -> None:
    async def work(engine: AsyncEngine) -> BaseException:
        async with engine.begin() as connection:
            await connection.run_sync(warm)
        with pytest.raises(DBAPIError) as refused:
            async with engine.begin() as connection:
                await connection.execute(sa.text(sql), {"v": value})
        return refused.value

    assert_hidden(run_async(work))


def assert_hidden(error: BaseException) -> None:
    for text in every_text(error):
        assert "MARKER" not in text
        assert PLAINTEXT.hex()[:16] not in text


def test_a_not_null_error_shows_no_row_and_keeps_what_names_it(engine: Engine) -> None:
    with engine.begin() as connection:
        warm(connection)
    table = users(nullable=False)
    with engine.begin() as connection, pytest.raises(DBAPIError) as refused:
        connection.execute(table.insert(), {"id": 1, "email": "EMAIL-MARKER", "creds": sa.null()})
    if engine.dialect.name == "postgresql":
        driver: Any = refused.value.orig
        assert (driver.sqlstate, driver.diag.column_name) == ("23502", "creds")
        assert driver.diag.message_detail is None
        assert "EMAIL-MARKER" not in str(driver)
        assert pickle.loads(pickle.dumps(driver)).diag.message_detail is None


def test_a_constraint_that_shows_its_key_still_does(engine: Engine) -> None:
    table = users()
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(table.insert(), {"id": 1, "creds": VALUE})
        with pytest.raises(DBAPIError) as refused:
            connection.execute(table.insert(), {"id": 1, "creds": VALUE})
    assert refused.value.params is not None
    if engine.dialect.name == "postgresql":
        assert "(id)=(1)" in str(refused.value)


def test_listeners_do_not_pile_up(engine: Engine) -> None:
    table = users()
    table.create(engine)
    dispatch = engine.dialect.dispatch
    numbers = []
    with engine.begin() as connection:
        for number in range(1, 4):
            connection.execute(table.insert(), {"id": number, "creds": VALUE})
            connection.execute(sa.select(table.c.creds).where(table.c.id == number)).all()
            listeners = dispatch.handle_error, dispatch.do_execute
            numbers.append([len(list(each)) for each in listeners])
    assert numbers[0][0] == 1
    assert numbers[0] == numbers[2]
