"""The checkpoints of a span, in turn: a thread reads the next one while a segment is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from ...base.available_memory import give_back
from ...checkpoints.trajectory import Checkpoint, read_checkpoint
from .state import checkpoint_at, point_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Arriving, Objective
    from ..requests import StoredPoints

# bytes of parameters, of which a worker on the CPU has a copy sooner than it must: a larger model
# computes for so long that the time to read a checkpoint counts for little beside it
LARGEST = 2**26


class PointsAhead(Iterator[tuple[int, Mapping[str, "Tensor"]]]):
    """Training step and tensors of the checkpoints at both ends of some segments.

    Reading is ahead, and copying to a GPU: statistics are recalibrated to a checkpoint where it is
    asked for. What was wrong with it is raised there too. The thread ends with the context. On a
    CPU, a checkpoint of a large model is read where it is asked for.

    Args:
        points: the checkpoints.
        rows: the segments.
        objective: evaluates losses at the checkpoints.
    """

    def __init__(self, points: StoredPoints, rows: slice, objective: Objective) -> None:
        self._points, self._objective = points, objective
        self._left = iter(range(rows.start, rows.stop + 1))
        self._reader = ThreadPoolExecutor(1, "lca-read-ahead")
        self._ahead = objective.device.type != "cpu" or objective.parameter_bytes <= LARGEST
        self._reading: tuple[int, Future[dict[str, Tensor] | Arriving[dict[str, Tensor]]]] | None
        self._reading = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown()

    def begin_next(self) -> None:
        """Begin to read the checkpoint after the last that was asked for, if there is one and it is
        not large: it takes memory from here on.
        """
        index = next(self._left, None) if self._ahead and self._reading is None else None
        if index is not None:
            checkpoint = checkpoint_at(self._points, index)
            self._reading = checkpoint.step, self._reader.submit(self._read, checkpoint)

    def _read(self, checkpoint: Checkpoint) -> dict[str, Tensor] | Arriving[dict[str, Tensor]]:
        """Return a checkpoint as it is stored, on its way to a GPU where that computes."""
        from ...numerics.objective import to_device

        stored = read_checkpoint(checkpoint, self._points.names)
        if self._objective.device.type != "cuda":
            return stored
        # each is freed on the host as soon as it is copied
        return to_device(self._objective.device, "checkpoints").begin(
            lambda copy: {name: copy(stored.pop(name)) for name in list(stored)}
        )

    def __next__(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return the next checkpoint, once it is read."""
        if not self._ahead:
            checkpoint = checkpoint_at(self._points, next(self._left))
            give_back(self._objective.parameter_bytes)  # before a checkpoint takes as much
            stored = read_checkpoint(checkpoint, self._points.names)
            return checkpoint.step, point_of(stored, self._objective)
        self.begin_next()
        if self._reading is None:
            raise StopIteration
        (step, reading), self._reading = self._reading, None
        result = reading.result()
        stored = result if isinstance(result, dict) else result.here()
        # read-only: three points are in memory anyway, so that nothing is gained by letting the
        # model hold one of them
        return step, MappingProxyType(point_of(stored, self._objective))
