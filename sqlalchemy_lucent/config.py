"""``Lucent``: the source document's configuration, ``secrets: enabled, masterKey, keyVersion``.

::

    lucent = Lucent(LucentConfig(secrets=SecretsConfig(enabled=True, master_key=key)))
    secrets = lucent.secrets(session)       # None unless enabled and keyed
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, overload

from sqlalchemy.orm import Session, scoped_session

from ._environment import DEFAULT_KEY_VERSION, ENV_VARIABLES
from .exceptions import ConfigurationError, hide_locals
from .keyring import Keyring
from .repository import AsyncLucentSecrets, LucentSecrets

if TYPE_CHECKING:  # without greenlet, which only async programs need, it does not import
    from sqlalchemy.ext.asyncio import AsyncSession


@dataclass(frozen=True, init=False, slots=True)
class SecretsConfig:
    """Whether secrets are on, and under which keys.

    :param enabled: whether :meth:`Lucent.secrets` returns a repository.
    :param master_key: the one master key, in any form that :class:`Keyring` takes. An empty one
        counts as absent, because an unset variable often arrives that way.
    :param key_version: the version of `master_key`.
    :param keyring: the keys, if there are several; instead of `master_key`.
    :raises InvalidKeyError: the key or version breaks its rule.
    :raises ConfigurationError: both `master_key` and `keyring` are given.

    The key is turned into a :class:`Keyring` at once; its text is not kept.
    """

    enabled: bool
    keyring: Keyring | None

    @hide_locals
    def __init__(
        self,
        *,
        enabled: bool = False,
        master_key: bytes | str | None = None,
        key_version: str = DEFAULT_KEY_VERSION,
        keyring: Keyring | None = None,
    ) -> None:
        if not isinstance(enabled, bool):
            raise ConfigurationError(
                f"secrets: enabled is True or False, not of type {type(enabled).__name__}"
            )
        if keyring is not None and not isinstance(keyring, Keyring):
            raise ConfigurationError(
                f"secrets: keyring is a Keyring, not of type {type(keyring).__name__}"
            )
        if master_key and keyring is not None:
            raise ConfigurationError("secrets: give master_key or keyring, not both")
        if master_key:
            keyring = Keyring({key_version: master_key})
        object.__setattr__(self, "enabled", enabled)
        object.__setattr__(self, "keyring", keyring)

    @property
    def key_version(self) -> str | None:
        """The version that seals; ``None`` without a key."""
        return None if self.keyring is None else self.keyring.primary


_OFF: Final = SecretsConfig()


@dataclass(frozen=True, init=False, slots=True)
class LucentConfig:
    """The configuration: one section, ``secrets``; off if left out.

    :raises ConfigurationError: the section is not a :class:`SecretsConfig`.
    """

    secrets: SecretsConfig

    @hide_locals
    def __init__(self, *, secrets: SecretsConfig = _OFF) -> None:
        if not isinstance(secrets, SecretsConfig):
            raise ConfigurationError(
                f"secrets is a SecretsConfig, not of type {type(secrets).__name__}; "
                "LucentConfig.from_mapping() reads a plain dict"
            )
        object.__setattr__(self, "secrets", secrets)

    @classmethod
    @hide_locals
    def from_mapping(cls, mapping: Mapping[str, Any]) -> LucentConfig:
        """Read a plain dict, as settings libraries return it.

        ``{"secrets": {"enabled": True, "master_key": …, "key_version": "v1"}}``; the spelling of
        the source document (``masterKey``, ``keyVersion``) is taken too.

        :raises ConfigurationError: a name is unknown or given twice, or `mapping` is no mapping.
        :raises InvalidKeyError: the key or version breaks its rule.
        """
        _refuse_unknown(mapping, {"secrets"}, "the configuration")
        section = mapping.get("secrets", {})
        _refuse_unknown(section, {*_OPTIONS, *_SPELLINGS}, "secrets")
        options: dict[str, Any] = {}
        for name, value in section.items():
            option = _SPELLINGS.get(name, name)
            if option in options:
                raise ConfigurationError(f"secrets: {option} is given twice")
            options[option] = value
        return cls(secrets=SecretsConfig(**options))

    @classmethod
    @hide_locals
    def from_env(cls, environ: Mapping[str, str] | None = None) -> LucentConfig:
        """Read the keyring from the environment; secrets are enabled if there is one.

        :raises ConfigurationError: a variable is set and breaks a rule.
        """
        env = os.environ if environ is None else environ
        if not any(name in env for name in ENV_VARIABLES):
            return cls()
        return cls(secrets=SecretsConfig(enabled=True, keyring=Keyring.from_env(env)))


_OPTIONS: Final = ("enabled", "key_version", "keyring", "master_key")
_SPELLINGS: Final = {"masterKey": "master_key", "keyVersion": "key_version"}


def _refuse_unknown(mapping: object, known: set[str], where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ConfigurationError(
            f"{where} is a mapping of names to values, not of type {type(mapping).__name__}"
        )
    # The unknown name is not repeated: with name and value swapped, it would be the key.
    if not known.issuperset(mapping):
        raise ConfigurationError(
            f"{where} has a name that is not known; known are {', '.join(sorted(known))}"
        )


@dataclass(frozen=True, init=False, slots=True)
class Lucent:
    """The entry point of the source document.

    :param config: a :class:`LucentConfig`, or the plain dict of one.
    """

    config: LucentConfig

    @hide_locals
    def __init__(self, config: LucentConfig | Mapping[str, Any]) -> None:
        if not isinstance(config, LucentConfig):
            config = LucentConfig.from_mapping(config)
        object.__setattr__(self, "config", config)

    @overload
    def secrets(self, session: Session, *, keep: int | None = None) -> LucentSecrets | None: ...

    @overload
    def secrets(
        self, session: AsyncSession, *, keep: int | None = None
    ) -> AsyncLucentSecrets | None: ...

    def secrets(
        self, session: Session | AsyncSession, *, keep: int | None = None
    ) -> LucentSecrets | AsyncLucentSecrets | None:
        """Return the repository over `session`; ``None`` unless secrets are enabled and keyed.

        :param keep: how many values of each secret to keep, see :class:`LucentSecrets`.
        """
        config = self.config.secrets
        if not config.enabled or config.keyring is None:
            return None
        if isinstance(session, (Session, scoped_session)):
            return LucentSecrets(session, keyring=config.keyring, keep=keep)
        return AsyncLucentSecrets(session, keyring=config.keyring, keep=keep)
