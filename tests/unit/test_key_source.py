"""``KeySource``: when it loads, what it keeps, and what it shows of a manager that fails."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, insert, select

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    Keyring,
    KeySource,
    PicklingRefusedError,
    default_keyring,
    rotate,
    set_default_keyring,
)
from tests.conftest import KEY_1, KEY_2

ONE = Keyring({"v1": KEY_1})
TWO = Keyring({"v2": KEY_2, "v1": KEY_1}, primary="v2")
VALUE = {"token": "PLAINTEXT"}
MARKER = "hvs.MARKER-of-the-manager"


class Manager:
    """What `load` asks: it gives what it is set to, counts, and may be held up."""

    def __init__(self, answer: Any = ONE) -> None:
        self.answer = answer
        self.calls = 0
        self.open = threading.Event()
        self.open.set()
        self.threads: set[int] = set()

    def __call__(self) -> Keyring:
        self.calls += 1
        self.threads.add(threading.get_ident())
        self.open.wait()
        if isinstance(self.answer, BaseException):
            raise self.answer
        answer: Keyring = self.answer
        return answer


def until(said: Callable[[], object]) -> None:
    """Wait for what another thread is to do."""
    end = time.monotonic() + 60
    while not said():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def sources() -> Iterator[list[KeySource]]:
    """The sources of a test, whose threads end with it."""
    made: list[KeySource] = []
    yield made
    for source in made:
        source.close()


@pytest.fixture
def made(sources: list[KeySource]) -> Callable[..., KeySource]:
    def make(*arguments: Any, **options: Any) -> KeySource:
        sources.append(KeySource(*arguments, **options))
        return sources[-1]

    return make


Make = Callable[..., KeySource]


def test_the_first_use_loads_once_for_all_threads(made: Make) -> None:
    manager = Manager()
    source = made(manager)
    assert manager.calls == 0
    assert repr(source) == "<KeySource not loaded, primary=None, failures=0>"
    manager.open.clear()
    found: list[Keyring] = []
    users = [threading.Thread(target=lambda: found.append(source())) for _ in range(8)]
    for user in users:
        user.start()
    until(lambda: manager.calls)
    manager.open.set()
    for user in users:
        user.join()
    assert found == [ONE] * 8
    assert source() is ONE
    assert manager.calls == 1
    assert threading.get_ident() not in manager.threads
    assert "primary=v1, failures=0" in repr(source)


def test_it_refreshes_in_the_background(made: Make) -> None:
    manager = Manager()
    source = made(manager, refresh=0.01)
    assert source() is ONE
    manager.answer = TWO
    until(lambda: source() is TWO)
    assert len(manager.threads) == 1


def test_a_slow_refresh_keeps_nobody_waiting(made: Make) -> None:
    manager = Manager()
    source = made(manager, refresh=0.01)
    source()
    manager.open.clear()
    calls = manager.calls
    until(lambda: manager.calls > calls)
    assert source() is ONE
    manager.open.set()


def test_without_refresh_it_loads_once(made: Make) -> None:
    manager = Manager()
    source = made(manager, refresh=None)
    source()
    until(lambda: not [t for t in threading.enumerate() if t.ident in manager.threads])
    assert source() is ONE
    assert manager.calls == 1
    assert source.health().ok


def test_the_last_keyring_stays_while_the_manager_is_away(
    made: Make, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager()
    source = made(manager, refresh=0.01)
    source()
    manager.answer = OSError(MARKER)
    with caplog.at_level(logging.ERROR):
        until(lambda: source.health().failures > 1)
    assert source() is ONE
    health = source.health()
    assert (health.ok, health.primary, health.error) == (False, "v1", "OSError")
    assert "the keyring could not be loaded: OSError" in caplog.text
    assert MARKER not in caplog.text
    manager.answer = TWO
    until(lambda: source() is TWO)
    until(lambda: source.health().ok)
    assert source.health().error is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OSError(MARKER), "OSError"),
        (SystemExit(MARKER), "SystemExit"),
        ({"v1": MARKER}, "a dict was returned instead of a Keyring"),
        (ConfigurationError("LUCENT_SECRETS_KEYS is set but empty"), "ConfigurationError: LUCENT_"),
    ],
)
def test_a_first_load_that_fails_is_an_error_without_the_managers_words(
    made: Make, answer: Any, said: str
) -> None:
    manager = Manager(answer)
    source = made(manager)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=said) as caught:
            source()
        error = caught.value
        assert MARKER not in "".join(traceback.format_exception(error)) + repr(vars(error))
        assert error.__cause__ is None
        assert error.__context__ is None
    health = source.health()
    assert (health.ok, health.primary, health.loaded_at, health.age) == (False, None, None, None)
    manager.answer = TWO
    until(lambda: source.health().ok)  # it goes on trying
    assert source() is TWO


def test_a_manager_that_does_not_answer_is_waited_for_once(made: Make) -> None:
    manager = Manager()
    manager.open.clear()
    source = made(manager, wait=0.05)
    for _ in range(3):
        with pytest.raises(ConfigurationError, match=r"not there 0\.05 seconds after its first"):
            source()
    assert manager.calls == 1
    manager.open.set()
    until(lambda: source.health().ok)
    assert source() is ONE


def test_the_first_use_waits_five_seconds_by_default() -> None:
    assert KeySource(Manager())._wait == 5.0


def test_health_is_plain_data_and_loads_nothing(made: Make) -> None:
    manager = Manager(TWO)
    source = made(manager)
    assert source.health().as_dict()["loaded_at"] is None
    assert manager.calls == 0
    source()
    shown = json.loads(json.dumps(source.health().as_dict()))
    assert (shown["ok"], shown["primary"], shown["failures"]) == (True, "v2", 0)
    assert shown["loaded_at"].endswith("+00:00")


def test_a_keyring_that_is_overdue_is_not_well(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(Manager(), refresh=1000)
    source()
    assert source.health().ok
    process = source._here()
    process._loaded -= 2 * 1000 + 61  # as long ago as when a load hangs
    assert not source.health().ok
    assert source() is ONE


def test_the_pauses_differ_by_the_jitter_and_grow_with_failures() -> None:
    process = KeySource(Manager(), refresh=100, jitter=0.2)._here()
    pauses = [process._pause() for _ in range(200)]
    assert all(pause is not None and 80 <= pause <= 120 for pause in pauses)
    assert len(set(pauses)) > 100
    failed = []
    for process._failures in range(1, 8):
        failed.append(process._pause())
    assert failed == [1, 2, 4, 8, 16, 30, 30]


def test_it_serves_as_the_default_and_for_a_rotation(made: Make) -> None:
    table = Table(
        "t", MetaData(), Column("id", Integer, primary_key=True), Column("c", EncryptedJSON)
    )
    manager = Manager()
    source = made(manager, refresh=0.01)
    set_default_keyring(source)
    assert default_keyring() is ONE
    engine = create_engine("sqlite://")
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), {"c": {"a": 1}})
    manager.answer = TWO
    until(lambda: source() is TWO)
    assert rotate(engine, table, keyring=source).rotated == 1
    with engine.connect() as connection:
        assert connection.scalar(select(table.c.c)) == {"a": 1}
    engine.dispose()


def test_a_failing_source_does_not_make_sqlalchemy_show_the_value(made: Make) -> None:
    table = Table("t", MetaData(), Column("c", EncryptedJSON))
    set_default_keyring(made(Manager(OSError(MARKER))))
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        table.create(connection)
        with pytest.raises(ConfigurationError) as caught:
            connection.execute(insert(table), {"c": VALUE})
    text = "".join(traceback.format_exception(caught.value))
    assert VALUE["token"] not in text
    assert MARKER not in text
    engine.dispose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_forked_child_has_a_keyring_and_a_thread_of_its_own(made: Make, when: str) -> None:
    manager = Manager()
    source = made(manager, refresh=0.01)
    if when == "after":
        source()
    if when == "while":
        manager.open.clear()
        threading.Thread(target=source, daemon=True).start()
        until(lambda: manager.calls)
    pid = os.fork()
    if pid == 0:  # pragma: no cover  (a process of its own)
        code = 1
        try:
            manager.open = threading.Event()
            manager.open.set()
            first = source()
            manager.answer = TWO
            end = time.monotonic() + 60
            while source() is not TWO and time.monotonic() < end:
                time.sleep(0.005)
            code = 0 if first is ONE and source() is TWO else 2
        finally:
            os._exit(code)
    manager.open.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert source() is ONE


def test_it_can_be_closed(made: Make) -> None:
    manager = Manager()
    source = made(manager, refresh=0.01)
    source()
    source.close()
    until(lambda: not [t for t in threading.enumerate() if t.ident in manager.threads])
    assert source() is ONE


def test_a_source_that_nobody_has_any_more_ends_its_thread() -> None:
    manager = Manager()
    source = KeySource(manager, refresh=1000)
    source()
    del source
    until(lambda: not [t for t in threading.enumerate() if t.ident in manager.threads])


def test_a_copy_is_the_source_and_a_pickle_is_refused(made: Make) -> None:
    source = made(Manager())
    assert copy.copy(source) is source
    assert copy.deepcopy(source) is source
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(PicklingRefusedError, match="KeySource"):
            pickle.dumps(source, protocol)


async def load_as_coroutine() -> Keyring:
    return ONE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load": ONE}, "load is a plain function"),
        ({"load": load_as_coroutine}, "load is a plain function"),
        ({"refresh": 0}, "refresh is a number"),
        ({"refresh": "300"}, "refresh is a number"),
        ({"refresh": True}, "refresh is a number"),
        ({"jitter": 1}, "jitter is a number"),
        ({"jitter": -0.1}, "jitter is a number"),
        ({"wait": 0}, "wait is a number"),
        ({"wait": None}, "wait is a number"),
    ],
)
def test_a_wrong_argument_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        KeySource(**{"load": Manager(), **options})
