r"""Another path through the same checkpoints, and what it changes of the allocation.

Between checkpoints that are far apart training did not go straight. A cubic Hermite curve through
the checkpoints, with tangents from their neighbours, is another path with the same ends:
$\gamma(x) = \theta + x\Delta\theta + (x - 2x^2 + x^3)\,d_0 - (x^2 - x^3)\,d_1$ on [0, 1], where
$d_0 = \dot\gamma(0) - \Delta\theta$ and $d_1 = \dot\gamma(1) - \Delta\theta$. In the middle it is
$(d_0 - d_1)/8$ away from the line, and its motion is $\Delta\theta - (d_0 + d_1)/4$. The gradients
at both ends are those of the segment, so that Simpson's rule takes one more evaluation. By how much
its sums differ from those of the straight line, by the same rule, is the *shift*: in sum over all
tensors it is what both rules miss, and of each tensor it says how much another path would change.

*Doubling* leaves every second checkpoint out: the line from $\theta_{2k}$ to $\theta_{2k+2}$, again
by Simpson's rule, is compared with both halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .long_segments import is_long
from .objective import Along, Evaluation, Motion, Numbers
from .parts import Computed, Point, displacement

_SIMPSON = (1 / 6, 4 / 6, 1 / 6)


@dataclass(frozen=True, kw_only=True)
class PathShift:
    """The change of a loss's allocation on one segment by another path, in units of loss.

    Attributes:
        shift: the sums along the curve less those along the line, of each tensor.
        doubled: what the segment has of the sums along the line of twice its length, of each
            tensor; those of both halves add up to them. None where it is no half of one.
        evaluations: of gradients, beside those of the segment.
    """

    shift: Mapping[str, Numbers]
    doubled: Mapping[str, Numbers] | None
    evaluations: int


class _Evaluates(Protocol):
    def evaluate(
        self, point: Point, losses: list[str], *, along: Along | None = None
    ) -> dict[str, Evaluation]:
        """Return each loss at `point`, with sums of its gradient along directions."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The checkpoints around one segment, each read when it is asked for.

    Attributes:
        lengths: training steps of the segment before, of the segment, and of the one after it; None
            where there is no such segment.
        point: returns the checkpoint at a position, which is −1 before the segment, 0 at its start,
            1 at its end, and 2 after it.
        half: 0 where the segment is the first half of a line of twice its length, 1 where it is the
            second one, None where it is no half: both are longer than one training step.
    """

    lengths: tuple[int | None, int, int | None]
    point: Callable[[int], Point]
    half: int | None


class SegmentPath:
    """The curve through the checkpoints around a segment, and the line of twice its length.

    Args:
        around: the checkpoints.
    """

    def __init__(self, around: Neighbours) -> None:
        self._around = around
        before, length, after = around.lengths
        self._bends = is_long(length) and not before is after is None

    @property
    def is_known(self) -> bool:
        """Tell whether there is another path: the segment is longer than one training step, and it
        has a neighbour.
        """
        return self._bends

    @property
    def at_start(self) -> Sequence[Motion]:
        """Return the directions along which the gradient at the start is summed."""
        return self._at_end_of_segment(0)

    @property
    def at_end(self) -> Sequence[Motion]:
        """Return the directions along which the gradient at the end is summed."""
        return self._at_end_of_segment(1)

    def _at_end_of_segment(self, end: int) -> Sequence[Motion]:
        directions = []
        if self._bends:
            directions.append(self._displacement(lambda name: self._deviations(name)[end]))
        if self._around.half == end:
            directions.append(self._whole_line())
        return directions

    def _displacement(self, compute: Callable[[str], Tensor]) -> Motion:
        start = self._around.point(0)

        def rounded(name: str) -> Tensor:
            return compute(name).to(start[name].dtype)

        return displacement(Computed(start, rounded), start)

    def _whole_line(self) -> Motion:
        """Return the motion of both halves."""
        first = 0 if self._around.half == 0 else -1
        return Motion(self._around.point(first), self._around.point(first + 2))

    @torch.no_grad()
    def _deviations(self, name: str) -> tuple[Tensor, Tensor]:
        """Return what the tangents at the start and at the end differ by from the motion, float64.

        A tangent is the derivative of the parabola through a checkpoint and both its neighbours;
        where there is none on one side, that of the parabola through the next three.
        """
        before, length, after = self._around.lengths
        start, end = (self._around.point(position)[name].double() for position in (0, 1))
        slope = (end - start) / length
        at_start = at_end = None
        if before is not None:
            earlier = (start - self._around.point(-1)[name]) / before
            at_start = (earlier - slope) * (length**2 / (before + length))
        if after is not None:
            later = (self._around.point(2)[name] - end) / after
            at_end = (later - slope) * (length**2 / (length + after))
        if at_start is None:
            assert at_end is not None, "a segment without neighbours does not bend"
            at_start = -at_end
        return at_start, -at_start if at_end is None else at_end

    @torch.no_grad()
    def _middle(self, name: str) -> Tensor:
        start, end = (self._around.point(position)[name] for position in (0, 1))
        if not start.is_floating_point():  # a counter
            return start
        first, last = self._deviations(name)
        middle = torch.lerp(start, end, 0.5)
        return (middle + (first - last) / 8).to(start.dtype)

    def _in_the_middle(self, name: str) -> Tensor:
        first, last = self._deviations(name)
        return (first + last) / -4

    def shifts(
        self,
        objective: _Evaluates,
        ends: tuple[Mapping[str, Evaluation], Mapping[str, Evaluation]],
        middle: Mapping[str, Mapping[str, Numbers]],
    ) -> dict[str, PathShift]:
        """Return by how much another path changes the allocation of each loss.

        Args:
            objective: evaluates losses.
            ends: the losses at the start and at the end, with the sums along `at_start` and
                `at_end`.
            middle: by loss, the sums of the gradient in the middle of the line along the motion, of
                each tensor.
        """
        losses = list(middle)
        curve = self._sums_in_the_middle(objective, losses)
        half = self._around.half
        line = self._sums_of_line(objective, losses) if half == 0 else {}
        shifts = {}
        for name in losses:
            first, last = (end[name].beside for end in ends)
            shift = {
                tensor: _SIMPSON[0] * _numbers(first, tensor, 0)
                + _SIMPSON[1] * (curve[name][tensor] - on_line)
                + _SIMPSON[2] * _numbers(last, tensor, 0)
                for tensor, on_line in middle[name].items()
            }
            doubled = None
            if half is not None:
                of_end = last if half else first
                doubled = {
                    tensor: _SIMPSON[2 * half] * _numbers(of_end, tensor, 1)
                    for tensor in middle[name]
                }
                for tensor, sums in line.get(name, {}).items():
                    doubled[tensor] = doubled[tensor] + _SIMPSON[1] * sums
            shifts[name] = PathShift(
                shift=shift, doubled=doubled, evaluations=1 if half != 0 else 2
            )
        return shifts

    def _sums_in_the_middle(
        self, objective: _Evaluates, losses: list[str]
    ) -> dict[str, dict[str, Numbers]]:
        """Return the sums of the gradient in the middle of the curve along its motion there."""
        start, end = self._around.point(0), self._around.point(1)
        directions = [Motion(start, end), self._displacement(self._in_the_middle)]
        return _sums(objective, Computed(start, self._middle), losses, directions)

    def _sums_of_line(
        self, objective: _Evaluates, losses: list[str]
    ) -> dict[str, dict[str, Numbers]]:
        """Return the sums in the middle of the line of twice the length along it."""
        line = self._whole_line()

        def middle(name: str) -> Tensor:
            first, last = line.start[name], line.end[name]
            return torch.lerp(first, last, 0.5) if first.is_floating_point() else first

        return _sums(objective, Computed(line.start, middle), losses, [line])


def _sums(
    objective: _Evaluates, point: Point, losses: list[str], directions: list[Motion]
) -> dict[str, dict[str, Numbers]]:
    """Return the sums of losses' gradients at a point along the sum of some directions, of each
    tensor.
    """
    along = Along(dict.fromkeys(point), directions)
    evaluations = objective.evaluate(point, losses, along=along)
    return {
        name: {
            tensor: values.sum((-2, -1)).cpu().numpy()[()]
            for tensor, values in evaluation.gradient.items()
        }
        for name, evaluation in evaluations.items()
    }


def _numbers(beside: Mapping[str, Tensor] | None, tensor: str, position: int) -> Numbers:
    """Return the sums along one of the directions beside the motion."""
    assert beside is not None, "gradients at ends are summed along the directions of the path"
    numbers: Numbers = beside[tensor][..., position].cpu().numpy()[()]
    return numbers
