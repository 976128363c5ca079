"""Write iterates from memory to files, one after the other, on a separate thread."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoints.optimizer_steps import METADATA_KEY, moments_path, to_metadata
from ..checkpoints.recorded import HEARTBEAT, beat, name_of
from ..errors import InputError, LCAError, ResourceError, amount
from .optimizer_numbers import PendingRecord
from .ring import Ring
from .staging import Layout, Staging, same_bytes

FEWEST = 3  # iterates in memory: one is being written, others wait
_MOST_ITERATES, _MEMORY = 256, 64 * 2**20  # of small iterates, as many as this memory holds
_SYNC_SECONDS = 1.0  # between flushes to the disk
_FULL = (errno.ENOSPC, errno.EDQUOT)
# the first exists on Linux, the second on Windows
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Pool:
    """Hold memory for iterates of one layout on their way to the disk: three, or 64 MiB of small
    ones.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._room = max(FEWEST, min(_MOST_ITERATES, _MEMORY // max(1, layout.bytes)))

    def take(self) -> Staging:
        """Return memory for an iterate, waiting until some is free; the caller must give it back."""
        if self._room and self._free.empty():
            staging = Staging(self.layout)
            self._room -= 1
            return staging
        return self._free.get()

    def give_back(self, staging: Staging) -> None:
        """Take back memory whose content is written or not needed."""
        self._free.put(staging)


@dataclass(frozen=True)
class Staged:
    """Hold tensors in memory, with the pool that owns the memory."""

    pool: Pool
    staging: Staging

    def free(self) -> None:
        """Give the memory back."""
        self.pool.give_back(self.staging)


@dataclass(frozen=True)
class _File:
    """Hold the path and the bytes of a file to write."""

    path: str
    header: bytes
    body: memoryview

    @classmethod
    def of(cls, path: str | Path, step: int, staged: Staged, metadata: Mapping[str, str]) -> _File:
        header = staged.pool.layout.header(step, metadata)
        body = memoryview(staged.staging.data.numpy())  # type: ignore[arg-type]
        return cls(str(path), header, body)

    @property
    def bytes(self) -> int:
        return len(self.header) + len(self.body)

    def put(self) -> None:
        """Write it under a temporary name, then rename it.

        Raises:
            OSError: if it cannot be written.
        """
        directory, name = os.path.split(self.path)
        temporary = f"{directory}/.{name}.{os.getpid()}.tmp"
        try:
            _put(temporary, self.header, self.body)
            os.replace(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


class Writer:
    """Write files under a temporary name and rename them, in the order given.

    The pool limits the iterates in memory: `buffer` waits for one to be written. Moments are
    written before their iterate, so that an existing iterate always has its moments, even after a
    crash. After an error nothing more is written, so that no iterate is missing before the last
    file; `check` raises the error.

    Args:
        directory: an existing directory.
        layout: layout of every iterate.
        before: the last step that already has a file, or −1.
        pauses: whether a full disk leaves an iterate out with a warning, instead of raising an
            error.
        ring: the room that an iterate waits for.
    """

    def __init__(
        self, directory: Path, layout: Layout, before: int, pauses: bool, ring: Ring
    ) -> None:
        self._directory, self._before, self._pauses = directory, before, pauses
        self._ring = ring
        self.left_out: list[int] = []
        self.raised = False
        self._is_full = False
        self._last: int | None = None
        self._error: BaseException | None = None
        self._pool = Pool(layout)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._unflushed: list[str] = []
        self._flushed = self._beaten = time.monotonic()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="lca-recorder", daemon=True)
        self._thread.start()

    # --- the training's side ----------------------------------------------------------------------

    def check(self) -> None:
        """Raise the error of the thread, if it had one.

        Raises:
            ResourceError: if a file could not be written.
            InputError: if a file of the same step holds a different iterate.
            LCAError: in a forked process, which does not have the thread.
        """
        if self._process != os.getpid():
            raise LCAError(
                "a recorder works in the process that made it. Make one in the process that trains."
            )
        if self._error is not None:
            self.raised = True
            raise self._error

    def buffer(self) -> Staging:
        """Return memory for an iterate, to pass to `write` or `give_back`; wait until some is free."""
        return self._pool.take()

    def give_back(self, staging: Staging) -> None:
        """Take back memory that no iterate was staged into."""
        self._pool.give_back(staging)

    def write(
        self,
        step: int,
        staging: Staging,
        record: PendingRecord | None = None,
        moments: Staged | None = None,
    ) -> None:
        """Queue an iterate for the thread, which writes it and then frees its memory.

        Args:
            step: step of the iterate.
            staging: tensors of the iterate.
            record: record of the optimiser step that led to it.
            moments: moments of the optimisers at the same moment, written to a separate file.
        """
        iterate = Staged(self._pool, staging)
        self._jobs.put(functools.partial(self._write_and_free, step, iterate, record, moments))

    def flush(self) -> None:
        """Wait until every iterate passed to `write` is on the disk; raise as `check` does."""
        if self._process == os.getpid() and self._thread.is_alive():
            if threading.current_thread() is self._thread:
                self._drain()
            else:
                done = threading.Event()
                self._jobs.put(functools.partial(self._sync_and_tell, done))
                done.wait()
        self.check()

    def give_up_waiting(self) -> None:
        """Stop waiting for room: from now on its lack is an error."""
        self._ring.give_up()

    def close(self) -> None:
        """Flush and end the thread; do nothing in a forked process."""
        if self._process == os.getpid() and self._thread.is_alive():
            try:
                self.flush()
            finally:
                self._jobs.put(None)
                if threading.current_thread() is not self._thread:
                    self._thread.join()

    # --- the thread's -----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._rest())
            except queue.Empty:
                self._attempt(self._keep_up)
                continue
            if job is None:
                return
            self._attempt(job)

    def _drain(self) -> None:
        """Do the remaining jobs, if the garbage collector closes a recorder on the thread itself."""
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                self._attempt(job)
        self._attempt(self._sync)

    def _sync_and_tell(self, done: threading.Event) -> None:
        try:
            self._sync()
        finally:
            done.set()

    def _rest(self) -> float:
        """Return the seconds until the next flush or heartbeat."""
        life = max(0.0, self._beaten + HEARTBEAT - time.monotonic())
        due = self._due()
        return life if due is None else min(life, due)

    def _keep_up(self) -> None:
        """Flush and update the heartbeat, if due."""
        if self._due() == 0.0:
            self._sync()
        if time.monotonic() >= self._beaten + HEARTBEAT:
            beat(self._directory)
            self._beaten = time.monotonic()

    def _due(self) -> float | None:
        """Return the seconds until the next flush; None if nothing waits for one."""
        return (
            max(0.0, self._flushed + _SYNC_SECONDS - time.monotonic()) if self._unflushed else None
        )

    def _attempt(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = self._error or error

    def _write_and_free(
        self, step: int, iterate: Staged, record: PendingRecord | None, moments: Staged | None
    ) -> None:
        parts = [part for part in (moments, iterate) if part is not None]
        try:
            for part in parts:
                part.staging.wait()
            if self._error is None:
                self._write(step, iterate, record, moments)
        finally:
            for part in parts:
                part.free()

    def _write(
        self, step: int, iterate: Staged, record: PendingRecord | None, moments: Staged | None
    ) -> None:
        path = f"{self._directory}/{name_of(step)}"
        is_there = step <= self._before or os.path.exists(path)
        is_consumed = is_there and self._is_consumed(path, step)
        if is_there and not is_consumed:
            self._compare(path, iterate.staging)
            self._unflushed.append(path)  # a killed recorder may not have flushed it
        files = []
        if moments is not None and not is_consumed:
            beside = moments_path(self._directory, step)
            if is_there and _holds(beside, moments):
                self._unflushed.append(str(beside))
            else:
                files.append(_File.of(beside, step, moments, {}))
        if not is_there:
            led = None if record is None else record.resolve()
            metadata = {} if led is None else {METADATA_KEY: to_metadata(led)}
            files.append(_File.of(path, step, iterate, metadata))
        needed = sum(file.bytes for file in files)
        if self._is_full and shutil.disk_usage(self._directory).free < needed:
            self.left_out.append(step)
            return
        if not is_there:
            self._ring.wait_for_room(step, needed)
        try:
            self._put(files)
        except OSError as error:
            self._ring.leave(step)
            self._failed(step, path, error, needed)
            return
        if not is_there:
            self._last = step
        self._is_full = False
        self._unflushed += [file.path for file in files]
        if not self._due():
            self._sync()

    def _is_consumed(self, path: str, step: int) -> bool:
        """Return whether a replay removed an existing iterate."""
        return not os.path.exists(path) and self._ring.is_released(step)

    def _put(self, files: Sequence[_File]) -> None:
        """Write the files of a step in order; if one fails, remove the earlier ones.

        Raises:
            OSError: if a file cannot be written.
        """
        for index, file in enumerate(files):
            try:
                if os.path.dirname(file.path) != str(self._directory):
                    os.makedirs(os.path.dirname(file.path), exist_ok=True)
                file.put()
            except OSError:
                for earlier in files[:index]:
                    with contextlib.suppress(OSError):
                        os.unlink(earlier.path)
                raise

    def _compare(self, path: str, staging: Staging) -> None:
        """Check that an iterate equals the existing file of its step: resumed training may only
        repeat recorded iterates.

        Raises:
            InputError: if it differs, or the file is missing or damaged.
        """
        try:
            earlier = load_file(path)
        except FileNotFoundError:
            raise InputError(
                f"{self._directory} extends to step {self._before} and has no "
                f"{os.path.basename(path)}. A series is one training run with its own steps: "
                "record into another directory, or, to resume from an earlier step, remove the "
                "files after it."
            ) from None
        except SafetensorError as error:
            raise InputError(
                f"{path} is damaged ({error}). Remove it and the files after it, and resume from an "
                "earlier step."
            ) from None
        if not same_bytes(earlier, staging.views):
            raise InputError(
                f"{path} holds other weights than those to save, and {self._directory} extends "
                f"to step {self._before}. A series is one training run: record into another "
                "directory, or, to resume from an earlier step, remove the files after it."
            )

    def _failed(self, step: int, path: str, error: OSError, size: int) -> None:
        if self._pauses and error.errno in _FULL:
            self.left_out.append(step)
            if not self._is_full:
                self._is_full = True
                warnings.warn(
                    f"no space for {path} ({amount(size)}): recording pauses until there is. The "
                    "iterates until then are left out, and one long segment spans them",
                    stacklevel=2,
                )
            return
        last = (
            "nothing was recorded"
            if self._last is None
            else f"the last recorded iterate is step {self._last}"
        )
        raise ResourceError(
            f"cannot write {path}: {error.strerror or error}; {last}. Free space or grant permission, "
            "and resume training from a checkpoint up to there."
        ) from error

    def _sync(self) -> None:
        """Flush the files written since the last call, and their names, to the disk.

        Raises:
            ResourceError: if a file cannot be flushed.
        """
        paths, self._unflushed = self._unflushed, []
        # perhaps only moments were written, into a new directory
        folders = {*map(os.path.dirname, paths), str(self._directory)} if paths else set()
        for path in [*paths, *sorted(folders)]:
            try:
                _flush(path)
            except FileNotFoundError:  # removed meanwhile, by an upload or a clean-up
                continue
            except OSError as error:
                raise ResourceError(
                    f"cannot flush {path} to the disk: {error.strerror}."
                ) from error
        self._flushed = time.monotonic()


def _holds(path: Path, staged: Staged) -> bool:
    """Return whether a file exists and holds these tensors; a power failure may have damaged it."""
    try:
        return same_bytes(load_file(path), staged.staging.views)
    except (FileNotFoundError, SafetensorError):
        return False


def _put(path: str, *parts: bytes | memoryview) -> None:
    """Write a file in as few calls as possible: after each call the thread waits for the
    interpreter lock.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS, 0o666)
    try:
        views = [memoryview(part) for part in parts]
        while views:
            written = (
                os.writev(descriptor, views)
                if hasattr(os, "writev")
                else os.write(descriptor, views[0])
            )
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if views:
                views[0] = views[0][written:]
    finally:
        os.close(descriptor)


def _flush(path: str) -> None:
    # Windows cannot flush the names in a directory
    if not hasattr(os, "O_DIRECTORY") and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
