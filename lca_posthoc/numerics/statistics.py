"""Statistics of the allocations of a span: sums, counts, a histogram, units, per-parameter totals.
No disk, no plots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.trajectory import TensorSpec
from ..errors import SpanError
from .allocation import Axes, SegmentAllocation, sums_over
from .objective import blocks
from .schema import (
    BINS,
    MAGNITUDES,
    MAY_BE_NAN,
    OF_MOTION,
    PER_GROUP,
    SIGNED,
    STEP_FIELDS,
    TOO_LARGE,
    holds,
    tensor_fields,
    types_of_totals,
)

_LARGEST = 0.999 * 2.0**63  # of sums
Arrays = dict[str, np.ndarray[Any, Any]]


def histogram(values: Tensor) -> Tensor:
    """Count finite float32 values per bin and row, from the top bits of their patterns; exact zeros
    are left out.

    Args:
        values: (rows, n).

    Returns:
        (rows, BINS), int64.
    """
    rows, pattern = values.shape[0], values.view(torch.int32)
    top = (pattern >> 22) & 0x3FF
    top += 1024 * torch.arange(rows, dtype=torch.int32, device=values.device)[:, None]
    counts = torch.bincount(top.reshape(-1), minlength=1024 * rows).reshape(rows, 1024)
    positive, negative = counts[:, :MAGNITUDES], counts[:, 512 : 512 + MAGNITUDES]
    positive[:, 0] -= count(pattern == 0)
    negative[:, 0] -= count(pattern == -(2**31))
    return torch.cat([negative.flip(1), positive], 1)


def count(mask: Tensor) -> Tensor:
    """Count the true values in each row; summed as float32, which is several times faster and exact
    below 2²⁴.
    """
    return mask.float().sum(1).long() if mask.shape[1] < 2**24 else mask.sum(1)


def unit_sums(values: Tensor, axis: int | None) -> Tensor:
    """Sum over all axes but those of groups and units; a scalar is one unit.

    Args:
        values: (groups, *shape).
        axis: of the units, within the shape; None for a scalar.
    """
    if axis is None:
        return values.reshape(-1, 1)
    others = [dim for dim in range(1, values.dim()) if dim != axis + 1]
    return values.sum(dim=others) if others else values


class _Running:
    """Totals of the parameters of one tensor, segment by segment.

    Args:
        spec: of the tensor.
        length: segments at most, which decide how small counts are.
        device: where they are.
        unit: of the sums, a power of two.
    """

    def __init__(self, spec: TensorSpec, length: int, device: torch.device, unit: float) -> None:
        def zeros(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((rows, spec.elements), dtype=dtype, device=device)

        small = getattr(torch, types_of_totals(length)["helping"])
        self._spec, self._unit = spec, unit
        self._sum = torch.zeros(spec.elements, dtype=torch.int64, device=device)
        self._reach = 0.0  # no sum is further from 0
        self._helping, self._hurting = zeros(2, small)
        self._turns = zeros(len(SIGNED), small)
        self._first, self._last = zeros(len(SIGNED), torch.int8), zeros(len(SIGNED), torch.int8)

    def add(self, part: slice, motion: Tensor, gradient: Tensor, exact: Tensor) -> None:
        """Add the next segment of a part of the parameters.

        Args:
            part: which of them, of all in a row.
            motion: of each, (parameters,).
            gradient: the same.
            exact: what each is allocated, float64; its sign is that of the float32 that is stored.

        Raises:
            SpanError: where a sum is too large.
        """
        self._add_up(part, exact)
        self._turn(0, part, _sign(motion))
        self._turn(1, part, _sign(gradient))
        sign = _sign(exact.float())
        self._turn(2, part, sign)
        # signs are numbers of one byte, with which to compute is faster than to compare and choose
        negative = sign >> 7
        self._helping[part] -= negative
        self._hurting[part] += sign - negative

    def _turn(self, row: int, part: slice, sign: Tensor) -> None:
        first, last = self._first[row, part], self._last[row, part]
        self._turns[row, part] -= (last * sign) >> 7  # −1 where it is negative
        first += sign * (1 - first * first)
        last += sign - last * (sign * sign)

    def _add_up(self, part: slice, exact: Tensor) -> None:
        whole = (exact / self._unit).round_()
        smallest, largest = torch.aminmax(whole) if whole.numel() else (whole.sum(), whole.sum())
        most = max(-float(smallest), float(largest))
        if not self._reach + most < _LARGEST:
            self._reach = float(self._sum.double().abs().max())
            if not self._reach + most < _LARGEST:
                raise SpanError(f"tensor {self._spec.name!r}: {TOO_LARGE}")
        self._sum[part] += whole.to(torch.int64)
        self._reach += most

    def arrays(self) -> Arrays:
        """Return the totals by field, in the shape of the tensor."""
        totals = {"allocated": self._sum, "helping": self._helping, "hurting": self._hurting}
        for row, name in enumerate(SIGNED):
            totals |= {
                f"{name}_turns": self._turns[row],
                f"{name}_first": self._first[row],
                f"{name}_last": self._last[row],
            }
        return {
            name: values.reshape(self._spec.shape).cpu().numpy() for name, values in totals.items()
        }


def _sign(values: Tensor) -> Tensor:
    return values.sign().to(torch.int8)


def unit_axes(
    allocated: Iterable[TensorSpec], table: Collection[TensorSpec], keep: str
) -> Axes | None:
    """Return the axes over whose units a level of `--keep` needs sums of allocations, and no more;
    None where it needs more.

    Args:
        allocated: every tensor that takes part in the allocation.
        table: those that are stored; each of the others is one unit.
        keep: a level of `--keep`.
    """
    if holds(keep, "statistics"):
        return None
    stored = {spec.name for spec in table} if holds(keep, "units") else set[str]()
    return {spec.name: spec.unit_axis if spec.name in stored else None for spec in allocated}


class SpanSums:
    """The segments of one span for one loss, gathered as the arrays a run stores: losses, and sums
    over tensors and units.

    A loss with groups has an axis of groups behind that of segments. Groups may be added in blocks,
    one after the other, each over all segments.

    Args:
        table: the allocated tensors that are stored; the allocation of the others is the remainder.
        length: segments in the span.
        keep: a level of `--keep`.
        device: where allocations are.
        groups: their number; None for a loss without groups.

    Attributes:
        since: the first segment of the span whose parameters are counted in `totals`: none of sums.
    """

    def __init__(
        self,
        table: Sequence[TensorSpec],
        length: int,
        keep: str,
        device: torch.device,
        groups: int | None = None,
    ) -> None:
        self._table, self._length, self._keep, self._groups = table, length, keep, groups
        self.steps: Arrays = {
            name: np.full(
                (length, *self._axis(name in PER_GROUP)), np.nan if name in MAY_BE_NAN else 0, dtype
            )
            for name, dtype in STEP_FIELDS.items()
        }
        self.tensors: Arrays = {
            name: np.zeros((length, *self._axis(name not in OF_MOTION), len(table)), dtype)
            for name, dtype in tensor_fields(keep).items()
        }
        self.histogram: Arrays = {}
        self.since = length
        self._unreached: list[frozenset[str]] = [frozenset(spec.name for spec in table)] * length
        self.begin(range(groups or 1))

    def _axis(self, grouped: bool = True) -> tuple[int, ...]:
        return (self._groups,) if grouped and self._groups is not None else ()

    def begin(self, block: range) -> None:
        """Allocate the large arrays of a block of groups; those of the block before are
        released.
        """
        self.block = block
        self.allocation: Arrays = {}
        self.units: Arrays = {}
        for spec in self._table if holds(self._keep, "units") else ():
            units = 1 if spec.unit_axis is None else spec.shape[spec.unit_axis]
            self.units[spec.name] = np.zeros((self._length, *self._rows, units), "float32")

    @property
    def _rows(self) -> tuple[int, ...]:
        return () if self._groups is None else (len(self.block),)

    def _of_block(self, column: np.ndarray[Any, Any], row: int) -> np.ndarray[Any, Any]:
        """Return the block's part of one segment of an array, with an axis of groups also where
        there are none.
        """
        return (
            column[row : row + 1]
            if self._groups is None
            else column[row, self.block.start : self.block.stop]
        )

    def add(self, row: int, segment: SegmentAllocation) -> None:
        """Add the block's part of the segment at position `row` of the span."""
        names = {spec.name for spec in self._table}
        others = {name: values for name, values in segment.allocation.items() if name not in names}
        remainder = sums_over(others, segment.motion) if others else 0.0
        before = self.steps["converged"][row]
        for name, column in self.steps.items():
            if name in PER_GROUP:
                value = remainder if name == "remainder" else getattr(segment, name)
                self._of_block(column, row)[:] = value
            elif name not in MAY_BE_NAN:
                column[row] = getattr(segment, name)
        if self.block.start:  # a segment has converged where it has in every block
            self.steps["converged"][row] &= before
        self._unreached[row] &= segment.unreached
        for position, spec in enumerate(self._table):
            self.tensors["motion"][row, position] = segment.distance[spec.name]
            self._add_tensor(row, position, spec, segment)

    def _add_tensor(
        self, index: int, position: int, spec: TensorSpec, segment: SegmentAllocation
    ) -> None:
        """Add one tensor of a segment, whose allocation is that of its units."""
        exact = segment.allocation[spec.name].reshape(len(self.block), -1)
        allocated = self._of_block(self.tensors["allocated"], index)
        allocated[:, position] = exact.sum(1).cpu().numpy()
        if spec.name in self.units:
            self._add_units(index, spec, exact)

    def _add_units(self, index: int, spec: TensorSpec, sums: Tensor) -> None:
        place = self.units[spec.name]
        place[index] = sums.float().reshape(place.shape[1:]).cpu().numpy()

    @property
    def moved_unused(self) -> set[str]:
        """The tensors that moved while the loss of no group depended on them: parameters
        throughout, buffers on a segment.
        """
        throughout = frozenset.intersection(*self._unreached)
        return {
            spec.name
            for position, spec in enumerate(self._table)
            for row, unreached in enumerate(self._unreached)
            if spec.name in (unreached if spec.kind == "buffer" else throughout)
            and self.tensors["motion"][row, position] > 0
        }

    def totals(self) -> dict[str, Arrays]:
        """Return the per-parameter totals over the span, by tensor: none of sums."""
        return {}


