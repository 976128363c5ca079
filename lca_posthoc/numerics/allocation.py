r"""Allocate the loss change of one segment, refined as its tolerance asks, and of the segments of a
span in turn.

$A_i = (\theta'_i-\theta_i)\sum_q w_q\,\partial_i L(\theta + x_q(\theta'-\theta))$ and
$L(\theta')-L(\theta) = \sum_i A_i + \text{residual}$, with $\theta,\theta'$ consecutive checkpoints
and $x_q, w_q$ the nodes and weights of a rule on [0, 1]. Source: Lan, Liu, Zhou, Yosinski, NeurIPS
2019 (arXiv 1909.01440), section 3.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ..errors import SpanError
from .objective import (
    Evaluation,
    InARow,
    InRows,
    Motion,
    Numbers,
    OfTensors,
    Reading,
    read,
)
from .parts import Parts, Point, Split
from .path import PathShift, SegmentPath
from .quadrature import COMPOSITE, Family, Rule
from .segment_allocation import (
    ExampleAllocation,
    Gathers,
    Gradient,
    Node,
    SegmentAllocation,
    TensorSums,
    of_every_example,
    sum_of,
    tensor_sums,
)
from .segments import Axes, Evaluates, Nodes, Way, segment_of


@dataclass(frozen=True)
class Method:
    """Choose a rule and the tolerances that decide how far it is refined.

    Attributes:
        rule: integrates a segment.
        tolerance: bound on |residual| of each segment and loss (of each of its groups), in units of
            loss; one for all losses, or one by loss (none for a missing entry). Only rules of
            `family` are refined.
        allocation_tolerance: bound on the allocation's own L1 error, in the same form.
        calibration: by loss, the factor from Σ|(g₁ − g₀)·Δθ| to the trapezoid's L1 error.
        never_refined: losses that stay at the rule's own level.
        per_example: losses that keep their examples apart.
        family: the rules that refine `rule`.
    """

    rule: Rule
    tolerance: float | Mapping[str, float] = math.inf
    allocation_tolerance: float | Mapping[str, float] = math.inf
    calibration: Mapping[str, float] | None = None
    never_refined: frozenset[str] = frozenset()
    per_example: frozenset[str] = frozenset()
    family: Family = COMPOSITE

    def bounds(self, loss: str) -> tuple[float, float]:
        """Return the two tolerances of a loss, of the residual and of the allocation, in units of
        loss.
        """
        residual, allocation = (
            bound.get(loss, math.inf) if isinstance(bound, Mapping) else bound
            for bound in (self.tolerance, self.allocation_tolerance)
        )
        return residual, allocation


@dataclass
class _NodeSum:
    """Hold the sum of the gradients at nodes with equal weights; `node` is one of them."""

    node: float
    gradient: Gradient
    _is_own: bool = False

    def add(self, gradient: Gradient) -> None:
        """Add another gradient; a sum is float64, a single gradient keeps its type."""
        if isinstance(self.gradient, InARow):
            assert isinstance(gradient, InARow), "at all nodes numbers lie in a row"
            own_row, other = self._own(self.gradient.row), gradient.in_order_of(self.gradient)
            self.gradient = self.gradient.like(own_row.add_(other))
        elif isinstance(self.gradient, InRows):
            assert isinstance(gradient, InRows), "at all nodes numbers lie in rows"
            own = {name: self._own(values) for name, values in self.gradient.numbers.items()}
            self.gradient = gradient.added_to(own)
        else:
            self.gradient = {
                name: self._own(values).add_(gradient[name])
                for name, values in self.gradient.items()
            }
        self._is_own = True

    def _own(self, values: Tensor) -> Tensor:
        return values if self._is_own else values.to(torch.float64, copy=True)


class _Refinement:
    """Refine the rule of one loss on one segment.

    Nodes that have equal weights at this and all later levels share one sum of gradients: in the
    composite family these are the ends, the fresh nodes, those of the previous level, and the older
    inner ones. These sums determine every level and the one before it, so no old node is evaluated
    again.
    """

    def __init__(
        self,
        family: Family,
        points: Motion,
        start: Evaluation,
        end: Evaluation,
        gather: Gathers | None = None,
    ) -> None:
        self.family, self.points, self.start, self.end = family, points, start, end
        self._gather = gather
        self._fresh: list[_NodeSum] = []
        self._older: list[_NodeSum] = []
        self.unreached = start.unreached & end.unreached
        self.level = 0
        self._sums: TensorSums | None = None
        # refined together with this one
        self._examples: _Refinement | None = None
        if start.examples is not None and end.examples is not None:
            self._examples = _Refinement(family, points, start.examples, end.examples)
        self._parts: _Refinement | None = None
        if start.parts is not None and end.parts is not None:
            self._parts = _Refinement(family, points, _of_parts(start), _of_parts(end))

    def refine(self) -> None:
        """Advance to the next level; its fresh nodes must follow."""
        if self._examples is not None:
            self._examples.refine()
        if self._parts is not None:
            self._parts.refine()
        older: list[_NodeSum] = []
        for part in (*self._older, *self._fresh):
            self._add(older, part)
        self._older, self._fresh = older, []
        self.level += 1

    def take(self, node: float, evaluation: Evaluation) -> None:
        """Add the evaluation at a fresh node.

        Args:
            node: position of the node in [0, 1].
            evaluation: the loss and its gradient there.
        """
        if self._examples is not None and evaluation.examples is not None:
            self._examples.take(node, evaluation.examples)
        if self._parts is not None and evaluation.parts is not None:
            self._parts.take(node, _of_parts(evaluation))
        self.unreached &= evaluation.unreached
        self._add(self._fresh, _NodeSum(node, evaluation.gradient))

    def _add(self, sums: list[_NodeSum], part: _NodeSum) -> None:
        for like in sums:
            if self.family.weigh_alike(self.level, like.node, part.node):
                like.add(part.gradient)
                return
        sums.append(part)

    @property
    def nodes(self) -> list[Node]:
        """Return the gradients at this level, each with its weight."""
        return [
            *self._weighted(self.level, self._older),
            *((self.family.weight(self.level, part.node), part.gradient) for part in self._fresh),
        ]

    def _weighted(self, level: int, inner: list[_NodeSum]) -> list[Node]:
        """Return the gradients at both ends and at inner nodes, with their weights at a level."""
        weight = self.family.weight(level, 0.0)
        return [
            (weight, self.start.gradient),
            (weight, self.end.gradient),
            *((self.family.weight(level, part.node), part.gradient) for part in inner),
        ]

    def _changes(self) -> list[float]:
        """Return what the last refinement changed in the mean gradient, as factors of the gradients
        at nodes.

        At level 0, return the factors of the difference of both ends.
        """
        if self.level == 0:
            return [-1.0, 1.0]
        before = self._weighted(self.level - 1, self._older)
        return [
            weight - (before[position][0] if position < len(before) else 0.0)
            for position, (weight, _) in enumerate(self.nodes)
        ]

    def measure(self, final: bool = False) -> bool:
        """Compute the allocation of the tensors at this level, and Σ|·| of what the last refinement
        changed.

        Args:
            final: whether this level is certainly the last one.

        Returns:
            Whether the pieces were collected.
        """
        self._sums = tensor_sums(
            self.points,
            self.nodes,
            self._changes(),
            self.start,
            self._gather,
            final,
        )
        return final and self._gather is not None

    @property
    def measured(self) -> TensorSums:
        """Return the computed sums."""
        assert self._sums is not None, "nothing was measured"
        return self._sums

    @property
    def readings(self) -> list[Reading]:
        """Return the numbers that decide whether to refine further."""
        sums = self.measured
        return [self.start.totals, self.end.totals, sums.total, sums.changed]

    @property
    def residual(self) -> Numbers:
        """Return the change of the loss minus the sum of the allocation."""
        return self.end.loss - self.start.loss - sum_of(self.measured.totals.values())

    def examples(self) -> ExampleAllocation | None:
        """Return the allocation of every example at this level; None if examples are not kept
        apart.
        """
        if self._examples is None:
            return None
        examples = self._examples
        return of_every_example(examples.start, examples.end, examples.nodes)

    def parts(self) -> Mapping[str, Numbers] | None:
        """Return the allocation of the parts of the motion at this level; None if there are none."""
        if self._parts is None:
            return None
        return _weighted_sum(self._parts.nodes)

    def error_bound(self, calibration: float | None) -> Numbers:
        """Estimate Σ|A − A*| by what the last refinement changed; at level 0 by a calibrated share
        of Σ|(g₁ − g₀)·Δθ|.
        """
        change = sum_of(self.measured.changes.values())
        if self.level:
            return change
        return change * (math.nan if calibration is None else calibration)


def _of_parts(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose gradient is the sums along parts of the motion."""
    return Evaluation(evaluation.totals, evaluation.parts or {})


