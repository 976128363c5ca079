"""Tables with a checksum over themselves, seals of files, and links, through which nothing is
written.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import LCAError
from . import disk

_LARGEST = 2**30  # bytes of a JSON file
_AT_A_TIME = 4  # files that are written and flushed


def write_json(path: Path, document: Mapping[str, object], durable: bool = True) -> None:
    """Write a table with a checksum over itself as its field `crc32`."""
    disk.write_whole(path, sealed_json(document), durable)


def sealed_json(document: Mapping[str, object]) -> bytes:
    """Return the bytes that `write_json` writes of a table."""
    return json.dumps(
        {**document, "crc32": _checksum(document)}, indent=1, allow_nan=False
    ).encode()


def read_json(path: Path) -> dict[str, object]:
    """Read a table that `write_json` wrote.

    Raises:
        ValueError: where it is no such table, or its checksum is not that of its content; the text
            says which in a few words.
        OSError: where it cannot be read.
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
        raise ValueError("its content does not have the checksum recorded in it")
    return document


def _checksum(document: Mapping[str, object]) -> int:
    """Return the CRC-32 of the table written without spaces; the order of its fields counts."""
    return zlib.crc32(json.dumps(document, separators=(",", ":"), allow_nan=False).encode())


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def seal(path: Path, durable: bool) -> list[int]:
    """Return the size of a file and the CRC-32 of its bytes, which are flushed to disk first where
    durable.

    Not CRC-32C: chunks end in their own CRC-32C, and over data followed by its own checksum a CRC
    is the same constant for every intact file, so a whole chunk put in another one's place would go
    unnoticed.
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
    """Write or replace files below `root`, by their paths; where durable, they, their names and
    those of the directories down to them are on disk when this returns.

    Some at a time: a file system flushes several files in about the time of one.
    """
    with ThreadPoolExecutor(_AT_A_TIME, "lca-write") as threads:
        list(threads.map(lambda path: disk.write_whole(root / path, files[path], durable), files))
        if durable:
            directories = sorted({parent for path in files for parent in Path(path).parents})
            list(threads.map(lambda directory: disk.flush_names(root / directory), directories))


def refuse_links(root: Path, directory: Path) -> None:
    """Refuse to write through a link below a run.

    Raises:
        LCAError: where `directory`, or one between it and `root`, is a link. `root` itself may be
            one.
    """
    for place in (directory, *directory.parents):
        if place == root:
            return
        if disk.is_link(place):
            raise LCAError(
                f"{place} is a link, and nothing is written through links out of a run. Put the "
                "directory itself there, or remove the link and run `lca repair`."
            )


def refuse_links_below(run: Path) -> None:
    """Call `refuse_links` for every directory of a run but those inside arrays, which are checked
    as they are written to.

    Raises:
        LCAError: where one is a link.
    """
    if disk.is_object_store(run):
        return
    for place, directories, _ in disk.walk(run):
        for name in directories:
            refuse_links(run, place / name)
        if "c" in directories:
            directories.remove("c")
