"""Values that a database or a type changes: refused before they are sealed, or they open again."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    Engine,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    create_engine,
    event,
    insert,
    literal,
    select,
)
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator, UserDefinedType

from sqlalchemy_lucent import (
    Bound,
    ConfigurationError,
    EncryptedJSON,
    LucentError,
    bound_rows,
    rotate,
    row_bound,
    verify,
)

ID = "01234567-89ab-4cde-8123-456789abcdef"


class Lower(TypeDecorator[str]):
    impl = String(50)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value.lower()


class Prefixed(TypeDecorator[str]):
    """Changes what is stored, and gives back what was given."""

    impl = String(50)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else f"x-{value}"

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[2:]


class Guid(TypeDecorator[uuid.UUID]):
    """As other libraries have it: takes text too, and gives UUIDs."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else uuid.UUID(str(value)).hex

    def process_result_value(self, value: str | None, dialect: Any) -> uuid.UUID | None:
        return None if value is None else uuid.UUID(value)


class GuidInBytes(TypeDecorator[uuid.UUID]):
    impl = LargeBinary(16)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> bytes | None:
        return None if value is None else uuid.UUID(str(value)).bytes

    def process_result_value(self, value: bytes | None, dialect: Any) -> uuid.UUID | None:
        return None if value is None else uuid.UUID(bytes=bytes(value))


