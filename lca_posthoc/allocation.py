r"""The mathematics: allocate the loss change of one segment, and of the segments of a span in turn.

$A_i = (\theta'_i-\theta_i)\sum_q w_q\,\partial_i L(\theta + x_q(\theta'-\theta))$ and
$L(\theta')-L(\theta) = \sum_i A_i + \text{residual}$, with $\theta,\theta'$ consecutive checkpoints and $x_q, w_q$ the nodes and
weights of a rule on [0, 1]. Source: Lan, Liu, Zhou, Yosinski, NeurIPS 2019 (arXiv 1909.01440), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import SpanError
from .objective import Evaluation
from .quadrature import MAX_LEVEL, NESTED, Rule, first_level, fresh_nodes

Point = Mapping[str, Tensor]
Gradient = dict[str, Tensor]


class Evaluates(Protocol):
    """What the mathematics needs of an objective."""

    def evaluate(self, point: Point, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Each loss at `point`, with its gradient unless only the value is asked for."""


@dataclass(frozen=True)
class Method:
    """How a segment is integrated.

    `tolerance` bounds |residual| and `allocation_tolerance` the allocation's own L1 error, both in units of loss, per
    segment and loss, for rules of the nested family. `calibration` turns Σ|(g₁ − g₀)·Δθ| into the trapezoid's L1 error.
    """

    rule: Rule
    tolerance: float = math.inf
    allocation_tolerance: float = math.inf
    calibration: Mapping[str, float] | None = None


@dataclass(frozen=True)
class SegmentAllocation:
    """The allocation of one loss on one segment; tensors float64, by name.

    `evaluations` counts gradient evaluations, the start shared with the segment before left out; `error_bound` estimates
    Σ|A − A*| (NaN for fixed rules); `level` is that of the nested family (−1 for fixed rules).
    """

    allocation: dict[str, Tensor]
    mean_gradient: Gradient
    loss_start: float
    loss_end: float
    residual: float
    evaluations: int
    level: int
    converged: bool
    error_bound: float
    untouched: frozenset[str]


def interpolate(start: Point, end: Point, x: float) -> Point:
    """θ + x(θ′ − θ); tensors that are not floating (counters) are loaded, never interpolated."""
    return {
        name: torch.lerp(value, end[name], x) if value.is_floating_point() else (value if x < 1 else end[name])
        for name, value in start.items()
    }


def _motion(start: Point, end: Point, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: end[name].double() - start[name].double() for name in names}


def _product(motion: Mapping[str, Tensor], gradient: Gradient) -> dict[str, Tensor]:
    return {name: motion[name] * each for name, each in gradient.items()}


def _total(tensors: Mapping[str, Tensor]) -> float:
    return math.fsum(float(each.sum()) for each in tensors.values())


def _l1(tensors: Mapping[str, Tensor]) -> float:
    return math.fsum(float(each.abs().sum()) for each in tensors.values())


def _add(into: Gradient, other: Gradient) -> None:
    for name, each in other.items():
        into[name] = into[name] + each if name in into else each.clone()


def _combine(parts: Iterable[tuple[float, Gradient]]) -> Gradient:
    mean: Gradient = {}
    for weight, gradient in parts:
        _add(mean, {name: weight * each for name, each in gradient.items()})
    return mean


class _Refinement:
    """One loss on one segment while its intervals are halved.

    Composite rules give equal weights to the two ends, to all fresh nodes and to all older inner nodes, so three sums of
    gradients carry every level and no old node is evaluated again.
    """

    def __init__(self, motion: Mapping[str, Tensor], start: Evaluation, end: Evaluation) -> None:
        self._motion, self.start, self.end = motion, start, end
        self._ends = _combine([(1.0, start.gradient), (1.0, end.gradient)])
        self._inner: Gradient = {}
        self._fresh: Gradient = {}
        self.untouched = start.untouched & end.untouched
        self.level = 0
        self.mean = self._mean()
        self._before: Gradient | None = None

    def _mean(self) -> Gradient:
        weights = NESTED[self.level].weights
        parts = [(weights[0], self._ends)]
        if self.level >= 1:
            parts.append((weights[1], self._fresh))
        if self.level >= 2:
            parts.append((weights[2], self._inner))
        return _combine(parts)

    def halve(self, evaluations: list[Evaluation]) -> None:
        """Take in the gradients at the next level's fresh nodes."""
        _add(self._inner, self._fresh)
        self._fresh = {}
        for evaluation in evaluations:
            _add(self._fresh, evaluation.gradient)
            self.untouched &= evaluation.untouched
        self.level += 1
        self._before, self.mean = self.mean, self._mean()

    @property
    def residual(self) -> float:
        return self.end.loss - self.start.loss - _total(_product(self._motion, self.mean))

    def error_bound(self, calibration: float | None) -> float:
        """An estimate of Σ|A − A*|: what the last halving changed; at level 0 a calibrated share of Σ|(g₁ − g₀)·Δθ|."""
        if self._before is not None:
            before = self._before
            return _l1(_product(self._motion, {name: each - before[name] for name, each in self.mean.items()}))
        return math.nan if calibration is None else calibration * self.curvature

    @property
    def curvature(self) -> float:
        """Σ|(g₁ − g₀)·Δθ|."""
        first, last = self.start.gradient, self.end.gradient
        return _l1(_product(self._motion, {name: last[name] - first[name] for name in first}))


