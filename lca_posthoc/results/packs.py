"""Store the small chunks of a span in one file, in runs in an object store, where a request for
each would take longer than all their bytes.

Chunks lie one after the other, sorted by path. For each, the commit marker records its offset
beside its size and CRC-32. Zarr does not read packs, so such a run lacks Zarr's metadata too. In a
file system, every chunk is a file of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from . import disk

PACKS = "packs"
LARGEST = 2**20  # bytes of a chunk; a larger one gets its own file

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


def read_chunk(path: Path, seal: Seal, pack: Path) -> bytes:
    """Return the bytes of a chunk, from a pack or from its own file.

    Args:
        path: of its own file.
        seal: of it.
        pack: of the span or window it belongs to.

    Raises:
        OSError: if it cannot be read.
    """
    return disk.read_part(pack, seal[2], seal[0]) if is_packed(seal) else disk.read(path)
