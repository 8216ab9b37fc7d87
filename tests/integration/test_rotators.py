"""Several rotators on one table, in processes of their own: each calls plain ``rotate()``."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest
from dask.config import set as dask_settings
from distributed import Client, LocalCluster
from sqlalchemy import Engine, create_engine, func, select

from sqlalchemy_lucent import Keyring, rotate, set_default_keyring
from tests.conftest import KEY_1, KEY_2, Databases
from tests.databases import drop_everything
from tests.integration.workers import contents, fill, finish, keys, ledger, reap, start

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


def under_v2(engine: Engine) -> int:
    counted = select(func.count()).where(ledger.c.free.key_version == "v2")
    with engine.connect() as connection:
        return connection.execute(counted).scalar_one()


@pytest.mark.slow
def test_rotators_share_the_rows_and_lose_none(server: Engine) -> None:
    fill(server, ROWS)
    url = server.url.render_as_string(hide_password=False)
    processes = [start("rotator", url, 50, 0.02) for _ in range(2)]
    try:
        reports = [json.loads(finish(process).splitlines()[-1]) for process in processes]
    finally:
        reap(processes)
    assert sum(report["rotated"] for report in reports) == 2 * ROWS
    assert {report["remaining"] for report in reports} == {0}
    assert all(report["rotated"] > 0 for report in reports)
    assert len(contents(server, Keyring({"v2": KEY_2}))) == ROWS


@pytest.mark.slow
def test_a_rotator_that_is_killed_loses_nothing(server: Engine) -> None:
    fill(server, ROWS)
    url = server.url.render_as_string(hide_password=False)
    killed, other = processes = [start("rotator", url, 50, 0.02) for _ in range(2)]
    try:
        while not under_v2(server):
            time.sleep(0.01)
        killed.kill()
        report = json.loads(finish(other).splitlines()[-1])
    finally:
        reap(processes)
    assert killed.returncode == -signal.SIGKILL
    assert report["remaining"] == 0
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
