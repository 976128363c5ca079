"""Store totals that wait for those of other spans of their window: a file with the plain numbers of
every tensor.

Types, shapes and offsets follow from the run; the record of the file holds its size and checksum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LCAError
from ..numerics.schema import Totals, types_of_totals
from . import disk
from .manifest import StoredTensor


def write_partial(
    path: Path, totals: Iterable[Totals], segments: int, durable: bool = True
) -> list[int]:
    """Write the totals of a stretch of segments, a tensor at a time; return size and CRC-32.

    Args:
        path: of the file.
        totals: of each allocated tensor, in the order of the run.
        segments: of the stretch.
        durable: whether to flush them to disk before returning.
    """
    size, crc = 0, 0

    def counted() -> Iterator[memoryview]:
        nonlocal size, crc
        for block in _bytes(totals, segments):
            size, crc = size + len(block), zlib.crc32(block, crc)
            yield block

    disk.write_blocks(path, counted(), durable)
    return [size, crc]


def _bytes(totals: Iterable[Totals], segments: int) -> Iterator[memoryview]:
    for by_field in totals:
        for field, dtype in types_of_totals(segments).items():
            yield _plain(np.asarray(by_field[field], dtype)).data


def _plain(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values).reshape(-1).view("uint8")


def read_partial(path: Path, tensors: Iterable[StoredTensor], segments: int) -> Iterator[Totals]:
    """Yield the totals of each tensor from the file of a stretch.

    The file is reopened for each tensor, because a window may have more spans than a process may
    have open files.

    Args:
        path: of the file.
        tensors: the allocated ones, in the order of the run.
        segments: of the stretch.

    Raises:
        FileNotFoundError: if there is no file.
        LCAError: if the file is too short.
    """
    types, place = types_of_totals(segments), 0
    for tensor in tensors:
        shape = tensor.spec.shape
        sizes = {
            field: math.prod(shape) * np.dtype(dtype).itemsize for field, dtype in types.items()
        }
        data = disk.read_part(path, place, sum(sizes.values()))
        if len(data) < sum(sizes.values()):
            raise LCAError(f"{path} became shorter while it was read. Run again.")
        fields: Totals = {}
        for field, dtype in types.items():
            begin = sum(sizes[name] for name in fields)
            values = np.frombuffer(data, dtype, math.prod(shape), begin)
            fields[field] = values.reshape(shape)
        place += len(data)
        yield fields


def bytes_of_partial(elements: int, segments: int) -> int:
    """Return the size in bytes of the file of a stretch.

    >>> bytes_of_partial(10, 4)
    190

    Args:
        elements: of all allocated tensors.
        segments: of the stretch.
    """
    return elements * sum(np.dtype(dtype).itemsize for dtype in types_of_totals(segments).values())
