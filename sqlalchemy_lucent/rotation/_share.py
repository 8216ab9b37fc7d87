"""Give ranges to an executor, and each to it again while its worker dies or the fault passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from typing import Final

from ..exceptions import LucentError, RotationError
from ._ranges import KeyRange
from ._task import Outcome

RANGE_ATTEMPTS: Final = 4
"""Attempts at a range that get nowhere, before the caller takes it over. When a process of a
pool dies, every range that the pool had counts one."""


@dataclass(frozen=True)
class Piece:
    """A range that is not done."""

    range: KeyRange
    attempts: int = 0
    fault: str = ""
    """What ended the last attempt."""


def check_executor(executor: object) -> None:
    """Refuse what is neither an executor nor may make one.

    :raises RotationError: it is neither.
    """
    if not isinstance(executor, Executor) and not callable(executor):
        raise _no_executor(executor)


def _no_executor(given: object) -> RotationError:
    return RotationError(
        "executor= is a concurrent.futures.Executor or a function that returns one; "
        f"this is of type {type(given).__name__}"
    )


class Sharing:
    """The executor of a run.

    :param executor: an executor, or a function that makes one: then one that broke is replaced,
        and the last one is shut down by :meth:`close`.
    :param work: is called by the workers with what `dump` returns.
    :raises RotationError: `executor` is neither.
    """

    def __init__(
        self, executor: Executor | Callable[[], Executor], work: Callable[[bytes], Outcome]
    ) -> None:
        self._make: Callable[[], Executor] | None = None
        if not isinstance(executor, Executor) and callable(executor):
            self._make = executor
            executor = executor()
        if not isinstance(executor, Executor):
            raise _no_executor(executor)
        self._executor = executor
        self._work = work

    def close(self) -> None:
        """End the executor, if it is not the caller's."""
        if self._make is not None:
            self._executor.shutdown()

    def over(
        self,
        ranges: Iterable[KeyRange],
        dump: Callable[[KeyRange], bytes],
        took: Callable[[Outcome], bool],
    ) -> list[Piece]:
        """Have `ranges` worked on; return those that no worker finished.

        :param took: is told each outcome, and says whether to go on. If not, ranges that wait are
            cancelled, and those at work come to the end of their turn.
        :raises LucentError: a worker raised it; the others were ended as above.
        """
        left: list[Piece] = []
        running: dict[Future[Outcome], Piece] = {}

        def submit(piece: Piece) -> None:
            future = None
            if piece.attempts < RANGE_ATTEMPTS:
                future = self._submit(dump(piece.range))
            if future is None:
                left.append(piece)
            else:
                running[future] = piece

        goes_on = True
        try:
            for range_ in ranges:
                submit(Piece(range_))
            while running and goes_on:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    piece = running.pop(future)
                    outcome = _outcome(future)
                    if isinstance(outcome, str):
                        submit(Piece(piece.range, piece.attempts + 1, outcome))
                        continue
                    goes_on = took(outcome) and goes_on
                    if outcome.fault is not None:
                        submit(Piece(piece.range, piece.attempts + 1, outcome.fault.said))
                    elif outcome.rest is not None:
                        submit(Piece(outcome.rest))
        finally:
            # Also when the caller is interrupted: nothing is at work for it when it has ended.
            at_work = [future for future in running if not future.cancel()]
            wait(at_work)
        for future in at_work:
            outcome = _outcome(future)
            if isinstance(outcome, Outcome):
                took(outcome)
        return left if goes_on else []

    def _submit(self, payload: bytes) -> Future[Outcome] | None:
        """Submit a range; return ``None`` if the executor is broken and cannot be replaced.

        :raises RotationError: the executor was shut down.
        """
        fault = ""
        for renewed in (False, True):
            try:
                return self._executor.submit(self._work, payload)
            except BrokenExecutor:
                if self._make is None or renewed:
                    return None
                self._executor.shutdown(wait=False)
                self._executor = self._make()
            except RuntimeError as error:
                fault = str(error)
                break
        raise RotationError(f"the executor takes no ranges: {fault}")


def _outcome(future: Future[Outcome]) -> Outcome | str:
    """Return what a range came to, or what became of its worker.

    :raises LucentError: the worker raised it. Nothing else is raised by a worker itself, so any
        other exception says that the worker is gone, in the words of its executor.
    """
    if future.cancelled():
        return "CancelledError"
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, LucentError):
        raise error
    return type(error).__name__
