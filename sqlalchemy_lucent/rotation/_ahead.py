"""Read ahead: two connections take turns, and one reads a batch while the other writes its own.

Each does whole batches, as another rotator would, so every promise about a batch holds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from .._database.connection import ManagedConnection
from .jobs import Batch
from .rows import PrimaryKey

PassOn = Callable[[PrimaryKey | None], object]
"""Called when a batch has been read, with the key that the next one begins after."""


@dataclass
class _Turn:
    after: PrimaryKey
    batch: Batch | None = None


class ReadAhead:
    """Does batches after a primary key, until the table ends or a fault occurs.

    :param do_batch: does the batch after a key on one of the connections, and passes the turn on.
    :param account: called with each batch, in order, in the thread of :meth:`run`. A true result
        ends the run.
    """

    def __init__(
        self,
        after: PrimaryKey,
        do_batch: Callable[[ManagedConnection, PrimaryKey, PassOn], Batch],
        account: Callable[[Batch], object],
    ) -> None:
        self.after: PrimaryKey | None = after
        """The key to go on after. After a fault, the batch with the fault is done again."""
        self._do_batch = do_batch
        self._account = account
        self._next: SimpleQueue[_Turn | None] = SimpleQueue()
        self._taken: deque[_Turn] = deque()  # those not accounted for
        self._pass_on(after)

    def run(self, own: ManagedConnection, spare: ManagedConnection) -> int:
        """Do the batches; return how many values were written behind a fault."""
        helper = threading.Thread(target=self._take_turns, args=(spare,), daemon=True)
        helper.start()
        try:
            self._take_turns(own, self._account_in_order)
        finally:
            helper.join()
        self._account_in_order()
        return sum(turn.batch.written for turn in self._taken if turn.batch is not None)

    def _take_turns(
        self, database: ManagedConnection, at_turn: Callable[[], object] = lambda: None
    ) -> None:
        try:
            while (turn := self._next.get()) is not None:
                self._taken.append(turn)
                if at_turn():  # while this turn is held, no other batch begins
                    return
                try:
                    turn.batch = self._do_batch(database, turn.after, self._pass_on)
                except Exception:  # noqa: BLE001  (the run does this batch again)
                    return
        finally:
            self._pass_on(None)

    def _account_in_order(self) -> bool:
        ends = False
        while self._taken and (batch := self._taken[0].batch) is not None:
            self._taken.popleft()
            self.after = batch.next_after
            ends = bool(self._account(batch))
        if self._taken:
            self.after = self._taken[0].after
        return ends

    def _pass_on(self, after: PrimaryKey | None) -> None:
        self._next.put(None if after is None else _Turn(after))
