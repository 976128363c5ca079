"""Lock files and directories with the kernel's locks, where the machine and the file system support
them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows lacks it. People record and read results there, and compute runs elsewhere.
    fcntl = None  # type: ignore[assignment]


def can_lock() -> bool:
    """Return whether this machine supports such locks at all."""
    return fcntl is not None


def lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file until it is closed; return False if the file system does not support locks.

    Args:
        descriptor: file descriptor of the open file.
        shared: whether other shared locks of the file may exist at the same time.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on a directory inside the context; wait until no other process holds
    it.

    Where locks are not supported, continue at once.

    Raises:
        OSError: if the directory cannot be opened.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class DirectoryLock:
    """Lock a directory until `release` or until this process ends.

    `locked` is False where locks are not supported.

    Raises:
        BlockingIOError: if another process, or another lock of this process, holds the directory.
        OSError: if the directory cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        self._process, self.locked = os.getpid(), False
        self._descriptor: int | None = None
        if can_lock():
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.locked = lock(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                raise
            self._descriptor = descriptor

    def release(self) -> None:
        """Release the directory.

        A forked process inherits the lock; it leaves the release to the process that made it.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if self._process == os.getpid() and self.locked:
            with contextlib.suppress(OSError):
                # closing is not enough: a forked process may still have the descriptor open
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
