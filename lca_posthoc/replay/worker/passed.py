"""The checkpoints that a replay has gone through, as long as they are needed, and those it looks ahead
at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .state import point_at

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Objective
    from ..requests import StoredPoints

Walk = Iterator[tuple[int, Mapping[str, "Tensor"]]]


class Passed:
    """Keeps the last checkpoints of a replay, by their position in the trajectory.

    Args:
        points: the checkpoints, some before and after these among them where they are needed.
        segments: those that are replayed in turn, by the positions of the checkpoints they start
            from.
        objective: on whose device they are.
    """

    def __init__(self, points: StoredPoints, segments: slice, objective: Objective) -> None:
        self._points, self._segments, self._objective = points, segments, objective
        self._kept: dict[int, Mapping[str, Tensor]] = {}
        self._walk: Walk = iter(())
        self._upcoming = segments.start

    def remember(self, walk: Walk) -> Walk:
        """Yield the checkpoints at their ends, and keep them; `walk` may go on after the last one."""
        self._walk = walk
        for index in range(self._segments.start, self._segments.stop + 1):
            yield self._points.checkpoints[index].step, self.at(index)

    def at(self, index: int) -> Mapping[str, Tensor]:
        """Return a checkpoint as losses are evaluated there: one that has gone by or is still to
        come, or one before them, which is read.
        """
        while self._upcoming <= index:
            _, point = next(self._walk)
            self._kept[self._upcoming] = point
            self._upcoming += 1
        if index not in self._kept:
            self._kept[index] = point_at(self._points, index, self._objective)
        return self._kept[index]

    def forget(self, index: int) -> None:
        """Give up a checkpoint, if it is kept."""
        self._kept.pop(index, None)