class GuidOfTheDatabase(TypeDecorator[uuid.UUID]):
    """On PostgreSQL takes text and gives what the driver gives, as advanced-alchemy's type does."""

    impl = Uuid(as_uuid=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return str(value) if dialect.name == "postgresql" else value

    def process_result_value(self, value: Any, dialect: Any) -> uuid.UUID | None:
        return uuid.UUID(int=value.int) if value is not None else None


class Short(TypeDecorator[str]):
    impl = CHAR(8)
    cache_ok = True


class InSql(TypeDecorator[str]):
    impl = String(50)
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return literal("x").concat(bindparam)


class Colour(str, enum.Enum):  # noqa: UP042  (a StrEnum prints its value)
    RED = "red"


class Shade(enum.StrEnum):
    DARK = "dark"


class Number(int, enum.Enum):
    ONE = 1


class NoPythonType(UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **kw: Any) -> str:
        return "VARCHAR(50)"


@contextmanager
def mapped(engine: Engine, type_: Any) -> Iterator[Any]:
    class Base(DeclarativeBase):
        pass

    class Vault(Base):
        __tablename__ = "vaults"

        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        owner: Mapped[Any] = mapped_column(type_)
        secret: Mapped[Any] = row_bound("owner")

    try:
        Base.metadata.create_all(engine)
        yield Vault
    finally:
        Base.metadata.drop_all(engine)
        Base.registry.dispose()


def by_the_orm(session: Session, vault: Any, value: Any) -> None:
    session.add(vault(id=1, owner=value, secret={"n": 1}))
    session.flush()


def by_bulk(session: Session, vault: Any, value: Any) -> None:
    rows = [{"id": 1, "owner": value, "secret": {"n": 1}}]
    session.execute(insert(vault), bound_rows(vault, rows))


def by_core(session: Session, vault: Any, value: Any) -> None:
    secret = Bound({"n": 1}, row=(value,))
    session.execute(vault.__table__.insert().values(id=1, owner=value, secret=secret))


WAYS = [by_the_orm, by_bulk, by_core]
Way = Callable[[Session, Any, Any], None]


def outcome(engine: Engine, type_: Any, value: Any, way: Way) -> str:
    """Write a row and say what came of it; a value that never opens again is the one fault."""
    with mapped(engine, type_) as vault:
        with Session(engine) as session:
            try:
                way(session, vault, value)
                session.commit()
            except (LucentError, DBAPIError, StatementError, OverflowError, UnicodeError) as error:
                return type(error).__name__
        with Session(engine) as session:
            assert session.scalars(select(vault)).one().secret == {"n": 1}
        assert verify(engine, vault).ok
        assert rotate(engine, vault).ok
        return "opens"


REFUSED = "ConfigurationError"

CASES: dict[str, tuple[Any, Any, str | None]] = {
    # name: type, value, and what comes of it on every database (None: it depends)
    "uuid text": (Uuid(as_uuid=False), ID, "opens"),
    "uuid in capitals": (Uuid(as_uuid=False), ID.upper(), REFUSED),
    "uuid without hyphens": (Uuid(as_uuid=False), ID.replace("-", ""), REFUSED),
    "uuid in braces": (Uuid(as_uuid=False), f"{{{ID}}}", None),
    "uuid as urn": (Uuid(as_uuid=False), f"urn:uuid:{ID}", None),
    "no uuid": (Uuid(as_uuid=False), "x", None),
    "uuid text, not native": (Uuid(as_uuid=False, native_uuid=False), ID, "opens"),
    "uuid in capitals, not native": (
        Uuid(as_uuid=False, native_uuid=False), ID.upper(), REFUSED
    ),
    "uuid": (Uuid(), uuid.UUID(ID), "opens"),
    "uuid, not native": (Uuid(native_uuid=False), uuid.UUID(ID), "opens"),
    "text for a uuid": (Uuid(), ID, None),
    "padded": (CHAR(8), "ab", None),
    "filled": (CHAR(8), "abcdefgh", "opens"),
    "spaces in a CHAR": (CHAR(8), "ab      ", None),
    "padded beneath a type": (Short(), "ab", None),
    "too long": (String(4), "abcde", None),
    "too long by spaces": (String(4), "abcd ", None),
    "spaces at the end": (String(9), "ab  ", "opens"),
    "empty": (String(9), "", "opens"),
    "not composed": (String(9), "e\u0301", "opens"),
    "beyond the BMP": (String(9), "\U0001f511" * 9, "opens"),
    "NUL": (String(9), "a\0b", None),
    "lone surrogate": (String(9), "a\ud800", None),
    "long text": (Text(), "x" * 1000, "opens"),
    "text for an int": (Integer(), "7", REFUSED),
    "text for an int, with a zero": (Integer(), "07", REFUSED),
    "bool for an int": (Integer(), True, REFUSED),
    "float for an int": (Integer(), 7.0, REFUSED),
    "int for a text": (String(9), 7, REFUSED),
    "int too large": (Integer(), 2**40, None),
    "small int too large": (SmallInteger(), 2**20, None),
    "big int": (BigInteger(), 2**62, "opens"),
    "big int too large": (BigInteger(), 2**70, None),
    "enum member for a text": (String(9), Colour.RED, REFUSED),
    "str enum member for a text": (String(9), Shade.DARK, "opens"),
    "enum member for an int": (Integer(), Number.ONE, REFUSED),
    "enum": (Enum("red", "blue", name="colours"), "red", "opens"),
    "enum of members": (Enum(Colour, name="colours"), Colour.RED, "opens"),
    "name of a member": (Enum(Colour, name="colours"), "RED", REFUSED),
    "value of a member": (Enum(Colour, name="colours"), "red", REFUSED),
    "changed by its type": (Lower(), "ABC", REFUSED),
    "kept by its type": (Lower(), "abc", "opens"),
    "stored otherwise": (Prefixed(), "abc", "opens"),
    "guid": (Guid(), uuid.UUID(ID), "opens"),
    "guid in bytes": (GuidInBytes(), uuid.UUID(ID), "opens"),
    "guid of the database": (GuidOfTheDatabase(), uuid.UUID(ID), "opens"),
    "text in capitals for a guid in bytes": (GuidInBytes(), ID.upper(), None),
    "text for a guid": (Guid(), ID, "opens"),
    "text in capitals for a guid": (Guid(), ID.upper(), REFUSED),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_no_value_is_sealed_for_a_row_that_comes_back_otherwise(
    engine: Engine, name: str, way: Way
) -> None:
    type_, value, expected = CASES[name]
    came = outcome(engine, type_, value, way)
    assert came == (expected or came), came


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "type_, value",
    [
        (String(4), "abcde"),
        (String(4), "abcd "),
        (CHAR(4), "abcde"),
        (CHAR(4), "ab  "),
        (mysql.TINYTEXT(), "x" * 300),
        (SmallInteger(), 2**20),
        (Integer(), -(2**40)),
        (BigInteger(), 2**70),
        (mysql.TINYINT(), 200),
        (mysql.INTEGER(unsigned=True), -1),
        (mysql.INTEGER(unsigned=True), 2**31),
        (mysql.INTEGER(zerofill=True, display_width=8), 7),
        (mysql.MEDIUMINT(), 2**23),
    ],
)
def test_what_mysql_would_cut_without_strict_mode_is_refused(
    databases: Any, type_: Any, value: Any, way: Way
) -> None:
    engine = create_engine(databases.url("mysql"))

    @event.listens_for(engine, "connect")
    def be_lenient(driver: Any, record: Any) -> None:
        with driver.cursor() as cursor:
            cursor.execute("SET SESSION sql_mode = ''")

    try:
        came = outcome(engine, type_, value, way)
        fits = isinstance(value, int) and value in (2**31, 7)
        assert came == ("opens" if fits else REFUSED)
    finally:
        engine.dispose()


def test_what_sqlite_would_make_a_number_of_is_refused(databases: Any) -> None:
    engine = create_engine(databases.url("sqlite"))
    digits = uuid.UUID("12345678901234567890123456789012")
    for way in WAYS:
        assert outcome(engine, postgresql.UUID(), digits, way) == REFUSED
        assert outcome(engine, postgresql.UUID(), uuid.UUID(ID), way) == "opens"
    engine.dispose()


@pytest.mark.parametrize(
    "type_",
    [
        String(9, collation="NOCASE"),
        String(9, collation="utf8mb4_general_ci"),
        postgresql.CITEXT(),
        postgresql.INET(),
        mysql.BIT(8),
        mysql.YEAR(),
        NoPythonType(),
        InSql(),
    ],
    ids=repr,
)
def test_type_that_may_change_what_it_is_given_is_refused(type_: Any) -> None:
    engine = create_engine("sqlite://")
    table = Table(
        "vaults",
        MetaData(),
        Column("owner", type_),
        Column("secret", EncryptedJSON(bound_to=["owner"])),
    )
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="'owner', wh"):
        connection.execute(table.insert().values(secret=Bound(1, row=("a",))))

    class Base(DeclarativeBase):
        pass

    class Vault(Base):
        __table__ = Table(
            "vaults",
            Base.metadata,
            Column("owner", type_, primary_key=True),
            Column("secret", EncryptedJSON(bound_to=["owner"])),
        )

    with pytest.raises(ConfigurationError, match="'owner', wh"):
        Base.registry.configure()
    Base.registry.dispose()


