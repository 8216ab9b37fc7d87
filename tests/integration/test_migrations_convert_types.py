"""Columns of every type of SQLAlchemy's are converted and come back equal, or refused at once."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import ipaddress
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from importlib.metadata import version
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from packaging.version import Version
from sqlalchemy import Connection, MetaData, Table, create_engine
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.types import TypeEngine

from sqlalchemy_lucent import EncryptedJSON, RotationError
from sqlalchemy_lucent.migrations import decrypt_column, encrypt_column
from tests.conftest import LONG
from tests.databases import ASYNC_DRIVERS, SYNC_DRIVERS, create_extension, with_driver

DRIVERS = {kind: (kind, driver) for kind, driver in SYNC_DRIVERS.items()} | ASYNC_DRIVERS
# Two of the async drivers read with the code of an ordinary one: for `make test-long`.
DIFFERENT = list(DRIVERS) if LONG else [*SYNC_DRIVERS, "asyncpg", "asyncmy"]
POSTGRESQL, MYSQL = ("postgresql",), ("mysql",)
EVERYWHERE = ("sqlite", "postgresql", "mysql")


class Color(enum.Enum):
    red = "r"
    blue = "b"


class Upper(sa.TypeDecorator[str]):
    """Of a user's own."""

    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.upper()

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.lower()


class Money(sa.TypeDecorator[Decimal]):
    """Of a user's own, and not JSON."""

    impl = sa.Numeric(10, 2)
    cache_ok = True


Case = tuple[TypeEngine[Any], list[Any], tuple[str, ...]]
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")

CONVERTED: dict[str, Case] = {
    "json": (sa.JSON(), [{"a": [1, 1.5, None, True]}, "x", 0], EVERYWHERE),
    "text": (LONG_TEXT, ['{ "a": 1.50 }', "[]"], EVERYWHERE),
    "string": (sa.String(20), ['"a"', "1"], EVERYWHERE),
    "unicode": (sa.Unicode(20), ['"é\U0001f511"'], EVERYWHERE),
    "small": (sa.SmallInteger(), [-3, 0, 7], EVERYWHERE),
    "integer": (sa.Integer(), [-3, 0, 2**31 - 1], EVERYWHERE),
    "big": (sa.BigInteger(), [-(2**63), 2**63 - 1], EVERYWHERE),
    "numeric-float": (sa.Numeric(10, 2, asdecimal=False), [1.25, -3.5], EVERYWHERE),
    "float": (sa.Float(53), [0.1, 1e300, -2.5], EVERYWHERE),
    "double": (sa.Double(), [0.1, 1e-300], EVERYWHERE),
    "boolean": (sa.Boolean(), [True, False], EVERYWHERE),
    "uuid-text": (sa.Uuid(as_uuid=False), [str(uuid.UUID(int=7))], EVERYWHERE),
    "enum": (sa.Enum("red", "blue", name="colour"), ["red", "blue"], EVERYWHERE),
    "pickle": (sa.PickleType(), [{"a": 1}, [1.5]], EVERYWHERE),
    "decorated": (Upper(), ["abc"], EVERYWHERE),
    "jsonb": (postgresql.JSONB(), [{"a": 1}, [None]], POSTGRESQL),
    "hstore": (postgresql.HSTORE(), [{"a": "1", "b": None}], POSTGRESQL),
    "array-text": (postgresql.ARRAY(sa.Text), [["a", None, 'b"'], []], POSTGRESQL),
    "array-deep": (sa.ARRAY(sa.Integer), [[[1, 2], [3, 4]]], POSTGRESQL),
    "macaddr": (postgresql.MACADDR(), ["08:00:2b:01:02:03"], POSTGRESQL),
    "oid": (postgresql.OID(), [1, 4_000_000_000], POSTGRESQL),
    "citext": (postgresql.CITEXT(), ['"A"'], POSTGRESQL),
    "tinyint": (mysql.TINYINT(unsigned=True), [0, 255], MYSQL),
    "unsigned": (mysql.BIGINT(unsigned=True), [2**64 - 1], MYSQL),
    "my-double": (mysql.DOUBLE(asdecimal=False), [0.1], MYSQL),
    "my-enum": (mysql.ENUM("z", "a"), ["z", "a"], MYSQL),
    "year": (mysql.YEAR(), [2026], MYSQL),
}
"""A type, values of it, and the databases that have it."""

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC).replace(tzinfo=None)
REFUSED: dict[str, Case] = {
    "numeric": (sa.Numeric(10, 2), [Decimal("1.50")], EVERYWHERE),
    "float-decimal": (sa.Float(asdecimal=True), [Decimal("1.5")], EVERYWHERE),
    "date": (sa.Date(), [NOW.date()], EVERYWHERE),
    "time": (sa.Time(), [NOW.time()], EVERYWHERE),
    "datetime": (sa.DateTime(), [NOW], EVERYWHERE),
    "interval": (sa.Interval(), [dt.timedelta(days=1)], EVERYWHERE),
    "uuid": (sa.Uuid(), [uuid.UUID(int=7)], EVERYWHERE),
    "binary": (sa.LargeBinary(), [b"\xff"], EVERYWHERE),
    "enum-class": (sa.Enum(Color, name="colour"), [Color.red], EVERYWHERE),
    "inet": (postgresql.INET(), [ipaddress.ip_address("10.0.0.1")], POSTGRESQL),
    "range": (postgresql.INT4RANGE(), [postgresql.Range(1, 5)], POSTGRESQL),
    "array-decimal": (postgresql.ARRAY(sa.Numeric), [[Decimal("1.5")]], POSTGRESQL),
    "set": (mysql.SET("a", "b"), [{"a"}], MYSQL),
    "bit": (mysql.BIT(8), [5], MYSQL),
    "my-double-decimal": (mysql.DOUBLE(), [Decimal("1.5")], MYSQL),
}


