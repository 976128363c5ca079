"""Draw the progress of a replay: a bar on a terminal or in a notebook, elsewhere a line a minute."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from html import escape
from types import ModuleType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from ...base.text import count, duration
from .progressed import Progressed
from .streams import spinner_of, stderr

# without a terminal: seconds after work began until the first line with figures
FIRST = 20.0
MINUTE = 60.0  # seconds between two lines
_WIDE, _NARROW = 120, 60  # widths of a terminal: room for a long bar, and for none


class View(Protocol):
    """A way to show the progress of a replay."""

    def stage(self, text: str, began: float, now: float) -> None:
        """Show a part of the preparation and its duration so far.

        Args:
            text: names the part.
            began: seconds on the clock when it began.
            now: seconds on the clock.
        """

    def show(self, progressed: Progressed, now: float) -> None:
        """Show progress.

        Args:
            progressed: the counts so far.
            now: seconds on the clock.
        """

    def close(self) -> None:
        """Remove the bar from the screen."""


def _can_move(console: Console) -> bool:
    """Tell whether the console is a terminal that can erase lines."""
    return console.file.isatty() and not console.is_dumb_terminal


def _bar_of(console: Console) -> tuple[BarColumn, ...]:
    """Return the bar that fits a console beside words; none on a narrow one."""
    if console.width < _NARROW:
        return ()
    return (BarColumn(bar_width=40 if console.width >= _WIDE else 16),)


def _words(field: str, *, ratio: int | None = None) -> TextColumn:
    """Return a column of words that are cut at the end of the line."""
    column = Column(no_wrap=True, overflow="ellipsis", ratio=ratio)
    return TextColumn(f"{{task.{field}}}", markup=False, table_column=column)


def _line(console: Console) -> Progress:
    """Return a spinner followed by words, in one line that disappears at the end."""
    return Progress(
        SpinnerColumn(spinner_of(console)),
        _words("description", ratio=1),
        console=console,
        expand=True,
        disable=not _can_move(console),
        transient=True,
        redirect_stdout=_shows_prints(),
    )


@contextlib.contextmanager
def waiting(console: Console) -> Iterator[Callable[[str], None]]:
    """Show a spinner on a terminal while waiting; yield `show(text)`."""
    with _line(console) as line:
        task = line.add_task("")
        yield lambda text: line.update(task, description=text)


@contextlib.contextmanager
def bar(of: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on a terminal; yield `progress(what, done, total)`.

    Args:
        of: what is counted; "" shows a percentage.
    """
    console = stderr()
    columns = (_words("description"), *_bar_of(console), _words("fields[counted]"), _Elapsed())
    with Progress(
        *columns, console=console, disable=not _can_move(console), transient=True
    ) as shown:
        task = shown.add_task("", total=None, counted="")

        def progress(what: str, done: int, total: int) -> None:
            counted = f"{done:,}/{total:,} {of}" if of else f"{100 * done / max(1, total):.0f} %"
            shown.update(task, description=what, completed=done, total=total, counted=counted)

        yield progress


class _Elapsed(ProgressColumn):
    """The time since work began."""

    def render(self, task: Task) -> Text:
        return Text(f"· {duration(int(task.elapsed or 0))}", style="progress.elapsed")


class Bar:
    """A bar on a terminal, removed at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: Progress | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def stage(self, text: str, began: float, now: float) -> None:
        """Show a part of the preparation, see `View.stage`.

        Args:
            text: names the part.
            began: seconds on the clock when it began.
            now: seconds on the clock.
        """
        if self._stage is None:
            self._stage = _line(self._console)
            self._stage.add_task("")
            self._stage.start()
        shown = f"{text} ({duration(int(now - began))})" if now - began >= 2 else text
        self._stage.update(self._stage.task_ids[0], description=shown, refresh=True)

    def show(self, progressed: Progressed, now: float) -> None:
        """Show progress, see `View.show`.

        Args:
            progressed: the counts so far.
            now: seconds on the clock.
        """
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
        progress = Progress(
            *_bar_of(self._console),
            _Left(table_column=Column(no_wrap=True, overflow="ellipsis")),
            _words("fields[more]", ratio=1),  # as much as fits, the most important first
            console=self._console,
            transient=True,
            expand=True,
            redirect_stdout=_shows_prints(),
        )
        self._task = progress.add_task("replay", total=None, more="", due=None)
        progress.start()
        return progress

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._stage is not None:
            self._stage.stop()
        if self._progress is not None:
            self._progress.stop()
        self._stage = None


def _shows_prints() -> bool:
    """Tell whether prints of the user's code go to a terminal, above the bar.

    Prints to a file or a pipe stay unchanged.
    """
    return sys.stdout is not None and sys.stdout.isatty()


class _Left(ProgressColumn):
    """The finished segments, and the time left at the rate since work began."""

    def render(self, task: Task) -> Text:
        due, text = task.fields["due"], Text()
        if task.total is not None:
            done = f"{task.completed:,.0f}/{task.total:,.0f} segments"
            text.append(done, style="progress.download")
        if due is not None:
            seconds = int(max(0.0, due - time.monotonic()))
            text.append(f", {duration(seconds)} left", style="progress.remaining")
        return text


class Lines:
    """A line a minute where there is no terminal; the first one comes as soon as there are figures.

    Args:
        console: where the lines go.
        now: seconds on the clock.
        stages: whether each stage gets a line when it begins, and one every `FIRST` seconds; for
            commands that only have stages.
    """

    def __init__(self, console: Console, now: float, stages: bool = False) -> None:
        self._console, self._stages, self._stage = console, stages, ""
        self._last = now  # when the last line was printed, or the object created
        self._first = True

    def stage(self, text: str, began: float, now: float) -> None:
        """Print a part of the preparation, see `View.stage`.

        Args:
            text: names the part.
            began: seconds on the clock when it began.
            now: seconds on the clock.
        """
        if self._stages and text != self._stage:
            self._stage = text
            self._print(text, now)
        elif now - self._last >= (FIRST if self._stages else MINUTE):
            self._print(f"{text}, for {duration(now - began)} now", now)

    def show(self, progressed: Progressed, now: float) -> None:
        """Print progress, see `View.show`.

        Args:
            progressed: the counts so far.
            now: seconds on the clock.
        """
        has_figures = progressed.reached > progressed.before
        has_rest = progressed.reached < progressed.total
        early = self._first and has_figures and has_rest and now - progressed.began >= FIRST
        if early or now - self._last >= MINUTE:
            self._print(progressed.line(now), now)
            self._first = self._first and not has_figures

    def close(self) -> None:
        """Do nothing: lines stay."""

    def _print(self, text: str, now: float) -> None:
        self._console.print(Text(f"lca: {text}"))
        self._last = now


class Notebook:
    """A bar in a notebook, in plain HTML; its last state stays."""

    def __init__(self, shell_display: ModuleType) -> None:
        self._display = shell_display
        self._handle: Any = None

    def stage(self, text: str, began: float, now: float) -> None:
        """Show a part of the preparation, see `View.stage`.

        Args:
            text: names the part.
            began: seconds on the clock when it began.
            now: seconds on the clock.
        """
        self._put(f"<div>{escape(text)} ({escape(duration(int(now - began)))})</div>")

    def show(self, progressed: Progressed, now: float) -> None:
        """Show progress, see `View.show`.

        Args:
            progressed: the counts so far.
            now: seconds on the clock.
        """
        bar = f'<progress value="{progressed.reached:.6g}" max="{max(1, progressed.total)}"></progress>'
        self._put(f"<div>{bar} {escape(progressed.line(now))}</div>")

    def close(self) -> None:
        """Do nothing: the bar stays."""

    def _put(self, html: str) -> None:
        shown = self._display.HTML(html)
        with contextlib.suppress(Exception):  # display must never stop the work
            if self._handle is None:
                self._handle = self._display.display(shown, display_id=True)
            else:
                self._handle.update(shown)


def view_for(console: Console, now: float, stages: bool = False) -> View:
    """Return the view that fits the place: a notebook, a terminal, or neither.

    Args:
        console: where progress goes.
        now: seconds on the clock.
        stages: whether there are only stages, see `Lines`.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if hasattr(shell, "kernel"):
        with contextlib.suppress(ImportError):
            return Notebook(importlib.import_module("IPython.display"))
    if _can_move(console):
        return Bar(console)
    return Lines(console, now, stages)
