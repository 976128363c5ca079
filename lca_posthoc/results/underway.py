"""Report on the spans that workers compute now: a small file for each below RUN/log, removed at its
end.

Nothing relies on them: no result is read from one, and failures to write or read a report are
ignored.
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

EVERY = 3.0  # seconds between two writes of a report; a shorter span writes none
LOG = "log"
EVENTS = f"{LOG}/run.jsonl"
_NAME = re.compile(r"\.span-(\d{6,})\.json")
_LARGEST = 4096  # bytes of a report


@dataclass(frozen=True)
class Underway:
    """The progress of one span: finished segments, counted once per loss, and their worst
    |residual|.

    `of_losses` counts the segments of `losses`, which are being computed; the others were computed
    before, in the same span.
    """

    span: int
    segments: float
    of_losses: float
    worst_residual: float
    losses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """A call of `run` or `repair`, from the log.

    Attributes:
        began: when, in seconds since 1970.
        pending: segments it had to compute, counted once per loss.
        done: segments of these that it has committed.
        workers: how many it had.
        ended: the error it ended with, "" if there was none; None if it still runs or was killed.
        not_finite: the spans that failed for a checkpoint with NaN or Inf, with the training step
            of that checkpoint.
        follows: whether it replays iterates while a training records them.
        waits_after: the training step up to which it replayed them, while it waits for more; None
            if it does not wait.
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
        """Return segments per second since it began, including those underway; None before the
        first segment.
        """
        seconds, segments = time.time() - self.began, self.done + underway
        return segments / seconds if seconds > 0 and segments > 0 else None


class SpanReport:
    """A context that writes the progress of a span to its file, every few seconds, and removes the
    file at the end.
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
        """Start the pass over some losses; repeating a pass resets their progress to 0."""
        if losses != self._losses:
            self._before += self._segments
        self._segments, self._losses = 0.0, losses

    def reach(self, segments: float, residual: float) -> None:
        """Report the progress of the pass.

        Args:
            segments: finished, counted once per loss.
            residual: |residual| of the last one.
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
    """Return the reports of workers on their current spans, in order; none if no driver works on
    the run.
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
    """Remove reports of killed workers. Call it only while holding the lock."""
    with contextlib.suppress(OSError):
        for file, _ in _reports(run):
            disk.remove(file)


def append_events(run: Path, lines: str) -> None:
    """Append lines to the log of a run.

    Args:
        run: its directory.
        lines: whole lines.

    Raises:
        OSError: if the log cannot be written.
    """
    disk.append(run / EVENTS, lines)


def last_run(run: Path) -> LastRun | None:
    """Return the last call that had spans to replay, from the log; None if there was none."""
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
    """Return the last lines of a run's log, in order; none if there is no log.

    Args:
        run: its directory.
        most: lines to return.
    """
    lines = itertools.islice(filter(None, _lines_from_the_end(run / EVENTS)), most)
    return [line.decode("utf-8", "replace") for line in lines][::-1]


def _seconds(stamp: str) -> float:
    return float(calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")))


def _lines_from_the_end(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, the last one first; none if it cannot be read."""
    with contextlib.suppress(OSError):
        yield from disk.lines_from_the_end(file)
