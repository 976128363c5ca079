r"""The mathematics: allocate the loss change of one segment, and of the segments of a span in turn.

$A_i = (\theta'_i-\theta_i)\sum_q w_q\,\partial_i L(\theta + x_q(\theta'-\theta))$ and
$L(\theta')-L(\theta) = \sum_i A_i + \text{residual}$, with $\theta,\theta'$ consecutive checkpoints
and $x_q, w_q$ the nodes and weights of a rule on [0, 1]. Source: Lan, Liu, Zhou, Yosinski, NeurIPS
2019 (arXiv 1909.01440), section 3.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import SpanError
from .objective import Along, Evaluation, Motion, Numbers, blocks, distances, units_of
from .quadrature import COMPOSITE, Family, Rule

Point = Mapping[str, Tensor]
Gradient = dict[str, Tensor]
Axes = Mapping[str, int | None]


class Evaluates(Protocol):
    """Evaluates losses at a point: all the mathematics needs of an objective."""

    def evaluate(
        self, point: Point, losses: list[str], *, gradient: bool = True, along: Along | None = None
    ) -> dict[str, Evaluation]:
        """Return each loss at `point`, with its gradient, or sums of it along directions, unless
        only the value is asked for.
        """

    def holding(
        self, point: MutableMapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Hold a point in the model instead of beside it: inside the context, the point's tensors
        are the model's own where these hold the same numbers.
        """


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

    Where sums are taken, a tensor stands for its units: the allocation of a unit is the sum over
    its parameters, the gradient is that along the motion, and the motion is 1.

    Attributes:
        allocation: of each tensor, in units of loss.
        mean_gradient: the weighted mean of the gradients at the nodes.
        motion: θ′ − θ.
        distance: Σ|θ′ − θ| of each tensor.
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
    distance: Mapping[str, float]
    loss_start: Numbers
    loss_end: Numbers
    weight: Numbers
    residual: Numbers
    evaluations: int
    level: int
    converged: bool
    error_bound: Numbers
    unreached: frozenset[str]


class Between(Mapping[str, Tensor]):
    """The point θ + x(θ′ − θ), each tensor computed when it is asked for; tensors that are not
    floating (counters) are loaded, never interpolated.
    """

    def __init__(self, start: Point, end: Point, x: float) -> None:
        self._start, self._end, self._x = start, end, x

    def __getitem__(self, name: str) -> Tensor:
        start, end = self._start[name], self._end[name]
        if start.is_floating_point():
            return torch.lerp(start, end, self._x)
        return start if self._x < 1 else end

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


