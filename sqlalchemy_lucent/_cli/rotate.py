"""``lucent rotate``: progress on the terminal, Ctrl-C, and several rotators at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection as Channel
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Final, cast

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
from .database import URL_VARIABLE, Selection, connected
from .errors import CommandError, Exit, explain
from .terminal import console, counted, printable, say, tell, write, write_json, write_rows

_SECONDS_BETWEEN_LINES: Final = 10.0  # without a terminal to draw a bar on
_SECONDS_BETWEEN_FRAMES: Final = 0.1

_FAILURES_SHOWN: Final = 20
"""Failures listed for people; ``--json`` has the first 1,000."""

_REASONS: Final = {
    "NotSealedError": "not sealed",
    "UnknownKeyVersionError": "the keyring lacks the version",
    "WrongKeyError": "another key of that version",
    "TamperedError": "bytes, row or column changed",
    "ConfigurationError": "its row cannot be bound",
}
_UNCHANGED: Final = {
    "RotationError": "its key does not find its row, or a trigger or rule left it",
}


def run_rotation(
    engine: Engine,
    selection: Selection,
    *,
    workers: int,
    max_rate: float | None,
    as_json: bool,
    dry_run: bool,
    **options: Any,
) -> Exit:
    """Rotate, show progress and the report, and return the exit code."""
    if engine.dialect.name == "sqlite" or dry_run:
        workers = 1  # one writer at a time; nothing to lock
    if max_rate is not None and max_rate < workers:
        raise CommandError("--max-rate must be at least 1 for each of the --workers")
    shown, by_workers, report = ShownProgress(), 0, None
    with interruptible(workers) as interrupt, shown.drawing():
        try:
            if workers > 1:
                share = {**options, "max_rate": max_rate and max_rate / workers}
                by_workers = Rotators(workers, engine, selection, share).run(shown, interrupt)
            # After workers, this re-encrypts what a dead one left, and counts.
            report = rotate(
                engine,
                selection.targets(),
                on_progress=lambda progress: shown.update(_plus(progress, by_workers)),
                stop_when=lambda _: interrupt.asked,
                max_rate=max_rate,
                dry_run=dry_run,
                **options,
            )
        except KeyboardInterrupt:
            interrupt.asked = True
        except RotationError as error:
            if not interrupt.asked:
                raise CommandError(str(error), Exit.LEFT) from None
    if report is None:
        raise CommandError(f"interrupted; {shown.standing(dry_run=dry_run)}", Exit.INTERRUPTED)
    report = replace(report, rotated=report.rotated + by_workers)
    if as_json:
        write_json(report.as_dict())
    else:
        _write_report(report)
    if interrupt.asked and not report.ok:
        raise CommandError("interrupted; run it again to go on", Exit.INTERRUPTED)
    return Exit.DONE if report.ok else Exit.LEFT


# -- the report ------------------------------------------------------------------------------------


def _write_report(report: RotationReport) -> None:
    done = "would be re-encrypted; nothing was written" if report.dry_run else "re-encrypted"
    say(f"{counted(report.rotated, 'value')} {done}; the primary is {report.key_version}")
    write_failures(report.failed, report.failed_count)
    other = report.remaining - report.failed_count
    if other > 0:
        left = f"{counted(other, 'value')} left under another key"
        if not report.stopped:
            left += ": a process still seals under it, or holds rows locked; run it again"
        say(left)
    tell_left_out(report)


def tell_left_out(report: RotationReport | StatusReport | VerifyReport) -> None:
    """Name the targets that were skipped."""
    if report.left_out:
        tell(f"left out, because they are not tables: {', '.join(map(printable, report.left_out))}")


def write_failures(failed: Sequence[FailedRow], count: int) -> None:
    """Write which values did not open."""
    if not count:
        return
    opened = all(row.error in _REASONS for row in failed)
    fault = "did not open" if opened else "did not open or were refused by the database"
    say(f"{counted(count, 'value')} {fault}, left unchanged:")
    shown = [
        (f"{row.table}.{row.column}", ", ".join(map(str, row.primary_key)), *_why(row))
        for row in failed[:_FAILURES_SHOWN]
    ]
    write_rows(("column", "primary key", "version", "fingerprint", "reason"), shown)
    if count <= _FAILURES_SHOWN:
        return
    say(f"and {count - _FAILURES_SHOWN} more; --json names up to 1,000")
    reasons = Counter((f"{row.table}.{row.column}", *_why(row)) for row in failed)
    write("by reason:\n" if len(failed) == count else f"the first {len(failed):,} by reason:\n")
    rows = [(*reason, number) for reason, number in reasons.most_common()]
    write_rows(("column", "version", "fingerprint", "reason", "values"), rows)


def _why(row: FailedRow) -> tuple[str, str, str]:
    """Return the key version and fingerprint of a value that did not open, and the reason."""
    reason = (_REASONS | _UNCHANGED).get(row.error, row.error)
    return row.key_version or "-", row.fingerprint or "-", reason


# -- progress --------------------------------------------------------------------------------------


class Interrupt:
    """Whether Ctrl-C was pressed. The second one raises ``KeyboardInterrupt``."""

    def __init__(self, answer: bytes) -> None:
        self.asked = False
        self._answer = answer

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, self._answer)  # not through the stream, which may be writing right now


@contextmanager
def interruptible(workers: int) -> Iterator[Interrupt]:
    """Let the first Ctrl-C end the run after the current batch, and the second one at once."""
    batches = b"the current batches" if workers > 1 else b"the current batch"
    interrupt = Interrupt(b"\nfinishing " + batches + b"; Ctrl-C again rolls back\n")
    previous = signal.signal(signal.SIGINT, interrupt.on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


class ShownProgress:
    """A bar on a terminal, elsewhere a line every ten seconds; on standard error."""

    def __init__(self) -> None:
        self._last: RotationProgress | None = None
        self._shown = time.monotonic()
        self._bar: Progress | None = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Leave the terminal with the last state drawn."""
        try:
            yield
        finally:
            if self._bar is not None and self._last is not None:
                self._draw(self._bar, self._last)
                self._bar.stop()

    def update(self, progress: RotationProgress) -> None:
        """Show `progress` if it is time to."""
        self._last = progress
        if not sys.stderr.isatty():
            if self._is_due(_SECONDS_BETWEEN_LINES):
                tell(
                    f"{progress.rotated} of {progress.total} values, {progress.rate:.0f} a second, "
                    f"{_time_left(progress)} left, in {progress.table}"
                )
        elif self._bar is None:
            self._bar = _bar()
            self._draw(self._bar, progress)
            self._bar.start()
        elif self._is_due(_SECONDS_BETWEEN_FRAMES):
            self._draw(self._bar, progress)

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

    def standing(self, *, dry_run: bool) -> str:
        """Say what is committed. Each batch is committed whole or not at all."""
        rotated, total = (self._last.rotated, self._last.total) if self._last else (0, 0)
        of = f" of {total}" if total else ""
        if dry_run:
            return f"{rotated}{of} values would be re-encrypted so far; nothing was written"
        return (
            f"at least {rotated}{of} values were re-encrypted and are committed; the current "
            "batch was rolled back; run it again to go on"
        )


