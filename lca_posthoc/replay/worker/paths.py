"""Another path through the checkpoints around every segment of a span."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...numerics.long_segments import half_of
from .passed import Passed

if TYPE_CHECKING:
    from ...numerics.path import SegmentPath
    from ..requests import StoredPoints


class PathsOfSpan:
    """Tells the path through the checkpoints around every segment of a span.

    Args:
        points: the checkpoints: those of the span, one before it and one after it where there are
            any.
        first: position of the first one of the span.
        passed: those that the replay has gone through.
    """

    def __init__(self, points: StoredPoints, first: int, passed: Passed) -> None:
        self._checkpoints, self._first, self._passed = points.checkpoints, first, passed

    def of(self, row: int) -> SegmentPath:
        """Return the path of the segment at a position of the span."""
        from ...numerics.path import Neighbours, SegmentPath

        index = self._first + row
        before, length, after = (self._length(place) for place in (index - 1, index, index + 1))
        assert length is not None, "a segment of the span has both ends"
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
        return None if start is None or end is None else end.step - start.step
