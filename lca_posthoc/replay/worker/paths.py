"""Build another path through the checkpoints around consecutive segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .passed import Passed

if TYPE_CHECKING:
    from ...numerics.path import SegmentPath
    from ..requests import StoredPoints


class PathsOfStretch:
    """Returns the path through the checkpoints around each of several consecutive segments.

    Args:
        points: the checkpoints: those of the stretch, with one before and one after it if there are
            any.
        breaks: positions of checkpoints that no segment follows.
        first: position of the stretch's first checkpoint.
        passed: those that the replay has gone through.
    """

    def __init__(
        self, points: StoredPoints, breaks: frozenset[int], first: int, passed: Passed
    ) -> None:
        self._checkpoints, self._breaks = points.checkpoints, breaks
        self._first, self._passed = first, passed

    def of(self, row: int) -> SegmentPath:
        """Return the path of a segment, by its position in the stretch."""
        from ...numerics.path import Course, OtherPaths, SegmentPath

        index, checkpoints = self._first + row, self._checkpoints
        before, length, after = (self._length(place) for place in (index - 1, index, index + 1))
        assert length is not None, "a segment has both ends"
        return SegmentPath(
            OtherPaths(index, (before, length, after), self._passed.is_finite),
            Course(self._passed.at, lambda place: checkpoints[place].step),
        )

    def _length(self, index: int) -> int | None:
        """Return the training steps of the segment from a checkpoint; None where no segment starts
        there.
        """
        start, end = (self._checkpoints.get(place) for place in (index, index + 1))
        if start is None or end is None or index in self._breaks:
            return None
        return end.step - start.step
