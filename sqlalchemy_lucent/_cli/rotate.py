"""``lucent rotate``: progress on the terminal, Ctrl-C, and processes that share the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Final, Self

from rich.progress import BarColumn, Progress, TextColumn
from sqlalchemy import Engine

from ..exceptions import RotationError
from ..rotation import (
    FailedRow,
    RotationProgress,
    RotationReport,
    StatusReport,
    VerifyReport,
    rotate,
)
from ..rotation.targets import Target
from .database import URL_VARIABLE, engine_of, find_url, load_targets
from .terminal import (
    CommandError,
    Exit,
    console,
    counted,
    printable,
    tell,
    wrapped,
    write,
    write_json,
    write_rows,
)

_SECONDS_BETWEEN_LINES: Final = 10.0  # where there is no terminal to draw a bar on
_SECONDS_BETWEEN_FRAMES: Final = 0.1

_FAILURES_SHOWN: Final = 20
"""Failures that are listed for people; ``--json`` has the first 1,000."""

_REASONS: Final = {
    "NotSealedError": "not sealed",
    "UnknownKeyVersionError": "the keyring lacks the version",
    "WrongKeyError": "another key of that version",
    "TamperedError": "bytes, row or column changed",
    "ConfigurationError": "its row cannot be bound",
}


def run_rotation(
    engine: Engine,
    targets: Sequence[Target],
    *,
    workers: int,
    metadata: Sequence[str] | None,
    max_rate: float | None,
    as_json: bool,
    **options: Any,
) -> Exit:
    """Rotate, show how it goes and what came of it, and return the exit code."""
    pools = None
    if workers > 1:
        pools = _Pools(workers, metadata)
        options |= _shared(engine, pools, max_rate)
    shares = pools is not None and engine.dialect.name != "sqlite"
    interrupt, shown = Interrupt(shares=shares), ShownProgress()
    fault = report = None
    try:
        with interrupt, shown:
            report = rotate(
                engine,
                targets,
                on_progress=shown.update,
                stop_when=lambda _: interrupt.asked,
                max_rate=max_rate,
                **options,
            )
    except KeyboardInterrupt:
        interrupt.asked = True
    except RotationError as error:
        fault = error
    if pools is not None and pools.made > 1:
        tell(
            "a worker died, and the workers were replaced: what they had in hand was done again, "
            "and what they had committed of it is not counted"
        )
    if report is None:
        # Nothing was left in the middle: a batch is committed as a whole, or not at all.
        if interrupt.asked:
            stands = shown.where_it_stands(shares=shares, dry_run=bool(options.get("dry_run")))
            raise CommandError(f"interrupted; {stands}", Exit.INTERRUPTED)
        raise CommandError(str(fault), Exit.LEFT)
    if as_json:
        write_json(report.as_dict())
    else:
        _write_report(report)
    if interrupt.asked and not report.ok:
        raise CommandError("interrupted; run it again to go on", Exit.INTERRUPTED)
    return Exit.DONE if report.ok else Exit.LEFT


def _write_report(report: RotationReport) -> None:
    done = "would be re-encrypted; nothing was written" if report.dry_run else "re-encrypted"
    write(
        wrapped(f"{counted(report.rotated, 'value')} {done}; the primary is {report.key_version}")
        + "\n"
    )
    write_failures(report.failed, report.failed_count)
    other = report.remaining - report.failed_count
    if other > 0:
        left = f"{counted(other, 'value')} left under another key"
        if not report.stopped:
            left += ": a process still seals under it, or holds rows locked; run it again"
        write(wrapped(left) + "\n")
    tell_left_out(report)


def tell_left_out(report: RotationReport | StatusReport | VerifyReport) -> None:
    """Say what was not looked at."""
    if report.left_out:
        tell(f"left out, as they are no tables: {', '.join(map(printable, report.left_out))}")


def write_failures(failed: Sequence[FailedRow], count: int) -> None:
    """Write which values did not open."""
    if not count:
        return
    is_usual = all(row.error in _REASONS for row in failed)
    fault = "did not open" if is_usual else "did not open or were refused by the database"
    write(wrapped(f"{counted(count, 'value')} {fault}, left unchanged:") + "\n")
    write_rows(
        ("column", "primary key", "version", "fingerprint", "reason"),
        [
            (f"{row.table}.{row.column}", ", ".join(map(str, row.primary_key)), *_why(row))
            for row in failed[:_FAILURES_SHOWN]
        ],
    )
    if count <= _FAILURES_SHOWN:
        return
    write(wrapped(f"and {count - _FAILURES_SHOWN} more; --json names up to 1,000") + "\n")
    reasons = Counter((f"{row.table}.{row.column}", *_why(row)) for row in failed)
    write("by reason:\n" if len(failed) == count else f"the first {len(failed):,} by reason:\n")
    write_rows(
        ("column", "version", "fingerprint", "reason", "values"),
        [(*reason, number) for reason, number in reasons.most_common()],
    )


def _why(row: FailedRow) -> tuple[str, str, str]:
    """Return the key version and fingerprint of a value that did not open, and the reason."""
    return (
        row.key_version or "-",
        row.fingerprint or "-",
        _REASONS.get(row.error, row.error),
    )


class Interrupt:
    """Ctrl-C: the first one ends the run after the batch in hand, the second one at once.

    :param shares: whether workers have batches in hand, which they finish in any case.
    """

    def __init__(self, *, shares: bool) -> None:
        self.asked = False
        self._answer = (
            b"the workers finish what they have in hand; Ctrl-C again leaves the count out"
            if shares
            else b"finishing the batch in hand; Ctrl-C again rolls it back"
        )

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not by the stream, which may be writing just now.
        os.write(2, b"\n" + self._answer + b"\n")


class ShownProgress:
    """A progress bar on a terminal, elsewhere a line every ten seconds; on standard error."""

    def __init__(self) -> None:
        self._last: RotationProgress | None = None
        self._shown = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            if self._last is not None:
                self._draw(self._bar, self._last)
            self._bar.stop()

    def update(self, progress: RotationProgress) -> None:
        """Show where the run stands, if it is time to."""
        self._last = progress
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = _bar()
                self._draw(self._bar, progress)
                self._bar.start()
            elif self._is_due(_SECONDS_BETWEEN_FRAMES):
                self._draw(self._bar, progress)
        elif self._is_due(_SECONDS_BETWEEN_LINES):
            tell(self._line(progress))

    def _is_due(self, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._shown < seconds:
            return False
        self._shown = now
        return True

    @staticmethod
    def _draw(bar: Progress, progress: RotationProgress) -> None:
        done = progress.rotated + progress.failed
        bar.update(
            bar.task_ids[0],
            completed=done,
            total=max(progress.total, done),
            rate=f"{progress.rate:,.0f}/s",
            left=_time_left(progress),
            refresh=True,
        )

    def where_it_stands(self, *, shares: bool, dry_run: bool) -> str:
        """Say what is committed. Of workers, that is known of the ranges that they handed back."""
        rotated, total = (self._last.rotated, self._last.total) if self._last else (0, 0)
        of = f" of {total}" if total else ""
        if dry_run:
            return f"{rotated}{of} values would be re-encrypted so far; nothing was written"
        known = f"{rotated}{of} values were re-encrypted and are committed"
        if shares:
            return (
                f"at least {known}, and the workers finish the batches that they have in hand: "
                "lucent status counts; run it again to go on"
            )
        return f"{known}, the batch in hand was rolled back; run it again to go on"

    @staticmethod
    def _line(progress: RotationProgress) -> str:
        return (
            f"{progress.rotated} of {progress.total} values, {progress.rate:.0f} a second, "
            f"{_time_left(progress)} left, in {progress.table}"
        )


def _bar() -> Progress:
    bar = Progress(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        console=console(sys.stderr),
        # Drawn when a batch is done: no thread of its own.
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )
    bar.add_task("", rate="", left="")
    return bar


def _time_left(progress: RotationProgress) -> str:
    if progress.seconds_left is None:
        return "-:--:--"
    return str(timedelta(seconds=round(progress.seconds_left)))


# -- workers ---------------------------------------------------------------------------------------


def _shared(engine: Engine, pools: _Pools, max_rate: float | None) -> dict[str, Any]:
    """Return the options of a rotation whose work processes share."""
    if max_rate is not None and max_rate < pools.workers:
        raise CommandError("--max-rate is 1 or more for each of the --workers")
    # Like their keys, they find the URL in their environment: nothing secret is sent to them.
    os.environ[URL_VARIABLE] = engine.url.render_as_string(hide_password=False)
    return {
        "executor": pools,
        "connect": connect_worker,
        # The rate is shared among the ranges.
        "ranges": None if max_rate is None else pools.workers,
    }


def connect_worker() -> Engine:
    """Return the engine of a worker process."""
    return engine_of(find_url(None))


class _Pools:
    """Makes executors of `workers` processes: one, and another when a process of it died."""

    def __init__(self, workers: int, metadata: Sequence[str] | None) -> None:
        self.workers = workers
        self.made = 0
        self._metadata = metadata

    def __call__(self) -> Executor:
        self.made += 1
        pool = ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            # An application's modules, because one of them may set the keyring.
            initializer=load_targets,
            initargs=(self._metadata,),
        )
        # Ctrl-C in a terminal goes to every process. They inherit that it is ignored, from their
        # first moment on: what it means is decided here.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(self.workers):
                pool.submit(os.getpid)
        finally:
            signal.signal(signal.SIGINT, previous)
        return pool
