"""Files that are there whole or not at all, and on disk before anybody is told so."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename, flush the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def seal(path: Path) -> list[int]:
    """Flush a file to disk and return its size and the CRC-32 of its bytes.

    Not CRC-32C: chunks end in their own CRC-32C, and over data followed by its own checksum a CRC is the same constant for
    every intact file, so a whole chunk put in another one's place would go unnoticed.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size, crc = 0, 0
        while block := file.read(2**22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def seal_all(paths: list[Path], root: Path) -> dict[str, Any]:
    """Seal files and their directories; relative path → [size, crc32]."""
    sealed = {path.relative_to(root).as_posix(): seal(path) for path in paths}
    for directory in sorted({path.parent for path in paths}):
        sync_directory(directory)
    return sealed
