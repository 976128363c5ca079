"""Define the events of a replay, which its caller receives, and their log."""

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
    """A fact that the user should know; the run continues."""

    text: str


@dataclass(frozen=True)
class Stopping:
    """Ctrl-C or SIGTERM asked to stop; `text` tells what the replay waits for and how to stop at
    once.

    It comes from a thread of its own.
    """

    text: str


@dataclass(frozen=True)
class Stage:
    """A part of the preparation begins, such as "probing the task"."""

    text: str


@dataclass(frozen=True)
class Planned:
    """Work is about to start: counts of segments and spans, and the workers.

    Segments of all losses are counted, pending and in all. `directory` is that of the run; it is
    empty if nothing is left to do. `follows` tells whether a training is still recording iterates,
    and `followed` whether it was, until it ended.
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
    """All whole spans of the existing iterates are replayed, up to a training step; the replay
    waits for more.
    """

    step: int


@dataclass(frozen=True, kw_only=True)
class SpanDone:
    """A span was committed.

    `evaluations` and `forward_passes` are sums over its losses, `seconds` are on the worker.
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
    """A span could not be replayed; the others continue.

    `not_finite` is the training step of the checkpoint with NaN or Inf, if that is the reason; else
    None.
    """

    span: int
    first_step: int
    last_step: int
    message: str
    not_finite: int | None = None


@dataclass(frozen=True)
class SpanRetried:
    """A span is retried on another worker."""

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
    """Ignore an event: `run(…, progress=silent)` prints nothing and warns of nothing."""


@dataclass
class Log:
    """A log that writes every event as a line of JSON; events before the file exists wait for it."""

    listener: Listener
    append: Callable[[str], None] | None = None
    waiting: list[str] = field(default_factory=list)
    _one_at_a_time: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._write({"event": "Started", "host": socket.gethostname(), "pid": os.getpid()})

    def __call__(self, event: Event) -> None:
        """Write an event and pass it on, one at a time, from any thread."""
        with self._one_at_a_time:
            try:
                self._write({"event": type(event).__name__, **asdict(event)})
            finally:
                self.listener(event)

    @contextlib.contextmanager
    def written_to(self, append: Callable[[str], None]) -> Iterator[None]:
        """Write every event from now on, and at the end how the replay ended.

        Args:
            append: writes whole lines at the end of a file.
        """
        self.append = append
        try:
            yield
        except BaseException as error:
            # for example of a full disk, which the error itself reports
            with contextlib.suppress(OSError):
                self._write({"event": "Ended", "error": f"{type(error).__name__}: {error}"})
            raise
        self._write({"event": "Ended", "error": None})

    def _write(self, entry: dict[str, object]) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.waiting.append(json.dumps({"time": stamp, **entry}, default=str))
        if self.append is not None:
            self.append("\n".join(self.waiting) + "\n")
            self.waiting.clear()
