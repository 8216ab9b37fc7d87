"""The repository's own ``alembic/`` folder, run as its users run it."""

from __future__ import annotations

import os
import random
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    URL,
    Engine,
    LargeBinary,
    create_engine,
    func,
    insert,
    inspect,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    Bound,
    ConfigurationError,
    Keyring,
    LucentBase,
    LucentSecret,
    LucentSecrets,
    RotationError,
    SecretKey,
    set_default_keyring,
    status,
    verify,
)
from tests.command import Forked
from tests.conftest import KEY_1, KEY_2
from tests.integration.workers import finish

PROJECT = Path(__file__).resolve().parents[2]
SECRETS = LucentBase.metadata.tables["lucent_secrets"]


@pytest.fixture
def config(engine: Engine) -> Config:
    config = Config(toml_file=PROJECT / "pyproject.toml")
    config.attributes["url"] = engine.url.render_as_string(hide_password=False)
    return config


def store(engine: Engine, count: int) -> None:
    keys = [SecretKey("tenant", number, "stripe", "apiKey") for number in range(count)]
    now = datetime.now(UTC)
    with engine.begin() as connection:
        connection.execute(
            insert(SECRETS),
            [
                {
                    **key._asdict(),
                    "payload": Bound({"number": number}, row=key),
                    "created_at": now,
                    "updated_at": now,
                }
                for number, key in enumerate(keys)
            ],
        )


def versions(engine: Engine) -> dict[str | None, int]:
    return {row.key_version: row.count for row in status(engine).rows}


def stamped(engine: Engine) -> str | None:
    with engine.connect() as connection:
        version: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return version


# Before 1.18, Alembic compares the text of generated columns, which databases rewrite.
@pytest.mark.filterwarnings("ignore:Computed default on")
def test_the_created_table_is_the_one_that_the_model_describes(
    engine: Engine, config: Config
) -> None:
    command.upgrade(config, "head")

    command.check(config)
    columns = {column["name"]: column for column in inspect(engine).get_columns("lucent_secrets")}
    assert list(columns) == [column.name for column in SECRETS.columns]
    assert "computed" in columns["key_version"]
    indexed = [index["column_names"] for index in inspect(engine).get_indexes("lucent_secrets")]
    assert ["key_version"] in indexed


