"""How large a batch is, and how long to wait after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_FIRST_BATCH: Final = 100
"""Rows of a table's first batch at most, while the size of its values is unknown."""

BATCH_BYTES: Final = 16 << 20
"""Bytes of values in a batch at most. Memory holds several copies of each."""

_REST_AFTER: Final = 1.0
"""Seconds of work before a rest, on a database with one writer."""

_REST: Final = 0.12
"""Seconds of that rest. A connection that waits for SQLite's lock tries again every 100 ms
(``sqliteDefaultBusyCallback``). Without a rest, it would give up."""

_LARGEST_BATCH: Final = 50_000
"""Rows of a batch at most, if its size follows from a batch time."""


class Throttle:
    """Sets the size of batches, and waits between them. Most parameters are those of `rotate()`.

    :param has_one_writer: whether nobody else can write while a batch does.
    """

    def __init__(
        self,
        batch_size: int,
        batch_time: float | None,
        max_rate: float | None,
        pause: float,
        sleep: Callable[[float], object],
        *,
        has_one_writer: bool = False,
    ) -> None:
        self._has_one_writer = has_one_writer
        self._worked = 0.0
        self._batch_time = batch_time
        self._max_rate = max_rate
        self._pause = pause
        self._sleep = sleep
        self._rows: float = batch_size
        self._most = _FIRST_BATCH

    def begin_table(self) -> None:
        """Forget the size of values."""
        self._most = _FIRST_BATCH

    @property
    def limit(self) -> int:
        """Rows of the next batch."""
        rows = min(self._rows, self._most)
        if self._max_rate is not None:
            rows = min(rows, self._max_rate)  # not more than a second's worth at once
        return max(1, int(rows))

    def after(self, rows: int, size: int, seconds: float) -> None:
        """Adapt to a batch of `rows` rows and `size` bytes that took `seconds`, and wait."""
        if self._batch_time is not None and rows:
            factor = min(max(self._batch_time / max(seconds, 1e-6), 0.5), 2.0)
            # A batch that something else kept small tells nothing about larger ones.
            if factor < 1 or rows >= int(self._rows):
                self._rows = min(max(rows * factor, 1), _LARGEST_BATCH)
        self._most = max(1, BATCH_BYTES * rows // max(size, 1))
        wait = self._pause
        if self._max_rate is not None:
            wait = max(wait, rows / self._max_rate - seconds)
        self._worked = 0.0 if wait >= _REST else self._worked + seconds
        if self._has_one_writer and self._worked >= _REST_AFTER:
            self._worked = 0.0
            wait = _REST
        if wait > 0:
            self._sleep(wait)
