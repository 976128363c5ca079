"""One driver for one run: the kernel's lock on this host, a heartbeat between hosts.

In an object store, which has no kernel's lock, a driver replaces the lock's bytes only where they
still are those it has read, so that of two drivers one is refused; whether the owner it names still
runs is told by its process on this host, by its heartbeat elsewhere.
"""

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

import psutil

from ..errors import LCAError, ResourceError
from . import disk
from .files import refuse_links_below
from .home import LockFile

_HEARTBEAT = 10.0
_STALE = 120.0
_LOCK_BYTES = 4096  # bytes of a lock that are read
_FILE = "lock"
_HELD = set[str]()  # ids of the locks that this process has


@dataclass
class Held:
    """The lock of a run, while this process has it.

    `unclean` is true while temporary files may lie in the run: the last owner was killed, or the
    power went, or workers write. Whoever sweeps the run, or lets workers write, sets it; what is
    unclean when this process releases the lock is unclean for the next one. `lost` is set where
    this process was suspended for so long that a driver on another host took the run over.
    """

    unclean: bool
    lost: threading.Event = field(default_factory=threading.Event)


def require_lock(run: Path) -> None:
    """Check that drivers can be kept apart where a run is to be.

    Raises:
        ResourceError: where they cannot, or the place cannot be written to.
    """
    disk.check_promises(run)
    if not disk.can_lock(run):
        raise ResourceError(
            "runs are computed on Linux (on Windows: in WSL), whose locks keep two drivers from "
            "one run. Recording and reading results work here."
        )


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
    require_lock(run)
    refuse_links_below(run)
    with _open(run, create=True) as file:
        owner = _acquire(run, file)
        identity = _identity()
        try:
            _write(file, identity, durable)
        except BlockingIOError:  # another driver was faster
            raise ResourceError(_busy(run, _owner(file))) from None
        if durable:
            disk.flush_names(run)
        holding = Held(bool(owner))
        _HELD.add(str(identity["id"]))
        try:
            with _beating(run, identity, holding.lost):
                yield holding
        finally:
            _HELD.discard(str(identity["id"]))
            # what cannot be released is taken over, as that of a driver that was killed
            with contextlib.suppress(OSError):
                if _owner(file) == identity:
                    _write(file, {"unclean": True} if holding.unclean else {}, durable)


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
            is_locked = file.acquire(shared=True)
        except BlockingIOError:
            return True
        return _works(file, _owner(file), is_locked)


def has_kernel_lock(run: Path) -> bool:
    """Tell whether the kernel keeps two drivers on this host from a run that is there; elsewhere
    only its bytes do.
    """
    try:
        file = _open(run)
    except FileNotFoundError:
        return False
    with file:
        try:
            return file.acquire(shared=True)
        except BlockingIOError:
            return True


def is_unreleased(run: Path) -> bool:
    """Tell whether a driver works on the run, or was killed while it did."""
    try:
        return disk.state(run / _FILE, follow_links=False).size > 0
    except FileNotFoundError:
        return False


def _open(run: Path, *, create: bool = False) -> LockFile:
    try:
        return disk.open_lock(run / _FILE, create=create)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise LCAError(
            f"{run / _FILE} is a link, and a run's lock never is. Remove it and run again."
        ) from None


def _acquire(run: Path, file: LockFile) -> dict[str, object]:
    """Take the lock, and return who had it and did not release it.

    Raises:
        ResourceError: where another driver has it, or the file system has no locks.
    """
    try:
        is_locked = file.acquire()
    except BlockingIOError:
        raise ResourceError(_busy(run, _owner(file))) from None
    if file.is_of_kernel and not is_locked:
        raise ResourceError(
            f"the file system of {run} has no locks, which keep two drivers from one run. Write "
            "the run elsewhere with --out."
        )
    owner = _owner(file)
    if _works(file, owner, is_locked):
        raise ResourceError(_busy(run, owner))
    return owner


def _identity() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "id": uuid.uuid4().hex,
        "began": psutil.Process().create_time(),
        "processes": _processes(),
    }


def _processes() -> str:
    """Return a name of the processes that this one can see: those of this host since it was
    started, or those of its container.
    """
    try:
        boot = disk.read(Path("/proc/sys/kernel/random/boot_id")).decode().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return f"{uuid.getnode():x}"


def _owner(file: LockFile) -> dict[str, object]:
    """Return who has the lock: nobody where it is empty; where it cannot be read, a driver of this
    host that was killed.
    """
    try:
        owner = json.loads(file.read(_LOCK_BYTES) or b"{}")
    except ValueError:
        return {"host": socket.gethostname()}
    return owner if isinstance(owner, dict) else {"host": socket.gethostname()}


def _works(file: LockFile, owner: dict[str, object], is_locked: bool) -> bool:
    """Tell whether the owner that a lock names still works; the kernel has not refused the lock.

    Args:
        file: of the lock.
        owner: whom its bytes name.
        is_locked: whether this process has the kernel's lock, which a driver of this host would
            have kept.
    """
    if owner.get("host") is None:
        return False
    if owner["host"] == socket.gethostname() and (is_locked or _is_seen(owner)):
        return not is_locked and _runs(owner)
    return file.age() < _STALE


def _is_seen(owner: dict[str, object]) -> bool:
    """Tell whether an owner of this host's name is a process that this one would see."""
    return owner.get("processes") in (None, _processes())


def _runs(owner: dict[str, object]) -> bool:
    """Tell whether the process of an owner runs; another one may have got its number since."""
    pid, began = owner.get("pid"), owner.get("began")
    if not isinstance(pid, int) or not isinstance(began, float):
        return False
    if pid == os.getpid():
        return owner.get("id") in _HELD
    try:
        return bool(abs(psutil.Process(pid).create_time() - began) < 1)
    except (psutil.Error, ValueError):
        return False


def _write(file: LockFile, owner: dict[str, object], durable: bool) -> None:
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
            if not _still_ours(run, identity):
                lost.set()
                return


def _still_ours(run: Path, identity: dict[str, object]) -> bool:
    """Give a sign of life; return False where the lock names this driver no more. It is opened
    afresh, so that a change by another host is seen.
    """
    try:
        file = _open(run)
    except (FileNotFoundError, LCAError):
        return False
    with file:
        if _owner(file) != identity:
            return False
        file.beat()
    return True


def _busy(run: Path, owner: dict[str, object]) -> str:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    return (
        f"{run} is being written by {who}. Wait for it to end, or stop it; two drivers never share "
        "a run."
    )