def calibrate(start: Point, end: Point, objective: Evaluates, losses: list[str]) -> dict[str, float]:
    """The trapezoid's L1 error on one segment, against Simpson, as a share of Σ|(g₁ − g₀)·Δθ|; for each loss."""
    first, last = objective.evaluate(start, losses), objective.evaluate(end, losses)
    middle = objective.evaluate(interpolate(start, end, 0.5), losses)
    shares = {}
    for name in losses:
        refinement = _Refinement(_motion(start, end, first[name].gradient), first[name], last[name])
        scale = refinement.curvature
        refinement.halve([middle[name]])
        shares[name] = refinement.error_bound(None) / scale if scale > 0 else 0.0
    return shares


def allocate(
    start: Point,
    end: Point,
    objective: Evaluates,
    losses: list[str],
    method: Method,
    *,
    at_start: Mapping[str, Evaluation] | None = None,
    gradient_at_end: bool = True,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Allocate every loss on the segment from `start` to `end`.

    Args:
        start: every tensor of the model at the first checkpoint, on the device of the objective.
        end: the same at the next one.
        objective: evaluates losses and gradients.
        losses: names.
        method: the rule and its tolerances.
        at_start: evaluations at `start` where the segment before has made them.
        gradient_at_end: whether the segment after will want the gradient at `end`.

    Returns:
        The allocation of each loss, and the evaluations at `end` for the segment that follows.

    Raises:
        SpanError: where a loss or a gradient is not finite.
    """
    if first_level(method.rule) is None:
        return _allocate_fixed(start, end, objective, losses, method, at_start, gradient_at_end)
    return _allocate_nested(start, end, objective, losses, method, at_start)


def _allocate_nested(
    start: Point,
    end: Point,
    objective: Evaluates,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    first = at_start or objective.evaluate(start, losses)
    last = objective.evaluate(end, losses)
    motion = _motion(start, end, first[losses[0]].gradient)
    states = {name: _Refinement(motion, first[name], last[name]) for name in losses}
    done: dict[str, SegmentAllocation] = {}
    level, pending = 0, list(losses)
    while True:
        if level >= NESTED.index(method.rule):
            for name in pending:
                done[name] = _judged(name, states[name], motion, method)
        pending = [name for name in pending if name not in done or not (done[name].converged or level == MAX_LEVEL)]
        if not pending:
            return done, last
        level += 1
        found = [objective.evaluate(interpolate(start, end, x), pending) for x in fresh_nodes(level)]
        for name in pending:
            states[name].halve([each[name] for each in found])


def _judged(name: str, state: _Refinement, motion: Mapping[str, Tensor], method: Method) -> SegmentAllocation:
    bound = state.error_bound((method.calibration or {}).get(name))
    residual = state.residual
    accurate = math.isinf(method.allocation_tolerance) or bound <= method.allocation_tolerance
    return _checked(
        SegmentAllocation(
            _product(motion, state.mean),
            state.mean,
            state.start.loss,
            state.end.loss,
            residual,
            2**state.level,
            state.level,
            abs(residual) <= method.tolerance and accurate,
            bound,
            state.untouched,
        ),
        name,
    )


def _allocate_fixed(
    start: Point,
    end: Point,
    objective: Evaluates,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
    gradient_at_end: bool,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Rules that are used as they stand; end losses that no node gives come from forward passes."""
    rule = method.rule
    first = at_start or objective.evaluate(start, losses, gradient=rule.has_start)
    last = objective.evaluate(end, losses, gradient=rule.has_start and gradient_at_end)
    found = [first if x == 0 else objective.evaluate(interpolate(start, end, x), losses) for x in rule.nodes]
    motion = _motion(start, end, found[0][losses[0]].gradient)
    done = {}
    for name in losses:
        mean = _combine([(weight, each[name].gradient) for weight, each in zip(rule.weights, found, strict=True)])
        allocation = _product(motion, mean)
        residual = last[name].loss - first[name].loss - _total(allocation)
        untouched = frozenset.intersection(*(each[name].untouched for each in found))
        segment = SegmentAllocation(
            allocation,
            mean,
            first[name].loss,
            last[name].loss,
            residual,
            len(rule.nodes),
            -1,
            abs(residual) <= method.tolerance,
            math.nan,
            untouched,
        )
        done[name] = _checked(segment, name)
    return done, last


def _checked(segment: SegmentAllocation, name: str) -> SegmentAllocation:
    for where, loss in (("start", segment.loss_start), ("end", segment.loss_end)):
        if not math.isfinite(loss):
            raise SpanError(f"loss {name!r} is {loss} at the {where} of the segment")
    if not math.isfinite(segment.residual):
        for tensor, gradient in segment.mean_gradient.items():
            if not bool(torch.isfinite(gradient).all()):
                raise SpanError(
                    f"the gradient of loss {name!r} for tensor {tensor!r} holds NaN or Inf inside the segment"
                )
    return segment


def allocate_span(
    points: Iterable[tuple[int, Point]], objective: Evaluates, losses: list[str], method: Method
) -> Iterator[tuple[Point, Point, dict[str, SegmentAllocation]]]:
    """The segments between consecutive points in turn, each end evaluated once and reused as the next start.

    Args:
        points: training step and tensors of each checkpoint of the span, one more than there are segments.
        objective: evaluates losses and gradients.
        losses: names.
        method: the rule and its tolerances.

    Yields:
        The segment's start, its end, and the allocation of every loss.

    Raises:
        SpanError: where a loss or a gradient is not finite, naming the segment.
    """
    walk = iter(points)
    (step, start), following = next(walk), next(walk, None)
    known: Mapping[str, Evaluation] | None = None
    while following is not None:
        (next_step, end), after = following, next(walk, None)
        try:
            done, known = allocate(
                start, end, objective, losses, method, at_start=known, gradient_at_end=after is not None
            )
        except SpanError as error:
            raise SpanError(
                f"{error}, between steps {step} and {next_step}. Leave these steps out with --steps."
            ) from None
        yield start, end, done
        step, start, following = next_step, end, after
