"""Store the small chunks of a span in one file, in runs in an object store, where a request for
each would take longer than all their bytes.

Chunks lie one after the other, sorted by path. For each, the commit marker records its offset
beside its size and CRC-32. Zarr does not read packs, so such a run lacks Zarr's metadata too. In a
file system, every chunk is a file of its own.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import disk

PACKS = "packs"
LARGEST = 2**20  # bytes of a chunk; a larger one gets its own file
_WHOLE = 2**18  # bytes of a pack that the first request reads whole

Seal = list[int]
"""The size of a chunk, its CRC-32, and its offset if it lies in a pack."""


def is_packed(seal: Seal) -> bool:
    """Tell whether a chunk lies in a pack."""
    return len(seal) == 3


def write_pack(path: Path, chunks: Mapping[str, bytes], durable: bool) -> dict[str, Seal]:
    """Write chunks into one file; return the seal of each.

    Args:
        path: of the pack.
        chunks: their bytes, by their paths below the run.
        durable: whether to flush them to disk before returning.
    """
    seals, place = dict[str, Seal](), 0
    for chunk in sorted(chunks):
        data = chunks[chunk]
        seals[chunk] = [len(data), zlib.crc32(data), place]
        place += len(data)
    disk.write_blocks(path, (chunks[chunk] for chunk in sorted(chunks)), durable)
    return seals


class Pack:
    """Read the chunks of one pack. A small pack is requested once, with its first chunk, and stays
    in memory as long as this object; of a larger one each chunk is a request.

    Args:
        path: path of the pack.
        seals: seals of all chunks of the span or window; chunks in their own files are ignored.
    """

    def __init__(self, path: Path, seals: Iterable[Seal]) -> None:
        self._path, self._one_at_a_time = path, threading.Lock()
        self._size = max((seal[0] + seal[2] for seal in seals if is_packed(seal)), default=0)
        self._bytes: bytes | None = None

    def read(self, seal: Seal) -> bytes:
        """Return the bytes of a chunk, fewer where the pack ends before.

        Raises:
            OSError: where the pack cannot be read.
        """
        size, _, place = seal
        if self._size > _WHOLE:
            return disk.read_part(self._path, place, size)
        with self._one_at_a_time:
            if self._bytes is None:
                self._bytes = disk.read(self._path, self._size)
            return self._bytes[place : place + size]


def read_chunk(path: Path, seal: Seal, pack: Pack) -> bytes:
    """Return the bytes of a chunk, from a pack or from its own file.

    Args:
        path: path of its own file.
        seal: its seal.
        pack: pack of the span or window it belongs to.

    Raises:
        OSError: if it cannot be read.
    """
    return pack.read(seal) if is_packed(seal) else disk.read(path)
