"""Which arrays a run holds for one loss, their shapes, dimensions and chunks.

A chunk row along the first axis is exactly one span (one window for totals), so that a chunk has one writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import BINS, FIELDS, OF_MOTION, PER_GROUP, STEP_FIELDS, TENSOR_FIELDS
from .manifest import LossRecord, Manifest, StoredTensor

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ArrayPlan:
    """One array of a loss: where it is, what shape it has, who its rows belong to.

    Along `group`, chunks never cross a border between blocks of `block` groups.
    """

    path: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    rows: int
    attributes: dict[str, Any]
    block: int | None = None

    @property
    def chunks(self) -> tuple[int, ...]:
        """`rows` along the first axis; the other axes split from the left until a chunk is about 1 MiB."""
        left = _CHUNK_BYTES // (np.dtype(self.dtype).itemsize * self.rows)
        chunks: list[int] = []
        for axis in range(1, len(self.shape)):
            inner = int(np.prod(self.shape[axis + 1 :]))
            extent = max(1, self.shape[axis])
            most = max(1, min(extent, left // max(1, inner)))
            if self.dims[axis] == "group" and self.block is not None:
                most = next(size for size in range(min(most, self.block), 0, -1) if self.block % size == 0)
            chunks.append(most)
        return (self.rows, *chunks)

    @property
    def fill(self) -> float | int:
        """What a chunk nobody wrote reads as without this package: NaN, or the smallest integer, never a value that is stored."""
        dtype = np.dtype(self.dtype)
        return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).min)

    @property
    def part(self) -> str:
        """What it belongs to: "steps", "allocation", …"""
        return self.path.partition("/")[0]

    @property
    def files(self) -> int:
        """How many chunks it is cut into."""
        return math.prod(-(-extent // chunk) for extent, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def inner(self) -> list[int]:
        """How many chunks a row of chunks has along each axis but the first."""
        return [-(-extent // chunk) for extent, chunk in zip(self.shape[1:], self.chunks[1:], strict=True)]

    def row_files(self, row: int) -> Iterator[str]:
        """The chunk files of one row of chunks, by their paths below the loss's group."""
        yield from _places(f"{self.path}/c/{row}", self.inner)

    def has(self, inner: list[str]) -> bool:
        """Whether a row of chunks has a file at these places along the other axes, as they are written in its path."""
        places = {str(place): place for place in map(int, filter(str.isdecimal, inner))}
        return len(inner) == len(self.inner) and all(
            places.get(each, count) < count for each, count in zip(inner, self.inner, strict=True)
        )

    @property
    def bytes(self) -> int:
        """Size without compression."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def _places(start: str, counts: list[int]) -> Iterator[str]:
    """Every path of one number below each count; one at a time, however many there are said to be."""
    if not counts:
        yield start
        return
    for place in range(counts[0]):
        yield from _places(f"{start}/{place}", counts[1:])


def plan_arrays(manifest: Manifest, keep: str, loss: LossRecord) -> Iterator[ArrayPlan]:
    """Every array the workers write for one loss at a level of `--keep`."""
    manifest = manifest.covered_by(loss)
    segments, span = manifest.segments, manifest.span
    dims, groups = (("group",), (len(loss.groups),)) if loss.groups is not None else ((), ())

    def rows(
        path: str,
        inner: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: str,
        attributes: dict[str, Any] | None = None,
        grouped: bool = True,
    ) -> ArrayPlan:
        all_dims = ("step", *(dims if grouped else ()), *inner)
        extents = (segments, *(groups if grouped else ()), *shape)
        return ArrayPlan(path, all_dims, extents, dtype, span, attributes or {}, loss.block)

    for name, dtype in STEP_FIELDS.items():
        if name != "remainder" or manifest.settings["tensors"]:
            yield rows(f"steps/{name}", (), (), dtype, grouped=name in PER_GROUP)
    for name, dtype in TENSOR_FIELDS.items():
        yield rows(f"tensors/{name}", ("tensor",), (len(manifest.allocated),), dtype, grouped=name not in OF_MOTION)
    if loss.replicates:
        yield rows("tensors/replicates", ("replicate", "tensor"), (loss.replicates, len(manifest.allocated)), "float64")
    yield rows("histogram/count", ("bin",), (BINS,), "int64")
    yield rows("histogram/zero", (), (), "int64")
    for tensor in manifest.allocated:
        name, shape = tensor.spec.name, tensor.spec.shape
        inner = tuple(f"{name}:{axis}" for axis in range(len(shape)))
        attributes = {"name": name, "kind": tensor.spec.kind, "aliases": list(tensor.spec.aliases)}
        if keep == "parameters":
            yield rows(f"allocation/{tensor.key}", inner, shape, "float32", {**attributes, "units": "loss"})
        if keep in ("parameters", "units"):
            yield rows(
                f"units/{tensor.key}", (f"{name}:unit",), (_units(tensor),), "float32", {**attributes, "units": "loss"}
            )
        shape_of_totals = (manifest.windows, len(FIELDS), *shape)
        yield ArrayPlan(f"totals/{tensor.key}", ("window", "field", *inner), shape_of_totals, "float64", 1, attributes)


def _units(tensor: StoredTensor) -> int:
    axis = tensor.spec.unit_axis
    return 1 if axis is None else tensor.spec.shape[axis]
