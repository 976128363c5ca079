"""The state of a job: what it is doing, and what its listener and `lca status` are told of it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable

from .. import results
from ..base.text import duration
from .events import Log, Note, Planned, Stage, Stopping


class Status:
    """The state of a job, as its listener and `lca status` see it.

    Attributes:
        tell: passes an event on.
        announcement: the file beside the run, while it is prepared.
        workers: that replay spans; 0 before the first span.
        span_seconds: of the last span.
    """

    def __init__(self, tell: Log) -> None:
        self.tell = tell
        self.announcement: results.Announcement | None = None
        self.workers = 0
        self.span_seconds: float | None = None
        self._stage = ""
        self._on_signal = ""  # the effect of a first signal while waiting for iterates
        self._said: set[str] = set()

    def begin(self, stage: str) -> None:
        """Report a stage that begins."""
        self._stage, self._on_signal = stage, ""
        if self.announcement is not None:
            self.announcement.stage(stage)
        self.tell(Stage(stage))  # a reader of the event finds the announcement

    def wait(self, stage: str, on_signal: str) -> None:
        """Report a wait for iterates.

        Args:
            stage: what is waited for.
            on_signal: the effect of a first signal meanwhile.
        """
        self.begin(stage)
        self._on_signal = on_signal

    def note(self, notes: Iterable[str]) -> None:
        """Report what the user should know, each thing once."""
        for text in notes:
            if text not in self._said:
                self._said.add(text)
                self.tell(Note(text))

    def plan(self, planned: Planned) -> None:
        """Report that the spans begin, or that there are none."""
        if self.announcement is not None:
            self.announcement.end()
        self._on_signal = ""
        self.tell(planned)
        self.workers = planned.workers if planned.pending else 0

    def say_stopping(self, number: int) -> None:
        """Report what a first signal waits for, and how to stop at once."""
        if self._on_signal:
            self.tell(Stopping(f"stopping to wait: {self._on_signal}."))
            return
        waits, lost = (
            (
                self._span_ends(),
                "committed results are kept, spans underway are recomputed next time",
            )
            if self.workers
            else (f"when this is done: {self._stage}", "no span has begun")
        )
        again = "Press Ctrl-C again" if number == signal.SIGINT else "Send SIGTERM again"
        with contextlib.suppress(OSError):  # of the log, where the run's file system is unreachable
            self.tell(Stopping(f"stopping {waits}. {again} to stop now: {lost}."))

    def _span_ends(self) -> str:
        on = f" on {self.workers} workers" if self.workers > 1 else ""
        took = (
            ""
            if self.span_seconds is None
            else f" (the last one took {duration(self.span_seconds)})"
        )
        return (
            f"when the span{'s' if on else ''} underway{on} {'are' if on else 'is'} committed{took}"
        )
