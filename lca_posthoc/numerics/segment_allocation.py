"""Hold the allocation of one loss on one segment, computed from the gradients at the nodes of a rule
as it is read.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .objective import (
    Evaluation,
    Motion,
    Numbers,
    OfUnits,
    Reading,
    Row,
    blocks,
    read,
    rows_of,
)
from .parts import Computed
from .path import PathShift

Gradient = Mapping[str, Tensor]
Node = tuple[float, Gradient]  # weight of a node, and the gradient there


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Hold one piece of a row of tensors on a segment, in float64.

    A piece is small enough to stay in the cache. Creating the next piece overwrites it, and its
    consumer may overwrite it too.

    Attributes:
        rows: range of groups.
        columns: range of parameters within the row.
        motion: θ′ − θ, (parameters,).
        gradient: weighted mean of the gradients at the nodes, (groups, parameters).
        allocation: product of the two, (groups, parameters).
        change: product of the motion with what the last refinement changed in the gradient; None if
            not requested.
    """

    rows: slice
    columns: slice
    motion: Tensor
    gradient: Tensor
    allocation: Tensor
    change: Tensor | None


class Gathers(Protocol):
    """Collect results for every parameter on one segment, from the pieces from which sums are
    computed.

    One pass over a row of tensors then serves both.
    """

    def takes(self, name: str) -> bool:
        """Return whether a tensor is collected."""

    def cuts(self, row: Row) -> Sequence[slice] | None:
        """Return the pieces in which to process a row of collected tensors; None for any pieces."""

    def take(self, row: Row, weight: Numbers, pieces: Iterable[Piece]) -> None:
        """Collect a row of tensors.

        Args:
            row: the tensors.
            weight: sum of the elements' weights at the start, for each group.
            pieces: pieces of the row, all of each group before the next. Numbers that are not
                finite are rejected later.
        """


@dataclass(frozen=True, kw_only=True)
class ExampleAllocation:
    """Hold the allocation of every example on one segment, in float64 of shape (examples,); 0 for
    examples without weight.

    Attributes:
        sums: contribution of each tensor, in units of loss.
        uses: the same by use, (examples, uses), for tensors whose uses are kept apart.
        loss_start: loss at the first checkpoint.
        loss_end: loss at the next checkpoint.
        weight: sum of the weights of an example's elements.
        residual: change of the loss minus the sum over tensors.
    """

    sums: Mapping[str, Numbers]
    uses: Mapping[str, Numbers]
    loss_start: Numbers
    loss_end: Numbers
    weight: Numbers
    residual: Numbers


