"""Present a run to zarr: metadata derived from `run.json`, and chunks that are checked on reading.

The store is our own, not a wrapper around zarr's, so that a later release cannot add a way around
the checks: zarr reads from any store through `get`.
"""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.buffer import default_buffer_prototype

from ..errors import LCAError
from . import disk
from .commits import DATA, Commits, Marker, damaged
from .layout import ArrayPlan, plan_arrays
from .lock import is_unreleased
from .manifest import Manifest
from .metadata import fits, metadata_files
from .packs import Pack, read_chunk

_MARKERS = 256  # markers kept in memory while chunks are read, each with its pack if it is small


class _LossStore(Store):
    """The group of one loss for reading, whose metadata and coordinates come from memory."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, path: Path, manifest: Manifest, loss: str, parts: Iterable[str]) -> None:
        super().__init__(read_only=True)
        self._arguments = (path, manifest, loss, parts)
        self._root, self._place = path, path / DATA / manifest.losses[loss].key
        self._known = dict(metadata_files(manifest, loss, parts))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self._arguments

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._arguments == getattr(other, "_arguments", None)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        data = self._known.get(key)
        if data is None:
            data = await asyncio.to_thread(self._chunk, key)
        if data is None:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(_part(data, byte_range))

    def _chunk(self, key: str) -> bytes | None:
        raise NotImplementedError

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self._known or self._is_stored(key)

    def _is_stored(self, key: str) -> bool:
        return disk.kind(self._place / key, follow_links=True) == "file"

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        self._check_writable()
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        for key in self._known:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._known:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        for name in dict.fromkeys(
            key[len(start) :].partition("/")[0] for key in self._known if key.startswith(start)
        ):
            yield name


class CheckedStore(_LossStore):
    """Some parts of a loss for reading; every chunk is compared with the marker of its span before
    it becomes numbers.

    Raises:
        LCAError: at once, if metadata or coordinates on disk are not the run's; on every read of a
            chunk that is missing or altered, or belongs to no committed span.
    """

    def __init__(self, path: Path, manifest: Manifest, loss: str, parts: Iterable[str]) -> None:
        super().__init__(path, manifest, loss, parts)
        self._commits = Commits(path, manifest, loss)
        self._plans = {
            plan.path: plan
            for plan in plan_arrays(manifest, manifest.keep, manifest.losses[loss])
            if plan.part in parts
        }
        self._markers: OrderedDict[tuple[bool, int], tuple[Marker, Pack]] = OrderedDict()
        self._lock = threading.Lock()
        if not manifest.packed:
            for key, expected in self._known.items():
                self._compare(key, expected)

    def _compare(self, key: str, expected: bytes) -> None:
        try:
            data = disk.read(self._place / key)
        except OSError as error:
            raise self._damage(key, f"it cannot be read ({error.strerror})") from None
        if not fits(key, data, expected, is_unreleased(self._root)):
            raise self._damage(key, "it is not what follows from run.json")

    def _damage(self, where: str, what: str) -> LCAError:
        return LCAError(damaged(self._root, self._commits.loss, where, what))

    def _chunk(self, key: str) -> bytes | None:
        array, _, place = key.rpartition("/c/")
        plan = self._plans.get(array)
        if plan is None:
            return None
        row, of_totals = int(place.partition("/")[0]), plan.of_windows
        about = self._commits.about_window(row) if of_totals else self._commits.about(row)
        where = f"{name_of(plan)}, {about}"
        marker, pack = self._committed(where, of_totals, row)
        recorded = marker["files"].get((self._place / key).relative_to(self._root).as_posix())
        if recorded is None:
            raise self._damage(where, "a chunk differs from the committed one")
        try:
            data = read_chunk(self._place / key, recorded, pack)
        except FileNotFoundError:
            raise self._damage(where, "a chunk is missing") from None
        except OSError as error:
            raise self._damage(where, f"a chunk cannot be read ({error.strerror})") from None
        if recorded[:2] != [len(data), zlib.crc32(data)]:
            raise self._damage(where, "a chunk differs from the committed one")
        return data

    def _committed(self, where: str, of_totals: bool, row: int) -> tuple[Marker, Pack]:
        """Return the marker that lists a chunk, and the pack of its row; `where` names the chunk in
        messages.

        Raises:
            LCAError: if the span is not committed any more, or its marker is damaged.
        """
        commits = self._commits
        try:
            return self._marker(of_totals and commits.manifest.window > 1, row)
        except FileNotFoundError:
            raise LCAError(
                f"loss {commits.loss!r} in {self._root}: {where} is not committed any more. Open "
                "the run again; if no driver works on it, run `lca run` again."
            ) from None
        except (ValueError, OSError) as error:
            raise self._damage(where, str(error)) from None

    def _marker(self, of_window: bool, row: int) -> tuple[Marker, Pack]:
        commits = self._commits
        with self._lock:
            known = self._markers.get((of_window, row))
            if known is None:
                load = commits.load_window if of_window else commits.load
                place = commits.window_marker if of_window else commits.marker
                marker = load(row)
                known = marker, Pack(commits.pack(place(row)), marker["files"].values())
                self._markers[of_window, row] = known
                while len(self._markers) > _MARKERS:
                    self._markers.popitem(last=False)
            return known


def name_of(plan: ArrayPlan) -> str:
    """Return the name of an array in words: its part, and the real name of its tensor or the field.

    Returns:
        For instance "allocation of 'fc1.weight'", or "steps/residual".
    """
    return plan.path if plan.tensor is None else f"{plan.part} of {plan.tensor!r}"


def _part(data: bytes, byte_range: ByteRequest | None) -> bytes:
    match byte_range:
        case RangeByteRequest(start, end):
            return data[start:end]
        case OffsetByteRequest(offset):
            return data[offset:]
        case SuffixByteRequest(suffix):
            return data[max(0, len(data) - suffix) :]
        case None:
            return data
    raise ValueError(f"Unexpected byte_range, got {byte_range}.")
