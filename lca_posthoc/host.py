"""What memory this process may still take of its host, which a container or a job of a batch system may limit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import psutil

OF_PROCESS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Bytes that are free on the host, or in one of the control groups this process is in where that is less."""
    return max(0.0, min([float(psutil.virtual_memory().available), *_left_by_groups()]))


def _left_by_groups() -> Iterator[float]:
    """What each limited control group allows beyond what is used; cached files, which make way, are not counted as used.

    Source: <https://docs.kernel.org/admin-guide/cgroup-v2.html#memory> and its predecessor, cgroup-v1/memory.
    """
    with contextlib.suppress(OSError):
        for line in OF_PROCESS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _left(GROUPS, path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                yield from _left(
                    GROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                )


def _left(top: Path, path: str, limit: str, used: str, cached: str) -> Iterator[float]:
    """Of a group and those around it; inside a container its own is at the top, whatever the kernel calls it outside."""
    here = top / path.lstrip("/")
    for place in (here, *here.parents):
        if place == top.parent:
            return
        with contextlib.suppress(OSError):
            most, taken = (place / limit).read_text().strip(), int((place / used).read_text())
            counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            yield math.inf if most == "max" else int(most) - taken + int(counts.get(cached, 0))
