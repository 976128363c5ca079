"""Which arrays a run holds for one loss, their shapes, dimensions and chunks.

A chunk row along the first axis is exactly one span (one window for totals), so that a chunk has one writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import BINS, FIELDS, STEP_FIELDS, TENSOR_FIELDS
from .manifest import Manifest, StoredTensor

_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ArrayPlan:
    """One array of a loss: where it is, what shape it has, who its rows belong to."""

    path: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    rows: int
    attributes: dict[str, Any]

    @property
    def chunks(self) -> tuple[int, ...]:
        """`rows` along the first axis; the other axes split from the left until a chunk is about 1 MiB."""
        left = _CHUNK_BYTES // (np.dtype(self.dtype).itemsize * self.rows)
        chunks: list[int] = []
        for axis in range(1, len(self.shape)):
            inner = int(np.prod(self.shape[axis + 1 :]))
            extent = max(1, self.shape[axis])
            chunks.append(max(1, min(extent, left // max(1, inner))))
        return (self.rows, *chunks)

    @property
    def fill(self) -> float | int:
        """What a chunk nobody wrote reads as: never a value that is stored."""
        return missing(np.dtype(self.dtype))

    @property
    def files(self) -> int:
        """How many chunks it is cut into."""
        return math.prod(-(-extent // chunk) for extent, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def bytes(self) -> int:
        """Size without compression."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def missing(dtype: np.dtype[Any]) -> float | int:
    """The fill value of a dtype: NaN, or the smallest integer."""
    return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).min)


def plan_arrays(manifest: Manifest, keep: str) -> Iterator[ArrayPlan]:
    """Every array the workers write for one loss at a level of `--keep`."""
    segments, span = manifest.segments, manifest.span
    for name, dtype in STEP_FIELDS.items():
        yield ArrayPlan(f"steps/{name}", ("step",), (segments,), dtype, span, {})
    for name, dtype in TENSOR_FIELDS.items():
        yield ArrayPlan(f"tensors/{name}", ("step", "tensor"), (segments, len(manifest.allocated)), dtype, span, {})
    yield ArrayPlan("histogram/count", ("step", "bin"), (segments, BINS), "int64", span, {})
    yield ArrayPlan("histogram/zero", ("step",), (segments,), "int64", span, {})
    for tensor in manifest.allocated:
        name, shape = tensor.spec.name, tensor.spec.shape
        inner = tuple(f"{name}:{axis}" for axis in range(len(shape)))
        attributes = {"name": name, "kind": tensor.spec.kind, "aliases": list(tensor.spec.aliases)}
        if keep == "parameters":
            yield ArrayPlan(
                f"allocation/{tensor.key}",
                ("step", *inner),
                (segments, *shape),
                "float32",
                span,
                {**attributes, "units": "loss"},
            )
        if keep in ("parameters", "units"):
            yield ArrayPlan(
                f"units/{tensor.key}",
                ("step", f"{name}:unit"),
                (segments, _units(tensor)),
                "float32",
                span,
                {**attributes, "units": "loss"},
            )
        shape_of_totals = (manifest.windows, len(FIELDS), *shape)
        yield ArrayPlan(f"totals/{tensor.key}", ("window", "field", *inner), shape_of_totals, "float64", 1, attributes)


def _units(tensor: StoredTensor) -> int:
    axis = tensor.spec.unit_axis
    return 1 if axis is None else tensor.spec.shape[axis]
