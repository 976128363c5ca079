"""Implement the operations of `disk` in a directory of a POSIX file system."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import psutil

from ..base import locks
from ..checkpoints.paths import nearest
from .home import Kind, State

_BLOCK = 2**22  # bytes read at a time
_BLOCK_FROM_THE_END = 2**20
_LOCK_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)  # Windows has neither


def can_lock() -> bool:
    """Tell whether this machine has kernel locks."""
    return locks.can_lock()


def check_promises(run: Path) -> None:
    """Do nothing: renaming and flushing in POSIX give all guarantees."""


# --- look -----------------------------------------------------------------------------------------


def state(path: Path, *, follow_links: bool = True) -> State:
    """Return the state of a path.

    Args:
        path: to look at.
        follow_links: whether to return the state of a link's target.
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


def sizes(paths: Sequence[Path]) -> list[int | None]:
    """Return the bytes of each file; None for a missing one."""
    return [*map(_size, paths)]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def names(directory: Path) -> list[str]:
    """Return the names in a directory; none if it cannot be listed."""
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def free_space(path: Path) -> tuple[Path, int]:
    """Return the nearest existing directory above a path, and its free bytes."""
    place = nearest(path.resolve().parent)
    return place, psutil.disk_usage(str(place)).free


def walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every directory below one, and itself, with its directories and files."""
    for place, directories, files in os.walk(directory):
        yield Path(place), directories, files


# --- read -----------------------------------------------------------------------------------------


def read(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, or its first `most`.

    Args:
        path: of the file.
        most: bytes to read; -1 for all.
    """
    with path.open("rb") as file:
        # Python reserves what is asked for, however short the file is
        return file.read(min(most, os.fstat(file.fileno()).st_size))


def read_part(path: Path, start: int, size: int) -> bytes:
    """Return a part of a file, shorter where the file ends before.

    Args:
        path: of the file.
        start: offset of the first byte.
        size: bytes to read.
    """
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def blocks(path: Path, *, flush: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a file, a block at a time.

    Args:
        path: of the file.
        flush: whether to make them durable first.
    """
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            yield block


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, the last one first."""
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


def write_blocks(
    path: Path,
    data: Iterable[bytes | memoryview],
    durable: bool,
    *,
    suffix: str = "tmp",
    temporary: str | None = None,
) -> None:
    """Write or replace a file: under a temporary name beside it, which is then renamed.

    Args:
        path: of the file.
        data: its bytes, in blocks.
        durable: whether to flush its bytes before renaming, and the directory after.
        suffix: of the temporary name.
        temporary: that name; None to make one.
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
    """Append text to a file.

    Args:
        path: of the file.
        text: whole lines.
    """
    with path.open("a") as file:
        file.write(text)


def beat(path: Path) -> None:
    """Set the modification time to now."""
    os.utime(path)


def create_directory(path: Path) -> None:
    """Create a directory that must not exist."""
    path.mkdir()


def ensure_directory(path: Path, *, durable: bool = False) -> None:
    """Create a directory and its parents, where missing.

    Args:
        path: of the directory.
        durable: whether to flush the directories that got a new name.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()] if durable else []
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush_names(place.parent)


def publish(building: Path, path: Path, durable: bool) -> None:
    """Rename a directory that was built beside its place.

    Args:
        building: the directory.
        path: its new name.
        durable: whether to flush the name to disk before returning.

    Raises:
        FileExistsError: if a nonempty directory has the name.
        OSError: if it cannot be renamed.
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
    """Flush a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- remove ---------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file or a link."""
    path.unlink(missing_ok=True)


def remove_empty(directory: Path) -> None:
    """Remove a directory if it is empty."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def remove_tree(directory: Path, *, strict: bool = False) -> None:
    """Remove a directory with everything in it.

    Args:
        directory: to remove.
        strict: whether to raise errors.
    """
    shutil.rmtree(directory, ignore_errors=not strict)


# --- lock -----------------------------------------------------------------------------------------


class LocalLock:
    """A file with a kernel lock, which keeps apart the processes of this host; its bytes and age do
    so between hosts.

    Args:
        path: of the file; links are not followed.
        create: whether to create it if missing, and to open it for writing.

    Raises:
        FileNotFoundError: if it is missing.
        OSError: with `ELOOP` if it is a link.
    """

    is_of_kernel = True

    def __init__(self, path: Path, *, create: bool = False) -> None:
        access = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        self._descriptor = os.open(path, access | _LOCK_FLAGS, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the kernel lock without waiting; return False if the file system has none.

        Raises:
            BlockingIOError: if another process has it.
        """
        return locks.lock(self._descriptor, shared=shared)

    def read(self, most: int) -> bytes:
        """Return the first bytes of the file, at most `most`."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return os.read(self._descriptor, most)

    def write(self, data: bytes, *, durable: bool = False) -> None:
        """Replace the bytes of the file in place; others may see them half written.

        Args:
            data: the new bytes.
            durable: whether to flush them to disk before returning.
        """
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        if durable:
            os.fsync(self._descriptor)

    def beat(self) -> None:
        """Set the modification time to now."""
        os.utime(self._descriptor)

    def age(self) -> float:
        """Return the seconds since the bytes changed or the last heartbeat."""
        return time.time() - os.fstat(self._descriptor).st_mtime


def open_lock(path: Path, *, create: bool = False) -> LocalLock:
    """Open a file to lock.

    Args:
        path: of the file; links are not followed.
        create: whether to create it if missing, and to open it for writing.
    """
    return LocalLock(path, create=create)
