"""Gradients of a batch, and what is taken in of them: the whole of each, or sums along directions.

A sum over some parameters of the gradient times a direction is linear in the gradient, so it is
the sum over batches of the same sum of each batch's gradient. As soon as the gradient of a tensor
is complete for a batch it is multiplied by the direction, summed, and freed: no gradient is ever
held but the one at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .bundles import plan_of
from .in_a_row import OfUnits
from .rows import InRows, Row, rows_of

EVERY = "every unit"  # the key of what is taken in of all tensors at once
_BLOCK = 2**17  # numbers that stay in the cache

Point = Mapping[str, Tensor]
Take = Callable[[str, Tensor], None]


def blocks(
    rows: int, columns: int, cuts: Sequence[slice] | None = None
) -> Iterator[tuple[slice, slice]]:
    """Cut a (rows, columns) array into pieces small enough to stay in the cache, row by row where
    rows are long.

    Args:
        rows: their number.
        columns: their number.
        cuts: the pieces of a row; by default as long as they may be.

    >>> [(r.start, r.stop, c.start, c.stop) for r, c in blocks(2, 2**17 + 1)]
    [(0, 1, 0, 131072), (0, 1, 131072, 131073), (1, 2, 0, 131072), (1, 2, 131072, 131073)]
    """
    if cuts is None:
        cuts = [slice(at, min(at + _BLOCK, columns)) for at in range(0, columns, _BLOCK)]
    many = max(1, _BLOCK // max(1, columns))
    for row in range(0, rows, many):
        for cut in cuts:
            yield slice(row, min(row + many, rows)), cut


@dataclass(frozen=True, eq=False)
class Motion:
    """The direction from one point to another, of which the points are held, and the differences
    of small tensors once they were wanted.
    """

    start: Point
    end: Point
    _differences: dict[Row, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def differences(self, row: Row) -> Tensor:
        """Return end − start of some small tensors in a row, (1, numbers)."""
        if row not in self._differences:
            self._differences[row] = row.of(self.end) - row.of(self.start)
        return self._differences[row]


@dataclass(frozen=True)
class Along:
    """Directions, and what gradients along them are summed over.

    Attributes:
        axes: of each tensor, the axis along which its units are told apart; None where all of it
            is one unit.
        motions: the directions.
    """

    axes: Mapping[str, int | None]
    motions: Sequence[Motion]


class Gradients(Protocol):
    """Runs backward passes, and says what is taken in of their gradients.

    `names` are those of the tensors whose gradients are wanted; none: the loss alone. `shapes` are
    those of what is taken in. `dtype` is the type sums over batches have, `mean_dtype` that of the
    mean over all of them.
    """

    names: Collection[str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    mean_dtype: torch.dtype

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass from `total`; call `take(key, values)` for what gradients come to,
        which may change those values. Return the names of the tensors it reached.
        """

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return by tensor what was taken in, of every key."""


class NoGradients:
    """Takes in nothing: the loss alone is wanted."""

    names: Collection[str] = ()
    shapes: Mapping[str, tuple[int, ...]] = {}
    dtype = mean_dtype = torch.float64

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Do nothing."""
        return ()

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return nothing."""
        return by_key


class _Backward:
    """Runs backward passes that hand over each gradient as soon as it is complete, and free it.

    Args:
        tensors: leaves of autograd's, by name.
    """

    dtype = mean_dtype = torch.float64

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names: Collection[str] = tensors.keys()
        self.shapes: Mapping[str, tuple[int, ...]] = {}

    def _run(
        self,
        total: Tensor,
        retain_graph: bool,
        complete: Callable[[str, Tensor], None],
        late: Collection[str] = (),
    ) -> None:
        """Run a backward pass; call `complete(name, gradient)` for each tensor it reaches as soon
        as its gradient is complete, for those of some names once the pass is done.
        """

        def watch(name: str) -> Callable[[Tensor], None]:
            def accumulated(tensor: Tensor) -> None:
                assert tensor.grad is not None
                gradient, tensor.grad = _dense(tensor.grad), None
                complete(name, gradient)

            return accumulated

        hooks = [
            tensor.register_post_accumulate_grad_hook(watch(name))  # type: ignore[no-untyped-call]
            for name, tensor in self._tensors.items()
            if name not in late
        ]
        try:
            total.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        for name in late:
            tensor = self._tensors[name]
            if tensor.grad is not None:
                watch(name)(tensor)

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what was taken in of each tensor."""
        return by_key