@dataclass(frozen=True, kw_only=True)
class SegmentAllocation:
    """Hold the allocation of one loss on one segment; if the loss has groups, numbers and tensors
    are per group.

    For parameters, only the points and the gradients at the nodes are stored. Motion, mean gradient
    and allocation are computed from them on request, in float64 and with the same bits each time.

    If only sums are computed, a tensor holds its units instead: the allocation of a unit is the sum
    over its parameters, the gradient is the derivative along the motion, and the motion is 1.

    Attributes:
        points: both ends of the segment, or ends that are 1 apart if only sums are computed.
        nodes: gradients at the nodes, each with its weight.
        sums: allocation of each tensor, in units of loss.
        distance: Σ|θ′ − θ| of each tensor.
        loss_start: loss at the first checkpoint.
        loss_end: loss at the next checkpoint.
        weight: sum of the elements' weights at the start.
        residual: change of the loss minus the sum of the allocation.
        evaluations: number of gradient evaluations, without the start, which the previous segment
            shares.
        level: level in the family of rules; −1 for fixed rules.
        converged: whether the tolerances were reached.
        error_bound: estimate of Σ|A − A*|; NaN for fixed rules.
        unreached: tensors that the loss does not depend on at any node.
        examples: allocation of every example; None if examples are not kept apart.
        parts: allocation of the parts of each tensor's motion, ([groups, ]parts) float64, before
            their factors; None if there are none.
        path: change of the allocation along another path; None if not requested or unknown.
        gathered: whether `Gathers` collected its pieces while sums were computed.
    """

    points: Motion
    nodes: Sequence[Node]
    sums: Mapping[str, Numbers]
    distance: Mapping[str, float]
    loss_start: Numbers
    loss_end: Numbers
    weight: Numbers
    residual: Numbers
    evaluations: int
    level: int
    converged: bool
    error_bound: Numbers
    unreached: frozenset[str]
    examples: ExampleAllocation | None = None
    parts: Mapping[str, Numbers] | None = None
    path: PathShift | None = None
    gathered: bool = False

    def pieces(
        self,
        row: Row,
        columns: Sequence[slice] | None = None,
        scratch: Scratch | None = None,
    ) -> Iterator[Piece]:
        """Yield a row of tensors piece by piece, all pieces of each group before the next group.

        Args:
            row: the tensors.
            columns: where to cut groups that do not fit in the cache; anywhere by default.
            scratch: memory for the pieces; new memory by default.
        """
        return _pieces(self.points, self.nodes, row, columns, scratch)

    @property
    def motion(self) -> Mapping[str, Tensor]:
        """Return θ′ − θ of each tensor."""
        start, end = self.points.start, self.points.end
        return Computed(self.sums, lambda name: end[name].double() - start[name].double())

    @property
    def mean_gradient(self) -> Mapping[str, Tensor]:
        """Return the weighted mean of the gradients at the nodes, for each tensor."""
        return Computed(self.sums, lambda name: self._whole(name, "gradient"))

    @property
    def allocation(self) -> Mapping[str, Tensor]:
        """Return the allocation of each tensor's parameters, in units of loss."""
        return Computed(self.sums, lambda name: self._whole(name, "allocation"))

    def of_units(self) -> dict[str, Numbers]:
        """Return the allocation of each tensor's units, ([groups, ]units) float64, if sums over
        units are computed.
        """
        (mean,) = _weighted(self.nodes)  # the derivative along the motion is the allocation
        numbers = Reading(mean.row).numbers
        return {name: numbers[..., place] for name, place in mean.units.places.items()}

    def _whole(self, name: str, what: str) -> Tensor:
        like, start = self.nodes[0][1][name], self.points.start[name]
        whole = torch.empty(like.shape, dtype=torch.float64, device=like.device)
        rows = whole.reshape(-1, max(1, start.numel()))
        for piece in self.pieces(Row({name: start.shape}, start.device)):
            rows[piece.rows, piece.columns] = getattr(piece, what)
        return whole


def of_every_example(
    start: Evaluation, end: Evaluation, nodes: Sequence[Node]
) -> ExampleAllocation:
    """Return the allocation of every example.

    Args:
        start: the loss at the first checkpoint.
        end: the loss at the next checkpoint.
        nodes: derivatives of every example along the motion, each with the weight of its node.
    """
    (by_use,) = _weighted(nodes)
    by_tensor = by_use.totals()
    readings = Reading(by_tensor.row), Reading(by_use.row)
    read([start.totals, end.totals, *readings])
    of_tensors, of_uses = (reading.numbers for reading in readings)
    sums = {name: of_tensors[:, place] for place, name in enumerate(by_tensor)}
    total = np.zeros_like(start.loss)
    for contribution in sums.values():
        total = total + contribution
    return ExampleAllocation(
        sums=sums,
        uses={
            name: of_uses[:, place]
            for name, place in by_use.units.places.items()
            if place.stop - place.start > 1
        },
        loss_start=start.loss,
        loss_end=end.loss,
        weight=start.weight,
        residual=end.loss - start.loss - total,
    )


def sum_of(numbers: Iterable[Numbers]) -> Numbers:
    """Return the exact sum of a few numbers, for each group; 0 for none."""
    parts = list(numbers)
    if not parts:
        return np.float64(0.0)
    return np.asarray(
        [math.fsum(column) for column in np.stack(parts, -1).reshape(-1, len(parts))]
    ).reshape(np.shape(parts[0]))[()]


