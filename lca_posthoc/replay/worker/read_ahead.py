"""Read the checkpoints of a span in turn: a thread reads the next one while a segment is computed."""

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

# bytes of parameters up to which a worker on the CPU reads ahead and holds a copy early; a larger
# model computes for so long that reading hardly counts
LARGEST = 2**26


class PointsAhead(Iterator[tuple[int, Mapping[str, "Tensor"]]]):
    """Training step and tensors of the checkpoints at both ends of some segments.

    Reading runs ahead, and so does copying to a GPU. Statistics are recalibrated, and errors
    raised, when a checkpoint is asked for. The thread ends with the context. On a CPU, a checkpoint
    of a large model is read when it is asked for.

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
        """Start to read the next checkpoint, if there is one and it is not large; it uses memory
        from now on.
        """
        index = next(self._left, None) if self._ahead and self._reading is None else None
        if index is not None:
            checkpoint = checkpoint_at(self._points, index)
            self._reading = checkpoint.step, self._reader.submit(self._read, checkpoint)

    def _read(self, checkpoint: Checkpoint) -> dict[str, Tensor] | Arriving[dict[str, Tensor]]:
        """Return a checkpoint as stored, already on its way to a GPU if one computes."""
        from ...numerics.objective import to_device

        stored = read_checkpoint(checkpoint, self._points.names)
        if self._objective.device.type != "cuda":
            return stored
        # frees each on the host once it is copied
        return to_device(self._objective.device, "checkpoints").begin(
            lambda copy: {name: copy(stored.pop(name)) for name in list(stored)}
        )

    def __next__(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return the next checkpoint, once it is read.

        Raises:
            StopIteration: after the last one.
        """
        if not self._ahead:
            checkpoint = checkpoint_at(self._points, next(self._left))
            give_back(self._objective.parameter_bytes)  # before a checkpoint needs as much
            stored = read_checkpoint(checkpoint, self._points.names)
            return checkpoint.step, point_of(stored, self._objective)
        self.begin_next()
        if self._reading is None:
            raise StopIteration
        (step, reading), self._reading = self._reading, None
        result = reading.result()
        stored = result if isinstance(result, dict) else result.here()
        # read-only: three points are in memory anyway, so letting the model hold one saves nothing
        return step, MappingProxyType(point_of(stored, self._objective))
