"""The files of a run, and the small files beside one: a few verbs, each with what it promises.

A run lies in a directory of a POSIX file system. The other modules name its files and know what
they hold; they open, look up, rename and remove them by these verbs alone, so that another home of
runs is another module with the same verbs.

Where `durable` is false nothing is flushed: a power failure may take what was written last, and the
checksums show it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import psutil

from ..base.locks import lock
from ..checkpoints.paths import nearest

Kind = Literal["file", "directory", "link", "other"]

_BLOCK = 2**22  # bytes that are read at a time
_BLOCK_FROM_THE_END = 2**20
_LOCK_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)  # Windows has neither


# --- look -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a path at one moment.

    Attributes:
        kind: a file, a directory, a link (where links are not followed), or something else.
        size: in bytes.
        changed: when its bytes last changed or its heartbeat was last given, in seconds since 1970.
        version: another one as soon as the file was replaced or written to.
    """

    kind: Kind
    size: int
    changed: float
    version: tuple[int, ...]


def state(path: Path, *, follow_links: bool = True) -> State:
    """Return the state of a path.

    Raises:
        FileNotFoundError, NotADirectoryError: where nothing is there.
        OSError: where this cannot be told.
    """
    status = path.stat() if follow_links else path.lstat()
    return State(
        kind=_kind(status.st_mode),
        size=status.st_size,
        changed=status.st_mtime,
        version=(status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size),
    )


def _kind(mode: int) -> Kind:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "other"


def kind(path: Path, *, follow_links: bool = False) -> Kind | None:
    """Return the kind of what a path stands for; None where nothing is there.

    Raises:
        OSError: where this cannot be told.
    """
    try:
        return state(path, follow_links=follow_links).kind
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:  # of links in a circle, which lead nowhere
            raise
        return None


def exists(path: Path) -> bool:
    """Tell whether something is at a path; a link counts as what it leads to."""
    return kind(path, follow_links=True) is not None


def names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; none where it is missing or cannot be listed, for
    no result relies on a listing.
    """
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def free_space(path: Path) -> tuple[Path, int]:
    """Return the nearest directory above a path that exists, and the bytes that are free there."""
    place = nearest(path.resolve().parent)
    return place, psutil.disk_usage(str(place)).free


def walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every directory below one, and itself, each with the names of its directories (links
    to directories among them, which are not entered) and of its files.

    The caller may remove names of directories, which are then not entered.
    """
    for place, directories, files in os.walk(directory):
        yield Path(place), directories, files


# --- read -----------------------------------------------------------------------------------------


def read(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, or its first `most`.

    Raises:
        OSError: where it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(most)


def read_part(path: Path, start: int, size: int) -> bytes:
    """Return so many bytes of a file from a place on, fewer where it ends before.

    Raises:
        OSError: where it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def blocks(path: Path, *, flush: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a file, a block at a time; `flush` makes them durable first.

    Raises:
        OSError: where it cannot be read.
    """
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            yield block


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, the last one first, reading no more of it than is asked for.

    Raises:
        OSError: where it cannot be read.
    """
    with path.open("rb") as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end:
            start = max(0, end - _BLOCK_FROM_THE_END)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
            end = start
        yield rest


# --- write ----------------------------------------------------------------------------------------


def write_whole(
    path: Path, data: bytes, durable: bool, *, suffix: str = "tmp", temporary: str | None = None
) -> None:
    """Write or replace a file: readers see all of the old bytes or all of the new ones.

    Args:
        path: of the file.
        data: its bytes.
        durable: whether they are on disk when this returns.
        suffix: of the temporary name, by which `sweep` knows what a killed writer left.
        temporary: that name, where another process must be able to tell whose file it is.
    """
    write_blocks(path, [data], durable, suffix=suffix, temporary=temporary)


def write_blocks(
    path: Path,
    data: Iterable[bytes | memoryview],
    durable: bool,
    *,
    suffix: str = "tmp",
    temporary: str | None = None,
) -> None:
    """Write or replace a file as `write_whole` does, a block of bytes at a time.

    The bytes are written under a temporary name beside it and renamed; where durable, they are
    flushed before, and the directory after.
    """
    place = path.with_name(temporary or f".{uuid.uuid4().hex}.{suffix}")
    try:
        with place.open("xb") as file:
            for block in data:
                file.write(block)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        place.replace(path)
    finally:
        place.unlink(missing_ok=True)
    if durable:
        flush_names(path.parent)


def append(path: Path, text: str) -> None:
    """Append text to a file, which is created where it is missing; for logs, of which a crash may
    leave half a line.
    """
    with path.open("a") as file:
        file.write(text)


def beat(path: Path) -> None:
    """Give a sign of life: the file's `changed` becomes now.

    Raises:
        OSError: where it is not there.
    """
    os.utime(path)


def create_directory(path: Path) -> None:
    """Create a directory that must not be there.

    Raises:
        FileExistsError: where something is.
    """
    path.mkdir()


def ensure_directory(path: Path, *, durable: bool = False) -> None:
    """Create a directory and those above it, as far as they are missing; where durable, their names
    are on disk when this returns.

    Raises:
        FileExistsError, NotADirectoryError: where something else is in its place.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()] if durable else []
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush_names(place.parent)


def publish(building: Path, path: Path, durable: bool) -> None:
    """Give a directory that was built beside it its name, at once and whole.

    Raises:
        FileExistsError: where a directory that is not empty has the name.
    """
    try:
        building.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(error.errno, error.strerror, str(path)) from None
    if durable:
        flush_names(path.parent)


def flush_names(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- remove ---------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file, or a link and not what it leads to; one that is gone already is no error."""
    path.unlink(missing_ok=True)


def remove_empty(directory: Path) -> None:
    """Remove a directory that is empty; one that is not, or is not there, stays as it is."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove_tree(directory: Path, *, strict: bool = False) -> None:
    """Remove a directory with everything in it; what cannot be removed stays, and is an `OSError`
    where `strict`.
    """
    shutil.rmtree(directory, ignore_errors=not strict)


# --- lock -----------------------------------------------------------------------------------------


class LockFile:
    """A file by which drivers keep apart: the kernel's lock on it, between processes of this host,
    and its bytes and its age, between hosts. Closed, and unlocked, at the end of its context.

    Args:
        path: of the file; nothing is opened through a link.
        create: whether to create it where it is missing, and to open it for writing.

    Raises:
        FileNotFoundError: where it is missing.
        OSError: with `ELOOP` where it is a link.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        access = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        self._descriptor = os.open(path, access | _LOCK_FLAGS, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the kernel's lock without waiting; return False where the file system has none.

        Raises:
            BlockingIOError: where another process has it.
        """
        return lock(self._descriptor, shared=shared)

    def read(self, most: int) -> bytes:
        """Return the first bytes of the file, at most so many."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return os.read(self._descriptor, most)

    def write(self, data: bytes, *, durable: bool = False) -> None:
        """Replace the bytes of the file, in place; others may see them half written. Where durable,
        they are on disk when this returns.
        """
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        if durable:
            os.fsync(self._descriptor)

    def age(self) -> float:
        """Return the seconds since the bytes changed or the last heartbeat."""
        return time.time() - os.fstat(self._descriptor).st_mtime
