"""Sum over the entries of each example, along the axis of a tensor that runs over the examples.

A shape does not reveal that axis: sequence-first models, attention, and models that flatten batch
and time do not put the examples first. Every axis whose length is a multiple of the number of
examples may be that axis, with the examples in one of two orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schema import SiteRecord


@dataclass(frozen=True)
class ExampleAxis:
    """Locate the examples in a tensor.

    Attributes:
        axis: axis that runs over the examples and, if each has several entries, over the entries.
        is_inner: whether examples vary fastest along it; if not, the entries of one example are
            neighbours.
    """

    axis: int
    is_inner: bool = False

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Return whether a tensor may have its examples there.

        Args:
            shape: shape of the tensor.
            examples: number of examples.
        """
        return self.axis < len(shape) and shape[self.axis] > 0 and not shape[self.axis] % examples

    def fold(self, along: Tensor, examples: int) -> Tensor:
        """Reduce sums along the axis to sums by example, (examples,).

        Args:
            along: sums along the axis, (length of the axis,).
            examples: number of examples.
        """
        if len(along) == examples:
            return along
        if self.is_inner:
            return along.reshape(-1, examples).sum(0)
        return along.reshape(examples, -1).sum(1)


FIRST = ExampleAxis(0)
Signature = tuple[str, tuple[str, ...]]  # an operation and its parameters
# for each operation with parameters, in order: its signature, and the examples in its output, or None
# if no axis runs over them
Axes = Sequence[tuple[Signature, ExampleAxis | None]]


def recorded(axes: Axes) -> list[SiteRecord]:
    """Convert axes to the form that a run records."""
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
    """Convert axes from the form that a run records."""
    return [
        (
            (record["operation"], tuple(record["tensors"])),
            None if record["axis"] is None else ExampleAxis(record["axis"], record["is_inner"]),
        )
        for record in records
    ]


def possible_axes(shape: Sequence[int], examples: int) -> Iterator[ExampleAxis]:
    """Yield every possible location of the examples in a tensor, the likeliest first.

    >>> [(place.axis, place.is_inner) for place in possible_axes((6, 5, 3), 3)]
    [(0, False), (0, True), (2, False)]

    Args:
        shape: shape of the tensor.
        examples: number of examples.
    """
    for axis, size in enumerate(shape):
        for is_inner in (False, True):
            place = ExampleAxis(axis, is_inner)
            if place.fits(shape, examples) and not (is_inner and examples in (1, size)):
                yield place


def sums_along(products: Tensor, axis: int) -> Tensor:
    """Sum over all axes but one, in float64.

    The last axes are first summed in the type of the products, by pairwise summation: torch takes
    twenty times as long to sum float32 numbers in float64.

    Args:
        products: the numbers.
        axis: the axis to keep.
    """
    last = products.dim() - 1
    if axis < last:
        products = products.flatten(max(axis + 1, min(axis + 2, last))).sum(-1)
    others = [other for other in range(products.dim()) if other != axis]
    return products.sum(others, dtype=torch.float64) if others else products.double()
