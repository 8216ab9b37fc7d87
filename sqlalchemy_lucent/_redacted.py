"""Opened values that do not print themselves, and the refusal to store what they print instead.

``create_engine(echo="debug")`` logs result rows after they were opened, also with
``hide_parameters=True``, and a logger or a debugger prints whatever it is handed. So an opened
document comes back as a real ``dict``, ``list`` or ``str`` whose ``repr`` says only that it is one.
A ``dict`` or ``list`` hides in ``str()`` as well. A ``str`` does not: what a library puts into a
header, a URL, a template or a column is the ``str()`` of a value, and that has to be its text.

Everything else (indexing, iterating, JSON, concatenation, equality, pickle) works on the value
itself. The parts taken out of a ``dict`` or ``list`` are ordinary objects; a slice of a ``str`` is
redacted too, because rich and structlog show the first characters of a long one.

A document that is nothing but a number prints itself: put a secret number into a string, a list or
a dict. What takes no subclass of ``str`` (msgspec's encoders, ``sys.intern``) takes ``str(value)``.

A print can come back: an admin form shows ``<redacted dict>``, and the next submit sends it to be
stored. The codec asks :func:`holds_print` of every document that is to be sealed.
"""

from __future__ import annotations

import re
from functools import reduce
from typing import Any, Final, SupportsIndex


class RedactedDict(dict[str, Any]):
    """A ``dict`` that does not print its contents."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<redacted dict>"

    __sentry_repr__ = __repr__  # Sentry's SDK would send the members


class RedactedList(list[Any]):
    """A ``list`` that does not print its contents."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<redacted list>"

    __sentry_repr__ = __repr__


class RedactedStr(str):
    """A ``str`` whose ``repr`` does not show it; ``str()`` and all that is made of it give it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<redacted str>"

    __sentry_repr__ = __repr__

    def __getitem__(self, index: SupportsIndex | slice) -> RedactedStr:
        return RedactedStr(super().__getitem__(index))


REDACTED: Final[dict[type[Any], type[Any]]] = {
    dict: RedactedDict,
    list: RedactedList,
    str: RedactedStr,
}


def redact(value: Any) -> Any:
    """Return `value` as its redacted counterpart, if it has one."""
    wrapper = REDACTED.get(type(value))
    return value if wrapper is None else wrapper(value)


# What stands for a value in a `repr` of ours or on the command line: as it is, or as HTML, URLs and
# JSON escape it, any number of times.
_SPELLINGS: Final = {
    b"LESS": rb"(?: < | AMP(?:lt|\#0*60|\#x0*3c); | %(?:25)*3c | \\(?:u00|x)3c )",
    b"MORE": rb"(?: [>=] | AMP(?:gt|\#0*62|\#x0*3e); | %(?:25)*3e | \\+(?:u00|x)3e )",
    b"COLON": rb"(?: : | AMP\#0*58; | %(?:25)*3a )",
    b"SPACE": rb"(?: \s | \+ | \xc2\xa0 | AMP(?:nbsp|\#0*32); | %(?:25)*20 | \\u00[2a]0 )",
    b"AMP": rb"(?: & | \\u0026 )(?:amp;)*",
}
_PRINT: Final = reduce(
    lambda pattern, part: pattern.replace(*part),
    _SPELLINGS.items(),
    rb"""
    LESS (?:
        redacted SPACE (?:dict|list|str|object|array|string|number|boolean|null) MORE
      | sealed SPACE .{1,300}? key_version
      | bound COLON SPACE a SPACE value SPACE not SPACE yet
    )
    """,
)
PRINT_MARKS: Final = b"<&%\\"
"""The characters that begin an opening bracket in one of its spellings."""


PRINT_FAULT: Final = (
    "$: the value holds the text that is printed in place of one that is not shown, such as "
    "<redacted dict>. Something (an admin form, a log, a table of data) printed a value, and the "
    "print came back to be stored. Nothing was written. Store the value itself, or take the column "
    "out of the form"
)


def holds_print(document: bytes) -> bool:
    """Say whether `document` holds what is printed in place of a value that is not shown."""
    if b"redacted" not in document and b"ealed" not in document:
        return False
    # Compiled, and kept, when it is first wanted, because that takes milliseconds.
    return re.search(_PRINT, document, re.VERBOSE | re.IGNORECASE) is not None
