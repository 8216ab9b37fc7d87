"""Open and re-seal the values of one sealed column, in rows that were read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Row

from .._envelope import LONGEST_PREFIX, as_bytes
from .._row import encode_row
from ..exceptions import DecryptionError, LucentError
from ..keyring import Keyring
from .targets import TargetColumn

Change = tuple[bytes | None, Any]
"""The first bytes of the old value (``None`` for NULL), and the new value."""


class Changed:
    """What became of one column of some rows: the numbers of the changed rows, and their values.

    These are lists of bytes, not one object per row. The garbage collector would look into every
    object, which costs as much as the rest of the bookkeeping.
    """

    __slots__ = ("failed", "new", "numbers", "old")

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.old: list[bytes | None] = []
        self.new: list[Any] = []
        self.failed: list[tuple[int, LucentError]] = []

    def only(self, numbers: Sequence[int]) -> tuple[list[bytes | None], list[Any]]:
        """Return the old and new values of the rows with these numbers."""
        if len(numbers) == len(self.numbers):
            return self.old, self.new
        place = {number: place for place, number in enumerate(self.numbers)}
        old = [self.old[place[number]] for number in numbers]
        return old, [self.new[place[number]] for number in numbers]


def change_each(
    rows: Sequence[Row[Any]], change: Callable[[Sequence[Any]], Change | None]
) -> Changed:
    """Change one column, row by row.

    :param change: returns the change in a row, if it has one, or raises a :class:`LucentError`.
    """
    changed = Changed()
    for number, row in enumerate(rows):
        try:
            pair = change(row)
        except LucentError as error:
            changed.failed.append((number, error))
            continue
        if pair is not None:
            changed.numbers.append(number)
            changed.old.append(pair[0])
            changed.new.append(pair[1])
    return changed


class SealedColumn:
    """Opens and re-seals the values of one column.

    :param names: what is read of a row, by name.
    """

    def __init__(self, target: TargetColumn, keyring: Keyring, names: Sequence[str]) -> None:
        contexts = target.type.contexts
        keys = keyring.for_context(*contexts)
        self.name = target.name
        self.header = keys.primary.header
        self._bound_to = target.type.bound_to
        self._positions = [names.index(name) for name in target.bound_to]
        self._position = names.index(target.name)
        self._seal = keys.seal
        self._open = keys.open
        self._open_in_own_context = keyring.for_context(contexts[0]).open

    def value(self, row: Sequence[Any]) -> bytes | None:
        """Return the stored bytes."""
        value = row[self._position]
        return value if value is None or type(value) is bytes else as_bytes(value)

    def row_context(self, row: Sequence[Any]) -> bytes:
        """Return the context that `row` gives its value."""
        if not self._positions:
            return b""
        return encode_row([row[position] for position in self._positions], self._bound_to)

    def open(self, row: Sequence[Any]) -> bytes | None:
        """Return the plaintext, or ``None``; raise a `DecryptionError` if it does not open."""
        value = self.value(row)
        return None if value is None else self._open(value, self.row_context(row))

    def seal(self, document: bytes, row: Sequence[Any]) -> bytes:
        """Return what to store for a new document."""
        return self._seal(document, self.row_context(row))

    def is_stale(self, row: Sequence[Any]) -> bool:
        """Say whether there is a value that is not under the primary key."""
        value = self.value(row)
        return value is not None and not value.startswith(self.header)

    def reseal(self, rows: Sequence[Row[Any]]) -> Changed:
        """Seal the values of `rows` under the primary key, except those that already are."""
        changed = Changed()
        # A loop of its own: a function called for each row would cost a tenth of all the work.
        position, header, open_, seal = self._position, self.header, self._open, self._seal
        row_context = self.row_context if self._positions else None
        numbers, old, new = changed.numbers, changed.old, changed.new
        for number, row in enumerate(rows):
            value = row[position]
            if type(value) is not bytes:
                if value is None:
                    continue
                value = as_bytes(value)
            if value.startswith(header):
                continue
            try:
                context = b"" if row_context is None else row_context(row)
                new.append(seal(open_(value, context), context))
            except LucentError as error:
                changed.failed.append((number, error))
                continue
            numbers.append(number)
            old.append(value[:LONGEST_PREFIX])
        return changed

    def rebind(self, rows: Sequence[Row[Any]]) -> Changed:
        """Seal the values of `rows` in the first context, except those that already are."""
        return change_each(rows, self._rebind)

    def _rebind(self, row: Sequence[Any]) -> Change | None:
        value = self.value(row)
        if value is None:
            return None
        context = self.row_context(row)
        try:
            self._open_in_own_context(value, context)
        except DecryptionError:
            return value[:LONGEST_PREFIX], self._seal(self._open(value, context), context)
        return None
