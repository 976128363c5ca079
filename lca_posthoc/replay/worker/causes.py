"""The causes of the motion on every segment of a span: what the checkpoints say of the optimiser's
steps, and the points the formulas need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.headers import read_header
from ...checkpoints.optimizer_steps import (
    FIRST,
    SECOND,
    OptimizerStep,
    moments_of,
    read_optimizer_step,
)
from ...checkpoints.paths import located
from ...errors import InputError, SpanError
from .state import checkpoint_at, stored_point_at

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.allocation import SegmentAllocation
    from ...numerics.causes import Moments, SegmentCauses
    from ...numerics.objective import Numbers, Objective
    from ..requests import StoredPoints

Walk = Iterator[tuple[int, Mapping[str, "Tensor"]]]


class CausesOfSpan:
    """Tells the causes of every segment of a span, in turn.

    Of the checkpoints that a replay goes through, the last three are kept: the motion before a
    segment is its momentum.

    Args:
        points: the checkpoints, the one before the span among them where there is one.
        rows: the segments.
        objective: evaluates the losses.
        signal: the training loss.
    """

    def __init__(
        self, points: StoredPoints, rows: slice, objective: Objective, signal: str
    ) -> None:
        self._points, self._rows, self._objective = points, rows, objective
        self._signal = signal
        # names in the files → of the model
        self._names = {source: name for name, source in points.names.items()}
        self._passed: dict[int, Mapping[str, Tensor]] = {}
        self._causes: dict[int, SegmentCauses] = {}

    def remember(self, walk: Walk) -> Walk:
        """Yield the checkpoints of the span, and keep them as long as they are needed."""
        for index, (step, point) in enumerate(walk, self._rows.start):
            self._passed[index] = point
            yield step, point

    def of(self, row: int) -> SegmentCauses:
        """Return the causes of the segment at a position of the span; the checkpoint it starts from
        has gone by.
        """
        from ...numerics.causes import SegmentCauses, formulas

        if row not in self._causes:
            index = self._rows.start + row
            moments, seconds = self._moments(index)
            by_source = formulas(
                self._step(index + 1),
                self._step(index),
                self._points.checkpoints[index].step,
                lambda source: source in seconds,
            )
            self._causes[row] = SegmentCauses(
                self._signal,
                {
                    self._names[source]: formula
                    for source, formula in by_source.items()
                    if source in self._names
                },
                self._passed[index],
                self._before(index) if any(f.follows_motion for f in by_source.values()) else None,
                moments,
            )
        return self._causes[row]

    def shares(
        self, row: int, segments: Mapping[str, SegmentAllocation]
    ) -> dict[str, dict[str, Numbers]]:
        """Return what each cause of the segment at a position of the span is allocated, by loss and
        tensor, and give up what later segments have no use for.
        """
        causes, index = self._causes.pop(row), self._rows.start + row
        shares = {
            name: causes.shares(self._passed[index + 1], segment.sums, segment.parts or {})
            for name, segment in segments.items()
        }
        self._passed.pop(index - 1, None)
        return shares

    def _step(self, index: int) -> OptimizerStep | None:
        """Return the record of the step that led to a checkpoint, where it followed on the
        checkpoint before; None otherwise.
        """
        before = self._points.checkpoints.get(index - 1)
        if before is None:
            return None
        try:
            step = read_optimizer_step(checkpoint_at(self._points, index))
        except InputError as error:
            raise SpanError(str(error)) from None
        return step if step is not None and step.since == before.step else None

    def _before(self, index: int) -> Mapping[str, Tensor]:
        """Return the checkpoint before one."""
        if index - 1 not in self._passed:
            self._passed[index - 1] = stored_point_at(self._points, index - 1, self._objective)
        return self._passed[index - 1]

    def _moments(self, index: int) -> tuple[Moments, frozenset[str]]:
        """Return the moments around the segment from a checkpoint on, and the tensors, as the files
        name them, that have second ones after it.
        """
        from ...numerics.causes import Moments

        before, after = (self._moments_of(place) for place in (index, index + 1))
        seconds = frozenset(name.removeprefix(SECOND) for name in after.names(SECOND))
        sources = self._points.names
        return (
            Moments(
                first_before=lambda name: before.tensor(FIRST + sources[name]),
                first_after=lambda name: after.tensor(FIRST + sources[name]),
                second_after=lambda name: after.tensor(SECOND + sources[name]),
            ),
            seconds,
        )

    def _moments_of(self, index: int) -> _MomentsFile:
        checkpoint = checkpoint_at(self._points, index)
        try:
            path = moments_of(checkpoint, located(self._points.root))
            return _MomentsFile(path, checkpoint.step, self._objective)
        except InputError as error:
            raise SpanError(str(error)) from None


class _MomentsFile:
    """The moments of one step, each of which is read when it is asked for.

    Args:
        path: of the file; None where there is none.
        step: of the checkpoint it belongs to.
        objective: on whose device tensors are.

    Raises:
        InputError: where the file cannot be read.
    """

    def __init__(self, path: Path | None, step: int, objective: Objective) -> None:
        self._path, self._step, self._objective = path, step, objective
        self._tensors = frozenset[str]() if path is None else frozenset(read_header(path).tensors)

    def names(self, prefix: str) -> list[str]:
        """Return the names of the tensors that begin so."""
        return [name for name in self._tensors if name.startswith(prefix)]

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor on the device; None where the file has none of this name."""
        from safetensors import SafetensorError

        from ...checkpoints.reading import fingerprint_and_tensors

        if self._path is None or name not in self._tensors:
            return None
        try:
            _, tensors = fingerprint_and_tensors(self._path, self._step, {name})
        except (OSError, InputError, SafetensorError) as error:
            raise SpanError(
                f"cannot read {self._path} (step {self._step}): {error}. Restore the file and run "
                "again."
            ) from None
        return tensors[name].to(self._objective.device)
