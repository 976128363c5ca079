r"""Parts of the motion of a segment: directions along which the gradients at its nodes are taken as
well.

What a part $u$ of the motion did to the loss is $\sum_q w_q \langle g(\theta_q), u\rangle$, the
same sum as for the motion itself. Directions are multiplied by their factors once the sums are
there, so that points which are held anyway serve as directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .objective import Motion

Point = Mapping[str, Tensor]


class Parts(Protocol):
    """The parts of the motion of one segment."""

    @property
    def signal(self) -> str | None:
        """Return the loss whose gradient at the start of a segment is one of the directions; None
        where it never is.
        """

    @property
    def needs_signal(self) -> bool:
        """Tell whether it is on this segment."""

    def directions(self, signal: Point | None) -> Sequence[Motion]:
        """Return the directions, the same ones each time.

        Args:
            signal: the gradient of that loss, where it is needed.
        """


@dataclass
class Split:
    """The parts of a segment's motion, and the gradient at its start once that is known.

    Attributes:
        parts: of the motion.
        gradient: of the signal at the start of the segment; None until it is known, and where no
            part needs it.
    """

    parts: Parts
    gradient: Point | None = None

    @property
    def awaits(self) -> str | None:
        """Return the loss whose gradient at the start is needed and not known yet."""
        known = self.gradient is not None or not self.parts.needs_signal
        return None if known else self.parts.signal

    @property
    def directions(self) -> Sequence[Motion]:
        """Return the directions."""
        return self.parts.directions(self.gradient)


class Between(Mapping[str, Tensor]):
    """The point θ + x(θ′ − θ), each tensor computed when it is asked for; tensors that are not
    floating (counters) are loaded, never interpolated.
    """

    def __init__(self, start: Point, end: Point, x: float) -> None:
        self._start, self._end, self._x = start, end, x

    def __getitem__(self, name: str) -> Tensor:
        start, end = self._start[name], self._end[name]
        if start.is_floating_point():
            return torch.lerp(start, end, self._x)
        return start if self._x < 1 else end

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


class Computed(Mapping[str, Tensor]):
    """A tensor for each of some names, computed when it is asked for.

    Args:
        names: of the tensors.
        compute: returns one of them.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def only(values: Point, names: Collection[str], like: Point) -> Point:
    """Return some tensors of a point; all others are 0.

    Args:
        values: a point that has these.
        names: of these.
        like: tensors of the shapes of all.
    """
    chosen = frozenset(names)

    def tensor(name: str) -> Tensor:
        if name in chosen:
            return values[name]
        shape = like[name]
        return shape.new_zeros(()).expand(shape.shape)  # takes no memory

    return Computed(like, tensor)


def displacement(values: Point, like: Point) -> Motion:
    """Return a direction that is no difference of two points.

    Args:
        values: of some tensors; it is 0 in all others.
        like: tensors of the shapes of all.
    """
    return Motion(only({}, (), like), only(values, values.keys(), like))
