"""The progress of a replay as a person sees it: notes, stages, a bar on a terminal or in a
notebook, elsewhere a line a minute.

Nothing here can turn finished work into an error: signs that a terminal or a pipe cannot show are
replaced by others, and a stream that is gone is written to no more.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import multiprocessing
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.spinner import Spinner
from rich.status import Status
from rich.table import Column
from rich.text import Text

from .errors import LCAWarning, ResourceError
from .progress import (
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
from .text import count, safe

LOOK = 2.0  # seconds between two looks at how far spans are
# seconds after work began, once there are figures, until the first line where there is no terminal
FIRST = 20.0
MINUTE = 60.0  # seconds between two lines
_SHOWN = 10  # failures, one by one
_PACKAGE = os.path.dirname(__file__) + os.sep

# --- streams and signs
# ---------------------------------------------------------------------------------------------------

_COMMAND = re.compile(r"`[^`\n]+`")
_GLUE = "\u2800"  # as wide as a blank, and no place to cut a line
_PLAIN = {
    "→": "->",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "Σ": "sum",
    "Δ": "d",
    "θ": "theta",
    "×": "x",
    "±": "+-",
    "·": "|",
    "≤": "<=",
    "≥": ">=",
    "•": "*",
    "\N{NO-BREAK SPACE}": " ",
}


def showable(text: str, encoding: str) -> str:
    """Return a text in the signs an encoding has: ours in plain ones, those of names as escapes.

    >>> showable("2.3 → 0.1 in größe", "ascii")
    '2.3 -> 0.1 in gr\\\\xf6\\\\xdfe'
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        signs = (_PLAIN.get(sign, sign) if not _has(encoding, sign) else sign for sign in text)
        return "".join(signs).encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return showable(text, "ascii")
    return text