def table_of(type_: TypeEngine[Any]) -> Table:
    return Table(
        "t",
        MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("value", type_),
    )


SEALED = table_of(EncryptedJSON(redact=False))


class Database:
    """One driver's connections, for functions of a plain `Connection`."""

    def __init__(self, label: str, databases: Any, **options: Any) -> None:
        kind, driver = DRIVERS[label]
        url = with_driver(databases.url(kind), driver)
        self.kind = kind
        self._loop = asyncio.new_event_loop() if label in ASYNC_DRIVERS else None
        self._async = create_async_engine(url, **options) if self._loop else None
        self._sync = None if self._async else create_engine(url, **options)

    def run(self, *works: Callable[[Connection], Any]) -> list[Any]:
        """Do each work over a connection of its own; return what they return."""
        return [self._run(work) for work in works]

    def _run(self, work: Callable[[Connection], Any]) -> Any:
        def within(connection: Connection) -> Any:
            result = work(connection)
            connection.commit()
            return result

        if self._sync is not None:
            with self._sync.connect() as connection:
                return within(connection)

        async def main() -> Any:
            assert self._async is not None
            async with self._async.connect() as connection:
                return await connection.run_sync(within)

        assert self._loop is not None
        return self._loop.run_until_complete(main())

    def clean(self, connection: Connection) -> None:
        connection.exec_driver_sql("DROP TABLE IF EXISTS t")
        if self.kind == "postgresql":
            connection.exec_driver_sql("DROP TYPE IF EXISTS colour")

    def close(self) -> None:
        if self._sync is not None:
            self._sync.dispose()
        if self._loop is not None and self._async is not None:
            self._loop.run_until_complete(self._async.dispose())
            self._loop.close()


@pytest.fixture(scope="module")
def opened(databases: Any) -> Iterator[dict[str, Database]]:
    found: dict[str, Database] = {}
    yield found
    for database in found.values():
        database.close()


@pytest.fixture
def database(label: str, databases: Any, opened: dict[str, Database]) -> Iterator[Database]:
    if label not in opened:
        opened[label] = Database(label, databases)
        if opened[label].kind == "postgresql":
            opened[label].run(_create_extensions)
    yield opened[label]
    opened[label].run(opened[label].clean)


