"""The configuration of the source document, from Python, a plain dict and the environment."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConfigurationError,
    InvalidKeyError,
    Keyring,
    Lucent,
    LucentBase,
    LucentConfig,
    LucentSecrets,
    PicklingRefusedError,
    SecretsConfig,
    generate_master_key,
    set_default_keyring,
)
from tests.conftest import KEY_1, KEY_2

KEY = KEY_1.hex()


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def fingerprint(config: LucentConfig) -> str:
    keyring = config.secrets.keyring
    assert keyring is not None
    return keyring.fingerprint(keyring.primary)


@pytest.mark.parametrize(
    "secrets",
    [
        SecretsConfig(),
        SecretsConfig(enabled=True),
        SecretsConfig(enabled=True, master_key=None),
        SecretsConfig(enabled=True, master_key=""),
        SecretsConfig(enabled=True, master_key=b""),
        SecretsConfig(master_key=KEY),
        SecretsConfig(enabled=False, master_key=KEY),
        SecretsConfig(enabled=False, keyring=Keyring({"v1": KEY})),
    ],
    ids=repr,
)
def test_there_are_no_secrets_unless_enabled_and_keyed(
    secrets: SecretsConfig, session: Session
) -> None:
    assert Lucent(LucentConfig(secrets=secrets)).secrets(session) is None


def test_a_configuration_that_says_nothing_is_off(session: Session) -> None:
    assert Lucent(LucentConfig()).secrets(session) is None


@pytest.mark.parametrize("secrets", [None, {"enabled": True}, Keyring({"v1": KEY})])
def test_a_section_of_another_type_is_refused(secrets: Any) -> None:
    with pytest.raises(ConfigurationError, match="secrets is a SecretsConfig"):
        LucentConfig(secrets=secrets)


def test_a_default_keyring_does_not_key_a_configuration_without_one(session: Session) -> None:
    set_default_keyring(Keyring({"v1": KEY}))
    assert Lucent({"secrets": {"enabled": True}}).secrets(session) is None


def test_enabled_and_keyed_secrets_store_under_the_key_configured(session: Session) -> None:
    set_default_keyring(Keyring({"other": KEY_2}))
    config = LucentConfig(
        secrets=SecretsConfig(enabled=True, master_key=generate_master_key(), key_version="v3")
    )
    secrets = Lucent(config).secrets(session)
    assert isinstance(secrets, LucentSecrets)
    secrets.set("app:default:resend:apiKey", {"apiKey": "re_123"})
    assert secrets.require("app:default:resend:apiKey") == {"apiKey": "re_123"}
    assert [info.key_version for info in secrets.list()] == ["v3"]


def test_an_async_session_gets_the_async_repository() -> None:
    lucent = Lucent({"secrets": {"enabled": True, "master_key": KEY}})
    assert isinstance(lucent.secrets(AsyncSession()), AsyncLucentSecrets)


def test_several_keys_are_given_as_a_keyring(session: Session) -> None:
    keyring = Keyring({"v2": KEY_2, "v1": KEY_1}, primary="v2")
    config = SecretsConfig(enabled=True, keyring=keyring)
    assert config.keyring is keyring
    assert config.key_version == "v2"
    assert Lucent(LucentConfig(secrets=config)).secrets(session) is not None


def test_key_version_is_none_without_a_key() -> None:
    assert SecretsConfig(enabled=True).key_version is None
    assert SecretsConfig(master_key=KEY).key_version == "v1"


@pytest.mark.parametrize(
    "mapping",
    [
        {"secrets": {"enabled": True, "master_key": KEY, "key_version": "v4"}},
        {"secrets": {"enabled": True, "masterKey": KEY, "keyVersion": "v4"}},
        {"secrets": {"enabled": True, "masterKey": KEY_1, "key_version": "v4"}},
        {"secrets": MappingProxyType({"enabled": True, "keyring": Keyring({"v4": KEY})})},
        MappingProxyType({"secrets": {"enabled": True, "master_key": KEY, "key_version": "v4"}}),
    ],
)
def test_a_plain_mapping_is_read_in_both_spellings(mapping: Any) -> None:
    for config in (LucentConfig.from_mapping(mapping), Lucent(mapping).config):
        assert config.secrets.enabled
        assert config.secrets.key_version == "v4"
        assert fingerprint(config) == Keyring({"v4": KEY}).fingerprint("v4")


@pytest.mark.parametrize("mapping", [{}, {"secrets": {}}, {"secrets": {"key_version": "v1"}}])
def test_a_mapping_that_says_nothing_of_a_key_is_off(mapping: dict[str, Any]) -> None:
    config = LucentConfig.from_mapping(mapping)
    assert not config.secrets.enabled
    assert config.secrets.keyring is None


BAD_MAPPINGS: list[tuple[Any, str]] = [
    (None, "the configuration is a mapping"),
    ([("secrets", {})], "the configuration is a mapping"),
    (KEY, "the configuration is a mapping"),
    ({"secret": {}}, "the configuration has a name that is not known; known are secrets"),
    ({"secrets": None}, "secrets is a mapping of names to values, not of type NoneType"),
    ({"secrets": KEY}, "secrets is a mapping"),
    ({"secrets": {"masterkey": KEY}}, "secrets has a name that is not known"),
    ({"secrets": {KEY: "masterKey"}}, "secrets has a name that is not known"),
    ({"secrets": {1: KEY}}, "secrets has a name that is not known"),
    ({"secrets": {"masterKey": KEY, "master_key": KEY}}, "master_key is given twice"),
    ({"secrets": {"keyVersion": "v1", "key_version": "v1"}}, "key_version is given twice"),
    ({"secrets": {"enabled": "true"}}, "enabled is True or False, not of type str"),
    ({"secrets": {"enabled": 1}}, "enabled is True or False, not of type int"),
    ({"secrets": {"enabled": None}}, "enabled is True or False"),
    ({"secrets": {"keyring": {"v1": KEY}}}, "keyring is a Keyring, not of type dict"),
    (
        {"secrets": {"master_key": KEY, "keyring": Keyring({"v1": KEY})}},
        "give master_key or keyring, not both",
    ),
]


@pytest.mark.parametrize("mapping, fault", BAD_MAPPINGS)
def test_a_bad_mapping_is_refused_and_shows_no_key(mapping: Any, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault) as caught:
        Lucent(mapping)
    assert KEY not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "section",
    [
        {"master_key": KEY[:30]},
        {"master_key": 5},
        {"master_key": KEY, "key_version": "v 1"},
        {"master_key": KEY, "key_version": None},
        {"master_key": "v1", "key_version": KEY[:32]},
    ],
)
def test_a_bad_key_or_version_is_refused_and_not_shown(section: dict[str, Any]) -> None:
    with pytest.raises(InvalidKeyError) as caught:
        Lucent({"secrets": section})
    assert KEY[:30] not in str(caught.value)
    assert caught.value.__context__ is None


def test_the_environment_enables_and_keys() -> None:
    config = LucentConfig.from_env({"LUCENT_SECRETS_KEYS": f"v2:{KEY_2.hex()},v1:{KEY}"})
    assert config.secrets.enabled
    assert config.secrets.key_version == "v2"


def test_an_environment_without_a_key_is_off() -> None:
    config = LucentConfig.from_env({"PATH": "/bin"})
    assert not config.secrets.enabled
    assert config.secrets.keyring is None


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCENT_SECRETS_KEY", KEY)
    assert LucentConfig.from_env().secrets.key_version == "v1"


@pytest.mark.parametrize(
    "environ",
    [
        {"LUCENT_SECRETS_KEY": ""},
        {"LUCENT_SECRETS_KEY": KEY[:30]},
        {"LUCENT_SECRETS_KEY_VERSION": "v1"},
        {"LUCENT_SECRETS_KEY_FILE": "/nowhere"},
    ],
)
def test_a_bad_environment_is_an_error_and_not_off(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="LUCENT_SECRETS_KEY") as caught:
        LucentConfig.from_env(environ)
    assert KEY[:30] not in str(caught.value)


def test_configurations_are_immutable() -> None:
    config = LucentConfig(secrets=SecretsConfig(enabled=True, master_key=KEY))
    for holder, name in (
        (config.secrets, "enabled"),
        (config.secrets, "keyring"),
        (config, "secrets"),
        (Lucent(config), "config"),
    ):
        with pytest.raises(AttributeError):
            setattr(holder, name, None)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_a_keyed_configuration_is_refused(protocol: int) -> None:
    with pytest.raises(PicklingRefusedError):
        pickle.dumps(SecretsConfig(master_key=KEY), protocol)


def test_repr_shows_fingerprints() -> None:
    lucent = Lucent({"secrets": {"enabled": True, "masterKey": KEY}})
    assert KEY not in repr(lucent)
    assert Keyring({"v1": KEY}).fingerprint("v1") in repr(lucent)
