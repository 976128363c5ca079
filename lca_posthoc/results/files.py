"""Read and write tables with their own checksums, seal files, and reject links."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import LCAError
from . import disk

_LARGEST = 2**30  # bytes of a JSON file
_AT_A_TIME = 4  # files written and flushed at a time


def write_json(path: Path, document: Mapping[str, object], durable: bool = True) -> None:
    """Write a table with a checksum of itself as its field `crc32`.

    Args:
        path: of the file.
        document: JSON-like.
        durable: whether to flush it to disk before returning.
    """
    disk.write_whole(path, sealed_json(document), durable)


def sealed_json(document: Mapping[str, object]) -> bytes:
    """Return the bytes that `write_json` writes for a table."""
    return json.dumps(
        {**document, "crc32": _checksum(document)}, indent=1, allow_nan=False
    ).encode()


def read_json(path: Path) -> dict[str, object]:
    """Read a table that `write_json` wrote.

    Raises:
        ValueError: if it is no such table, or its checksum does not match; the text says which in a
            few words.
        OSError: if it cannot be read.
    """
    data = disk.read(path, _LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST} bytes")
    try:
        document = json.loads(data, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("it is not a table")
    recorded = document.pop("crc32", None)
    if recorded != _checksum(document):
        raise ValueError("its content does not match the checksum recorded in it")
    return document


def _checksum(document: Mapping[str, object]) -> int:
    """Return the CRC-32 of the table written without spaces, in the order of its fields."""
    return zlib.crc32(json.dumps(document, separators=(",", ":"), allow_nan=False).encode())


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def seal(path: Path, durable: bool) -> list[int]:
    """Return the size of a file and the CRC-32 of its bytes.

    This is not CRC-32C. Chunks end in their own CRC-32C, and the CRC of data followed by its own
    checksum is the same constant for every intact file, so that swapped chunks would go unnoticed.

    Args:
        path: of the file.
        durable: whether to flush its bytes to disk first.
    """
    return list(checksum(disk.blocks(path, flush=durable)))


def checksum(blocks: Iterable[bytes]) -> tuple[int, int]:
    """Return the size of all blocks together, and the CRC-32 of their bytes."""
    size, crc = 0, 0
    for block in blocks:
        size += len(block)
        crc = zlib.crc32(block, crc)
    return size, crc


def write_all(files: Mapping[str, bytes], root: Path, durable: bool) -> None:
    """Write or replace files, several at a time, because file systems flush several in about the
    time of one.

    Args:
        files: their bytes, by paths below `root`.
        root: the directory above them.
        durable: whether to flush them, their names and those of new directories to disk before
            returning.
    """
    with ThreadPoolExecutor(_AT_A_TIME, "lca-write") as threads:
        list(threads.map(lambda path: disk.write_whole(root / path, files[path], durable), files))
        if durable:
            directories = sorted({parent for path in files for parent in Path(path).parents})
            list(threads.map(lambda directory: disk.flush_names(root / directory), directories))


def refuse_links(root: Path, directory: Path) -> None:
    """Refuse to write through a link below a run.

    Args:
        root: the run, which itself may be a link.
        directory: below it.

    Raises:
        LCAError: if `directory`, or one between it and `root`, is a link.
    """
    for place in (directory, *directory.parents):
        if place == root:
            return
        if disk.is_link(place):
            raise LCAError(
                f"{place} is a link, but writing never follows links out of a run. Put the "
                "directory itself there, or remove the link and run `lca repair`."
            )


def refuse_links_below(run: Path) -> None:
    """Call `refuse_links` for every directory of a run except those inside arrays, which are
    checked on writing.

    Raises:
        LCAError: if one is a link.
    """
    if disk.is_object_store(run):
        return
    for place, directories, _ in disk.walk(run):
        for name in directories:
            refuse_links(run, place / name)
        if "c" in directories:
            directories.remove("c")
