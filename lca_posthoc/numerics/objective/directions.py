"""Gradients of a batch, and what is taken in of them: the whole of each, or sums along directions.

A sum over some parameters of the gradient times a direction is linear in the gradient, so it is
the sum over batches of the same sum of each batch's gradient. As soon as the gradient of a tensor
is complete for a batch it is multiplied by the direction, summed, and freed: no gradient is ever
held but the one at hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .in_a_row import OfUnits, Units, segment_sums
from .readings import Reading

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
    _differences: dict[Bundle, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def differences(self, bundle: Bundle) -> Tensor:
        """Return end − start of some small tensors, in a row."""
        if bundle not in self._differences:
            start, end = bundle.rows(self)
            self._differences[bundle] = end - start
        return self._differences[bundle]


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

    def of_tensors(self, taken: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return by tensor what was taken in, of every key."""


class NoGradients:
    """Takes in nothing: the loss alone is wanted."""

    names: Collection[str] = ()
    shapes: Mapping[str, tuple[int, ...]] = {}
    dtype = mean_dtype = torch.float64

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Do nothing."""
        return ()

    def of_tensors(self, taken: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return nothing."""
        return taken


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

    def backward(self, total: Tensor, retain_graph: bool, take: Take) -> Collection[str]:
        """Run a backward pass from `total`; call `take(name, values)` for each tensor."""
        reached: list[str] = []

        def complete(name: str, gradient: Tensor) -> None:
            reached.append(name)
            take(name, self._taken(name, gradient))

        self._run(total, retain_graph, complete)
        return reached

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

    def _taken(self, name: str, gradient: Tensor) -> Tensor:
        """Return what is taken in of a tensor's gradient."""
        raise NotImplementedError

    def of_tensors(self, taken: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what was taken in of each tensor."""
        return taken


class WholeGradients(_Backward):
    """Takes in the gradients of some tensors as they are; their mean has the type of the tensors.

    Args:
        tensors: leaves of autograd's, by name.
        dtype: in which they are summed over batches.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        super().__init__(tensors)
        self.dtype = dtype
        self.mean_dtype = next((tensor.dtype for tensor in tensors.values()), dtype)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def _taken(self, name: str, gradient: Tensor) -> Tensor:
        return gradient


class SquaredNorms(_Backward):
    """Takes in Σ g² of each tensor's gradient of a batch, which no sum over batches has a use for.

    Args:
        tensors: leaves of autograd's, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.shapes = dict.fromkeys(tensors, ())

    def _taken(self, name: str, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(1, -1)
        parts = [flat[place].double().square_().sum() for place in blocks(*flat.shape)]
        return torch.stack(parts).sum() if parts else flat.new_zeros((), dtype=torch.float64)


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
                sums[:, bundle.place] = bundle.sums_along(waiting, motions)
        if reached:
            take(EVERY, sums)
        return reached

    def sums(self, total: Tensor) -> Mapping[str, Tensor]:
        """Return the sums of the gradient of `total` along directions, (directions, units) of each
        tensor that it depends on.
        """
        taken: dict[str, Tensor] = {}
        if not total.requires_grad:
            return taken
        reached = self.backward(total, False, taken.__setitem__)
        if not reached:
            return taken
        of_units = self.of_tensors(taken)
        return {name: of_units[name] for name in reached}

    def of_tensors(self, taken: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums of each tensor's units."""
        return OfUnits(taken[EVERY], self.units) if taken else {}


EVERY = "every unit"  # the key of what is taken in of all tensors at once
_SMALL = 2**13  # numbers of a tensor that is taken together with others


class Bundle:
    """Some small tensors whose gradients are multiplied and summed together.

    Args:
        shapes: of the tensors.
        axes: of the units of each; None where it is one unit.
        place: of their units in the row of all.
        device: where they are.

    Attributes:
        names: of the tensors.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        axes: Mapping[str, int | None],
        place: slice,
        device: torch.device,
    ) -> None:
        self.names, self.place, self._shapes = tuple(shapes), place, shapes
        sizes, order, first = [0], list[Tensor](), 0
        for name, shape in shapes.items():
            axis, numbers = axes[name], shape.numel()
            units = 1 if axis is None else shape[axis]
            sizes += [numbers // max(1, units)] * units
            positions = torch.arange(first, first + numbers).reshape(shape)
            order.append((positions if axis is None else positions.movedim(axis, 0)).reshape(-1))
            first += numbers
        self._numbers, self._count = first, len(sizes) - 1
        by_unit = torch.cat(order)
        is_in_order = bool((by_unit == torch.arange(first)).all())
        self._by_unit = None if is_in_order else by_unit.to(device)
        self._ends = torch.tensor(sizes).cumsum(0).to(device)
        self._offsets: dict[int, Tensor] = {}

    def sums_along(self, gradients: Mapping[str, Tensor], motions: Sequence[Motion]) -> Tensor:
        """Return Σ gradient · motion over each unit, (motions, units) float64; 0 of tensors without
        a gradient. Differences and products are of the gradients' type.
        """
        like = next(gradients[name] for name in self.names if name in gradients)
        row = self._row(
            {
                name: gradients[name] if name in gradients else like.new_zeros(shape)
                for name, shape in self._shapes.items()
            }
        )
        products = [row * motion.differences(self).to(row.dtype) for motion in motions]
        return self.sums(torch.cat(products), len(motions))

    def sums(self, rows: Tensor, count: int) -> Tensor:
        """Return sums over each unit of some rows that follow each other, (rows, units) float64."""
        if count not in self._offsets:
            starts = self._numbers * torch.arange(count, device=self._ends.device)[:, None]
            ends = (self._ends[1:] + starts).reshape(-1)
            self._offsets[count] = torch.cat([self._ends[:1], ends])
        sums = segment_sums(rows.double(), self._offsets[count])
        return sums.reshape(count, self._count)

    @torch.no_grad()
    def between(self, motion: Motion, x: float) -> dict[str, Tensor]:
        """Return start + x(end − start) of each tensor."""
        assert self._by_unit is None, "tensors are one unit each, whose numbers stay in order"
        row = torch.lerp(*self.rows(motion), x)
        parts = torch.split(row, [shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    @torch.no_grad()
    def rows(self, motion: Motion) -> tuple[Tensor, Tensor]:
        """Return both ends of a motion, the numbers of one unit after those of another."""
        return self._row(motion.start), self._row(motion.end)

    def _row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        row = torch.cat([tensors[name].reshape(-1) for name in self.names])
        return row if self._by_unit is None else row[self._by_unit]


class Plan:
    """Which tensors are summed together, and where the sums of each are.

    Args:
        shapes: of the tensors.
        axes: of the units of each; None where it is one unit.
        dtypes: of each, one of which the tensors of a bundle have.
        device: where they are.

    Attributes:
        bundles: of small ones.
        bundled: names of these.
        units: of all.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        axes: Mapping[str, int | None],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> None:
        small: list[dict[str, torch.Size]] = []
        last: dict[torch.dtype, dict[str, torch.Size]] = {}  # bundle of a type
        for name, shape in shapes.items():
            if is_small(shape):
                bundle = last.get(dtypes[name])
                numbers = sum(other.numel() for other in (bundle or {}).values())
                if bundle is None or numbers + shape.numel() > _BLOCK:
                    bundle = last[dtypes[name]] = {}
                    small.append(bundle)
                bundle[name] = shape
        self.bundled = {name: None for of_bundle in small for name in of_bundle}.keys()
        alone = {name: shape for name, shape in shapes.items() if name not in self.bundled}
        self.units = Units(
            {
                name: 1 if (axis := axes[name]) is None else shape[axis]
                for of_bundle in (*small, alone)
                for name, shape in of_bundle.items()
            }
        )
        places = self.units.places
        self.bundles = [
            Bundle(
                of_bundle,
                axes,
                slice(
                    min(places[name].start for name in of_bundle),
                    max(places[name].stop for name in of_bundle),
                ),
                device,
            )
            for of_bundle in small
        ]


def is_small(shape: torch.Size) -> bool:
    """Tell whether a tensor is taken together with others."""
    return shape.numel() <= _SMALL


def plan_of(tensors: Mapping[str, Tensor], axes: Mapping[str, int | None]) -> Plan:
    """Return how tensors are summed, the same plan each time."""
    described = tuple(
        (name, tensor.shape, axes[name], tensor.dtype) for name, tensor in tensors.items()
    )
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    return _planned(described, device)


@functools.lru_cache(maxsize=16)
def _planned(
    described: tuple[tuple[str, torch.Size, int | None, torch.dtype], ...], device: torch.device
) -> Plan:
    return Plan(
        {name: shape for name, shape, _, _ in described},
        {name: axis for name, _, axis, _ in described},
        {name: dtype for name, _, _, dtype in described},
        device,
    )


def units_of(tensor: Tensor, axis: int | None) -> int:
    """Return the number of a tensor's units: its extent along their axis; 1 without one."""
    return 1 if axis is None else tensor.shape[axis]


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


class Distances(Mapping[str, float]):
    """Σ|end − start| of some tensors, float64.

    Args:
        parts: of some tensors each: their names, and sums, (tensors, pieces), that add up to those
            of each tensor.

    Attributes:
        readings: their numbers, which come to the host when they are first wanted.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[str], Reading]]) -> None:
        self._names = [names for names, _ in parts]
        self.readings = [reading for _, reading in parts]

    @classmethod
    def known(cls, distances: Mapping[str, float]) -> Distances:
        """Return those that are known already."""
        numbers = np.array(list(distances.values()))[:, None]
        return cls([(tuple(distances), Reading.known(numbers))])

    @functools.cached_property
    def _known(self) -> dict[str, float]:
        return {
            name: math.fsum(pieces)
            for names, reading in zip(self._names, self.readings, strict=True)
            for name, pieces in zip(names, reading.numbers.tolist(), strict=True)
        }

    def __getitem__(self, name: str) -> float:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


@torch.no_grad()
def distances(motion: Motion, names: Iterable[str]) -> Distances:
    """Return Σ|end − start| of some tensors, float64."""
    parts: list[tuple[Sequence[str], Reading]] = []
    starts, ends = dict[str, Tensor](), dict[str, Tensor]()  # of small ones
    for name in names:
        start, end = motion.start[name], motion.end[name]
        if is_small(start.shape):
            starts[name], ends[name] = start, end
            continue
        start, end = start.reshape(1, -1), end.reshape(1, -1)
        pieces = [
            end[rows, columns].to(torch.float64, copy=True).sub_(start[rows, columns]).abs_().sum()
            for rows, columns in blocks(*start.shape)
        ]
        parts.append(((name,), Reading(torch.stack(pieces)[None])))
    for bundle in plan_of(starts, dict.fromkeys(starts)).bundles:
        before, after = (
            row.to(torch.float64, copy=True) for row in bundle.rows(Motion(starts, ends))
        )
        sums = bundle.sums(after.sub_(before).abs_(), 1)
        parts.append((bundle.names, Reading(sums.T)))
    return Distances(parts)


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient as an ordinary tensor; that of `nn.Embedding(sparse=True)` is none."""
    return gradient.to_dense() if gradient.is_sparse else gradient
