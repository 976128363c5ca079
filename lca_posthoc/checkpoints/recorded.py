"""Names of a recorder's iterates, and two small files beside them by which a recorder and a replay
that follows it tell each other of themselves.

The recorder's sign says whether more iterates will come. The release says up to which step a replay
needs no iterate any more.
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
HEARTBEAT = 10.0  # seconds between two signs of life of a recorder
_STALE = 120.0  # seconds without one, of a recorder on another host
_LARGEST = 65536  # bytes of such a file
_NAME = re.compile(r"step_(\d{8,})\.safetensors")

State = Literal["recording", "closed", "failed"]


def step_of(name: str) -> int | None:
    """Return the step that a file's name states; None where it is no such name.

    >>> step_of("step_00000007.safetensors"), step_of("model.safetensors")
    (7, None)
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def name_of(step: int) -> str:
    """Return the name of the file of a step.

    >>> name_of(7)
    'step_00000007.safetensors'
    """
    return f"step_{step:08d}.safetensors"


def steps_there(directory: Path) -> list[int]:
    """Return the steps that have a file in a directory, ascending; none where it is missing."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(step for name in names if (step := step_of(name)) is not None)


def make_directory(directory: Path) -> None:
    """Create the directory of iterates, and those above it, as far as they are missing; their names
    are on the disk when this returns.

    Raises:
        OSError: where this cannot be done.
    """
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _flush_names(place.parent)


def files_of(directory: Path, step: int) -> tuple[Path, Path]:
    """Return the paths of an iterate's moments and of the iterate, in the order in which they are
    written and removed.
    """
    return moments_path(directory, step), directory / name_of(step)


def bytes_of(directory: Path, step: int) -> int:
    """Return the bytes that the files of an iterate take; 0 where they are gone."""
    size = 0
    for path in files_of(directory, step):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def segments_between(steps: Iterable[int], bursts: tuple[int, int] | None) -> int:
    """Return how many segments the iterates of some steps have: none across the gaps between bursts.

    >>> segments_between([0, 1, 2, 10, 11, 12], (10, 3)), segments_between([0, 1, 2, 10], None)
    (4, 3)
    """
    return sum(
        bursts is None or before // bursts[0] == after // bursts[0]
        for before, after in pairwise(steps)
    )


# --- the recorder's sign --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecorderSign:
    """The state of a recorder, as it says itself.

    Attributes:
        state: "recording"; "closed" once no iterate will follow; "failed" where one could not be
            written.
        host: on which it runs.
        pid: its process.
        began: when that process began, in seconds since 1970.
        segments: how many its iterates will have in the end, with those that were there; None
            where nothing tells.
        bursts: of the recorder, `(every, length)`; None where it records none.
        most_iterates: the most that it lets wait for a replay; None for no such bound.
        most_bytes: the most bytes that those may take; None for no such bound.
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
        """Return the sign of a recorder that begins, in this process."""
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
        """Tell whether the recorder waits where a replay removes nothing."""
        return self.most_iterates is not None or self.most_bytes is not None

    def room(self, largest: int) -> int | None:
        """Return for how many iterates there is room; None for any number.

        Args:
            largest: bytes that the files of an iterate take, at most but for some text.
        """
        if self.most_bytes is not None:
            return int(self.most_bytes / (1.01 * max(1, largest)))
        return self.most_iterates

    @property
    def who(self) -> str:
        """Name the process."""
        return f"process {self.pid} on {self.host}"

    def is_recording(self, directory: Path) -> bool:
        """Tell whether the recorder lives and will write more: on this host by its process,
        elsewhere by its signs of life.
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
    """Write a recorder's sign beside its iterates."""
    _write(directory / SIGN, asdict(sign))


def beat(directory: Path) -> None:
    """Give a sign of life."""
    with contextlib.suppress(OSError):
        os.utime(directory / SIGN)


def read_sign(directory: Path) -> RecorderSign | None:
    """Return the sign of the last recorder of a directory; None where there was none.

    Raises:
        InputError: where the file is damaged.
    """
    entry = _read(directory / SIGN)
    if entry is None:
        return None
    with _named(directory / SIGN):
        state = entry["state"]
        if state not in ("recording", "closed", "failed"):
            raise ValueError(state)
        return RecorderSign(
            state=state,
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
    """The iterates of a directory that a replay needs no more.

    Attributes:
        before: iterates of earlier steps are removed, or stay for good.
        keep_every: of those, the steps that are multiples of it stay; None where none does.
        run: the identity of the run, and where it is.
        place: where the run is.
        moved: the stretches of segments, by the first of each, in which a parameter moved before
            that step.
    """

    before: int
    keep_every: int | None
    run: str
    place: str
    moved: tuple[int, ...]

    def keeps(self, step: int) -> bool:
        """Tell whether an iterate before `before` stays."""
        return self.keep_every is not None and step % self.keep_every == 0


def write_release(directory: Path, release: Release) -> None:
    """Write what a replay released, before any of it is removed."""
    _write(directory / RELEASE, asdict(release))


def read_release(directory: Path) -> Release | None:
    """Return what a replay released; None where there is nothing.

    Raises:
        InputError: where the file is damaged.
    """
    entry = _read(directory / RELEASE)
    if entry is None:
        return None
    with _named(directory / RELEASE):
        moved = entry["moved"]
        if not isinstance(moved, list):
            raise ValueError(moved)
        return Release(
            before=_whole(entry["before"]),
            keep_every=_maybe_whole(entry["keep_every"]),
            run=str(entry["run"]),
            place=str(entry["place"]),
            moved=tuple(map(_whole, moved)),
        )


# --- small files ----------------------------------------------------------------------------------


def _write(path: Path, entry: dict[str, object]) -> None:
    """Write or replace a file; it is on the disk, and whole, when this returns."""
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
    """Make the names in a directory durable."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no way to do so
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
    """Say of a file that holds something else that it is damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}). Remove it where no training "
            "records into the directory and no replay follows."
        ) from None


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0")
    return value


def _maybe_whole(value: object) -> int | None:
    return None if value is None else _whole(value)


def _maybe_pair(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r} is no pair")
    return _whole(value[0]), _whole(value[1])
