"""
Nothing leaks: markers are planted in key and plaintext, and searched for wherever text comes out.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    literal,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    PendingRollbackError,
    StatementError,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    Keyring,
    LucentError,
    LucentSecret,
    LucentSecrets,
    Sealed,
    SerializationError,
    UnsupportedOperationError,
    row_bound,
    set_default_keyring,
)
from tests.databases import create_unguarded

MARKER = "PLAINTEXT-MARKER-51c7"
SECRET: dict[str, Any] = {"token": MARKER, MARKER: [MARKER, {"deep": MARKER}]}
KEY = b"KEY-MARKER-" + b"\x07" * 21
KEY_FORMS = [b"KEY-MARKER-", KEY.hex().encode(), b"S0VZLU1BUktFUi"]


def assert_clean(*outputs: object) -> None:
    for output in outputs:
        data = output if isinstance(output, bytes) else str(output).encode("utf-8", "replace")
        for marker in (MARKER.encode(), *KEY_FORMS):
            assert marker not in data
        assert repr(KEY)[2:-1].encode() not in data


@pytest.fixture(autouse=True)
def marked_keyring(default_keyring_is_v1: None) -> Keyring:
    keyring = Keyring({"v1": KEY})
    set_default_keyring(keyring)
    return keyring


class Fussy(TypeDecorator[str]):
    """Another library's type, whose bind processor fails."""

    impl = String(50)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        if value == "refused":
            raise ValueError("no such value")
        return value


def fail() -> str:
    raise ZeroDivisionError("a default failed")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    __table_args__ = (UniqueConstraint("name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    fussy: Mapped[str | None] = mapped_column(Fussy)
    data: Mapped[Any] = mapped_column(EncryptedJSON)
    tracked: Mapped[Any] = mapped_column(EncryptedJSON.mutable(), nullable=True)
    lazy: Mapped[Any] = mapped_column(EncryptedJSON(lazy=True), nullable=True)
    bound: Mapped[Any] = row_bound("name", nullable=True)


class Unpickled(DeclarativeBase):
    pass


class Defaulting(Unpickled):
    __tablename__ = "defaulting"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), default=fail)
    data: Mapped[Any] = mapped_column(EncryptedJSON)


accounts: Any = Account.__table__


def account(**values: Any) -> Account:
    return Account(
        **{
            "id": 1,
            "name": "n",
            "data": SECRET,
            "tracked": SECRET,
            "lazy": SECRET,
            "bound": SECRET,
            **values,
        }
    )


@pytest.fixture
def tables(engine: Engine) -> Engine:
    create_unguarded(Base.metadata, engine)  # one of the errors is of a plaintext that is read
    Unpickled.metadata.create_all(engine)
    LucentSecret.metadata.create_all(engine)
    return engine


# -- logs ------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that any logger writes, at its most talkative."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("hide_parameters", [False, True])
@pytest.mark.parametrize("echo", [True, "debug"])
def test_no_log_has_a_plaintext_or_key(
    tables: Engine, log: io.StringIO, capfd: Any, echo: Any, hide_parameters: bool
) -> None:
    engine = create_engine(tables.url, echo=echo, hide_parameters=hide_parameters)
    with Session(engine) as session, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        session.add(account())
        session.add(account(id=2, name="m", data=MARKER, tracked=[MARKER], lazy=MARKER))
        session.commit()
        for row in session.scalars(select(Account)):
            assert row.data in (SECRET, MARKER)
            assert row.bound == SECRET
        assert session.execute(select(Account.data, Account.lazy, Account.tracked)).all()
        session.execute(update(Account).values(data=SECRET))
        session.execute(insert(Account), [{"id": 3, "name": "o", "data": SECRET}])
        LucentSecrets(session).set("app:default:resend:apiKey", SECRET)
        assert LucentSecrets(session).require("app:default:resend:apiKey") == SECRET
        session.rollback()
    engine.dispose()
    written = log.getvalue()
    assert "INSERT INTO accounts" in written
    assert ("Row (" in written) == (echo == "debug")
    assert_clean(written, *capfd.readouterr(), *(w.message for w in warned))


# -- errors ----------------------------------------------------------------------------------------


def insert_(connection: Connection, **values: Any) -> None:
    row = {"id": 1, "name": "n", "data": SECRET, "lazy": SECRET, **values}
    connection.execute(insert(accounts), row)


def flush(connection: Connection, *objects: Any) -> None:
    with Session(connection) as session:
        session.add_all(objects)
        session.flush()


