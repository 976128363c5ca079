r"""Allocate the loss change along directions in parameter space.

With $b$ orthonormal, $A_b = \langle b, \Delta\theta\rangle\langle b, \bar g\rangle$ is the effect
of the motion along $b$ on the loss; the rest of the allocation belongs to the rest of the motion.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .objective import Motion, Numbers, Reading, blocks, read, sums_along
from .parts import Computed, Parts, Point, displacement


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Hold the motion of one segment along directions.

    Attributes:
        along: ⟨b, Δθ⟩ of each direction, (directions,).
        distance: ‖Δθ‖₂.
    """

    along: np.ndarray[Any, Any]
    distance: float


class SegmentDirections:
    """Use directions as parts of the motion of one segment.

    Args:
        basis: directions in some tensors, (directions, *shape), orthonormal over all of them
            together.
        parameters: names of all parameters.
        start: every tensor of the model at the segment's start.
    """

    signal: str | None = None
    needs_signal = False

    def __init__(
        self, basis: Mapping[str, Tensor], parameters: Collection[str], start: Point
    ) -> None:
        self._basis, self._parameters, self._start = basis, parameters, start
        self._count = len(next(iter(basis.values())))

    def directions(self, signal: Point | None) -> Sequence[Motion]:
        """Return the directions."""
        return [displacement(self._row(number), self._start) for number in range(self._count)]

    def _row(self, number: int) -> Point:
        return Computed(self._basis, lambda name: self._basis[name][number])

    @torch.no_grad()
    def moved(self, end: Point) -> Moved:
        """Return how far the weights moved.

        Args:
            end: every tensor at the end of the segment.
        """
        motion, sums = Motion(self._start, end), list[Tensor]()
        for name, rows in self._basis.items():
            sums += [sums_along(name, row, [motion], None) for row in rows]
        along, squares = Reading(torch.cat(sums)), Reading(self._squares(end))
        read([along, squares])
        return Moved(
            along=sum(along.numbers.reshape(-1, self._count), np.zeros(self._count)),
            distance=math.sqrt(math.fsum(squares.numbers)),
        )

    def _squares(self, end: Point) -> Tensor:
        """Return terms that add up to Σ (end − start)² over parameters, in float64."""
        squares = []
        for name in self._parameters:
            start, after = self._start[name].reshape(1, -1), end[name].reshape(1, -1)
            for place in blocks(*start.shape):
                difference = after[place].double() - start[place].double()
                squares.append(difference.square_().sum())
        return torch.stack(squares)


def allocated_along(moved: Moved, sums: Mapping[str, Numbers]) -> Numbers:
    """Return the allocation of directions, ([groups, ]directions), in units of loss.

    Args:
        moved: how far the weights moved along them.
        sums: sums of a loss's gradient along them, ([groups, ]directions) for each tensor.
    """
    of_gradient: Numbers = np.zeros_like(moved.along)
    for values in sums.values():
        of_gradient = of_gradient + values
    return of_gradient * moved.along


class Together:
    """Combine several parts of one motion.

    Args:
        parts: the parts; at most one of them may need a signal.
    """

    def __init__(self, parts: Sequence[Parts]) -> None:
        self._parts = parts
        signals = [part.signal for part in parts if part.signal is not None]
        self.signal: str | None = signals[0] if signals else None
        self.needs_signal = any(part.needs_signal for part in parts)
        self._lengths: list[int] = []

    def directions(self, signal: Point | None) -> Sequence[Motion]:
        """Return the directions of all parts in turn."""
        of_parts = [part.directions(signal) for part in self._parts]
        self._lengths = [len(directions) for directions in of_parts]
        return [direction for directions in of_parts for direction in directions]

    def divided(self, sums: Mapping[str, Numbers]) -> list[dict[str, Numbers]]:
        """Split sums along all directions, ([groups, ]directions) for each tensor, into those of
        each part.
        """
        ends = np.cumsum(self._lengths)
        places = [slice(end - length, end) for end, length in zip(ends, self._lengths, strict=True)]
        return [
            {name: np.asarray(values)[..., place] for name, values in sums.items()}
            for place in places
        ]
