"""Rotations whose ranges are shared among the workers of an executor."""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import cloudpickle
import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    Keyring,
    LucentBase,
    LucentSecrets,
    RotationError,
    RotationProgress,
    arotate,
    rotate,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent.rotation import engine as rotation_engine
from sqlalchemy_lucent.rotation._ranges import KeyRange, split
from sqlalchemy_lucent.rotation._share import RANGE_ATTEMPTS
from sqlalchemy_lucent.rotation._table import TableWorker
from sqlalchemy_lucent.rotation._task import Task
from sqlalchemy_lucent.rotation.targets import resolve_targets
from tests.conftest import KEY_1, KEY_2, Databases
from tests.databases import drop_everything
from tests.integration.test_rotation import documents_table
from tests.integration.workers import (
    ROOT,
    contents,
    fill,
    finish,
    keys,
    ledger,
    reap,
    sharing,
    start,
)
from tests.primary_keys import KEYS

SPAWN = multiprocessing.get_context("spawn")
ROWS = 300
UNTOUCHED = {n: ({"seq": 0}, {"seq": 0}) for n in range(ROWS)}


@pytest.fixture(scope="module")
def url_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that tells workers their URL; their environment has the new key as primary."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("sharing") / "url"
        patch.setenv(sharing.URL_FILE, str(path))
        patch.setenv("LUCENT_SECRETS_KEYS", keys("v2"))
        yield path


@pytest.fixture(scope="module")
def processes(url_file: Path) -> Iterator[Executor]:
    """Two spawned processes, for tests that leave them alive."""
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        yield pool


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(params=["postgresql", "mysql"])
def server_engine(
    request: pytest.FixtureRequest, databases: Databases, url_file: Path
) -> Iterator[Engine]:
    """An engine over an empty database of a server; workers find its URL in the file."""
    url = databases.url(request.param)
    url_file.write_text(url.render_as_string(hide_password=False))
    engine = create_engine(url)
    yield engine
    drop_everything(engine)
    engine.dispose()


on_postgresql = pytest.mark.parametrize("server_engine", ["postgresql"], indirect=True)


