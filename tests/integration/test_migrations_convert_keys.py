"""No committed write is lost by a conversion, whatever the type of the primary key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, Engine, MetaData, Table, create_engine, event

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    RotationError,
    migrations,
    set_default_keyring,
    status,
)
from tests.conftest import LONG
from tests.databases import create_extension
from tests.primary_keys import CASES, KEYS, Keys, keys_of

LOCKS = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "LOCK TABLE", "mysql": "LOCK TABLES"}


def table_of(keys: Keys, type_: Any) -> Table:
    return Table("t", MetaData(), *keys.columns(), Column("data", type_))


def sealed_type(context: str = "t.data") -> EncryptedJSON:
    return EncryptedJSON(context=context, redact=False)


@pytest.fixture(params=CASES, ids="-".join)
def keys(request: pytest.FixtureRequest) -> Keys:
    return keys_of(request.param[1])


@pytest.fixture
def engine(request: pytest.FixtureRequest, keys: Keys, databases: Any) -> Iterator[Engine]:
    (kind, _) = request.node.callspec.params["keys"]
    engine = create_engine(databases.url(kind))
    if keys.extension is not None:
        with engine.begin() as connection:
            create_extension(connection, keys.extension)
    yield engine
    table_of(keys, sa.JSON()).metadata.drop_all(engine)
    engine.dispose()


class Writer:
    """Somebody else, who changes every row, and adds and removes some, while an operation runs."""

    def __init__(self, engine: Engine, table: Table, keys: Keys) -> None:
        self._engine = create_engine(engine.url)
        self._table = table
        self._absent = [keys.values[-1]]
        self._keys = keys
        self.turn = 0
        self.windows: list[str] = []

    def write(self, connection: Connection) -> None:
        """Change every row, and take one row away or bring it back."""
        self.turn += 1
        data = {"turn": self.turn}
        connection.execute(self._table.update().values(data=data))
        (key,) = self._absent
        if self.turn % 2:
            row = self._keys.row(key)
            connection.execute(self._table.insert().values(**row, data=data))
        else:
            matches = [self._table.c[name] == part for name, part in self._keys.row(key).items()]
            connection.execute(self._table.delete().where(*matches))

    def commit_at(self, window: str) -> None:
        self.windows.append(window)
        with self._engine.begin() as connection:
            self.write(connection)

    def hold_and_commit_later(self) -> None:
        """Write, and commit while the operation waits for the lock."""
        self.windows.append("waiting")
        connection = self._engine.connect()
        self.write(connection)

        def commit() -> None:
            connection.commit()
            connection.close()

        threading.Timer(0.05, commit).start()

    @contextmanager
    def in_every_window(self, engine: Engine) -> Iterator[None]:
        lock = LOCKS[engine.dialect.name]
        added = False

        def before(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            nonlocal added
            if statement.startswith("ALTER TABLE") and " ADD " in statement:
                added = True
            elif added and "added" not in self.windows:
                self.commit_at("added")
            elif statement.startswith("BEGIN") and self.windows.count("batch") < 3:
                self.commit_at("batch")
            elif statement.startswith(lock) and "waiting" not in self.windows:
                if engine.dialect.name != "sqlite":
                    self.commit_at("lock")
                self.hold_and_commit_later()

        event.listen(engine, "before_cursor_execute", before)
        try:
            yield
        finally:
            event.remove(engine, "before_cursor_execute", before)
            self._engine.dispose()


def read(engine: Engine, table: Table) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return in_order(map(tuple, connection.execute(sa.select(table))))


def in_order(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sort by what a key looks like: sets and mixed types have no order of their own."""
    return sorted(rows, key=lambda row: [sorted(p) if isinstance(p, set) else repr(p) for p in row])


def run(engine: Engine, name: str, **options: Any) -> None:
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operation = getattr(migrations, name)
        operation("t", "data", batch_size=2, operations=operations, **options)


def fill(engine: Engine, table: Table, keys: Keys) -> None:
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{**keys.row(key), "data": {"turn": 0}} for key in keys.values[:-1]]
        connection.execute(table.insert(), rows)


