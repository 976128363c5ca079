"""The kernel's locks on files and directories, where the machine and the file system have them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows, where people record and read results, though runs are computed elsewhere
    fcntl = None  # type: ignore[assignment]


def can_lock() -> bool:
    """Tell whether this machine has such locks at all."""
    return fcntl is not None


def lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file for as long as it is open; return False where there are no locks, which
    some file systems lack.

    Raises:
        BlockingIOError: where another process has the lock.
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
    """Wait until no other process that asks for it has a directory, and keep it; where there are no
    locks, go on at once.

    Raises:
        OSError: where the directory cannot be opened.
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
    """Keep others out of a directory until `release`, or until this process ends; `locked` is False
    where there are no locks.

    Raises:
        BlockingIOError: where another process, or another lock of this one, has the directory.
        OSError: where the directory cannot be opened.
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
        """Let go of the directory; a forked process, which has the same lock, leaves it to the one
        that made it.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if self._process == os.getpid() and self.locked:
            with contextlib.suppress(OSError):
                # for forked processes too, which may live on
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