FAILURES: dict[str, tuple[type[Exception], Callable[[Connection], object]]] = {
    "another column's bind processor, Core": (
        StatementError,
        lambda c: insert_(c, fussy="refused"),
    ),
    "another column's bind processor, values()": (
        StatementError,
        lambda c: c.execute(insert(accounts).values(id=1, data=SECRET, fussy="refused")),
    ),
    "another column's bind processor, many rows": (
        StatementError,
        lambda c: c.execute(
            insert(accounts),
            [{"id": i, "name": str(i), "data": SECRET, "fussy": "refused"} for i in (1, 2)],
        ),
    ),
    "another column's bind processor, ORM": (
        StatementError,
        lambda c: flush(c, account(fussy="refused")),
    ),
    "another column's bind processor, UPDATE": (
        StatementError,
        lambda c: c.execute(update(accounts), {"data": SECRET, "fussy": "refused"}),
    ),
    "another column's default": (StatementError, lambda c: flush(c, Defaulting(id=1, data=SECRET))),
    "a missing parameter": (
        StatementError,
        lambda c: c.execute(
            insert(accounts),
            [{"id": 1, "name": "n", "data": SECRET}, {"id": 2, "data": SECRET}],
        ),
    ),
    "NOT NULL": (DBAPIError, lambda c: insert_(c, name=None)),
    "NOT NULL, ORM": (DBAPIError, lambda c: flush(c, Account(id=1, data=SECRET, tracked=SECRET))),
    "UNIQUE": (IntegrityError, lambda c: flush(c, account(), account(id=2))),
    "a value that JSON refuses": (
        SerializationError,
        lambda c: insert_(c, data={"token": MARKER, "f": object(), MARKER + "!": {MARKER}}),
    ),
    "a value that JSON refuses, ORM": (
        SerializationError,
        lambda c: flush(c, account(data=[MARKER, KEY])),
    ),
    "a lone surrogate": (SerializationError, lambda c: insert_(c, data=MARKER + "\ud800")),
    "literal_binds": (
        UnsupportedOperationError,
        lambda c: insert(accounts).values(data=SECRET).compile(
            c, compile_kwargs={"literal_binds": True}
        ),
    ),
    "comparing": (UnsupportedOperationError, lambda c: select(accounts).where(
        accounts.c.data == SECRET)),
    "comparing in the ORM": (
        UnsupportedOperationError,
        lambda c: Session(c).query(Account).filter_by(data=SECRET),
    ),
    "a type without context": (
        LucentError,
        lambda c: c.scalar(select(literal(SECRET, EncryptedJSON))),
    ),
    "row binding left out": (
        LucentError,
        lambda c: c.execute(insert(accounts), {"id": 1, "name": "n", "data": 1, "bound": SECRET}),
    ),
    "plaintext in the column": (LucentError, lambda c: read_foreign(c, f'{{"a": "{MARKER}"}}')),
    "a changed value": (LucentError, lambda c: read_changed(c)),
    "another key": (LucentError, lambda c: read_with_another_key(c)),
    "a document that does not fit": (LucentError, lambda c: read_with_schema(c)),
}  # fmt: skip


def read_foreign(connection: Connection, foreign: str) -> None:
    insert_(connection)
    raw = type_coerce(foreign.encode(), LargeBinary)
    connection.execute(update(accounts).values(data=raw))
    connection.scalar(select(accounts.c.data))


def read_changed(connection: Connection) -> None:
    insert_(connection)
    stored = connection.scalar(select(type_coerce(accounts.c.data, LargeBinary)))
    assert stored is not None
    read_foreign_bytes = type_coerce(stored[:-1] + b"\0", LargeBinary)
    connection.execute(update(accounts).values(data=read_foreign_bytes))
    connection.scalar(select(accounts.c.data))


def read_with_another_key(connection: Connection) -> None:
    insert_(connection)
    set_default_keyring(Keyring({"v1": bytes(reversed(KEY))}))
    connection.scalar(select(accounts.c.data))


def read_with_schema(connection: Connection) -> None:
    insert_(connection)
    type_ = EncryptedJSON(context="accounts.data", schema=dict[str, int])
    connection.scalar(select(type_coerce(accounts.c.data, LargeBinary)).with_only_columns(
        type_coerce(accounts.c.data, type_)))  # fmt: skip


def chain_of(error: BaseException) -> list[BaseException]:
    """The error, what caused it and what it was raised amid."""
    chain = [error]
    for link in chain:
        chain += [e for e in (link.__cause__, link.__context__) if e and e not in chain]
    return chain


@pytest.mark.parametrize("hide_parameters", [False, True], ids=["", "hide_parameters"])
@pytest.mark.parametrize("failure", FAILURES)
def test_no_error_has_a_plaintext_or_key(
    tables: Engine, failure: str, hide_parameters: bool
) -> None:
    expected, provoke = FAILURES[failure]
    engine = create_engine(tables.url, hide_parameters=hide_parameters)
    try:
        with engine.connect() as connection, pytest.raises(expected) as caught:
            provoke(connection)
        error = caught.value
        assert_clean("".join(traceback.format_exception(error)), repr(error))
        for link in chain_of(error):
            assert_clean(str(link), repr(link), link.args)
            if isinstance(link, StatementError):
                assert_clean(repr(link.params))
                if not isinstance(link, DBAPIError):
                    assert_clean(pickle.dumps(copy.copy(link)))
    finally:
        engine.dispose()


def test_an_error_before_sealing_says_that_its_parameters_are_hidden(tables: Engine) -> None:
    with tables.connect() as connection, pytest.raises(StatementError) as caught:
        insert_(connection, fussy="refused")
    assert "parameters hidden" in str(caught.value)
    assert "no such value" in str(caught.value)
    assert "INSERT INTO accounts" in str(caught.value)


def test_an_error_of_the_database_still_shows_its_sealed_parameters(tables: Engine) -> None:
    with tables.connect() as connection, pytest.raises(DBAPIError) as caught:
        insert_(connection, name=None)
    assert "v1:" in str(caught.value)
    assert "parameters hidden" not in str(caught.value)


def test_an_engine_that_never_met_an_encrypted_column_shows_all_parameters(url: Any) -> None:
    table = Table("plain", MetaData(), Column("id", Integer, primary_key=True), Column("f", Fussy))
    engine = create_engine(url)
    table.create(engine)
    with engine.connect() as connection, pytest.raises(StatementError) as caught:
        connection.execute(insert(table), {"id": 77, "f": "refused"})
    assert "77" in str(caught.value)
    table.drop(engine)
    engine.dispose()


def test_a_session_that_must_be_rolled_back_does_not_repeat_the_plaintext(tables: Engine) -> None:
    with Session(tables) as session:
        session.add(account(fussy="refused"))
        with pytest.raises(StatementError):
            session.flush()
        with pytest.raises(PendingRollbackError) as caught:
            session.begin_nested()
        assert_clean("".join(traceback.format_exception(caught.value)))
        session.rollback()


def test_async_errors_have_no_plaintext(run_async: Callable[..., Any]) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        for broken in (account(fussy="refused"), Account(id=1, data=SECRET)):
            async with AsyncSession(engine) as session:
                session.add(broken)
                with pytest.raises(StatementError) as caught:
                    await session.flush()
                assert_clean("".join(traceback.format_exception(caught.value)))

    run_async(work)


# -- text forms ------------------------------------------------------------------------------------


def test_no_repr_or_str_has_a_plaintext_or_key(tables: Engine, marked_keyring: Keyring) -> None:
    with Session(tables) as session:
        session.add(account())
        session.commit()
        loaded = session.scalars(select(Account)).one()
        secrets = LucentSecrets(session, keyring=marked_keyring)
        secrets.set("app:default:resend:apiKey", SECRET)
        for thing in (
            loaded,
            loaded.data,
            loaded.tracked,
            loaded.tracked[MARKER],
            loaded.lazy,
            loaded.bound,
            loaded.__dict__,
            inspect(loaded),
            inspect(loaded).attrs.data.history,
            session.execute(select(Account.data, Account.lazy)).all(),
            accounts,
            accounts.c.data,
            accounts.c.data.type,
            Account.data,
            select(Account).where(Account.data.is_(None)),
            insert(accounts).values(data=SECRET),
            Bound(SECRET, row=("n",)),
            marked_keyring,
            marked_keyring.for_context("accounts.data"),
            secrets,
            session.scalars(select(LucentSecret)).one(),
            secrets.list(),
        ):
            assert_clean(repr(thing), str(thing))
        assert loaded.data == SECRET


def test_a_value_written_into_a_statement_shows_where_sqlalchemy_prints_parameters() -> None:
    """Pinned because the documentation says so: a type has no say in these two."""
    statement = insert(accounts).values(data=SECRET)
    assert MARKER in repr(statement.compile().params)
    assert MARKER in repr(literal(SECRET, accounts.c.data.type))
    assert_clean(str(statement), repr(statement), str(statement.compile()))


# -- pickles ---------------------------------------------------------------------------------------