class _Segment(Protocol):
    """One segment as the rules see it: evaluations at its nodes, and the motion by which their
    gradients are multiplied.
    """

    def motion(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Return θ′ − θ of some tensors, float64; 1 where gradients are sums along it."""

    def distance(self, names: Iterable[str]) -> Mapping[str, float]:
        """Return Σ|θ′ − θ| of some tensors."""

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """Evaluate losses at θ + x(θ′ − θ), x < 1."""

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """Evaluate losses at θ′, for this segment and for the one that follows.

        Args:
            losses: names.
            here: whether this segment wants the gradient there.
            following: whether the one that follows wants it, if one does.
        """


class _Parameters:
    """A segment on which every parameter has a gradient of its own.

    Args:
        start: every tensor of the model at the first checkpoint.
        end: the same at the next one.
        objective: evaluates losses.
        following: returns the checkpoint after that; None where there is none.
    """

    def __init__(
        self, start: Point, end: Point, objective: Evaluates, following: Callable[[], Point | None]
    ) -> None:
        self._start, self._end, self._objective = start, end, objective
        self._following = following
        self._motion: dict[str, Tensor] = {}

    def motion(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        if not self._motion:
            self._motion = {
                name: self._end[name].double() - self._start[name].double() for name in names
            }
        return self._motion

    def distance(self, names: Iterable[str]) -> Mapping[str, float]:
        return {name: values.abs().sum().item() for name, values in self.motion(names).items()}

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        point = self._start if x == 0 else Between(self._start, self._end, x)
        return self._objective.evaluate(point, losses, gradient=gradient)

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        gradient = here or (following and self._following() is not None)
        last = self._objective.evaluate(self._end, losses, gradient=gradient)
        return last, last


class _Units:
    """A segment on which gradients are summed along the motion, over units, and never held.

    Args:
        axes: of the units, by tensor; None where a tensor is one unit.
        start: every tensor of the model at the first checkpoint.
        end: the same at the next one.
        objective: evaluates losses.
        following: returns the checkpoint after that; None where there is none. It is not asked for
            before the gradients between `start` and `end` are done, for which it is not needed.
    """

    def __init__(
        self,
        axes: Axes,
        start: Point,
        end: Point,
        objective: Evaluates,
        following: Callable[[], Point | None],
    ) -> None:
        self._axes, self._objective, self._following = axes, objective, following
        self._own = Motion(start, end)

    def motion(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        start = self._own.start
        return {
            name: torch.ones(
                units_of(start[name], self._axes[name]),
                dtype=torch.float64,
                device=start[name].device,
            )
            for name in names
        }

    def distance(self, names: Iterable[str]) -> Mapping[str, float]:
        return distances(self._own, names)

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        start, end = self._own.start, self._own.end
        evaluations = self._along(
            start if x == 0 else Between(start, end, x), losses, [self._own] if gradient else []
        )
        return _of_direction(evaluations, 0) if gradient else evaluations

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        with self._held_once() if following else contextlib.nullcontext():
            motions = [self._own] if here else []
            if following and (next_point := self._following()) is not None:
                motions.append(Motion(self._own.end, next_point))
            last = self._along(self._own.end, losses, motions)
        if not motions:
            return last, last
        return _of_direction(last, 0), _of_direction(last, -1)

    def _held_once(self) -> contextlib.AbstractContextManager[None]:
        """Hold the end in the model alone, while the point after it is in memory as well; one that
        is read where it is needed takes none.
        """
        end = self._own.end
        if isinstance(end, MutableMapping):
            return self._objective.holding(end)
        return contextlib.nullcontext()

    def _along(
        self, point: Point, losses: list[str], motions: list[Motion]
    ) -> dict[str, Evaluation]:
        if not motions:
            return self._objective.evaluate(point, losses, gradient=False)
        return self._objective.evaluate(point, losses, along=Along(self._axes, motions))


def _of_direction(evaluations: Mapping[str, Evaluation], position: int) -> dict[str, Evaluation]:
    return {name: evaluation.along(position) for name, evaluation in evaluations.items()}


def _segment(
    start: Point,
    end: Point,
    objective: Evaluates,
    axes: Axes | None,
    following: Callable[[], Point | None],
) -> _Segment:
    """Return a segment on which parameters have gradients of their own, or units sums of them."""
    if axes is None:
        return _Parameters(start, end, objective, following)
    return _Units(axes, start, end, objective, following)


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
    start: Point, end: Point, objective: Evaluates, losses: list[str], axes: Axes | None = None
) -> dict[str, float]:
    """Return the trapezoid's L1 error on one segment, against Simpson, as a share of Σ|(g₁ −
    g₀)·Δθ|; for each loss.

    Args:
        start: every tensor of the model at the first checkpoint.
        end: the same at the next one.
        objective: evaluates losses and gradients.
        losses: names.
        axes: of the units where sums over them are taken, see `allocate`.
    """
    segment = _segment(start, end, objective, axes, lambda: None)
    first, middle = segment.at(0.0, losses), segment.at(0.5, losses)
    last, _ = segment.at_end(losses, here=True, following=False)
    shares = {}
    for name in losses:
        refinement = _Refinement(
            COMPOSITE, segment.motion(first[name].gradient), first[name], last[name]
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
    axes: Axes | None = None,
    at_start: Mapping[str, Evaluation] | None = None,
    following: Callable[[], Point | None] = lambda: None,
    at_least: int = 0,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Allocate every loss on the segment from `start` to `end`.

    Args:
        start: every tensor of the model at the first checkpoint, on the device of the objective.
        end: the same at the next one.
        objective: evaluates losses and gradients.
        losses: names.
        method: the rule and its tolerances.
        axes: for sums over units, for which no gradient is ever held: the axis of the units of
            each tensor, None where a tensor is one unit. None: every parameter's allocation.
        at_start: evaluations at `start` where the segment before has made them.
        following: returns the checkpoint after `end`, whose segment will want evaluations at
            `end`; None where there is none.
        at_least: the level a rule is refined to in any case, where it is refined at all.

    Returns:
        The allocation of each loss, and the evaluations at `end` for the segment that follows.

    Raises:
        SpanError: where a loss or a gradient is not finite.
    """
    segment = _segment(start, end, objective, axes, following)
    level = method.family.level_of(method.rule)
    if level is None:
        return _allocate_fixed(segment, losses, method, at_start)
    return _allocate_refined(segment, losses, method, at_start, max(at_least, level))