class SpanStatistics(SpanSums):
    """The same with what is kept of every parameter over time, and where asked for, with every
    parameter's allocation.

    The totals of a loss with groups are those of its weighted mean over the groups, the loss of the
    whole split.

    Args:
        unit: of totals, see `schema.unit_of_totals`.
        since: the first segment of the span whose totals are not counted yet; those of the segments
            before are stored.
    """

    def __init__(
        self,
        table: Sequence[TensorSpec],
        length: int,
        keep: str,
        device: torch.device,
        groups: int | None = None,
        *,
        unit: float,
        since: int = 0,
    ) -> None:
        super().__init__(table, length, keep, device, groups)
        self.since = since
        self.histogram = {
            "count": np.zeros((length, *self._axis(), BINS), "int64"),
            "zero": np.zeros((length, *self._axis()), "int64"),
        }
        self._running = {
            spec.name: _Running(spec, length - since, device, unit)
            for spec in (table if since < length else ())
        }
        self._pooled: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(length)]

    def begin(self, block: range) -> None:
        """Allocate the large arrays of a block of groups, as `SpanSums` does."""
        super().begin(block)
        for spec in self._table if holds(self._keep, "parameters") else ():
            shape = (self._length, *self._rows, *spec.shape)
            self.allocation[spec.name] = np.zeros(shape, "float32")

    def _add_tensor(
        self, index: int, position: int, spec: TensorSpec, segment: SegmentAllocation
    ) -> None:
        motion = segment.motion[spec.name]
        shape = (len(self.block), motion.numel())
        exact, gradient = (
            segment.allocation[spec.name].reshape(shape),
            segment.mean_gradient[spec.name].reshape(shape),
        )
        stored = torch.empty(shape, dtype=torch.float32, device=exact.device)
        sums = {
            name: torch.zeros(shape[0], dtype=torch.float64, device=exact.device)
            for name in ("allocated", "gradient")
        }
        bins = torch.zeros((shape[0], BINS), dtype=torch.int64, device=exact.device)
        for row, column in blocks(*shape):
            part = stored[row, column].copy_(exact[row, column])
            sums["allocated"][row] += exact[row, column].sum(1)
            sums["gradient"][row] += gradient[row, column].abs().sum(1)
            bins[row] += histogram(part)
        counts = {"helping": bins[:, : BINS // 2].sum(1), "hurting": bins[:, BINS // 2 :].sum(1)}
        for name, values in {**sums, **counts}.items():
            self._of_block(self.tensors[name], index)[:, position] = values.cpu().numpy()
        if spec.kind == "parameter":
            self._of_block(self.histogram["count"], index)[:] += bins.cpu().numpy()
            zero = shape[1] - counts["helping"] - counts["hurting"]
            self._of_block(self.histogram["zero"], index)[:] += zero.cpu().numpy()
        if spec.name in self.allocation:
            place = self.allocation[spec.name]
            place[index] = stored.reshape(place.shape[1:]).cpu().numpy()
        if spec.name in self.units:
            shaped = exact.reshape(len(self.block), *spec.shape)
            self._add_units(index, spec, unit_sums(shaped, spec.unit_axis))
        self._pool(index, spec, motion, exact, gradient, segment.weight)

    def _pool(
        self,
        index: int,
        spec: TensorSpec,
        motion: Tensor,
        exact: Tensor,
        gradient: Tensor,
        weight: float | np.ndarray[Any, Any],
    ) -> None:
        """Add to the weighted mean over the groups; after the last block it is added to the
        totals.
        """
        if index < self.since:
            return
        pooled = self._pooled[index]
        if self._groups is not None:
            weights = torch.as_tensor(weight, device=exact.device)
            before = pooled.pop(spec.name, (0.0, 0.0))
            exact, gradient = weights @ exact + before[0], weights @ gradient + before[1]
            if self.block.stop < self._groups:
                pooled[spec.name] = (exact, gradient)
                return
            whole = float(self.steps["weight"][index].sum())
            exact, gradient = exact / whole, gradient / whole
        self._running[spec.name].add(
            slice(None), motion.reshape(-1), gradient.reshape(-1), exact.reshape(-1)
        )

    def totals(self) -> dict[str, Arrays]:
        """Return the per-parameter totals over the span from `since` on, by tensor; none where
        nothing is left of it.
        """
        return {name: running.arrays() for name, running in self._running.items()}