@pytest.fixture
def updates(server_engine: Engine) -> list[str]:
    """The UPDATEs that this process makes."""
    found: list[str] = []

    @event.listens_for(server_engine, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE"):
            found.append(statement)

    return found


def count_under(engine: Engine, version: str, target: Any = ledger) -> int:
    return sum(row.count for row in status(engine, target).rows if row.key_version == version)


class Recorder(Executor):
    """Notes what is submitted, and has another executor do it."""

    def __init__(self, inner: Executor | None = None) -> None:
        self._inner = inner
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert not kwargs
        assert self._inner is not None, "nothing was to be submitted"
        self.calls.append((fn, args))
        return self._inner.submit(fn, *args)

    @property
    def tasks(self) -> list[Task]:
        return [Task.loads(payload) for _, (payload,) in self.calls]


# -- Shared ----------------------------------------------------------------------------------------


def test_spawned_processes_do_all_of_the_work(
    server_engine: Engine, processes: Executor, promoted: Keyring, updates: list[str]
) -> None:
    fill(server_engine, ROWS)
    told: list[RotationProgress] = []
    report = rotate(
        server_engine,
        ledger,
        keyring=promoted,
        executor=processes,
        ranges=5,
        connect=sharing.connect,
        on_progress=told.append,
    )
    assert (report.ok, report.rotated, report.taken_over) == (True, 2 * ROWS, ())
    assert updates == []
    assert contents(server_engine, promoted.without("v1")) == UNTOUCHED
    assert [progress.rotated for progress in told] == sorted({p.rotated for p in told})
    assert (len(told), told[-1].rotated, told[-1].total) == (5, 2 * ROWS, 2 * ROWS)


@pytest.mark.parametrize("shape", list(KEYS))
def test_any_primary_key_is_cut_and_sent(
    server_engine: Engine,
    processes: Executor,
    promoted: Keyring,
    shape: str,
    updates: list[str],
) -> None:
    case = KEYS[shape]
    table = documents_table(*case.columns())
    table.metadata.create_all(server_engine)
    with server_engine.begin() as connection:
        rows = [{**case.row(key), "payload": {"key": repr(key)}} for key in case.values]
        connection.execute(insert(table), rows)
    report = rotate(
        server_engine,
        table,
        keyring=promoted,
        executor=processes,
        ranges=3,
        batch_size=1,
        connect=sharing.connect,
    )
    assert (report.ok, report.rotated) == (True, len(case.values))
    # MySQL orders an ENUM by position and compares it as text: the last passes find what is left.
    assert updates == [] or (shape == "enum" and server_engine.dialect.name == "mysql")
    set_default_keyring(promoted.without("v1"))
    with server_engine.connect() as connection:
        for *key, payload in connection.execute(select(table)):
            assert payload == {"key": repr(tuple(key))}
    table.metadata.drop_all(server_engine)


def test_workers_need_not_import_what_the_columns_are_made_of(
    server_engine: Engine, processes: Executor, promoted: Keyring, updates: list[str]
) -> None:
    @dataclass
    class Account:  # local: no other process can import it
        name: str

    table = Table(
        'Select "all" %s',
        MetaData(),
        Column("Order By", Integer, primary_key=True, autoincrement=False),
        Column("Tenant", String(20), key="tenant"),
        Column("100% secret", EncryptedJSON(bound_to=["tenant"])),
        Column("typed", EncryptedJSON(schema=Account, context="accounts.typed")),
        Column("lazy", EncryptedJSON(lazy=True, accept_contexts=["old.lazy"])),
        Column("tracked", EncryptedJSON.mutable()),
    )
    table.metadata.create_all(server_engine)
    rows = [
        {
            "Order By": n,
            "tenant": f"t{n}",
            "100% secret": Bound({"n": n}, row=(f"t{n}",)),
            "typed": Account(f"a{n}"),
            "lazy": [n],
            "tracked": {"n": n},
        }
        for n in range(9)
    ]
    with server_engine.begin() as connection:
        connection.execute(insert(table), rows)
        connection.execute(
            text(f"UPDATE {_quoted(server_engine, table)} SET lazy = :value"),
            {"value": Keyring({"v1": KEY_1}).for_context("old.lazy").seal(b"[-1]")},
        )
    updates.clear()
    report = rotate(
        server_engine,
        table,
        keyring=promoted,
        executor=processes,
        ranges=3,
        connect=sharing.connect,
    )
    assert (report.ok, report.rotated) == (True, 4 * 9)
    assert updates == []
    set_default_keyring(promoted.without("v1"))
    with server_engine.connect() as connection:
        for row in connection.execute(select(table).order_by(table.c["Order By"])):
            n = row[0]
            assert row[2].open(row=(f"t{n}",)) == {"n": n}
            assert row.typed == Account(f"a{n}")
            assert row.lazy.open() == [-1]
            assert row.tracked == {"n": n}


def _quoted(engine: Engine, table: Table) -> str:
    # A colon-parameter text() takes no percent sign to be one of the driver's.
    return engine.dialect.identifier_preparer.quote(table.name).replace("%%", "%")


def test_several_tables_are_shared_one_after_the_other(
    server_engine: Engine, processes: Executor, promoted: Keyring, updates: list[str]
) -> None:
    metadata = MetaData()
    LucentBase.metadata.tables["lucent_secrets"].to_metadata(metadata)
    ledger.to_metadata(metadata)
    metadata.create_all(server_engine)
    fill(server_engine, 20)
    with Session(server_engine) as session:
        for n in range(20):
            LucentSecrets(session).set(f"tenant:t{n % 7}:provider:Name{n}", {"n": n})
        session.commit()
    report = rotate(
        server_engine,
        metadata,
        keyring=promoted,
        executor=processes,
        ranges=3,
        connect=sharing.connect,
    )
    assert (report.ok, report.rotated) == (True, 60)
    assert updates == []
    with Session(server_engine) as session:
        secrets = LucentSecrets(session, keyring=promoted.without("v1"))
        assert secrets.require("tenant:t1:provider:Name15") == {"n": 15}


@on_postgresql
def test_a_translated_schema_is_the_workers_too(
    server_engine: Engine, processes: Executor, promoted: Keyring, updates: list[str]
) -> None:
    table = documents_table(schema="tenant")
    with server_engine.begin() as connection:
        connection.execute(text('CREATE SCHEMA "Tenant 1"'))
    translated = server_engine.execution_options(schema_translate_map={"tenant": "Tenant 1"})
    try:
        table.metadata.create_all(translated)
        with translated.begin() as connection:
            connection.execute(insert(table), [{"id": n, "payload": n} for n in range(20)])
        report = rotate(
            translated,
            table,
            keyring=promoted,
            executor=processes,
            ranges=2,
            connect=sharing.connect,
        )
        assert (report.ok, report.rotated) == (True, 20)
        assert verify(translated, table, keyring=promoted.without("v1")).opened == 20
        assert updates == []
    finally:
        with server_engine.begin() as connection:
            connection.execute(text('DROP SCHEMA "Tenant 1" CASCADE'))


SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy_lucent import EncryptedJSON, Keyring, rotate, row_bound, set_default_keyring

@dataclass
class Account:
    name: str

class Base(DeclarativeBase):
    pass

class Integration(Base):
    __tablename__ = "integrations"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    account: Mapped[Account] = mapped_column(EncryptedJSON(schema=Account))
    bound: Mapped[dict] = row_bound("id")

def connect():
    return create_engine(sys.argv[1])

if __name__ == "__main__":
    keyring = Keyring.from_env()
    set_default_keyring(keyring.with_primary("v1"))
    engine = create_engine(sys.argv[1])
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        for n in range(50):
            session.add(Integration(id=n, account=Account(str(n)), bound={"n": n}))
        session.commit()
    updates = []
    event.listen(engine, "before_cursor_execute", lambda *a: updates.append(a[2][:6] == "UPDATE"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        report = rotate(
            engine, Base, keyring=keyring, executor=pool, ranges=2,
            connect=connect if sys.argv[2] == "connect" else None,
        )
    print(report.ok, report.rotated, any(updates))
    set_default_keyring(keyring.without("v1"))
    with Session(engine) as session:
        rows = session.scalars(select(Integration).order_by(Integration.id)).all()
        print(all(r.account == Account(str(r.id)) and r.bound == {"n": r.id} for r in rows))
    engine.dispose()
"""


@pytest.mark.slow
@on_postgresql
@pytest.mark.parametrize("how", ["url", "connect"])
def test_a_script_may_define_its_models_and_functions_itself(
    server_engine: Engine, tmp_path: Path, how: str
) -> None:
    if how == "url" and server_engine.url.password is not None:
        pytest.skip("the URL of the test database has a password, which is not sent")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    url = server_engine.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, str(script), url, how],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LUCENT_SECRETS_KEYS": keys("v2")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert finish(process).split() == ["True", "100", "False", "True"]
    finally:
        reap([process])


@pytest.mark.slow
@on_postgresql
def test_a_dask_cluster_of_two_processes(
    server_engine: Engine, promoted: Keyring, updates: list[str]
) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    fill(server_engine, ROWS)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = Recorder(client.get_executor())
        again = partial(
            rotate, server_engine, ledger, executor=executor, ranges=4, connect=sharing.connect
        )
        stopped = again(keyring=promoted, stop_when=lambda progress: True)
        assert stopped.stopped
        assert stopped.rotated
        assert updates == []
        report = again(keyring=promoted)
        assert (report.ok, report.taken_over) == (True, ())
        # Ranges that were at work when the run was stopped may have come to their end since.
        assert report.rotated <= 2 * ROWS - stopped.rotated
        _assert_free_of_keys(executor)
        workers = client.run(os.getpid)
        assert len(set(workers.values())) == 2
        assert contents(server_engine, promoted.without("v1")) == UNTOUCHED
        with pytest.raises(RotationError, match="has another keyring"):
            again(keyring=promoted.with_primary("v1"))
        assert count_under(server_engine, "v2") == 2 * ROWS


@pytest.mark.slow
@on_postgresql
def test_a_dask_worker_that_is_killed_loses_nothing(
    server_engine: Engine, promoted: Keyring
) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    fill(server_engine, ROWS)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())
        with killing(pids[:1], server_engine):
            report = rotate(
                server_engine,
                ledger,
                keyring=promoted,
                executor=client.get_executor(),
                ranges=6,
                batch_size=5,
                pause=0.02,
                connect=sharing.connect,
            )
    assert report.ok
    assert contents(server_engine, promoted.without("v1")) == UNTOUCHED


# -- Ranges ----------------------------------------------------------------------------------------


def ranges_of(engine: Engine, table: Table, ranges: int, least_rows: int = 1) -> list[KeyRange]:
    (target,) = resolve_targets(table, engine)
    keyring = Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v2")
    with engine.connect() as connection:
        worker = TableWorker(target, keyring, connection.dialect)
        worker.check_keys(connection)
        return split(connection, worker, ranges, least_rows)


@pytest.mark.parametrize("shape", list(KEYS))
@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
def test_ranges_have_every_stale_row_once(engine: Engine, promoted: Keyring, shape: str) -> None:
    case = KEYS[shape]
    table = documents_table(*case.columns())
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{**case.row(key), "payload": 1} for key in case.values])
    (target,) = resolve_targets(table, engine)
    for wanted in (1, 2, 3, 100):
        found = ranges_of(engine, table, wanted)
        assert len(found) == min(wanted, len(case.values))
        assert [found[0].after, found[-1].upto] == [None, None]
        assert [r.after for r in found[1:]] == [r.upto for r in found[:-1]]
        with engine.connect() as connection:
            worker = TableWorker(target, promoted, connection.dialect)
            worker.check_keys(connection)
            sizes = []
            seen = []
            for range_ in found:
                rows = worker.read(connection, range_.after, None, upto=range_.upto)
                sizes.append(len(rows))
                seen += [worker.primary_key_of(row) for row in rows]
        assert sorted(map(repr, seen)) == sorted(map(repr, case.values))
        assert max(sizes[:-1], default=0) <= sizes[-1] < max(sizes) + len(found)
    table.metadata.drop_all(engine)


def test_ranges_are_cut_among_stale_rows(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": n, "payload": n} for n in range(100)])
    set_default_keyring(promoted)
    with engine.begin() as connection:
        connection.execute(update(table).where(table.c.id < 80).values(payload=1))
    assert ranges_of(engine, table, 2) == [KeyRange(None, (89,)), KeyRange((89,), None)]
    assert ranges_of(engine, table, 8, least_rows=10) == ranges_of(engine, table, 2)
    assert ranges_of(engine, table, 8, least_rows=11) == [KeyRange()]
    with engine.begin() as connection:
        connection.execute(update(table).values(payload=1))
    assert ranges_of(engine, table, 8) == [KeyRange()]


@on_postgresql
def test_few_rows_are_done_without_workers(server_engine: Engine, promoted: Keyring) -> None:
    fill(server_engine, 20)
    report = rotate(
        server_engine,
        ledger,
        keyring=promoted,
        executor=Recorder(),
        connect=sharing.connect,
    )
    assert (report.ok, report.rotated) == (True, 40)


# -- What is sent ----------------------------------------------------------------------------------


def forms(secret: bytes) -> list[bytes]:
    return [
        secret,
        base64.b64encode(secret).rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
        secret.hex().encode(),
        secret.hex().upper().encode(),
    ]


def _assert_free_of_keys(executor: Recorder) -> None:
    assert executor.calls
    for function, arguments in executor.calls:
        for dumps in (pickle.dumps, cloudpickle.dumps):
            sent = dumps((function, arguments))
            assert b"ledger" in sent  # the search finds what is there
            for key in (KEY_1, KEY_2):
                assert not [form for form in forms(key) if form in sent]


@on_postgresql
@pytest.mark.parametrize("make", [None, sharing.promoted, Keyring.from_env])
def test_no_key_is_in_what_is_sent(
    server_engine: Engine,
    threads: Executor,
    promoted: Keyring,
    make: Callable[[], Keyring] | None,
) -> None:
    fill(server_engine, 40)
    set_default_keyring(promoted)
    executor = Recorder(threads)
    report = rotate(
        server_engine,
        ledger,
        keyring=make,
        executor=executor,
        ranges=4,
        connect=sharing.connect,
    )
    assert (report.ok, report.rotated) == (True, 80)
    assert len(executor.calls) == 4
    _assert_free_of_keys(executor)
    assert b"password" not in pickle.dumps(executor.calls)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://user:hunter2@127.0.0.1:1/db",
        "postgresql+psycopg://user@127.0.0.1:1/db?password=hunter2",
        "postgresql+psycopg://user@127.0.0.1:1/db?oauth_client_secret=hunter2",
        "postgresql+psycopg://user@127.0.0.1:1/db?sslmode=disable&options=-cmy.word%3Dhunter2",
        "mysql+pymysql://user:@127.0.0.1:1/db",
        "mysql+pymysql://user@127.0.0.1:1/db?ssl_key_password=hunter2",
    ],
)
def test_a_password_is_not_sent(url: str) -> None:
    engine = create_engine(url)
    with pytest.raises(RotationError, match="has a password or options that may") as caught:
        rotate(engine, ledger, executor=Recorder())
    assert "hunter2" not in str(caught.value)
    engine.dispose()


@on_postgresql
def test_a_url_with_harmless_options_is_sent(
    server_engine: Engine, processes: Executor, promoted: Keyring, updates: list[str]
) -> None:
    if server_engine.url.password is not None:
        pytest.skip("the URL of the test database has a password, which is not sent")
    fill(server_engine, 20)
    url = server_engine.url.update_query_dict({"connect_timeout": "60", "sslmode": "prefer"})
    engine = create_engine(url)
    report = rotate(engine, ledger, keyring=promoted, executor=processes, ranges=2)
    assert (report.ok, report.rotated, updates) == (True, 40, [])
    engine.dispose()


@pytest.mark.parametrize(
    "function",
    [partial(Keyring, {"v1": KEY_1}), Keyring({"v1": KEY_1}).with_primary, [].copy],
    ids=["partial", "method", "builtin"],
)
def test_a_function_that_holds_something_is_refused(function: Any) -> None:
    engine = create_engine("postgresql+psycopg://user@127.0.0.1:1/db")
    with pytest.raises(RotationError, match="connect= is a function at the top level"):
        rotate(engine, ledger, executor=Recorder(), connect=function)
    engine.dispose()


@on_postgresql
def test_a_function_without_a_name_is_refused_before_the_first_write(
    server_engine: Engine,
) -> None:
    fill(server_engine, 4)
    with pytest.raises(RotationError, match=r"keyring= is a function at the top .*<lambda>"):
        rotate(
            server_engine,
            ledger,
            keyring=lambda: Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v2"),
            executor=Recorder(),
            ranges=2,
            connect=sharing.connect,
        )
    assert count_under(server_engine, "v2") == 0


@on_postgresql
def test_a_type_that_workers_cannot_import_is_told_before_the_first_write(
    server_engine: Engine, processes: Executor, promoted: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)
    exec(
        "from sqlalchemy import Integer, TypeDecorator\n"
        "class Number(TypeDecorator):\n    impl = Integer\n    cache_ok = True",
        vars(module),
    )
    table = documents_table(Column("id", module.Number, primary_key=True))
    table.metadata.create_all(server_engine)
    with server_engine.begin() as connection:
        connection.execute(insert(table), [{"id": n, "payload": n} for n in range(4)])
    with pytest.raises(RotationError, match=r"cannot import what a range needs .*'only_here'"):
        rotate(
            server_engine,
            table,
            keyring=promoted,
            executor=processes,
            ranges=2,
            connect=sharing.connect,
        )
    assert count_under(server_engine, "v1", table) == 4


# -- Keyrings --------------------------------------------------------------------------------------


@on_postgresql
@pytest.mark.parametrize(
    "other",
    [
        Keyring({"v1": KEY_1}),
        Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v1"),
        Keyring({"v1": KEY_1, "v2": bytes(32)}, primary="v2"),
        Keyring({"v1": KEY_1, "v2": KEY_2, "v3": bytes(32)}, primary="v2"),
        Keyring({"v2": KEY_2}),
    ],
    ids=["lacks the new", "another primary", "another key", "one more", "lacks the old"],
)
def test_a_worker_with_another_keyring_writes_nothing(
    server_engine: Engine, threads: Executor, promoted: Keyring, other: Keyring
) -> None:
    fill(server_engine, 20)
    set_default_keyring(other)  # the default of threads, too
    with pytest.raises(RotationError, match="has another keyring: <Keyring primary=") as caught:
        rotate(
            server_engine,
            ledger,
            keyring=promoted,
            executor=threads,
            ranges=2,
            connect=sharing.connect,
        )
    assert promoted.fingerprint("v2") in str(caught.value)
    assert count_under(server_engine, "v1") == 40


@on_postgresql
def test_a_worker_without_a_keyring_writes_nothing(
    server_engine: Engine, threads: Executor
) -> None:
    fill(server_engine, 20)
    with pytest.raises(RotationError, match=r"has no keyring .*LUCENT_SECRETS_KEY"):
        rotate(
            server_engine,
            ledger,
            keyring=sharing.promoted_for_the_caller_only,
            executor=threads,
            ranges=2,
            connect=sharing.connect,
        )
    assert count_under(server_engine, "v1") == 40


def test_a_keyring_may_be_a_function_without_an_executor_too(engine: Engine) -> None:
    fill(engine, 5)
    assert rotate(engine, ledger, keyring=sharing.promoted).rotated == 10
    wrong: Any
    for wrong in (dict, {}):
        with pytest.raises(RotationError, match="a function that returns one, not a dict"):
            rotate(engine, ledger, keyring=wrong)


# -- Options ---------------------------------------------------------------------------------------


@on_postgresql
def test_stop_when_ends_it_and_the_next_run_goes_on(
    server_engine: Engine, processes: Executor, promoted: Keyring
) -> None:
    fill(server_engine, ROWS)
    share = partial(
        rotate,
        server_engine,
        ledger,
        keyring=promoted,
        executor=processes,
        ranges=30,
        connect=sharing.connect,
    )
    report = share(stop_when=lambda progress: progress.rotated >= 20)
    assert (report.stopped, report.ok, report.taken_over) == (True, False, ())
    assert 20 <= report.rotated < 2 * ROWS
    assert count_under(server_engine, "v2") == report.rotated
    assert report.remaining == 2 * ROWS - report.rotated
    assert share().rotated == report.remaining
    assert contents(server_engine, promoted.without("v1")) == UNTOUCHED


@on_postgresql
def test_a_worker_hands_a_long_range_back(
    server_engine: Engine, threads: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(server_engine, 60)
    monkeypatch.setattr(rotation_engine, "_TURN", 0.0)  # threads: it holds for the workers
    told: list[int] = []
    executor = Recorder(threads)
    report = rotate(
        server_engine,
        ledger,
        keyring=sharing.promoted,
        executor=executor,
        ranges=2,
        batch_size=10,
        connect=sharing.connect,
        on_progress=lambda progress: told.append(progress.rotated),
    )
    assert (report.ok, report.rotated) == (True, 120)
    assert set(told) == {20, 40, 60, 80, 100, 120}
    assert len(told) == 8  # the last turn of each range finds nothing
    assert len({task.id for task in executor.tasks}) == 8
    uptos = {task.range.upto for task in executor.tasks}
    assert uptos == {(29,), None}


@on_postgresql
def test_a_dry_run_writes_nothing(
    server_engine: Engine, processes: Executor, promoted: Keyring
) -> None:
    fill(server_engine, 40)
    with server_engine.begin() as connection:
        connection.execute(text("UPDATE ledger SET free = 'plain' WHERE id IN (3, 33)"))
    report = rotate(
        server_engine,
        ledger,
        keyring=promoted,
        executor=processes,
        ranges=4,
        dry_run=True,
        connect=sharing.connect,
    )
    assert (report.rotated, report.failed_count, report.remaining) == (78, 2, 2)
    assert sorted(row.primary_key for row in report.failed) == [(3,), (33,)]
    assert count_under(server_engine, "v2") == 0


@on_postgresql
def test_what_does_not_open_is_reported_or_raised(
    server_engine: Engine, processes: Executor, promoted: Keyring
) -> None:
    fill(server_engine, 40)
    with server_engine.begin() as connection:
        connection.execute(text("UPDATE ledger SET free = 'plain' WHERE id IN (3, 33)"))
    share = partial(
        rotate,
        server_engine,
        ledger,
        keyring=promoted,
        executor=processes,
        ranges=4,
        connect=sharing.connect,
    )
    report = share()
    assert (report.ok, report.rotated, report.remaining) == (False, 78, 2)
    assert sorted((row.primary_key, row.error) for row in report.failed) == [
        ((3,), "NotSealedError"),
        ((33,), "NotSealedError"),
    ]
    with pytest.raises(RotationError, match=r"primary key \((3|33),\) does not open"):
        share(ranges=2, on_error="raise")


@on_postgresql
def test_a_rate_is_divided_by_the_ranges(server_engine: Engine, threads: Executor) -> None:
    fill(server_engine, 20)
    executor = Recorder(threads)
    share = partial(
        rotate,
        server_engine,
        ledger,
        keyring=sharing.promoted,
        executor=executor,
        connect=sharing.connect,
    )
    assert share(max_rate=4000, ranges=4).rotated == 40
    assert [task.options.max_rate for task in executor.tasks] == [1000.0] * 4
    with pytest.raises(RotationError, match="say with ranges= how many"):
        share(max_rate=4000)
    with pytest.raises(RotationError, match="for each of the ranges"):
        share(max_rate=3, ranges=4)


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"executor": Recorder(), "ranges": 0}, "ranges is a whole number"),
        ({"executor": Recorder(), "ranges": True}, "ranges is a whole number"),
        ({"ranges": 3}, "for the workers of an executor"),
        ({"connect": sharing.connect}, "for the workers of an executor"),
        ({"executor": 3}, "a function that returns one; this is of type int"),
        ({"executor": Recorder(), "connect": lambda: None}, "connect= .* <lambda> is not found"),
        ({"executor": Recorder(), "connect": 3}, "connect= .* this int is none"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], fault: str) -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(RotationError, match=fault):
        rotate(engine, ledger, **options)
    engine.dispose()


@pytest.mark.parametrize("executor", ["processes", list])
def test_what_is_no_executor_is_refused(executor: Any) -> None:
    engine = create_engine("postgresql+psycopg://user@127.0.0.1:1/db")
    with pytest.raises(RotationError, match=r"is a concurrent\.futures\.Executor or a function"):
        rotate(engine, ledger, executor=executor)
    engine.dispose()


@on_postgresql
def test_an_executor_that_was_shut_down_is_refused(
    server_engine: Engine, threads: Executor, promoted: Keyring
) -> None:
    fill(server_engine, 4)
    threads.shutdown()
    with pytest.raises(RotationError, match="takes no ranges: cannot schedule"):
        rotate(
            server_engine,
            ledger,
            keyring=promoted,
            executor=threads,
            ranges=2,
            connect=sharing.connect,
        )
    assert count_under(server_engine, "v1") == 8


def test_a_connection_is_refused(engine: Engine) -> None:
    with (
        engine.connect() as connection,
        pytest.raises(RotationError, match="needs the Engine, not this Connection"),
    ):
        rotate(connection, ledger, executor=Recorder())


def test_arotate_refuses_an_executor() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(RotationError, match=r"takes no executor=: .*asyncio\.to_thread"):
        asyncio.run(arotate(engine, ledger, executor=Recorder()))
    with pytest.raises(RotationError, match="takes no ranges="):
        asyncio.run(arotate(engine, ledger, ranges=2))
    with pytest.raises(TypeError, match=r"arotate\(\) got an unexpected .* 'bacth_size'"):
        asyncio.run(arotate(engine, ledger, bacth_size=2))


def test_sqlite_has_one_writer_so_the_caller_does_it_alone(
    tmp_path: Path, promoted: Keyring
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/alone.db")
    fill(engine, 50)
    report = rotate(engine, ledger, keyring=promoted, executor=Recorder(), ranges=4)
    assert (report.ok, report.rotated) == (True, 100)
    engine.dispose()


# -- Faults ----------------------------------------------------------------------------------------


class killing:
    """Kill processes by SIGKILL as soon as something was re-encrypted.

    Without `pids`, it is one that was started since.
    """

    def __init__(self, pids: list[int] | None, engine: Engine) -> None:
        self._pids = pids
        self._engine = create_engine(engine.url, poolclass=NullPool)
        self._thread = threading.Thread(target=self._kill)
        self._ended = threading.Event()
        self._others = children()
        self.killed: list[int] = []

    def _kill(self) -> None:
        while count_under(self._engine, "v2") == 0:
            if self._ended.wait(0.01):
                return
        for pid in self._pids or sorted(children() - self._others)[:1]:
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._engine.dispose()
        assert self.killed, "the run ended before a worker was killed"


def children() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children()}


def new_pool() -> Executor:
    return ProcessPoolExecutor(2, mp_context=SPAWN)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one executor", "a function that makes one"])
def test_a_process_that_is_killed_loses_nothing(
    server_engine: Engine, promoted: Keyring, how: str
) -> None:
    fill(server_engine, ROWS)
    pool = new_pool() if how == "one executor" else None
    pids = None
    if isinstance(pool, ProcessPoolExecutor):
        pids = [pool.submit(os.getpid).result()]
    others = children()
    with killing(pids, server_engine):
        report = rotate(
            server_engine,
            ledger,
            keyring=promoted,
            executor=pool or new_pool,
            ranges=6,
            batch_size=5,
            pause=0.02,
            connect=sharing.connect,
        )
    assert report.ok
    if pool is None:
        assert report.taken_over == ()
        assert children() == others
    else:  # it takes no work any more, so this process did the rest
        assert set(report.taken_over) == {"a range of ledger: BrokenProcessPool"}
        with pytest.raises(BrokenProcessPool):
            pool.submit(os.getpid)
        pool.shutdown()
    assert contents(server_engine, promoted.without("v1")) == UNTOUCHED


@on_postgresql
def test_workers_whose_connections_are_cut_get_their_ranges_again(
    server_engine: Engine, threads: Executor
) -> None:
    fill(server_engine, ROWS)
    cut = 0

    def cut_connections(progress: RotationProgress) -> None:
        nonlocal cut
        if cut < 2:
            time.sleep(0.05)  # the other worker is in the middle of its next range
            with server_engine.connect() as connection:
                cut += connection.scalar(
                    text(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                        " WHERE application_name = :name AND datname = current_database()"
                    ),
                    {"name": sharing.NAME},
                )

    executor = Recorder(threads)
    report = rotate(
        server_engine,
        ledger,
        keyring=sharing.promoted,
        executor=executor,
        ranges=6,
        batch_size=5,
        pause=0.01,
        retries=0,
        connect=sharing.connect_by_name,
        on_progress=cut_connections,
    )
    assert (report.ok, report.taken_over) == (True, ())
    # A batch whose COMMIT was not answered is done, and counted by nobody.
    assert 0 <= 2 * ROWS - report.rotated <= 10 * cut
    assert len(executor.calls) > 6
    assert contents(server_engine, sharing.promoted().without("v1")) == UNTOUCHED


@on_postgresql
def test_ranges_that_no_worker_can_do_are_done_by_the_caller(
    server_engine: Engine, threads: Executor
) -> None:
    fill(server_engine, 40)
    executor = Recorder(threads)
    report = rotate(
        server_engine,
        ledger,
        keyring=sharing.promoted,
        executor=executor,
        ranges=2,
        retries=0,
        connect=sharing.connect_to_nothing,
    )
    assert (report.ok, report.rotated) == (True, 80)
    assert len(executor.calls) == 2 * RANGE_ATTEMPTS
    assert len(report.taken_over) == 2
    assert all("OperationalError" in fault for fault in report.taken_over)
    assert json.loads(json.dumps(report.as_dict()))["taken_over"] == list(report.taken_over)


def test_what_the_database_refuses_a_worker_ends_the_run(
    server_engine: Engine, threads: Executor
) -> None:
    fill(server_engine, 40)
    with pytest.raises(RotationError, match=r"read-only \("):
        rotate(
            server_engine,
            ledger,
            keyring=sharing.promoted,
            executor=threads,
            ranges=2,
            connect=sharing.connect_for_reading,
        )
    assert count_under(server_engine, "v1") == 80


@on_postgresql
@pytest.mark.parametrize(
    "connect, fault",
    [
        (sharing.fail, "connect= raised OSError in a worker"),
        (sharing.connect_without_driver, "cannot go on .*No module named 'no_driver'"),
        (sharing.connect_to_another_kind, "not 'sqlite'"),
        (dict, "not <class 'dict'>"),
    ],
)
def test_a_connect_that_is_of_no_use_ends_the_run(
    server_engine: Engine, threads: Executor, connect: Any, fault: str
) -> None:
    fill(server_engine, 40)
    with pytest.raises(RotationError, match=fault) as caught:
        rotate(
            server_engine,
            ledger,
            keyring=sharing.promoted,
            executor=threads,
            ranges=2,
            connect=connect,
        )
    assert "secret words" not in str(caught.value)
    assert count_under(server_engine, "v1") == 80


@on_postgresql
@pytest.mark.parametrize("connect", [None, sharing.connect])
def test_a_worker_that_finds_another_schema_writes_nothing(
    server_engine: Engine,
    threads: Executor,
    connect: Callable[[], Engine] | None,
) -> None:
    if connect is None and server_engine.url.password is not None:
        pytest.skip("the URL of the test database has a password, which is not sent")
    fill(server_engine, 20)  # in the schema public, where it is not to be rotated
    with server_engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    engine = create_engine(
        server_engine.url, connect_args={"options": "-csearch_path=tenant"}, poolclass=NullPool
    )
    share = partial(rotate, engine, ledger, keyring=sharing.promoted, executor=threads, ranges=2)
    try:
        fill(engine, 20)
        with pytest.raises(
            RotationError, match=r"another database or schema .*\{public\}.*connect="
        ):
            share(connect=connect)
        assert count_under(server_engine, "v1") == count_under(engine, "v1") == 40
        assert share(connect=sharing.connect_as_tenant).taken_over == ()
        assert count_under(server_engine, "v1") == count_under(engine, "v2") == 40
    finally:
        with server_engine.begin() as connection:
            connection.execute(text("DROP SCHEMA tenant CASCADE"))


@pytest.mark.parametrize("server_engine", ["mysql"], indirect=True)
def test_a_worker_that_finds_another_database_writes_nothing(
    server_engine: Engine, threads: Executor
) -> None:
    other = f"{server_engine.url.database}_other"
    with server_engine.begin() as connection:
        connection.execute(text(f"CREATE DATABASE {other}"))
    engine = create_engine(server_engine.url.set(database=other), poolclass=NullPool)
    try:
        for each in (server_engine, engine):
            fill(each, 20)
        with pytest.raises(RotationError, match=f"another database or schema .*{other}"):
            rotate(
                engine,
                ledger,
                keyring=sharing.promoted,
                executor=threads,
                ranges=2,
                connect=sharing.connect,
            )
        assert count_under(server_engine, "v1") == count_under(engine, "v1") == 40
    finally:
        with server_engine.begin() as connection:
            connection.execute(text(f"DROP DATABASE {other}"))


@on_postgresql
def test_an_interrupt_cancels_what_waits_and_leaves_nothing_at_work(
    server_engine: Engine, processes: Executor, promoted: Keyring
) -> None:
    fill(server_engine, ROWS)

    def interrupt(_: RotationProgress) -> None:
        raise KeyboardInterrupt

    share = partial(
        rotate,
        server_engine,
        ledger,
        keyring=promoted,
        executor=processes,
        ranges=30,
        connect=sharing.connect,
    )
    with pytest.raises(KeyboardInterrupt):
        share(on_progress=interrupt)
    done = count_under(server_engine, "v2")
    assert 0 < done < 2 * ROWS
    with server_engine.begin() as connection:  # nothing is locked, and nothing goes on
        connection.execute(text("SELECT id FROM ledger FOR UPDATE NOWAIT"))
    assert count_under(server_engine, "v2") == done
    assert share().rotated == 2 * ROWS - done


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "interrupt of the caller", "kill of all"])
def test_a_run_that_is_ended_from_outside_loses_nothing(
    server_engine: Engine, promoted: Keyring, how: str
) -> None:
    fill(server_engine, ROWS)
    url = server_engine.url.render_as_string(hide_password=False)
    process = start("sharing_rotator", url, start_new_session=True)
    try:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(3)]
        if how == "interrupt of the caller":
            process.send_signal(signal.SIGINT)
        else:  # a terminal's Ctrl-C goes to all processes of the group
            os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        output, errors = process.communicate(timeout=120)
    finally:
        reap([process])
    if how == "kill of all":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode != 0
        assert "KeyboardInterrupt" in errors
        assert "remaining" not in output  # no report
        _wait_for_the_end_of(process.pid)
    done = count_under(server_engine, "v2")
    assert told[-1] <= done < 2 * ROWS
    assert contents(server_engine, promoted) == UNTOUCHED
    assert rotate(server_engine, ledger, keyring=promoted).rotated == 2 * ROWS - done
    assert contents(server_engine, promoted.without("v1")) == UNTOUCHED


def _wait_for_the_end_of(group: int) -> None:
    """Wait until no process of a group is there: multiprocessing's own helper is the last."""
    for _ in range(1200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process of the run goes on")


def test_two_rotators_with_executors_share_the_work(
    server_engine: Engine, processes: Executor, promoted: Keyring
) -> None:
    fill(server_engine, ROWS)
    reports = []

    def share() -> None:
        engine = create_engine(server_engine.url)
        reports.append(
            rotate(
                engine,
                ledger,
                keyring=promoted,
                executor=processes,
                ranges=4,
                batch_size=10,
                connect=sharing.connect,
            )
        )
        engine.dispose()

    rotators = [threading.Thread(target=share) for _ in range(2)]
    for rotator in rotators:
        rotator.start()
    for rotator in rotators:
        rotator.join()
    assert [report.ok for report in reports] == [True, True]
    assert sum(report.rotated for report in reports) == 2 * ROWS
    assert contents(server_engine, promoted.without("v1")) == UNTOUCHED