def _allocate_refined(
    segment: _Segment,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
    lowest: int,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    first = at_start or segment.at(0.0, losses)
    # those every loss will need, before the end, which may need the checkpoint after it as well
    early = [
        (node, segment.at(node, losses))
        for node in (method.family.fresh_nodes(1) if lowest >= 1 else ())
    ]
    last, known = segment.at_end(losses, here=True, following=True)
    motion = segment.motion(first[losses[0]].gradient)
    states = {name: _Refinement(method.family, motion, first[name], last[name]) for name in losses}
    done: dict[str, SegmentAllocation] = {}
    level = 0
    pending = list(losses)
    while True:
        if level >= lowest:
            for name in pending:
                done[name] = _judged(name, states[name], method, segment)
            pending = [
                name
                for name in pending
                if not (done[name].converged or name in method.never_refined)
            ]
        if not pending or level == method.family.finest:
            return done, known
        level += 1
        for name in pending:
            states[name].refine()
        nodes: Iterable[tuple[float, dict[str, Evaluation]]] = early if level == 1 else ()
        nodes = nodes or (
            (node, segment.at(node, pending)) for node in method.family.fresh_nodes(level)
        )
        for node, evaluations in nodes:
            for name in pending:
                states[name].take(node, evaluations[name])
        early = []


def _judged(name: str, state: _Refinement, method: Method, segment: _Segment) -> SegmentAllocation:
    state.measure()
    bound = state.error_bound((method.calibration or {}).get(name))
    tolerance, allocation_tolerance = method.bounds(name)
    accurate = math.isinf(allocation_tolerance) or bool(np.all(bound <= allocation_tolerance))
    return _checked(
        SegmentAllocation(
            allocation=state.allocation,
            mean_gradient=state.mean,
            motion=state.motion,
            distance=segment.distance(state.motion),
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
    segment: _Segment,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Use a rule as it stands; end losses that no node gives come from forward passes."""
    rule = method.rule
    first = at_start or segment.at(0.0, losses, gradient=rule.has_start)
    nodes = [first if x == 0 else segment.at(x, losses) for x in rule.nodes]
    last, known = segment.at_end(losses, here=False, following=rule.has_start)
    motion = segment.motion(nodes[0][losses[0]].gradient)
    distance = segment.distance(motion)
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
        allocated = SegmentAllocation(
            allocation=allocation,
            mean_gradient=mean,
            motion=motion,
            distance=distance,
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
        done[name] = _checked(allocated, name)
    return done, known


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


class _Ahead:
    """The next of the points of a span, read when it is first asked for.

    Attributes:
        failure: why it could not be read; None where it could, or was not asked for.
    """

    def __init__(self, walk: Iterator[tuple[int, Point]]) -> None:
        self._walk = walk
        self._items: list[tuple[int, Point] | None] = []
        self.failure: Exception | None = None

    def item(self) -> tuple[int, Point] | None:
        """Return its training step and its tensors; None where there is none."""
        if not self._items:
            try:
                self._items.append(next(self._walk, None))
            except Exception as error:
                self.failure = error
                raise
        return self._items[0]

    def point(self) -> Point | None:
        """Return its tensors; None where there is none."""
        item = self.item()
        return None if item is None else item[1]


def allocate_span(
    points: Iterable[tuple[int, Point]],
    objective: Evaluates,
    losses: list[str],
    method: Method,
    *,
    axes: Axes | None = None,
    at_least: Iterable[int] = (),
    begin: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, SegmentAllocation]]:
    """Allocate the segments between consecutive points in turn; each end is evaluated once and
    reused as the next start.

    Args:
        points: training step and tensors of each checkpoint of the span, one more than there are
            segments. A point is read when it is needed, and none stays longer than that.
        objective: evaluates losses and gradients.
        losses: names.
        method: the rule and its tolerances.
        axes: of the units where sums over them are taken, see `allocate`.
        at_least: for each segment, the level a rule is refined to in any case, where it is refined
            at all; 0 where it ends early.
        begin: called before each segment is allocated, when of the points only its ends are in
            memory.

    Yields:
        The allocation of every loss on one segment.

    Raises:
        SpanError: where a loss or a gradient is not finite, naming the segment.
    """
    walk, lowest = iter(points), itertools.chain(at_least, itertools.repeat(0))
    (step, start), upcoming = next(walk), next(walk, None)
    known: Mapping[str, Evaluation] | None = None
    while upcoming is not None:
        (next_step, end), ahead = upcoming, _Ahead(walk)
        begin()
        try:
            done, known = allocate(
                start,
                end,
                objective,
                losses,
                method,
                axes=axes,
                at_start=known,
                following=ahead.point,
                at_least=next(lowest),
            )
        except SpanError as error:
            if error is ahead.failure:
                raise
            raise SpanError(
                f"{error}, between steps {step} and {next_step}. Leave these steps out with "
                "--steps."
            ) from None
        step, start = next_step, end
        yield done
        upcoming = ahead.item()
