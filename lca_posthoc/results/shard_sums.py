"""Store sums over shards of the data until their span is complete: a file for each request, below
RUN/shards.

A file holds a table about the sums, the numbers, and a checksum of both. A damaged file counts as
missing: its sums are recomputed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import disk
from .files import refuse_links

SHARDS = "shards"
Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
_SUFFIX = ".sums"
_LENGTH, _CRC = 8, 4  # bytes of the length of the table, and of the checksum


def sums_name(span: int, request: str) -> str:
    """Return the name of the file of one request of a span.

    >>> sums_name(3, "a1")
    '000003-a1.sums'

    Args:
        span: its number.
        request: identifies the request.
    """
    return f"{span:06d}-{request}{_SUFFIX}"


def write_sums(
    run: Path, name: str, about: Mapping[str, object], numbers: Numbers, durable: bool
) -> None:
    """Write the sums of one request.

    Args:
        run: the directory of the run.
        name: of the file, see `sums_name`.
        about: JSON-like.
        numbers: float64.
        durable: whether to flush them to disk before returning.
    """
    table = json.dumps(about, separators=(",", ":")).encode()
    data = b"".join((len(table).to_bytes(_LENGTH, "little"), table, numbers.tobytes()))
    place = run / SHARDS
    refuse_links(run, place)
    disk.ensure_directory(place)
    disk.write_whole(place / name, data + zlib.crc32(data).to_bytes(_CRC, "little"), durable)


def read_sums(run: Path, name: str) -> tuple[dict[str, Any], Numbers] | None:
    """Return the table and the numbers of a file; None if it is missing or damaged.

    Args:
        run: the directory of the run.
        name: of the file, see `sums_name`.
    """
    try:
        data = disk.read(run / SHARDS / name)
    except OSError:
        return None
    body, crc = data[:-_CRC], data[-_CRC:]
    if len(data) < _LENGTH + _CRC or zlib.crc32(body).to_bytes(_CRC, "little") != crc:
        return None
    end = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    about = json.loads(body[_LENGTH:end])
    return about, np.frombuffer(body[end:], "float64")


def names_of_sums(run: Path, span: int | None = None) -> Iterator[str]:
    """Yield the names of the files of a span, in order; of all spans by default.

    Args:
        run: the directory of the run.
        span: its number; None for all.
    """
    for name in disk.names(run / SHARDS):
        number = name.partition("-")[0]
        if name.endswith(_SUFFIX) and number.isdecimal() and span in (None, int(number)):
            yield name


def remove_sums(run: Path, span: int | None = None) -> None:
    """Remove the files of a span, by default of all spans, and then the directory if it is empty.

    Args:
        run: the directory of the run.
        span: its number; None for all.
    """
    for name in names_of_sums(run, span):
        disk.remove(run / SHARDS / name)
    disk.remove_empty(run / SHARDS)
