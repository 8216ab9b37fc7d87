"""Several rotators on one table, in processes of their own: each calls plain ``rotate()``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import pytest
from dask.config import set as dask_settings
from distributed import Client, LocalCluster
from sqlalchemy import Engine, create_engine, func, select

from sqlalchemy_lucent import Keyring, rotate, set_default_keyring
from tests.conftest import KEY_1, KEY_2, Databases
from tests.databases import drop_everything
from tests.integration.workers import contents, fill, keys, ledger

ROWS = 3_000


@pytest.fixture(params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest, databases: Databases) -> Iterator[Engine]:
    engine = create_engine(databases.url(request.param))
    yield engine
    drop_everything(engine)
    engine.dispose()


def work(url: str, number: int = 0, *, max_rate: float | None = None) -> tuple[int, int, int]:
    """Rotate, and return the process, the values written and those that remain."""
    set_default_keyring(Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v2"))
    engine = create_engine(url)
    report = rotate(engine, ledger, batch_size=50, max_rate=max_rate)
    engine.dispose()
    return os.getpid(), report.rotated, report.remaining


def work_and_say(url: str, channel: Connection, ready: Barrier) -> None:
    ready.wait()
    channel.send(work(url, max_rate=2_000))


def under_v2(engine: Engine) -> int:
    counted = select(func.count()).where(ledger.c.free.key_version == "v2")
    with engine.connect() as connection:
        return connection.execute(counted).scalar_one()


@pytest.mark.slow
def test_rotators_share_the_rows_and_lose_none(server: Engine) -> None:
    fill(server, ROWS)
    url = server.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(2)]
    ready = spawn.Barrier(2)
    processes = [
        spawn.Process(target=work_and_say, args=(url, theirs, ready)) for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    reports = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    assert sum(rotated for _, rotated, _ in reports) == 2 * ROWS
    assert {remaining for _, _, remaining in reports} == {0}
    assert sum(rotated > 0 for _, rotated, _ in reports) > 1
    assert len(contents(server, Keyring({"v2": KEY_2}))) == ROWS


@pytest.mark.slow
def test_a_rotator_that_is_killed_loses_nothing(server: Engine) -> None:
    fill(server, ROWS)
    url = server.url.render_as_string(hide_password=False)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    ready = spawn.Barrier(2)
    arguments = (url, theirs, ready)
    processes = [spawn.Process(target=work_and_say, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    while not under_v2(server):
        time.sleep(0.01)
    killed, other = processes
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    with closing(ours):
        pid, _, remaining = ours.recv()
    other.join()
    assert (pid, remaining) == (other.pid, 0)
    assert len(contents(server, Keyring({"v2": KEY_2}))) == ROWS


@pytest.mark.slow
def test_a_dask_cluster_of_two_processes_shares_the_work(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUCENT_SECRETS_KEYS", keys("v2"))
    engine = create_engine(databases.url("postgresql"))
    try:
        fill(engine, ROWS)
        url = engine.url.render_as_string(hide_password=False)
        with (
            dask_settings({"distributed.worker.daemon": False}),
            LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True
            ) as cluster,
            Client(cluster) as client,  # type: ignore[no-untyped-call]
        ):
            futures = client.map(work, [url] * 2, range(2), pure=False, max_rate=2_000)
            reports = client.gather(futures)
        assert sum(rotated for _, rotated, _ in reports) == 2 * ROWS
        assert len({pid for pid, *_ in reports}) == 2
        assert len(contents(engine, Keyring({"v2": KEY_2}))) == ROWS
    finally:
        drop_everything(engine)
        engine.dispose()
