"""The command ``lucent``, run as a process: what each command does, on pipes and on a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, LargeBinary, create_engine, func, make_url, select, text
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Session

from sqlalchemy_lucent import Keyring, LucentBase, LucentSecrets
from tests.command import COMMAND, ROOT, Lucent
from tests.conftest import KEY_1, KEY_2, Databases
from tests.databases import SYNC_DRIVERS, drop_everything, with_driver
from tests.integration.workers import contents, fill, keys, ledger

LEDGER = ("--metadata", "tests.integration.workers:metadata")
SECRET_KEY = "tenant:t1:stripe:apiKey"
PLAINTEXT = "sk_live_never_shown"
V1 = keys("v1").partition(",")[0]  # a keyring of v1 alone


@pytest.fixture
def lucent(tmp_path: Path) -> Lucent:
    """The command in an empty directory, with both keys, v2 first, and an empty database."""
    url = make_url(f"sqlite:///{tmp_path}/app.db")
    engine = create_engine(url)
    LucentBase.metadata.create_all(engine)
    engine.dispose()
    return Lucent(tmp_path, url, keys("v2"))


@pytest.fixture
def at(url: URL, engine: Engine, tmp_path: Path) -> Lucent:
    """The command at an empty database of each kind."""
    return Lucent(tmp_path, url, keys("v2"))


def engine_of(lucent: Lucent) -> Engine:
    assert lucent.url is not None
    return create_engine(lucent.url)


def store(lucent: Lucent, **values: object) -> None:
    """Store secrets under v1, as the application would."""
    engine = engine_of(lucent)
    with Session(engine) as session, session.begin():
        secrets = LucentSecrets(session, keyring=Keyring({"v1": KEY_1}))
        secrets.set_many({f"tenant:t1:stripe:{name}": value for name, value in values.items()})
    engine.dispose()


def stored_under(engine: Engine, version: str) -> int:
    with engine.connect() as connection:
        statement = select(func.count()).where(ledger.c.free.key_version == version)
        return connection.execute(statement).scalar_one()


# -- keys ------------------------------------------------------------------------------------------


def test_keygen_prints_a_key_that_a_keyring_takes(lucent: Lucent) -> None:
    done = lucent("keygen")
    assert (done.code, done.err) == (0, "")
    assert Keyring({"v1": done.out.strip()}).versions == ("v1",)
    assert done.out != lucent("keygen").out


@pytest.mark.parametrize(
    "configured, unset",
    [
        ({"LUCENT_SECRETS_KEYS": V1}, ""),
        ({"LUCENT_SECRETS_KEY": V1.removeprefix("v1:")}, "unset LUCENT_SECRETS_KEY"),
        (
            {"LUCENT_SECRETS_KEY": V1.removeprefix("v1:"), "LUCENT_SECRETS_KEY_VERSION": "v1"},
            "unset LUCENT_SECRETS_KEY LUCENT_SECRETS_KEY_VERSION",
        ),
        ({"LUCENT_SECRETS_KEYS_FILE": V1}, "unset LUCENT_SECRETS_KEYS_FILE"),
        (
            {"LUCENT_SECRETS_KEY_FILE": V1.removeprefix("v1:")},
            "unset LUCENT_SECRETS_KEY_FILE",
        ),
    ],
    ids=["keys", "key", "key and version", "keys file", "key file"],
)
def test_the_lines_of_keygen_promote_the_new_key_in_a_shell(
    tmp_path: Path, configured: dict[str, str], unset: str
) -> None:
    environ = {}
    for name, value in configured.items():
        environ[name] = value
        if name.endswith("_FILE"):
            environ[name] = str(tmp_path / "key file")
            (tmp_path / "key file").write_text(f"{value}\n")
    lines = Lucent(tmp_path)("keygen", "--env", env=environ)
    assert lines.code == 0
    assert V1.removeprefix("v1:") not in lines.out
    assert lines.out.startswith('export LUCENT_SECRETS_KEYS="v2:')
    assert lines.out.splitlines()[1:] == ([unset] if unset else [])

    done = subprocess.run(
        ["sh", "-c", f'eval "$LINES_OF_KEYGEN"; {" ".join(COMMAND)} keys'],
        env=Lucent(tmp_path).environ({**environ, "LINES_OF_KEYGEN": lines.out}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    new, old = (line.split("\t") for line in done.stdout.splitlines())
    assert (new[0], new[2]) == ("v2", "seals and opens")
    assert old == ["v1", Keyring({"v1": KEY_1}).fingerprint("v1"), "opens"]


def test_the_lines_of_keygen_begin_a_keyring_where_there_is_none(tmp_path: Path) -> None:
    done = Lucent(tmp_path)("keygen", "--env", "--key-version", "2026-07")
    assert re.fullmatch(r'export LUCENT_SECRETS_KEYS="2026-07:[\w-]{43}"\n', done.out)


def test_the_next_version_is_asked_for_where_versions_are_no_numbers(tmp_path: Path) -> None:
    lucent = Lucent(tmp_path, keys=f"spring:{KEY_1.hex()}")
    done = lucent("keygen", "--env")
    assert (done.code, done.out) == (2, "")
    assert "--key-version" in done.err
    assert 'KEYS="summer:' in lucent("keygen", "--env", "--key-version", "summer").out
    taken = lucent("keygen", "--env", "--key-version", "spring")
    assert (taken.code, taken.out) == (2, "")
    assert "already" in taken.err


def test_keys_shows_versions_and_fingerprints(lucent: Lucent) -> None:
    keyring = Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v2")
    one, two = keyring.fingerprint("v1"), keyring.fingerprint("v2")
    assert lucent("keys") == (0, f"v2\t{two}\tseals and opens\nv1\t{one}\topens\n", "")
    oldest = {"LUCENT_SECRETS_OLDEST_VERSION": "v2"}
    limited = lucent("keys", env=oldest)
    assert limited == (0, f"v2\t{two}\tseals and opens\nv1\t{one}\tretired\n", "")
    assert "unset" not in lucent("keygen", "--env", env=oldest).out


def test_a_keyring_that_the_application_sets_on_import_is_the_one(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text(
        "import sqlalchemy_lucent as lucent\n"
        "print('a module that talks')\n"
        f"lucent.set_default_keyring(lucent.Keyring({{'own': {KEY_1!r}}}))\n"
        "Base = lucent.LucentBase\n"
    )
    done = Lucent(tmp_path)("keys", "--metadata", "settings:Base")
    assert (done.code, done.err) == (0, "a module that talks\n")
    assert done.out.startswith("own\t")


# -- values of all tables, on each database --------------------------------------------------------


def test_a_key_is_rotated_verified_and_retired(at: Lucent, engine: Engine) -> None:
    fill(engine, 300)
    one = Keyring({"v1": KEY_1}).fingerprint("v1")
    two = Keyring({"v2": KEY_2}).fingerprint("v2")
    assert at("status", *LEDGER).out == (
        "column\tversion\tfingerprint\tvalues\n"
        f"ledger.free\tv1\t{one}\t300\nledger.bound\tv1\t{one}\t300\n"
    )

    needed = at("retire-check", "v1", *LEDGER)
    assert (needed.code, needed.out) == (1, "")
    assert "300 in ledger.free, 300 in ledger.bound" in needed.err

    rehearsed = at("rotate", "--dry-run", *LEDGER)
    assert rehearsed.code == 0
    assert (
        rehearsed.out
        == "600 values would be re-encrypted; nothing was written; the primary is v2\n"
    )
    assert stored_under(engine, "v1") == 300

    one_column = at("rotate", "--column", "ledger.free", "--table", "ledger", *LEDGER)
    assert one_column == (0, "300 values re-encrypted; the primary is v2\n", "")
    rotated = at("rotate", "--json", "--batch-size", "70", "--batch-time", "0.5", *LEDGER)
    assert rotated.code == 0
    assert json.loads(rotated.out).items() >= {
        "key_version": "v2", "rotated": 300, "failed_count": 0, "remaining": 0,
        "stopped": False, "dry_run": False, "ok": True,
    }.items()  # fmt: skip
    assert at("rotate", *LEDGER).out == "0 values re-encrypted; the primary is v2\n"

    counted = json.loads(at("status", "--json", "--column", "free", *LEDGER).out)
    assert counted == {
        "rows": [
            {
                "table": "ledger",
                "column": "free",
                "key_version": "v2",
                "fingerprint": two,
                "count": 300,
            }
        ],
        "left_out": [],
    }
    assert at("verify", *LEDGER) == (0, "600 values opened in ledger\n", "")
    assert at("verify", "--sample", "10", *LEDGER).out == "20 values opened in ledger\n"
    retired = at("retire-check", "v1", "--settle", "0.01", *LEDGER)
    first, headings, *looked_at = retired.out.splitlines()
    assert (retired.code, retired.err) == (0, "")
    assert first == "no value in these tables needs key version v1"
    assert headings == "column\tunder v1\tall values"
    assert sorted(looked_at) == ["ledger.bound\t0\t300", "ledger.free\t0\t300"]


def test_a_retired_key_is_looked_for_in_the_tables_that_are_named(lucent: Lucent) -> None:
    assert lucent("retire-check", "v1", "--settle", "0.01") == (
        0,
        (
            "no value in these tables needs key version v1\n"
            "column\tunder v1\tall values\n"
            "lucent_secret_versions.payload\t0\t0\nlucent_secrets.payload\t0\t0\n"
        ),
        (
            "only lucent_secret_versions, lucent_secrets were counted: name your models with "
            "--metadata as well\n"
        ),
    )
    assert lucent("retire-check", "v1").err.startswith(
        "counted once, which does not see what open transactions are about to commit: "
    )
    misspelt = lucent("retire-check", "v11")
    assert (misspelt.code, misspelt.out) == (2, "")
    assert "neither the keyring nor any value of the targets has" in misspelt.err
    # The key was taken out of the keyring, but a value needs it.
    store(lucent, apiKey=PLAINTEXT)
    only_v2 = {"LUCENT_SECRETS_KEYS": f"v2:{KEY_2.hex()}"}
    assert lucent("retire-check", "v1", env=only_v2).code == 1
    # Without any keyring, nothing knows of a version that no value has.
    without = Lucent(lucent.directory, lucent.url)
    assert [without("retire-check", version).code for version in ("v1", "v3")] == [1, 2]


def test_secrets_that_nobody_named_keep_their_key(at: Lucent, engine: Engine) -> None:
    LucentBase.metadata.create_all(engine)
    fill(engine, 1)
    assert at("rotate", *LEDGER).code == 0
    settled = ("retire-check", "v1", "--settle", "0.01", *LEDGER)
    own = "\nlucent_secrets.payload\t0\t0\nlucent_secret_versions.payload\t0\t0\n"
    assert at(*settled).out.endswith(own)
    store(at, apiKey=PLAINTEXT)
    forgotten = at(*settled)
    assert (forgotten.code, forgotten.out) == (1, "")
    assert "1 in lucent_secrets.payload" in forgotten.err


def test_a_view_is_left_out_and_named(at: Lucent, engine: Engine) -> None:
    fill(engine, 3)
    at.directory.joinpath("viewing.py").write_text(VIEWING)
    models = ("--metadata", "viewing:Seen.metadata")
    with engine.begin() as connection:
        connection.execute(text("CREATE VIEW seen AS SELECT id, free FROM ledger WHERE id < 2"))
    try:
        for arguments in (["rotate"], ["status"], ["verify"]):
            done = at(*arguments, *models, *LEDGER)
            assert done.code == 0
            assert done.err.endswith("left out, because they are not tables: seen\n")
            assert at(*arguments, *models).code != 0
        assert at("retire-check", "v1", "--settle", "0.01", *models, *LEDGER).code == 0
        secrets = ("--metadata", "sqlalchemy_lucent:LucentBase")
        LucentBase.metadata.create_all(engine)
        unknown = at("retire-check", "v1", *models, *secrets)
        assert (unknown.code, "seen is a view" in unknown.err) == (2, True)
        assert at("retire-check", "v1", *models, *secrets, "--exclude", "seen").code == 0
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP VIEW seen"))


VIEWING = """
from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy_lucent import EncryptedJSON

