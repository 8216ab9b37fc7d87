"""``lucent rotate``: progress on the terminal, Ctrl-C, and processes that share the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection as Channel
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from types import FrameType, TracebackType
from typing import Any, Final, Self, cast

from rich.progress import BarColumn, Progress, TextColumn
from sqlalchemy import Engine

from ..exceptions import LucentError, RotationError
from ..rotation import (
    FailedRow,
    RotationProgress,
    RotationReport,
    StatusReport,
    VerifyReport,
    rotate,
)
from .database import URL_VARIABLE, Selection, connected
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
    selection: Selection,
    *,
    workers: int,
    max_rate: float | None,
    as_json: bool,
    **options: Any,
) -> Exit:
    """Rotate, show how it goes and what came of it, and return the exit code."""
    if engine.dialect.name == "sqlite" or options.get("dry_run"):
        workers = 1  # one writer at a time; nothing to lock
    if max_rate is not None and max_rate < workers:
        raise CommandError("--max-rate is 1 or more for each of the --workers")
    interrupt, shown = Interrupt(workers), ShownProgress()
    fault = report = None
    try:
        with interrupt, shown:
            if workers > 1:
                rate = None if max_rate is None else max_rate / workers
                rotators = Rotators(workers, engine, selection, {"max_rate": rate, **options})
                rotators.run(shown, interrupt)
            # After workers, this finds what one that died has left, and counts.
            report = rotate(
                engine,
                selection.targets(),
                on_progress=shown.update,
                stop_when=lambda _: interrupt.asked,
                max_rate=max_rate,
                **options,
            )
    except KeyboardInterrupt:
        interrupt.asked = True
    except RotationError as error:
        fault = error
    if report is None:
        # Each batch is committed as a whole, or not at all.
        if interrupt.asked:
            stands = shown.where_it_stands(dry_run=bool(options.get("dry_run")))
            raise CommandError(f"interrupted; {stands}", Exit.INTERRUPTED)
        raise CommandError(str(fault), Exit.LEFT)
    report = replace(report, rotated=report.rotated + shown.by_workers)
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
    """Ctrl-C: the first one ends the run after the current batches, the second one at once."""

    def __init__(self, workers: int) -> None:
        self.asked = False
        batches = b"the current batches" if workers > 1 else b"the current batch"
        self._answer = b"finishing " + batches + b"; Ctrl-C again rolls back"

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

    by_workers = 0
    """Values that workers which have ended re-encrypted; added to what is shown."""

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
        if self.by_workers:
            progress = replace(
                progress,
                rotated=progress.rotated + self.by_workers,
                total=progress.total + self.by_workers,
            )
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

    def where_it_stands(self, *, dry_run: bool) -> str:
        """Say what is committed."""
        rotated, total = (self._last.rotated, self._last.total) if self._last else (0, 0)
        of = f" of {total}" if total else ""
        if dry_run:
            return f"{rotated}{of} values would be re-encrypted so far; nothing was written"
        return (
            f"at least {rotated}{of} values were re-encrypted and are committed; the current "
            "batch was rolled back; run it again to go on"
        )

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


class Rotators:
    """Processes that each rotate as one would alone: they share the rows by skipping locked ones.

    Keys and the URL reach them by the environment, so that no pipe or command line has them.
    """

    def __init__(
        self, count: int, engine: Engine, selection: Selection, options: dict[str, Any]
    ) -> None:
        os.environ[URL_VARIABLE] = engine.url.render_as_string(hide_password=False)
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._channels: list[Channel[Any, Any]] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rotate_in_worker, args=(theirs, self._stop, selection, options), daemon=True
            )
            # Ctrl-C in a terminal goes to every process. They inherit that it is ignored, from
            # their first moment on: this process decides what it means.
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                process.start()
            finally:
                signal.signal(signal.SIGINT, previous)
            theirs.close()
            self._channels.append(ours)
            self._processes.append(process)

    def run(self, shown: ShownProgress, interrupt: Interrupt) -> None:
        """Wait for all of them, and show their progress as one."""
        latest: dict[Channel[Any, Any], RotationProgress] = {}
        open_channels = set(self._channels)
        try:
            while open_channels:
                ready = wait(list(open_channels), timeout=_SECONDS_BETWEEN_FRAMES)
                for channel in cast("list[Channel[Any, Any]]", ready):
                    try:
                        message = channel.recv()
                    except EOFError:
                        open_channels.discard(channel)
                        continue
                    if isinstance(message, str):
                        tell(f"a worker ended: {message}")
                        continue
                    latest[channel] = message
                    shown.update(_together(list(latest.values())))
                if interrupt.asked:
                    self._stop.set()
            for process in self._processes:
                process.join()
        finally:
            # At once, after a second Ctrl-C: the database rolls their batches back.
            for process in self._processes:
                process.terminate()
        shown.by_workers = sum(progress.rotated for progress in latest.values())
        if any(process.exitcode for process in self._processes):
            tell(
                "a worker died; this process re-encrypts what it left, and does not count the rest"
            )


def _rotate_in_worker(
    channel: Channel[Any, Any], stop: Event, selection: Selection, options: dict[str, Any]
) -> None:
    try:
        targets = selection.targets()
        with connected(None) as engine:
            rotate(
                engine,
                targets,
                on_progress=channel.send,
                stop_when=lambda _: stop.is_set(),
                **options,
            )
    except (LucentError, CommandError) as error:
        channel.send(str(error))
    except OSError:
        pass  # nobody reads the progress any more


def _together(latest: Sequence[RotationProgress]) -> RotationProgress:
    rotated = sum(progress.rotated for progress in latest)
    failed = max(progress.failed for progress in latest)
    total = max(rotated, *(progress.total for progress in latest))
    rate = sum(progress.rate for progress in latest)
    left = max(total - rotated - failed, 0)
    table = latest[-1].table
    return RotationProgress(table, rotated, failed, total, rate, left / rate if rate else None)
