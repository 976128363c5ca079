"""The checkpoints that a replay has gone through, as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .state import stored_point_at

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Objective
    from ..requests import StoredPoints

Walk = Iterator[tuple[int, Mapping[str, "Tensor"]]]


class Passed:
    """Keeps the last checkpoints of a replay, by their position in the trajectory.

    Args:
        points: the checkpoints, the one before the span among them where there is one.
        first: position of the first one of the span.
        objective: on whose device they are.
    """

    def __init__(self, points: StoredPoints, first: int, objective: Objective) -> None:
        self._points, self._first, self._objective = points, first, objective
        self._kept: dict[int, Mapping[str, Tensor]] = {}

    def remember(self, walk: Walk) -> Walk:
        """Yield the checkpoints of the span, and keep them."""
        for index, (step, point) in enumerate(walk, self._first):
            self._kept[index] = point
            yield step, point

    def at(self, index: int) -> Mapping[str, Tensor]:
        """Return a checkpoint: one that has gone by, or the one before the span, which is read."""
        if index not in self._kept:
            self._kept[index] = stored_point_at(self._points, index, self._objective)
        return self._kept[index]

    def forget(self, index: int) -> None:
        """Give up a checkpoint, if it is kept."""
        self._kept.pop(index, None)
