"""Reports on the spans that workers compute now: a small file for each below RUN/log, removed when
its span is over.

Nothing relies on them: no result is read from one, and a report that cannot be written or read is
passed over.
"""

from __future__ import annotations

import calendar
import contextlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import LCAError
from . import disk
from .files import refuse_links
from .lock import is_held

EVERY = 3.0  # seconds between two writings of a report; a shorter span never writes one
LOG = "log"
EVENTS = f"{LOG}/run.jsonl"
_NAME = re.compile(r"\.span-(\d{6,})\.json")
_LARGEST = 4096  # bytes of a report


@dataclass(frozen=True)
class Underway:
    """The progress of one span: segments done, a segment of two losses counting twice, and the
    worst |residual| among them.

    `of_losses` counts the segments of `losses`, which are computed now; the others were computed
    before, in the same span.
    """

    span: int
    segments: float
    of_losses: float
    worst_residual: float
    losses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """A call of `run` or `repair`, as the log records it.

    Attributes:
        began: when, in seconds since 1970.
        pending: segments it had to compute; a segment of two losses counts twice.
        done: segments of these it has committed.
        workers: how many it had.
        ended: the error it ended with, empty where there was none; None where it still runs or was
            killed.
        not_finite: the spans that failed for a checkpoint with NaN or Inf, and the training step of
            that checkpoint.
        follows: whether it takes iterates as a training records them.
        waits_after: the training step up to which it replayed them, while it waits for more; None
            where it does not wait.
    """

    began: float
    pending: int
    done: int
    workers: int
    ended: str | None
    not_finite: dict[int, int]
    follows: bool
    waits_after: int | None

    def rate(self, underway: float) -> float | None:
        """Return segments per second since it began, those underway included; None while no segment
        is done.
        """
        seconds, segments = time.time() - self.began, self.done + underway
        return segments / seconds if seconds > 0 and segments > 0 else None


class SpanReport:
    """A context that writes the progress of a span to its file, every few seconds, and removes the
    file in the end.
    """

    def __init__(self, run: Path, span: int) -> None:
        self._file = run / LOG / f".span-{span:06d}.json"
        self._run = run
        self._due = time.monotonic() + EVERY
        self._written = False
        self._before = self._segments = self._worst = 0.0
        self._losses: list[str] = []

    def __enter__(self) -> SpanReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file."""
        if self._written:
            with contextlib.suppress(OSError):
                disk.remove(self._file)

    def begin(self, losses: list[str]) -> None:
        """Begin the pass over some losses; their progress starts from 0 again where the pass is
        repeated.
        """
        if losses != self._losses:
            self._before += self._segments
        self._segments, self._losses = 0.0, losses

    def reach(self, segments: float, residual: float) -> None:
        """Report how many segments of the pass are done, losses counted apart, and the |residual|
        of the last one.
        """
        self._segments, self._worst = max(self._segments, segments), max(self._worst, residual)
        if time.monotonic() >= self._due:
            self._write()
            self._due = time.monotonic() + EVERY

    def _write(self) -> None:
        document = {
            "segments": self._before + self._segments,
            "of_losses": self._segments,
            "worst_residual": self._worst,
            "losses": self._losses,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with contextlib.suppress(OSError, LCAError):
            refuse_links(self._run, self._file.parent)
            disk.write_whole(self._file, json.dumps(document).encode(), durable=False)
            self._written = True


def underway(run: Path) -> list[Underway]:
    """Return the reports of workers on the spans they compute now, in order; none where no driver
    works on the run.
    """
    reports = []
    with contextlib.suppress(OSError, LCAError):
        if is_held(run):
            for file, span in _reports(run):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    if disk.kind(file) == "file":
                        reports.append(_read(file, span))
    return reports


def _reports(run: Path) -> Iterator[tuple[Path, int]]:
    """Yield the file of each report, and its span."""
    for name in disk.names(run / LOG):
        report = _NAME.fullmatch(name)
        if report:
            yield run / LOG / name, int(report[1])


def _read(file: Path, span: int) -> Underway:
    document = json.loads(disk.read(file, _LARGEST))
    segments, of_losses, worst = (
        float(document[name]) for name in ("segments", "of_losses", "worst_residual")
    )
    if not 0 <= of_losses <= segments < 2**63 or not worst >= 0:
        raise ValueError
    return Underway(span, segments, of_losses, worst, tuple(map(str, document["losses"])))


def remove_reports(run: Path) -> None:
    """Remove reports of workers that were killed; only while holding the lock."""
    with contextlib.suppress(OSError):
        for file, _ in _reports(run):
            disk.remove(file)


def append_events(run: Path, lines: str) -> None:
    """Append lines to the log of a run.

    Raises:
        OSError: where this cannot be done.
    """
    disk.append(run / EVENTS, lines)


def last_run(run: Path) -> LastRun | None:
    """Return the last call that had spans to replay, from the log; None where there was none."""
    done, ended, not_finite = 0, None, dict[int, int]()
    waits_after: int | None = None
    for line in _lines_from_the_end(run / EVENTS):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            event = json.loads(line)
            kind = event["event"]
            if kind == "Ended" and ended is None:
                ended = str(event["error"] or "")
            elif kind == "SpanDone":
                done += int(event["segments"]) * len(event["losses"])
            elif kind == "Following" and done == 0 and waits_after is None:
                waits_after = int(event["step"])
            elif kind == "SpanFailed" and event.get("not_finite") is not None:
                not_finite[int(event["span"])] = int(event["not_finite"])
            elif kind == "Planned":
                return LastRun(
                    began=_seconds(event["time"]),
                    pending=int(event["pending"]),
                    done=done,
                    workers=int(event["workers"]),
                    ended=ended,
                    not_finite=not_finite,
                    follows=bool(event["follows"]),
                    waits_after=waits_after,
                )
    return None


def last_events(run: Path, most: int) -> list[str]:
    """Return the last lines of the log of a run, the last one last; none where there is no log."""
    lines = itertools.islice(filter(None, _lines_from_the_end(run / EVENTS)), most)
    return [line.decode("utf-8", "replace") for line in lines][::-1]


def _seconds(stamp: str) -> float:
    return float(calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")))


def _lines_from_the_end(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, the last one first; none where it cannot be read."""
    with contextlib.suppress(OSError):
        yield from disk.lines_from_the_end(file)