def _has(encoding: str, sign: str) -> bool:
    try:
        sign.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class Stream(io.TextIOBase):
    """A text stream that shows what it can: a sign its encoding lacks becomes another, and nothing
    is written once its reader is gone.

    Args:
        stream: where to write; None for nowhere, which is what Python sets where a descriptor is
            closed.
        matters: whether an error such as a full disk is raised: it is for results, not for
            progress.
    """

    def __init__(self, stream: TextIO | None, *, matters: bool) -> None:
        self._stream, self._matters = stream, matters

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the stream beneath."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, in other signs where it must be."""
        with self._lenient():
            if self._stream is not None:
                self._stream.write(showable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream beneath."""
        with self._lenient():
            if self._stream is not None:
                self._stream.flush()

    def writable(self) -> bool:
        """Say that texts can be written."""
        return True

    def isatty(self) -> bool:
        """Say whether a terminal shows it."""
        with self._lenient():
            return self._stream is not None and bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """Return the descriptor of the stream beneath."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._stream.fileno())

    @contextlib.contextmanager
    def _lenient(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            # what reads it is slow for the moment: progress may be lost, a result may not
            if self._matters:
                raise ResourceError(
                    "the result cannot be printed: what reads it does not wait. What was computed "
                    "is kept: `lca summary` prints it."
                ) from None
        except (OSError, ValueError) as error:
            gone = isinstance(error, ValueError) or error.errno in (
                errno.EPIPE,
                errno.EIO,
                errno.EBADF,
            )
            self._leave()
            if self._matters and not gone:
                raise ResourceError(
                    f"the result cannot be printed ({error}). What was computed is kept; `lca "
                    f"summary` and `lca status` print it again."
                ) from None

    def _leave(self) -> None:
        """Write to nowhere from here on; also what Python still flushes at its end."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        self._stream = None


def open_standard_descriptors() -> None:
    """Open those of the first three descriptors that are closed, on nothing; else a file of results
    gets the number, and prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # takes the lowest number that is free, this one
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)  # workers print as well


def stderr() -> Console:
    """Return where progress and notes go."""
    return Console(
        file=Stream(sys.stderr, matters=False),  # type: ignore[arg-type]
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        force_jupyter=False,
    )


def waiting(console: Console) -> Status:
    """Return a status line in signs the console can show; it starts as a context manager, or with
    `start`.
    """
    return console.status("", spinner=_spinner(console))


def _spinner(console: Console) -> str:
    return "dots" if console.encoding.startswith("utf") else "line"


def say(text: str) -> None:
    """Print a warning or a note: on a terminal in lines of its width, elsewhere in one line."""
    console = stderr()
    console.print(Text(wrapped(f"note: {safe(text)}", console)))


def wrapped(text: str, console: Console) -> str:
    """Return a text in lines as wide as the terminal, cut between words; unchanged where no
    terminal shows it.

    A command in backticks that fits a line is never cut, so that it can be copied.
    """
    if not console.file.isatty():
        return text
    shown = showable(text, console.encoding)
    whole = _COMMAND.sub(
        lambda command: (
            command[0].replace(" ", _GLUE) if cell_len(command[0]) <= console.width else command[0]
        ),
        shown,
    )
    lines = [
        line
        for part in whole.split("\n")
        for line in Text(part).wrap(console, console.width, tab_size=8)
    ]
    return "\n".join(line.plain.rstrip() for line in lines).replace(_GLUE, " ")


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- how far a replay is
# -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Progressed:
    """The progress of a replay: `done` of `total` segments (with two losses each counts twice),
    `before` of them when it began.
    """

    total: int = 0
    before: int = 0
    done: int = 0
    underway: float = 0.0
    spans: int = 0
    spans_done: int = 0
    workers: int = 0
    worst_residual: float = 0.0
    began: float = 0.0
    retried: int = 0
    failed: int = 0

    @property
    def reached(self) -> float:
        """Return the segments done, with those that spans underway report."""
        return min(float(self.total), self.done + self.underway)

    def rate(self, now: float) -> float | None:
        """Return segments per second since work began; spans end in bunches, which would make a
        moving rate jump.
        """
        seconds, segments = now - self.began, self.reached - self.before
        return segments / seconds if seconds > 0 and segments > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Return the time left at that rate."""
        rate = self.rate(now)
        return None if rate is None else (self.total - self.reached) / rate

    @property
    def trouble(self) -> str:
        """Return how many spans were tried again or failed, in words."""
        counts = (("retried", self.retried), ("failed", self.failed))
        return "".join(f" · {count} {what}" for what, count in counts if count)

    def line(self, now: float) -> str:
        """Return all of it in one line."""
        rate, remaining = self.rate(now), self.seconds_left(now)
        workers = count(self.workers, "worker")
        speed = f"{rate:.3g} segments/s on {workers}" if rate is not None else workers
        rest = (
            f"about {duration(remaining)} left"
            if remaining is not None
            else f"after {duration(now - self.began)}"
        )
        return (
            f"{int(self.reached):,} of {count(self.total, 'segment')} · worst residual "
            f"{self.worst_residual:.1e}{self.trouble} · "
            f"{speed} · {rest}"
        )


class View(Protocol):
    """One way to show how far a replay is."""

    def stage(self, text: str, began: float, now: float) -> None:
        """Show a part of the preparation and how long it has taken so far."""

    def show(self, progressed: Progressed, now: float) -> None:
        """Show how far it is."""

    def close(self) -> None:
        """Remove what moves from the screen."""


class Bar:
    """A bar on a terminal, gone when it is over."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task = 0

    def stage(self, text: str, began: float, now: float) -> None:
        """See `View.stage`."""
        shown = Text(f"{text} ({duration(int(now - began))})" if now - began >= 2 else text)
        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, redirect_stdout=_shows_prints()
            )
            self._live.start()
        self._live.update(
            Spinner(_spinner(self._console), shown, style="status.spinner"), refresh=True
        )

    def show(self, progressed: Progressed, now: float) -> None:
        """See `View.show`."""
        if self._progress is None:
            self.close()
            columns = (
                BarColumn(bar_width=40 if self._console.width >= 120 else 16),
                MofNCompleteColumn(),
                TextColumn("segments, left"),
                _Left(),
                # what there is room for, the most important first
                TextColumn(
                    "{task.fields[more]}",
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
            )
            self._progress = Progress(
                *columns,
                console=self._console,
                transient=True,
                expand=True,
                redirect_stdout=_shows_prints(),
            )
            self._task = self._progress.add_task("replay", total=None, more="", due=None)
            self._progress.start()
        workers = count(progressed.workers, "worker")
        rate, remaining = progressed.rate(now), progressed.seconds_left(now)
        if rate is not None:
            workers += f" at {rate / max(1, progressed.workers):.3g} segments/s"
        self._progress.update(
            self._task,  # type: ignore[arg-type]
            total=progressed.total,
            completed=int(progressed.reached),
            more=(
                f"{progressed.trouble} · worst residual {progressed.worst_residual:.1e} · "
                f"{progressed.spans_done}/{progressed.spans} spans"
                f" · {workers} · {duration(int(now - progressed.began))} so far"
            ).removeprefix(" "),
            due=None if remaining is None else time.monotonic() + remaining,
            refresh=True,
        )

    def close(self) -> None:
        """See `View.close`."""
        if self._live is not None:
            self._live.stop()
        if self._progress is not None:
            self._progress.stop()
        self._live = None


def _shows_prints() -> bool:
    """Tell whether prints of the user's code go to a terminal, above what moves; to a file or a
    pipe they go unchanged.
    """
    return sys.stdout is not None and sys.stdout.isatty()


class _Left(ProgressColumn):
    """The time left at the rate since work began."""

    def render(self, task: Task) -> Text:
        due = task.fields["due"]
        text = (
            "-:--:--"
            if due is None
            else str(timedelta(seconds=int(max(0.0, due - time.monotonic()))))
        )
        return Text(text, style="progress.remaining")


class Lines:
    """A line a minute where there is no terminal, the first one as soon as there are figures.

    Args:
        console: where the lines go.
        now: seconds on the clock.
        stages: whether each stage has a line when it begins, and one every `FIRST` seconds; for
            commands that have stages alone.
    """

    def __init__(self, console: Console, now: float, stages: bool = False) -> None:
        self._console, self._stages, self._stage = console, stages, ""
        self._last = now  # when the last line was printed, or it began
        self._first = True

    def stage(self, text: str, began: float, now: float) -> None:
        """See `View.stage`."""
        if self._stages and text != self._stage:
            self._stage = text
            self._print(text, now)
        elif now - self._last >= (FIRST if self._stages else MINUTE):
            self._print(f"{text}, for {duration(now - began)} now", now)

    def show(self, progressed: Progressed, now: float) -> None:
        """See `View.show`."""
        has_figures = progressed.reached > progressed.before
        has_rest = progressed.reached < progressed.total
        early = self._first and has_figures and has_rest and now - progressed.began >= FIRST
        if early or now - self._last >= MINUTE:
            self._print(progressed.line(now), now)
            self._first = self._first and not has_figures

    def close(self) -> None:
        """See `View.close`."""

    def _print(self, text: str, now: float) -> None:
        self._console.print(Text(f"lca: {text}"))
        self._last = now


class Notebook:
    """A bar in a notebook, by HTML alone; it stays as it was at the end."""

    def __init__(self, shell_display: Any) -> None:
        self._display = shell_display
        self._handle: Any = None

    def stage(self, text: str, began: float, now: float) -> None:
        """See `View.stage`."""
        self._put(f"<div>{escape(text)} ({escape(duration(int(now - began)))})</div>")

    def show(self, progressed: Progressed, now: float) -> None:
        """See `View.show`."""
        bar = f'<progress value="{progressed.reached:.6g}" max="{max(1, progressed.total)}"></progress>'
        self._put(f"<div>{bar} {escape(progressed.line(now))}</div>")

    def close(self) -> None:
        """See `View.close`."""

    def _put(self, html: str) -> None:
        shown = self._display.HTML(html)
        with contextlib.suppress(Exception):  # of what only displays nothing must stop the work
            if self._handle is None:
                self._handle = self._display.display(shown, display_id=True)
            else:
                self._handle.update(shown)


def _view(console: Console, now: float, stages: bool = False) -> View:
    """Return the way that fits where it is shown."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if hasattr(shell, "kernel"):
        with contextlib.suppress(ImportError):
            return Notebook(importlib.import_module("IPython.display"))
    if console.file.isatty() and not console.is_dumb_terminal:
        return Bar(console)
    return Lines(console, now, stages)


# --- listeners
# -----------------------------------------------------------------------------------------------------------


class Display:
    """A listener that shows the events of a replay: a bar or lines for its progress; notes, retries
    and failures as `note: …`.

    Call it with every event, inside a `with` block; at the end of the block what moves is removed.
    A thread of its own looks up how far spans are between two events, since a single span may take
    an hour.

    Args:
        clock: seconds that only grow.
        stages: whether there are stages alone; each of them has a line where there is no terminal.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, stages: bool = False) -> None:
        self._clock = clock
        self._console = stderr()
        self._view = _view(self._console, clock(), stages)
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
                say(event.text)  # never a warning, which a filter may make an error of
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
        """Look up how far the spans underway are, and show it."""
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
        from .store import underway

        reports = [
            report
            for report in underway(Path(self._directory))
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
        """Say that every span is committed already."""
        self.say(
            "nothing to do: every span is committed, and the task file is the one of the last run"
        )

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
        self.say(f"{_span(event)} is tried again: {event.message} ({event.worker})")

    def _on_slow(self, event: SpanSlow) -> None:
        stack = (
            f"; it is in {' < '.join(reversed(event.doing[-3:]))}"
            if event.doing
            else "; it does not answer"
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
            from .store import EVENTS

            self.say(f"more spans failed; {EVENTS} in the run directory has them all")


class WarningDisplay(Display):
    """A `Display` for callers in Python: a note becomes an `LCAWarning` at the caller's own
    line.
    """

    def say(self, text: str) -> None:
        """Warn."""
        warnings.warn(safe(text), LCAWarning, stacklevel=_level_of_the_caller())

    def nothing_to_do(self) -> None:
        """Say nothing: a finished run is no reason to warn."""


@contextlib.contextmanager
def listening(progress: Listener | None) -> Iterator[Listener]:
    """Give the listener of a call: the caller's own, or one that warns and shows how far it is.

    In a process that only imports its caller's script to become a worker, nothing is shown.
    """
    if progress is not None or getattr(multiprocessing.current_process(), "_inheriting", False):
        yield progress or silent
    else:
        with WarningDisplay() as display:
            yield display


def _level_of_the_caller() -> int:
    """Return the `stacklevel` with which `warnings.warn`, called by who calls this, points outside
    of this package.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(
        (_PACKAGE, contextlib.__file__)
    ):
        level, frame = level + 1, frame.f_back
    return level


def _span(event: SpanRetried | SpanSlow | SpanFailed) -> str:
    return f"span {event.span} (steps {event.first_step} to {event.last_step})"
