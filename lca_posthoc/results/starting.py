"""Announce the preparation of a run by a small file beside it, which `lca status` reads."""

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
_STALE = 120.0  # seconds without a heartbeat of a driver on another host
_INSIDE = "log"  # directory within the run, in an object store
_TEMPORARY = ".tmp"  # end of the temporary name of such a file
_LARGEST = 16384  # bytes of such a file


@dataclass(frozen=True, kw_only=True)
class Starting:
    """The current stage of a driver before its first span.

    Attributes:
        run: the run it prepares.
        stage: the current work, in words.
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
    """The announcement file of one driver; failures to write it are ignored, because nothing relies
    on it.
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
        """Write the driver's current stage into the file."""
        self._state = replace(self._state, stage=text, since=time.time())
        self._write()

    def end(self) -> None:
        """Remove the file; later stages are not written."""
        with self._lock, contextlib.suppress(OSError):
            self._over.set()
            disk.remove(self._file)

    def _write(self) -> None:
        data = json.dumps(asdict(self._state)).encode()
        with self._lock, contextlib.suppress(OSError):
            if not self._over.is_set():
                # under a name that shows its owner, like that of the file itself
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

    Files of killed drivers beside this run are removed first.
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
    """Return the stage of a driver that prepares this run; None if there is none."""
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
    """Return the directory of the file: the run's parent, or the nearest existing one above; in an
    object store the run itself.
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
    """Tell whether a process is older than a file; a younger one reuses the number of an ended
    process.
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
