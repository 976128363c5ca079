"""Implement the operations of `disk` in an object store, by obstore: S3 and compatible stores,
Google's and Microsoft's stores, and the process's own memory.

One put writes a file whole or not at all, so nothing is renamed, and no temporary names are left.
Directories do not exist by themselves. Conditional puts keep drivers apart: one kind creates a
missing file, the other replaces a file that has not changed since it was read. A request may fail
after the store has executed it, or arrive twice; the stored bytes are then compared with the
intended ones.

Credentials and addresses come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
`GOOGLE_SERVICE_ACCOUNT`, …) and from AWS profiles, if boto3 is installed. They are never written
anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import obstore
import psutil
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import from_url

from ..errors import ResourceError
from .home import State

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import ObjectStore, RetryConfig, S3CredentialProvider

_BLOCK = 2**22  # bytes read at a time
_AT_A_TIME = 16  # simultaneous requests
_LINES = 2**18  # bytes of a part of a log
_ATTEMPTS = 3  # attempts to write, if the store does not answer
_RETRIES, _RETRY_FOR = 8, timedelta(seconds=90)  # of a request, by obstore
_TRIAL, _OLD = ".trial-", 3600.0  # prefix of a name; seconds after which nobody needs the file
_FOUND_OUT: list[ObjectStore] = []  # stores that passed the tests


def can_lock() -> bool:
    """Return True: `check_promises` tests whether drivers can be kept apart."""
    return True


# --- where ----------------------------------------------------------------------------------------


@functools.lru_cache
def _store(root: str) -> ObjectStore:
    """Return the store with a root, such as `s3://bucket`.

    Raises:
        ResourceError: if obstore rejects the root.
    """
    retries: RetryConfig = {"max_retries": _RETRIES, "retry_timeout": _RETRY_FOR}
    try:
        profile = _profile() if root.startswith("s3://") else None
        if profile is not None:
            return from_url(root, retry_config=retries, credential_provider=profile)
        return from_url(root, retry_config=retries)
    except Exception as error:  # obstore's own errors, none of which is an OSError
        raise ResourceError(f"{root}: {_said(error)}") from None


def _profile() -> S3CredentialProvider | None:
    """Return a provider of credentials from AWS profiles, if boto3 reads them and the environment
    names none.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return None
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    session = Session()
    return None if session.get_credentials() is None else Boto3CredentialProvider(session)


def _place(path: Path) -> tuple[ObjectStore, str]:
    """Return the store of a path, and its key there."""
    url = str(path)
    protocol, _, rest = url.partition("://")
    if protocol == "memory":  # memory has no buckets
        return _store("memory:///"), rest.strip("/")
    bucket, _, key = rest.partition("/")
    return _store(f"{protocol}://{bucket}"), key.strip("/")


@contextlib.contextmanager
def _reached(path: Path) -> Iterator[None]:
    """Turn every error of the store into an `OSError`.

    Raises:
        OSError: for any error of the store.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # a missing file
            raise type(error)(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise
    except Exception as error:
        if not isinstance(error, BaseError):
            raise
        raise OSError(errno.EIO, _said(error), str(path)) from None


def _said(error: Exception) -> str:
    """Return the first line of an error, without repetitions of its cause."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {text[:300]}"


def _put(path: Path, data: bytes) -> None:
    """Write or replace a file, retrying if the store does not answer.

    Raises:
        OSError: if the store rejects it.
    """
    store, key = _place(path)
    for attempt in range(_ATTEMPTS):
        try:
            with _reached(path):
                obstore.put(store, key, data)
        except OSError as error:
            if error.errno != errno.EIO or attempt == _ATTEMPTS - 1:
                raise
        else:
            return


def _put_where(path: Path, data: bytes, unchanged: UpdateVersion | None) -> bool:
    """Write a file if it is unchanged since it was read, or still missing if `unchanged` is None;
    otherwise return False and change nothing.

    Raises:
        OSError: if the store rejects it.
    """
    store, key = _place(path)
    try:
        obstore.put(store, key, data, mode=unchanged or "create", use_multipart=False)
    except (AlreadyExistsError, PreconditionError):
        return _is(path, data)
    except FileNotFoundError as error:
        if unchanged is not None:
            return False
        raise OSError(errno.ENOENT, _said(error), str(path)) from None  # no such bucket
    except BaseError as error:
        if _is(path, data):
            return True
        raise OSError(errno.EIO, _said(error), str(path)) from None
    return True


