"""One driver for one run: the kernel's lock on this host, a heartbeat between hosts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..base.locks import can_lock
from ..errors import LCAError, ResourceError
from . import disk
from .files import refuse_links_below

_HEARTBEAT = 10.0
_STALE = 120.0
_LOCK_BYTES = 4096  # bytes of a lock that are read
_FILE = "lock"


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
def hold(run: Path, *, durable: bool = True) -> Iterator[Held]:
    """Lock a run for the length of the context.

    Args:
        run: the run.
        durable: whether it is on disk that this process works on the run, so that what it did not
            finish is known for that after a power failure.

    Raises:
        ResourceError: where another driver works on this run, or nothing here could keep one away.
        LCAError: where the lock or a directory of the run is a link.
    """
    if not can_lock():
        raise ResourceError(
            "runs are computed on Linux (on Windows: in WSL), whose locks keep two drivers from "
            "one run. Recording and reading results work here."
        )
    refuse_links_below(run)
    with _open(run, create=True) as file:
        owner = _acquire(run, file)
        identity = _identity()
        _write(file, identity, durable)
        if durable:
            disk.flush_names(run)
        holding = Held(bool(owner))
        try:
            with _beating(run, identity, holding.lost):
                yield holding
        finally:
            if _owner(file) == identity:
                _write(file, {"unclean": True} if holding.working else {}, durable)


def is_held(run: Path) -> bool:
    """Tell whether a driver works on the run now; where there are no locks, by its heartbeat
    alone.
    """
    try:
        file = _open(run)
    except FileNotFoundError:
        return False
    with file:
        try:
            is_locked, owner = file.acquire(shared=True), _owner(file)
        except BlockingIOError:
            return True
        return (_is_elsewhere(owner) or (bool(owner) and not is_locked)) and _is_fresh(file)


def is_unreleased(run: Path) -> bool:
    """Tell whether a driver works on the run, or was killed while it did."""
    try:
        return disk.state(run / _FILE, follow_links=False).size > 0
    except FileNotFoundError:
        return False


def _open(run: Path, *, create: bool = False) -> disk.LockFile:
    try:
        return disk.LockFile(run / _FILE, create=create)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise LCAError(
            f"{run / _FILE} is a link, and a run's lock never is. Remove it and run again."
        ) from None


def _acquire(run: Path, file: disk.LockFile) -> dict[str, object]:
    """Take the lock, and return who had it and did not release it.

    Raises:
        ResourceError: where another driver has it, or the file system has no locks.
    """
    try:
        is_locked = file.acquire()
    except BlockingIOError:
        raise ResourceError(_busy(run, _owner(file))) from None
    if not is_locked:
        raise ResourceError(
            f"the file system of {run} has no locks, which keep two drivers from one run. Write "
            "the run elsewhere with --out."
        )
    owner = _owner(file)
    if _is_elsewhere(owner) and _is_fresh(file):
        raise ResourceError(_busy(run, owner))
    return owner


def _identity() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}


def _owner(file: disk.LockFile) -> dict[str, object]:
    """Return who has the lock: nobody where it is empty; where it cannot be read, a driver of this
    host that was killed.
    """
    try:
        owner = json.loads(file.read(_LOCK_BYTES) or b"{}")
    except ValueError:
        return {"host": socket.gethostname()}
    return owner if isinstance(owner, dict) else {"host": socket.gethostname()}


def _is_elsewhere(owner: dict[str, object]) -> bool:
    return owner.get("host") not in (None, socket.gethostname())


def _is_fresh(file: disk.LockFile) -> bool:
    return file.age() < _STALE


def _write(file: disk.LockFile, owner: dict[str, object], durable: bool) -> None:
    file.write(json.dumps(owner).encode() if owner else b"", durable=durable)


@contextlib.contextmanager
def _beating(run: Path, identity: dict[str, object], lost: threading.Event) -> Iterator[None]:
    """Give signs of life for the length of the context, from a thread of its own."""
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(run, identity, lost, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()


def _beat(
    run: Path, identity: dict[str, object], lost: threading.Event, stop: threading.Event
) -> None:
    while not stop.wait(_HEARTBEAT):
        with contextlib.suppress(OSError):
            if not _names(run, identity):
                lost.set()
                return
            disk.beat(run / _FILE)


def _names(run: Path, identity: dict[str, object]) -> bool:
    """Tell whether the lock still names this driver; it is opened afresh, so that a change by
    another host is seen.
    """
    try:
        file = _open(run)
    except (FileNotFoundError, LCAError):
        return False
    with file:
        return _owner(file) == identity


def _busy(run: Path, owner: dict[str, object]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return (
        f"{run} is being written by {who}. Wait for it to end, or stop it; two drivers never share "
        "a run."
    )
