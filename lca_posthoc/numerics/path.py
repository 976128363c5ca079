r"""Compute how another path through the same checkpoints would change the allocation.

Between distant checkpoints, training did not move straight. A cubic Hermite curve through the
checkpoints, with tangents from their neighbours, is another path with the same ends: $\gamma(x) =
\theta + x\Delta\theta + (x - 2x^2 + x^3)\,d_0 - (x^2 - x^3)\,d_1$ on [0, 1], where $d_0 =
\dot\gamma(0) - \Delta\theta$ and $d_1 = \dot\gamma(1) - \Delta\theta$. At the middle it is $(d_0 -
d_1)/8$ away from the line, and its motion is $\Delta\theta - (d_0 + d_1)/4$. The gradients at both
ends are those of the segment, so Simpson's rule needs only one more evaluation. The *shift* is the
difference of its sums from those of the straight line by the same rule. Summed over all tensors, it
is what the two rules miss; for each tensor, it shows how much another path would change.

*Doubling* skips every second checkpoint: the line from $\theta_{2k}$ to $\theta_{2k+2}$, again by
Simpson's rule, is compared with both halves.

A neighbour that is not finite determines no tangent and is no end of a line; the path then looks as
it does at the end of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .long_segments import Around, half_of, is_long
from .nodes import Curve, Direction, Line, Node, Tangent
from .objective import Along, Between, Evaluation, Motion, Numbers, OfUnits
from .parts import Computed, Point, displacement

BEFORE, AFTER = -1, 2  # neighbours of a segment, relative to the checkpoint where it starts
_SIMPSON = (1 / 6, 4 / 6, 1 / 6)


@dataclass(frozen=True, kw_only=True)
class PathShift:
    """Hold the change of a loss's allocation on one segment by another path, in units of loss.

    Attributes:
        shift: sums along the curve minus those along the line, for each tensor.
        doubled: the segment's part of the sums along the line of twice its length, for each tensor;
            the parts of both halves add up to those sums. None if the segment is not a half of such
            a line.
        evaluations: number of gradient evaluations, besides those of the segment.
    """

    shift: Mapping[str, Numbers]
    doubled: Mapping[str, Numbers] | None
    evaluations: int


class _Evaluates(Protocol):
    def evaluate(
        self, point: Point, losses: list[str], *, along: Along | None = None
    ) -> dict[str, Evaluation]:
        """Return each loss at `point`, with sums of its gradient along directions."""


class OtherPaths:
    """Determine the other paths of a segment: the curve through its neighbours, and the line of
    twice its length.

    A neighbour with a number that is not finite counts as missing, as at a gap.

    Args:
        start: position of the checkpoint where the segment starts.
        around: training steps of the previous segment, of this one and of the next; None for a
            missing segment.
        is_finite: returns whether all numbers of the checkpoint at a position are finite; called
            for neighbours that another path needs.
    """

    def __init__(self, start: int, around: Around, is_finite: Callable[[int], bool]) -> None:
        self._start, self._around, self._is_finite = start, around, is_finite

    def _is_there(self, beside: int) -> bool:
        """Return whether a neighbour exists and its numbers are finite."""
        length = self._around[0 if beside == BEFORE else 2]
        return length is not None and self._is_finite(self._start + beside)

    @property
    def is_known(self) -> bool:
        """Return whether there is another path: the segment is longer than one training step and
        has a neighbour.
        """
        return is_long(self._around[1]) and any(map(self._is_there, (BEFORE, AFTER)))

    @property
    def half(self) -> int | None:
        """Return 0 if the segment is the first half of a line of twice its length, 1 if it is the
        second, None if it is neither.

        Both halves must be longer than one training step.
        """
        half = half_of(self._start, self._around)
        if half is None:
            return None
        return half if self._is_there((AFTER, BEFORE)[half]) else None

    def _beside(self, end: int) -> int:
        """Return the neighbour that determines the tangent at an end: the one at that end, or else
        the other.
        """
        own, other = (BEFORE, AFTER) if end == 0 else (AFTER, BEFORE)
        return own if self._is_there(own) else other

    def directions(self, end: int) -> tuple[Direction, ...]:
        """Return the directions, besides the motion, along which the gradient at the start (0) or
        end (1) is summed.

        The result is empty if there is no other path.
        """
        if not self.is_known:
            return ()
        tangent = Tangent(self._start, end, self._beside(end))
        return (tangent, self._line(end)) if self.half == end else (tangent,)

    def _line(self, half: int) -> Line:
        """Return the line of which the segment is a half."""
        return Line(self._start - half, 2)

    @property
    def nodes(self) -> list[Node]:
        """Return the nodes that only other paths need: the middle of the curve and, for the first
        of two halves, the middle of the line.

        The result is empty if there is no other path.
        """
        if not self.is_known:
            return []
        curve = Curve(self._start, (self._beside(0), self._beside(1)))
        nodes = [Node(curve, 0.5, (Line(self._start), curve))]
        if self.half == 0:
            line = self._line(0)
            nodes.append(Node(line, 0.5, (line,)))
        return nodes

    def shift(
        self,
        ends: tuple[Evaluation, Evaluation],
        middle: Mapping[str, Numbers],
        along: Sequence[Mapping[str, Numbers]],
    ) -> PathShift:
        """Compute how much another path changes the allocation of a loss.

        Args:
            ends: the loss at the start and at the end, with its sums along `directions`.
            middle: sums of its gradient at the middle of the segment along the motion, for each
                tensor.
            along: sums at each of `nodes`, along the sum of the directions there.
        """
        curve, *lines = along
        first, last = map(_beside, ends)
        shift = {
            tensor: _SIMPSON[0] * first[tensor][0]
            + _SIMPSON[1] * (curve[tensor] - on_line)
            + _SIMPSON[2] * last[tensor][0]
            for tensor, on_line in middle.items()
        }
        half = self.half
        if half is None:
            return PathShift(shift=shift, doubled=None, evaluations=len(along))
        of_end = last if half else first
        doubled = {tensor: _SIMPSON[2 * half] * of_end[tensor][1] for tensor in middle}
        for line in lines:
            for tensor, sums in line.items():
                doubled[tensor] = doubled[tensor] + _SIMPSON[1] * sums
        return PathShift(shift=shift, doubled=doubled, evaluations=len(along))


class Course:
    """Compute points and directions of paths through the checkpoints of a training run.

    Args:
        point: returns the checkpoint at a position, read on demand.
        step: returns the training step of the checkpoint at a position.
    """

    def __init__(self, point: Callable[[int], Point], step: Callable[[int], int]) -> None:
        self._point, self._step = point, step

    def at(self, node: Node) -> Point:
        """Return the point of a node."""
        path, start = node.path, self._point(node.path.start)
        if node.x == 0:
            return start
        if isinstance(path, Line):
            return Between(start, self._point(path.end), node.x)
        return Computed(start, lambda name: self._middle(name, path))

    def motion(self, direction: Direction) -> Motion:
        """Return a direction in the types of the checkpoints' tensors."""
        start = self._point(direction.start)
        if isinstance(direction, Line):
            return Motion(start, self._point(direction.end))

        def rounded(name: str) -> Tensor:
            return self._beside_motion(name, direction).to(start[name].dtype)

        return displacement(Computed(start, rounded), start)

    @torch.no_grad()
    def _beside_motion(self, name: str, direction: Tangent | Curve) -> Tensor:
        """Return the difference between a direction of a curve and the motion, in float64."""
        if isinstance(direction, Tangent):
            return self._deviation(name, direction)
        first, last = self._deviations(name, direction)
        return (first + last) / -4

    def _deviations(self, name: str, curve: Curve) -> tuple[Tensor, Tensor]:
        """Return the differences between the tangents at both ends and the motion, in float64."""
        first, last = (
            self._deviation(name, Tangent(curve.start, end, curve.beside[end])) for end in (0, 1)
        )
        return first, last

    def _deviation(self, name: str, tangent: Tangent) -> Tensor:
        """Return the difference between a tangent and the motion, in float64.

        The tangent is the derivative of the parabola through a checkpoint and both its neighbours;
        at an end of the series, of the parabola through the nearest three checkpoints.
        """
        first, last = tangent.start, tangent.start + 1
        length = self._step(last) - self._step(first)
        start, end = (self._point(index)[name].double() for index in (first, last))
        slope, beside = (end - start) / length, tangent.start + tangent.beside
        if tangent.beside == BEFORE:
            before = self._step(first) - self._step(beside)
            earlier = (start - self._point(beside)[name]) / before
            deviation = (earlier - slope) * (length**2 / (before + length))
        else:
            after = self._step(beside) - self._step(last)
            later = (self._point(beside)[name] - end) / after
            deviation = (later - slope) * (length**2 / (length + after))
        is_own = tangent.beside == (BEFORE, AFTER)[tangent.end]
        return deviation if is_own else -deviation

    @torch.no_grad()
    def _middle(self, name: str, curve: Curve) -> Tensor:
        start, end = (self._point(index)[name] for index in (curve.start, curve.start + 1))
        if not start.is_floating_point():  # a counter
            return start
        first, last = self._deviations(name, curve)
        middle = torch.lerp(start, end, 0.5)
        return (middle + (first - last) / 8).to(start.dtype)


