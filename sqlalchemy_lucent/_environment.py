"""Reads master keys from environment variables and the files that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from .exceptions import ConfigurationError

ENV_KEY: Final = "LUCENT_SECRETS_KEY"
ENV_KEY_VERSION: Final = "LUCENT_SECRETS_KEY_VERSION"
ENV_KEYS: Final = "LUCENT_SECRETS_KEYS"
ENV_OLDEST_VERSION: Final = "LUCENT_SECRETS_OLDEST_VERSION"
ENV_FILE_SUFFIX: Final = "_FILE"
ENV_VARIABLES: Final = tuple(
    name + suffix
    for name in (ENV_KEY, ENV_KEY_VERSION, ENV_KEYS)
    for suffix in ("", ENV_FILE_SUFFIX)
)
"""The variables that hold keys."""

DEFAULT_KEY_VERSION: Final = "v1"


class Variable(NamedTuple):
    """A variable that is set."""

    source: str
    """Its name, for messages."""
    text: str


def read_environment(
    env: Mapping[str, str],
) -> tuple[str, list[tuple[str, str]], Variable | None]:
    """Return the names of the variables that hold keys, (version, key) pairs with the primary
    first, and the variable with the oldest version to open.

    The caller must hide its frames and those of this function: both hold the texts of keys.

    :raises ConfigurationError: nothing is set, or both forms are, or a value is malformed.
    """
    return *_read_keys(env), _read_variable(env, ENV_OLDEST_VERSION)


def _read_keys(env: Mapping[str, str]) -> tuple[str, list[tuple[str, str]]]:
    single = _read_variable(env, ENV_KEY)
    version = _read_variable(env, ENV_KEY_VERSION)
    several = _read_variable(env, ENV_KEYS)
    if several is not None:
        for other in (single, version):
            if other is not None:
                raise ConfigurationError(
                    f"both {several.source} and {other.source} are set; "
                    f"{ENV_KEYS} has its versions in it, so keep only one of the forms"
                )
        return several.source, _split(several)
    if single is None:
        raise ConfigurationError(
            "no keyring is configured: set "
            f"{ENV_KEY} (and {ENV_KEY_VERSION}, if it is not {DEFAULT_KEY_VERSION!r}), or "
            f'{ENV_KEYS}="v2:KEY,v1:KEY" with the primary first, or the same names with '
            f"{ENV_FILE_SUFFIX} and a path, or call set_default_keyring()"
        )
    if version is None:
        return single.source, [(DEFAULT_KEY_VERSION, single.text)]
    return f"{single.source}, {version.source}", [(version.text, single.text)]


def _split(variable: Variable) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for position, entry in enumerate(variable.text.split(","), 1):
        version, separator, key = entry.partition(":")
        if not separator:
            raise ConfigurationError(
                f"{variable.source}: entry {position} is not of the form VERSION:KEY"
            )
        pairs.append((version.strip(), key.strip()))
    return pairs


def _read_variable(env: Mapping[str, object], name: str) -> Variable | None:
    source, file_source = name, name + ENV_FILE_SUFFIX
    if source in env and file_source in env:
        raise ConfigurationError(f"both {source} and {file_source} are set; keep only one of them")
    if file_source in env:
        source = file_source
    elif source not in env:
        return None
    text = env[source]
    if not isinstance(text, str):
        raise ConfigurationError(f"{source} is of type {type(text).__name__}, not str")
    text = text.strip()
    if text and source == file_source:
        text = _read_file(source, text)
    if not text:
        raise ConfigurationError(f"{source} is set but empty")
    return Variable(source, text)


def _read_file(variable: str, path: str) -> str:
    # The message does not show the path: it may be a key that was put into the wrong variable.
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError as error:
        fault = str(error.strerror)
    except ValueError:
        fault = "it is not a text file, or its name is not a path"
    raise ConfigurationError(f"{variable}: the file cannot be read: {fault}")
