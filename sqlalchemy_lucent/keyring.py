"""Master keys by version, and the process default.

A :class:`Keyring` holds any number of master keys. Exactly one, the *primary*, seals new values;
the others open what was sealed before.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Final, NoReturn, Protocol, Self

from . import _aead
from ._envelope import MAX_VERSION_LENGTH, VERSION_PATTERN, is_older
from ._environment import read_environment
from ._subkeys import NO_RULES, ContextKeys, RegistryRules
from .exceptions import (
    ConfigurationError,
    InvalidKeyError,
    LucentError,
    PicklingRefusedError,
    hide_locals,
)

_KEY_FORMS: Final = (
    f"{_aead.MASTER_KEY_SIZE} bytes, or their base64, base64url (43 or 44 characters) "
    "or hex (64 characters) text"
)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{43}=?", re.ASCII)
_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]{43}=?", re.ASCII)
_HEX: Final = re.compile(r"[0-9A-Fa-f]{64}", re.ASCII)


def generate_master_key() -> str:
    """Return a new master key: 32 random bytes as unpadded base64url (43 characters).

    Keep it outside the database and keep a backup: without it, nothing sealed under it opens.
    """
    return base64.urlsafe_b64encode(os.urandom(_aead.MASTER_KEY_SIZE)).rstrip(b"=").decode("ascii")


def _decode_key(key: object) -> bytes:
    """Return the 32 bytes of `key`, given in any of its forms."""
    if isinstance(key, bytes):
        if len(key) == _aead.MASTER_KEY_SIZE:
            return key
        fault = f"has {len(key)} bytes"
    elif not isinstance(key, str):
        fault = f"is of type {type(key).__name__}"
    elif _HEX.fullmatch(key):
        return bytes.fromhex(key)
    elif _BASE64.fullmatch(key) or _BASE64URL.fullmatch(key):
        return base64.b64decode(key.rstrip("=").replace("-", "+").replace("_", "/") + "=")
    elif len(key) in (43, 44, 64):
        fault = "has a character that its alphabet lacks, or mixes two alphabets"
    else:
        fault = f"has {len(key)} characters"
    raise InvalidKeyError(f"the master key {fault}; a key is {_KEY_FORMS}")


def check_version(version: object) -> str:
    """Return a key version as a plain str. Internal.

    :raises InvalidKeyError: it breaks the rule for versions.
    """
    match = VERSION_PATTERN.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise InvalidKeyError(
            f"the key version is not 1 to {MAX_VERSION_LENGTH} characters of A-Z a-z 0-9 . _ -"
        )
    return match.group()  # a plain str, also where an Enum was given


def _read_keys(pairs: Collection[tuple[object, object]]) -> dict[str, _aead.MasterKey]:
    """Return the master keys of `pairs`, by version.

    A refused entry is named by its position, not by its version, which would be the key if the two
    were swapped by mistake.
    """
    keys: dict[str, _aead.MasterKey] = {}
    for position, (name, key) in enumerate(pairs, 1):
        try:
            version, decoded = check_version(name), _decode_key(key)
        except InvalidKeyError as error:
            fault = str(error)
        else:
            if version not in keys:
                keys[version] = _aead.MasterKey(decoded)
                continue
            fault = "duplicate version"
        raise InvalidKeyError(
            f"key {position} of {len(pairs)}: {fault}" if len(pairs) > 1 else fault
        )
    return keys


class Followed(Protocol):
    """A key registry, as :meth:`Keyring.following` needs it."""

    def following(self) -> Callable[[], Keyring]:
        """Return a function that gives a keyring with the primary of the registry."""


class Keyring:
    """An immutable set of master keys by version, one of them primary.

    :param keys: master keys by version. A version is 1 to 32 characters of ``A-Z a-z 0-9 . _ -``;
        a key is 32 bytes, or their base64, base64url (padded or not) or hex text.
    :param primary: the version that seals. May be left out when there is one key only.
    :param oldest: one of the versions: values under an earlier one are refused with
        :exc:`RetiredKeyError`, though the keyring may have its key. Versions are compared in
        natural order, v9 before v10. If left out, every key opens.
    :raises InvalidKeyError: a version or key breaks its rule.
    :raises ConfigurationError: there is no key, or one key under two versions; `primary` or
        `oldest` is not among them; or `primary` is older than `oldest`.

    A keyring never shows a key: ``repr`` shows versions and fingerprints, copying returns the
    keyring itself, and pickling raises :exc:`PicklingRefusedError`. Let each process build its own.
    """

    __slots__ = ("_contexts", "_master_keys", "_oldest", "_primary", "_rules")

    _contexts: dict[tuple[str, ...], ContextKeys]
    _master_keys: dict[str, _aead.MasterKey]
    _oldest: str | None
    _primary: str
    _rules: RegistryRules

    # `__new__`, because an `__init__` could be called again on an existing keyring.
    @hide_locals
    def __new__(
        cls,
        keys: Mapping[str, bytes | str],
        *,
        primary: str | None = None,
        oldest: str | None = None,
    ) -> Self:
        """Check and decode the keys."""
        if not isinstance(keys, Mapping):
            raise InvalidKeyError(
                "a keyring is made from a mapping of versions to keys, such as "
                f'{{"v1": key}}, not from {type(keys).__name__}'
            )
        master_keys = _read_keys(keys.items())
        if not master_keys:
            raise ConfigurationError("a keyring needs at least one key")
        if primary is None:
            if len(master_keys) > 1:
                raise ConfigurationError(
                    f"a keyring of {len(master_keys)} keys needs primary=, the version that seals: "
                    f"one of {', '.join(map(repr, master_keys))}"
                )
            (primary,) = master_keys
        keyring = cls._of(master_keys, primary)
        return keyring if oldest is None else keyring._limited(oldest)

    @classmethod
    def _of(
        cls,
        master_keys: dict[str, _aead.MasterKey],
        primary: str,
        oldest: str | None = None,
        rules: RegistryRules = NO_RULES,
    ) -> Self:
        versions: dict[bytes, str] = {}
        for version, key in master_keys.items():
            if (same := versions.setdefault(key.key_id, version)) != version:
                raise ConfigurationError(
                    f"versions {same!r} and {version!r} have the same key (fingerprint "
                    f"{key.key_id.hex()}), so a rotation from one to the other would be void. "
                    "Give the new version a key of its own, from generate_master_key()"
                )
        keyring = super().__new__(cls)
        object.__setattr__(keyring, "_master_keys", master_keys)
        primary = keyring._require(primary)
        if oldest is not None and is_older(primary, oldest):
            raise ConfigurationError(
                f"version {primary!r} cannot be the primary: it is older than {oldest!r}, the "
                "oldest version that the keyring opens, so nothing that it seals would open. "
                "with_oldest() changes the limit"
            )
        object.__setattr__(keyring, "_primary", primary)
        object.__setattr__(keyring, "_oldest", oldest)
        # Subkeys are derived at first use and kept, because deriving one costs as much as sealing
        # several values. Their number is bounded by that of the encrypted columns.
        object.__setattr__(keyring, "_contexts", {})
        object.__setattr__(keyring, "_rules", rules)
        return keyring

    @classmethod
    @hide_locals
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read a keyring from the environment.

        Either ``LUCENT_SECRETS_KEY`` with optional ``LUCENT_SECRETS_KEY_VERSION`` (``v1`` if not
        set), or ``LUCENT_SECRETS_KEYS="v2:KEY,v1:KEY"``, whose first key is the primary. Each may
        be given as ``…_FILE`` instead: the path of a file that holds the value. White space around
        a value is ignored. ``LUCENT_SECRETS_OLDEST_VERSION`` is `oldest`.

        :param environ: the variables, instead of ``os.environ``.
        :raises ConfigurationError: nothing is set, both forms are, or a value breaks a rule. The
            message names the variable and the fault, and shows no character of a key.
        """
        source, pairs, oldest = read_environment(os.environ if environ is None else environ)
        try:
            keyring = cls._of(_read_keys(pairs), pairs[0][0])
            if oldest is None:
                return keyring
            source = oldest.source
            return keyring._limited(oldest.text)
        except LucentError as error:
            fault = f"{source}: {error}"
        raise ConfigurationError(fault)

    @property
    def primary(self) -> str:
        """The version that seals new values."""
        return self._primary

    @property
    def oldest(self) -> str | None:
        """The oldest version whose values open; ``None`` if every key opens."""
        return self._oldest

    @property
    def versions(self) -> tuple[str, ...]:
        """All versions, the primary first, the others in the order given."""
        return (self._primary, *(v for v in self._master_keys if v != self._primary))

    @hide_locals
    def fingerprint(self, version: str) -> str:
        """Return the 8 hex digits that tell the key of `version` from other keys.

        They are the key id in every value that the key sealed, and reveal nothing about the key.

        :raises ConfigurationError: the keyring lacks `version`.
        """
        return self._master_keys[self._require(version)].key_id.hex()

    @hide_locals
    def with_primary(self, version: str) -> Keyring:
        """Return a keyring of the same keys in which `version` seals.

        :raises ConfigurationError: the keyring lacks `version`, or it is older than `oldest`.
        """
        return self._of(self._master_keys, version, self._oldest)

    @hide_locals
    def with_oldest(self, version: str | None) -> Keyring:
        """Return a keyring of the same keys that opens values under `version` and later only.

        ``None`` opens those of every key again: the way back for a restored backup.

        :raises ConfigurationError: the keyring lacks `version`, or its primary is older.
        """
        if version is None:
            return self._of(self._master_keys, self._primary)
        return self._limited(version)

    def _limited(self, oldest: str) -> Self:
        return self._of(self._master_keys, self._primary, self._require(oldest))

    @hide_locals
    def adding(self, version: str, key: bytes | str) -> Keyring:
        """Return a keyring with `key` added, and the same primary.

        :raises ConfigurationError: the keyring has `version` or `key` already. A key is never
            replaced under its version: values sealed under the old one would be lost.
        :raises InvalidKeyError: the version or key breaks its rule.
        """
        name = check_version(version)
        if name in self._master_keys:
            raise ConfigurationError(
                f"the keyring already has a key of version {name!r}; "
                "give the new key a version of its own"
            )
        added = _aead.MasterKey(_decode_key(key))
        return self._of({**self._master_keys, name: added}, self._primary, self._oldest)

    @hide_locals
    def without(self, version: str) -> Keyring:
        """Return a keyring without `version`. Check first that no row needs it.

        :raises ConfigurationError: the keyring lacks `version`, or it is the primary.
        """
        if self._require(version) == self._primary:
            raise ConfigurationError(
                f"version {self._primary!r} is the primary and cannot be removed; "
                "make another version primary first"
            )
        rest = {name: key for name, key in self._master_keys.items() if name != version}
        return self._of(rest, self._primary, self._oldest)

    @hide_locals
    def ruled(self, primary: str, rules: RegistryRules) -> Keyring:
        """Return a keyring of the same keys as the key registry allows it. Internal."""
        return self._of(self._master_keys, primary, self._oldest, rules)

    @staticmethod
    def following(registry: Followed) -> Callable[[], Keyring]:
        """Return a function that gives the registry's keyring with the primary that it names.

        ::

            set_default_keyring(Keyring.following(registry))

        The keys are those of the registry's ``keyring=``; without one, of the default keyring at
        this moment. The function reads the registry at most every 30 seconds, with a connection of
        the registry's engine. If the registry is out
        of reach, the last known primary stays. If it names a key that this process lacks, values
        are opened and none is sealed. Nothing opens under a retired key.

        :param registry: a :class:`KeyRegistry` or :class:`AsyncKeyRegistry`.
        """
        return registry.following()

    def for_context(self, *contexts: str) -> ContextKeys:
        """Return keys that seal in the first of `contexts` and open in any of them. Internal."""
        keys = self._contexts.get(contexts)
        if keys is None:
            context, *others = contexts
            accepted = [self.for_context(other) for other in others]
            keys = ContextKeys(
                self._master_keys, self._primary, context, accepted, self._oldest, self._rules
            )
            keys = self._contexts.setdefault(contexts, keys)
        return keys

    @hide_locals
    def check_id(self, version: str) -> bytes:
        """Return the 16 bytes that the key registry knows the key of `version` by. Internal."""
        return self._master_keys[self._require(version)].check_id()

    @hide_locals
    def mac(self, version: str, purpose: str, message: bytes) -> bytes:
        """Return the HMAC of `message` under a key derived for `purpose`. Internal."""
        return self._master_keys[self._require(version)].mac(purpose, message)

    def _require(self, version: object) -> str:
        """Return `version` as a plain str, or raise an error that does not repeat it."""
        if isinstance(version, str):
            for name in self._master_keys:
                if name == version:
                    return name
        raise ConfigurationError(
            "the keyring has no key of the given version; "
            f"it has {', '.join(map(repr, self._master_keys))}"
        )

    def __repr__(self) -> str:
        keys = ", ".join(f"{v}={self.fingerprint(v)}" for v in self.versions)
        limit = "" if self._oldest is None else f" oldest={self._oldest}"
        return f"<Keyring primary={self._primary}{limit} {keys}>"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Keyring is immutable; with_primary() and the like copy it")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)

    def __copy__(self) -> Keyring:
        return self

    def __deepcopy__(self, memo: object) -> Keyring:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PicklingRefusedError(
            "a Keyring cannot be pickled, because its keys would be in the pickle. Let the other "
            "process build its own, for instance with Keyring.from_env()"
        )

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(None)


