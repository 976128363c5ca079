"""Show the events of a replay to a person."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import resources
from types import TracebackType

from ...base.text import duration, safe
from ...checkpoints.paths import path_of
from ...errors import LCAWarning
from ..events import (
    Event,
    Listener,
    Note,
    Planned,
    SpanDone,
    SpanFailed,
    SpanRetried,
    SpanSlow,
    Stage,
    Stopping,
    silent,
)
from .progressed import Progressed
from .streams import say, stderr
from .views import view_for

LOOK = 2.0  # seconds between two looks at the reports of spans
_SHOWN = 10  # failures printed singly
_PACKAGE = os.path.join(str(resources.files("lca_posthoc")), "")


class Display:
    """A listener that shows the events of a replay: progress as a bar or lines; notes, retries and
    failures as `note: …`.

    Call it with every event, inside a `with` block. The end of the block removes the bar. Because a
    single span may take an hour, a thread reads the reports of spans between events.

    Args:
        clock: seconds that only grow.
        stages: whether there are only stages; without a terminal each of them gets a line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, stages: bool = False) -> None:
        self._clock = clock
        self._console = stderr()
        self._view = view_for(self._console, clock(), stages)
        self._progressed = Progressed()
        self._directory = ""
        self._open_spans_done: set[int] = set()
        self._stage = ("", clock())
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        with self._lock:
            self._view.close()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            if isinstance(event, Note):
                self.say(event.text)
            elif isinstance(event, Stopping):
                say(event.text)  # not a warning, which a filter may turn into an error
            elif isinstance(event, Stage):
                self._on_stage(event)
            elif isinstance(event, Planned):
                self._on_planned(event)
            elif isinstance(event, SpanDone):
                self._on_done(event)
            elif isinstance(event, SpanRetried):
                self._on_retried(event)
            elif isinstance(event, SpanSlow):
                self._on_slow(event)
            elif isinstance(event, SpanFailed):
                self._on_failed(event)

    def say(self, text: str) -> None:
        """Print a note."""
        say(text)

    def tick(self) -> None:
        """Read the progress of the spans underway, and show it."""
        with self._lock:
            now = self._clock()
            if self._directory:
                self._read_reports()
                self._view.show(self._progressed, now)
            elif self._stage[0]:
                self._view.stage(*self._stage, now)

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            self.tick()

    def _read_reports(self) -> None:
        from ...results import underway

        reports = [
            report
            for report in underway(path_of(self._directory))
            if report.span not in self._open_spans_done
        ]
        state = self._progressed
        state.underway = sum(report.segments for report in reports)
        state.worst_residual = max(
            [state.worst_residual, *(report.worst_residual for report in reports)]
        )

    def _on_stage(self, event: Stage) -> None:
        self._stage = (event.text, self._clock())
        self._view.stage(*self._stage, self._clock())

    def _on_planned(self, event: Planned) -> None:
        if event.pending == 0 and event.followed:
            self.all_is_taken()
            return
        if event.pending == 0:
            self.nothing_to_do()
            return
        now, before = self._clock(), event.total - event.pending
        self._directory, self._open_spans_done = event.directory, set()
        self._progressed = Progressed(
            total=event.total,
            before=before,
            done=before,
            spans=event.spans,
            workers=event.workers,
            began=now,
        )
        self._view.show(self._progressed, now)

    def nothing_to_do(self) -> None:
        """Say that every span is already committed."""
        self.say("nothing to do: every span is committed")

    def all_is_taken(self) -> None:
        """Say that no more iterates are expected and every span is committed."""
        self.say("no more iterates are expected, and every span of the existing ones is committed")

    def _on_done(self, event: SpanDone) -> None:
        state = self._progressed
        self._open_spans_done.add(event.span)
        state.done += event.segments * len(event.losses)
        state.spans_done += 1
        state.workers = event.workers
        state.worst_residual = max(state.worst_residual, event.worst_residual)
        self._read_reports()
        self._view.show(state, self._clock())

    def _on_retried(self, event: SpanRetried) -> None:
        self._progressed.retried += 1
        self.say(f"{_span(event)} is retried: {event.message} ({event.worker})")

    def _on_slow(self, event: SpanSlow) -> None:
        stack = (
            f"; it is in {' < '.join(reversed(event.doing[-3:]))}"
            if event.doing
            else "; it does not respond"
        )
        self.say(
            f"{_span(event)} takes {duration(event.seconds)}, far longer than its peers, on worker "
            f"{event.worker}{stack}"
        )

    def _on_failed(self, event: SpanFailed) -> None:
        state = self._progressed
        state.failed += 1
        if state.failed <= _SHOWN:
            self.say(f"{_span(event)} failed: {event.message}")
        elif state.failed == _SHOWN + 1:
            from ...results import EVENTS

            self.say(f"more spans failed; {EVENTS} in the run directory lists them all")


class WarningDisplay(Display):
    """A `Display` for Python callers: a note becomes an `LCAWarning` at the caller's own line."""

    def say(self, text: str) -> None:
        """Warn."""
        warnings.warn(safe(text), LCAWarning, stacklevel=_level_of_the_caller())

    def nothing_to_do(self) -> None:
        """Print nothing: a finished run is no reason to warn."""

    def all_is_taken(self) -> None:
        """Print nothing: a finished run is no reason to warn."""


@contextlib.contextmanager
def listening(progress: Listener | None) -> Iterator[Listener]:
    """Yield the caller's listener, or a default one that warns and shows progress.

    In a process that imports its caller's script only to become a worker, nothing is shown.
    """
    if progress is not None or getattr(multiprocessing.current_process(), "_inheriting", False):
        yield progress or silent
    else:
        with WarningDisplay() as display:
            yield display


def _level_of_the_caller() -> int:
    """Return the `stacklevel` at which `warnings.warn`, called by this function's caller, points
    outside this package.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(
        (_PACKAGE, contextlib.__file__)
    ):
        level, frame = level + 1, frame.f_back
    return level


def _span(event: SpanRetried | SpanSlow | SpanFailed) -> str:
    return f"span {event.span} (steps {event.first_step} to {event.last_step})"
