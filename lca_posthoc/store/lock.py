"""One driver for one run: the kernel's lock on this host, a heartbeat between hosts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import ResourceError

_HEARTBEAT = 10.0
_STALE = 120.0


@contextlib.contextmanager
def hold(run: Path) -> Iterator[bool]:
    """Hold the run's lock; yields whether its last owner left without releasing it (killed, or the power went).

    Raises:
        ResourceError: where another driver works on this run.
    """
    with (run / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(_busy(run, _owner(run))) from None
        owner = _owner(run)
        fresh = time.time() - (run / "lock").stat().st_mtime < _STALE
        if owner.get("host") not in (None, socket.gethostname()) and fresh:
            raise ResourceError(_busy(run, owner))
        _write(file.fileno(), {"host": socket.gethostname(), "pid": os.getpid()})
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(run / "lock", stop), daemon=True)
        beat.start()
        try:
            yield bool(owner)
        finally:
            stop.set()
            beat.join()
            _write(file.fileno(), {})


def is_held(run: Path) -> bool:
    """Whether a driver works on the run now."""
    try:
        with (run / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            owner = _owner(run)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    fresh = time.time() - (run / "lock").stat().st_mtime < _STALE
    return owner.get("host") not in (None, socket.gethostname()) and fresh


def _owner(run: Path) -> dict[str, object]:
    try:
        owner = json.loads((run / "lock").read_text() or "{}")
    except (OSError, ValueError):
        return {"host": socket.gethostname()}
    return owner if isinstance(owner, dict) else {}


def _write(descriptor: int, owner: dict[str, object]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode() if owner else b"", 0)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _busy(run: Path, owner: dict[str, object]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return f"{run} is being written by {who}. Wait for it to end, or stop it; two drivers never share a run."