_default: Keyring | Callable[[], Keyring] | None = None

# The keyring of the environment, once it was read. Without a lock, because a child that is forked
# while another thread holds one would wait forever. Two threads may both read the environment;
# either result will do.
_from_environment: Keyring | None = None


@hide_locals
def set_default_keyring(keyring: Keyring | Callable[[], Keyring] | None) -> None:
    """Set the keyring that the process uses where none is passed.

    :param keyring: a keyring; a callable that returns one, called at each use so that keys can
        change while the process runs (it should cache); or ``None`` to go back to the environment,
        which is read again at the next use.
    :raises ConfigurationError: `keyring` is of another type.
    """
    global _default, _from_environment
    if keyring is not None and not isinstance(keyring, Keyring) and not callable(keyring):
        raise ConfigurationError(
            "the default keyring is a Keyring, a callable that returns one, or None"
        )
    _default = keyring
    _from_environment = None


def default_keyring() -> Keyring:
    """Return the process's keyring: the one that was set, else :meth:`Keyring.from_env`, read once.

    :raises ConfigurationError: none is configured, or the callable failed or returned no keyring.
    """
    global _from_environment
    chosen = _default
    if isinstance(chosen, Keyring):
        return chosen
    if chosen is not None:
        return _call(chosen)
    known = _from_environment
    if known is None:
        known = _from_environment = Keyring.from_env()
    return known


def context_keys(contexts: tuple[str, ...], keyring: Keyring | None = None) -> ContextKeys:
    """Return the keys of `contexts` in `keyring`, or in the default one. Internal."""
    # Inlined: runs once per value.
    if keyring is None:
        keyring = _default if type(_default) is Keyring else default_keyring()
    keys = keyring._contexts.get(contexts)
    return keyring.for_context(*contexts) if keys is None else keys


def _call(source: Callable[[], Keyring]) -> Keyring:
    try:
        result: object = source()
    except LucentError:
        raise
    except Exception as error:  # noqa: BLE001
        # If it were raised while parameters are bound, SQLAlchemy would wrap it in a StatementError
        # that prints the row's plaintext.
        fault = f"raised {type(error).__name__}; call it yourself to see why"
    else:
        if isinstance(result, Keyring):
            return result
        fault = f"returned {type(result).__name__} instead of a Keyring"
    raise ConfigurationError(f"the callable given to set_default_keyring() {fault}")
