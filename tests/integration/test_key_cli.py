"""``lucent keys``: each step of a key's life from a shell, and what it prints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Engine

from sqlalchemy_lucent import KeyRegistry, rotate
from tests.command import Lucent
from tests.integration.workers import keys
from tests.registries import (
    BOTH,
    V1,
    V2,
    create,
    documents,
    metadata,
    promoted,
    put,
    registry,
    rotated,
    states,
    using,
)

MODELS = ("--metadata", "tests.registries:metadata")


@pytest.fixture
def at(url: URL, engine: Engine, tmp_path: Path) -> Lucent:
    """The command at a database of each kind with three values under v1; v1 is its primary."""
    create(engine)
    return Lucent(tmp_path, url, keys("v1"))


def test_the_steps_of_a_keys_life(at: Lucent, engine: Engine) -> None:
    done = at("keys", "register", *MODELS)
    assert done.code == 0
    assert [line.split("\t")[:2] for line in done.out.splitlines()] == [
        ["v1", "primary"],
        ["v2", "registered"],
    ]
    refused = at("keys", "promote", "v2", *MODELS)
    assert (refused.code, refused.out) == (1, "")
    assert "no process has announced itself lately" in refused.err
    with registry(engine).announce("web"):
        ready = at("keys", "ready", "v2", "--kind", "web", *MODELS)
        assert ready.code == 0
        assert ready.out.splitlines()[0].startswith("web\t")
        assert ready.out.splitlines()[0].endswith("\tv1\tyes")
        done = at("keys", "promote", "v2", "--kind", "web", "--quiet", "60", *MODELS)
        assert done.code == 0, done.err
        assert done.out.startswith("v2 is the primary")
    left = at("keys", "retire", "v1", *MODELS)
    assert left.code == 1
    assert "3 in documents.body" in left.err
    rotate(engine, metadata, keyring=V2)
    new = Lucent(at.directory, at.url, keys("v2"))
    assert new("keys", "fence", "v1", *MODELS).out == "the database refuses values under v1\n"
    assert new("keys", "unfence", "v1", *MODELS).code == 0
    done = new("keys", "retire", "v1", *MODELS)
    assert done.code == 0
    assert done.out.splitlines() == [
        "v1 is retired; take its key out of every environment",
        f"receipt {registry(engine).receipts()[-1].head}",
    ]
    checked = new("keys", "check", *MODELS)
    assert checked.code == 0
    assert checked.err == "key version 'v1' is retired: take its key out of this process\n"
    assert new("keys", "unretire", "v1", *MODELS).code == 0
    assert states(registry(engine)) == {"v1": "draining", "v2": "primary"}


def test_ready_names_who_lacks_the_key(at: Lucent, engine: Engine) -> None:
    own = registry(engine)
    own.register()
    with own.announce("web"), registry(engine, V1).announce("worker"):
        done = at("keys", "ready", "v2", *MODELS)
        assert done.code == 1
        has = {line.split("\t")[0]: line.split("\t")[-1] for line in done.out.splitlines()[:2]}
        assert has == {"web": "yes", "worker": "no"}
        assert "1 of 2 processes lack the registered key of 'v2': worker" in done.out
        found = json.loads(at("keys", "ready", "v2", "--json", *MODELS).out)
        assert [holder["kind"] for holder in found["lacking"]] == ["worker"]


def test_check_fails_with_another_key_under_the_same_version(at: Lucent, engine: Engine) -> None:
    registry(engine).register()
    wrong = Lucent(at.directory, at.url, f"v1:{'A' * 43}")
    done = wrong("keys", "check", *MODELS)
    assert (done.code, done.out) == (1, "")
    assert "another key under the name 'v1'" in done.err


def test_check_registers_nothing(at: Lucent, engine: Engine) -> None:
    done = at("keys", "check", *MODELS)
    assert done.code == 0
    assert "'v1' is not registered" in done.err
    assert registry(engine).registered() == ()


def test_leaked_lists_what_to_replace(at: Lucent, engine: Engine) -> None:
    promoted(engine)
    done = at("keys", "leaked", "v1", "--since", "2026-05-04T13:00Z", *MODELS)
    assert done.code == 1
    assert done.out.splitlines() == [
        *(f"documents.body\t{n}\t-\topen" for n in (1, 2, 3)),
        "3 values left to replace",
    ]
    with using(V2), engine.begin() as connection:
        connection.execute(sa.update(documents).values(body={"token": "another"}))
    found = json.loads(at("keys", "leaked", "v1", "--json", *MODELS).out)
    assert found["open"] == 0
    assert found["since"] == "2026-05-04T13:00:00.000000+00:00"
    assert {value["outcome"] for value in found["values"]} == {"replaced"}
    wrong = at("keys", "leaked", "v1", "--since", "yesterday", *MODELS)
    assert (wrong.code, wrong.out) == (2, "")
    assert "--since takes a time" in wrong.err


def test_leaked_tells_what_nobody_can_name(at: Lucent, engine: Engine) -> None:
    rotated(engine)
    with engine.begin() as connection:
        raw = sa.table("documents", sa.column("id"), sa.column("body"))
        sealed = V1.for_context("others.body").seal(b"{}")
        connection.execute(sa.update(raw).where(raw.c.id == 2).values(body=sealed))
    done = at("keys", "leaked", "v1", *MODELS)
    assert done.code == 0
    assert "documents.body: 3 values had left v1 before" in done.err
    assert "1 value under v1 did not open" in done.err


def test_receipts_are_shown_and_proven(at: Lucent, engine: Engine) -> None:
    own = rotated(engine)
    own.retire("v1")
    head = own.verify_receipts().head
    done = at("keys", "receipts", *MODELS)
    assert done.code == 0
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert [line[2:4] for line in lines[:5]] == [
        *(["register", "v1"], ["register", "v2"], ["ready", "v2"], ["promote", "v2"]),
        ["retire", "v1"],
    ]
    assert lines[5:] == [["5 lines proven"], [f"head {head}"]]
    assert json.loads(at("keys", "receipts", "--json", *MODELS).out)["proof"]["head"] == head
    with engine.begin() as connection:
        table = KeyRegistry.metadata.tables["lucent_key_receipts"]
        connection.execute(sa.delete(table).where(table.c.seq.in_([2, 5])))
    done = at("keys", "receipts", "--head", str(head), *MODELS)
    assert done.code == 1
    assert "line 2 is missing\n" in done.out
    assert "line 5 is missing, and the head names line 5\n" in done.out


def test_the_models_are_named_after_the_step(at: Lucent) -> None:
    done = at("keys", *MODELS, "retire", "v1")
    assert (done.code, done.out) == (2, "")
    assert "--metadata goes after the name of the step" in done.err


def test_the_models_may_come_from_the_environment(at: Lucent, engine: Engine) -> None:
    rotated(engine)
    done = at("keys", "retire", "v1", env={"LUCENT_METADATA": "tests.registries:metadata"})
    assert (done.code, done.err) == (0, "")


def test_without_the_tables_a_step_says_how_to_create_them(
    url: URL, engine: Engine, tmp_path: Path
) -> None:
    metadata.create_all(engine)
    done = Lucent(tmp_path, url, keys("v1"))("keys", "register", *MODELS)
    assert (done.code, done.out) == (2, "")
    assert "op.create_lucent_keys()" in done.err


def test_doctor_compares_the_keyring_with_the_registry(at: Lucent, engine: Engine) -> None:
    before = at("doctor", *MODELS)
    assert "fix\tkey registry: key version 'v1' is not registered" in before.out
    promoted(engine)
    rotate(engine, metadata, keyring=V2)
    new = Lucent(at.directory, at.url, keys("v2"))
    healthy = new("doctor", *MODELS)
    assert healthy.code == 0, healthy.out
    assert "ok\tkey registry: v1 draining, v2 primary" in healthy.out
    assert "lucent_keys" not in healthy.out  # the canaries are sealed, and are no lost values
    registry(engine).retire("v1")
    wrong = Lucent(at.directory, at.url, f"v2:{'A' * 43}")("doctor", *MODELS)
    assert wrong.code == 1
    assert "fix\tkey registry: this process has another key under the name 'v2'" in wrong.out


def test_no_output_shows_a_key_or_value(at: Lucent, engine: Engine) -> None:
    put(engine, V1, 10, token="MARKER-other")
    promoted(engine)
    assert BOTH.versions == ("v1", "v2")
    texts = [entry.partition(":")[2] for entry in keys("v1").split(",")]
    for step in ("register", "check", "receipts", "leaked v1", "ready v2", "retire v1", "fence v2"):
        for form in ([], ["--json"]):
            done = at("keys", *step.split(), *form, *MODELS)
            for shown in (done.out, done.err):
                assert "MARKER" not in shown
                assert not any(text in shown for text in texts)
    assert os.environ.get("LUCENT_SECRETS_KEYS") is None