def _pieces(
    points: Motion,
    nodes: Sequence[Node],
    row: Row,
    columns: Sequence[slice] | None = None,
    scratch: Scratch | None = None,
    change: Sequence[float] = (),
) -> Iterator[Piece]:
    """Yield motion, mean gradient and allocation of a row of tensors; see
    `SegmentAllocation.pieces`.

    Args:
        points: both ends of the segment.
        nodes: gradients at the nodes, each with its weight.
        row: the tensors.
        columns: where to cut groups.
        scratch: memory for the pieces; new memory by default.
        change: factors of the gradients in what the last refinement changed in their mean; none by
            default.
    """
    (start,), (end,) = row.of(points.start), row.of(points.end)
    groups = math.prod(_groups(points, nodes, row))
    gradients = [row.of(gradient, groups) for _, gradient in nodes]
    factors = [[weight for weight, _ in nodes], *([change] if change else [])]
    scratch = Scratch(start.device) if scratch is None else scratch
    for rows, column in blocks(groups, row.numbers, columns):
        motion = scratch.room("motion", end[column].shape).copy_(end[column])
        motion.sub_(_exact(start[column], scratch))
        values = [gradient[rows, column] for gradient in gradients]
        mean, *changed = _combinations(values, factors, scratch)
        product = torch.mul(mean, motion, out=scratch.room("product", mean.shape))
        yield Piece(
            rows=rows,
            columns=column,
            motion=motion,
            gradient=mean,
            allocation=product,
            change=changed[0].mul_(motion) if changed else None,
        )


def _exact(values: Tensor, scratch: Scratch) -> Tensor:
    """Convert numbers to float64."""
    if values.dtype == torch.float64:
        return values
    return scratch.room("exact", values.shape).copy_(values)


def _combinations(
    values: Sequence[Tensor], factors: Sequence[Sequence[float]], scratch: Scratch
) -> list[Tensor]:
    """Return Σ factor · values in float64 for several lists of factors.

    Leading values with equal factors, the ends of a segment, are added before they are multiplied:
    opposite values then cancel exactly, and their order does not change a bit.
    """
    alike = [
        len(list(itertools.takewhile(functools.partial(operator.eq, listed[0]), listed)))
        for listed in factors
    ]
    shared = min(alike)
    totals = [
        scratch.room(f"combination {number}", values[0].shape) for number in range(len(factors))
    ]
    totals[0].copy_(values[0])
    for following in values[1:shared]:
        totals[0].add_(_exact(following, scratch))
    for total, count, listed in reversed(list(zip(totals, alike, factors, strict=True))):
        torch.mul(totals[0], listed[0] if count == shared else 1.0, out=total)
    for position in range(shared, len(values)):
        exact = _exact(values[position], scratch)
        for total, count, listed in zip(totals, alike, factors, strict=True):
            total.add_(exact, alpha=listed[position] if position >= count else 1.0)
            if position == count - 1:
                total.mul_(listed[0])
    return totals


def _groups(points: Motion, nodes: Sequence[Node], row: Row) -> tuple[int, ...]:
    """Return the shape of a quantity with one number per group: () without groups."""
    like = nodes[0][1][row.names[0]]
    return tuple(like.shape[: like.dim() - points.start[row.names[0]].dim()])


class Scratch:
    """Provide reusable memory, because new memory costs more than the computation in it.

    Args:
        device: device of the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rooms: dict[str, dict[tuple[int, ...], Tensor]] = {}
        self._flat: dict[str, Tensor] = {}

    def room(self, use: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return memory for some numbers; it overwrites earlier numbers of the same use.

        Args:
            use: name of the use; all its numbers have one type.
            shape: shape of the numbers.
            dtype: type of the numbers.
        """
        rooms = self._rooms.setdefault(use, {})
        if shape not in rooms:
            size, flat = math.prod(shape), self._flat.get(use)
            if flat is None or flat.numel() < size:
                flat = self._flat[use] = torch.empty(size, dtype=dtype, device=self._device)
                rooms.clear()
            rooms[shape] = flat[:size].view(shape)
        return rooms[shape]