def test_creating_the_table_and_rotating_an_empty_one_need_no_key(
    engine: Engine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_default_keyring(None)
    for name in list(os.environ):
        if name.startswith("LUCENT_SECRETS_"):
            monkeypatch.delenv(name)

    command.upgrade(config, "head")

    assert stamped(engine) == "0003"


def test_the_rotation_revision_re_encrypts_every_row(
    engine: Engine, config: Config, promoted: Keyring
) -> None:
    command.upgrade(config, "0001")
    store(engine, 2_500)
    set_default_keyring(promoted)

    command.upgrade(config, "head")

    assert versions(engine) == {"v2": 2_500}
    assert verify(engine, keyring=promoted.without("v1")).opened == 2_500
    with Session(engine) as session:
        assert LucentSecrets(session).require("tenant:7:stripe:apiKey") == {"number": 7}


def test_a_second_run_finds_nothing_to_do(
    engine: Engine, config: Config, promoted: Keyring
) -> None:
    command.upgrade(config, "0001")
    store(engine, 20)
    set_default_keyring(promoted)
    command.upgrade(config, "head")
    stored = select(SECRETS.c.owner_id, type_coerce(SECRETS.c.payload, LargeBinary))
    with engine.connect() as connection:
        before = connection.execute(stored.order_by(SECRETS.c.owner_id)).all()

    command.downgrade(config, "0001")
    command.upgrade(config, "head")

    with engine.connect() as connection:
        assert connection.execute(stored.order_by(SECRETS.c.owner_id)).all() == before


def test_a_row_that_does_not_open_keeps_the_revision_from_being_stamped(
    engine: Engine, config: Config, promoted: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    command.upgrade(config, "0001")
    store(engine, 10)
    with engine.begin() as connection:
        other = select(type_coerce(SECRETS.c.payload, LargeBinary)).where(SECRETS.c.owner_id == "4")
        copied = connection.execute(other).scalar_one()
        connection.execute(
            update(SECRETS)
            .where(SECRETS.c.owner_id == "5")
            .values({"payload": type_coerce(copied, LargeBinary)})
        )
    set_default_keyring(promoted)

    with pytest.raises(RotationError, match="1 values of"):
        command.upgrade(config, "head")

    assert stamped(engine) == "0001"
    assert versions(engine) == {"v1": 1, "v2": 9}
    assert "('tenant', '5', 'stripe', 'apiKey')" in caplog.text
    assert "TamperedError" in caplog.text

    with Session(engine) as session:
        LucentSecrets(session).delete("tenant:5:stripe:apiKey")
        session.commit()
    command.upgrade(config, "head")
    assert stamped(engine) == "0003"


def test_rows_need_a_keyring(engine: Engine, config: Config) -> None:
    command.upgrade(config, "0001")
    store(engine, 1)
    set_default_keyring(None)

    with pytest.raises(ConfigurationError, match="LUCENT_SECRETS_KEY"):
        command.upgrade(config, "head")

    assert stamped(engine) == "0001"


def test_downgrade_refuses_to_drop_secrets_unless_told(engine: Engine, config: Config) -> None:
    command.upgrade(config, "head")
    store(engine, 3)

    with pytest.raises(RotationError, match="holds 3 secrets"):
        command.downgrade(config, "base")
    assert inspect(engine).has_table("lucent_secrets")

    told = Config(toml_file=PROJECT / "pyproject.toml", attributes=config.attributes)
    told.cmd_opts = type("Options", (), {"x": ["drop_secrets=yes"]})()
    command.downgrade(told, "base")
    assert not inspect(engine).has_table("lucent_secrets")


def test_downgrade_drops_an_empty_table(engine: Engine, config: Config) -> None:
    command.upgrade(config, "head")

    command.downgrade(config, "base")

    assert not inspect(engine).has_table("lucent_secrets")


def test_the_rotation_refuses_to_be_written_as_sql(
    engine: Engine, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RotationError, match="cannot be written as SQL"):
        command.upgrade(config, "0001:0002", sql=True)


def test_the_table_can_be_written_as_sql(
    engine: Engine, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    command.upgrade(config, "0001", sql=True)

    assert "CREATE TABLE lucent_secrets" in capsys.readouterr().out


def test_a_transaction_that_somebody_else_began_is_refused(
    engine: Engine, config: Config, promoted: Keyring
) -> None:
    command.upgrade(config, "0001")
    store(engine, 3)
    set_default_keyring(promoted)

    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        config.attributes["connection"] = connection
        with pytest.raises(RotationError, match="begun outside of Alembic"):
            command.upgrade(config, "head")

    assert versions(engine) == {"v1": 3}


def test_the_environment_says_what_to_set_when_it_has_no_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)

    with pytest.raises((ConfigurationError, CommandError), match="DATABASE_URL"):
        command.upgrade(Config(toml_file=PROJECT / "pyproject.toml"), "head")


def alembic_process(url: URL, *arguments: str) -> Forked:
    """Start ``alembic`` as a person would, with both keys in the environment."""
    environ = {
        **os.environ,
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "LUCENT_SECRETS_KEYS": f"v2:{KEY_2.hex()},v1:{KEY_1.hex()}",
    }
    return Forked("alembic", arguments, environ, PROJECT)


@pytest.mark.slow
def test_killed_half_way_it_goes_on_where_it_was(engine: Engine, config: Config) -> None:
    rows = 6_000
    command.upgrade(config, "0001")
    store(engine, rows)
    seen: set[int] = set()
    watcher = create_engine(engine.url)
    rotated = select(func.count()).select_from(LucentSecret).where(SECRETS.c.key_version == "v2")

    for _ in range(3):
        process = alembic_process(engine.url, "upgrade", "head")
        already = max(seen, default=0)
        while process.poll() is None:
            with watcher.connect() as connection:
                if (connection.scalar(rotated) or 0) > already:
                    time.sleep(random.uniform(0, 0.02))
                    process.kill()
                    process.wait()
        process.communicate()
        with watcher.connect() as connection:
            seen.add(connection.scalar(rotated) or 0)
    watcher.dispose()
    finish(alembic_process(engine.url, "upgrade", "head"))

    assert any(0 < count < rows for count in seen)
    assert stamped(engine) == "0003"
    assert versions(engine) == {"v2": rows}
    keyring = Keyring({"v2": KEY_2})
    assert verify(engine, keyring=keyring).opened == rows
