"""psycopg's results in binary: when a statement gets them, and that no value changes by it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.adapt import Loader
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Table,
    Text,
    Uuid,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.types import NullType

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    LucentBase,
    LucentSecrets,
    RotationReport,
    arotate,
    rotate,
    set_default_keyring,
)
from tests.conftest import Databases
from tests.databases import create_extension, drop_everything

Work = Callable[..., Any]
Run = Callable[[Work], Any]
"""Runs work in a transaction of an engine that has one connection."""

TEXT, BINARY = 0, 1
ID = UUID("00000000-0000-4000-8000-000000000001")

metadata = MetaData()
things = Table(
    "things",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text),
    Column("token", Uuid),
    Column("payload", EncryptedJSON),
)
READ = select(things).order_by(things.c.id)
ROW = (1, "one", ID, {"key": "sk_1"})


@pytest.fixture
def url(databases: Databases) -> Iterator[URL]:
    """An empty database of PostgreSQL with one row in `things`."""
    url = databases.url("postgresql")
    engine = create_engine(url)
    with engine.begin() as connection:
        metadata.create_all(connection)
        connection.execute(insert(things).values(id=1, name="one", token=ID, payload=ROW[3]))
    yield url
    drop_everything(engine)
    engine.dispose()


@contextmanager
def watched(engine: Engine) -> Iterator[list[int]]:
    """List the format of each result from here on."""
    formats: list[int] = []

    def note(_connection: Any, cursor: Any, *_rest: Any) -> None:
        result = getattr(cursor, "_cursor", cursor).pgresult
        if result is not None and result.nfields:
            formats.append(result.fformat(0))

    event.listen(engine, "after_cursor_execute", note)
    yield formats
    event.remove(engine, "after_cursor_execute", note)


@contextmanager
def opened(url: URL, *, is_async: bool = False, **options: Any) -> Iterator[tuple[Engine, Run]]:
    """Open an engine that prepares no statements: if a type was altered, PostgreSQL refuses to
    execute a prepared one, in either format.
    """
    arguments = {"prepare_threshold": None} | options.pop("connect_args", {})
    options |= {"pool_size": 1, "max_overflow": 0, "connect_args": arguments}
    if not is_async:
        engine = create_engine(url, **options)

        def run(work: Work) -> Any:
            with engine.begin() as connection:
                return work(connection)

        yield engine, run
        engine.dispose()
        return

    with asyncio.Runner() as runner:
        async_engine = create_async_engine(url, **options)

        async def begun(work: Work) -> Any:
            async with async_engine.begin() as connection:
                return await connection.run_sync(work)

        yield async_engine.sync_engine, lambda work: runner.run(begun(work))
        runner.run(async_engine.dispose())


@pytest.fixture(params=["sync", "async"])
def reader(request: pytest.FixtureRequest, url: URL) -> Iterator[tuple[Engine, Run]]:
    """An engine with one connection, sync and async, that has read `things` in binary."""
    with opened(url, is_async=request.param == "async") as (engine, run):
        assert read_to_binary(engine, run) == [ROW]
        yield engine, run


def read(connection: Connection) -> Any:
    return connection.execute(READ).all()


def read_to_binary(engine: Engine, run: Run, work: Work = read) -> Any:
    """Run work until its result is in binary, as it is from the third time on; return the last."""
    with watched(engine) as formats:
        results = [run(work) for _ in range(3)]
    assert formats == [TEXT, TEXT, BINARY]
    assert results[0] == results[1] == results[2]
    return results[2]


def alter(url: URL, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


# -- which statements ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("prepare_threshold", [0, 5, None])
def test_a_statement_that_selects_sealed_values_is_read_in_binary(
    url: URL, is_async: bool, prepare_threshold: int | None
) -> None:
    arguments = {"prepare_threshold": prepare_threshold}
    with opened(url, is_async=is_async, connect_args=arguments) as (engine, run):
        assert read_to_binary(engine, run) == [ROW]
        with watched(engine) as formats:
            assert [run(read) for _ in range(8)] == [[ROW]] * 8
        assert formats == [BINARY] * 8


def test_no_other_statement_is_read_in_binary(reader: tuple[Engine, Run]) -> None:
    engine, run = reader
    others = [
        select(things.c.id, things.c.name),
        select(things.c.payload.key_version),
        text("SELECT id, payload FROM things"),
    ]
    with watched(engine) as formats:
        for statement in others * 3:
            run(lambda connection, statement=statement: connection.execute(statement).all())
    assert formats == [TEXT] * 9


@pytest.mark.parametrize("is_async", [False, True])
def test_a_rotation_reads_in_binary(url: URL, promoted: Keyring, is_async: bool) -> None:
    formats: list[int] = []

    def note(_connection: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        if "FOR NO KEY UPDATE" in statement:
            formats.append(getattr(cursor, "_cursor", cursor).pgresult.fformat(0))

    async def rotate_async() -> RotationReport:
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "after_cursor_execute", note)
        async with engine.connect() as connection:
            report = await arotate(connection, things, keyring=promoted, batch_size=10)
        await engine.dispose()
        return report

    engine = create_engine(url)
    with engine.begin() as connection:
        more = [{"id": n, "payload": ROW[3]} for n in range(2, 202)]
        connection.execute(insert(things), more)
    event.listen(engine, "after_cursor_execute", note)
    with engine.connect() as connection:
        if is_async:
            report = asyncio.run(rotate_async())
        else:
            report = rotate(connection, things, keyring=promoted, batch_size=10)
    assert report.rotated == 201
    # Of each statement the first result is a text: of the check, and of the first, a later and the
    # last batch, which differ in their bounds.
    assert formats.count(TEXT) <= 4
    assert formats.count(BINARY) >= 15
    set_default_keyring(promoted)
    with engine.connect() as connection:
        assert {row.payload["key"] for row in read(connection)} == {"sk_1"}
    engine.dispose()


def test_the_orm_and_the_repository_read_in_binary(url: URL) -> None:
    with opened(url) as (engine, run):
        run(LucentBase.metadata.create_all)

        def fill(connection: Connection) -> None:
            with Session(connection) as session:
                LucentSecrets(session).set("app:default:resend:apiKey", {"apiKey": "re_1"})
                session.commit()

        def get(connection: Connection) -> Any:
            with Session(connection) as session:
                return LucentSecrets(session).get("app:default:resend:apiKey")

        run(fill)
        assert read_to_binary(engine, run, get) == {"apiKey": "re_1"}


@pytest.mark.parametrize("where", ["engine", "connection", "statement"])
def test_an_execution_option_turns_it_off(url: URL, where: str) -> None:
    off: Any = {"lucent_binary_results": False}

    def work(connection: Connection) -> Any:
        if where == "connection":
            connection = connection.execution_options(**off)
        return connection.execute(READ.execution_options(**off if where == "statement" else {}))

    options: dict[str, Any] = {"execution_options": off} if where == "engine" else {}
    with opened(url, **options) as (engine, run), watched(engine) as formats:
        for _ in range(4):
            assert run(lambda connection: work(connection).all()) == [ROW]
    assert formats == [TEXT] * 4


@pytest.mark.parametrize(
    "written",
    [
        insert(things).values(id=2, payload={"key": "sk_2"}).returning(things.c.payload),
        update(things).values(payload={"key": "sk_2"}).returning(things.c.payload),
        postgresql_insert(things)
        .values(id=1, payload={})
        .on_conflict_do_update(index_elements=["id"], set_={"payload": {"key": "sk_2"}})
        .returning(things.c.payload),
    ],
    ids=["insert", "update", "upsert"],
)
def test_what_a_write_returns_is_read_as_text(reader: tuple[Engine, Run], written: Any) -> None:
    engine, run = reader

    def write(connection: Connection) -> Any:
        with connection.begin_nested() as savepoint:
            values = connection.execute(written).scalars().all()
            savepoint.rollback()
        return values

    with watched(engine) as formats:
        assert [run(write) for _ in range(4)] == [[{"key": "sk_2"}]] * 4
    assert formats == [TEXT] * 4


def test_a_write_within_a_select_is_executed_once(reader: tuple[Engine, Run]) -> None:
    engine, run = reader
    added = insert(things).values(id=bindparam("new")).returning(things.c.payload).cte()
    with watched(engine) as formats:
        for new in range(2, 6):
            run(lambda connection, new=new: connection.execute(select(added), {"new": new}).all())
    assert formats == [TEXT] * 4
    assert len(run(read)) == 5


@pytest.mark.parametrize(
    "calling",
    [
        select(things.c.payload, func.nextval("counter")),
        select(things.c.payload).where(func.nextval("counter") > 0),
        select(things.c.payload).where(text("nextval('counter') > 0")),
        select(select(things.c.payload, func.nextval("counter")).subquery()),
        select(select(things.c.payload, func.nextval("counter")).cte()),
    ],
)
def test_a_select_that_calls_a_function_is_executed_once(
    reader: tuple[Engine, Run], url: URL, calling: Any
) -> None:
    engine, run = reader
    alter(url, "DROP SEQUENCE IF EXISTS counter", "CREATE SEQUENCE counter")
    with watched(engine) as formats:
        for _ in range(4):
            run(lambda connection: connection.execute(calling).all())
    assert formats == [TEXT] * 4
    assert run(lambda connection: connection.scalar(text("SELECT last_value FROM counter"))) == 4
    alter(url, "DROP SEQUENCE counter")


def test_many_rows_with_returning_keep_their_order(reader: tuple[Engine, Run]) -> None:
    _, run = reader
    rows = [{"id": number, "payload": {"n": number}} for number in range(10, 1500)]
    statement = insert(things).returning(
        things.c.id, things.c.payload, sort_by_parameter_order=True
    )
    returned = run(lambda connection: connection.execute(statement, rows).all())
    assert returned == [(row["id"], row["payload"]) for row in rows]


# -- which values ----------------------------------------------------------------------------------

ALIKE = {
    "boolean": ["true", "false"],
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "2147483647"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "text": ["", "Zürich", "\\x00", "a'b\nc"],
    "varchar(20)": ["Zürich "],
    "char(9)": ["Zürich"],
    "uuid": [str(ID)],
    "bytea": ["", "\\x00ff5c27"],
    "date": ["2026-02-28", "0001-01-01", "9999-12-31", "0044-03-15 BC", "10000-01-01"],
    "timestamp": [
        "2026-03-29 02:30:00.000001",
        "0001-01-01 00:00",
        "9999-12-31 23:59:59.999999",
        "0044-03-15 BC",
        "10000-01-01",
    ],
    "timestamptz": [
        "2026-03-29 02:30:00.000001+01",
        "2026-10-25 02:30:00+01",
        "2026-10-25 02:30:00+02",
        "1880-01-01 00:00+00",
        "0001-01-01 00:00+00",
        "0001-01-02 00:00+00",
        "9999-12-31 23:59:59.999999+00",
        "9999-12-30 00:00+00",
        "0044-03-15 BC",
    ],
}
for of_time in ("date", "timestamp", "timestamptz"):
    ALIKE[of_time] += ["infinity", "-infinity"]


def outcome(run: Run, statement: Any) -> Any:
    """Return the value that a statement reads, and its type; or the error."""
    try:
        value = run(lambda connection: connection.execute(statement).one()[0])
    except DataError as error:
        return type(error.orig)
    return type(value), value, getattr(value, "utcoffset", lambda: None)()


def quoted(value: str | None) -> str:
    return "NULL" if value is None else "'" + value.replace("'", "''") + "'"


@pytest.mark.parametrize("zone", ["UTC", "Europe/Zurich", "America/New_York", "Asia/Kathmandu"])
@pytest.mark.parametrize("is_async", [False, True])
def test_values_are_the_same_in_both_formats(url: URL, zone: str, is_async: bool) -> None:
    arguments = {"options": f"-c timezone={zone}"}
    options: dict[str, Any] = {"is_async": is_async, "connect_args": arguments}
    off = {"lucent_binary_results": False}
    with (
        opened(url, **options) as (engine, run),
        opened(url, **options, execution_options=off) as (as_text, run_as_text),
    ):
        for type_, values in ALIKE.items():
            alter(url, f"ALTER TABLE things DROP name, ADD name {type_}")
            table = Table(
                "things",
                MetaData(),
                Column("name", NullType),
                Column("payload", EncryptedJSON),
            )
            for value in (None, *values):
                alter(url, f"UPDATE things SET name = {quoted(value)}")
                statement = select(table).with_hint(table, value or "", "comment")
                with watched(engine) as formats, watched(as_text) as text_formats:
                    results = [outcome(run, statement) for _ in range(3)]
                    expected = outcome(run_as_text, statement)
                assert results == [expected] * 3, (type_, value)
                if isinstance(expected, tuple):  # SQLAlchemy's async cursor fetches at once
                    assert formats[-1] == BINARY, (type_, value)
                    assert text_formats == [TEXT]


@pytest.mark.parametrize("encoding", ["utf8", "latin1"])
def test_text_is_decoded_by_the_clients_encoding(url: URL, encoding: str) -> None:
    alter(url, "UPDATE things SET name = 'Zürich'")
    with opened(url, connect_args={"client_encoding": encoding}) as (engine, run):
        assert read_to_binary(engine, run)[0].name == "Zürich"


@pytest.mark.parametrize(
    "type_",
    ["citext", "mood", "real", "numeric", "jsonb", "interval", "oid", "name", "text[]", "money"],
)
def test_a_result_with_another_type_is_read_as_text(url: URL, type_: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        create_extension(connection, "citext")
        connection.execute(text("CREATE TYPE mood AS ENUM ('1')"))
        value = "'{1}'" if type_ == "text[]" else "'1'"
        connection.execute(text(f"ALTER TABLE things DROP name, ADD name {type_} DEFAULT {value}"))
    engine.dispose()
    table = Table("things", MetaData(), Column("name", NullType), Column("payload", EncryptedJSON))
    with opened(url) as (engine, run), watched(engine) as formats:
        for _ in range(4):
            run(lambda connection: connection.execute(select(table)).all())
    assert formats == [TEXT] * 4


def test_a_domain_is_read_as_its_type(url: URL) -> None:
    alter(
        url,
        "DROP DOMAIN IF EXISTS label CASCADE",
        "CREATE DOMAIN label AS text CHECK (VALUE <> '')",
        "ALTER TABLE things ALTER name TYPE label",
    )
    with opened(url) as (engine, run):
        assert read_to_binary(engine, run) == [ROW]
    alter(url, "DROP DOMAIN label CASCADE")


# -- a type that changes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("citext", "one"),
        ("varchar(9)", "one"),
        ("mood", "one"),
        ("json USING to_json(name)", "one"),
        ("numeric USING 1.50", "1.50"),
        ("real USING 0.1", "0.1"),
    ],
)
def test_a_column_whose_type_is_altered_reads_right_at_once(
    reader: tuple[Engine, Run], url: URL, type_: str, expected: str
) -> None:
    engine, run = reader
    setup = create_engine(url)
    with setup.begin() as connection:
        create_extension(connection, "citext")
        connection.execute(text("CREATE TYPE mood AS ENUM ('one')"))
    setup.dispose()
    using = type_ if "USING" in type_ else f"{type_} USING CAST(name AS {type_})"
    alter(url, f"ALTER TABLE things ALTER name TYPE {using}")
    with watched(engine) as formats:
        results = [str(run(read)[0].name) for _ in range(4)]
    assert results == [expected] * 4
    # The first was executed twice. The statement stays with text, also if the column does not.
    assert formats == [BINARY if type_.startswith("varchar") else TEXT] * 4
    alter(url, "ALTER TABLE things ALTER name TYPE text USING 'one'")
    with watched(engine) as formats:
        assert run(read) == [ROW]
    assert formats == [BINARY if type_.startswith("varchar") else TEXT]


def test_another_table_by_the_search_path_reads_right(reader: tuple[Engine, Run], url: URL) -> None:
    _, run = reader
    setup = create_engine(url)
    with setup.begin() as connection:
        create_extension(connection, "citext")
    setup.dispose()
    alter(
        url,
        "DROP SCHEMA IF EXISTS tenant CASCADE",
        "CREATE SCHEMA tenant",
        "CREATE TABLE tenant.things AS SELECT * FROM things",
        "ALTER TABLE tenant.things ALTER name TYPE citext",
    )

    def read_tenant(connection: Connection) -> Any:
        connection.exec_driver_sql("SET LOCAL search_path TO tenant, public")
        return connection.execute(READ).all()

    try:
        assert [run(read_tenant), run(read), run(read_tenant)] == [[ROW]] * 3
        for translated in ({None: "tenant"}, {None: "public"}):
            assert run(
                lambda c, names=translated: (
                    c.execution_options(schema_translate_map=names).execute(READ).all()
                )
            ) == [ROW]
    finally:
        alter(url, "DROP SCHEMA tenant CASCADE")


# -- what users bring ------------------------------------------------------------------------------


class Shout(Loader):
    """A user's loader: psycopg knows it for text only."""

    def load(self, data: Any) -> str:
        return bytes(data).decode().upper()


