"""Compress, write and flush chunks in a few threads, behind the thread that makes arrays."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from ..checkpoints.paths import below
from . import disk
from .encoding import chunks_of, encoded
from .files import refuse_links
from .layout import ArrayPlan
from .packs import LARGEST, Seal, is_packed, write_pack

A = TypeVar("A")

SUFFIX = "partial"  # of the temporary names of chunks
WAITING = 2**23  # the most bytes of waiting arrays
_AT_A_TIME = 4  # a file system flushes several files in about the time of one


class ChunkWriter:
    """Writes whole chunks of arrays in threads, each under a temporary name that is then renamed,
    never through a link.

    In a packed run, small compressed chunks wait for the others of their span, and are written
    together. Arrays wait uncopied, so they must not change after they are handed over. At most
    `WAITING` bytes of them wait; more are awaited at once. An exception in a thread is raised by
    the next call. The end of the context waits for the threads; after an exception it skips what
    they have not started.

    Args:
        root: directory of the run.
        durable: whether to flush chunks to disk.
        packed: whether small chunks wait for the others of their span.
    """

    def __init__(self, root: Path, durable: bool, *, packed: bool) -> None:
        self._root, self._durable = root, durable
        self._threads = ThreadPoolExecutor(_AT_A_TIME, "lca-write")
        self._waiting: deque[tuple[int, list[Future[None]]]] = deque()
        self._seals: dict[str, Seal] = {}
        self._packed = packed
        self._to_pack: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def write(
        self, place: str, plan: ArrayPlan, values: np.ndarray[Any, Any], corner: Sequence[int]
    ) -> None:
        """Hand over a part of an array. Handing over a chunk again needs `wait` before, because
        threads keep no order.

        Args:
            place: path of the loss's group below the run.
            plan: of the array.
            values: see `encoding.chunks_of`.
            corner: where the part begins, see `encoding.chunks_of`.
        """

        def write(chunk: tuple[str, np.ndarray[Any, Any]]) -> None:
            path, part = chunk
            self._write(f"{place}/{path}", encoded(plan, part))

        self._begin(write, chunks_of(plan, values, corner), values.nbytes)
        self._await(WAITING)

    def wait(self) -> None:
        """Wait until everything handed over is written."""
        self._await(-1)

    def sealed(self, paths: Iterable[str], pack: Path) -> dict[str, Seal]:
        """Wait, and return the seals of some chunks, by their paths below the run; if durable, they
        and their names are then on disk.

        Args:
            paths: of the chunks.
            pack: the file for small ones, if the run is packed.
        """
        self.wait()
        paths = list(paths)
        together = {path: self._to_pack.pop(path) for path in paths if path in self._to_pack}
        if together:
            refuse_links(self._root, pack.parent)
            disk.ensure_directory(pack.parent)
            self._seals |= write_pack(pack, together, self._durable)
        seals = {path: self._seals[path] for path in paths}
        if self._durable:  # a file was flushed together with its name
            files = [Path(path) for path, seal in seals.items() if not is_packed(seal)]
            if together:
                files.append(below(pack, self._root))
            above = {place for file in files for place in file.parent.parents}
            self._begin(lambda place: disk.flush_names(self._root / place), sorted(above), 0)
            self.wait()
        return seals

    def _write(self, path: str, data: bytes) -> None:
        if self._packed and len(data) <= LARGEST:
            self._to_pack[path] = data
            return
        file = self._root / path
        refuse_links(self._root, file.parent)
        disk.ensure_directory(file.parent)
        disk.write_whole(file, data, self._durable, suffix=SUFFIX)
        self._seals[path] = [len(data), zlib.crc32(data)]

    def _begin(self, work: Callable[[A], None], parts: Iterable[A], size: int) -> None:
        self._waiting.append((size, [self._threads.submit(work, part) for part in parts]))

    def _await(self, most: int) -> None:
        """Wait until at most so many bytes wait."""
        while self._waiting and sum(size for size, _ in self._waiting) > most:
            for writing in self._waiting.popleft()[1]:
                writing.result()
