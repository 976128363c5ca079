"""Keep the checkpoints that a replay has passed for as long as they are needed, and those it reads
ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ...errors import NotFiniteError
from .state import point_at

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Objective
    from ..requests import StoredPoints

Walk = Iterator[tuple[int, Mapping[str, "Tensor"]]]


class Passed:
    """Keeps the last checkpoints of a replay, by their position in the trajectory.

    Args:
        points: the checkpoints, with some before and after those of the segments where needed.
        segments: those replayed in turn, by the positions of the checkpoints they start from.
        objective: on whose device they are.
    """

    def __init__(self, points: StoredPoints, segments: slice, objective: Objective) -> None:
        self._points, self._segments, self._objective = points, segments, objective
        self._kept: dict[int, Mapping[str, Tensor]] = {}
        self._not_finite: dict[int, NotFiniteError] = {}
        self._walk: Walk = iter(())
        self._upcoming = segments.start

    def remember(self, walk: Walk) -> Walk:
        """Yield the checkpoints at the segments' ends, and keep them; `walk` may continue after the
        last one.
        """
        self._walk = walk
        for index in range(self._segments.start, self._segments.stop + 1):
            yield self._points.checkpoints[index].step, self.at(index)

    def at(self, index: int) -> Mapping[str, Tensor]:
        """Return a checkpoint as losses are evaluated there: a passed or a later one, or one before
        them, which is read.

        Raises:
            NotFiniteError: if a number of it is not finite, each time it is asked for.
            SpanError: if it cannot be read.
        """
        while self._upcoming <= index:
            self._keep(self._upcoming, lambda: next(self._walk)[1])
            self._upcoming += 1
        if index not in self._kept and index not in self._not_finite:
            self._keep(index, lambda: point_at(self._points, index, self._objective))
        if index in self._not_finite:
            raise self._not_finite[index]
        return self._kept[index]

    def _keep(self, index: int, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep a checkpoint, or the fact that it is not finite, which does not affect its
        neighbours.
        """
        try:
            self._kept[index] = read()
        except NotFiniteError as error:
            self._not_finite[index] = error

    def is_finite(self, index: int) -> bool:
        """Tell whether all numbers of a checkpoint are finite, as `at` does.

        Raises:
            SpanError: if it cannot be read.
        """
        try:
            self.at(index)
        except NotFiniteError:
            return False
        return True

    def forget(self, index: int) -> None:
        """Drop a checkpoint, if it is kept."""
        self._kept.pop(index, None)
