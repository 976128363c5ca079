r"""The mathematics: allocate the loss change of one segment, and of the segments of a span in turn.

$A_i = (\theta'_i-\theta_i)\sum_q w_q\,\partial_i L(\theta + x_q(\theta'-\theta))$ and
$L(\theta')-L(\theta) = \sum_i A_i + \text{residual}$, with $\theta,\theta'$ consecutive checkpoints and $x_q, w_q$ the nodes and
weights of a rule on [0, 1]. Source: Lan, Liu, Zhou, Yosinski, NeurIPS 2019 (arXiv 1909.01440), section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import SpanError
from .objective import Evaluation
from .quadrature import MAX_LEVEL, NESTED, Rule, first_level, fresh_nodes

Point = Mapping[str, Tensor]
Gradient = dict[str, Tensor]
Numbers = Any  # numpy float64 of shape () or (groups,)
_BLOCK = 2**17


class Evaluates(Protocol):
    """What the mathematics needs of an objective."""

    def evaluate(self, point: Point, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Each loss at `point`, with its gradient unless only the value is asked for."""


@dataclass(frozen=True)
class Method:
    """How a segment is integrated.

    `tolerance` bounds |residual| and `allocation_tolerance` the allocation's own L1 error, both in units of loss, one for all
    losses or one by loss (none where it has no entry), per segment and loss (each of its groups), for rules of the nested
    family. `calibration` turns Σ|(g₁ − g₀)·Δθ| into the trapezoid's L1 error. Losses in `never_refined` stay at the rule's
    own level.
    """

    rule: Rule
    tolerance: float | Mapping[str, float] = math.inf
    allocation_tolerance: float | Mapping[str, float] = math.inf
    calibration: Mapping[str, float] | None = None
    never_refined: frozenset[str] = frozenset()

    def bounds(self, loss: str) -> tuple[float, float]:
        """Return the tolerance and the tolerance of the allocation of a loss, in units of loss."""
        residual, allocation = (
            each.get(loss, math.inf) if isinstance(each, Mapping) else each
            for each in (self.tolerance, self.allocation_tolerance)
        )
        return residual, allocation


@dataclass(frozen=True)
class SegmentAllocation:
    """The allocation of one loss on one segment; tensors float64, by name, numbers and tensors per group where it has groups.

    `motion` is θ′ − θ and `weight` the sum of the elements' weights at the start. `evaluations` counts gradient evaluations,
    the start shared with the segment before left out; `error_bound` estimates Σ|A − A*| (NaN for fixed rules); `level` is that
    of the nested family (−1 for fixed rules).
    """

    allocation: dict[str, Tensor]
    mean_gradient: Gradient
    motion: Mapping[str, Tensor]
    loss_start: Numbers
    loss_end: Numbers
    weight: Numbers
    residual: Numbers
    evaluations: int
    level: int
    converged: bool
    error_bound: Numbers
    untouched: frozenset[str]


def blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a (rows, columns) array small enough to stay in the cache, row by row where rows are long.

    >>> [(r.start, r.stop, c.start, c.stop) for r, c in blocks(2, 2**17 + 1)]
    [(0, 1, 0, 131072), (0, 1, 131072, 131073), (1, 2, 0, 131072), (1, 2, 131072, 131073)]
    """
    many = max(1, _BLOCK // max(1, columns))
    for row in range(0, rows, many):
        for column in range(0, columns, _BLOCK):
            yield slice(row, min(row + many, rows)), slice(column, min(column + _BLOCK, columns))


def interpolate(start: Point, end: Point, x: float) -> Point:
    """θ + x(θ′ − θ); tensors that are not floating (counters) are loaded, never interpolated."""
    return {
        name: torch.lerp(value, end[name], x) if value.is_floating_point() else (value if x < 1 else end[name])
        for name, value in start.items()
    }


def _motion(start: Point, end: Point, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: end[name].double() - start[name].double() for name in names}


def _sum(parts: Sequence[Numbers]) -> Numbers:
    """The exact sum of a few numbers, of each group."""
    return np.asarray([math.fsum(column) for column in np.stack(parts, -1).reshape(-1, len(parts))]).reshape(
        np.shape(parts[0])
    )[()]


def sums_over(tensors: Mapping[str, Tensor], motion: Mapping[str, Tensor], absolute: bool = False) -> Numbers:
    """Σ over the elements of all tensors, or Σ|·|, of each group; `motion` tells their shapes without groups."""
    parts = []
    for name, each in tensors.items():
        flat = (each.abs() if absolute else each).reshape(
            *each.shape[: each.dim() - motion[name].dim()], motion[name].numel()
        )
        parts.append(flat.sum(-1).cpu().numpy())
    return _sum(parts)


def _product(motion: Mapping[str, Tensor], gradient: Gradient) -> dict[str, Tensor]:
    return {name: motion[name] * each for name, each in gradient.items()}


def _combine(parts: Iterable[tuple[float, Gradient]]) -> Gradient:
    mean: Gradient = {}
    for weight, gradient in parts:
        for name, each in gradient.items():
            mean[name] = mean[name].add_(each, alpha=weight) if name in mean else weight * each
    return mean


def _sum_of(one: Gradient, other: Gradient) -> Gradient:
    return {name: each + other[name] for name, each in one.items()}


class _Refinement:
    """One loss on one segment while its intervals are halved.

    Composite rules give equal weights to the two ends, to all fresh nodes and to all older inner nodes, so sums of gradients
    carry every level and no old node is evaluated again.
    """

    def __init__(self, motion: Mapping[str, Tensor], start: Evaluation, end: Evaluation) -> None:
        self.motion, self.start, self.end = motion, start, end
        self._inner: Gradient | None = None
        self._fresh: Gradient | None = None
        self.untouched = start.untouched & end.untouched
        self.level = 0
        self._before: Gradient | None = None
        self._measured = False
        self.mean: Gradient = {}
        self.allocation: dict[str, Tensor] = {}
        self.residual: Numbers = math.nan
        self._change: Numbers = math.nan

    def halve(self) -> None:
        """Go on to the next level, whose fresh nodes are taken in next."""
        if self.level >= 1:
            self.measure()
        if self._fresh is not None:
            self._inner = self._fresh if self._inner is None else _sum_of(self._inner, self._fresh)
        self._fresh = None
        self._before, self.mean, self._measured = self.mean or None, {}, False
        self.level += 1

    def take(self, evaluation: Evaluation) -> None:
        """Take in the gradient at a fresh node."""
        self.untouched &= evaluation.untouched
        self._fresh = evaluation.gradient if self._fresh is None else _sum_of(self._fresh, evaluation.gradient)

    def measure(self) -> None:
        """The mean gradient and the allocation at this level, the residual, and Σ|·| of what the last halving changed."""
        if self._measured:
            return
        weights = NESTED[self.level].weights
        sums: list[Numbers] = []
        changes: list[Numbers] = []
        for name, motion in self.motion.items():
            first, last = self.start.gradient[name], self.end.gradient[name]
            mean, product = torch.empty_like(first), torch.empty_like(first)
            others = [
                (weights[at], part[name]) for at, part in ((1, self._fresh), (2, self._inner)) if part is not None
            ]
            before = None if self._before is None else self._before[name]
            groups = first.dim() - motion.dim()
            total, change = self._fill(motion, first, last, weights[0], others, before, mean, product, groups)
            sums.append(total.reshape(first.shape[:groups]).cpu().numpy())
            changes.append(change.reshape(first.shape[:groups]).cpu().numpy())
            self.mean[name], self.allocation[name] = mean, product
        self.residual = self.end.loss - self.start.loss - _sum(sums)
        self._change, self._measured = _sum(changes), True

    def _fill(
        self,
        motion: Tensor,
        first: Tensor,
        last: Tensor,
        weight: float,
        others: list[tuple[float, Tensor]],
        before: Tensor | None,
        mean: Tensor,
        product: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        """Compute one tensor's mean gradient and allocation in place, piece by piece; returns the sums of each group."""
        rows = first.shape[0] if groups else 1
        flat = [each.reshape(rows, motion.numel()) for each in (first, last, mean, product)]
        begin, end, means, products = flat
        wide = [(factor, each.reshape(rows, motion.numel())) for factor, each in others]
        old = None if before is None else before.reshape(rows, motion.numel())
        moved = motion.reshape(-1)
        total = torch.zeros(rows, dtype=torch.float64, device=motion.device)
        change = torch.zeros_like(total)
        for row, column in blocks(rows, moved.numel()):
            here, ends = moved[column], begin[row, column] + end[row, column]
            now = means[row, column]
            torch.mul(ends, weight, out=now)
            for factor, each in wide:
                now.add_(each[row, column], alpha=factor)
            total[row] += torch.mul(now, here, out=products[row, column]).sum(1)
            if self.level == 0:
                difference = end[row, column] - begin[row, column]
            elif old is None:
                difference = torch.sub(now, ends, alpha=0.5)
            else:
                difference = now - old[row, column]
            change[row] += difference.mul_(here).abs_().sum(1)
        return total, change

    def error_bound(self, calibration: float | None) -> Numbers:
        """An estimate of Σ|A − A*|: what the last halving changed; at level 0 a calibrated share of Σ|(g₁ − g₀)·Δθ|."""
        if self.level:
            return self._change
        return self._change * (math.nan if calibration is None else calibration)

    @property
    def curvature(self) -> Numbers:
        """Σ|(g₁ − g₀)·Δθ|."""
        differences = {name: self.end.gradient[name] - first for name, first in self.start.gradient.items()}
        return sums_over(_product(self.motion, differences), self.motion, absolute=True)


