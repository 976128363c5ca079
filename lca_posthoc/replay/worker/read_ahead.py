"""The checkpoints of a span, in turn: a thread reads the next one while a segment is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from ...checkpoints.trajectory import read_checkpoint
from .state import Point, checkpoint_at, point_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Objective
    from ..requests import StoredPoints

# bytes of parameters, of which a worker on the CPU has a copy sooner than it must: a larger model
# computes for so long that the time to read a checkpoint counts for little beside it
LARGEST = 2**28


class PointsAhead(Iterator[tuple[int, Point]]):
    """Training step and tensors of the checkpoints at both ends of some segments.

    Only reading is ahead: a checkpoint goes to the device, and statistics are recalibrated to it,
    where it is asked for. What was wrong with it is raised there too. The thread ends with the
    context. On a CPU, a checkpoint of a large model is read where it is asked for.

    Args:
        points: the checkpoints.
        rows: the segments.
        objective: evaluates losses at the checkpoints.
    """

    def __init__(self, points: StoredPoints, rows: slice, objective: Objective) -> None:
        self._points, self._objective = points, objective
        self._left = iter(range(rows.start, rows.stop + 1))
        self._reader = ThreadPoolExecutor(1, "lca-read-ahead")
        self._reading: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown()

    def begin_next(self) -> None:
        """Begin to read the checkpoint after the last that was asked for, if there is one and it is
        not large: it takes memory from here on.
        """
        # for a GPU it waits in the memory of the host
        if self._objective.device.type != "cpu" or self._objective.parameter_bytes <= LARGEST:
            self._begin()

    def _begin(self) -> None:
        index = next(self._left, None) if self._reading is None else None
        if index is not None:
            checkpoint = checkpoint_at(self._points, index)
            reading = self._reader.submit(read_checkpoint, checkpoint, self._points.names)
            self._reading = checkpoint.step, reading

    def __next__(self) -> tuple[int, Point]:
        """Return the next checkpoint, once it is read."""
        self._begin()
        if self._reading is None:
            raise StopIteration
        (step, reading), self._reading = self._reading, None
        return step, point_of(reading.result(), self._objective)
