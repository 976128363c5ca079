r"""The mathematics: allocate the loss change of one segment, and of the segments of a span in turn.

$A_i = (\theta'_i-\theta_i)\sum_q w_q\,\partial_i L(\theta + x_q(\theta'-\theta))$ and
$L(\theta')-L(\theta) = \sum_i A_i + \text{residual}$, with $\theta,\theta'$ consecutive checkpoints
and $x_q, w_q$ the nodes and weights of a rule on [0, 1]. Source: Lan, Liu, Zhou, Yosinski, NeurIPS
2019 (arXiv 1909.01440), section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import SpanError
from .objective import Evaluation, Numbers
from .quadrature import COMPOSITE, Family, Rule

Point = Mapping[str, Tensor]
Gradient = dict[str, Tensor]
_BLOCK = 2**17


class Evaluates(Protocol):
    """Evaluates losses at a point: all the mathematics needs of an objective."""

    def evaluate(
        self, point: Point, losses: list[str], *, gradient: bool = True
    ) -> dict[str, Evaluation]:
        """Return each loss at `point`, with its gradient unless only the value is asked for."""


@dataclass(frozen=True)
class Method:
    """A rule, and how far it is refined.

    Attributes:
        rule: integrates a segment.
        tolerance: bounds |residual| of each segment and loss (of each of its groups), in units of
            loss; one for all losses, or one by loss (none where it has no entry). Only rules of
            `family` are refined.
        allocation_tolerance: bounds the allocation's own L1 error likewise.
        calibration: turns Σ|(g₁ − g₀)·Δθ| into the trapezoid's L1 error, by loss.
        never_refined: losses that stay at the rule's own level.
        family: the rules that refine `rule`.
    """

    rule: Rule
    tolerance: float | Mapping[str, float] = math.inf
    allocation_tolerance: float | Mapping[str, float] = math.inf
    calibration: Mapping[str, float] | None = None
    never_refined: frozenset[str] = frozenset()
    family: Family = COMPOSITE

    def bounds(self, loss: str) -> tuple[float, float]:
        """Return the tolerance and the tolerance of the allocation of a loss, in units of loss."""
        residual, allocation = (
            bound.get(loss, math.inf) if isinstance(bound, Mapping) else bound
            for bound in (self.tolerance, self.allocation_tolerance)
        )
        return residual, allocation


@dataclass(frozen=True, kw_only=True)
class SegmentAllocation:
    """The allocation of one loss on one segment; tensors float64, by name, numbers and tensors per
    group where it has groups.

    Attributes:
        allocation: of each tensor, in units of loss.
        mean_gradient: the weighted mean of the gradients at the nodes.
        motion: θ′ − θ.
        loss_start: at the first checkpoint.
        loss_end: at the next one.
        weight: the sum of the elements' weights at the start.
        residual: the change of the loss less the sum of the allocation.
        evaluations: of gradients, the start shared with the segment before left out.
        level: of the family of rules; −1 for fixed rules.
        converged: whether the tolerances were reached.
        error_bound: estimates Σ|A − A*|; NaN for fixed rules.
        unreached: tensors the loss reached at no node.
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
    unreached: frozenset[str]


def blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut a (rows, columns) array into pieces small enough to stay in the cache, row by row where
    rows are long.

    >>> [(r.start, r.stop, c.start, c.stop) for r, c in blocks(2, 2**17 + 1)]
    [(0, 1, 0, 131072), (0, 1, 131072, 131073), (1, 2, 0, 131072), (1, 2, 131072, 131073)]
    """
    many = max(1, _BLOCK // max(1, columns))
    for row in range(0, rows, many):
        for column in range(0, columns, _BLOCK):
            yield slice(row, min(row + many, rows)), slice(column, min(column + _BLOCK, columns))


def interpolate(start: Point, end: Point, x: float) -> Point:
    """Return θ + x(θ′ − θ); tensors that are not floating (counters) are loaded, never
    interpolated.
    """
    return {
        name: torch.lerp(value, end[name], x)
        if value.is_floating_point()
        else (value if x < 1 else end[name])
        for name, value in start.items()
    }


def _motion(start: Point, end: Point, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: end[name].double() - start[name].double() for name in names}


def _sum(parts: Sequence[Numbers]) -> Numbers:
    """Return the exact sum of a few numbers, of each group."""
    return np.asarray(
        [math.fsum(column) for column in np.stack(parts, -1).reshape(-1, len(parts))]
    ).reshape(np.shape(parts[0]))[()]


def sums_over(
    tensors: Mapping[str, Tensor], motion: Mapping[str, Tensor], absolute: bool = False
) -> Numbers:
    """Return Σ over the elements of all tensors, or Σ|·|, of each group; `motion` tells their
    shapes without groups.
    """
    parts = []
    for name, values in tensors.items():
        groups = values.shape[: values.dim() - motion[name].dim()]
        flat = (values.abs() if absolute else values).reshape(*groups, motion[name].numel())
        parts.append(flat.sum(-1).cpu().numpy())
    return _sum(parts)


def _product(motion: Mapping[str, Tensor], gradient: Gradient) -> dict[str, Tensor]:
    return {name: motion[name] * values for name, values in gradient.items()}


def _combine(parts: Iterable[tuple[float, Gradient]]) -> Gradient:
    mean: Gradient = {}
    for weight, gradient in parts:
        for name, values in gradient.items():
            mean[name] = mean[name].add_(values, alpha=weight) if name in mean else weight * values
    return mean


def _sum_of(one: Gradient, other: Gradient) -> Gradient:
    return {name: values + other[name] for name, values in one.items()}


@dataclass
class _NodeSum:
    """The sum of the gradients at nodes that weigh alike; `node` is one of them."""

    node: float
    gradient: Gradient


class _Refinement:
    """One loss on one segment while its rule is refined.

    Nodes that weigh alike at all levels to come are one sum of gradients: with the composite family
    the ends, the fresh nodes and the older inner ones. So sums carry every level, and no old node
    is evaluated again.
    """

    def __init__(
        self, family: Family, motion: Mapping[str, Tensor], start: Evaluation, end: Evaluation
    ) -> None:
        self.family, self.motion, self.start, self.end = family, motion, start, end
        self._fresh: list[_NodeSum] = []
        self._older: list[_NodeSum] = []
        self.unreached = start.unreached & end.unreached
        self.level = 0
        self._before: Gradient | None = None
        self._measured = False
        self.mean: Gradient = {}
        self.allocation: dict[str, Tensor] = {}
        self.residual: Numbers = np.float64(math.nan)
        self._change: Numbers = np.float64(math.nan)

    def refine(self) -> None:
        """Go on to the next level, whose fresh nodes are taken in next."""
        if self.level >= 1:
            self.measure()
        self._before, self.mean, self._measured = self.mean or None, {}, False
        self.level += 1
        for fresh in self._fresh:
            self._add(self._older, fresh.node, fresh.gradient)
        self._fresh = []

    def take(self, node: float, evaluation: Evaluation) -> None:
        """Take in the gradient at a fresh node."""
        self.unreached &= evaluation.unreached
        self._add(self._fresh, node, evaluation.gradient)

    def _add(self, sums: list[_NodeSum], node: float, gradient: Gradient) -> None:
        for like in sums:
            if self.family.weigh_alike(self.level, like.node, node):
                like.gradient = _sum_of(like.gradient, gradient)
                return
        sums.append(_NodeSum(node, gradient))

    def measure(self) -> None:
        """Compute the mean gradient and the allocation at this level, the residual, and Σ|·| of
        what the last refining changed.
        """
        if self._measured:
            return
        sums: list[Numbers] = []
        changes: list[Numbers] = []
        for name in self.motion:
            total, change = self._measure_tensor(name)
            sums.append(total)
            changes.append(change)
        self.residual = self.end.loss - self.start.loss - _sum(sums)
        self._change, self._measured = _sum(changes), True

    def _measure_tensor(self, name: str) -> tuple[Numbers, Numbers]:
        """Compute one tensor's mean gradient and allocation, piece by piece; return the sums of
        each group.
        """
        motion, first = self.motion[name], self.start.gradient[name]
        groups = first.shape[: first.dim() - motion.dim()]
        shape = (math.prod(groups), motion.numel())
        moved = motion.reshape(-1)
        begins, ends = first.reshape(shape), self.end.gradient[name].reshape(shape)
        inner = [
            (self.family.weight(self.level, part.node), part.gradient[name].reshape(shape))
            for part in (*self._fresh, *self._older)
        ]
        before = None if self._before is None else self._before[name].reshape(shape)
        means, products = (
            torch.empty_like(first).reshape(shape),
            torch.empty_like(first).reshape(shape),
        )
        weight = self.family.weight(self.level, 0.0)
        total = torch.zeros(shape[0], dtype=torch.float64, device=motion.device)
        change = torch.zeros_like(total)
        for row, column in blocks(*shape):
            both = begins[row, column] + ends[row, column]
            mean = torch.mul(both, weight, out=means[row, column])
            for factor, gradients in inner:
                mean.add_(gradients[row, column], alpha=factor)
            total[row] += torch.mul(mean, moved[column], out=products[row, column]).sum(1)
            if self.level == 0:
                difference = ends[row, column] - begins[row, column]
            elif before is None:
                difference = torch.sub(mean, both, alpha=0.5)
            else:
                difference = mean - before[row, column]
            change[row] += difference.mul_(moved[column]).abs_().sum(1)
        self.mean[name], self.allocation[name] = (
            means.reshape(first.shape),
            products.reshape(first.shape),
        )
        return total.reshape(groups).cpu().numpy(), change.reshape(groups).cpu().numpy()

    def error_bound(self, calibration: float | None) -> Numbers:
        """Estimate Σ|A − A*|: what the last refining changed; at level 0 a calibrated share of
        Σ|(g₁ − g₀)·Δθ|.
        """
        if self.level:
            return self._change
        return self._change * (math.nan if calibration is None else calibration)

    @property
    def curvature(self) -> Numbers:
        """Σ|(g₁ − g₀)·Δθ|."""
        differences = {
            name: self.end.gradient[name] - first for name, first in self.start.gradient.items()
        }
        return sums_over(_product(self.motion, differences), self.motion, absolute=True)


def calibrate(
    start: Point, end: Point, objective: Evaluates, losses: list[str]
) -> dict[str, float]:
    """Return the trapezoid's L1 error on one segment, against Simpson, as a share of Σ|(g₁ −
    g₀)·Δθ|; for each loss.
    """
    first, last = objective.evaluate(start, losses), objective.evaluate(end, losses)
    middle = objective.evaluate(interpolate(start, end, 0.5), losses)
    shares = {}
    for name in losses:
        refinement = _Refinement(
            COMPOSITE, _motion(start, end, first[name].gradient), first[name], last[name]
        )
        scale = np.sum(refinement.curvature)
        refinement.refine()
        refinement.take(0.5, middle[name])
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
        at_least: the level a rule is refined to in any case, where it is refined at all.

    Returns:
        The allocation of each loss, and the evaluations at `end` for the segment that follows.

    Raises:
        SpanError: where a loss or a gradient is not finite.
    """
    level = method.family.level_of(method.rule)
    if level is None:
        return _allocate_fixed(start, end, objective, losses, method, at_start, gradient_at_end)
    return _allocate_refined(start, end, objective, losses, method, at_start, max(at_least, level))


