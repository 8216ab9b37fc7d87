"""The commands for secrets that expire, their versions, and those that were deleted."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine

from sqlalchemy_lucent import LucentBase, LucentSecret
from tests.command import Lucent
from tests.integration.workers import keys

KEY = "tenant:t1:stripe:apiKey"
PLAINTEXT = "sk_live_never_shown"


@pytest.fixture
def lucent(url: URL, engine: Engine, tmp_path: Path) -> Lucent:
    LucentBase.metadata.create_all(engine)
    return Lucent(tmp_path, url, keys("v2"))


def store(lucent: Lucent, value: str, *arguments: str) -> None:
    done = lucent("set", KEY, *arguments, stdin=f'"{value}"\n')
    assert (done.code, done.err) == (0, "")


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_versions_are_listed_and_restored(lucent: Lucent) -> None:
    expires = (datetime.now(UTC) + timedelta(days=2)).isoformat(timespec="seconds")
    store(lucent, PLAINTEXT, "--keep", "3")
    store(lucent, "second", "--keep", "3", "--expires-at", expires)

    second, first = rows(lucent("versions", KEY).out)
    assert second[:3] == ["2", "current", "v2"]
    assert second[4] == expires
    assert (first[:3], first[4]) == (["1", "previous", "v2"], "-")

    done = lucent("restore", KEY, "1")
    assert done.out == f"restored version 1 of {KEY} as version 3\n"
    assert lucent("get", KEY, "--reveal").out == f'"{PLAINTEXT}"\n'
    missing = lucent("restore", KEY, "9")
    assert (missing.code, missing.out) == (1, "")
    assert "no version 9" in missing.err
    assert lucent("versions", "tenant:t2:stripe:apiKey").code == 1


def test_what_is_due_is_listed_with_an_exit_code(lucent: Lucent) -> None:
    store(lucent, PLAINTEXT)
    assert lucent("due") == (0, "", "")
    expires = (datetime.now(UTC) + timedelta(days=2)).isoformat(timespec="seconds")
    store(lucent, PLAINTEXT, "--expires-at", expires)

    assert lucent("due", "--within", "12h") == (0, "", "")
    assert lucent("due") == (1, f"{KEY}\t{expires}\t-\t-\n", "")
    assert lucent("due", "--scope", "user").code == 0
    ((key, version, _, age, shown),) = rows(lucent("list").out)
    assert (key, version, shown) == (KEY, "v2", expires)
    assert re.fullmatch(r"\d+s", age)


def test_a_secret_is_deleted_for_a_while(lucent: Lucent) -> None:
    store(lucent, PLAINTEXT)
    assert lucent("delete", KEY, "--yes", "--purge-after", "7d").code == 0
    assert lucent("get", KEY).code == 1
    assert lucent("list").out == ""
    ((key, *_, purged),) = rows(lucent("list", "--deleted").out)
    assert key == KEY
    assert datetime.fromisoformat(purged) > datetime.now(UTC) + timedelta(days=6)
    assert lucent("purge").out == "purged 0 secrets\n"
    assert lucent("undelete", KEY).out == f"undeleted {KEY}\n"
    assert lucent("get", KEY, "--reveal").out == f'"{PLAINTEXT}"\n'

    assert lucent("undelete", "tenant:t2:stripe:apiKey").code == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["set", KEY, "--expires-at", "tomorrow"], "--expires-at takes a time"),
        (["set", KEY, "--expires-at", "2030-01-01"], "time zone"),
        (["set", KEY, "--expires-at", "2020-01-01T00:00:00Z"], "in the past"),
        (["due", "--within", "soon"], "--within takes a number"),
        (["due", "--within", "-1d"], "--within takes a number"),
        (["due", "--within", "9999999d"], "--within takes a number"),
        (["delete", KEY, "--yes", "--purge-after", "1w"], "--purge-after takes a number"),
        (["delete", KEY, "--yes", "--purge-after", "0s"], "a positive timedelta"),
    ],
)
def test_bad_input_is_refused(lucent: Lucent, arguments: list[str], message: str) -> None:
    store(lucent, PLAINTEXT)
    done = lucent(*arguments, stdin='"other"\n')
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert lucent("get", KEY, "--reveal").out == f'"{PLAINTEXT}"\n'


def test_a_database_that_is_not_upgraded_says_what_to_run(
    url: URL, engine: Engine, tmp_path: Path
) -> None:
    LucentSecret.__table__.create(engine)  # type: ignore[attr-defined]
    lucent = Lucent(tmp_path, url, keys("v2"))
    store(lucent, PLAINTEXT)
    doctor = lucent("doctor")
    assert doctor.code == 1
    assert "op.upgrade_lucent_secrets()" in doctor.out
    for arguments in (["list"], ["due"], ["versions", KEY], ["purge"]):
        done = lucent(*arguments)
        assert done.code == 2
        assert "op.upgrade_lucent_secrets()" in done.err
    for arguments in (["status"], ["verify"], ["rotate"], ["get", KEY, "--reveal"]):
        assert lucent(*arguments).code == 0, arguments