def test_no_pickle_of_types_tables_or_unopened_values_has_a_plaintext_or_key(
    tables: Engine,
) -> None:
    with Session(tables) as session:
        session.add(account())
        session.commit()
        # Processors are made and used by now.
        assert session.scalars(select(Account)).one().data == SECRET
        lazy = session.scalars(select(Account.lazy)).one()
        bound = session.scalars(select(Account.bound)).one()
        assert isinstance(lazy, Sealed)
        assert lazy.open() == bound.open(row=["n"]) == SECRET
    for thing in (accounts.c.data.type, accounts, Base.metadata, lazy, bound):
        data = pickle.dumps(thing)
        assert_clean(data)
        pickle.loads(data)
    assert pickle.loads(pickle.dumps(lazy)).open() == SECRET
    table = pickle.loads(pickle.dumps(accounts))
    assert table.c.data.type.context == "accounts.data"


def test_a_pickled_model_holds_what_was_opened_and_nothing_more(tables: Engine) -> None:
    with Session(tables) as session:
        session.add(account())
        session.commit()
    with Session(tables) as session:
        loaded = session.scalars(select(Account)).one()
        assert loaded.lazy.open() == loaded.bound == SECRET
        session.expire(loaded, ["data", "tracked"])
        data = pickle.dumps(loaded)
        assert_clean(data)
        restored = pickle.loads(data)
        assert restored.lazy.open() == restored.bound == SECRET
        assert loaded.data == SECRET
        # As with sqlalchemy.JSON: an opened value is part of the object that holds it.
        assert MARKER.encode() in pickle.dumps(loaded)
        assert pickle.loads(pickle.dumps(loaded)).data == SECRET
        assert_clean(repr(pickle.loads(pickle.dumps(loaded)).data))


# -- the statement cache ---------------------------------------------------------------------------


def reachable(root: object) -> Iterator[object]:
    """Every object that `root` leads to, short of modules, classes and functions' globals."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        thing = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if not isinstance(thing, (type, type(gc), type(gc.collect), type(reachable))):
            pending += gc.get_referents(thing)


def strings_in_cache(engine: Engine) -> str:
    cache: Any = engine._compiled_cache
    roots = [(key, compiled.statement, compiled.params) for key, compiled in cache.items()]
    return "\0".join(str.__str__(t) for t in reachable(roots) if type(t) is str)


def test_no_statement_cache_key_has_a_plaintext_or_key(tables: Engine) -> None:
    with Session(tables) as session:
        session.add(account())
        session.commit()
        session.execute(update(Account).values(data=SECRET))
        session.execute(insert(accounts).values(id=2, name="m", data=SECRET))
        session.execute(select(Account).where(Account.data.is_not(None))).all()
        session.rollback()
    cache: Any = tables._compiled_cache
    assert len(cache) >= 3
    for key in cache:
        assert_clean(repr(key))


def test_what_the_orm_writes_does_not_stay_in_the_statement_cache(tables: Engine) -> None:
    engine = create_engine(tables.url)
    with Session(engine) as session:
        session.add(account())
        session.commit()
        row = session.scalars(select(Account)).one()
        row.data = {"a": MARKER}
        session.commit()
        session.execute(insert(Account), [{"id": 2, "name": "m", "data": SECRET}])
        session.execute(insert(accounts), {"id": 3, "name": "o", "data": SECRET})
        session.commit()
    cached = strings_in_cache(engine)
    assert "accounts" in cached
    assert_clean(cached)
    engine.dispose()


def test_what_is_written_into_a_statement_stays_in_the_cache_like_any_parameter(
    tables: Engine,
) -> None:
    """
    Pinned because the documentation says so: SQLAlchemy keeps the first statement of each form,
    and with it the values that were written into it. Passing them to execute() keeps none.
    """
    engine = create_engine(tables.url)
    with engine.begin() as connection:
        connection.execute(insert(accounts).values(id=1, name="n", data={"a": MARKER}))
    assert MARKER in strings_in_cache(engine)
    engine.dispose()


def test_what_event_listeners_and_the_driver_see_is_sealed(tables: Engine) -> None:
    seen: list[object] = []

    def listener(conn: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    event.listen(tables, "before_cursor_execute", listener)
    with Session(tables) as session:
        session.add_all([account(), account(id=2, name="m")])
        session.commit()
    event.remove(tables, "before_cursor_execute", listener)
    assert seen
    assert_clean(repr(seen))


def test_the_database_holds_no_plaintext(tables: Engine) -> None:
    with Session(tables) as session:
        session.add(account())
        session.commit()
        row = session.execute(text("SELECT * FROM accounts")).one()
        assert_clean(repr(row), *(bytes(v) for v in row if isinstance(v, (bytes, memoryview))))
