r"""The loss along directions in the space of parameters.

With $b$ orthonormal, $A_b = \langle b, \Delta\theta\rangle\langle b, \bar g\rangle$ is what the
motion along $b$ did to the loss; what is left of the allocation is what the rest of the motion did.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .objective import Motion, Numbers, blocks, unit_sums
from .parts import Computed, Parts, Point, displacement


@dataclass(frozen=True, kw_only=True)
class AlongDirections:
    """The loss along directions on one segment.

    Attributes:
        allocated: to each direction, ([groups, ]directions), in units of loss.
        motion: ⟨b, Δθ⟩ of each.
        distance: ‖Δθ‖₂.
    """

    allocated: Numbers
    motion: list[float]
    distance: float


class SegmentDirections:
    """Directions as parts of the motion of one segment.

    Args:
        basis: of some tensors, (directions, *shape), orthonormal over all of them together.
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
    def shares(self, end: Point, sums: Mapping[str, Numbers]) -> AlongDirections:
        """Return what each direction is allocated.

        Args:
            end: every tensor at the end of the segment.
            sums: along the directions, ([groups, ]directions) of each tensor.
        """
        motion = np.zeros(self._count)
        for name, rows in self._basis.items():
            ends = [(self._start[name], end[name])]
            motion += [float(unit_sums(row, ends, None)) for row in rows]
        of_gradient: Numbers = np.zeros(self._count)
        for values in sums.values():
            of_gradient = of_gradient + values
        return AlongDirections(
            allocated=of_gradient * motion, motion=motion.tolist(), distance=self._distance(end)
        )

    def _distance(self, end: Point) -> float:
        squares = []
        for name in self._parameters:
            start, after = self._start[name].reshape(1, -1), end[name].reshape(1, -1)
            for place in blocks(*start.shape):
                difference = after[place].double() - start[place].double()
                squares.append(float(difference.square_().sum()))
        return math.sqrt(math.fsum(squares))


class Together:
    """Several parts of one motion, as one.

    Args:
        parts: at most one of which needs a signal.
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
        """Return sums along all directions, ([groups, ]directions) of each tensor, for each part
        those along its own.
        """
        ends = np.cumsum(self._lengths)
        places = [slice(end - length, end) for end, length in zip(ends, self._lengths, strict=True)]
        return [
            {name: np.asarray(values)[..., place] for name, values in sums.items()}
            for place in places
        ]
