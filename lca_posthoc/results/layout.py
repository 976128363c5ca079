"""Plan the arrays a run holds for one loss: shapes, dimensions and chunks.

A chunk row along the first axis is exactly one span (one window for totals), so that a chunk has
one writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..numerics.schema import (
    BINS,
    CAUSES,
    EXAMPLE_FIELDS,
    OF_MOTION,
    PATH_FIELDS,
    PER_GROUP,
    STEP_FIELDS,
    TOTAL_FIELDS,
    holds,
    tensor_fields,
)
from .manifest import LossRecord, Manifest, StoredTensor

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """One array of a loss.

    Attributes:
        path: of the array below the loss's group.
        dims: names of its axes.
        shape: along these axes.
        dtype: of its numbers.
        rows: of a chunk along the first axis: the segments of a span, or one window of totals.
        attributes: of the array; that of a tensor has the tensor's name.
        block: groups in a block; along `group`, chunks never cross a border between blocks. None
            without blocks.
    """

    path: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    rows: int
    attributes: dict[str, str | list[str]]
    block: int | None = None

    @property
    def chunks(self) -> tuple[int, ...]:
        """Return the shape of a chunk: `rows` along the first axis; the other axes are split from
        the left until it is about 1 MiB.
        """
        room = _CHUNK_BYTES // (np.dtype(self.dtype).itemsize * self.rows)
        chunks: list[int] = []
        for axis in range(1, len(self.shape)):
            inner = int(np.prod(self.shape[axis + 1 :]))
            extent = max(1, self.shape[axis])
            most = max(1, min(extent, room // max(1, inner)))
            if self.dims[axis] == "group" and self.block is not None:
                most = next(
                    size for size in range(min(most, self.block), 0, -1) if self.block % size == 0
                )
            chunks.append(most)
        return (self.rows, *chunks)

    @property
    def fill(self) -> float | int:
        """Return the value of a missing chunk for readers without this package: NaN, or the
        smallest integer; it is never stored.
        """
        dtype = np.dtype(self.dtype)
        return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).min)

    @property
    def part(self) -> str:
        """Return the part of the results it belongs to: "steps", "allocation", …"""
        return self.path.partition("/")[0]

    @property
    def of_windows(self) -> bool:
        """Tell whether it holds totals over time, with a row for each window instead of each
        segment.
        """
        return self.part in TOTAL_FIELDS

    @property
    def tensor(self) -> str | None:
        """Return the tensor whose numbers it holds; None for a field of all tensors."""
        name = self.attributes.get("name")
        return name if isinstance(name, str) else None

    @property
    def files(self) -> int:
        """Return the number of chunks it is cut into."""
        return math.prod(
            -(-extent // chunk) for extent, chunk in zip(self.shape, self.chunks, strict=True)
        )

    @property
    def inner(self) -> list[int]:
        """Return the number of chunks in a row of chunks along each axis except the first."""
        return [
            -(-extent // chunk)
            for extent, chunk in zip(self.shape[1:], self.chunks[1:], strict=True)
        ]

    def row_files(self, row: int) -> Iterator[str]:
        """Yield the chunk files of one row of chunks, by their paths below the loss's group."""
        yield from _places(f"{self.path}/c/{row}", self.inner)

    def has(self, inner: list[str]) -> bool:
        """Tell whether a row of chunks has a file at these positions along the other axes, as
        written in its path.
        """
        places = {str(place): place for place in map(int, filter(str.isdecimal, inner))}
        return len(inner) == len(self.inner) and all(
            places.get(part, count) < count for part, count in zip(inner, self.inner, strict=True)
        )

    @property
    def bytes(self) -> int:
        """Return the size without compression, in bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def _places(start: str, counts: list[int]) -> Iterator[str]:
    """Yield every path of one number below each count; lazily, because a hostile record may claim
    any count.
    """
    if not counts:
        yield start
        return
    for place in range(counts[0]):
        yield from _places(f"{start}/{place}", counts[1:])


def plan_arrays(manifest: Manifest, keep: str, loss: LossRecord) -> Iterator[ArrayPlan]:
    """Yield every array that workers write for one loss.

    Args:
        manifest: of the run.
        keep: a level of `--keep`.
        loss: its record.
    """
    manifest = manifest.covered_by(loss)
    plans = _Plans(manifest, loss)
    yield from plans.of_steps()
    yield from plans.of_tensors(keep)
    if loss.per is not None and loss.rows is not None:
        yield from plans.of_examples(loss.per, loss.rows)
    if manifest.settings["signal"] is not None:
        yield plans.of_causes()
    if (directions := manifest.settings.get("directions")) is not None:
        yield from plans.along(directions["directions"])
    if manifest.settings["path_band"] == "on":
        yield from plans.of_path()
    if holds(keep, "statistics"):
        yield from plans.of_histogram()
    for tensor in manifest.allocated:
        attributes: dict[str, str | list[str]] = {"name": tensor.spec.name}
        attributes |= {"kind": tensor.spec.kind, "aliases": list(tensor.spec.aliases)}
        if holds(keep, "parameters"):
            yield plans.of_parameters(tensor, {**attributes, "units": "loss"})
        if holds(keep, "units"):
            yield plans.of_units(tensor, {**attributes, "units": "loss"})
        if holds(keep, "statistics"):
            yield from plans.of_totals(tensor, attributes)


class _Plans:
    """The arrays of one loss, part by part; `manifest` is that of the segments the loss covers."""

    def __init__(self, manifest: Manifest, loss: LossRecord) -> None:
        self._manifest, self._loss = manifest, loss

    def _rows(
        self,
        path: str,
        inner: dict[str, int],
        dtype: str,
        attributes: dict[str, str | list[str]] | None = None,
        grouped: bool = True,
    ) -> ArrayPlan:
        """Return an array with a row for each segment; `inner` maps its axes, except the first and
        that of the groups, to their extents.
        """
        groups = self._loss.groups if grouped else None
        axes = {"step": self._manifest.segments}
        axes |= {} if groups is None else {"group": len(groups)}
        return ArrayPlan(
            path=path,
            dims=(*axes, *inner),
            shape=(*axes.values(), *inner.values()),
            dtype=dtype,
            rows=self._manifest.span,
            attributes=attributes or {},
            block=self._loss.block,
        )

    def of_steps(self) -> Iterator[ArrayPlan]:
        for name, dtype in STEP_FIELDS.items():
            if name != "remainder" or self._manifest.settings["tensors"]:
                yield self._rows(f"steps/{name}", {}, dtype, grouped=name in PER_GROUP)

    def of_tensors(self, keep: str) -> Iterator[ArrayPlan]:
        inner = {"tensor": len(self._manifest.allocated)}
        for name, dtype in tensor_fields(keep).items():
            yield self._rows(f"tensors/{name}", inner, dtype, grouped=name not in OF_MOTION)
        if self._loss.replicates:
            inner = {"replicate": self._loss.replicates, **inner}
            yield self._rows("tensors/replicates", inner, "float64")

    def of_examples(self, per: str, rows: int) -> Iterator[ArrayPlan]:
        """Yield the arrays of every example, or element.

        `group` holds the position of its group, the same in every row; `uses` the allocation of
        tensors that several operations use.
        """
        inner = {per: rows}
        for name in EXAMPLE_FIELDS:
            yield self._rows(f"examples/{name}", inner, "float32", grouped=False)
        if self._loss.groups is not None:
            yield self._rows("examples/group", inner, "int32", grouped=False)
        uses = [
            (name, operation)
            for name, operations in self._manifest.uses(self._loss).items()
            for operation in operations
        ]
        if uses:
            attributes = {
                "tensor": [name for name, _ in uses],
                "operation": [operation for _, operation in uses],
            }
            by_use = {**inner, "use": len(uses)}
            yield self._rows("examples/uses", by_use, "float32", {**attributes}, grouped=False)
        inner = {**inner, "tensor": len(self._manifest.allocated)}
        yield self._rows("examples/allocated", inner, "float32", grouped=False)

    def of_causes(self) -> ArrayPlan:
        inner = {"cause": len(CAUSES), "tensor": len(self._manifest.allocated)}
        return self._rows("causes/allocated", inner, "float64", {"units": "loss"})

    def along(self, directions: int) -> Iterator[ArrayPlan]:
        """Yield the arrays of directions; those of the motion are the same for every group."""
        inner = {"direction": directions}
        yield self._rows("along/allocated", inner, "float64", {"units": "loss"})
        yield self._rows("along/motion", inner, "float64", grouped=False)
        yield self._rows("along/distance", {}, "float64", grouped=False)

    def of_path(self) -> Iterator[ArrayPlan]:
        inner = {"tensor": len(self._manifest.allocated)}
        for name in PATH_FIELDS:
            yield self._rows(f"path/{name}", inner, "float64", {"units": "loss"})

    def of_histogram(self) -> Iterator[ArrayPlan]:
        yield self._rows("histogram/count", {"bin": BINS}, "int64")
        yield self._rows("histogram/zero", {}, "int64")

    def of_parameters(
        self, tensor: StoredTensor, attributes: dict[str, str | list[str]]
    ) -> ArrayPlan:
        return self._rows(f"allocation/{tensor.key}", _axes(tensor), "float32", attributes)

    def of_units(self, tensor: StoredTensor, attributes: dict[str, str | list[str]]) -> ArrayPlan:
        inner = {f"{tensor.spec.name}:unit": tensor.spec.units}
        return self._rows(f"units/{tensor.key}", inner, "float32", attributes)

    def of_totals(
        self, tensor: StoredTensor, attributes: dict[str, str | list[str]]
    ) -> Iterator[ArrayPlan]:
        inner = _axes(tensor)
        for part, (fields, dtype) in TOTAL_FIELDS.items():
            yield ArrayPlan(
                path=f"{part}/{tensor.key}",
                dims=("window", "field", *inner),
                shape=(self._manifest.windows, len(fields), *inner.values()),
                dtype=dtype,
                rows=1,
                attributes=attributes,
            )


def _axes(tensor: StoredTensor) -> dict[str, int]:
    """Return the axes of a tensor, named after it, and their extents."""
    return {f"{tensor.spec.name}:{axis}": extent for axis, extent in enumerate(tensor.spec.shape)}
