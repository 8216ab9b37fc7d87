"""No frame of the package holds a key when it raises an error of configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sqlalchemy_lucent import (
    Keyring,
    Lucent,
    LucentConfig,
    LucentError,
    SecretsConfig,
    default_keyring,
    set_default_keyring,
)
from tests.frames import frames_of_ours, texts_in_frames

GOOD = "a" * 20 + "GOOD-KEY" + "b" * 15
SHORT = "SHORT-KEY-01"
MARKERS = (b"GOOD-KEY", b"SHORT-KEY")


def wrong_file(directory: Path) -> dict[str, str]:
    path = directory / "keys"
    path.write_text(f"v1:{GOOD},v2:{SHORT}")
    return {"LUCENT_SECRETS_KEYS_FILE": str(path)}


def from_the_process(environ: Mapping[str, str]) -> Callable[[pytest.MonkeyPatch], object]:
    def call(monkeypatch: pytest.MonkeyPatch) -> object:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        set_default_keyring(None)
        return default_keyring()

    return call


CASES: dict[str, Callable[[Path], object]] = {
    "a short key": lambda _: Keyring({"v1": GOOD, "v2": SHORT}, primary="v1"),
    "a list": lambda _: Keyring([("v1", GOOD)]),  # type: ignore[arg-type]
    "a text": lambda _: Keyring(GOOD),  # type: ignore[arg-type]
    "swapped": lambda _: Keyring({GOOD: "v1", "v2": GOOD}, primary="v2"),
    "no primary": lambda _: Keyring({"v1": GOOD, "v2": GOOD[::-1]}),
    "a key as primary": lambda _: Keyring({"v1": GOOD}, primary=GOOD),
    "one key twice": lambda _: Keyring({"v1": GOOD, "v2": GOOD}, primary="v1"),
    "adding a short key": lambda _: Keyring({"v1": GOOD}).adding("v2", SHORT),
    "adding a key as version": lambda _: Keyring({"v1": GOOD}).adding(GOOD, "v2"),
    "a key as fingerprint": lambda _: Keyring({"v1": GOOD}).fingerprint(GOOD),
    "a key as version": lambda _: Keyring({"v1": GOOD}).with_primary(GOOD),
    "without a key": lambda _: Keyring({"v1": GOOD}).without(GOOD),
    "variables": lambda _: Keyring.from_env({"LUCENT_SECRETS_KEYS": f"v1:{GOOD},v2:{SHORT}"}),
    "no separator": lambda _: Keyring.from_env({"LUCENT_SECRETS_KEYS": f"v1:{GOOD},{SHORT}"}),
    "two forms": lambda _: Keyring.from_env(
        {"LUCENT_SECRETS_KEYS": f"v1:{GOOD}", "LUCENT_SECRETS_KEY": GOOD}
    ),
    "a key as path": lambda _: Keyring.from_env({"LUCENT_SECRETS_KEY_FILE": GOOD}),
    "a file": lambda directory: Keyring.from_env(wrong_file(directory)),
    "a key as default": lambda _: set_default_keyring(GOOD),  # type: ignore[arg-type]
    "a section": lambda _: SecretsConfig(master_key=SHORT),
    "a swapped section": lambda _: SecretsConfig(master_key="v1", key_version=GOOD),
    "a key as switch": lambda _: SecretsConfig(enabled=GOOD),  # type: ignore[arg-type]
    "a key as keyring": lambda _: SecretsConfig(keyring=GOOD),  # type: ignore[arg-type]
    "a key as section": lambda _: LucentConfig(secrets=GOOD),  # type: ignore[arg-type]
    "a mapping": lambda _: LucentConfig.from_mapping({"secrets": {"masterKey": SHORT}}),
    "a key as name": lambda _: LucentConfig.from_mapping({"secrets": {GOOD: "v1"}}),
    "the environment": lambda _: LucentConfig.from_env({"LUCENT_SECRETS_KEY": SHORT}),
    "the entry point": lambda _: Lucent({"secrets": {"enabled": True, "masterKey": SHORT}}),
    "a text as entry point": lambda _: Lucent(GOOD),  # type: ignore[arg-type]
}


def keys_in_frames(error: BaseException) -> list[tuple[str, bytes]]:
    assert list(frames_of_ours(error))
    return [
        (function, data)
        for function, data in texts_in_frames(error)
        if any(marker in data for marker in MARKERS)
    ]


@pytest.mark.parametrize("case", CASES)
def test_no_frame_holds_a_key(case: str, tmp_path: Path) -> None:
    with pytest.raises(LucentError) as caught:
        CASES[case](tmp_path)
    assert keys_in_frames(caught.value) == []


@pytest.mark.parametrize(
    "environ",
    [
        {"LUCENT_SECRETS_KEYS": f"v1:{GOOD},v2:{SHORT}"},
        {"LUCENT_SECRETS_KEY": SHORT},
        {"LUCENT_SECRETS_KEY": GOOD, "LUCENT_SECRETS_KEY_FILE": GOOD},
    ],
)
def test_no_frame_holds_a_key_of_the_process_environment(
    environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (default_keyring, Keyring.from_env, LucentConfig.from_env):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        set_default_keyring(None)
        with pytest.raises(LucentError) as caught:
            call()
        assert keys_in_frames(caught.value) == []


HOLDING = """
def holding(key):
    holder = {"deep": [key]}
    raise LucentError("refused")
"""


def test_a_key_in_a_frame_would_be_seen() -> None:
    module: dict[str, Any] = {"__name__": "sqlalchemy_lucent.holding", "LucentError": LucentError}
    exec(HOLDING, module)
    with pytest.raises(LucentError) as caught:
        module["holding"](GOOD)
    assert keys_in_frames(caught.value)