class WholeGradients(_Backward):
    """Takes in the gradients of some tensors as they are, those of small ones in rows; their mean
    has the type of the tensors.

    Args:
        tensors: leaves of autograd's, by name.
        dtype: in which they are summed over batches.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__(tensors)
        self.dtype = dtype
        self.mean_dtype = next((tensor.dtype for tensor in tensors.values()), dtype)
        self._rows = rows_of(tensors)
        self._together = [row for row in self._rows.every if len(row.names) > 1]
        self.shapes = {row.names[0]: (row.numbers,) for row in self._rows.every}

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass from `total`; call `take` for each tensor that is alone, and once it
        is done for each row of others, by the name of its first tensor.
        """
        reached: list[str] = []
        waiting: dict[str, Tensor] = {}
        late = dict.fromkeys(name for row in self._together for name in row.names)

        def complete(name: str, gradient: Tensor) -> None:
            reached.append(name)
            if name in late:
                waiting[name] = gradient
            else:
                take(name, gradient.reshape(-1))

        self._run(total, retain_graph, complete, late.keys())
        for row in self._together:
            if not waiting.keys().isdisjoint(row.names):
                take(row.names[0], row.of_some(waiting)[0])
        return reached

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the gradient of each tensor."""
        return InRows(self._rows, by_key)


class SquaredNorms(_Backward):
    """Takes in Σ g² of each tensor's gradient of a batch, which no sum over batches has a use for.

    Args:
        tensors: leaves of autograd's, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.shapes = dict.fromkeys(tensors, ())

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass from `total`; call `take(name, square)` for each tensor."""
        reached: list[str] = []

        def complete(name: str, gradient: Tensor) -> None:
            reached.append(name)
            take(name, _square(gradient))

        self._run(total, retain_graph, complete)
        return reached


class SumsAlong(_Backward):
    """Takes in the sums of gradients along directions: one tensor of those of all units,
    (directions, units) float64.

    Args:
        tensors: leaves of autograd's, by name.
        along: the directions and units.
    """

    def __init__(self, tensors: Mapping[str, Tensor], along: Along) -> None:
        super().__init__(tensors)
        self._along, self._plan = along, plan_of(tensors, along.axes)
        self.units = self._plan.units
        self._device = next((tensor.device for tensor in tensors.values()), None)
        self.shapes = {EVERY: (len(along.motions), self.units.count)} if tensors else {}

    @property
    def motions(self) -> Sequence[Motion]:
        """Return the directions."""
        return self._along.motions

    @property
    def is_of_tensors(self) -> bool:
        """Tell whether each tensor is one unit."""
        return all(axis is None for axis in self._along.axes.values())

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass from `total`; call `take(EVERY, sums)` once it is done."""
        motions, plan = self._along.motions, self._plan
        reached: list[str] = []
        waiting: dict[str, Tensor] = {}
        shape = (len(motions), self.units.count)
        sums = torch.zeros(shape, dtype=torch.float64, device=self._device)

        def complete(name: str, gradient: Tensor) -> None:
            reached.append(name)
            if name in plan.bundled:
                waiting[name] = gradient
            else:
                place = self.units.places[name]
                sums[:, place] = sums_along(name, gradient, motions, self._along.axes[name])

        self._run(total, retain_graph, complete, plan.bundled)
        for bundle in plan.bundles:
            if not waiting.keys().isdisjoint(bundle.names):
                products = _products(bundle, bundle.of_some(waiting), motions)
                sums[:, plan.place(bundle)] = bundle.unit_sums(products)
        if reached:
            take(EVERY, sums)
        return reached

    def sums(self, total: Tensor) -> Mapping[str, Tensor]:
        """Return the sums of the gradient of `total` along directions, (directions, units) of each
        tensor that it depends on.
        """
        by_key: dict[str, Tensor] = {}
        if not total.requires_grad:
            return by_key
        reached = self.backward(total, False, by_key.__setitem__)
        if not reached:
            return by_key
        of_units = self.of_tensors(by_key)
        return {name: of_units[name] for name in reached}

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums of each tensor's units."""
        return OfUnits(by_key[EVERY], self.units) if by_key else {}