@pytest.mark.parametrize("type_", ["text", "uuid"])
def test_a_loader_of_the_users_is_used(url: URL, type_: str) -> None:
    table = Table(
        "things",
        MetaData(),
        Column("name", NullType),
        Column("token", NullType),
        Column("payload", EncryptedJSON),
    )
    with opened(url) as (engine, run):

        def register(connection: Any, _record: Any) -> None:
            connection.adapters.register_loader(type_, Shout)

        event.listen(engine, "connect", register)
        with watched(engine) as formats:
            for _ in range(4):
                name, token, _ = run(lambda connection: connection.execute(select(table)).one())
                assert (name, token) == (("ONE", ID) if type_ == "text" else ("one", str(ID)))
        assert formats == [TEXT] * 4


def test_a_loader_that_is_registered_later_is_used(reader: tuple[Engine, Run]) -> None:
    _, run = reader

    def register(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.adapters.register_loader("text", Shout)

    run(register)
    assert run(read)[0].name == "ONE"


def test_a_cursor_class_of_the_users_stays(url: URL) -> None:
    class Mine(psycopg.Cursor[Any]):
        pass

    made: list[object] = []

    def make(connection: psycopg.Connection[Any], **options: Any) -> psycopg.Cursor[Any]:
        made.append(connection)
        return psycopg.Cursor(connection, row_factory=connection.row_factory)

    for factory in (Mine, psycopg.ClientCursor, make):
        arguments = {"cursor_factory": factory}
        with opened(url, connect_args=arguments) as (engine, run), watched(engine) as formats:

            def work(connection: Connection, factory: Any = factory) -> Any:
                driver: Any = connection.connection.driver_connection
                assert driver.cursor_factory is factory
                return connection.execute(READ).all()

            assert [run(work) for _ in range(4)] == [[ROW]] * 4
        assert set(formats) <= {TEXT}
    assert made


def test_an_async_client_cursor_stays(url: URL) -> None:
    arguments = {"cursor_factory": psycopg.AsyncClientCursor}
    with (
        opened(url, is_async=True, connect_args=arguments) as (engine, run),
        watched(engine) as formats,
    ):
        assert [run(read) for _ in range(4)] == [[ROW]] * 4
    assert formats == [TEXT] * 4


def test_a_server_side_cursor_reads_as_text(reader: tuple[Engine, Run]) -> None:
    _, run = reader
    run(
        lambda connection: connection.execute(
            insert(things), [{"id": n, "payload": {"n": n}} for n in range(2, 500)]
        )
    )
    for options in ({"stream_results": True}, {"yield_per": 7}):

        def stream(connection: Connection, options: Any = options) -> Any:
            result = connection.execution_options(**options).execute(READ)
            return [row.payload for row in result]

        for _ in range(3):
            values = run(stream)
            assert values[0] == ROW[3]
            assert values[1:] == [{"n": n} for n in range(2, 500)]


def test_a_listener_that_executes_the_statement_itself_reads_the_same(
    reader: tuple[Engine, Run],
) -> None:
    engine, run = reader
    done: list[str] = []

    def execute(cursor: Any, statement: str, parameters: Any, _context: Any) -> bool:
        cursor.execute(statement, parameters)
        done.append(statement)
        return True

    event.listen(engine, "do_execute", execute)
    assert [run(read) for _ in range(4)] == [[ROW]] * 4
    assert len(done) == 4


def test_what_a_listener_executes_with_the_cursor_is_left_alone(
    reader: tuple[Engine, Run], url: URL
) -> None:
    engine, run = reader
    alter(url, "CREATE TABLE audit (id serial, at numeric DEFAULT 0.1)")
    seen: list[Any] = []

    def audit(cursor: Any, statement: str, _parameters: Any, _context: Any) -> None:
        if statement.startswith("SELECT things"):
            cursor.execute("INSERT INTO audit DEFAULT VALUES RETURNING at")
            seen.append(getattr(cursor, "_cursor", cursor).pgresult.fformat(0))

    event.listen(engine, "do_execute", audit)
    with watched(engine) as formats:
        assert [run(read) for _ in range(4)] == [[ROW]] * 4
    assert (formats, seen) == ([BINARY] * 4, [TEXT] * 4)
    count = text("SELECT count(*) FROM audit")
    assert run(lambda connection: connection.execute(count).scalar_one()) == 4


def test_a_listener_that_asks_for_binary_itself_gets_it(url: URL) -> None:
    with opened(url) as (engine, run):

        def ask(_connection: Any, cursor: Any, *_rest: Any) -> None:
            cursor.format = 1

        event.listen(engine, "before_cursor_execute", ask)
        with watched(engine) as formats:
            assert [run(read) for _ in range(4)] == [[ROW]] * 4
        assert formats == [BINARY] * 4


def test_a_listener_that_adds_a_comment_keeps_it_in_binary(url: URL) -> None:
    with opened(url) as (engine, run):

        @event.listens_for(engine, "before_cursor_execute", retval=True)
        def comment(_c: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> Any:
            return f"{statement} /* route=/keys */", parameters

        assert read_to_binary(engine, run) == [ROW]


def test_a_pipeline_ends_it(url: URL) -> None:
    with opened(url) as (engine, run):
        read_to_binary(engine, run)

        def work(connection: Connection) -> Any:
            driver: Any = connection.connection.driver_connection
            with driver.pipeline():
                # SQLAlchemy sees no rows, because psycopg has not asked for them.
                assert not connection.execute(READ).returns_rows
            return connection.execute(READ).all()

        with watched(engine) as formats:
            assert [run(work) for _ in range(3)] == [[ROW]] * 3
        assert formats == [TEXT] * 3


def test_an_error_in_the_database_is_raised_as_ever(reader: tuple[Engine, Run], url: URL) -> None:
    _, run = reader
    alter(url, "UPDATE things SET name = 'x'", "ALTER TABLE things RENAME name TO title")
    with pytest.raises(Exception, match="name does not exist"):
        run(read)
    alter(url, "ALTER TABLE things RENAME title TO name")
    assert run(read)[0].name == "x"