class Seen:
    metadata = MetaData()

sealed = EncryptedJSON(context="ledger.free")
Table("seen", Seen.metadata, Column("id", Integer, primary_key=True), Column("free", sealed))
"""


def test_values_that_do_not_open_are_named_with_the_reason(at: Lucent, engine: Engine) -> None:
    fill(engine, 4)
    one = Keyring({"v1": KEY_1}).fingerprint("v1")
    moved = (
        "UPDATE ledger SET bound = (SELECT bound FROM (SELECT * FROM ledger) AS l WHERE l.id = 0)"
    )
    with engine.begin() as connection:
        connection.execute(text("UPDATE ledger SET free = :v WHERE id = 1"), {"v": b"plain"})
        connection.execute(text(f"{moved} WHERE id = 2"))
    done = at("rotate", *LEDGER)
    assert done.code == 1
    assert done.out == (
        "6 values re-encrypted; the primary is v2\n"
        "2 values did not open, left unchanged:\n"
        "ledger.free\t1\t-\t-\tnot sealed\n"
        f"ledger.bound\t2\tv1\t{one}\tbytes, row or column changed\n"
    )
    two = Keyring({"v2": KEY_2}).fingerprint("v2")
    at.keys = f"v2:{KEY_1.hex()}"
    lines = at("verify", *LEDGER).out.splitlines()
    assert lines[0] == "0 values opened in ledger"
    assert f"ledger.bound\t3\tv2\t{two}\tanother key of that version" in lines
    at.keys = f"v3:{KEY_1.hex()}"
    assert (
        f"ledger.bound\t2\tv1\t{one}\tthe keyring lacks the version\n" in at("verify", *LEDGER).out
    )


def test_many_values_that_do_not_open_are_counted_by_reason(lucent: Lucent) -> None:
    engine = engine_of(lucent)
    fill(engine, 600)
    with engine.begin() as connection:
        connection.execute(text("UPDATE ledger SET free = 'plain' WHERE id < 30"))
    engine.dispose()
    rotated = lucent("rotate", *LEDGER)
    assert rotated.code == 1
    assert "30 values did not open, left unchanged:\nledger.free\t0\t" in rotated.out
    assert rotated.out.endswith(
        "and 10 more; --json names up to 1,000\nby reason:\nledger.free\t-\t-\tnot sealed\t30\n"
    )
    report = lucent("verify", "--json", *LEDGER)
    assert report.code == 1
    assert json.loads(report.out)["failed_count"] == len(json.loads(report.out)["failed"]) == 30
    assert "ledger.free\tnot sealed\t-\t30\n" in lucent("status", *LEDGER).out

    lucent.keys = keys("v1").partition(",")[0]  # which lacks v2
    none = lucent("verify", *LEDGER)
    assert "1200 values did not open" in none.out
    two = Keyring({"v2": KEY_2}).fingerprint("v2")
    _, _, summary = none.out.partition("the first 1,000 by reason:\n")
    counts = {
        tuple(line.split("\t")[:4]): int(line.split("\t")[4]) for line in summary.splitlines()
    }
    assert set(counts) == {
        ("ledger.free", "-", "-", "not sealed"),
        ("ledger.free", "v2", two, "the keyring lacks the version"),
        ("ledger.bound", "v2", two, "the keyring lacks the version"),
    }
    assert sum(counts.values()) == 1000
    failed = json.loads(lucent("verify", "--json", *LEDGER).out)["failed"]
    assert {(row["key_version"], row["fingerprint"]) for row in failed} == {
        (None, None),
        ("v2", two),
    }


@pytest.mark.parametrize(
    "columns, sentence",
    [
        ("free {binary}", "table ledger lacks bound in the database "),
        ("bound {binary}, free JSON", "column ledger.free is "),
        ("FREE {binary}, bound TEXT", "column ledger.bound is TEXT"),
    ],
    ids=["missing", "JSON", "text"],
)
def test_a_migration_that_was_not_run_is_told(
    at: Lucent, engine: Engine, columns: str, sentence: str
) -> None:
    binary = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
    columns = columns.format(binary=binary.compile(engine.dialect))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE ledger (id INTEGER PRIMARY KEY, {columns})"))
    for arguments in (["status"], ["verify"], ["rotate"], ["retire-check", "v1"]):
        done = at(*arguments, *LEDGER)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"lucent: {sentence}")
        assert re.search(
            r": run (your migrations|the migration that encrypts it) \(.*\)\n$", done.err
        )
    examined = at("doctor", *LEDGER)
    assert (examined.code, examined.err) == (1, "")
    assert "fix\t" in examined.out


def test_doctor_finds_nothing_to_do_where_all_is_well(at: Lucent, engine: Engine) -> None:
    LucentBase.metadata.create_all(engine)
    done = at("doctor")
    assert (done.code, done.err) == (0, "")
    levels = [line.split("\t")[0] for line in done.out.splitlines()]
    assert set(levels) == {"ok", "note"}
    assert "ix_lucent_secrets_key_version is on the key version" in done.out
    assert "keyring: v2" in done.out
    limited = at("doctor", env={"LUCENT_SECRETS_OLDEST_VERSION": "v2"})
    assert "can be opened; none older than v2, though" in limited.out
    if engine.dialect.name != "sqlite":
        assert "ok\tclock: as the database's" in done.out


def test_doctor_says_what_to_do_about_values(at: Lucent, engine: Engine) -> None:
    fill(engine, 3)
    with engine.begin() as connection:
        connection.execute(text("UPDATE ledger SET free = :v WHERE id = 2"), {"v": b"plain"})
    stale = at("doctor", *LEDGER)
    assert stale.code == 1
    one = Keyring({"v1": KEY_1}).fingerprint("v1")
    assert (
        f"fix\tledger.free: 2 values under v1 ({one}), not under the primary v2\tlucent rotate\n"
        in stale.out
    )
    assert "fix\tledger.free: 1 value not sealed\tencrypt" in stale.out

    at.keys = f"v2:{KEY_2.hex()}"
    assert "which the keyring lacks\tadd the key of v1" in at("doctor", *LEDGER).out
    at.keys = f"v1:{KEY_2.hex()}"
    assert "but the keyring's v1 is another key" in at("doctor", *LEDGER).out
    at.keys = None
    without = at("doctor", *LEDGER)
    assert without.code == 1
    assert without.out.startswith("fix\tkeyring: none\tno keyring is configured: set ")
    assert "without a keyring none opens" in without.out


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_finds_a_blob_that_is_too_small_and_a_clock_that_is_off(
    databases: Databases, tmp_path: Path
) -> None:
    url = databases.url("mysql")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE ledger (id INT PRIMARY KEY, free BLOB, bound TEXT)"))
    try:
        off = url.update_query_dict({"init_command": "SET timestamp = 1000000000"})
        done = Lucent(tmp_path, off, keys("v2"))("doctor", *LEDGER)
    finally:
        drop_everything(engine)
        engine.dispose()
    assert done.code == 1
    assert "fix\tledger.free: BLOB, in which a longer value is refused" in done.out
    assert "fix\tledger.bound: TEXT" in done.out
    assert re.search(r"fix\tclock: \d{6,} seconds away", done.out)


def test_one_key_under_two_versions_is_refused(lucent: Lucent) -> None:
    lucent.keys = f"v3:{KEY_2.hex()},v2:{KEY_1.hex()},v1:{KEY_1.hex()}"
    for command in ("rotate", "verify", "keys"):
        done = lucent(command)
        assert done.code == 2
        assert "'v2' and 'v1' have the same key" in done.err
    assert "have the same key" in lucent("doctor").out


def test_doctor_names_a_key_that_is_a_placeholder(lucent: Lucent) -> None:
    assert "times" not in lucent("doctor").out
    lucent.keys = f"v2:{'00' * 32},v1:{KEY_1.hex()}"
    done = lucent("doctor")
    assert done.code == 1
    assert "fix\tkeyring: the key of v2 is one byte 32 times\t" in done.out


def test_doctor_finds_what_is_missing_in_the_database(lucent: Lucent) -> None:
    done = lucent("doctor", *LEDGER)
    assert done.code == 1
    assert "fix\ttable ledger: not in the database\trun your migrations" in done.out

    engine = engine_of(lucent)
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_lucent_secrets_key_version"))
        connection.execute(text("ALTER TABLE lucent_secrets DROP COLUMN updated_at"))
    engine.dispose()
    done = lucent("doctor")
    assert "fix\ttable lucent_secrets: lacks updated_at\t" in done.out
    assert "fix\ttable lucent_secrets: its key_version has no index\t" in done.out


def test_doctor_names_sealed_values_that_no_model_names(at: Lucent, engine: Engine) -> None:
    fill(engine, 3)
    binary = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
    name, blob = engine.dialect.name, binary.compile(engine.dialect)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE copies (n INTEGER PRIMARY KEY, kept {blob})"))
        connection.execute(text("INSERT INTO copies SELECT id, free FROM ledger"))
        connection.execute(text(f"ALTER TABLE ledger ADD COLUMN old {blob}"))
        connection.execute(text("UPDATE ledger SET old = free WHERE id = 1"))
        connection.execute(text(f"CREATE TABLE no_copies (n INTEGER PRIMARY KEY, other {blob})"))
        connection.execute(text("INSERT INTO no_copies VALUES (1, :v)"), {"v": b"v1:plain"})
        connection.execute(text("CREATE VIEW shown AS SELECT * FROM copies"))
        if name == "postgresql":
            connection.execute(text("CREATE SCHEMA audit"))
            connection.execute(text("CREATE TABLE audit.log AS SELECT to_jsonb(l) FROM ledger l"))
            connection.execute(text("CREATE TABLE audit.texts (t text)"))
            connection.execute(text("INSERT INTO audit.texts SELECT free::text FROM ledger"))
    try:
        done = at("doctor", *LEDGER)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP VIEW shown"))
            if name == "postgresql":
                connection.execute(text("DROP SCHEMA audit CASCADE"))
    schema = {"sqlite": "main", "postgresql": "public"}.get(name, engine.url.database)
    found = [line.split("\t")[1] for line in done.out.splitlines() if "no model names" in line]
    words = "sealed values that no model names"
    expected = [
        f"{schema}.copies.kept: {words}: 3 under v1",
        f"{schema}.ledger.old: {words}: 1 under v1",
    ]
    if name == "postgresql":
        expected[:0] = [
            f"audit.log.to_jsonb: {words}: 3 under v1",
            f"audit.texts.t: {words}: 3 under v1",
        ]
    assert (done.code, done.err, found) == (1, "", expected)
    assert "none was opened" in done.out


def test_doctor_finds_partitions_that_were_detached_and_tables_that_it_may_not_read(
    databases: Databases, tmp_path: Path
) -> None:
    engine = create_engine(databases.url("postgresql"))
    role = f"lucent_test_doctor_{os.getpid()}"
    with engine.begin() as connection:
        columns = "id int PRIMARY KEY, free bytea, bound bytea"
        for statement in (
            f"CREATE TABLE ledger ({columns}) PARTITION BY RANGE (id)",
            "CREATE TABLE ledger_1 PARTITION OF ledger FOR VALUES FROM (0) TO (2)",
            "CREATE TABLE ledger_2 PARTITION OF ledger FOR VALUES FROM (2) TO (9)",
            f"CREATE ROLE {role} LOGIN",
            f"GRANT ALL ON ledger, ledger_1 TO {role}",
        ):
            connection.execute(text(statement))
    try:
        fill(engine, 4)
        lucent = Lucent(tmp_path, engine.url, keys("v1"))
        assert "no model names" not in lucent("doctor", *LEDGER).out
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE ledger DETACH PARTITION ledger_2"))
        found = lucent("doctor", *LEDGER)
        assert found.code == 1
        assert "public.ledger_2.free: sealed values that no model names: 2 under v1" in found.out
        lucent.url = engine.url.set(username=role)
        unread = lucent("doctor", *LEDGER)
        assert "note\tpublic.ledger_2: was not searched" in unread.out
        assert unread.code == 0
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE ledger, ledger_2"))
            connection.execute(text(f"DROP ROLE {role}"))
        engine.dispose()


WIRED = """
import sqlalchemy_lucent.migrations as lucent_migrations
context.configure(
    render_item=lucent_migrations.render_item,
    autogenerate_plugins=["alembic.autogenerate.*", "sqlalchemy_lucent.*"],
    transaction_per_migration=True,
)
"""


def test_doctor_looks_at_the_wiring_of_alembic(lucent: Lucent) -> None:
    directory = lucent.directory
    assert "note\tAlembic: no alembic.ini" in lucent("doctor").out
    (directory / "alembic.ini").write_text("[alembic]\n")
    assert "fix\tAlembic: script_location is not set" in lucent("doctor").out
    (directory / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s/migrations\n")
    assert "fix\tAlembic: there is no " in lucent("doctor").out
    (directory / "migrations").mkdir()
    env = directory / "migrations" / "env.py"
    env.write_text("# " + "# ".join(WIRED.splitlines(keepends=True)))
    commented = lucent("doctor")
    assert commented.code == 1
    assert "env.py lacks the import, render_item, transaction_per_migration" in commented.out
    env.write_text(WIRED)
    wired = lucent("doctor")
    assert wired.code == 0
    assert "env.py has the import and the options" in wired.out


def test_the_environment_of_this_repository_is_wired(lucent: Lucent) -> None:
    lucent.directory = ROOT
    assert "ok\tAlembic: " in lucent("doctor").out


# -- which database --------------------------------------------------------------------------------


def test_the_url_is_taken_from_the_option_the_environment_and_alembic_in_this_order(
    lucent: Lucent,
) -> None:
    store(lucent, apiKey="x")
    good, lucent.url = str(lucent.url), None
    (lucent.directory / "pyproject.toml").write_text(f'[tool.alembic]\nsqlalchemy.url = "{good}"\n')
    assert lucent("list").code == 0
    (lucent.directory / "alembic.ini").write_text("[alembic]\nsqlalchemy.url = sqlite:///b.db\n")
    assert "no SQLite database at b.db" in lucent("list").err
    lucent.url = "sqlite:///c.db"
    assert "no SQLite database at c.db" in lucent("list").err
    assert lucent("list", "--url", good).code == 0


def test_the_url_of_an_async_driver_is_taken_too(async_url: URL, tmp_path: Path) -> None:
    engine = create_engine(async_url.set(drivername=SYNC_DRIVERS[async_url.get_backend_name()]))
    fill(engine, 5)
    engine.dispose()
    lucent = Lucent(tmp_path, async_url, keys("v2"))
    assert lucent("rotate", *LEDGER) == (0, "10 values re-encrypted; the primary is v2\n", "")


def test_doctor_notes_that_asyncmy_has_no_statement_cache(
    databases: Databases, tmp_path: Path
) -> None:
    url = databases.url("mysql")
    for named, is_noted in (
        (url, False),
        (with_driver(url, "mysql+asyncmy"), True),
        (with_driver(url, "mysql+asyncmy").update_query_dict({"stmt_cache_size": "128"}), False),
    ):
        done = Lucent(tmp_path, named, keys("v2"))("doctor")
        assert f"by {url.drivername.partition('+')[2]}" in done.out
        assert ("note\tdatabase: the URL has no stmt_cache_size" in done.out) is is_noted


# -- secrets ---------------------------------------------------------------------------------------


def test_a_secret_is_stored_listed_shown_and_deleted(lucent: Lucent) -> None:
    done = lucent("set", SECRET_KEY, stdin=json.dumps({"apiKey": PLAINTEXT}))
    assert done == (0, f"stored {SECRET_KEY} under key version v2\n", "")
    assert re.fullmatch(
        rf"{SECRET_KEY}\tv2\t\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\t\d+s\t-\n",
        lucent("list").out,
    )
    redacted = lucent("get", SECRET_KEY)
    assert redacted.code == 0
    assert redacted.out.endswith("\t<redacted object>\n")
    revealed = lucent("get", SECRET_KEY, "--reveal")
    assert json.loads(revealed.out) == {"apiKey": PLAINTEXT}
    refused = lucent("delete", SECRET_KEY)
    assert refused == (
        2,
        "",
        "lucent: standard input is not a terminal, so nobody can be asked; add --yes to go on\n",
    )
    assert lucent("delete", SECRET_KEY, "--yes") == (0, f"deleted {SECRET_KEY}\n", "")
    assert lucent("list") == (0, "", "")


@pytest.mark.parametrize(
    "given, kind",
    [
        ("[1]", "array"), ('"text"', "string"), ("12345", "number"), ("1.5", "number"),
        ("true", "boolean"), ("null", "null"),
    ],
)  # fmt: skip
def test_a_redacted_secret_shows_its_kind_alone(lucent: Lucent, given: str, kind: str) -> None:
    assert lucent("set", SECRET_KEY, stdin=given).code == 0
    assert lucent("get", SECRET_KEY).out.endswith(f"\t<redacted {kind}>\n")


def test_a_value_comes_from_a_file_and_may_be_text(lucent: Lucent) -> None:
    file = lucent.directory / "token.txt"
    file.write_text("grüße\n", "utf-8")
    assert lucent("set", SECRET_KEY, "--file", str(file), "--text").code == 0
    revealed = lucent("get", SECRET_KEY, "--reveal", env={"PYTHONIOENCODING": "ascii"})
    assert revealed.out == '"gr\\u00fc\\u00dfe"\n'
    assert lucent("get", SECRET_KEY, "--reveal").out == '"grüße"\n'


@pytest.mark.parametrize(
    "content", ["grüße\n", "-----BEGIN-----\r\nMII=\n-----END-----\n", "\n\n", "\0\n"]
)
def test_a_text_comes_back_as_it_was_in_the_file(lucent: Lucent, content: str) -> None:
    file = lucent.directory / "text"
    file.write_bytes(f"{content}x\n".encode())
    assert lucent("set", SECRET_KEY, "--text", "--file", str(file)).code == 0
    shown = lucent("get", SECRET_KEY, "--reveal", "--text", env={"PYTHONIOENCODING": "ascii"})
    assert shown == (0, content + "x\n", "")
    assert lucent("set", SECRET_KEY, "--text", stdin=shown.out).code == 0
    assert lucent("get", SECRET_KEY, "--reveal", "--text") == shown


def test_what_is_no_text_is_not_printed_as_one(lucent: Lucent) -> None:
    store(lucent, apiKey={"token": PLAINTEXT})
    done = lucent("get", SECRET_KEY, "--reveal", "--text")
    assert (done.code, done.out) == (2, "")
    assert (
        done.err
        == f"lucent: {SECRET_KEY} is not text but of the JSON type object: leave --text out\n"
    )
    alone = lucent("get", SECRET_KEY, "--text")
    assert (alone.code, alone.out) == (2, "")
    assert "--text goes with --reveal" in alone.err


def test_a_text_moves_no_cursor_on_a_terminal(lucent: Lucent) -> None:
    store(lucent, apiKey="one\n\x1b[2Jtwo")
    shown = lucent.on_terminal("get", SECRET_KEY, "--reveal", "--text", "--yes")
    assert (shown.code, shown.raw) == (0, "one\r\n\\x1b[2Jtwo\r\n")


def test_secrets_of_a_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from sqlalchemy.orm import DeclarativeBase\n"
        "from sqlalchemy_lucent import LucentSecretMixin\n"
        "class Base(DeclarativeBase): ...\n"
        "class Secret(LucentSecretMixin, Base): __tablename__ = 'own_secrets'\n"
        "class Other(LucentSecretMixin, Base): __tablename__ = 'other_secrets'\n"
        "class Elsewhere(DeclarativeBase): ...\n"
        "class Third(LucentSecretMixin, Elsewhere): __tablename__ = 'third_secrets'\n"
        "several = (Elsewhere.metadata, [Other.__table__])\n"
        "mine = [Elsewhere]\n"
        "if __name__ == '__main__':\n"
        "    import sqlalchemy\n"
        "    for base in (Base, Elsewhere):\n"
        "        base.metadata.create_all(sqlalchemy.create_engine('sqlite:///app.db'))\n"
    )
    lucent = Lucent(tmp_path, "sqlite:///app.db", keys("v2"))
    subprocess.run([sys.executable, "models.py"], cwd=tmp_path, env=lucent.environ(), check=True)
    own = ("--metadata", "models:Secret")
    assert lucent("set", SECRET_KEY, *own, stdin="1").code == 0
    assert lucent("list", *own).out.startswith(SECRET_KEY)
    assert lucent("list", "--metadata", "models:Other") == (0, "", "")
    third = ("--metadata", "models:mine")
    assert lucent("set", SECRET_KEY, *third, stdin="3").code == 0
    for target in ("Third", "Third.__table__", "Elsewhere", "Elsewhere.metadata", "mine"):
        assert lucent("get", SECRET_KEY, "--reveal", "--metadata", f"models:{target}").out == "3\n"
    assert (
        lucent("get", SECRET_KEY, "--reveal", "--metadata", "models:Elsewhere.registry").code == 0
    )
    assert lucent("delete", SECRET_KEY, "--yes", *third).code == 0
    for target in ("Base", "several"):
        several = lucent("list", "--metadata", f"models:{target}")
        assert (several.code, several.out) == (2, "")
        assert "several models of scoped secrets" in several.err
    none = lucent("list", *LEDGER)
    assert (none.code, none.out) == (2, "")
    assert "no model of scoped secrets" in none.err


def test_models_may_be_named_by_the_environment(lucent: Lucent) -> None:
    engine = engine_of(lucent)
    fill(engine, 3)
    engine.dispose()
    store(lucent, apiKey=1)
    env = {"LUCENT_METADATA": "tests.integration.workers:metadata sqlalchemy_lucent:LucentBase"}
    assert lucent("rotate", env=env) == (0, "7 values re-encrypted; the primary is v2\n", "")
    assert lucent("list", env=env).out.startswith(SECRET_KEY)
    assert lucent("verify", *LEDGER, env=env).out == "6 values opened in ledger\n"
    assert (
        lucent("verify", env={"LUCENT_METADATA": ""}).out
        == "1 value opened in lucent_secret_versions, lucent_secrets\n"
    )
    wrong = lucent("status", env={"LUCENT_METADATA": "nowhere:Base"})
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err == "lucent: LUCENT_METADATA nowhere:Base: No module named 'nowhere'\n"
    assert "[env var: LUCENT_METADATA]" in " ".join(lucent("rotate", "--help").out.split())


def test_a_list_of_many_pages_and_of_one_owner(lucent: Lucent) -> None:
    engine = engine_of(lucent)
    with Session(engine) as session, session.begin():
        secrets = LucentSecrets(session)
        secrets.set_many({f"tenant:t{n:04}:p:n": n for n in range(1100)})
    engine.dispose()
    lines = lucent("list").out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"tenant:t{n:04}:p:n" for n in range(1100)]
    assert lucent("list", "--scope", "tenant", "--owner", "t0007").out.count("\n") == 1


# -- on a terminal ---------------------------------------------------------------------------------


def test_revealing_asks_on_a_terminal(lucent: Lucent) -> None:
    store(lucent, apiKey=PLAINTEXT)
    no = lucent.on_terminal("get", SECRET_KEY, "--reveal", typed=[("[y/N]", "n\n")])
    assert no.code == 1
    assert PLAINTEXT not in no.text
    yes = lucent.on_terminal("get", SECRET_KEY, "--reveal", typed=[("[y/N]", "y\n")])
    assert yes.code == 0
    assert PLAINTEXT in yes.text
    assert PLAINTEXT in lucent.on_terminal("get", SECRET_KEY, "--reveal", "--yes").text


def test_deleting_asks_on_a_terminal(lucent: Lucent) -> None:
    store(lucent, apiKey=1)
    no = lucent.on_terminal("delete", SECRET_KEY, typed=[("[y/N]", "\n")])
    assert (no.code, lucent("list").out.count("\n")) == (1, 1)
    yes = lucent.on_terminal("delete", SECRET_KEY, typed=[("[y/N]", "yes\n")])
    assert (yes.code, lucent("list").out) == (0, "")


def test_a_value_that_is_typed_is_not_shown(lucent: Lucent) -> None:
    shown = lucent.on_terminal("set", SECRET_KEY, typed=[("(not shown): ", f'"{PLAINTEXT}"\n')])
    assert shown.code == 0
    assert PLAINTEXT not in shown.raw
    assert json.loads(lucent("get", SECRET_KEY, "--reveal").out) == PLAINTEXT


CONTROLS = "\x1b[2J|\x7f|\x9b31m|\u202e|\u2066|\ue000|\U000e0041|é|𝄞"


@pytest.mark.parametrize("options", [(), ("--text",)])
def test_a_value_does_not_steer_the_terminal(lucent: Lucent, options: tuple[str, ...]) -> None:
    lucent("set", SECRET_KEY, stdin=json.dumps(CONTROLS))
    shown = lucent.on_terminal("get", SECRET_KEY, "--reveal", *options, "--yes")
    assert shown.code == 0
    assert [c for c in shown.raw if not c.isprintable() and c not in "\r\n"] == []
    assert "|é|𝄞" in shown.text
    if not options:
        assert json.loads(shown.text) == CONTROLS
    assert json.loads(lucent("get", SECRET_KEY, "--reveal").out) == CONTROLS


def test_an_empty_line_and_a_text_on_a_terminal_are_refused(lucent: Lucent) -> None:
    empty = lucent.on_terminal("set", SECRET_KEY, typed=[("(not shown): ", "\n")])
    assert empty.code == 2
    assert "nothing was given on standard input" in empty.text
    text = lucent.on_terminal("set", SECRET_KEY, "--text")
    assert text.code == 2
    assert "--file" in text.text
    assert lucent("list").out == ""


@pytest.mark.parametrize("redirection", ["</dev/null", "<&-"])
@pytest.mark.parametrize("option", ["", "--text"])
def test_no_value_is_not_an_empty_one(lucent: Lucent, redirection: str, option: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(COMMAND)} set {SECRET_KEY} {option} {redirection}"],
        cwd=lucent.directory,
        env=lucent.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lucent: nothing was given on standard input; ")
    assert lucent("list").out == ""


def test_forty_columns_are_enough(lucent: Lucent) -> None:
    store(lucent, apiKey=1, aLongNameThatIsWiderThanTheTerminalItself=2)
    for arguments in (["keys"], ["list"], ["status"], ["doctor"], ["--help"], ["rotate", "--help"]):
        shown = lucent.on_terminal(*arguments, columns=40)
        if arguments != ["list"]:
            assert max(map(len, shown.text.splitlines())) <= 40, shown.text
    listed = lucent.on_terminal("list", columns=40).text
    assert "tenant:t1:stripe:aLongNameThatIsWiderThanTheTerminalItself" in listed  # nothing is cut
    assert "key      " in lucent.on_terminal("list", columns=120).text


def test_the_list_of_commands_is_not_cut(lucent: Lucent) -> None:
    for columns in (40, 80):
        shown = " ".join(lucent.on_terminal("--help", columns=columns).text.split())
        assert "..." not in shown.partition("Commands:")[2]
        assert "verify Open every value, and name those that do not open. rotate" in shown


def test_colours_are_for_terminals_that_want_them(lucent: Lucent) -> None:
    assert "\x1b[" in lucent.on_terminal("doctor").raw
    assert "\x1b" not in lucent.on_terminal("doctor", env={"NO_COLOR": "1"}).raw
    assert "\x1b" not in lucent("doctor").out


def test_a_rotation_shows_a_bar_with_rate_and_time_left(lucent: Lucent) -> None:
    engine = engine_of(lucent)
    fill(engine, 400)
    engine.dispose()
    shown = lucent.on_terminal("rotate", "--batch-size", "50", *LEDGER)
    assert shown.code == 0
    frames = re.findall(r" *(\d+)% [━╸╺]+ ([\d,]+)/s \d+:\d\d:\d\d", shown.text)
    assert int(frames[0][0]) < 100
    assert frames[-1][0] == "100"
    assert "800 values re-encrypted" in shown.text
    assert max(map(len, re.split(r"[\r\n]", shown.text))) <= 40


# -- interrupted -----------------------------------------------------------------------------------


def slowly(lucent: Lucent, rows: int = 2000) -> Engine:
    engine = engine_of(lucent)
    fill(engine, rows)
    return engine


def test_an_interrupted_rotation_says_where_it_stands_and_can_go_on(lucent: Lucent) -> None:
    engine = slowly(lucent)
    process = lucent.start("rotate", "--max-rate", "300", "--column", "free", "--json", *LEDGER)
    while not (already := stored_under(engine, "v2")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == (
        "\nfinishing the current batch; Ctrl-C again rolls back\n"
        "lucent: interrupted; run it again to go on\n"
    )
    report = json.loads(out)
    assert report["rotated"] == stored_under(engine, "v2") >= already
    assert report["remaining"] == 2000 - report["rotated"] > 0
    assert report["stopped"] is True
    assert lucent("rotate", *LEDGER).code == 0
    keyring = Keyring({"v2": KEY_2})
    assert len(contents(engine, keyring)) == 2000
    engine.dispose()


def test_a_second_interrupt_ends_it_at_once(lucent: Lucent) -> None:
    engine = slowly(lucent)
    shown = lucent.on_terminal(
        "rotate", "--max-rate", "20", *LEDGER, typed=[("/s", "\x03"), ("again rolls", "\x03")]
    )
    assert shown.code == 130
    assert "Traceback" not in shown.text
    assert "lucent: interrupted; " in shown.text
    assert "run it again to go on" in shown.text
    assert 0 < stored_under(engine, "v2") < 2000
    engine.dispose()


def test_a_second_interrupt_of_a_dry_run_says_that_nothing_was_written(lucent: Lucent) -> None:
    engine = slowly(lucent)
    shown = lucent.on_terminal(
        "rotate", "--dry-run", "--max-rate", "20", *LEDGER,
        columns=200, typed=[("/s", "\x03"), ("again rolls", "\x03")],
    )  # fmt: skip
    assert shown.code == 130
    assert "values would be re-encrypted so far; nothing was written" in shown.text
    assert "committed" not in shown.text
    assert stored_under(engine, "v2") == 0
    engine.dispose()


def test_ctrl_c_ends_any_command_with_a_word(lucent: Lucent) -> None:
    store(lucent, apiKey=1)
    shown = lucent.on_terminal("delete", SECRET_KEY, typed=[("[y/N]", "\x03")])
    assert (shown.code, shown.text.splitlines()[-1]) == (130, "lucent: interrupted")


def test_ctrl_c_while_the_command_is_imported_ends_it_with_a_word(lucent: Lucent) -> None:
    (lucent.directory / "typer.py").write_text(
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells ignore it\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    process = lucent.start("keys")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "lucent: interrupted\n")


# -- workers, completion ---------------------------------------------------------------------------


def test_processes_share_the_work(
    request: pytest.FixtureRequest, at: Lucent, engine: Engine, tmp_path: Path
) -> None:
    fill(engine, 2000)
    # The keyring is set by the application's own module, which the workers import too.
    (tmp_path / "settings.py").write_text(
        "import sqlalchemy_lucent as lucent\n"
        "from tests.integration.workers import metadata\n"
        f"environ = {{'LUCENT_SECRETS_KEYS': {at.keys!r}}}\n"
        "lucent.set_default_keyring(lucent.Keyring.from_env(environ))\n"
    )
    at.keys = None
    done = at(
        "rotate", "--workers", "2", "--max-rate", "100000", "--json",
        "--metadata", "settings:metadata",
    )  # fmt: skip
    assert done.code == 0, done
    assert "Traceback" not in done.err
    report = json.loads(done.out)
    assert report["rotated"] == 4000
    assert len(contents(engine, Keyring({"v2": KEY_2}))) == 2000


@pytest.fixture
def on_postgresql(databases: Databases, tmp_path: Path) -> Iterator[tuple[Lucent, Engine]]:
    url = databases.url("postgresql")
    engine = create_engine(url)
    yield Lucent(tmp_path, url, keys("v2")), engine
    drop_everything(engine)
    engine.dispose()


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too(on_postgresql: tuple[Lucent, Engine]) -> None:
    lucent, engine = on_postgresql
    fill(engine, 6000)
    shown = lucent.on_terminal(
        "rotate", "--workers", "2", "--max-rate", "200", *LEDGER, typed=[("/s", "\x03")]
    )
    assert shown.code == 130, shown.text
    assert "lucent: interrupted; run it again to go on" in shown.text.replace("\n", " ")
    assert "Traceback" not in shown.text
    assert 0 < stored_under(engine, "v2") < 6000


@pytest.mark.slow
def test_a_second_interrupt_ends_the_workers_at_once(
    on_postgresql: tuple[Lucent, Engine],
) -> None:
    lucent, engine = on_postgresql
    fill(engine, 6000)
    shown = lucent.on_terminal(
        "rotate", "--workers", "2", "--max-rate", "200", "--column", "free", *LEDGER,
        columns=200, typed=[("/s", "\x03"), ("again rolls back", "\x03")],
    )  # fmt: skip
    assert shown.code == 130, shown.text
    assert "Traceback" not in shown.text
    told = re.search(
        r"lucent: interrupted; at least (\d+) of 6000 values were re-encrypted and are committed",
        shown.text,
    )
    assert told, shown.text
    written = stored_under(engine, "v2")
    assert int(told[1]) <= written < 6000  # a worker may not have reported yet
    time.sleep(1)
    assert stored_under(engine, "v2") == written
    assert len(contents(engine, Keyring.from_env({"LUCENT_SECRETS_KEYS": keys("v2")}))) == 6000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep is not installed")
def test_what_a_worker_that_died_left_is_done(on_postgresql: tuple[Lucent, Engine]) -> None:
    lucent, engine = on_postgresql
    fill(engine, 900)
    process = lucent.start(
        "rotate", "--workers", "2", "--max-rate", "500", "--column", "free", "--json", *LEDGER
    )
    try:
        while not stored_under(engine, "v2"):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    report = json.loads(out)
    assert (process.returncode, report["ok"]) == (0, True)
    assert report["rotated"] <= stored_under(engine, "v2") == 900
    assert "a worker died (signal 9)" in err


def workers_of(pid: int) -> list[int]:
    """Return the processes that a process has spawned for its pool."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid), "-f", "spawn_main"], stdout=subprocess.PIPE, text=True, check=True
    )
    return list(map(int, found.stdout.split()))


def test_the_shell_completes_commands_and_options(lucent: Lucent) -> None:
    for words, expected in (("lucent ret", "retire-check"), ("lucent rotate --dry", "--dry-run")):
        position = str(len(words.split()) - 1)
        done = lucent(
            env={"_LUCENT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
        )
        assert done.out.split() == [expected]


def test_the_version_is_printed(lucent: Lucent) -> None:
    assert re.fullmatch(r"sqlalchemy-lucent \d[\w.]+\n", lucent("--version").out)
