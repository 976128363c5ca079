"""A small file beside a run that is being prepared, by which `lca status` can tell what its driver
is doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ..checkpoints.paths import nearest
from . import disk

_HEARTBEAT = 10.0
_STALE = 120.0  # seconds without a heartbeat, of a driver on another host
_INSIDE = "log"  # of the run, in an object store
_TEMPORARY = ".tmp"  # end of the name of such a file while it is written
_LARGEST = 16384  # bytes of such a file


@dataclass(frozen=True, kw_only=True)
class Starting:
    """The stage a driver is in before its first span.

    Attributes:
        run: the run it prepares.
        stage: what it does now, in words.
        since: when the stage began, in seconds since 1970.
        began: when the driver began, in seconds since 1970.
        host: on which it runs.
        pid: its process.
    """

    run: str
    stage: str
    since: float
    began: float
    host: str
    pid: int


class Announcement:
    """The file of one driver; where it cannot be written, it is left out, because nothing relies on
    it.
    """

    def __init__(self, run: Path) -> None:
        self._file = _place(run) / f"{_beginning(run)}{socket.gethostname()}-{os.getpid()}"
        now = time.time()
        self._state = Starting(
            run=str(run.absolute()),
            stage="starting",
            since=now,
            began=now,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self._lock, self._over = threading.Lock(), threading.Event()

    def stage(self, text: str) -> None:
        """Write what the driver does now into the file."""
        self._state = replace(self._state, stage=text, since=time.time())
        self._write()

    def end(self) -> None:
        """Remove the file; stages that follow are not written."""
        with self._lock, contextlib.suppress(OSError):
            self._over.set()
            disk.remove(self._file)

    def _write(self) -> None:
        data = json.dumps(asdict(self._state)).encode()
        with self._lock, contextlib.suppress(OSError):
            if not self._over.is_set():
                # under a name by which others tell whose it is, as they do of the file itself
                disk.write_whole(
                    self._file, data, durable=False, temporary=f"{self._file.name}{_TEMPORARY}"
                )

    def _beat(self) -> None:
        while not self._over.wait(_HEARTBEAT):
            with contextlib.suppress(OSError):
                disk.beat(self._file)


@contextlib.contextmanager
def announced(run: Path) -> Iterator[Announcement]:
    """Announce that a run is being prepared, until `end` or the end of the context.

    Files that killed drivers left beside this run are removed first.
    """
    announcement = Announcement(run)
    _remove_stale(run)
    announcement.stage("starting")
    beat = threading.Thread(target=announcement._beat, daemon=True)
    beat.start()
    try:
        yield announcement
    finally:
        announcement.end()
        beat.join()


def starting(run: Path) -> Starting | None:
    """Return the stage of a driver that prepares this run; None where there is none."""
    for file in _files(run):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if _is_alive(run, file):
                state = Starting(**json.loads(disk.read(file, _LARGEST)))
                if state.run == str(run.absolute()) and all(
                    isinstance(value, int | float)
                    for value in (state.since, state.began, state.pid)
                ):
                    return state
    return None


def _beginning(run: Path) -> str:
    return f".{run.absolute().name}.starting-"


def _place(run: Path) -> Path:
    """Return the directory of the file: the one the run is in, or the nearest one above it that is
    there already; in an object store the run's own.
    """
    try:
        return run / _INSIDE if disk.is_object_store(run) else nearest(run.absolute().parent)
    except OSError:  # nothing can be written there either
        return run.absolute().parent


def _files(run: Path) -> list[Path]:
    place, beginning = _place(run), _beginning(run)
    with contextlib.suppress(OSError):
        return [
            place / name
            for name in disk.names(place)
            if name.startswith(beginning) and disk.kind(place / name) == "file"
        ]
    return []


def _is_alive(run: Path, file: Path) -> bool:
    """Tell whether the driver that wrote a file runs: on this host by its process, elsewhere by its
    heartbeat.
    """
    host, _, pid = file.name.removeprefix(_beginning(run)).removesuffix(_TEMPORARY).rpartition("-")
    if host == socket.gethostname() and pid.isdecimal():
        return psutil.pid_exists(int(pid)) and _is_older(int(pid), file)
    return time.time() - disk.state(file).changed < _STALE


def _is_older(pid: int, file: Path) -> bool:
    """Tell whether a process is older than a file; a younger one got the number of a process that
    ended.
    """
    try:
        return float(psutil.Process(pid).create_time()) <= disk.state(file).changed + 1.0
    except psutil.Error:
        return False


def _remove_stale(run: Path) -> None:
    for file in _files(run):
        with contextlib.suppress(OSError):
            if not _is_alive(run, file):
                disk.remove(file)
