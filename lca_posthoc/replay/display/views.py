"""Show how far a replay is: a bar on a terminal or in a notebook, elsewhere a line a minute."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from datetime import timedelta
from html import escape
from types import ModuleType
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from ...base.text import count
from .progressed import Progressed, duration
from .streams import spinner_of

# seconds after work began, once there are figures, until the first line where there is no terminal
FIRST = 20.0
MINUTE = 60.0  # seconds between two lines


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
        self._task = TaskID(0)

    def stage(self, text: str, began: float, now: float) -> None:
        """See `View.stage`."""
        shown = Text(f"{text} ({duration(int(now - began))})" if now - began >= 2 else text)
        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, redirect_stdout=_shows_prints()
            )
            self._live.start()
        self._live.update(
            Spinner(spinner_of(self._console), shown, style="status.spinner"), refresh=True
        )

    def show(self, progressed: Progressed, now: float) -> None:
        """See `View.show`."""
        if self._progress is None:
            self.close()
            self._progress = self._started()
        workers = count(progressed.workers, "worker")
        rate, remaining = progressed.rate(now), progressed.seconds_left(now)
        if rate is not None:
            workers += f" at {rate / max(1, progressed.workers):.3g} segments/s"
        self._progress.update(
            self._task,
            total=progressed.total,
            completed=int(progressed.reached),
            more=(
                f"{progressed.trouble} · worst residual {progressed.worst_residual:.1e} · "
                f"{progressed.spans_done}/{progressed.spans} spans · {workers} · "
                f"{duration(int(now - progressed.began))} so far"
            ).removeprefix(" "),
            due=None if remaining is None else time.monotonic() + remaining,
            refresh=True,
        )

    def _started(self) -> Progress:
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
        progress = Progress(
            *columns,
            console=self._console,
            transient=True,
            expand=True,
            redirect_stdout=_shows_prints(),
        )
        self._task = progress.add_task("replay", total=None, more="", due=None)
        progress.start()
        return progress

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

    def __init__(self, shell_display: ModuleType) -> None:
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


def view_for(console: Console, now: float, stages: bool = False) -> View:
    """Return the way that fits where it is shown."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if hasattr(shell, "kernel"):
        with contextlib.suppress(ImportError):
            return Notebook(importlib.import_module("IPython.display"))
    if console.file.isatty() and not console.is_dumb_terminal:
        return Bar(console)
    return Lines(console, now, stages)