def _is(path: Path, data: bytes) -> bool:
    """Tell whether a file holds these bytes, which means that a failed request was executed."""
    try:
        return read(path) == data
    except FileNotFoundError:
        return False


def _version(meta: ObjectMeta) -> UpdateVersion:
    """Return the version of a file for conditional puts: AWS compares the ETag, Google the
    generation.
    """
    version: UpdateVersion = {}
    if meta["e_tag"] is not None:
        version["e_tag"] = meta["e_tag"]
    if meta["version"] is not None:
        version["version"] = meta["version"]
    return version


def _meta(path: Path) -> ObjectMeta:
    store, key = _place(path)
    with _reached(path):
        return obstore.head(store, key)


def _below(directory: Path) -> list[str]:
    """Return the keys of all files below a directory, including its own."""
    store, key = _place(directory)
    with _reached(directory):
        files = obstore.list(store, key).collect()
    return sorted(str(file["path"]).removeprefix(key).lstrip("/") for file in files)


def _has_files(directory: Path) -> bool:
    store, key = _place(directory)
    with _reached(directory):
        return any(obstore.list(store, key, chunk_size=1))


# --- guarantees -------------------------------------------------------------------------


def check_promises(run: Path) -> None:
    """Test conditional puts, reading after writing, and listing, once for each store.

    Args:
        run: its place.

    Raises:
        ResourceError: if the store breaks a guarantee, or cannot be written to.
    """
    store, _ = _place(run)
    _sweep_trials(run / "log")
    if store in _FOUND_OUT:
        return
    trial = run / "log" / _trial_name()
    try:
        broken = next(_broken(trial), None)
    except OSError as error:
        raise ResourceError(
            f"cannot write to {run}: {error.strerror}. Name another place with --out, or provide "
            "credentials and address of the store."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            remove(trial)
    if broken is not None:
        raise ResourceError(
            f"the store of {run} {broken}, but results rely on this: two drivers could write one run, "
            "or lose what they wrote. Write the run elsewhere with --out."
        )
    _FOUND_OUT.append(store)


def _trial_name() -> str:
    """Return a name for a temporary file that identifies its owner."""
    return f"{_TRIAL}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _sweep_trials(directory: Path) -> None:
    """Remove temporary files of killed processes: of this host by their number, of others by age."""
    for name in names(directory):
        if name.startswith(_TRIAL):
            host, pid, _ = name.removeprefix(_TRIAL).rsplit("-", 2)
            is_own = host == socket.gethostname()
            with contextlib.suppress(OSError):
                changed = _meta(directory / name)["last_modified"].timestamp()
                if not psutil.pid_exists(int(pid)) if is_own else time.time() - changed > _OLD:
                    remove(directory / name)


def _broken(trial: Path) -> Iterator[str]:
    """Yield the guarantees that a store breaks, in words."""
    first, second, third = (uuid.uuid4().hex.encode() for _ in range(3))
    try:
        if not _put_where(trial, first, None):
            yield "does not create a missing file"
        if _put_where(trial, second, None):
            yield "overwrites an existing file (it ignores If-None-Match)"
        if read(trial) != first:
            yield "does not return what was just written"
        before = _version(_meta(trial))
        if not _put_where(trial, second, before) or read(trial) != second:
            yield "does not replace a file that has not changed"
        if _put_where(trial, third, before):
            yield "replaces a file that has changed (it ignores If-Match)"
        if trial.name not in names(trial.parent):
            yield "does not list a file that was just written"
        remove(trial)
        if trial.name in names(trial.parent) or sizes([trial]) != [None]:
            yield "still has a file that was just removed"
    except NotImplementedError:
        yield "has no conditional puts"


# --- look -----------------------------------------------------------------------------------------


def state(path: Path, *, follow_links: bool = True) -> State:
    """Return the state of a file, or of a common prefix of names.

    Args:
        path: to look at.
        follow_links: unused; object stores have no links.

    Raises:
        FileNotFoundError: if nothing exists there.
    """
    try:
        meta = _meta(path)
    except FileNotFoundError:
        if not _has_files(path):
            raise
        return State(kind="directory", size=0, changed=0.0, version=())
    return State(
        kind="file",
        size=meta["size"],
        changed=meta["last_modified"].timestamp(),
        version=(meta["e_tag"] or "", meta["version"] or "", meta["last_modified"].isoformat()),
    )


def sizes(paths: Sequence[Path]) -> list[int | None]:
    """Return the bytes of each file, with several requests at a time; None for a missing one."""
    if len(paths) == 1:
        return [_size(paths[0])]
    with ThreadPoolExecutor(_AT_A_TIME, "lca-ask") as threads:
        return [*threads.map(_size, paths)]


def _size(path: Path) -> int | None:
    try:
        return _meta(path)["size"]
    except FileNotFoundError:
        return None


def names(directory: Path) -> list[str]:
    """Return the names in a directory; none if it cannot be listed."""
    try:
        store, key = _place(directory)
        with _reached(directory):
            listed = obstore.list_with_delimiter(store, key)
    except OSError:
        return []
    paths = [*listed["common_prefixes"], *(each["path"] for each in listed["objects"])]
    return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)


