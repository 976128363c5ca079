"""The shards of a split's examples, and the nodes at which losses are evaluated over them: values
that name checkpoints by their position in the trajectory and go between processes.
"""

from __future__ import annotations

from dataclasses import dataclass


def part_of(examples: int, batch_size: int, shards: int, shard: int) -> range:
    """Return the positions of the examples of one shard: whole batches, as even as these allow.

    >>> [part_of(10, 2, 3, shard) for shard in range(3)]
    [range(0, 2), range(2, 6), range(6, 10)]
    """
    batches = -(-examples // batch_size)
    start, stop = (batch_size * (place * batches // shards) for place in (shard, shard + 1))
    return range(start, min(stop, examples))


@dataclass(frozen=True)
class Line:
    """A straight line between checkpoints; as a direction, the motion along it.

    Attributes:
        start: the checkpoint it starts from.
        segments: how many it spans: 1, 2 where the checkpoint in its middle is left out, or 0 of a
            checkpoint alone.
    """

    start: int
    segments: int = 1

    @property
    def end(self) -> int:
        """Return the checkpoint it ends at."""
        return self.start + self.segments

    @property
    def checkpoints(self) -> set[int]:
        """Return the checkpoints that it takes to follow it."""
        return {self.start, self.end}


@dataclass(frozen=True)
class Tangent:
    """A direction: what the tangent of a segment's curve differs by from the segment's motion.

    Attributes:
        start: the checkpoint the segment starts from.
        end: of the segment, where the tangent is taken: 0 or 1.
        beside: the neighbour that tells it, counted from the start: −1 or 2.
    """

    start: int
    end: int
    beside: int

    @property
    def checkpoints(self) -> set[int]:
        """Return the checkpoints that it takes to know it."""
        return {self.start, self.start + 1, self.start + self.beside}


@dataclass(frozen=True)
class Curve:
    """The curve through both ends of a segment; as a direction, what the motion in its middle differs
    by from the segment's motion.

    Attributes:
        start: the checkpoint the segment starts from.
        beside: the neighbours that tell the tangents at its start and at its end, see `Tangent`.
    """

    start: int
    beside: tuple[int, int]

    @property
    def checkpoints(self) -> set[int]:
        """Return the checkpoints that it takes to follow it."""
        return {self.start, self.start + 1, *(self.start + place for place in self.beside)}


Direction = Line | Tangent | Curve


@dataclass(frozen=True)
class Node:
    """A point at which losses are evaluated.

    Attributes:
        path: it lies on.
        x: how far along it, 0 ≤ x < 1; of a curve, its middle alone.
        along: the directions along which gradients are summed; none where losses alone are wanted.
    """

    path: Line | Curve
    x: float
    along: tuple[Line | Tangent | Curve, ...]

    @property
    def checkpoints(self) -> set[int]:
        """Return all checkpoints that it takes to evaluate there."""
        of_point = {self.path.start} if self.x == 0 else self.path.checkpoints
        return of_point.union(*(direction.checkpoints for direction in self.along))


def ends_of(start: int) -> tuple[int, int]:
    """Return the positions of the checkpoints between which a segment lies."""
    return start, start + 1
