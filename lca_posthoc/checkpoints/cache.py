"""Keep remote files on the local disk within a size limit; delete the least recently used first.

The cache lies in `$LCA_CACHE`, else in `lca_posthoc` below `$XDG_CACHE_HOME` or `~/.cache`. It
takes at most `$LCA_CACHE_SIZE` bytes, including files still being written. Any number of processes
share it. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from ..base.locks import alone_in
from ..errors import InputError

DIRECTORY, SIZE = "LCA_CACHE", "LCA_CACHE_SIZE"
DEFAULT_SIZE = 20 * 10**9
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SEAL = 4  # bytes of the checksum that follows a file's own bytes
_STALE = 3600.0  # seconds since the last write, after which an unfinished file is abandoned
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Cache:
    """Manage a directory of fetched files, of at most `size` bytes together."""

    directory: Path
    size: int

    def take(self, name: str, key: int, fetch: Callable[[], bytes]) -> bytes:
        """Return a whole file from the cache; on a miss, fetch it and add it if it fits.

        Args:
            name: address of the file.
            key: fingerprint of the file when it was last inspected.
            fetch: reads the file from its origin.
        """
        copy = self.directory / hashlib.sha256(f"{name}\0{key}".encode()).hexdigest()
        with contextlib.suppress(OSError):  # not cached yet, or just removed by another process
            stored = copy.read_bytes()
            data, seal = stored[:-_SEAL], stored[-_SEAL:]
            if _sealed(data) == seal:
                os.utime(copy)
                return data
            copy.unlink()  # incomplete, as after a power failure
        data = fetch()
        # a cache that cannot be written only saves no time
        with contextlib.suppress(OSError):
            self._add(copy, data)
        return data

    def _add(self, copy: Path, data: bytes) -> None:
        if len(data) + _SEAL > self.size:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            with alone_in(self.directory):
                if copy.exists() or not self._make_room(len(data) + _SEAL):
                    return
                with temporary.open("wb") as file:  # reserve the full size, for others to count
                    file.truncate(len(data) + _SEAL)
            with temporary.open("r+b") as file:
                file.write(data)
                file.write(_sealed(data))
            with alone_in(self.directory):
                temporary.replace(copy)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> bool:
        """Remove the least recently used files until `needed` bytes fit; return whether they do."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        oldest_write = time.time() - _STALE
        for last, size, path in files:
            is_unfinished = path.name.endswith(_UNFINISHED)
            is_stale = is_unfinished and last < oldest_write
            if is_stale or (not is_unfinished and total + needed > self.size):
                path.unlink(missing_ok=True)
                total -= size
        return total + needed <= self.size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of last use, the size and the path of each file."""
        for entry in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):  # another process gave up writing it
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield status.st_mtime, status.st_size, Path(entry.path)


def _sealed(data: bytes) -> bytes:
    checksum: int = google_crc32c.value(data)
    return checksum.to_bytes(_SEAL, "big")


def cache() -> Cache | None:
    """Return the cache of this machine; None if its size is 0 or there is no home directory.

    Raises:
        InputError: if `$LCA_CACHE_SIZE` is not a number of bytes.
    """
    size, directory = _size(), _directory()
    return Cache(directory, size) if size and directory is not None else None


def _size() -> int:
    text = os.environ.get(SIZE, "")
    if not text:
        return DEFAULT_SIZE
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise InputError(
            f"${SIZE} is {text!r}, which is not a number of bytes. Write 50GB, for example, or 0 to "
            "keep nothing."
        )
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _directory() -> Path | None:
    if directory := os.environ.get(DIRECTORY):
        return Path(directory)
    if directory := os.environ.get("XDG_CACHE_HOME"):
        return Path(directory) / "lca_posthoc"
    try:
        return Path("~/.cache").expanduser() / "lca_posthoc"
    except RuntimeError:
        return None
