"""How large a batch is, and how long to wait after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_FIRST_BATCH: Final = 100
"""Rows of a table's first batch at most: nothing is known yet of how large its values are."""

BATCH_BYTES: Final = 16 << 20
"""Bytes of values that a batch aims at: they are held in memory, some copies of each."""

_REST_AFTER: Final = 1.0
"""Seconds of work after which a rotation lets others write, on a database with one writer."""

_REST: Final = 0.12
"""Seconds of that rest. Who waits for SQLite's lock looks again every 100 ms
(``sqliteDefaultBusyCallback``), and would else find it taken until it gives up."""

_LARGEST_BATCH: Final = 50_000
"""Rows up to which a batch time may let batches grow."""


class Throttle:
    """The throttle of a rotation.

    :param batch_size: rows per batch; where it begins, if there is a batch time.
    :param batch_time: seconds that a batch should take; its size follows.
    :param max_rate: rows per second at most.
    :param pause: seconds to wait after each batch.
    :param sleep: waits so many seconds.
    :param has_one_writer: whether others cannot write while a batch does.
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
        """Forget how large the values are."""
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
            # A batch that something else kept small says nothing about larger ones.
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