def _square(gradient: Tensor) -> Tensor:
    """Return Σ g², float64."""
    flat = gradient.reshape(1, -1)
    parts = [flat[place].double().square_().sum() for place in blocks(*flat.shape)]
    return torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.float64)


def units_of(tensor: Tensor, axis: int | None) -> int:
    """Return the number of a tensor's units: its extent along their axis; 1 without one."""
    return 1 if axis is None else tensor.shape[axis]


@torch.no_grad()
def row_sums_along(row: Row, gradient: Tensor, motions: Sequence[Motion]) -> Tensor:
    """Return the sums over each tensor of a row of its gradient, (1, numbers), along directions,
    (directions, tensors) float64.
    """
    if len(row.names) > 1:
        return row.sums(_products(row, gradient, motions))
    ((name, shape),) = row.shapes.items()
    return sums_along(name, gradient.reshape(shape), motions, None)


def _products(row: Row, gradient: Tensor, motions: Sequence[Motion]) -> Tensor:
    """Return gradient · motion of some small tensors in a row, (motions, numbers); differences and
    products are of the gradient's type.
    """
    return torch.cat([gradient * motion.differences(row).to(gradient.dtype) for motion in motions])


def sums_along(name: str, gradient: Tensor, motions: Iterable[Motion], axis: int | None) -> Tensor:
    """Return the sums of a tensor's gradient along directions, see `unit_sums`."""
    ends = [(motion.start[name], motion.end[name]) for motion in motions]
    return unit_sums(gradient, ends, axis)


@torch.no_grad()
def unit_sums(gradient: Tensor, ends: Sequence[tuple[Tensor, Tensor]], axis: int | None) -> Tensor:
    """Return Σ gradient · (end − start) over each unit, (directions, units) float64.

    Differences and products are of the gradient's type (of two numbers within a factor of two the
    difference is exact), sums are float64. Piece by piece, so that what directions have in common
    is read once.

    Args:
        gradient: of any shape.
        ends: start and end of each direction, of the same shape.
        axis: of the units; None where all is one.
    """
    units = units_of(gradient, axis)
    before = 1 if axis is None else math.prod(gradient.shape[:axis])
    total = torch.zeros((len(ends), units), dtype=torch.float64, device=gradient.device)
    if not gradient.numel():
        return total
    # (before, units, after), but each unit a row where they come first
    shape = (before, units, -1) if axis else (units, -1)
    views = [
        tuple(tensor.reshape(shape) for tensor in (gradient, start, end)) for start, end in ends
    ]
    for place in _pieces(views[0][0]):
        for row, tensors in zip(total, views, strict=True):
            product = _product(*(tensor[place] for tensor in tensors))
            if axis:
                row += product.sum((0, 2), dtype=torch.float64)
            else:
                row[place[0]] += product.sum(1, dtype=torch.float64)
    return total


def _pieces(view: Tensor) -> Iterator[tuple[slice, ...]]:
    """Cut an array of rows, or of rows of units, into pieces small enough to stay in the cache."""
    if view.dim() == 2:
        yield from blocks(*view.shape)
        return
    many = max(1, _BLOCK // max(1, view.shape[1] * view.shape[2]))
    for first in range(0, view.shape[0], many):
        yield (slice(first, first + many),)


def _product(gradient: Tensor, start: Tensor, end: Tensor) -> Tensor:
    difference = torch.sub(end, start)
    if difference.dtype != gradient.dtype:  # of a checkpoint stored in a higher precision
        difference = difference.to(gradient.dtype)
    return difference.mul_(gradient)


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient as an ordinary tensor; that of `nn.Embedding(sparse=True)` is none."""
    return gradient.to_dense() if gradient.is_sparse else gradient