def _create_extensions(connection: Connection) -> None:
    for extension in ("hstore", "citext"):
        create_extension(connection, extension)


def filling(table: Table, values: list[Any]) -> Any:
    def fill(connection: Connection) -> None:
        table.metadata.create_all(connection)
        for number, value in enumerate([*values, sa.null()], 1):
            connection.execute(table.insert().values(id=number, value=value))

    return fill


def converting(operation: Any, type_: TypeEngine[Any], **options: Any) -> Any:
    def convert(connection: Connection) -> None:
        operations = Operations(MigrationContext.configure(connection))
        operation("t", "value", existing_type=type_, operations=operations, **options)

    return convert


def reading(table: Table) -> Any:
    return lambda connection: list(
        connection.scalars(sa.select(table.c.value).order_by(table.c.id))
    )


def column_names(connection: Connection) -> set[str]:
    return {column["name"] for column in sa.inspect(connection).get_columns("t")}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Dialect sqlite.* does .not. support Decimal"),
    pytest.mark.filterwarnings("ignore:Type object .* does not refer to an OperatorClass"),
]


def each(of: dict[str, Case], labels: Iterable[str]) -> pytest.MarkDecorator:
    """Try every type on each of the drivers that have it."""
    return pytest.mark.parametrize(
        ("label", "name"),
        [
            pytest.param(label, name, id=f"{label}-{name}")
            for label in labels
            for name, (_, _, kinds) in of.items()
            if DRIVERS[label][0] in kinds
        ],
    )


@pytest.mark.long
@each(CONVERTED, DIFFERENT)
def test_a_type_with_json_values_is_converted_and_comes_back(
    database: Database, label: str, name: str
) -> None:
    if (label, name) == ("asyncmy", "unsigned") and Version(version("asyncmy")) < Version("0.2.11"):
        pytest.skip("asyncmy before 0.2.11 takes no integer past 63 bits")
    type_, values, _ = CONVERTED[name]
    plain = table_of(type_)

    _, before, _, sealed, _, after = database.run(
        filling(plain, values),
        reading(plain),
        converting(encrypt_column, type_),
        reading(SEALED),
        converting(decrypt_column, type_),
        reading(plain),
    )

    assert before == [*values, None]
    assert sealed[-1] is None
    assert after == before
    if not isinstance(type_, sa.String) or isinstance(type_, sa.Enum):
        assert sealed == before
        assert list(map(type, sealed)) == list(map(type, before))


@each(REFUSED, SYNC_DRIVERS)
def test_a_type_whose_values_are_not_json_is_refused_before_the_first_write(
    database: Database, label: str, name: str
) -> None:
    type_, values, _ = REFUSED[name]

    database.run(filling(table_of(type_), values))
    with pytest.raises(RotationError, match=r"reader="):
        database.run(converting(encrypt_column, type_))
    assert database.run(column_names) == [{"id", "value"}]

    database.run(database.clean, filling(SEALED, ["x"]))
    with pytest.raises(RotationError, match=r"reader="):
        database.run(converting(decrypt_column, type_))
    assert database.run(column_names) == [{"id", "value"}]


READERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "numeric": (str, Decimal),
    "date": (str, dt.date.fromisoformat),
    "datetime": (str, dt.datetime.fromisoformat),
    "interval": (lambda value: value.total_seconds(), lambda value: dt.timedelta(seconds=value)),
    "uuid": (str, uuid.UUID),
    "binary": (bytes.hex, bytes.fromhex),
    "enum-class": (lambda value: value.name, Color.__getitem__),
    "inet": (str, ipaddress.ip_address),
    "set": (sorted, set),
    "bit": (int, int),
}


@pytest.mark.long
@each({name: case for name, case in REFUSED.items() if name in READERS}, DIFFERENT)
def test_functions_give_other_values_a_json_form(database: Database, label: str, name: str) -> None:
    type_, values, _ = REFUSED[name]
    reader, writer = READERS[name]
    plain = table_of(type_)

    _, _, sealed, _, after = database.run(
        filling(plain, values),
        converting(encrypt_column, type_, reader=reader),
        reading(SEALED),
        converting(decrypt_column, type_, reader=reader, writer=writer),
        reading(plain),
    )

    assert sealed == [*map(reader, values), None]
    assert after == [*values, None]


