"""Opened values that do not print themselves, and the refusal to store what they print instead.

``create_engine(echo="debug")`` logs result rows after they were opened, even with
``hide_parameters=True``, and loggers and debuggers print whatever they get. So an opened document
is a real ``dict``, ``list`` or ``str`` whose ``repr`` shows only its type. A ``dict`` or ``list``
hides in ``str()`` as well. A ``str`` does not: libraries put the ``str()`` of a value into headers,
URLs, templates and columns, so it has to be its text.

Everything else (indexing, iterating, JSON, concatenation, equality, pickle) works on the value
itself. Members of a ``dict`` or ``list`` are ordinary objects. A slice of a ``str`` is redacted,
because rich and structlog show the first characters of a long one.

A document that is a bare number prints itself: put a secret number into a string, a list or a dict.
Functions that take no subclass of ``str`` (msgspec's encoders, ``sys.intern``) take ``str(value)``.

Printed text can come back: an admin form shows ``<redacted dict>``, and the next submit sends it to
be stored. The codec calls :func:`holds_print` for every document before it is sealed.
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
    """A ``str`` whose ``repr`` does not show it. ``str()`` does, as does any text built from it."""

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


# The text that our `repr` and the command line print in place of a value: as it is, or escaped any
# number of times for HTML, URLs or JSON.
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
    "$: the value has text in it that is printed in place of a hidden value, such as <redacted "
    "dict>. Something (an admin form, a log, a data table) printed a value, and the printed text "
    "came back to be stored. Nothing was written. Store the value itself, or remove the column "
    "from the form"
)


def holds_print(document: bytes) -> bool:
    """Say whether `document` has text in it that is printed in place of a hidden value."""
    if b"redacted" not in document and b"ealed" not in document:
        return False
    # Compiled (and cached) at first use, because that takes milliseconds.
    return re.search(_PRINT, document, re.VERBOSE | re.IGNORECASE) is not None
