"""The shards of a split's examples, and the nodes at which losses are evaluated over them."""

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
class Node:
    """A point at which losses are evaluated.

    Attributes:
        checkpoint: the position of a checkpoint in the trajectory.
        x: how far the point lies from there towards the next checkpoint, 0 ≤ x < 1.
        along: the segments along whose motions gradients are summed, by the positions of the
            checkpoints they start from: one at an inner point, none where losses alone are wanted.
    """

    checkpoint: int
    x: float
    along: tuple[int, ...]

    @property
    def checkpoints(self) -> set[int]:
        """Return the positions of all checkpoints that it takes to evaluate there."""
        return {self.checkpoint, *(end for start in self.along for end in ends_of(start))}


def ends_of(start: int) -> tuple[int, int]:
    """Return the positions of the checkpoints between which a segment lies."""
    return start, start + 1
