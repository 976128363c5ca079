"""Compute statistics of the allocations of a span: sums, counts, a histogram, units, per-parameter
totals. No disk, no plots.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.trajectory import TensorSpec
from ..errors import SpanError
from .objective import Bundle, FromDevice, Numbers, Reading, Row, blocks, read, rows_of_shapes
from .path import PathShift
from .schema import (
    BINS,
    CAUSES,
    EXAMPLE_FIELDS,
    MAGNITUDES,
    MAY_BE_NAN,
    OF_MOTION,
    PATH_FIELDS,
    PER_GROUP,
    SIGNED,
    STEP_FIELDS,
    TOO_LARGE,
    holds,
    tensor_fields,
    types_of_totals,
)
from .segment_allocation import (
    ExampleAllocation,
    Gathers,
    Piece,
    Scratch,
    SegmentAllocation,
    sum_of,
)
from .segments import Axes

_LARGEST = 0.999 * 2.0**63  # bound on sums
_EXACT = 2.0**53  # bound on whole numbers that float64 represents exactly
# |number| < (|its rounding to float32| + _TINY) * _ROUNDED
_TINY, _ROUNDED = 2.0**-149, 1.001
Arrays = dict[str, np.ndarray[Any, Any]]


def is_looked_at(device: torch.device) -> bool:
    """Return whether the code may inspect numbers on a device before it decides what to compute
    next.

    On other devices, each inspection waits for all queued work.
    """
    return device.type == "cpu"


def histogram(values: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Count finite float32 values per bin and row, from the top bits of their patterns; exact zeros
    are not counted.

    Args:
        values: numbers, (rows, n).
        scratch: memory to compute in; new memory by default.

    Returns:
        The counts, (rows, BINS), int64.
    """
    rows, scratch = values.shape[0], Scratch(values.device) if scratch is None else scratch
    room = scratch.room("counted", values.shape, torch.float32)
    top = torch.add(values, 0.0, out=room).view(torch.int32)  # −0 becomes 0
    top.bitwise_right_shift_(22).bitwise_and_(0x3FF)
    if rows > 1:
        top += 1024 * torch.arange(rows, dtype=torch.int32, device=values.device)[:, None]
    looks = is_looked_at(values.device)
    if looks:
        counts = torch.bincount(top.reshape(-1), minlength=1024 * rows)
    else:  # its size is known in advance
        places = top.reshape(-1).long()
        counts = places.new_zeros(1024 * rows).scatter_add_(0, places, torch.ones_like(places))
    counts = counts.reshape(rows, 1024)
    positive, negative = counts[:, :MAGNITUDES], counts[:, 512 : 512 + MAGNITUDES]
    if not looks or bool(positive[:, 0].any()):
        positive[:, 0] -= values.shape[1] - torch.count_nonzero(values, 1)
    return torch.cat([negative.flip(1), positive], 1)