def test_column_that_the_table_lacks_is_refused_in_core() -> None:
    table = Table("t", MetaData(), Column("secret", EncryptedJSON(bound_to=["nowhere"])))
    with create_engine("sqlite://").connect() as connection, pytest.raises(ConfigurationError):
        connection.execute(table.insert().values(secret=Bound(1, row=("a",))))


def test_copied_table_checks_the_values_of_its_own_columns() -> None:
    table = Table(
        "vaults",
        MetaData(),
        Column("owner", String(50)),
        Column("secret", EncryptedJSON(bound_to=["owner"], context="vaults.secret")),
    )
    copied = table.to_metadata(MetaData())
    copied.c.owner.type = Integer()
    engine = create_engine("sqlite://")
    copied.metadata.create_all(engine)
    with engine.connect() as connection:
        connection.execute(copied.insert().values(owner=7, secret=Bound(1, row=(7,))))
        with pytest.raises(ConfigurationError, match="was given one of type int"):
            connection.execute(table.insert().values(owner=7, secret=Bound(1, row=(7,))))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2] is not None])
def test_async_drivers_give_back_the_same(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None], name: str
) -> None:
    type_, value, expected = CASES[name]

    async def work(engine: AsyncEngine) -> None:
        class Base(DeclarativeBase):
            pass

        class Vault(Base):
            __tablename__ = "vaults"

            id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
            owner: Mapped[Any] = mapped_column(type_)
            secret: Mapped[Any] = row_bound("owner")

        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Vault(id=1, owner=value, secret={"n": 1}))
            if expected == REFUSED:
                with pytest.raises((ConfigurationError, StatementError)):
                    await session.commit()
            else:
                await session.commit()
                session.expunge_all()
                assert (await session.scalars(select(Vault))).one().secret == {"n": 1}
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
        Base.registry.dispose()

    run_async(work)