def _weighted_sum(nodes: Iterable[Node]) -> dict[str, Numbers]:
    """Return Σ weight · numbers of each tensor in float64."""
    like: OfTensors | None = None
    rows: list[Tensor] = []
    for weight, of_node in nodes:
        assert isinstance(of_node, OfTensors), "parts have one number of each tensor"
        like = of_node if like is None else like
        rows.append(weight * of_node.in_order_of(like))
    assert like is not None, "a rule has nodes"
    return like.like(functools.reduce(operator.add, rows)).numbers()


def calibrate(
    start: Point, end: Point, objective: Evaluates, losses: list[str], axes: Axes | None = None
) -> dict[str, float]:
    """Compute the trapezoid's L1 error on one segment, relative to Σ|(g₁ − g₀)·Δθ|, for each loss;
    Simpson is the reference.

    Args:
        start: every tensor of the model at the first checkpoint.
        end: every tensor at the next checkpoint.
        objective: evaluates losses and gradients.
        losses: names of the losses.
        axes: axes of units, if only sums over units are computed; see `allocate`.
    """
    segment = segment_of(Way(Motion(start, end)), objective, axes, lambda: None)
    first, middle = segment.at(0.0, losses), segment.at(0.5, losses)
    last, _ = segment.at_end(losses, here=True, following=False)
    shares = {}
    for name in losses:
        refinement = _Refinement(COMPOSITE, segment.points, first[name], last[name])
        refinement.measure()
        scale = float(np.sum(refinement.error_bound(1.0)))
        refinement.refine()
        refinement.take(0.5, middle[name])
        refinement.measure()
        shares[name] = float(np.sum(refinement.error_bound(None))) / scale if scale > 0 else 0.0
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
    gather: Mapping[str, Gathers] | None = None,
    split: Split | None = None,
    following_split: Callable[[], Split | None] = lambda: None,
    path: SegmentPath | None = None,
    following_path: Callable[[], SegmentPath | None] = lambda: None,
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Allocate every loss on the segment from `start` to `end`.

    Args:
        start: every tensor of the model at the first checkpoint, on the device of the objective.
        end: every tensor at the next checkpoint.
        objective: evaluates losses and gradients.
        losses: names of the losses.
        method: the rule and its tolerances.
        axes: by tensor, the axis of its units, or None if it is one unit. Only sums over units are
            then computed, and no gradient is ever stored. None to allocate every parameter.
        at_start: evaluations at `start`, if the previous segment made them.
        following: returns the checkpoint after `end`, whose segment will need evaluations at `end`;
            None if there is none.
        at_least: lowest level of the rule, if it is refined at all.
        gather: by loss, an object that collects its pieces.
        split: parts of the motion to allocate to as well.
        following_split: returns the parts of the motion after `end`, or None.
        path: another path from `start` to `end`, whose effect is computed as well.
        following_path: returns such a path for the segment after `end`, or None.

    Returns:
        The allocation of each loss, and the evaluations at `end` for the next segment.

    Raises:
        SpanError: if a loss or a gradient is not finite.
    """
    per_example = method.per_example.intersection(losses)

    def next_way() -> Way | None:
        point = following()
        if point is None:
            return None
        return Way(Motion(end, point), following_split(), following_path())

    own = Way(Motion(start, end), split, path)
    segment = segment_of(own, objective, axes, next_way, per_example)
    return allocate_nodes(
        segment, losses, method, at_start=at_start, at_least=at_least, gather=gather or {}
    )


def allocate_nodes(
    segment: Nodes,
    losses: list[str],
    method: Method,
    *,
    at_start: Mapping[str, Evaluation] | None = None,
    at_least: int = 0,
    gather: Mapping[str, Gathers] = MappingProxyType({}),
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Allocate every loss on a segment from evaluations at its nodes; see `allocate`.

    Args:
        segment: evaluates losses at the nodes.
        losses: names of the losses.
        method: the rule and its tolerances.
        at_start: as for `allocate`.
        at_least: as for `allocate`.
        gather: as for `allocate`.

    Returns:
        As for `allocate`.
    """
    level = method.family.level_of(method.rule)
    if level is None:
        return _allocate_fixed(segment, losses, method, at_start, gather)
    return _allocate_refined(segment, losses, method, at_start, max(at_least, level), gather)


