"""The memory this process may still take of its host, which a container or a job of a batch system
may limit, and the memory it has taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

OF_PROCESS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LITTLE = 2**23  # bytes that are not worth giving back
# of glibc's malloc.h; by itself it raises the thresholds to these as larger blocks are freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TRIM, _MOST_MMAP = 2**26, 2**25


def give_back(freed: int, *, cycles: bool = False) -> None:
    """Give memory that this process has freed back to the system, where its C library can: it
    keeps what is freed in small pieces for itself.

    Args:
        freed: about how many bytes; a little is left to the library, for looking takes time.
        cycles: whether objects that lead back to themselves, as models do, are looked for and
            freed first; that takes longer than an evaluation of a small model.
    """
    if freed <= _LITTLE:
        return
    if cycles:
        gc.collect()
    _tell_glibc("malloc_trim", 0)


@contextlib.contextmanager
def freed_at_once(size: int) -> Iterator[None]:
    """Let every block of a megabyte go back to the system as soon as it is freed, inside the
    context, where the C library can do that: none stays behind between others that are in use.
    New blocks take longer then.

    Args:
        size: about how many bytes are in use; with a little, nothing changes.
    """
    if size <= _LITTLE:
        yield
        return
    _tell_glibc("mallopt", _MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        _tell_glibc("mallopt", _MMAP_THRESHOLD, _MOST_MMAP)
        _tell_glibc("mallopt", _TRIM_THRESHOLD, _MOST_TRIM)


def _tell_glibc(function: str, *numbers: int) -> None:
    """Call a function of the C library's with some numbers; do nothing with another library, which
    has none of that name.
    """
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(None), function)(*numbers)


def peak_memory() -> int:
    """Return the most bytes this process has had in memory at a time.

    Linux says so itself, where `getrusage` counts what the process had that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, size = line.partition(":")
            if name == "VmHWM":
                return int(size.split()[0]) * 1024
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free_memory() -> float:
    """Return the bytes free on the host, or in one of the control groups this process is in where
    that is less.
    """
    return max(0.0, min([float(psutil.virtual_memory().available), *_left_by_groups()]))


def _left_by_groups() -> Iterator[float]:
    """Yield the bytes each limited control group still allows; cached files, which make way, are
    not counted as used.

    A limit that cannot be read, or is not as the kernel describes it, is left out.

    Source: <https://docs.kernel.org/admin-guide/cgroup-v2.html#memory> and its predecessor,
    cgroup-v1/memory.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        # a group's name need not be UTF-8
        lines = os.fsdecode(OF_PROCESS.read_bytes()).splitlines()
    for line in lines:
        with contextlib.suppress(ValueError):
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left(GROUPS, path, "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                yield from _left(
                    GROUPS / "memory",
                    path,
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_",
                )


def _left(top: Path, path: str, limit: str, used: str, prefix: str) -> Iterator[float]:
    """Yield the bytes left of a group and of those around it.

    Inside a container its own group is at the top, whatever the kernel calls it outside.
    """
    group = top / path.lstrip("/")
    for place in (group, *group.parents):
        if place == top.parent:
            return
        with contextlib.suppress(OSError, ValueError):
            most, in_use = (place / limit).read_text().strip(), int((place / used).read_text())
            if most != "max":
                yield int(most) - max(0, in_use - _cached(place / "memory.stat", prefix))


def _cached(stat: Path, prefix: str) -> int:
    """Return the bytes of cached files, as far as the host states them."""
    cached = 0
    with contextlib.suppress(OSError, ValueError):
        for line in stat.read_text(errors="surrogateescape").splitlines():
            name, _, count = line.partition(" ")
            if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                cached += int(count)
    return cached