def calibrate(start: Point, end: Point, objective: Evaluates, losses: list[str]) -> dict[str, float]:
    """The trapezoid's L1 error on one segment, against Simpson, as a share of Σ|(g₁ − g₀)·Δθ|; for each loss."""
    first, last = objective.evaluate(start, losses), objective.evaluate(end, losses)
    middle = objective.evaluate(interpolate(start, end, 0.5), losses)
    shares = {}
    for name in losses:
        refinement = _Refinement(_motion(start, end, first[name].gradient), first[name], last[name])
        scale = np.sum(refinement.curvature)
        refinement.halve()
        refinement.take(middle[name])
        refinement.measure()
        shares[name] = float(np.sum(refinement.error_bound(None)) / scale) if scale > 0 else 0.0
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
    at_least: int = 0,
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
        at_least: the level nested rules are refined to in any case.

    Returns:
        The allocation of each loss, and the evaluations at `end` for the segment that follows.

    Raises:
        SpanError: where a loss or a gradient is not finite.
    """
    if first_level(method.rule) is None:
        return _allocate_fixed(start, end, objective, losses, method, at_start, gradient_at_end)
    return _allocate_nested(start, end, objective, losses, method, at_start, at_least)


def _allocate_nested(
    start: Point,
    end: Point,
    objective: Evaluates,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
    at_least: int,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    first = at_start or objective.evaluate(start, losses)
    last = objective.evaluate(end, losses)
    motion = _motion(start, end, first[losses[0]].gradient)
    states = {name: _Refinement(motion, first[name], last[name]) for name in losses}
    done: dict[str, SegmentAllocation] = {}
    level, lowest = 0, max(at_least, NESTED.index(method.rule))
    pending = list(losses)
    while True:
        if level >= lowest:
            for name in pending:
                done[name] = _judged(name, states[name], method)
            pending = [name for name in pending if not (done[name].converged or name in method.never_refined)]
        if not pending or level == MAX_LEVEL:
            return done, last
        level += 1
        for name in pending:
            states[name].halve()
        for x in fresh_nodes(level):
            for name, evaluation in objective.evaluate(interpolate(start, end, x), pending).items():
                states[name].take(evaluation)


def _judged(name: str, state: _Refinement, method: Method) -> SegmentAllocation:
    state.measure()
    bound = state.error_bound((method.calibration or {}).get(name))
    tolerance, allocation_tolerance = method.bounds(name)
    accurate = math.isinf(allocation_tolerance) or bool(np.all(bound <= allocation_tolerance))
    return _checked(
        SegmentAllocation(
            state.allocation,
            state.mean,
            state.motion,
            state.start.loss,
            state.end.loss,
            state.start.weight,
            state.residual,
            2**state.level,
            state.level,
            bool(np.all(np.abs(state.residual) <= tolerance)) and accurate,
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
        residual = last[name].loss - first[name].loss - sums_over(allocation, motion)
        untouched = frozenset.intersection(*(each[name].untouched for each in found))
        segment = SegmentAllocation(
            allocation,
            mean,
            motion,
            first[name].loss,
            last[name].loss,
            first[name].weight,
            residual,
            len(rule.nodes),
            -1,
            bool(np.all(np.abs(residual) <= method.bounds(name)[0])),
            np.full_like(residual, np.nan)[()],
            untouched,
        )
        done[name] = _checked(segment, name)
    return done, last


def _checked(segment: SegmentAllocation, name: str) -> SegmentAllocation:
    for where, loss in (("start", segment.loss_start), ("end", segment.loss_end)):
        if not np.all(np.isfinite(loss)):
            raise SpanError(
                f"loss {name!r} is {np.ravel(loss)[~np.isfinite(np.ravel(loss))][0]} at the {where} of the segment"
            )
    if not np.all(np.isfinite(segment.residual)):
        for tensor, gradient in segment.mean_gradient.items():
            if not bool(torch.isfinite(gradient).all()):
                raise SpanError(
                    f"the gradient of loss {name!r} for tensor {tensor!r} holds NaN or Inf inside the segment"
                )
    return segment


def allocate_span(
    points: Iterable[tuple[int, Point]],
    objective: Evaluates,
    losses: list[str],
    method: Method,
    at_least: Iterable[int] = (),
) -> Iterator[tuple[Point, Point, dict[str, SegmentAllocation]]]:
    """The segments between consecutive points in turn, each end evaluated once and reused as the next start.

    Args:
        points: training step and tensors of each checkpoint of the span, one more than there are segments.
        objective: evaluates losses and gradients.
        losses: names.
        method: the rule and its tolerances.
        at_least: for each segment, the level nested rules are refined to in any case; 0 where it ends early.

    Yields:
        The segment's start, its end, and the allocation of every loss.

    Raises:
        SpanError: where a loss or a gradient is not finite, naming the segment.
    """
    walk, lowest = iter(points), itertools.chain(at_least, itertools.repeat(0))
    (step, start), following = next(walk), next(walk, None)
    known: Mapping[str, Evaluation] | None = None
    while following is not None:
        (next_step, end), after = following, next(walk, None)
        try:
            done, known = allocate(
                start,
                end,
                objective,
                losses,
                method,
                at_start=known,
                gradient_at_end=after is not None,
                at_least=next(lowest),
            )
        except SpanError as error:
            raise SpanError(
                f"{error}, between steps {step} and {next_step}. Leave these steps out with --steps."
            ) from None
        yield start, end, done
        step, start, following = next_step, end, after