def free_space(path: Path) -> None:
    """Return None: a store reports no limit."""


def walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every directory below one, and itself, from one listing of all files."""
    tree: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}
    for key in _below(directory):
        *above, name = key.split("/")
        for depth, part in enumerate(above):
            tree["/".join(above[:depth])][0].add(part)
            tree.setdefault("/".join(above[: depth + 1]), (set(), []))
        tree["/".join(above)][1].append(name)
    waiting = [""]
    while waiting:
        place = waiting.pop()
        directories, files = sorted(tree[place][0]), tree[place][1]
        yield directory / place if place else directory, directories, files
        waiting += [f"{place}/{name}".lstrip("/") for name in reversed(directories)]


# --- read -----------------------------------------------------------------------------------------


def read(path: Path, most: int = -1) -> bytes:
    """Return the bytes of a file, or its first `most`.

    Args:
        path: of the file.
        most: bytes to read; -1 for all.
    """
    store, key = _place(path)
    with _reached(path):
        answer = obstore.get(store, key)
        if not 0 <= most < answer.meta["size"]:
            return bytes(answer.bytes())
    return read_part(path, 0, most)


def read_part(path: Path, start: int, size: int) -> bytes:
    """Return a part of a file, shorter where the file ends before.

    Args:
        path: of the file.
        start: offset of the first byte.
        size: bytes to read.

    Raises:
        FileNotFoundError: if it is missing.
        OSError: if it cannot be read.
    """
    if size == 0:
        return b""
    store, key = _place(path)
    try:
        with _reached(path):
            return bytes(obstore.get(store, key, options={"range": (start, start + size)}).bytes())
    except FileNotFoundError:
        raise
    except OSError:  # stores reject a range that begins behind the end
        if _meta(path)["size"] > start:
            raise
        return b""


def blocks(path: Path, *, flush: bool = False) -> Iterator[bytes]:
    """Yield the bytes of a file, a block at a time.

    Args:
        path: of the file.
        flush: unused; accepted files are durable.
    """
    store, key = _place(path)
    with _reached(path):
        for block in obstore.get(store, key).stream(min_chunk_size=_BLOCK):
            yield bytes(block)


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of all parts of a log, the last one first."""
    parts = [name for name in names(path.parent) if name.startswith(f"{path.name}-")]
    for name in reversed(parts):
        yield from reversed(read(path.with_name(name)).split(b"\n"))


# --- write ----------------------------------------------------------------------------------------


def write_blocks(
    path: Path,
    data: Iterable[bytes | memoryview],
    durable: bool,
    *,
    suffix: str = "tmp",
    temporary: str | None = None,
) -> None:
    """Write or replace a file by one put of the joined blocks.

    Args:
        path: of the file.
        data: its bytes, in blocks.
        durable: unused; accepted files are durable.
        suffix: unused; there are no temporary names.
        temporary: unused; there are no temporary names.
    """
    _put(path, b"".join(data))