@dataclass(frozen=True)
class TensorSums:
    """Hold the sum of each tensor's allocation on a segment, and Σ|·| of what the last refinement
    changed.

    Attributes:
        positions: position of each tensor.
        total: the sums, ([groups, ]tensors), on their device until needed.
        changed: Σ|·| of the change, in the same form; 0 if not requested.
    """

    positions: Mapping[str, int]
    total: Reading
    changed: Reading

    @property
    def totals(self) -> dict[str, Numbers]:
        """Return the sums by tensor, in units of loss."""
        return self._by_tensor(self.total)

    @property
    def changes(self) -> dict[str, Numbers]:
        """Return Σ|·| of what the last refinement changed, by tensor."""
        return self._by_tensor(self.changed)

    def _by_tensor(self, reading: Reading) -> dict[str, Numbers]:
        return {name: reading.numbers[..., place][()] for name, place in self.positions.items()}


def tensor_sums(
    points: Motion,
    nodes: Sequence[Node],
    change: Sequence[float],
    start: Evaluation,
    gather: Gathers | None,
    final: bool,
) -> TensorSums:
    """Compute the sums of every tensor of a segment.

    Args:
        points: both ends.
        nodes: gradients at the nodes, each with its weight.
        change: factors of the nodes in what the last refinement changed; empty if not requested.
        start: the loss at the start.
        gather: collects the pieces if they are final, and decides where to cut tensors.
        final: whether they are final.
    """
    like = nodes[0][1]
    if isinstance(like, OfUnits):
        return _sums_of_units(nodes, change)
    names: list[str] = []
    sums: list[Tensor] = []
    device = next(iter(points.start.values())).device
    scratch = Scratch(device)
    for row in _rows(points, like, gather):
        groups = _groups(points, nodes, row)
        gathering = gather if gather is not None and gather.takes(row.names[0]) else None
        cuts = None if gathering is None else gathering.cuts(row)
        of_row = torch.zeros(
            (2, math.prod(groups), len(row.names)), dtype=torch.float64, device=device
        )
        pieces = _added(_pieces(points, nodes, row, cuts, scratch, change), row, of_row)
        if final and gathering is not None:
            gathering.take(row, start.weight, pieces)
        for _ in pieces:  # the rest, which nobody collected
            pass
        names += row.names
        sums.append(of_row.reshape(2, *groups, len(row.names)))
    total, changed = torch.cat(sums, -1)
    places = {name: place for place, name in enumerate(names)}
    return TensorSums({name: places[name] for name in like}, Reading(total), Reading(changed))


def _rows(points: Motion, names: Iterable[str], gather: Gathers | None) -> list[Row]:
    """Return the rows in which tensors are computed; collected tensors have separate rows."""
    chosen: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for name in names:
        chosen[gather is None or gather.takes(name)][name] = points.start[name]
    return [*rows_of(chosen[True]).every, *rows_of(chosen[False]).every]


def _added(pieces: Iterable[Piece], row: Row, sums: Tensor) -> Iterator[Piece]:
    """Yield the pieces of a row of tensors while adding their allocation, and |·| of what the last
    refinement changed, to sums, (2, groups, tensors).
    """
    total, changed = sums
    for piece in pieces:
        total[piece.rows] += row.sums(piece.allocation)
        if piece.change is not None:
            changed[piece.rows] += row.sums(piece.change.abs_())
        yield piece


def _sums_of_units(nodes: Sequence[Node], change: Sequence[float]) -> TensorSums:
    """Compute the sums of every tensor from gradients that are sums over units along the motion: they
    are the allocation itself.
    """
    total, *changes = _weighted(nodes, change)
    totals = total.totals()
    changed = (
        changes[0].like(changes[0].row.abs()).totals().row
        if changes
        else torch.zeros_like(totals.row)
    )
    positions = {name: place for place, name in enumerate(total)}
    return TensorSums(positions, Reading(totals.row), Reading(changed))


def _weighted(nodes: Sequence[Node], change: Sequence[float] = ()) -> list[OfUnits]:
    """Return the weighted mean over nodes in float64, and the change by the last refinement if its
    factors are given.
    """
    rows: list[Tensor] = []
    like = nodes[0][1]
    assert isinstance(like, OfUnits), "at all nodes there are sums over units"
    for _, gradient in nodes:
        assert isinstance(gradient, OfUnits), "at all nodes there are sums over units"
        rows.append(gradient.in_order_of(like))
    factors = [[weight for weight, _ in nodes], *([change] if change else [])]
    combined = _combinations(rows, factors, Scratch(rows[0].device))
    return [like.like(row) for row in combined]