class UnitSums:
    """Sum a tensor's pieces over all axes except those of groups and units.

    Args:
        groups: number of groups.
        shape: shape of the tensor.
        axis: axis of the units; None if the whole tensor is one unit.
        device: device of the tensor.
    """

    def __init__(
        self, groups: int, shape: tuple[int, ...], axis: int | None, device: torch.device
    ) -> None:
        units = 1 if axis is None else shape[axis]
        before = 1 if axis is None else math.prod(shape[:axis])
        self._units = units
        self._after = math.prod(shape) // max(1, before * units)
        self.total = torch.zeros((groups, units), dtype=torch.float64, device=device)
        self.cuts: Sequence[slice] = self._cuts(before)

    def _cuts(self, before: int) -> list[slice]:
        """Return pieces of the flattened tensor; a piece with parts of several units contains whole
        units only.
        """
        if before == 1:
            return [
                slice(
                    rows.start * self._after + columns.start,
                    (rows.stop - 1) * self._after + columns.stop,
                )
                for rows, columns in blocks(self._units, self._after)
            ]
        whole = self._units * self._after
        if not whole:
            return []
        return [
            slice(rows.start * whole, rows.stop * whole)
            for rows, _ in blocks(before, whole, [slice(whole)])
        ]

    def add(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Add the values of some groups at one of the pieces.

        Args:
            rows: range of groups.
            columns: one of `cuts`.
            values: the values, (groups, parameters).
        """
        first, count = columns.start // self._after, values.shape[1]
        runs = max(1, count // self._after)  # number of runs of parameters of one unit
        by_unit = values.reshape(values.shape[0], -1, min(runs, self._units), count // runs)
        units = slice(first, first + runs) if runs < self._units else slice(None)
        self.total[rows, units] += by_unit.sum((1, 3))


class _Signals:
    """Count sign changes of some numbers of every parameter of one tensor from segment to segment,
    and keep their first and last signs.

    Args:
        names: names of the numbers.
        elements: number of parameters.
        counts: type of the counts.
        device: device of the numbers.
    """

    def __init__(
        self, names: Sequence[str], elements: int, counts: torch.dtype, device: torch.device
    ) -> None:
        self.names = names
        self._turns = torch.zeros((len(names), elements), dtype=counts, device=device)
        self._last = torch.zeros((len(names), elements), dtype=torch.int8, device=device)
        self._first: Tensor | None = None  # set once there is a gap between segments

    def cut(self) -> None:
        """Do not count a turn between the last segment and the next one, which does not follow it."""
        if self._first is None:
            self._first = torch.stack(list(map(self._followed_back, range(len(self.names)))))
        self._last.zero_()

    def _followed_back(self, row: int) -> Tensor:
        """Reconstruct the first signs of one of the numbers from the last signs and the number of
        turns.
        """
        return (self._turns[row] & 1).to(torch.int8).mul_(-2).add_(1).mul_(self._last[row])

    def add(self, part: slice, signs: Tensor, scratch: Scratch) -> None:
        """Add the signs of some of the parameters on the next segment.

        The arithmetic on one-byte numbers is faster than comparing and selecting.

        Args:
            part: range of the parameters.
            signs: −1, 0 or 1, (names, parameters), int8.
            scratch: memory to compute in.
        """
        last = self._last[:, part]
        both = torch.mul(last, signs, out=scratch.room("both", signs.shape, torch.int8))
        replaced = torch.mul(both, signs, out=scratch.room("replaced", signs.shape, torch.int8))
        last.sub_(replaced).add_(signs)
        self._turns[:, part] -= both.clamp_(max=0)  # −1 if the signs differ

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Return turns and signs of one of the numbers, by field."""
        row = self.names.index(name)
        first = self._followed_back(row) if self._first is None else self._first[row]
        numbers = {"turns": self._turns[row], "first": first, "last": self._last[row]}
        return {f"{name}_{field}": values for field, values in numbers.items()}


class _Running:
    """Accumulate totals of the parameters of a row of tensors, segment by segment.

    Args:
        row: the tensors.
        length: maximum number of segments, which determines the type of counts.
        device: device of the tensors.
        unit: unit of the sums, a power of two.
        scratch: memory to compute in.
        like: totals of another loss, which counts the turns of weights for this loss too.

    Attributes:
        unseen: how much sums may have grown since the last inspection, on the device.
    """

    def __init__(
        self,
        row: Row,
        length: int,
        device: torch.device,
        unit: float,
        scratch: Scratch,
        like: _Running | None = None,
    ) -> None:
        small = getattr(torch, types_of_totals(length)["helping"])
        self._row, self._unit, self._scratch = row, unit, scratch
        # whole numbers, stored as float64 while that is exact
        self._looks = is_looked_at(device)
        exact = torch.float64 if self._looks else torch.int64
        self._sum = torch.zeros(row.numbers, dtype=exact, device=device)
        self._reach = 0.0  # bound on the size of every sum
        # the same bound for what was added since the last inspection
        self.unseen = torch.zeros((), dtype=torch.float64, device=device)
        self._helping, self._hurting = torch.zeros((2, row.numbers), dtype=small, device=device)
        names = SIGNED if like is None else SIGNED[1:]
        self._signals = _Signals(names, row.numbers, small, device)
        self._weights: _Signals = self._signals if like is None else like._weights

    def add(
        self,
        part: slice,
        motion: Tensor,
        gradient: Tensor,
        exact: Tensor,
        stored: Tensor,
    ) -> None:
        """Add the next segment of a part of the parameters.

        Args:
            part: range of parameters within the row.
            motion: motion of each parameter, (parameters,). The call overwrites it and the two
                arguments that follow.
            gradient: mean gradient of each parameter.
            exact: allocation of each parameter, float64.
            stored: allocation rounded to float32, whose signs are counted.

        Raises:
            SpanError: if a sum is too large.
        """
        room, names = self._scratch.room, self._signals.names
        numbers = {"weight": motion, "gradient": gradient, "allocation": stored}
        signs = room("signs", (len(names), *motion.shape), torch.int8)
        largest = _largest(stored)  # before signs overwrite it
        for row, name in zip(signs, names, strict=True):
            row.copy_(numbers[name].sign_())
        self._signals.add(part, signs, self._scratch)
        sign = signs[-1]
        negative = torch.clamp(sign, max=0, out=room("negative", sign.shape, torch.int8))
        self._helping[part] -= negative
        self._hurting[part] += sign.sub_(negative)
        self._add_up(part, exact, largest)

    def cut(self) -> None:
        """Do not count turns of own signals between the last segment and the next one."""
        self._signals.cut()

    def _add_up(self, part: slice, exact: Tensor, most_stored: Tensor) -> None:
        """Add to the sums.

        `most_stored` is the largest size of the numbers in float32, which is faster to find than
        that of the sums.
        """
        if not self._looks:
            self._sum[part] += exact.mul_(1.0 / self._unit).round_().to(torch.int64)
            self.unseen += most_stored.double().add_(_TINY).mul_(_ROUNDED / self._unit).add_(1.0)
            return
        largest = float(most_stored)
        if not math.isfinite(largest) and not bool(torch.isfinite(exact).all()):
            return  # the tensor's own sum is not finite either, which raises an error later
        whole = exact.mul_(1.0 / self._unit).round_()
        most = _ROUNDED * (largest + _TINY) / self._unit + 1.0
        if not self._reach + most < _EXACT:
            most = float(_largest(whole))
            self._make_room(most, part, whole)
        self._sum[part] += whole if self._sum.dtype == torch.float64 else whole.to(torch.int64)
        self._reach += most

    def look(self, unseen: float) -> None:
        """Check that no sum is too large, after learning how much sums may have grown.

        Raises:
            SpanError: if one may be too large.
        """
        self.unseen.zero_()
        self._reach += unseen
        if not self._reach < _LARGEST:
            raise SpanError(self._too_large(self._sum.double()))

    def _make_room(self, most: float, part: slice, added: Tensor) -> None:
        """Ensure that sums can grow by `most` while numbers are added to a part of them.

        Raises:
            SpanError: if they cannot.
        """
        if self._reach + most < _EXACT:
            return
        self._sum = self._integers()
        if not self._reach + most < _LARGEST:
            sums = self._sum.double()
            self._reach = float(sums.abs().max())
            if not self._reach + most < _LARGEST:
                sums[part] += added
                raise SpanError(self._too_large(sums))

    def _too_large(self, sums: Tensor) -> str:
        """Return the error message for sums of which one may be too large; it names the largest."""
        sizes = {name: float(_largest(sums[place])) for name, place in self._row.places.items()}
        return f"tensor {max(sizes, key=sizes.__getitem__)!r}: {TOO_LARGE}"

    def _integers(self) -> Tensor:
        """Convert the sums to integers in place."""
        if self._sum.dtype == torch.int64:
            return self._sum
        integers = self._sum.view(torch.int64)
        for _, part in blocks(1, self._row.numbers):
            integers[part] = self._sum[part].to(torch.int64)
        return integers

    def arrays(self) -> dict[str, Arrays]:
        """Return the totals by tensor and field, in the shape of the tensor."""
        self._sum = self._integers()
        totals = {"allocated": self._sum, "helping": self._helping, "hurting": self._hurting}
        totals |= self._weights.arrays("weight")
        for name in SIGNED[1:]:
            totals |= self._signals.arrays(name)
        on_host = {field: values.cpu().numpy() for field, values in totals.items()}
        return {
            name: {
                field: values[self._row.places[name]].reshape(shape)
                for field, values in on_host.items()
            }
            for name, shape in self._row.shapes.items()
        }


def _largest(values: Tensor) -> Tensor:
    """Return the largest absolute value; 0 for no values."""
    if not values.numel():
        return values.new_zeros(())
    smallest, largest = torch.aminmax(values)
    return torch.maximum(-smallest, largest)


def unit_axes(
    allocated: Iterable[TensorSpec], table: Collection[TensorSpec], keep: str
) -> Axes | None:
    """Return the axes of units if a level of `--keep` needs only sums over units; None if it needs
    more.

    Args:
        allocated: every tensor that takes part in the allocation.
        table: tensors that are stored; each other tensor is one unit.
        keep: a level of `--keep`.
    """
    if holds(keep, "statistics"):
        return None
    stored = {spec.name for spec in table} if holds(keep, "units") else set[str]()
    return {spec.name: spec.unit_axis if spec.name in stored else None for spec in allocated}


class SpanSums:
    """Collect the segments of one span for one loss in the arrays that a run stores: losses, and
    sums over tensors and units.

    If a loss has groups, the axis of groups follows that of segments. Groups may be added in
    blocks, one after the other, each over all segments.

    Args:
        table: allocated tensors that are stored; the allocation of the others is the remainder.
        length: number of segments in the span.
        keep: a level of `--keep`.
        device: device of the allocations.
        groups: number of groups; None for a loss without groups.
        examples: for a loss that keeps examples apart, the group of each example (0 without
            groups); None for other losses.
        uses: the uses that are kept apart, by tensor of the table, see `schema.uses_of`.
        causes: whether to store the allocation of causes.
        directions: number of directions that are kept apart; 0 for none.
        path: whether to store the effect of another path.

    Attributes:
        since: first segment of the span that `totals` includes; sums have none.
        examples: numbers of every example, by name; empty if examples are not kept apart.
        causes: allocation of each cause of the motion, by name; empty if causes are not stored.
        along: allocation of directions and motion along them, by name; empty without directions.
        path: effect of another path, by name; empty if not stored, and zero on segments without
            another path.
    """

    def __init__(
        self,
        table: Sequence[TensorSpec],
        length: int,
        keep: str,
        device: torch.device,
        groups: int | None = None,
        examples: np.ndarray[Any, Any] | None = None,
        uses: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        causes: bool = False,
        directions: int = 0,
        path: bool = False,
    ) -> None:
        self._table, self._length, self._keep, self._groups = table, length, keep, groups
        self._uses = uses
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
        self.examples: Arrays = {}
        if examples is not None:
            shape = (length, len(examples))
            self.examples = {name: np.zeros(shape, "float32") for name in EXAMPLE_FIELDS}
            self.examples["allocated"] = np.zeros((*shape, len(table)), "float32")
            if uses:
                count = sum(map(len, uses.values()))
                self.examples["uses"] = np.zeros((*shape, count), "float32")
            if groups is not None:
                self.examples["group"] = np.broadcast_to(examples.astype("int32"), shape)
        self.causes: Arrays = {}
        if causes:
            of_segment = (*self._axis(), len(CAUSES), len(table))
            self.causes["allocated"] = np.zeros((length, *of_segment))
        self.along: Arrays = {}
        if directions:
            self.along = {
                "allocated": np.zeros((length, *self._axis(), directions)),
                "motion": np.zeros((length, directions)),
                "distance": np.zeros(length),
            }
        self.path: Arrays = {}
        if path:
            of_segment = (*self._axis(), len(table))
            self.path = {name: np.zeros((length, *of_segment)) for name in PATH_FIELDS}
        self.since = length
        self._unreached: list[frozenset[str]] = [frozenset(spec.name for spec in table)] * length
        self.begin(range(groups or 1))

    def _axis(self, grouped: bool = True) -> tuple[int, ...]:
        return (self._groups,) if grouped and self._groups is not None else ()

    def begin(self, block: range) -> None:
        """Allocate the large arrays of a block of groups and release those of the previous block."""
        self.block = block
        self.units: Arrays = {}
        for spec in self._table if holds(self._keep, "units") else ():
            units = 1 if spec.unit_axis is None else spec.shape[spec.unit_axis]
            self.units[spec.name] = np.zeros((self._length, *self._rows_of_block, units), "float32")

    @property
    def allocation(self) -> Arrays:
        """Return every parameter's allocation on the segments of the block, by tensor; empty for
        sums.
        """
        return {}

    @property
    def _rows_of_block(self) -> tuple[int, ...]:
        return () if self._groups is None else (len(self.block),)

    def _of_block(self, column: np.ndarray[Any, Any], row: int) -> np.ndarray[Any, Any]:
        """Return the block's part of one segment of an array, always with an axis of groups."""
        return (
            column[row : row + 1]
            if self._groups is None
            else column[row, self.block.start : self.block.stop]
        )

    def add(self, row: int, segment: SegmentAllocation) -> None:
        """Add the block's part of a segment.

        Args:
            row: position of the segment in the span.
            segment: its allocation.
        """
        names = {spec.name for spec in self._table}
        remainder = sum_of(total for name, total in segment.sums.items() if name not in names)
        before = self.steps["converged"][row]
        for name, column in self.steps.items():
            if name in PER_GROUP:
                value = remainder if name == "remainder" else getattr(segment, name)
                self._of_block(column, row)[:] = value
            elif name not in MAY_BE_NAN:
                column[row] = getattr(segment, name)
        if self.block.start:  # a segment has converged if it has in every block
            self.steps["converged"][row] &= before
        self._unreached[row] &= segment.unreached
        for position, spec in enumerate(self._table):
            self.tensors["motion"][row, position] = segment.distance[spec.name]
            self._of_block(self.tensors["allocated"], row)[:, position] = segment.sums[spec.name]
        self._add_units(row, segment)
        if segment.examples is not None:
            self._add_examples(row, segment.examples)
        if segment.path is not None:
            self._add_path(row, segment.path)

    def _add_path(self, row: int, path: PathShift) -> None:
        for name, sums in (("shift", path.shift), ("doubled", path.doubled)):
            if sums is not None:
                place = self._of_block(self.path[name], row)
                for position, spec in enumerate(self._table):
                    place[..., position] = sums[spec.name]

    def add_causes(self, row: int, shares: Mapping[str, Numbers]) -> None:
        """Add the allocation of causes on a segment, for the groups of the block.

        Args:
            row: position of the segment in the span.
            shares: by tensor, ([groups, ]causes).
        """
        place = self._of_block(self.causes["allocated"], row)
        for position, spec in enumerate(self._table):
            place[..., position] = shares[spec.name]

    def add_along(self, row: int, allocated: Numbers, motion: Numbers, distance: float) -> None:
        """Add the allocation of directions on a segment, for the groups of the block.

        Args:
            row: position of the segment in the span.
            allocated: allocation of each direction, ([groups, ]directions).
            motion: motion along each direction, (directions,).
            distance: length of the whole motion.
        """
        self._of_block(self.along["allocated"], row)[:] = allocated
        self.along["motion"][row] = motion
        self.along["distance"][row] = distance

    def _add_examples(self, row: int, segment: ExampleAllocation) -> None:
        for name in EXAMPLE_FIELDS:
            self.examples[name][row] = getattr(segment, name)
        for position, spec in enumerate(self._table):
            self.examples["allocated"][row, :, position] = segment.sums[spec.name]
        if self._uses:
            by_use = [segment.uses[name] for name in self._uses]
            self.examples["uses"][row] = np.concatenate(by_use, axis=-1)

    def _add_units(self, row: int, segment: SegmentAllocation) -> None:
        """Add the allocation of each tensor's units."""
        of_units = segment.of_units() if self.units else {}
        for name, place in self.units.items():
            place[row] = of_units[name]

    @property
    def moved_unused(self) -> set[str]:
        """Return the tensors that moved while the loss of no group depended on them: parameters on
        all segments, buffers on one.
        """
        throughout = frozenset.intersection(*self._unreached)
        return {
            spec.name
            for position, spec in enumerate(self._table)
            for row, unreached in enumerate(self._unreached)
            if spec.name in (unreached if spec.kind == "buffer" else throughout)
            and self.tensors["motion"][row, position] > 0
        }

    def cut(self, row: int) -> None:
        """Note that a segment does not start where the previous one ends: no turn is counted
        between them.
        """

    def totals(self) -> dict[str, Arrays]:
        """Return the per-parameter totals over the span, by tensor; empty for sums."""
        return {}


@dataclass(frozen=True)
class _Waiting:
    """Hold numbers of a row of tensors on a segment, on their device until all rows are complete.

    Attributes:
        units: allocation of units, (groups, units) float64.
        counts: number of parameters that help and that hurt, (groups, 2, tensors) float64.
        slopes: Σ|gradient|, (groups, tensors) float64.
    """

    units: Tensor
    counts: Tensor
    slopes: Tensor


class _OfTensor:
    """Sum over one tensor on a segment from its pieces.

    Args:
        spec: the tensor.
        groups: number of groups.
        device: device of the tensor.
        scratch: memory to compute in.
    """

    def __init__(
        self, spec: TensorSpec, groups: int, device: torch.device, scratch: Scratch
    ) -> None:
        self._is_parameter, self._scratch = spec.kind == "parameter", scratch
        self._units = UnitSums(groups, spec.shape, spec.unit_axis, device)
        self._slopes = torch.zeros((groups, 1), dtype=torch.float64, device=device)
        self._bins = torch.zeros((groups, BINS), dtype=torch.int64, device=device)

    def add(self, piece: Piece, stored: Tensor) -> None:
        """Add a piece; `stored` is its allocation in float32."""
        sizes = self._scratch.room("sizes", piece.gradient.shape)
        self._bins[piece.rows] += histogram(stored, self._scratch)
        self._slopes[piece.rows, 0] += torch.abs(piece.gradient, out=sizes).sum(1)
        self._units.add(piece.rows, piece.columns, piece.allocation)

    @property
    def bins(self) -> Tensor | None:
        """Return the histogram, (groups, BINS) int64; None for a buffer."""
        return self._bins if self._is_parameter else None

    def waiting(self) -> _Waiting:
        """Return the other sums."""
        counts = self._bins.reshape(len(self._bins), 2, BINS // 2).sum(-1, keepdim=True)
        return _Waiting(self._units.total, counts.double(), self._slopes)


class _OfTensors:
    """Sum over small tensors in a row, which form a single piece for each group.

    Args:
        bundle: the tensors.
        parameters: number of leading elements that do not belong to buffers.
        groups: number of groups.
        device: device of the tensors.
        scratch: memory to compute in.
    """

    def __init__(
        self,
        bundle: Bundle,
        parameters: int,
        groups: int,
        device: torch.device,
        scratch: Scratch,
    ) -> None:
        self._bundle, self._parameters, self._scratch = bundle, parameters, scratch
        shape, tensors = (groups, bundle.units), len(bundle.names)
        self._units = torch.empty(shape, dtype=torch.float64, device=device)
        self._counts = torch.empty((groups, 2, tensors), dtype=torch.float64, device=device)
        self._slopes = torch.empty((groups, tensors), dtype=torch.float64, device=device)
        self._bins = torch.empty((groups, BINS), dtype=torch.int64, device=device)

    def add(self, piece: Piece, stored: Tensor) -> None:
        """Add a piece; `stored` is its allocation in float32."""
        rows, bundle = piece.rows, self._bundle
        sizes = self._scratch.room("sizes", piece.gradient.shape)
        self._bins[rows] = histogram(stored[:, : self._parameters], self._scratch)
        self._slopes[rows] = bundle.sums(torch.abs(piece.gradient, out=sizes))
        self._units[rows] = bundle.unit_sums(piece.allocation)
        signs = torch.stack([stored < 0, stored > 0], 1)
        self._counts[rows] = bundle.sums(signs.reshape(-1, bundle.numbers)).reshape(
            len(stored), 2, -1
        )

    @property
    def bins(self) -> Tensor | None:
        """Return the histogram, (groups, BINS) int64; None if all are buffers."""
        return self._bins if self._parameters else None

    def waiting(self) -> _Waiting:
        """Return the other sums."""
        return _Waiting(self._units, self._counts, self._slopes)


class _TableRow:
    """Describe a row of stored tensors whose parameters are processed one by one.

    Args:
        row: the tensors.
        specs: specification of each.
        device: device of the tensors.
        scratch: memory to compute in.

    Attributes:
        cuts: pieces in which to process it; None for a single piece.
    """

    def __init__(
        self, row: Row, specs: Sequence[TensorSpec], device: torch.device, scratch: Scratch
    ) -> None:
        self.row, self.specs, self._device, self._scratch = row, specs, device, scratch
        self._bundle: Bundle | None = None
        self.cuts: Sequence[slice] | None = None
        if len(specs) > 1:
            self._bundle = Bundle(row.shapes, {spec.name: spec.unit_axis for spec in specs}, device)
        else:
            self.cuts = UnitSums(0, specs[0].shape, specs[0].unit_axis, device).cuts
        kinds = [spec.kind == "parameter" for spec in specs]
        assert kinds == sorted(kinds, reverse=True), "in a table, buffers come last"
        self._parameters = sum(spec.elements for spec in specs if spec.kind == "parameter")

    def sums(self, groups: int) -> _OfTensor | _OfTensors:
        """Return empty sums for a segment, to which pieces are added."""
        if self._bundle is None:
            return _OfTensor(self.specs[0], groups, self._device, self._scratch)
        return _OfTensors(self._bundle, self._parameters, groups, self._device, self._scratch)


def _rows_of_table(
    table: Sequence[TensorSpec], device: torch.device, scratch: Scratch
) -> dict[tuple[str, ...], _TableRow]:
    """Return the rows in which to process the tensors of a table, by their names."""
    shapes = tuple((spec.name, torch.Size(spec.shape)) for spec in table)
    specs = {spec.name: spec for spec in table}
    return {
        row.names: _TableRow(row, [specs[name] for name in row.names], device, scratch)
        for row in rows_of_shapes(shapes, device).every
    }


class SpanStatistics(SpanSums):
    """Extend `SpanSums` by statistics of every parameter over time and, on request, every
    parameter's allocation.

    The totals of a loss with groups are those of its weighted mean over the groups, the loss of the
    whole split.

    Args:
        table: as for `SpanSums`.
        length: as for `SpanSums`.
        keep: as for `SpanSums`.
        device: as for `SpanSums`.
        groups: as for `SpanSums`.
        examples: as for `SpanSums`.
        uses: as for `SpanSums`.
        causes: as for `SpanSums`.
        directions: as for `SpanSums`.
        path: as for `SpanSums`.
        unit: unit of totals, see `schema.unit_of_totals`.
        since: first segment of the span whose totals are not stored yet.
        like: statistics of another loss over the same segments; from the same `since` on, they
            count the turns of weights for this loss too.
    """

    def __init__(
        self,
        table: Sequence[TensorSpec],
        length: int,
        keep: str,
        device: torch.device,
        groups: int | None = None,
        examples: np.ndarray[Any, Any] | None = None,
        uses: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        causes: bool = False,
        directions: int = 0,
        path: bool = False,
        *,
        unit: float,
        since: int = 0,
        like: SpanStatistics | None = None,
    ) -> None:
        self._device, self._scratch = device, Scratch(device)
        self._rows = _rows_of_table(table, device, self._scratch)
        self._leaving, self._leaving_from = FromDevice(device), -1
        self._positions = {spec.name: position for position, spec in enumerate(table)}
        super().__init__(
            table, length, keep, device, groups, examples, uses, causes, directions, path
        )
        self.since = since
        self.histogram = {
            "count": np.zeros((length, *self._axis(), BINS), "int64"),
            "zero": np.zeros((length, *self._axis()), "int64"),
        }
        self._running: dict[tuple[str, ...], _Running] = {
            names: _Running(
                table_row.row,
                length - since,
                device,
                unit,
                self._scratch,
                None if like is None else like._running[names],
            )
            for names, table_row in (self._rows.items() if since < length else ())
        }
        self._pooled: list[dict[tuple[str, ...], Tensor]] = [{} for _ in range(length)]
        # of the segment that is being processed
        self._waiting: dict[tuple[str, ...], _Waiting] = {}
        self._bins: Tensor | None = None  # histogram of its parameters

    def begin(self, block: range) -> None:
        """Allocate the large arrays of a block of groups, as `SpanSums` does."""
        super().begin(block)
        self._kept: dict[tuple[str, ...], np.ndarray[Any, Any]] = {}
        self._allocation: Arrays = {}
        for names, table_row in self._rows.items() if holds(self._keep, "parameters") else ():
            groups = math.prod(self._rows_of_block)
            whole = np.zeros((self._length, groups, table_row.row.numbers), "float32")
            self._kept[names] = whole
            for spec in table_row.specs:
                of_tensor = whole[..., table_row.row.places[spec.name]]
                self._allocation[spec.name] = of_tensor.reshape(
                    self._length, *self._rows_of_block, *spec.shape
                )

    @property
    def allocation(self) -> Arrays:
        """Return every parameter's allocation, after waiting until all of it is on the host."""
        self._leaving.finish()
        return self._allocation

    def cut(self, row: int) -> None:
        """Count no turns between a segment and the previous one; see `SpanSums.cut`."""
        if row > self.since and self.block.stop == (self._groups or 1):
            for running in self._running.values():
                running.cut()

    def gathering(self, row: int) -> Gathers:
        """Return the object that collects a segment while its sums are computed; `add` then skips
        what it collected.
        """
        return _Segment(self, row)

    def takes(self, name: str) -> bool:
        """Return whether a tensor is stored."""
        return name in self._positions

    def cuts(self, row: Row) -> Sequence[slice] | None:
        """Return the pieces in which to process a row of stored tensors; see `Gathers.cuts`."""
        return self._rows[row.names].cuts

    def _add_units(self, row: int, segment: SegmentAllocation) -> None:
        """Add the statistics of every parameter, and all sums that wait for them."""
        if not segment.gathered:
            for table_row in self._rows.values():
                pieces = segment.pieces(table_row.row, table_row.cuts, self._scratch)
                self.take(row, table_row.row, segment.weight, pieces)
        self._settle(row)

    def take(self, index: int, row: Row, weight: Numbers, pieces: Iterable[Piece]) -> None:
        """Collect a row of stored tensors on a segment; see `Gathers.take`.

        Args:
            index: position of the segment in the span.
            row: as for `Gathers.take`.
            weight: as for `Gathers.take`.
            pieces: as for `Gathers.take`.
        """
        names, counted = row.names, index >= self.since
        sums = self._rows[names].sums(len(self.block))
        place = self._place_of(names, index)
        pooled = self._pool_of(index, row) if counted and self._groups is not None else None
        signs = 0 if pooled is None else row.numbers
        moved = torch.empty(signs, dtype=torch.int8, device=self._device)
        for piece in pieces:
            stored = self._scratch.room("stored", piece.allocation.shape, torch.float32)
            sums.add(piece, stored.copy_(piece.allocation))
            if place is not None:
                self._leaving.begin(stored, place[piece.rows, piece.columns])
            if pooled is not None:
                _pool(pooled, piece, weight)
                moved[piece.columns] = piece.motion.sign_()
            elif counted:
                self._running[names].add(
                    piece.columns,
                    piece.motion,
                    piece.gradient[0],
                    piece.allocation[0],
                    stored[0],
                )
        self._waiting[names] = sums.waiting()
        if sums.bins is not None:
            self._bins = sums.bins if self._bins is None else self._bins.add_(sums.bins)
        if pooled is not None:
            self._of_block(self.steps["weight"], index)[:] = weight
            self._add_pooled(index, row, pooled, moved)

    def _place_of(self, names: tuple[str, ...], index: int) -> Tensor | None:
        """Return where to store the allocation of a row on a segment, (groups, parameters) on the
        host; None if it is not stored.
        """
        if names not in self._kept:
            return None
        if index != self._leaving_from:  # allow copies in flight from one segment only
            self._leaving.finish()
            self._leaving_from = index
        return torch.from_numpy(self._kept[names][index])

    def _settle(self, row: int) -> None:
        """Copy all results for the tensors of a segment to the host at once."""
        waiting = [self._waiting.pop(names) for names in self._rows]
        units, counts, slopes = (
            Reading(torch.cat(of_rows, -1))
            for of_rows in (
                [of_row.units for of_row in waiting],
                [of_row.counts for of_row in waiting],
                [of_row.slopes for of_row in waiting],
            )
        )
        bins = [] if self._bins is None else [Reading(self._bins.double())]
        running = [] if is_looked_at(self._device) else list(self._running.values())
        unseen = [Reading(of_row.unseen) for of_row in running]
        read([units, counts, slopes, *bins, *unseen])
        for of_row, reading in zip(running, unseen, strict=True):
            of_row.look(float(reading.numbers))
        self._bins = None
        self._add_units_in_rows(row, units.numbers)
        specs = [spec for table_row in self._rows.values() for spec in table_row.specs]
        positions = [self._positions[spec.name] for spec in specs]
        helping, hurting = counts.numbers.transpose(1, 0, 2)
        for name, values in (
            ("helping", helping),
            ("hurting", hurting),
            ("gradient", slopes.numbers),
        ):
            self._of_block(self.tensors[name], row)[:, positions] = values
        trained = np.array([spec.kind == "parameter" for spec in specs])
        elements = np.array([spec.elements for spec in specs])
        for of_bins in bins:
            self._of_block(self.histogram["count"], row)[:] += of_bins.numbers.astype("int64")
            zeros = (elements - helping - hurting)[:, trained].sum(1)
            self._of_block(self.histogram["zero"], row)[:] += zeros.astype("int64")

    def _add_units_in_rows(self, row: int, units: np.ndarray[Any, Any]) -> None:
        """Add the allocation of units, (groups, units), with the units of one row after those of
        another.
        """
        first = 0
        for table_row in self._rows.values():
            for spec in table_row.specs:
                place = self.units[spec.name]
                last = first + place.shape[-1]
                place[row] = units[:, first:last].reshape(place.shape[1:])
                first = last

    def _pool_of(self, index: int, row: Row) -> Tensor:
        """Return gradient and allocation of each parameter of a row, summed over earlier blocks of
        groups with the groups' weights: (2, parameters), float64.
        """
        before = self._pooled[index].pop(row.names, None)
        if before is not None:
            return before
        return torch.zeros((2, row.numbers), dtype=torch.float64, device=self._device)

    def _add_pooled(self, index: int, row: Row, pooled: Tensor, moved: Tensor) -> None:
        """Add the weighted mean over the groups to the totals, after the last block of groups.

        `moved` holds the signs of the motion.
        """
        assert self._groups is not None
        if self.block.stop < self._groups:
            self._pooled[index][row.names] = pooled
            return
        gradient, exact = pooled.div_(float(self.steps["weight"][index].sum()))
        for _, part in blocks(1, row.numbers):
            self._running[row.names].add(
                part, moved[part], gradient[part], exact[part], exact[part].float()
            )

    def totals(self) -> dict[str, Arrays]:
        """Return the per-parameter totals over the span from `since` on, by tensor; empty if no
        segment remains.
        """
        totals = {
            name: arrays
            for running in self._running.values()
            for name, arrays in running.arrays().items()
        }
        return {spec.name: totals[spec.name] for spec in self._table if totals}


def _pool(pooled: Tensor, piece: Piece, weight: Numbers) -> None:
    """Add gradient and allocation of a piece, multiplied by the weights of its groups."""
    weights = torch.as_tensor(weight, device=pooled.device)[piece.rows]
    for total, values in zip(pooled, (piece.gradient, piece.allocation), strict=True):
        total[piece.columns] += weights @ values


class _Segment:
    """Collect one segment of statistics, as `Gathers`.

    Args:
        statistics: statistics of its span.
        row: position of the segment in the span.
    """

    def __init__(self, statistics: SpanStatistics, row: int) -> None:
        self._statistics, self._row = statistics, row

    def takes(self, name: str) -> bool:
        """Return whether a tensor is stored."""
        return self._statistics.takes(name)

    def cuts(self, row: Row) -> Sequence[slice] | None:
        """Return the pieces in which to process a row; see `Gathers.cuts`."""
        return self._statistics.cuts(row)

    def take(self, row: Row, weight: Numbers, pieces: Iterable[Piece]) -> None:
        """Collect a row; see `Gathers.take`."""
        self._statistics.take(self._row, row, weight, pieces)