def _allocate_refined(
    start: Point,
    end: Point,
    objective: Evaluates,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
    lowest: int,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    first = at_start or objective.evaluate(start, losses)
    last = objective.evaluate(end, losses)
    motion = _motion(start, end, first[losses[0]].gradient)
    states = {name: _Refinement(method.family, motion, first[name], last[name]) for name in losses}
    done: dict[str, SegmentAllocation] = {}
    level = 0
    pending = list(losses)
    while True:
        if level >= lowest:
            for name in pending:
                done[name] = _judged(name, states[name], method)
            pending = [
                name
                for name in pending
                if not (done[name].converged or name in method.never_refined)
            ]
        if not pending or level == method.family.finest:
            return done, last
        level += 1
        for name in pending:
            states[name].refine()
        for node in method.family.fresh_nodes(level):
            for name, evaluation in objective.evaluate(
                interpolate(start, end, node), pending
            ).items():
                states[name].take(node, evaluation)


def _judged(name: str, state: _Refinement, method: Method) -> SegmentAllocation:
    state.measure()
    bound = state.error_bound((method.calibration or {}).get(name))
    tolerance, allocation_tolerance = method.bounds(name)
    accurate = math.isinf(allocation_tolerance) or bool(np.all(bound <= allocation_tolerance))
    return _checked(
        SegmentAllocation(
            allocation=state.allocation,
            mean_gradient=state.mean,
            motion=state.motion,
            loss_start=state.start.loss,
            loss_end=state.end.loss,
            weight=state.start.weight,
            residual=state.residual,
            evaluations=len(state.family.rules[state.level].nodes) - 1,
            level=state.level,
            converged=bool(np.all(np.abs(state.residual) <= tolerance)) and accurate,
            error_bound=bound,
            unreached=state.unreached,
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
    """Use a rule as it stands; end losses that no node gives come from forward passes."""
    rule = method.rule
    first = at_start or objective.evaluate(start, losses, gradient=rule.has_start)
    last = objective.evaluate(end, losses, gradient=rule.has_start and gradient_at_end)
    nodes = [
        first if x == 0 else objective.evaluate(interpolate(start, end, x), losses)
        for x in rule.nodes
    ]
    motion = _motion(start, end, nodes[0][losses[0]].gradient)
    done = {}
    for name in losses:
        mean = _combine(
            [
                (weight, node[name].gradient)
                for weight, node in zip(rule.weights, nodes, strict=True)
            ]
        )
        allocation = _product(motion, mean)
        residual = last[name].loss - first[name].loss - sums_over(allocation, motion)
        segment = SegmentAllocation(
            allocation=allocation,
            mean_gradient=mean,
            motion=motion,
            loss_start=first[name].loss,
            loss_end=last[name].loss,
            weight=first[name].weight,
            residual=residual,
            evaluations=len(rule.nodes),
            level=-1,
            converged=bool(np.all(np.abs(residual) <= method.bounds(name)[0])),
            error_bound=np.full_like(residual, np.nan)[()],
            unreached=frozenset.intersection(*(node[name].unreached for node in nodes)),
        )
        done[name] = _checked(segment, name)
    return done, last


def _checked(segment: SegmentAllocation, name: str) -> SegmentAllocation:
    for where, loss in (("start", segment.loss_start), ("end", segment.loss_end)):
        if not np.all(np.isfinite(loss)):
            raise SpanError(
                f"loss {name!r} is {np.ravel(loss)[~np.isfinite(np.ravel(loss))][0]} at the "
                f"{where} of the segment"
            )
    if not np.all(np.isfinite(segment.residual)):
        for tensor, gradient in segment.mean_gradient.items():
            if not bool(torch.isfinite(gradient).all()):
                raise SpanError(
                    f"the gradient of loss {name!r} for tensor {tensor!r} holds NaN or Inf inside "
                    "the segment"
                )
    return segment


def allocate_span(
    points: Iterable[tuple[int, Point]],
    objective: Evaluates,
    losses: list[str],
    method: Method,
    at_least: Iterable[int] = (),
) -> Iterator[tuple[Point, Point, dict[str, SegmentAllocation]]]:
    """Allocate the segments between consecutive points in turn; each end is evaluated once and
    reused as the next start.

    Args:
        points: training step and tensors of each checkpoint of the span, one more than there are
            segments.
        objective: evaluates losses and gradients.
        losses: names.
        method: the rule and its tolerances.
        at_least: for each segment, the level a rule is refined to in any case, where it is refined
            at all; 0 where it ends early.

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
                f"{error}, between steps {step} and {next_step}. Leave these steps out with "
                "--steps."
            ) from None
        yield start, end, done
        step, start, following = next_step, end, after