class _Parts:
    """The part of each log that this process writes; every line puts the whole part again."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Path, bytes]] = {}
        self._one_at_a_time = threading.Lock()

    def append(self, path: Path, data: bytes) -> None:
        """Add lines to the part, and put it.

        Args:
            path: of the log.
            data: whole lines.
        """
        with self._one_at_a_time:
            part, before = self._parts.get(str(path), (path, b""))
            if not before or len(before) > _LINES:
                began = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
                part, before = path.with_name(f"{path.name}-{began}"), b""
            _put(part, before + data)
            self._parts[str(path)] = part, before + data


_parts = _Parts()


def append(path: Path, text: str) -> None:
    """Append text to this process's own part of a log, a file beside `path`, because a store cannot
    append.

    Args:
        path: of the log.
        text: whole lines.
    """
    _parts.append(path, text.encode())


def beat(path: Path) -> None:
    """Put the same bytes again, unless they have changed.

    Raises:
        OSError: if they have changed, or the file is missing.
    """
    unchanged = _version(_meta(path))
    if not _put_where(path, read(path), unchanged):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))


def create_directory(path: Path) -> None:
    """Do nothing: a directory exists once a file is in it."""


def ensure_directory(path: Path, *, durable: bool = False) -> None:
    """Do nothing: a directory exists once a file is in it.

    Args:
        path: of the directory.
        durable: unused.
    """


def flush_names(directory: Path) -> None:
    """Do nothing: accepted files are durable."""


# --- remove ---------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Remove a file."""
    _remove(path, _place(path)[1])


def _remove(path: Path, keys: str | list[str]) -> None:
    store, _ = _place(path)
    with contextlib.suppress(FileNotFoundError), _reached(path):
        obstore.delete(store, keys)


def remove_empty(directory: Path) -> None:
    """Do nothing: a directory without files does not exist."""


def remove_tree(directory: Path, *, strict: bool = False) -> None:
    """Remove all files below a directory.

    Args:
        directory: to remove.
        strict: whether to raise errors.

    Raises:
        OSError: with `strict`, if a file cannot be removed.
    """
    _, key = _place(directory)
    try:
        below = _below(directory)
        if below:
            _remove(directory, [f"{key}/{name}" for name in below])
    except OSError:
        if strict:
            raise


# --- lock -----------------------------------------------------------------------------------------


class StoredLock:
    """A lock file whose owner replaces the bytes it has read, and no other bytes.

    Args:
        path: of the file.
        create: whether to create it if missing; its creator may also write beside it.

    Raises:
        FileNotFoundError: if it is missing.
    """

    is_of_kernel = False

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path, self._may_write = path, create
        self._unchanged: UpdateVersion | None = None
        self._data = b""
        if not create:
            self._changed = _meta(path)["last_modified"].timestamp()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: bytes alone keep others away."""

    def acquire(self, *, shared: bool = False) -> bool:
        """Return False: there is no kernel lock."""
        return False

    def read(self, most: int) -> bytes:
        """Return the first bytes of the file; none if it is missing."""
        store, key = _place(self._path)
        try:
            with _reached(self._path):
                answer = obstore.get(store, key)
                meta, data = answer.meta, bytes(answer.bytes())
        except FileNotFoundError:
            self._unchanged, self._data = None, b""
            return b""
        self._unchanged, self._changed = _version(meta), meta["last_modified"].timestamp()
        self._data = data
        return data[:most]

    def write(self, data: bytes, *, durable: bool = False) -> None:
        """Replace the bytes that were read.

        Args:
            data: the new bytes.
            durable: unused; accepted files are durable.

        Raises:
            BlockingIOError: if they have changed.
        """
        if not _put_where(self._path, data, self._unchanged):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self._path))

    def beat(self) -> None:
        """Put the bytes that were read again."""
        self.write(self._data)

    def age(self) -> float:
        """Return the seconds since the last heartbeat, by the store's clock if a file may be
        written to read it, because the clocks of hosts may differ.
        """
        return self._now() - self._changed

    def _now(self) -> float:
        if not self._may_write:
            return time.time()
        trial = self._path.parent / "log" / _trial_name()
        _put(trial, b"")
        try:
            return _meta(trial)["last_modified"].timestamp()
        finally:
            remove(trial)


def open_lock(path: Path, *, create: bool = False) -> StoredLock:
    """Open a lock file.

    Args:
        path: of the file.
        create: whether to create it if missing.
    """
    return StoredLock(path, create=create)