@pytest.mark.parametrize("label", list(DRIVERS))
def test_a_users_own_type_that_gives_no_json_is_refused_by_its_values(
    database: Database, label: str
) -> None:
    database.run(filling(table_of(Money()), [Decimal("1.50")]))
    with pytest.raises(RotationError, match=r"Decimal.*reader="):
        database.run(converting(encrypt_column, Money()))
    assert database.run(column_names) == [{"id", "value"}]


@pytest.mark.parametrize("label", ["postgresql"])
def test_a_value_that_the_driver_cannot_read_is_named(
    database: Database, label: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = table_of(sa.DateTime())
    database.run(
        filling(plain, [NOW, NOW, NOW]),
        lambda c: c.exec_driver_sql("UPDATE t SET value = 'infinity' WHERE id = 2"),
    )
    with pytest.raises(RotationError, match="1 values"):
        database.run(converting(encrypt_column, sa.DateTime(), reader=str))
    assert "primary key (2,)" in caplog.text


NOT_COMING_BACK: dict[str, tuple[TypeEngine[Any], Any, Any]] = {
    "true-as-1": (sa.Integer(), 5, True),
    "float-as-integer": (sa.Integer(), 5, 1.0),
    "text-as-integer": (sa.Integer(), 5, "SECRET"),
    "1-as-true": (sa.Boolean(), True, 1),
    "integer-as-float": (sa.Double(), 1.5, 1),
    "text-as-float": (sa.Double(), 1.5, "SECRET"),
    "too-long": (sa.String(5), "a", "SECRET"),
    "no-member": (sa.Enum("a", name="colour"), "a", "SECRET"),
    "no-uuid": (sa.Uuid(as_uuid=False), str(uuid.UUID(int=1)), "SECRET"),
}
"""A type, a value that comes back from it, and one that does not."""


@pytest.mark.parametrize("label", [*SYNC_DRIVERS, "asyncpg"])
@pytest.mark.parametrize("name", list(NOT_COMING_BACK))
def test_a_value_that_would_not_come_back_is_named_by_its_key_and_not_shown(
    database: Database, label: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    type_, good, bad = NOT_COMING_BACK[name]
    if database.kind == "sqlite" and name in ("text-as-integer", "text-as-float"):
        pytest.skip("SQLite keeps any value in any column")
    if isinstance(type_, sa.Enum) and database.kind == "postgresql":
        database.run(lambda connection: type_.create(connection))
    database.run(filling(SEALED, [good, bad, good]))

    with pytest.raises(RotationError, match="1 values") as caught:
        database.run(converting(decrypt_column, type_))

    assert "primary key (2,)" in caplog.text
    assert "SECRET" not in caplog.text + repr(caught.value)
    assert caught.value.__context__ is None
    (stored,) = database.run(reading(SEALED))
    expected = [good, bad, good, None]
    assert (stored, list(map(type, stored))) == (expected, list(map(type, expected)))


@pytest.mark.long
@pytest.mark.parametrize("label", DIFFERENT)
def test_no_value_is_logged(
    database: Database, label: str, databases: Any, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "TOP-SECRET"
    debugged = Database(label, databases, hide_parameters=True)  # as echo="debug" logs it
    caplog.set_level(logging.DEBUG, logger="sqlalchemy.engine")
    for type_, value in (
        (sa.JSON(), {secret: secret}),
        (sa.Text(), f'["{secret}"]'),
        (Upper(), secret.lower()),
    ):
        plain = table_of(type_)
        database.run(filling(plain, [value]))
        caplog.clear()
        debugged.run(converting(encrypt_column, type_), converting(decrypt_column, type_))
        assert "value not shown" in caplog.text
        assert secret.lower() not in caplog.text.lower()
        database.run(database.clean)
    debugged.close()
