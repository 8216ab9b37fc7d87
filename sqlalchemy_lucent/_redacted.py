"""Opened values that do not print themselves.

``create_engine(echo="debug")`` logs result rows after they were opened, also with
``hide_parameters=True``, and a logger or a debugger prints whatever it is handed. So an opened
document comes back as a real ``dict``, ``list`` or ``str`` whose ``repr`` and ``str`` say only
that it is one. Everything else (indexing, iterating, JSON, formatting a ``str``, concatenation,
equality, pickle) works on the value itself, and the parts taken out of it are ordinary objects.

A document that is nothing but a number prints itself: put a secret number into a string, a list or
a dict. msgspec's encoders, alone of the JSON libraries, refuse every subclass of ``str``: pass them
``format(value)``, or declare the column with ``redact=False``.
"""

from __future__ import annotations

from typing import Any, Final


class RedactedDict(dict[str, Any]):
    """A ``dict`` that does not print its contents."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<redacted dict>"

    __str__ = __repr__


class RedactedList(list[Any]):
    """A ``list`` that does not print its contents."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<redacted list>"

    __str__ = __repr__


class RedactedStr(str):
    """A ``str`` that does not print itself.

    ``f"Bearer {token}"`` and ``"Bearer " + token`` give the text; ``str(token)``, ``"%s" % token``
    and ``print(token)`` do not.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<redacted str>"

    __str__ = __repr__

    def __format__(self, format_spec: str) -> str:
        # `str` itself would ask `__str__`, and an API would be sent "Bearer <redacted str>".
        return format(str.__str__(self), format_spec)

    def __reduce__(self) -> tuple[type[RedactedStr], tuple[str]]:
        # The old pickle protocols, 0 and 1, would ask `__str__` too.
        return type(self), (str.__str__(self),)


REDACTED: Final[dict[type[Any], type[Any]]] = {
    dict: RedactedDict,
    list: RedactedList,
    str: RedactedStr,
}


def redact(value: Any) -> Any:
    """Return `value` as its redacted counterpart, if it has one."""
    wrapper = REDACTED.get(type(value))
    return value if wrapper is None else wrapper(value)
