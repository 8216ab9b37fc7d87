"""``SecretKey``: the scoped key ``scope:ownerId:provider:name`` of a secret."""

from __future__ import annotations

import unicodedata
import uuid
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Self

from .exceptions import InvalidKeyError

MAX_PART_LENGTH: Final = 128
"""Characters of one part; four parts of utf8mb4 fit the 3,072 bytes of an InnoDB index key."""

KEY_PART_NAMES: Final = ("scope", "owner_id", "provider", "name")

_SEPARATOR: Final = ":"
_MAX_INT_BITS: Final = 4 * MAX_PART_LENGTH


class _Parts(NamedTuple):
    scope: str
    owner_id: str
    provider: str
    name: str


class SecretKey(_Parts):
    """The key of a secret: an immutable tuple of four strings, hashable and ordered.

    :param scope: what kind of owner it is, such as ``tenant``, ``user`` or ``app``.
    :param owner_id: which owner; a UUID or int is converted to text.
    :param provider: whose secret it is, such as ``stripe``.
    :param name: which of the provider's secrets it is, such as ``apiKey``.
    :raises InvalidKeyError: a part is not 1 to 128 characters, or has a colon, a control
        character, leading or trailing white space, or text that is not in Unicode's NFC. Nothing
        is trimmed or normalised silently, so one secret has one key.

    No character has a wildcard meaning anywhere.
    """

    __slots__ = ()

    def __new__(cls, scope: str, owner_id: str | int | uuid.UUID, provider: str, name: str) -> Self:
        """Check the parts here, because a named tuple has no `__init__`."""
        owner: object = owner_id
        if isinstance(owner, uuid.UUID) or (
            # Python refuses to convert huge integers (`sys.set_int_max_str_digits`).
            isinstance(owner, int)
            and not isinstance(owner, bool)
            and owner.bit_length() <= _MAX_INT_BITS
        ):
            owner = str(owner)
        parts = zip(KEY_PART_NAMES, (scope, owner, provider, name), strict=True)
        return super().__new__(cls, *(check_part(part_name, part) for part_name, part in parts))

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Self:  # type: ignore[override]
        # `_replace` and `copy.replace` call this. The inherited one checks nothing.
        return cls(*iterable)

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """Return the key that `text` spells, the inverse of ``str(key)``.

        :raises InvalidKeyError: `text` is not four valid parts joined by colons.
        """
        if not isinstance(text, str):
            raise InvalidKeyError(
                f"a secret key is a SecretKey or its text, not {type(text).__name__}"
            )
        parts = text.split(_SEPARATOR)
        if len(parts) != len(KEY_PART_NAMES):
            raise InvalidKeyError(
                f"a secret key has the form scope:ownerId:provider:name; "
                f"this one has {len(parts)} part{'s' * (len(parts) != 1)}"
            )
        return cls(*parts)

    @classmethod
    def of(cls, key: SecretKey | str) -> SecretKey:
        """Return `key` itself, or parse it if it is text.

        :raises InvalidKeyError: it is of another type, or breaks a rule.
        """
        return key if isinstance(key, SecretKey) else cls.parse(key)

    def __str__(self) -> str:
        return _SEPARATOR.join(self)

    def __repr__(self) -> str:
        return f"SecretKey({', '.join(map(repr, self))})"


def stored_key(parts: Iterable[str]) -> SecretKey:
    """Return the key of a row, unchecked: one that breaks a rule was written by others."""
    return tuple.__new__(SecretKey, parts)


def check_part(part_name: str, part: object) -> str:
    """Return `part` as a plain ``str``.

    :raises InvalidKeyError: naming the part and the rule that it breaks.
    """
    if not isinstance(part, str):
        fault = f"is of type {type(part).__name__}, not str"
    elif not part:
        fault = "is empty"
    elif len(part) > MAX_PART_LENGTH:
        fault = f"has {len(part)} characters; {MAX_PART_LENGTH} is the most"
    elif _SEPARATOR in part:
        fault = "has a colon, which separates the parts"
    elif not (part.isascii() and part.isprintable()) and any(
        unicodedata.category(character) in ("Cc", "Cs") for character in part
    ):
        fault = "has a control character or a lone surrogate"
    elif part != part.strip():
        fault = "has leading or trailing white space"
    elif not unicodedata.is_normalized("NFC", part):
        fault = "is not in Unicode normalisation form NFC"
    else:
        return str.__str__(part)  # plain, also where an Enum was given
    raise InvalidKeyError(f"the {part_name} of a secret key {fault}")
