"""One driver for one run: the kernel's lock on this host, a heartbeat between hosts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LCAError, ResourceError
from ..locks import can_lock, lock
from .files import refuse_links_below

_HEARTBEAT = 10.0
_STALE = 120.0
_MOST = 4096  # bytes of a lock that are read
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)  # Windows has neither


@dataclass
class Held:
    """The lock of a run, while this process has it.

    `unclean` is true where its last owner did not release it: it was killed, or stopped while it
    was `working`, or the power went. `lost` is set where this process was suspended for so long
    that a driver on another host took the run over.
    """

    unclean: bool
    lost: threading.Event = field(default_factory=threading.Event)
    working: bool = False


@contextlib.contextmanager
def hold(run: Path) -> Iterator[Held]:
    """Lock a run for the length of the context.

    Raises:
        ResourceError: where another driver works on this run, or nothing here could keep one away.
        LCAError: where the lock or a directory of the run is a link.
    """
    if not can_lock():
        raise ResourceError(
            "runs are computed on Linux (on Windows: in WSL), whose locks keep two drivers from "
            "one run. Recording and reading results "
            "work here."
        )
    refuse_links_below(run)
    descriptor = _open(run, os.O_RDWR | os.O_CREAT)
    try:
        try:
            is_locked = lock(descriptor)
        except BlockingIOError:
            raise ResourceError(_busy(run, _owner(descriptor))) from None
        if not is_locked:
            raise ResourceError(
                f"the file system of {run} has no locks, which keep two drivers from one run. "
                f"Write the run elsewhere with --out."
            )
        owner = _owner(descriptor)
        if _is_elsewhere(owner) and _is_fresh(descriptor):
            raise ResourceError(_busy(run, owner))
        identity: dict[str, object] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "id": uuid.uuid4().hex,
        }
        _write(descriptor, identity)
        holding, stop = Held(bool(owner)), threading.Event()
        beat = threading.Thread(target=_beat, args=(run, identity, holding.lost, stop), daemon=True)
        beat.start()
        try:
            yield holding
        finally:
            stop.set()
            beat.join()
            if _owner(descriptor) == identity:
                _write(descriptor, {"unclean": True} if holding.working else {})
    finally:
        os.close(descriptor)


def is_held(run: Path) -> bool:
    """Tell whether a driver works on the run now; where there are no locks, by its heartbeat
    alone.
    """
    try:
        descriptor = _open(run, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        is_locked, owner = lock(descriptor, shared=True), _owner(descriptor)
        return (_is_elsewhere(owner) or (bool(owner) and not is_locked)) and _is_fresh(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def is_unreleased(run: Path) -> bool:
    """Tell whether a driver works on the run, or was killed while it did."""
    try:
        return (run / "lock").lstat().st_size > 0
    except FileNotFoundError:
        return False


def _open(run: Path, flags: int) -> int:
    try:
        return os.open(run / "lock", flags | _FLAGS, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise LCAError(
            f"{run / 'lock'} is a link, and a run's lock never is. Remove it and run again."
        ) from None


def _owner(descriptor: int) -> dict[str, object]:
    """Return who has the lock: nobody where it is empty; where it cannot be read, a driver of this
    host that was killed.
    """
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        owner = json.loads(os.read(descriptor, _MOST) or b"{}")
    except ValueError:
        return {"host": socket.gethostname()}
    return owner if isinstance(owner, dict) else {"host": socket.gethostname()}


def _is_elsewhere(owner: dict[str, object]) -> bool:
    return owner.get("host") not in (None, socket.gethostname())


def _is_fresh(descriptor: int) -> bool:
    return time.time() - os.fstat(descriptor).st_mtime < _STALE


def _write(descriptor: int, owner: dict[str, object]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode() if owner else b"", 0)


def _beat(
    run: Path, identity: dict[str, object], lost: threading.Event, stop: threading.Event
) -> None:
    while not stop.wait(_HEARTBEAT):
        with contextlib.suppress(OSError):
            if not _names(run, identity):
                lost.set()
                return
            os.utime(run / "lock")


def _names(run: Path, identity: dict[str, object]) -> bool:
    """Tell whether the lock still names this driver; it is opened afresh, so that a change by
    another host is seen.
    """
    try:
        descriptor = _open(run, os.O_RDONLY)
    except (FileNotFoundError, LCAError):
        return False
    try:
        return _owner(descriptor) == identity
    finally:
        os.close(descriptor)


def _busy(run: Path, owner: dict[str, object]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return (
        f"{run} is being written by {who}. Wait for it to end, or stop it; two drivers never share "
        f"a run."
    )
