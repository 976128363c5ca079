"""Another path through the checkpoints around segments that follow each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...numerics.long_segments import half_of
from .passed import Passed

if TYPE_CHECKING:
    from ...numerics.path import SegmentPath
    from ..requests import StoredPoints


class PathsOfStretch:
    """Tells the path through the checkpoints around segments that follow each other.

    Args:
        points: the checkpoints: those of the stretch, one before it and one after it where there
            are any.
        breaks: positions of checkpoints after which no segment follows.
        first: position of the checkpoint it starts from.
        passed: those that the replay has gone through.
    """

    def __init__(
        self, points: StoredPoints, breaks: frozenset[int], first: int, passed: Passed
    ) -> None:
        self._checkpoints, self._breaks = points.checkpoints, breaks
        self._first, self._passed = first, passed

    def of(self, row: int) -> SegmentPath:
        """Return the path of the segment at a position of the stretch."""
        from ...numerics.path import Neighbours, SegmentPath

        index = self._first + row
        before, length, after = (self._length(place) for place in (index - 1, index, index + 1))
        assert length is not None, "a segment has both ends"
        return SegmentPath(
            Neighbours(
                lengths=(before, length, after),
                point=lambda position: self._passed.at(index + position),
                half=half_of(index, (before, length, after)),
            )
        )

    def _length(self, index: int) -> int | None:
        """Return the training steps of the segment from a checkpoint on; None where there is
        none.
        """
        start, end = (self._checkpoints.get(place) for place in (index, index + 1))
        if start is None or end is None or index in self._breaks:
            return None
        return end.step - start.step
