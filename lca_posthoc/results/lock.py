"""Keep two drivers off one run: a kernel lock on one host, a heartbeat between hosts.

An object store has no kernel lock. There a driver replaces the lock's bytes only if they are still
those it has read, so that one of two drivers fails. Whether the named owner still runs is decided
by its process on this host, or by its heartbeat on others.
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
_LOCK_BYTES = 4096  # bytes read of a lock
_FILE = "lock"
_HELD = set[str]()  # ids of the locks this process holds


@dataclass
class Held:
    """The lock of a run, while this process holds it.

    `unclean` is true while temporary files may lie in the run: the last owner was killed, or the
    power failed, or workers write. Whoever cleans the run, or lets workers write, sets it; its
    value at release passes to the next owner. `lost` is set if this process was suspended for so
    long that a driver on another host took the run over.
    """

    unclean: bool
    lost: threading.Event = field(default_factory=threading.Event)


def require_lock(run: Path) -> None:
    """Check that two drivers can be kept off a run at a path.

    Raises:
        ResourceError: if they cannot, or the path is not writable.
    """
    disk.check_promises(run)
    if not disk.can_lock(run):
        raise ResourceError(
            "runs need Linux (on Windows: WSL), whose locks keep two drivers off "
            "one run. Recording and reading results work here."
        )


@contextlib.contextmanager
def hold(run: Path, *, durable: bool = True) -> Iterator[Held]:
    """Lock a run for the length of the context.

    Args:
        run: the run.
        durable: whether to record on disk that this process works on the run, so that unfinished
            work is known after a power failure.

    Raises:
        ResourceError: if another driver works on this run, or there is no lock that could keep one
            off.
        LCAError: if the lock or a directory of the run is a link.
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
            # another driver takes over an unreleased lock, as that of a killed driver
            with contextlib.suppress(OSError):
                if _owner(file) == identity:
                    _write(file, {"unclean": True} if holding.unclean else {}, durable)


def is_held(run: Path) -> bool:
    """Tell whether a driver works on the run now; without kernel locks, by its heartbeat alone."""
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
    """Tell whether a kernel lock keeps two drivers on this host off an existing run; elsewhere only
    its bytes do.
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
            f"{run / _FILE} is a link, but a run's lock must be a file. Remove it and run again."
        ) from None


def _acquire(run: Path, file: LockFile) -> dict[str, object]:
    """Take the lock; return its last owner if that did not release it.

    Raises:
        ResourceError: if another driver has it, or the file system has no locks.
    """
    try:
        is_locked = file.acquire()
    except BlockingIOError:
        raise ResourceError(_busy(run, _owner(file))) from None
    if file.is_of_kernel and not is_locked:
        raise ResourceError(
            f"the file system of {run} has no locks to keep two drivers off one run. Write "
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
    """Return a name for the set of processes visible here: those of this host since boot, or of its
    container.
    """
    try:
        boot = disk.read(Path("/proc/sys/kernel/random/boot_id")).decode().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return f"{uuid.getnode():x}"


def _owner(file: LockFile) -> dict[str, object]:
    """Return the owner that the lock names: none if it is empty, a killed driver of this host if it
    is unreadable.
    """
    try:
        owner = json.loads(file.read(_LOCK_BYTES) or b"{}")
    except ValueError:
        return {"host": socket.gethostname()}
    return owner if isinstance(owner, dict) else {"host": socket.gethostname()}


def _works(file: LockFile, owner: dict[str, object], is_locked: bool) -> bool:
    """Tell whether the owner that a lock names still works, if the kernel has not rejected the
    lock.

    Args:
        file: of the lock.
        owner: whom its bytes name.
        is_locked: whether this process has the kernel lock, which a working driver of this host
            would hold.
    """
    if owner.get("host") is None:
        return False
    if owner["host"] == socket.gethostname() and (is_locked or _is_seen(owner)):
        return not is_locked and _runs(owner)
    return file.age() < _STALE


def _is_seen(owner: dict[str, object]) -> bool:
    """Tell whether an owner on a host of this name is a process visible here."""
    return owner.get("processes") in (None, _processes())


def _runs(owner: dict[str, object]) -> bool:
    """Tell whether the process of an owner runs, and not another one that got its number since."""
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
    """Send heartbeats for the length of the context, from a thread."""
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
    """Send a heartbeat; return False if the lock no longer names this driver.

    The lock is opened anew to see changes by other hosts.
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
