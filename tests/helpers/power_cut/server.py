"""Serve a `Disk` to the kernel: `python -m tests.helpers.power_cut.server PLACE IMAGE CHANGES`.

The disk is read from the file IMAGE, mounted at PLACE, and written to IMAGE when it is unmounted.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import mfusepy

from .disk import Disk
from .mount import CUT, MOUNTED

_SIZE = 2**32  # bytes that the file system says to have
_BLOCK = 4096  # bytes
_NOW, _OMITTED = 2**30 - 1, 2**30 - 2  # in place of a time, see utimensat(2)

R = TypeVar("R")


def _call(method: Callable[..., R]) -> Callable[..., R]:
    """Make a call wait once the power is cut."""

    @wraps(method)
    def called(server: Server, *arguments: Any) -> R:
        server.wait_if_cut()
        server.take_name()
        return method(server, *arguments)

    return called


def _change(method: Callable[..., R]) -> Callable[..., R]:
    """Count a call that changes or flushes something; the first one too many cuts the power."""

    @wraps(method)
    def called(server: Server, *arguments: Any) -> R:
        server.count()
        return method(server, *arguments)

    return called


class Server(mfusepy.Operations):
    """The calls of libfuse, whose handles are the numbers of nodes.

    A file that is open while it loses its name is given a hidden one by libfuse, which no disk has:
    the server keeps it apart. Where another file takes the name, libfuse renames twice, and here
    that is one change.
    """

    use_ns = True

    def __init__(self, disk: Disk, most_changes: int) -> None:
        self.disk, self.changes = disk, 0
        self.may_fail = threading.Event()
        self._most_changes, self._is_cut = most_changes, False
        self._hidden: dict[str, int] = {}
        self._lost_name: str | None = None  # of the file that was hidden last

    def init(self, path: str) -> None:
        _say(MOUNTED)

    def count(self) -> None:
        if self.changes == self._most_changes and not self._is_cut:
            self._is_cut = True
            _say(CUT)
        self.wait_if_cut()
        self.changes += 1

    def wait_if_cut(self) -> None:
        if self._is_cut:
            self.may_fail.wait()
            raise OSError(errno.EIO, "the power is cut")

    def take_name(self, new: str | None = None) -> None:
        """Take the name away that a hidden file still has, unless a file is renamed to it."""
        name, self._lost_name = self._lost_name, None
        if name is not None and name != new:
            self.disk.remove(name)

    def _find(self, path: str) -> int:
        return self._hidden[path] if path in self._hidden else self.disk.find(path)

    # --- look -------------------------------------------------------------------------------------

    @_call
    def getattr(self, path: str, handle: int | None) -> dict[str, int]:
        number = self._find(path)
        node = self.disk.nodes[number]
        size = len(node.data)
        return {
            "st_ino": number,
            "st_mode": node.mode,
            "st_nlink": 1 + node.is_directory,
            "st_size": size,
            "st_blocks": -(-size // 512),
            **dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), node.changed),
        }

    @_call
    def opendir(self, path: str) -> int:
        return self._find(path)

    @_call
    def readdir(self, path: str, handle: int) -> Iterator[tuple[str, dict[str, int], int]]:
        for name, number in [(".", handle), ("..", handle), *self.disk.listing(handle)]:
            yield name, {"st_ino": number, "st_mode": self.disk.nodes[number].mode}, 0

    @_call
    def read(self, path: str, size: int, start: int, handle: int) -> bytes:
        return bytes(self.disk.nodes[handle].data[start : start + size])

    @_call
    def statfs(self, path: str) -> dict[str, int]:
        blocks = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), _SIZE // _BLOCK)
        return {"f_bsize": _BLOCK, "f_frsize": _BLOCK, "f_namemax": 255, **blocks}

    # --- change -----------------------------------------------------------------------------------

    @_call
    def open(self, path: str, flags: int) -> int:
        if flags & os.O_TRUNC:
            self.truncate(path, 0)
        return self._find(path)

    @_change
    @_call
    def create(self, path: str, mode: int, flags: int) -> int:
        return self.disk.create(path, stat.S_IFREG | stat.S_IMODE(mode))

    @_change
    @_call
    def mkdir(self, path: str, mode: int) -> None:
        self.disk.create(path, stat.S_IFDIR | stat.S_IMODE(mode))

    @_change
    @_call
    def write(self, path: str, data: bytes, start: int, handle: int) -> int:
        self.disk.write(handle, start, data)
        return len(data)

    @_change
    @_call
    def truncate(self, path: str, size: int) -> None:
        self.disk.resize(self._find(path), size)

    @_change
    @_call
    def unlink(self, path: str) -> None:
        if self._hidden.pop(path, None) is None:
            self.disk.remove(path)

    @_change
    @_call
    def rmdir(self, path: str) -> None:
        self._refuse_full(path)
        self.disk.remove(path)

    @_change
    def rename(self, old: str, new: str) -> None:
        self.take_name(new)
        if Path(new).name.startswith(".fuse_hidden"):
            self._hidden[new], self._lost_name = self._find(old), old
            return
        if self.disk.slot(new) in self.disk.names:
            self._refuse_full(new)
        self.disk.rename(old, new)

    def _refuse_full(self, path: str) -> None:
        """Refuse to take a directory away that is not empty."""
        if self.disk.listing(self.disk.find(path)):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    @_change
    @_call
    def fsync(self, path: str, only_data: int, handle: int) -> None:
        self.disk.flush(handle)

    @_change
    @_call
    def fsyncdir(self, path: str, only_data: int, handle: int) -> None:
        self.disk.flush(handle)

    @_call
    def chmod(self, path: str, mode: int) -> None:
        node = self.disk.nodes[self._find(path)]
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)

    @_call
    def chown(self, path: str, user: int, group: int) -> None:
        """Leave everything to root, whose all is."""

    @_call
    def utimens(self, path: str, times: tuple[int, int]) -> None:
        _, changed = times
        if changed != _OMITTED:
            node = self.disk.nodes[self._find(path)]
            node.changed = time.time_ns() if changed == _NOW else changed


def _say(line: bytes) -> None:
    os.write(1, line)


def _listen(place: str, may_fail: threading.Event) -> None:
    """Let calls that wait fail when told to; unmount where nobody is there to tell."""
    while os.read(0, 1024):
        may_fail.set()
    subprocess.run(["umount", "--lazy", place], check=False, stderr=subprocess.DEVNULL)
    os._exit(1)


def main(place: str, image: Path, most_changes: int) -> None:
    """Serve until it is unmounted."""
    server = Server(pickle.loads(image.read_bytes()), most_changes)
    threading.Thread(target=_listen, args=(place, server.may_fail), daemon=True).start()
    mfusepy.FUSE(
        server,
        place,
        foreground=True,
        nothreads=True,
        default_permissions=True,
        use_ino=True,
        fsname="lca-power-cut",
    )
    image.write_bytes(pickle.dumps(server.disk))
    _say(b"%d\n" % server.changes)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
