"""Retiring a key while others write, and whatever is killed meanwhile: nothing slips through."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from sqlalchemy_lucent import KeyInUseError, KeyRegistry
from tests.databases import drop_everything
from tests.integration.workers import finish, reap, start
from tests.registries import (
    BOTH,
    V1,
    V2,
    create,
    documents,
    promoted,
    put,
    registry,
    rotated,
    states,
    take,
    under,
    using,
)


def ready(engine: Engine) -> KeyRegistry:
    """Return a registry in which v2 may be promoted."""
    own = registry(engine)
    own.register()
    own.announce("web", interval=3600).start()
    return own


def retired(engine: Engine) -> KeyRegistry:
    """Return a registry in which v1 is retired."""
    own = rotated(engine)
    own.retire("v1")
    return own


@pytest.mark.slow
@pytest.mark.parametrize("commits", [True, False])
def test_a_writer_with_an_open_row_is_waited_for_or_refuses_the_retirement(
    engine: Engine, commits: bool
) -> None:
    create(engine)
    own = rotated(engine)
    is_open = threading.Event()
    outcome: list[str] = []

    def write() -> None:
        with using(V1), engine.connect() as connection:
            connection.execute(documents.insert(), {"id": 99, "body": {"token": "late"}})
            is_open.set()
            time.sleep(1.5)  # the first attempt on the table gives up meanwhile
            connection.commit() if commits else connection.rollback()

    def retire() -> None:
        try:
            outcome.append(own.retire("v1").state)
        except KeyInUseError as error:
            outcome.append(str(error))

    writer = threading.Thread(target=write)
    writer.start()
    is_open.wait()
    retire()
    writer.join()
    if commits:
        assert "with rotate=True, what it commits" in outcome[0]
        assert under(engine, "v1") == 1
        assert states(own)["v1"] == "draining"
        put(engine, V1, 100)  # and no fence is left
    assert own.retire("v1", rotate=commits).state == "retired"
    assert under(engine, "v1") == 0


def test_a_value_that_does_not_open_is_not_rotated_and_keeps_its_key(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    with engine.begin() as connection:
        broken = sa.update(sa.table("documents", sa.column("body"), sa.column("id")))
        where = sa.column("id") == 2
        connection.execute(broken.where(where).values(body=b"v1:\1" + bytes(50)))
    with pytest.raises(KeyInUseError, match=r"1 in documents\.body"):
        own.retire("v1", rotate=True)
    assert under(engine, "v1") == 1
    assert states(own)["v1"] == "draining"
    put(engine, V1, 9)  # no fence is left


@pytest.mark.slow
def test_eight_processes_that_write_under_the_old_key_throughout(
    engine: Engine, tmp_path: Path
) -> None:
    create(engine)
    own = promoted(engine)
    stop = tmp_path / "stop"
    url = engine.url.render_as_string(hide_password=False)
    writers = [
        start("key_writer", url, 1_000_000 * number, stop, primary="v1") for number in range(1, 9)
    ]
    try:
        while under(engine, "v1") < 20:
            time.sleep(0.05)
        own.retire("v1", rotate=True)
        after = under(engine, "v1")
        time.sleep(1)
        stop.touch()
        printed = [finish(writer) for writer in writers]
    finally:
        reap(writers)
    assert own.receipts()[-1].action == "retire"
    assert after == under(engine, "v1") == 0
    lines = [line.split() for output in printed for line in output.splitlines()]
    stored = {int(number) for outcome, number in lines if outcome == "stored"}
    refused = {int(number) for outcome, number in lines if outcome == "refused"}
    assert refused
    with using(V2), engine.connect() as connection:
        rows = connection.execute(sa.select(documents.c.id, documents.c.body))
        found = {row.id: row.body for row in rows}
    with using(BOTH):
        for number in stored:
            assert found[number] == {"token": f"written-{number}"}
    assert not refused & set(found)


# -- killed ----------------------------------------------------------------------------------------

STATES = {"registered", "ready", "primary", "draining", "fenced", "retired"}

KILLS = 5
"""Moments at which each step is killed. `make test-long` kills it before every statement."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "prepare", "end"),
    [
        ("register", registry, {"v1": "primary", "v2": "registered"}),
        ("promote", ready, {"v1": "draining", "v2": "primary"}),
        ("fence", rotated, {"v1": "fenced", "v2": "primary"}),
        ("retire", rotated, {"v1": "retired", "v2": "primary"}),
        ("unretire", retired, {"v1": "draining", "v2": "primary"}),
        ("leaked", promoted, {"v1": "draining", "v2": "primary"}),
    ],
)
def test_a_step_that_is_killed_leaves_a_named_state_and_the_next_call_goes_on(
    engine: Engine, step: str, prepare: Callable[[Engine], KeyRegistry], end: dict[str, str]
) -> None:
    url = engine.url.render_as_string(hide_password=False)

    def prepared() -> KeyRegistry:
        drop_everything(engine)
        create(engine)
        return prepare(engine)

    own = prepared()
    statements: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    take(own, step)
    sa.event.remove(engine, "before_cursor_execute", note)
    total = len(statements)
    assert total > 10
    moments: Sequence[int] = range(1, total + 1)
    if "LUCENT_TEST_LONG" not in os.environ:
        moments = sorted({1 + (total - 1) * n // (KILLS - 1) for n in range(KILLS)})
    for moment in moments:
        own = prepared()
        finish(start("key_step", url, step, moment), code=-signal.SIGKILL)
        named = states(own)
        assert set(named.values()) <= STATES
        assert list(named.values()).count("primary") <= 1
        assert own.verify_receipts().ok
        take(own, step)
        assert states(own) == end
        assert own.verify_receipts().ok
        assert registry(engine, V2).check().keys
        done = [receipt.action for receipt in own.receipts()]
        assert done.count({"leaked": "leak"}.get(step, step)) == (2 if step == "register" else 1)
        if step == "leaked":
            assert len(own.leaked("v1").open) == 3