def with_writer(
    engine: Engine, table: Table, keys: Keys, work: Callable[[], None]
) -> list[tuple[Any, ...]]:
    """Do `work` while somebody writes to `table`; return the rows that were committed last."""
    writer = Writer(engine, table, keys)
    with writer.in_every_window(engine):
        work()
    assert writer.turn, "no window was met"
    present = keys.values if writer.turn % 2 else keys.values[:-1]
    return in_order((*key, {"turn": writer.turn}) for key in present)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Dialect sqlite.pysqlite does .not. support Decimal",
    "ignore:Type object .* does not refer to an OperatorClass",  # SQLAlchemy's own types
)


def test_no_write_is_lost_by_encrypting_and_decrypting(engine: Engine, keys: Keys) -> None:
    plain, sealed = table_of(keys, sa.JSON()), table_of(keys, sealed_type())
    fill(engine, plain, keys)

    written = with_writer(
        engine, plain, keys, lambda: run(engine, "encrypt_column", existing_type=sa.JSON())
    )
    assert read(engine, sealed) == written

    with engine.begin() as connection:
        matches = [sealed.c[f"k{n}"] == part for n, part in enumerate(keys.values[-1])]
        connection.execute(sealed.delete().where(*matches))
    written = with_writer(
        engine, sealed, keys, lambda: run(engine, "decrypt_column", existing_type=sa.JSON())
    )
    assert read(engine, plain) == written


@pytest.mark.long
@pytest.mark.parametrize(
    "keys", [case for case in CASES if LONG or case[1] in KEYS], indirect=True, ids="-".join
)
def test_every_row_is_bound_anew_and_rotated(engine: Engine, keys: Keys, promoted: Keyring) -> None:
    earlier, sealed = table_of(keys, sealed_type("t.earlier")), table_of(keys, sealed_type())
    fill(engine, earlier, keys)

    written = with_writer(
        engine,
        sealed,
        keys,
        lambda: run(engine, "rebind_encrypted_column", from_context="t.earlier"),
    )
    assert read(engine, sealed) == written

    set_default_keyring(promoted)
    run(engine, "rotate_encrypted_column")
    assert {row.key_version for row in status(engine, sealed).rows} == {"v2"}


@pytest.fixture
def server(request: pytest.FixtureRequest, databases: Any) -> Iterator[Engine]:
    engine = create_engine(databases.url(request.param))
    yield engine
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS t")
    engine.dispose()


@pytest.mark.parametrize("server", ["mysql"], indirect=True)
def test_a_key_of_an_inexact_type_is_refused_and_nothing_is_lost(server: Engine) -> None:
    keys = Keys([sa.FLOAT(6)], [(0.1,), (0.2,), (1.5,), (9.9,)])
    plain = table_of(keys, sa.JSON())
    fill(server, plain, keys)

    with pytest.raises(RotationError, match=r"cannot be|primary key"):
        run(server, "encrypt_column", existing_type=sa.JSON())

    assert [row[1] for row in read(server, plain)] == [{"turn": 0}] * 3


@pytest.mark.parametrize("server", ["mysql", "sqlite"], indirect=True)
def test_a_value_that_is_refused_under_the_lock_is_named(
    server: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys([sa.Integer()], [(n,) for n in range(1, 6)])
    sealed = table_of(keys, sealed_type())
    sealed.metadata.create_all(server)
    with server.begin() as connection:
        rows = [{**keys.row(key), "data": "a"} for key in keys.values]
        connection.execute(sealed.insert(), rows)

    def before(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith(LOCKS[server.dialect.name]):
            with server.begin() as connection:
                late = sealed.update().where(sealed.c.k0 == 3).values(data="TOP-SECRET")
                connection.execute(late)

    event.listen(server, "before_cursor_execute", before)
    try:
        with pytest.raises(RotationError, match="1 values") as caught:
            run(server, "decrypt_column", existing_type=sa.String(5))
    finally:
        event.remove(server, "before_cursor_execute", before)
    assert "primary key (3,)" in caplog.text
    assert "TOP-SECRET" not in caplog.text + str(caught.value)
    assert (3, "TOP-SECRET") in read(server, sealed)
