"""Allocate to the parts of the motion, on every segment of a span: its causes, and directions of a
file.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError, SpanError
from .causes import CausesOfSpan
from .passed import Passed

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.along import SegmentDirections, Together
    from ...numerics.causes import SegmentCauses
    from ...numerics.objective import Objective
    from ...numerics.schema import DirectionsRecord
    from ...numerics.segment_allocation import SegmentAllocation
    from ...numerics.statistics import SpanSums
    from ..requests import RunSettings, StoredPoints

_BASES: OrderedDict[tuple[int, str], dict[str, Tensor]] = OrderedDict()  # the last one used


@dataclass(frozen=True)
class _OfSegment:
    """The parts of the motion on one segment."""

    causes: SegmentCauses | None
    directions: SegmentDirections | None
    together: Together


class PartsOfStretch:
    """Computes the parts of the motion on consecutive segments, in turn.

    Args:
        points: the checkpoints, with the one before the stretch if there is one.
        first: position of the stretch's first checkpoint.
        passed: those that the replay has gone through, including the last three: the motion before
            a segment gives its momentum.
        objective: evaluates the losses.
        settings: of the run, which ask for parts.
    """

    def __init__(
        self,
        points: StoredPoints,
        first: int,
        passed: Passed,
        objective: Objective,
        settings: RunSettings,
    ) -> None:
        self._first, self._passed = first, passed
        self._causes = self._basis = None
        if settings.signal is not None:
            self._causes = CausesOfSpan(points, self._passed, objective, settings.signal)
        if settings.directions is not None:
            self._basis = _basis(settings.directions, objective)
        self._parameters = [spec.name for spec in objective.allocated if spec.kind == "parameter"]
        self._parts: dict[int, _OfSegment] = {}

    def of(self, row: int) -> Together:
        """Return the parts of a segment, by its position in the stretch; the replay has passed its
        first checkpoint.
        """
        from ...numerics.along import SegmentDirections, Together

        if row not in self._parts:
            index = self._first + row
            causes = None if self._causes is None else self._causes.of(index)
            directions = None
            if self._basis is not None:
                start = self._passed.at(index)
                directions = SegmentDirections(self._basis, self._parameters, start)
            both = [part for part in (causes, directions) if part is not None]
            self._parts[row] = _OfSegment(causes, directions, Together(both))
        return self._parts[row].together

    def add(
        self,
        position: int,
        row: int,
        segments: Mapping[str, SegmentAllocation],
        statistics: Mapping[str, SpanSums],
    ) -> None:
        """Add the allocations to the parts of one segment to the statistics of each loss.

        Args:
            position: of the segment.
            row: its row of the statistics.
            segments: the allocation of each loss.
            statistics: of each loss.
        """
        from ...numerics.along import allocated_along

        parts, index = self._parts.pop(position), self._first + position
        end = self._passed.at(index + 1)
        moved = None if parts.directions is None else parts.directions.moved(end)
        for name, of_loss in statistics.items():
            segment = segments[name]
            sums = iter(parts.together.divided(segment.parts or {}))
            if parts.causes is not None:
                of_loss.add_causes(row, parts.causes.shares(end, segment.sums, next(sums)))
            if moved is not None:
                allocated = allocated_along(moved, next(sums))
                of_loss.add_along(row, allocated, moved.along, moved.distance)


def _basis(record: DirectionsRecord, objective: Objective) -> dict[str, Tensor]:
    """Return the directions of a file, orthonormal, on the device of an objective; cached for the
    spans that follow.

    Raises:
        InputError: if the file holds other directions than the recorded ones.
        SpanError: if the file cannot be read.
    """
    from ...checkpoints.directions_file import open_for_model, orthonormal

    key = record["digest"], str(objective.device)
    if key not in _BASES:
        _BASES.clear()
        try:
            file = open_for_model(record["file"], objective.table)
            if file.digest != record["digest"]:
                raise InputError(
                    f"{file.path} holds other directions than this run was made with. Restore the "
                    "file, or write another run with --out."
                )
            basis = orthonormal(file.read())
        except InputError as error:
            raise SpanError(str(error)) from None
        _BASES[key] = {
            name: rows.to(objective.device, objective.dtype) for name, rows in basis.items()
        }
    return _BASES[key]
