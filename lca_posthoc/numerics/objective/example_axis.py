"""Sums over the entries of each example, along the axis of a tensor that runs over the examples.

Nothing tells from a shape: sequence-first models, attention and models that flatten batch and time
put the examples elsewhere than first. Every axis whose length is a multiple of the number of
examples may be theirs, in one of two orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schema import SiteRecord


@dataclass(frozen=True)
class ExampleAxis:
    """The place of the examples in a tensor.

    Attributes:
        axis: runs over the examples, and over what each of them has several entries of.
        is_inner: whether examples vary fastest along it; else the entries of one are neighbours.
    """

    axis: int
    is_inner: bool = False

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Tell whether a tensor of this shape may have so many examples there."""
        return self.axis < len(shape) and shape[self.axis] > 0 and not shape[self.axis] % examples

    def fold(self, along: Tensor, examples: int) -> Tensor:
        """Return sums by example of sums along the axis, (examples,)."""
        if len(along) == examples:
            return along
        if self.is_inner:
            return along.reshape(-1, examples).sum(0)
        return along.reshape(examples, -1).sum(1)


FIRST = ExampleAxis(0)
Signature = tuple[str, tuple[str, ...]]  # an operation, and the parameters it has
# by position of an operation with parameters what it is, and where the examples are in its output;
# None where no axis is theirs
Axes = Sequence[tuple[Signature, ExampleAxis | None]]


def recorded(axes: Axes) -> list[SiteRecord]:
    """Return axes as a run records them."""
    return [
        {
            "operation": operation,
            "tensors": list(tensors),
            "axis": None if place is None else place.axis,
            "is_inner": place is not None and place.is_inner,
        }
        for (operation, tensors), place in axes
    ]


def recalled(records: Iterable[SiteRecord]) -> Axes:
    """Return axes from what a run records of them."""
    return [
        (
            (record["operation"], tuple(record["tensors"])),
            None if record["axis"] is None else ExampleAxis(record["axis"], record["is_inner"]),
        )
        for record in records
    ]


def possible_axes(shape: Sequence[int], examples: int) -> Iterator[ExampleAxis]:
    """Yield every place the examples may have in a tensor, the likeliest first.

    >>> [(place.axis, place.is_inner) for place in possible_axes((6, 5, 3), 3)]
    [(0, False), (0, True), (2, False)]
    """
    for axis, size in enumerate(shape):
        for is_inner in (False, True):
            place = ExampleAxis(axis, is_inner)
            if place.fits(shape, examples) and not (is_inner and examples in (1, size)):
                yield place


def sums_along(products: Tensor, axis: int) -> Tensor:
    """Return the sum over all axes but one, float64.

    The last axes, all but one of those behind it, or the last alone, are first summed in the type of
    the products, by halves: torch's sums of float32 numbers in float64 take twenty times as long.
    """
    last = products.dim() - 1
    if axis < last:
        products = products.flatten(max(axis + 1, min(axis + 2, last))).sum(-1)
    others = [other for other in range(products.dim()) if other != axis]
    return products.sum(others, dtype=torch.float64) if others else products.double()
