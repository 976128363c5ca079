"""The events of a replay, as its caller hears them, and the log of them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Note:
    """Something the user should know; the run goes on."""

    text: str


@dataclass(frozen=True)
class Stopping:
    """Ctrl-C or SIGTERM asked to stop; `text` says what is waited for and how to stop at once. It
    comes from a thread of its own.
    """

    text: str


@dataclass(frozen=True)
class Stage:
    """A part of the preparation begins, such as "probing the task"."""

    text: str


@dataclass(frozen=True)
class Planned:
    """Work is about to start: segments of all losses pending and in all, spans pending, and the
    workers that will do it.

    `directory` is that of the run; empty where nothing is left to do. `follows` tells whether
    iterates are taken as a training records them, so that there will be more, and `followed` that
    they were, until none came.
    """

    pending: int
    total: int
    spans: int
    workers: int
    directory: str = ""
    follows: bool = False
    followed: bool = False


@dataclass(frozen=True)
class Following:
    """All whole spans of the iterates that are there are replayed, up to a training step; more are
    waited for.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class SpanDone:
    """A span was committed. `evaluations` and `forward_passes` are over its losses, `seconds` on
    the worker.

    `workers` is how many work now.
    """

    span: int
    losses: list[str]
    segments: int
    worst_residual: float
    unconverged: int
    evaluations: int
    forward_passes: int
    seconds: float
    peak_bytes: int
    worker: str
    workers: int


@dataclass(frozen=True)
class SpanFailed:
    """A span could not be replayed; the others go on.

    `not_finite` is the training step of the checkpoint that holds NaN or Inf, where that is why;
    None for anything else.
    """

    span: int
    first_step: int
    last_step: int
    message: str
    not_finite: int | None = None


@dataclass(frozen=True)
class SpanRetried:
    """A span is tried again on another worker."""

    span: int
    first_step: int
    last_step: int
    worker: str
    message: str


@dataclass(frozen=True)
class SpanSlow:
    """A span takes far longer than its peers; `doing` is the stack of its worker, the innermost
    call last.
    """

    span: int
    first_step: int
    last_step: int
    worker: str
    seconds: float
    doing: list[str]


Event = (
    Note | Stopping | Stage | Planned | Following | SpanDone | SpanFailed | SpanRetried | SpanSlow
)
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore an event: `run(…, progress=silent)` prints and warns of nothing."""


@dataclass
class Log:
    """Every event as a line of JSON, for machines; what happens before there is a file waits for
    it.
    """

    listener: Listener
    append: Callable[[str], None] | None = None
    waiting: list[str] = field(default_factory=list)
    _one_at_a_time: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._write({"event": "Started", "host": socket.gethostname(), "pid": os.getpid()})

    def __call__(self, event: Event) -> None:
        """Write an event down and pass it on, one after the other from whatever threads they
        come.
        """
        with self._one_at_a_time:
            try:
                self._write({"event": type(event).__name__, **asdict(event)})
            finally:
                self.listener(event)

    @contextlib.contextmanager
    def written_to(self, append: Callable[[str], None]) -> Iterator[None]:
        """Write every event down from here on, and at the end how it ended.

        Args:
            append: writes whole lines at the end of a file.
        """
        self.append = append
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # of a full disk, say, the error itself tells
                self._write({"event": "Ended", "error": f"{type(error).__name__}: {error}"})
            raise
        self._write({"event": "Ended", "error": None})

    def _write(self, entry: dict[str, object]) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.waiting.append(json.dumps({"time": stamp, **entry}, default=str))
        if self.append is not None:
            self.append("\n".join(self.waiting) + "\n")
            self.waiting.clear()