def _bar() -> Progress:
    bar = Progress(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        console=console(sys.stderr),
        auto_refresh=False,  # drawn after each batch, without a thread
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


def _plus(progress: RotationProgress, by_workers: int) -> RotationProgress:
    """Add the values that workers re-encrypted before."""
    done, total = progress.rotated + by_workers, progress.total + by_workers
    return replace(progress, rotated=done, total=total)


# -- workers ---------------------------------------------------------------------------------------


class Rotators:
    """Processes that each call plain ``rotate()`` and skip the rows that another has locked.

    They take keys and the URL from the environment, so no pipe or command line carries them.
    """

    def __init__(
        self, count: int, engine: Engine, selection: Selection, options: dict[str, Any]
    ) -> None:
        os.environ[URL_VARIABLE] = engine.url.render_as_string(hide_password=False)
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Channel[Any, Any], BaseProcess] = {}
        # A terminal sends Ctrl-C to every process. Workers inherit that they ignore it: this
        # process decides what it means.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                arguments = theirs, selection, options
                process = context.Process(target=_rotate_in_worker, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process
        finally:
            signal.signal(signal.SIGINT, previous)

    def run(self, shown: ShownProgress, interrupt: Interrupt) -> int:
        """Show their progress as one until all have ended; return the values re-encrypted."""
        latest: dict[Channel[Any, Any], RotationProgress] = {}
        running, asked = set(self._processes), False
        try:
            while running:
                ready = wait(list(running), timeout=_SECONDS_BETWEEN_FRAMES)
                for channel in cast("list[Channel[Any, Any]]", ready):
                    try:
                        message = channel.recv()
                    except (EOFError, OSError):
                        running.discard(channel)
                        _tell_how_it_ended(self._processes[channel])
                        continue
                    if isinstance(message, str):
                        tell(f"a worker stopped: {printable(message)}")
                        continue
                    latest[channel] = message
                    shown.update(_together(list(latest.values())))
                if interrupt.asked and not asked:
                    asked = True
                    for channel in running:
                        with suppress(OSError):  # it has just ended
                            channel.send(None)
        finally:
            # After a second Ctrl-C, at once: the database rolls their batches back.
            for process in self._processes.values():
                process.terminate()
        return sum(progress.rotated for progress in latest.values())


def _tell_how_it_ended(process: BaseProcess) -> None:
    process.join()
    code = process.exitcode or 0
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        tell(
            f"a worker died ({how}): its rows are re-encrypted by the others and at the end; the "
            "number of values may lack those of its last batch"
        )


def _rotate_in_worker(
    channel: Channel[Any, Any], selection: Selection, options: dict[str, Any]
) -> None:
    """Send progress through `channel`. Anything that arrives there, or its end, asks to stop."""
    try:
        targets = selection.targets()
        with connected(None) as engine:
            rotate(
                engine,
                targets,
                on_progress=channel.send,
                stop_when=lambda _: channel.poll(),
                **options,
            )
    except OSError:
        pass  # nobody reads the progress any more
    except Exception as error:  # noqa: BLE001
        sentence, _ = explain(error)
        channel.send(sentence)


def _together(latest: Sequence[RotationProgress]) -> RotationProgress:
    rotated = sum(progress.rotated for progress in latest)
    failed = max(progress.failed for progress in latest)
    total = max(rotated, *(progress.total for progress in latest))
    rate = sum(progress.rate for progress in latest)
    left = max(total - rotated - failed, 0)
    seconds_left = left / rate if rate else None
    return RotationProgress(latest[-1].table, rotated, failed, total, rate, seconds_left)
