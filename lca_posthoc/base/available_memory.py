"""Measure the memory this process may still use and the most it has used.

A container or a batch job may limit the process to less than the host has.
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
_LITTLE = 2**23  # bytes; returning less is not worth the time
# From glibc's malloc.h. By default glibc raises both thresholds up to these maxima as it frees
# larger blocks.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TRIM, _MOST_MMAP = 2**26, 2**25


def give_back(freed: int, *, cycles: bool = False) -> None:
    """Return freed memory to the system, if the C library can: it keeps small freed blocks for
    itself.

    Args:
        freed: approximate number of bytes freed; a small amount is ignored, because the search
            takes time.
        cycles: also run the garbage collector first, which finds objects in reference cycles, such
            as models. It takes longer than an evaluation of a small model.
    """
    if freed <= _LITTLE:
        return
    if cycles:
        gc.collect()
    _tell_glibc("malloc_trim", 0)


@contextlib.contextmanager
def freed_at_once(size: int) -> Iterator[None]:
    """Return every freed block of a megabyte or more to the system at once, inside the context.

    No freed block then stays behind between blocks in use. New allocations take longer. With a C
    library other than glibc this does nothing.

    Args:
        size: approximate number of bytes in use; if it is small, nothing changes.
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
    """Call a C library function with some numbers; do nothing if the library lacks it."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(None), function)(*numbers)


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux, read `/proc`: there `getrusage` includes the peak of the parent process.
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
    """Return the free bytes on the host, or in the tightest of this process's control groups if
    that is less.
    """
    return max(0.0, min([float(psutil.virtual_memory().available), *_left_by_groups()]))


def _left_by_groups() -> Iterator[float]:
    """Yield the bytes that each limited control group still allows, not counting cached files as
    used.

    Skip a limit that cannot be read or does not follow the kernel's documentation.

    Source: <https://docs.kernel.org/admin-guide/cgroup-v2.html#memory> and its predecessor,
    cgroup-v1/memory.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        # the name of a group may not be UTF-8
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
    """Yield the bytes left in a group and in each of its parents.

    Inside a container, the container's own group is mounted at the top, whatever the kernel calls
    it outside.
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
    """Return the bytes of cached files, as far as the host reports them."""
    cached = 0
    with contextlib.suppress(OSError, ValueError):
        for line in stat.read_text(errors="surrogateescape").splitlines():
            name, _, count = line.partition(" ")
            if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                cached += int(count)
    return cached
