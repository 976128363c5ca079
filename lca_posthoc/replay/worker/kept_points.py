"""Keep the last few checkpoints on a worker's device: shards of one segment, and of the next, need
the same ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ...base.available_memory import give_back
from ...checkpoints.trajectory import Checkpoint
from .state import Point, point_at

if TYPE_CHECKING:
    from ...numerics.objective import Objective
    from ..requests import StoredPoints

_KEPT = 3  # checkpoints: those of two neighbouring segments
_POINTS: WeakKeyDictionary[Objective, OrderedDict[Checkpoint, Point]] = WeakKeyDictionary()


class KeptPoints:
    """The last few checkpoints on the device, kept for the requests that follow.

    Args:
        points: those of a request.
        objective: evaluates losses there.
    """

    def __init__(self, points: StoredPoints, objective: Objective) -> None:
        self._points, self._objective = points, objective
        self._kept = _POINTS.setdefault(objective, OrderedDict())
        self._make_room(points.checkpoints.values())

    def at(self, index: int) -> Point:
        """Return a checkpoint."""
        checkpoint = self._points.checkpoints[index]
        if checkpoint not in self._kept:
            give_back(self._objective.parameter_bytes)  # before a checkpoint needs as much
            self._kept[checkpoint] = point_at(self._points, index, self._objective)
        return self._kept[checkpoint]

    def _make_room(self, needed: Collection[Checkpoint]) -> None:
        """Drop checkpoints that this request does not need, the least recently used first."""
        for checkpoint in list(self._kept):
            if checkpoint not in needed and len({*self._kept, *needed}) > _KEPT:
                del self._kept[checkpoint]


def forget_points(objective: Objective) -> None:
    """Drop the checkpoints that are kept for an objective."""
    _POINTS.pop(objective, None)
