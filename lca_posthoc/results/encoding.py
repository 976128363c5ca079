"""Encode arrays as the bytes of chunks: compressed by blosc and followed by their CRC-32C, exactly
as zarr's codecs write them.

Zarr would schedule every step of every chunk separately, which costs several times as much as the
compression.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np

from .layout import ArrayPlan

numcodecs.blosc.use_threads = False  # our own threads call it at the same time


def compressed(values: np.ndarray[Any, Any]) -> bytes:
    """Return the numbers of an array as the store's codec packs them, in C order."""
    packed: bytes = numcodecs.blosc.compress(
        np.ascontiguousarray(values),
        b"lz4",
        5,
        numcodecs.blosc.BITSHUFFLE,
        0,
        values.dtype.itemsize,
    )
    return packed


def encoded(plan: ArrayPlan, part: np.ndarray[Any, Any]) -> bytes:
    """Return the bytes of a chunk.

    Args:
        plan: of the array.
        part: the numbers of the chunk, fewer where it extends beyond the end of the array.
    """
    dtype = np.dtype(plan.dtype).newbyteorder("<")
    if part.shape != plan.chunks:
        whole = np.full(plan.chunks, plan.fill, dtype)
        whole[tuple(map(slice, part.shape))] = part
        part = whole
    data = compressed(part.astype(dtype, copy=False))
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def chunks_of(
    plan: ArrayPlan, values: np.ndarray[Any, Any], corner: Sequence[int]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the path below the loss's group, and the numbers (views), of each chunk of a part of an
    array.

    Args:
        plan: of the array.
        values: the part, which ends where chunks or the array end.
        corner: where the part begins along the first axes, at the start of chunks; along the others
            it spans the array.
    """
    first = [begin // size for begin, size in zip(corner, plan.chunks, strict=False)]
    first += [0] * (values.ndim - len(first))
    counts = (range(-(-n // size)) for n, size in zip(values.shape, plan.chunks, strict=True))
    for place in itertools.product(*counts):
        numbers = zip(place, plan.chunks, strict=True)
        part = values[tuple(slice(number * size, (number + 1) * size) for number, size in numbers)]
        path = "/".join(str(begin + number) for begin, number in zip(first, place, strict=True))
        yield f"{plan.path}/c/{path}", part
