"""Name a recorder's iterates, and exchange two small files between a recorder and a replay that
follows it.

The recorder's sign says whether more iterates will come. The release says up to which step a replay
no longer needs the iterates.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import psutil

from ..errors import InputError
from .optimizer_steps import moments_path

SIGN = ".recorder.json"
RELEASE = ".released.json"
HEARTBEAT = 10.0  # seconds between two heartbeats of a recorder
_STALE = 120.0  # seconds without a heartbeat, after which a recorder on another host is dead
_LARGEST = 65536  # bytes read from such a file at most
_NAME = re.compile(r"step_(\d{8,})\.safetensors")

State = Literal["recording", "closed", "failed"]


def step_of(name: str) -> int | None:
    """Return the step in a file name of a recorder, or None if the name has another form.

    >>> step_of("step_00000007.safetensors"), step_of("model.safetensors")
    (7, None)
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def name_of(step: int) -> str:
    """Return the file name of a step.

    >>> name_of(7)
    'step_00000007.safetensors'
    """
    return f"step_{step:08d}.safetensors"


def steps_there(directory: Path) -> list[int]:
    """Return the steps that have a file in a directory, ascending; an empty list if the directory
    is missing.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(step for name in names if (step := step_of(name)) is not None)


def make_directory(directory: Path) -> None:
    """Create the directory of iterates and its missing parents, and flush their names to the disk.

    Raises:
        OSError: if this fails.
    """
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _flush_names(place.parent)


def files_of(directory: Path, step: int) -> tuple[Path, Path]:
    """Return the paths of an iterate's moments and of the iterate, in the order of writing and
    removing.

    Args:
        directory: directory of the iterates.
        step: training step.
    """
    return moments_path(directory, step), directory / name_of(step)


def bytes_of(directory: Path, step: int) -> int:
    """Return the size of the files of an iterate in bytes; 0 if they are gone.

    Args:
        directory: directory of the iterates.
        step: training step.
    """
    size = 0
    for path in files_of(directory, step):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def segments_between(steps: Iterable[int], bursts: tuple[int, int] | None) -> int:
    """Count the segments between iterates; gaps between bursts have none.

    >>> segments_between([0, 1, 2, 10, 11, 12], (10, 3)), segments_between([0, 1, 2, 10], None)
    (4, 3)

    Args:
        steps: steps of the iterates, ascending.
        bursts: `(every, length)` of the recorder; None if it records every step alike.
    """
    return sum(
        bursts is None or before // bursts[0] == after // bursts[0]
        for before, after in pairwise(steps)
    )


# --- the recorder's sign --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecorderSign:
    """State what a recorder is doing.

    Attributes:
        state: "recording"; "closed" once no iterate will follow; "failed" if one could not be
            written.
        host: name of the host it runs on.
        pid: id of its process.
        began: start time of that process, in seconds since 1970.
        segments: final number of segments of the series, including earlier iterates; None if
            unknown.
        bursts: `(every, length)` of the recorder; None if it records no bursts.
        most_iterates: limit on the iterates that wait for a replay; None for no limit.
        most_bytes: limit on the bytes of those iterates; None for no limit.
    """

    state: State
    host: str
    pid: int
    began: float
    segments: int | None
    bursts: tuple[int, int] | None
    most_iterates: int | None
    most_bytes: int | None

    @classmethod
    def of_this_process(
        cls,
        segments: int | None,
        bursts: tuple[int, int] | None,
        most_iterates: int | None,
        most_bytes: int | None,
    ) -> RecorderSign:
        """Create the sign of a recorder that starts in this process.

        Args:
            segments: see the attribute.
            bursts: see the attribute.
            most_iterates: see the attribute.
            most_bytes: see the attribute.
        """
        return cls(
            state="recording",
            host=socket.gethostname(),
            pid=os.getpid(),
            began=psutil.Process().create_time(),
            segments=segments,
            bursts=bursts,
            most_iterates=most_iterates,
            most_bytes=most_bytes,
        )

    @property
    def is_bounded(self) -> bool:
        """Return whether the recorder waits while a replay removes nothing."""
        return self.most_iterates is not None or self.most_bytes is not None

    def room(self, largest: int) -> int | None:
        """Return the number of iterates that may wait, or None for any number.

        Args:
            largest: size of an iterate's files in bytes, up to a little metadata.
        """
        if self.most_bytes is not None:
            return int(self.most_bytes / (1.01 * max(1, largest)))
        return self.most_iterates

    @property
    def who(self) -> str:
        """Name the process for messages."""
        return f"process {self.pid} on {self.host}"

    def is_recording(self, directory: Path) -> bool:
        """Return whether the recorder is alive and will write more.

        Check its process on this host, or its heartbeat on another.
        """
        if self.state != "recording":
            return False
        if self.host == socket.gethostname():
            try:
                return bool(abs(psutil.Process(self.pid).create_time() - self.began) < 1.0)
            except psutil.Error:
                return False
        with contextlib.suppress(FileNotFoundError):
            return time.time() - (directory / SIGN).stat().st_mtime < _STALE
        return False


def write_sign(directory: Path, sign: RecorderSign) -> None:
    """Write a recorder's sign beside its iterates.

    Args:
        directory: directory of the iterates.
        sign: the sign.
    """
    _write(directory / SIGN, asdict(sign))


def beat(directory: Path) -> None:
    """Update the heartbeat."""
    with contextlib.suppress(OSError):
        os.utime(directory / SIGN)


def read_sign(directory: Path) -> RecorderSign | None:
    """Read the sign of a directory's last recorder; None if there was none.

    Raises:
        InputError: if the file is damaged.
    """
    entry = _read(directory / SIGN)
    if entry is None:
        return None
    with _named(directory / SIGN):
        return RecorderSign(
            state=_state(entry["state"]),
            host=str(entry["host"]),
            pid=_whole(entry["pid"]),
            began=float(entry["began"]),  # type: ignore[arg-type]
            segments=_maybe_whole(entry["segments"]),
            bursts=_maybe_pair(entry["bursts"]),
            most_iterates=_maybe_whole(entry["most_iterates"]),
            most_bytes=_maybe_whole(entry["most_bytes"]),
        )


# --- what a replay released -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Release:
    """State which iterates of a directory a replay no longer needs.

    Attributes:
        before: iterates of earlier steps are removed, or stay for good.
        keep_every: iterates at multiples of this step stay; None if none stays.
        run: identity of the run.
        place: path of the run.
        moved: stretches of segments, each named by its first segment, in which a parameter moved
            before that step.
    """

    before: int
    keep_every: int | None
    run: str
    place: str
    moved: tuple[int, ...]

    def keeps(self, step: int) -> bool:
        """Return whether an iterate earlier than `before` stays."""
        return self.keep_every is not None and step % self.keep_every == 0


def write_release(directory: Path, release: Release) -> None:
    """Write what a replay releases; call this before removing anything.

    Args:
        directory: directory of the iterates.
        release: the release.
    """
    _write(directory / RELEASE, asdict(release))


def read_release(directory: Path) -> Release | None:
    """Read what a replay released; None if it released nothing.

    Raises:
        InputError: if the file is damaged.
    """
    entry = _read(directory / RELEASE)
    if entry is None:
        return None
    with _named(directory / RELEASE):
        return Release(
            before=_whole(entry["before"]),
            keep_every=_maybe_whole(entry["keep_every"]),
            run=str(entry["run"]),
            place=str(entry["place"]),
            moved=_wholes(entry["moved"]),
        )


# --- small files ----------------------------------------------------------------------------------


def _write(path: Path, entry: dict[str, object]) -> None:
    """Write or replace a file atomically and flush it to the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump(entry, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_names(path.parent)


def _flush_names(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, object] | None:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with _named(path):
        entry = json.loads(data)
        if not isinstance(entry, dict):
            raise ValueError(entry)
        return entry


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Report a file with unexpected content as damaged.

    Raises:
        InputError: if the body finds such content.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}). Remove it, unless a training run "
            "records into the directory or a replay follows it."
        ) from None


def _state(value: object) -> State:
    if value not in ("recording", "closed", "failed"):
        raise ValueError(f"{value!r} is not the state of a recorder")
    return value


def _wholes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return tuple(map(_whole, value))


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0 on")
    return value


def _maybe_whole(value: object) -> int | None:
    return None if value is None else _whole(value)


def _maybe_pair(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r} is not a pair")
    return _whole(value[0]), _whole(value[1])
