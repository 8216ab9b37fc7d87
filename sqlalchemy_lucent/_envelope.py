"""The stored bytes: pack and parse, nothing else.

::

    sealed  = version ":" body
    version = 1 to 32 of A-Z a-z 0-9 . _ -          (ASCII, readable in any SQL console)
    body    = 0x01 | key_id (4) | nonce (12) | AES-256-GCM ciphertext | tag (16)

Everything before the nonce is the *header*. It names the key and is authenticated as associated
data. It is the same for every value that one key seals, so it also serves to look that key up.
"""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple

FORMAT_AES_256_GCM: Final = 0x01
"""The only format so far. A later one gets another byte; readers refuse what they do not know."""

KEY_ID_SIZE: Final = 4
NONCE_SIZE: Final = 12  # 96 bits, the length GCM is built for (NIST SP 800-38D, 5.2.1.1)
TAG_SIZE: Final = 16  # 128 bits, the longest (NIST SP 800-38D, 5.2.1.2)
MAX_VERSION_LENGTH: Final = 32

VERSION_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,32}", re.ASCII)

_SEPARATOR: Final = b":"
_HEADER_TAIL: Final = 1 + 1 + KEY_ID_SIZE  # separator, format, key id

LONGEST_PREFIX: Final = MAX_VERSION_LENGTH + _HEADER_TAIL + NONCE_SIZE
"""The longest header and nonce. The nonce is fresh for every seal, so comparing these bytes is as
good as comparing the whole value."""


class Envelope(NamedTuple):
    """One sealed value, taken apart. ``body`` is the ciphertext with its tag."""

    version: str
    key_id: bytes
    nonce: bytes
    body: bytes


def is_older(version: str, other: str) -> bool:
    """Say whether a key version comes before another in natural order: v9 before v10."""
    return _natural_order(version) < _natural_order(other)


def _natural_order(version: str) -> list[str | int]:
    # Text and numbers take turns, so that like is compared with like.
    parts = re.split(r"([0-9]+)", version)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def version_prefix(version: str) -> bytes:
    """Return what every value under a key version begins with, in any format."""
    return version.encode("ascii") + _SEPARATOR


def pack_header(version: str, key_id: bytes) -> bytes:
    """Return everything before the nonce."""
    return b"%s%c%s" % (version_prefix(version), FORMAT_AES_256_GCM, key_id)


def as_bytes(stored: object) -> bytes:
    """Return a stored value as bytes. Some drivers give a memoryview, and SQLite gives text or a
    number if that is what was written into the column.
    """
    if isinstance(stored, (bytes, bytearray, memoryview)):
        return bytes(stored)
    return str(stored).encode("utf-8", "replace")


def header_size(sealed: bytes) -> int:
    """Return the length of the header that `sealed` would have; cheap, and checks nothing."""
    return sealed.find(_SEPARATOR) + _HEADER_TAIL


def parse(sealed: bytes) -> Envelope | None:
    """Take `sealed` apart, or return ``None`` if it does not begin as a sealed value does.

    The format byte is part of that beginning: the first half of text with a colon in it, such as
    ``user:password``, must not be taken for a key version and shown. A value that was cut short
    after its header is still parsed.
    """
    separator = sealed.find(_SEPARATOR)
    if separator < 1 or len(sealed) < separator + _HEADER_TAIL:
        return None
    version = sealed[:separator].decode("latin-1")
    if sealed[separator + 1] != FORMAT_AES_256_GCM or not VERSION_PATTERN.fullmatch(version):
        return None
    header_end = separator + _HEADER_TAIL
    nonce_end = header_end + NONCE_SIZE
    return Envelope(
        version=version,
        key_id=sealed[separator + 2 : header_end],
        nonce=sealed[header_end:nonce_end],
        body=sealed[nonce_end:],
    )


pack_length: Final = struct.Struct(">I").pack
"""Pack the length of a part of associated data: 4 bytes, big-endian."""


def length_prefixed(*parts: bytes) -> bytes:
    """Join `parts`, each preceded by its length (4 bytes, big-endian).

    Different tuples never give the same bytes, as associated data requires.
    """
    return b"".join([pack_length(len(part)) + part for part in parts])