def _allocate_refined(
    segment: Nodes,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
    lowest: int,
    gather: Mapping[str, Gathers],
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    first = at_start or segment.at(0.0, losses)
    segment.know_signal()
    # nodes that every loss needs come before the end, which may also need the next checkpoint
    early = [
        (node, segment.at(node, losses))
        for node in (method.family.fresh_nodes(1) if lowest >= 1 else ())
    ]
    middle = _middle(segment, losses, method, dict(early))
    last, known = segment.at_end(losses, here=True, following=True)
    shifts = segment.shifts(first, last, middle)
    states = {
        name: _Refinement(method.family, segment.points, first[name], last[name], gather.get(name))
        for name in losses
    }
    distance = segment.distance(first[losses[0]].gradient)
    done: dict[str, SegmentAllocation] = {}
    level = 0
    pending = list(losses)
    while True:
        if level >= lowest:
            gathered = {
                name: states[name].measure(level == method.family.finest or _is_final(name, method))
                for name in pending
            }
            # copy all results of the segment to the host at once
            readings = [reading for name in pending for reading in states[name].readings]
            read([*readings, *distance.readings])
            for name in pending:
                done[name] = _judged(name, states[name], method, distance, gathered[name])
            pending = [
                name
                for name in pending
                if not (done[name].converged or name in method.never_refined)
            ]
        if not pending or level == method.family.finest:
            completed = {
                name: replace(
                    _with_path(done[name], shifts.get(name)),
                    examples=states[name].examples(),
                    parts=states[name].parts(),
                )
                for name in losses
            }
            return completed, known
        level += 1
        for name in pending:
            done.pop(name, None)
            states[name].refine()
        nodes: Iterable[tuple[float, dict[str, Evaluation]]] = early if level == 1 else ()
        nodes = nodes or (
            (node, segment.at(node, pending)) for node in method.family.fresh_nodes(level)
        )
        for node, evaluations in nodes:
            for name in pending:
                states[name].take(node, evaluations[name])
        early = []


def _middle(
    segment: Nodes,
    losses: list[str],
    method: Method,
    nodes: Mapping[float, Mapping[str, Evaluation]],
) -> dict[str, dict[str, Numbers]]:
    """Return the sums at the middle of a segment, for comparison with another path, of the losses
    that need them.

    Args:
        segment: the segment; the result is empty if it has no other path.
        losses: names of the losses.
        method: names the replicates, which need none.
        nodes: existing evaluations by node.
    """
    if not segment.bends:
        return {}
    chosen = [name for name in losses if name not in method.never_refined]
    evaluations = nodes[0.5] if 0.5 in nodes else segment.at(0.5, chosen)
    return segment.middle({name: evaluations[name] for name in chosen})


def _with_path(segment: SegmentAllocation, shift: PathShift | None) -> SegmentAllocation:
    """Add the effect of another path, and count its evaluations."""
    if shift is None:
        return segment
    return replace(segment, path=shift, evaluations=segment.evaluations + shift.evaluations)


def _is_final(name: str, method: Method) -> bool:
    """Return whether a loss is never refined."""
    return name in method.never_refined or all(map(math.isinf, method.bounds(name)))


def _judged(
    name: str,
    state: _Refinement,
    method: Method,
    distance: Mapping[str, float],
    gathered: bool,
) -> SegmentAllocation:
    tolerance, allocation_tolerance = method.bounds(name)
    residual = state.residual
    bound = state.error_bound((method.calibration or {}).get(name))
    accurate = math.isinf(allocation_tolerance) or bool(np.all(bound <= allocation_tolerance))
    return _checked(
        SegmentAllocation(
            points=state.points,
            nodes=state.nodes,
            sums=state.measured.totals,
            distance=distance,
            loss_start=state.start.loss,
            loss_end=state.end.loss,
            weight=state.start.weight,
            residual=residual,
            evaluations=len(state.family.rules[state.level].nodes) - 1,
            level=state.level,
            converged=bool(np.all(np.abs(residual) <= tolerance)) and accurate,
            error_bound=bound,
            unreached=state.unreached,
            gathered=gathered,
        ),
        name,
    )


def _allocate_fixed(
    segment: Nodes,
    losses: list[str],
    method: Method,
    at_start: Mapping[str, Evaluation] | None,
    gather: Mapping[str, Gathers],
) -> tuple[dict[str, SegmentAllocation], dict[str, Evaluation]]:
    """Apply a fixed rule; forward passes evaluate the losses at ends that are not nodes."""
    rule = method.rule
    apart = segment.has_paths  # paths need gradients at both ends
    first = at_start or segment.at(0.0, losses, gradient=rule.has_start or apart)
    segment.know_signal()
    nodes = [first if x == 0 else segment.at(x, losses) for x in rule.nodes]
    middle = _middle(segment, losses, method, dict(zip(rule.nodes, nodes, strict=True)))
    last, known = segment.at_end(losses, here=apart, following=rule.has_start or apart)
    shifts = segment.shifts(first, last, middle)
    distance = segment.distance(nodes[0][losses[0]].gradient)
    done = {}
    for name in losses:
        weighted = [
            (weight, node[name].gradient) for weight, node in zip(rule.weights, nodes, strict=True)
        ]
        gathering = gather.get(name)
        computed = tensor_sums(segment.points, weighted, (), first[name], gathering, True)
        read([first[name].totals, last[name].totals, computed.total, *distance.readings])
        sums = computed.totals
        residual = last[name].loss - first[name].loss - sum_of(sums.values())
        allocated = SegmentAllocation(
            points=segment.points,
            nodes=weighted,
            sums=sums,
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
            examples=_fixed_examples(rule, first[name], last[name], [node[name] for node in nodes]),
            parts=_fixed_parts(rule, [node[name] for node in nodes]),
            gathered=gathering is not None,
        )
        done[name] = _with_path(_checked(allocated, name), shifts.get(name))
    return done, known


def _fixed_examples(
    rule: Rule, first: Evaluation, last: Evaluation, nodes: Sequence[Evaluation]
) -> ExampleAllocation | None:
    """Return the allocation of every example by a fixed rule; None if examples are not kept apart."""
    if first.examples is None or last.examples is None:
        return None
    weighted = [
        (weight, node.examples.gradient)
        for weight, node in zip(rule.weights, nodes, strict=True)
        if node.examples is not None
    ]
    return of_every_example(first.examples, last.examples, weighted)


def _fixed_parts(rule: Rule, nodes: Sequence[Evaluation]) -> dict[str, Numbers] | None:
    """Return the allocation of the parts of the motion by a fixed rule; None if there are none."""
    of_nodes = [node.parts for node in nodes if node.parts is not None]
    return _weighted_sum(zip(rule.weights, of_nodes, strict=True)) if of_nodes else None


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
    """Read the next point of a span when it is first needed.

    Attributes:
        failure: the error of the attempt to read it; None if there was none.
    """

    def __init__(self, walk: Iterator[tuple[int, Point]]) -> None:
        self._walk = walk
        self._items: list[tuple[int, Point] | None] = []
        self.failure: Exception | None = None

    def item(self) -> tuple[int, Point] | None:
        """Return its training step and tensors, or None at the end."""
        if not self._items:
            try:
                self._items.append(next(self._walk, None))
            except Exception as error:
                self.failure = error
                raise
        return self._items[0]

    def point(self) -> Point | None:
        """Return its tensors, or None at the end."""
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
    gathering: Callable[[int], Mapping[str, Gathers]] = lambda row: {},
    parts: Callable[[int], Parts] | None = None,
    paths: Callable[[int], SegmentPath] | None = None,
) -> Iterator[dict[str, SegmentAllocation]]:
    """Allocate the segments between consecutive points in turn; each end is evaluated once and
    reused as the next start.

    Args:
        points: training step and tensors of each checkpoint of the span, one more than there are
            segments. A point is read when it is needed, and released afterwards.
        objective: evaluates losses and gradients.
        losses: names of the losses.
        method: the rule and its tolerances.
        axes: axes of units, if only sums over units are computed; see `allocate`.
        at_least: for each segment, the lowest level of the rule, if it is refined at all; 0 once
            this is exhausted.
        begin: called before each segment, when only its ends are in memory.
        gathering: returns the objects that collect pieces of losses on the segment at a position.
        parts: returns the parts of the motion of the segment at a position; None for no parts.
        paths: returns another path between the ends of the segment at a position; None for no
            paths.

    Yields:
        The allocation of every loss on one segment.

    Raises:
        SpanError: if a loss or a gradient is not finite; the message names the segment.
    """
    walk, lowest = iter(points), itertools.chain(at_least, itertools.repeat(0))
    (step, start), upcoming = next(walk), next(walk, None)
    known: Mapping[str, Evaluation] | None = None
    split = _split(parts, 0)
    for row in itertools.count():
        if upcoming is None:
            return
        (next_step, end), ahead = upcoming, _Ahead(walk)
        next_split = functools.cache(functools.partial(_split, parts, row + 1))
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
                gather=gathering(row),
                split=split,
                following_split=next_split,
                path=_path(paths, row),
                following_path=functools.partial(_path, paths, row + 1),
            )
        except SpanError as error:
            if error is ahead.failure:
                raise
            raise SpanError(between(error, step, next_step)) from None
        step, start = next_step, end
        yield done
        del done  # releases gradients that the next segment does not need
        split = None  # releases the signal at its start
        upcoming = ahead.item()
        split = None if upcoming is None else next_split()


def between(error: SpanError, step: int, next_step: int) -> str:
    """Return the message of an error with the training steps of its segment.

    Args:
        error: the error.
        step: step at the start of the segment.
        next_step: step at its end.
    """
    return f"{error}, between steps {step} and {next_step}. Leave these steps out with --steps."


def _split(parts: Callable[[int], Parts] | None, row: int) -> Split | None:
    """Return the parts of the motion of the segment at a position, if requested."""
    return None if parts is None else Split(parts(row))


def _path(paths: Callable[[int], SegmentPath] | None, row: int) -> SegmentPath | None:
    """Return another path of the segment at a position, if requested."""
    return None if paths is None else paths(row)
