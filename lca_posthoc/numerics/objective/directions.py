"""Run backward passes over batches and accumulate gradients: in full, or as sums along directions.

The sum of gradient times direction over some parameters is linear in the gradient, so it is the sum
over batches of the same sum for each batch. As soon as the gradient of a tensor is complete for a
batch, it is multiplied by the direction, summed, and freed: memory holds only one gradient at a
time.
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

EVERY = "every unit"  # key of the sums of all tensors together
_BLOCK = 2**17  # numbers that fit in the cache

Point = Mapping[str, Tensor]
Take = Callable[[str, Tensor], None]


def blocks(
    rows: int, columns: int, cuts: Sequence[slice] | None = None
) -> Iterator[tuple[slice, slice]]:
    """Cut a (rows, columns) array into pieces that fit in the cache, row by row if rows are long.

    >>> [(r.start, r.stop, c.start, c.stop) for r, c in blocks(2, 2**17 + 1)]
    [(0, 1, 0, 131072), (0, 1, 131072, 131073), (1, 2, 0, 131072), (1, 2, 131072, 131073)]

    Args:
        rows: number of rows.
        columns: number of columns.
        cuts: pieces of a row; by default as long as possible.
    """
    if cuts is None:
        cuts = [slice(at, min(at + _BLOCK, columns)) for at in range(0, columns, _BLOCK)]
    many = max(1, _BLOCK // max(1, columns))
    for row in range(0, rows, many):
        for cut in cuts:
            yield slice(row, min(row + many, rows)), cut


@dataclass(frozen=True, eq=False)
class Motion:
    """Represent the direction from one point to another by the two points, with a cache of the
    differences of small tensors.
    """

    start: Point
    end: Point
    _differences: dict[Row, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def differences(self, row: Row) -> Tensor:
        """Return end − start of some small tensors, concatenated, (1, numbers)."""
        if row not in self._differences:
            self._differences[row] = row.of(self.end) - row.of(self.start)
        return self._differences[row]


@dataclass(frozen=True)
class Along:
    """Hold directions, and the units that gradients along them are summed over.

    Attributes:
        axes: name → axis of the tensor's units; None if it is one unit.
        motions: the directions.
    """

    axes: Mapping[str, int | None]
    motions: Sequence[Motion]


class Gradients(Protocol):
    """Run backward passes, and decide what is accumulated of their gradients.

    Attributes:
        names: tensors whose gradients are needed; empty if only the loss is.
        shapes: key → shape of an accumulated tensor.
        dtype: type of sums over batches.
        mean_dtype: type of the mean over all batches.
    """

    names: Collection[str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    mean_dtype: torch.dtype

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass.

        Args:
            total: the scalar to differentiate.
            retain_graph: as for `torch.Tensor.backward`.
            take: called as `take(key, values)` with each result; it may modify the values.

        Returns:
            Names of the tensors that the pass reached.
        """

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the accumulated results by tensor, from those by key."""


class NoGradients:
    """Accumulate nothing: only the loss is needed."""

    names: Collection[str] = ()
    shapes: Mapping[str, tuple[int, ...]] = {}
    dtype = mean_dtype = torch.float64

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Do nothing.

        Args:
            total: unused.
            retain_graph: unused.
            take: unused.
        """
        return ()

    def of_tensors(self, by_key: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return nothing."""
        return by_key


class _Backward:
    """Run backward passes that deliver each gradient as soon as it is complete, and free it.

    Args:
        tensors: leaves of autograd, by name.
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
        """Run a backward pass; call `complete(name, gradient)` for each tensor it reaches.

        The call happens as soon as the gradient is complete, or for the names in `late` after the
        pass.
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
        """Return the accumulated result of each tensor."""
        return by_key


class WholeGradients(_Backward):
    """Accumulate whole gradients, with small tensors concatenated; their mean has the type of the
    tensors.

    Args:
        tensors: leaves of autograd, by name.
        dtype: type of sums over batches.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__(tensors)
        self.dtype = dtype
        self.mean_dtype = next((tensor.dtype for tensor in tensors.values()), dtype)
        self._rows = rows_of(tensors)
        self._together = [row for row in self._rows.every if len(row.names) > 1]
        self.shapes = {row.names[0]: (row.numbers,) for row in self._rows.every}

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass; see `Gradients.backward`.

        Call `take` for each separate tensor, and after the pass for each row of concatenated ones,
        by the name of its first tensor.

        Args:
            total: the scalar to differentiate.
            retain_graph: as for `torch.Tensor.backward`.
            take: called as `take(key, values)`.
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
    """Compute Σ g² of each tensor's gradient for a batch; sums of it over batches have no meaning.

    Args:
        tensors: leaves of autograd, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.shapes = dict.fromkeys(tensors, ())

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass; see `Gradients.backward`.

        Args:
            total: the scalar to differentiate.
            retain_graph: as for `torch.Tensor.backward`.
            take: called as `take(name, square)` for each tensor.
        """
        reached: list[str] = []

        def complete(name: str, gradient: Tensor) -> None:
            reached.append(name)
            take(name, _square(gradient))

        self._run(total, retain_graph, complete)
        return reached


class SumsAlong(_Backward):
    """Accumulate the sums of gradients along directions, as one tensor for all units, (directions,
    units) float64.

    Args:
        tensors: leaves of autograd, by name.
        along: directions and units.
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
        """Return whether each tensor is one unit."""
        return all(axis is None for axis in self._along.axes.values())

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass; see `Gradients.backward`.

        Args:
            total: the scalar to differentiate.
            retain_graph: as for `torch.Tensor.backward`.
            take: called as `take(EVERY, sums)` after the pass.
        """
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
        """Return the sums of the gradient of `total` along directions, (directions, units) for each
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
    """Return Σ g² in float64."""
    flat = gradient.reshape(1, -1)
    parts = [flat[place].double().square_().sum() for place in blocks(*flat.shape)]
    return torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.float64)


def units_of(tensor: Tensor, axis: int | None) -> int:
    """Return the number of a tensor's units.

    Args:
        tensor: the tensor.
        axis: axis of the units; None if the tensor is one unit.
    """
    return 1 if axis is None else tensor.shape[axis]


@torch.no_grad()
def row_sums_along(row: Row, gradient: Tensor, motions: Sequence[Motion]) -> Tensor:
    """Sum the gradients of concatenated tensors along directions, over each tensor.

    Args:
        row: the tensors.
        gradient: their gradients, (1, numbers).
        motions: the directions.

    Returns:
        The sums, (directions, tensors) float64.
    """
    if len(row.names) > 1:
        return row.sums(_products(row, gradient, motions))
    ((name, shape),) = row.shapes.items()
    return sums_along(name, gradient.reshape(shape), motions, None)


def _products(row: Row, gradient: Tensor, motions: Sequence[Motion]) -> Tensor:
    """Return gradient · motion for some small concatenated tensors, (motions, numbers), computed in
    the type of the gradient.
    """
    return torch.cat([gradient * motion.differences(row).to(gradient.dtype) for motion in motions])


def sums_along(name: str, gradient: Tensor, motions: Iterable[Motion], axis: int | None) -> Tensor:
    """Return the sums of a tensor's gradient along directions, see `unit_sums`.

    Args:
        name: name of the tensor.
        gradient: its gradient.
        motions: the directions.
        axis: axis of the units; None if the tensor is one unit.
    """
    ends = [(motion.start[name], motion.end[name]) for motion in motions]
    return unit_sums(gradient, ends, axis)


@torch.no_grad()
def unit_sums(gradient: Tensor, ends: Sequence[tuple[Tensor, Tensor]], axis: int | None) -> Tensor:
    """Return Σ gradient · (end − start) over each unit, (directions, units) float64.

    Differences and products use the gradient's type (the difference of two numbers within a factor
    of two is exact); sums are float64. The tensors are processed in pieces, so that what directions
    share is read once.

    Args:
        gradient: gradient of any shape.
        ends: start and end of each direction, of the same shape.
        axis: axis of the units; None if the tensor is one unit.
    """
    units = units_of(gradient, axis)
    before = 1 if axis is None else math.prod(gradient.shape[:axis])
    total = torch.zeros((len(ends), units), dtype=torch.float64, device=gradient.device)
    if not gradient.numel():
        return total
    # (before, units, after), or one row per unit if their axis comes first
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
    """Cut an array of rows, or of rows of units, into pieces that fit in the cache."""
    if view.dim() == 2:
        yield from blocks(*view.shape)
        return
    many = max(1, _BLOCK // max(1, view.shape[1] * view.shape[2]))
    for first in range(0, view.shape[0], many):
        yield (slice(first, first + many),)


def _product(gradient: Tensor, start: Tensor, end: Tensor) -> Tensor:
    difference = torch.sub(end, start)
    if difference.dtype != gradient.dtype:  # the checkpoint is stored in a higher precision
        difference = difference.to(gradient.dtype)
    return difference.mul_(gradient)


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor; that of `nn.Embedding(sparse=True)` is sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient
