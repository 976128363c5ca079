"""Define the shards of a split's examples and the nodes at which losses are evaluated over them.

The values name checkpoints by their position in the trajectory and are sent between processes.
"""

from __future__ import annotations

from dataclasses import dataclass


def part_of(examples: int, batch_size: int, shards: int, shard: int) -> range:
    """Return the positions of the examples of one shard: whole batches, distributed as evenly as
    possible.

    >>> [part_of(10, 2, 3, shard) for shard in range(3)]
    [range(0, 2), range(2, 6), range(6, 10)]

    Args:
        examples: number of examples of the split.
        batch_size: examples per batch.
        shards: number of shards.
        shard: index of the shard.
    """
    batches = -(-examples // batch_size)
    start, stop = (batch_size * (place * batches // shards) for place in (shard, shard + 1))
    return range(start, min(stop, examples))


@dataclass(frozen=True)
class Line:
    """Describe a straight line between checkpoints; as a direction, the motion along it.

    Attributes:
        start: position of the checkpoint where it starts.
        segments: number of segments it spans: 1, 2 if it skips the checkpoint in its middle, or 0
            for a single checkpoint.
    """

    start: int
    segments: int = 1

    @property
    def end(self) -> int:
        """Return the position of the checkpoint where it ends."""
        return self.start + self.segments

    @property
    def checkpoints(self) -> set[int]:
        """Return the checkpoints needed to compute it."""
        return {self.start, self.end}


@dataclass(frozen=True)
class Tangent:
    """Describe a direction: the difference between the tangent of a segment's curve and the
    segment's motion.

    Attributes:
        start: position of the checkpoint where the segment starts.
        end: end of the segment where the tangent is taken: 0 or 1.
        beside: neighbour that determines it, relative to the start: −1 or 2.
    """

    start: int
    end: int
    beside: int

    @property
    def checkpoints(self) -> set[int]:
        """Return the checkpoints needed to compute it."""
        return {self.start, self.start + 1, self.start + self.beside}


@dataclass(frozen=True)
class Curve:
    """Describe the curve through both ends of a segment; as a direction, the difference between the
    motion at its middle and the segment's motion.

    Attributes:
        start: position of the checkpoint where the segment starts.
        beside: neighbours that determine the tangents at its start and at its end, see `Tangent`.
    """

    start: int
    beside: tuple[int, int]

    @property
    def checkpoints(self) -> set[int]:
        """Return the checkpoints needed to compute it."""
        return {self.start, self.start + 1, *(self.start + place for place in self.beside)}


Direction = Line | Tangent | Curve


@dataclass(frozen=True)
class Node:
    """Describe a point at which losses are evaluated.

    Attributes:
        path: path that contains the point.
        x: position on the path, 0 ≤ x < 1; for a curve, only its middle.
        along: directions along which gradients are summed; empty if only losses are needed.
    """

    path: Line | Curve
    x: float
    along: tuple[Line | Tangent | Curve, ...]

    @property
    def checkpoints(self) -> set[int]:
        """Return all checkpoints needed for the evaluation."""
        of_point = {self.path.start} if self.x == 0 else self.path.checkpoints
        return of_point.union(*(direction.checkpoints for direction in self.along))


def ends_of(start: int) -> tuple[int, int]:
    """Return the positions of the checkpoints at both ends of a segment."""
    return start, start + 1