class SegmentPath:
    """Evaluate the other paths of a segment on the checkpoints they pass through.

    Args:
        paths: the other paths.
        course: the checkpoints.
    """

    def __init__(self, paths: OtherPaths, course: Course) -> None:
        self._paths, self._course = paths, course

    @property
    def is_known(self) -> bool:
        """Return whether there is another path; see `OtherPaths`."""
        return self._paths.is_known

    @property
    def at_start(self) -> Sequence[Motion]:
        """Return the directions along which the gradient at the start is summed."""
        return self._motions(self._paths.directions(0))

    @property
    def at_end(self) -> Sequence[Motion]:
        """Return the directions along which the gradient at the end is summed."""
        return self._motions(self._paths.directions(1))

    def _motions(self, directions: Sequence[Direction]) -> list[Motion]:
        return [self._course.motion(direction) for direction in directions]

    def shifts(
        self,
        objective: _Evaluates,
        ends: tuple[Mapping[str, Evaluation], Mapping[str, Evaluation]],
        middle: Mapping[str, Mapping[str, Numbers]],
    ) -> dict[str, PathShift]:
        """Compute how much another path changes the allocation of each loss.

        Args:
            objective: evaluates losses.
            ends: the losses at the start and at the end, with their sums along `at_start` and
                `at_end`.
            middle: by loss, the sums of the gradient at the middle of the line along the motion,
                for each tensor.
        """
        losses = list(middle)
        along = [self._sums(objective, node, losses) for node in self._paths.nodes]
        first, last = ends
        return {
            name: self._paths.shift(
                (first[name], last[name]), middle[name], [sums[name] for sums in along]
            )
            for name in losses
        }

    def _sums(
        self, objective: _Evaluates, node: Node, losses: list[str]
    ) -> dict[str, dict[str, Numbers]]:
        """Return the sums of losses' gradients at a node along the sum of its directions."""
        point = self._course.at(node)
        along = Along(dict.fromkeys(point), self._motions(node.along))
        evaluations = objective.evaluate(point, losses, along=along)
        return {name: summed_along(evaluation) for name, evaluation in evaluations.items()}


def summed_along(evaluation: Evaluation) -> dict[str, Numbers]:
    """Return the sums of a gradient along the sum of some directions, ([groups]) for each tensor."""
    assert isinstance(evaluation.gradient, OfUnits), "sums along directions are of units"
    by_direction = evaluation.gradient.totals()
    return by_direction.like(by_direction.row.sum(-2)).numbers()


def _beside(evaluation: Evaluation) -> dict[str, list[Numbers]]:
    """Return the sums along each of the further directions, ([groups]) for each tensor."""
    beside = evaluation.beside
    assert beside is not None, "gradients at ends are summed along the directions of the path"
    return {
        name: list(np.moveaxis(np.asarray(sums), -1, 0)) for name, sums in beside.numbers().items()
    }
