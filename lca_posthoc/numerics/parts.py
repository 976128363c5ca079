r"""Split the motion of a segment into parts: further directions along which the gradients at its
nodes are taken.

The effect of a part $u$ of the motion on the loss is $\sum_q w_q \langle g(\theta_q), u\rangle$,
the same sum as for the motion itself. Directions are multiplied by their factors after summation,
so that existing points can serve as directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .objective import Motion

Point = Mapping[str, Tensor]


class Parts(Protocol):
    """Define the parts of the motion of one segment."""

    @property
    def signal(self) -> str | None:
        """Return the loss whose gradient at the start of a segment is one of the directions; None
        if it never is.
        """

    @property
    def needs_signal(self) -> bool:
        """Return whether this segment needs that gradient."""

    def directions(self, signal: Point | None) -> Sequence[Motion]:
        """Return the directions, the same objects each time.

        Args:
            signal: gradient of that loss, if needed.
        """


@dataclass
class Split:
    """Hold the parts of a segment's motion, and the gradient at its start once it is known.

    Attributes:
        parts: parts of the motion.
        gradient: gradient of the signal at the start of the segment; None until known, or if no
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


class Computed(Mapping[str, Tensor]):
    """Map names to tensors that are computed on access.

    Args:
        names: names of the tensors.
        compute: returns the tensor of a name.
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
    """Return some tensors of a point; all others become 0.

    Args:
        values: point that contains these tensors.
        names: their names.
        like: tensors that give the shapes of all.
    """
    chosen = frozenset(names)

    def tensor(name: str) -> Tensor:
        if name in chosen:
            return values[name]
        shape = like[name]
        return shape.new_zeros(()).expand(shape.shape)  # needs no memory

    return Computed(like, tensor)


def displacement(values: Point, like: Point) -> Motion:
    """Return a direction given by itself rather than as a difference of two points.

    Args:
        values: some tensors of the direction; it is 0 in all others.
        like: tensors that give the shapes of all.
    """
    return Motion(only({}, (), like), only(values, values.keys(), like))
