r"""The mathematics: allocate the loss change of one segment, and of the segments of a span in turn.

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
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import SpanError
from .objective import Evaluation, Motion, Numbers, blocks
from .parts import Computed, Parts, Point, Split
from .path import PathShift, SegmentPath
from .quadrature import COMPOSITE, Family, Rule
from .segments import Axes, Evaluates, Nodes, Way, segment_of, unit_motion

Gradient = dict[str, Tensor]
Node = tuple[float, Gradient]  # a weight, and the gradient there


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
        per_example: losses whose examples are told apart.
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
        """Return the tolerance and the tolerance of the allocation of a loss, in units of loss."""
        residual, allocation = (
            bound.get(loss, math.inf) if isinstance(bound, Mapping) else bound
            for bound in (self.tolerance, self.allocation_tolerance)
        )
        return residual, allocation


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of one tensor on a segment, float64, small enough to stay in the cache; the next one
    overwrites it, and so may who takes it.

    Attributes:
        rows: which groups it has.
        columns: which parameters, of all in a row.
        motion: θ′ − θ, (parameters,).
        gradient: the weighted mean of the gradients at the nodes, (groups, parameters).
        allocation: their product.
        change: the product with what the last refining changed of the gradient; None where that is
            not asked for.
    """

    rows: slice
    columns: slice
    motion: Tensor
    gradient: Tensor
    allocation: Tensor
    change: Tensor | None


class Gathers(Protocol):
    """Gathers what is kept of every parameter on one segment, from the pieces from which sums are
    computed: one pass over a tensor serves both.
    """

    def cuts(self, name: str) -> Sequence[slice] | None:
        """Return the pieces in which a tensor is summed; None where that is all the same."""

    def take(self, name: str, weight: Numbers, pieces: Iterable[Piece]) -> None:
        """Take in one tensor.

        Args:
            name: of the tensor.
            weight: the sum of the elements' weights at the start, of each group.
            pieces: of the tensor, all of each group before the next; numbers that are not finite
                are refused later.
        """


@dataclass(frozen=True, kw_only=True)
class ExampleAllocation:
    """The loss change of every example on one segment, float64, of shape (examples,); 0 of those
    without weight.

    Attributes:
        sums: what each tensor contributes to it, in units of loss.
        uses: the same by use, (examples, uses), of tensors of which uses are told apart.
        loss_start: at the first checkpoint.
        loss_end: at the next one.
        weight: the sum of the weights of an example's elements.
        residual: the change of the loss less the sum over tensors.
    """

    sums: Mapping[str, Numbers]
    uses: Mapping[str, Numbers]
    loss_start: Numbers
    loss_end: Numbers
    weight: Numbers
    residual: Numbers


@dataclass(frozen=True, kw_only=True)
class SegmentAllocation:
    """The allocation of one loss on one segment; numbers and tensors per group where it has groups.

    Of every parameter there are the points and the gradients at the nodes alone. Motion, mean
    gradient and allocation are computed from them whenever they are asked for, float64, with the
    same bits each time.

    Where sums are taken, a tensor stands for its units: the allocation of a unit is the sum over
    its parameters, the gradient is that along the motion, and the motion is 1.

    Attributes:
        points: both ends of the segment, or ends that are 1 apart where sums are taken.
        nodes: the gradients at the nodes, each with its weight.
        sums: what each tensor is allocated, in units of loss.
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
        examples: the same of every example, by tensor; None where they are not told apart.
        parts: what the parts of each tensor's motion are allocated, ([groups, ]parts) float64,
            before their factors; None where there are none.
        path: by how much another path changes it; None where none is asked for, or known.
        gathered: whether its pieces were taken in as the sums were computed, see `Gathers`.
    """

    points: Motion
    nodes: Sequence[Node]
    sums: Mapping[str, Numbers]
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
    examples: ExampleAllocation | None = None
    parts: Mapping[str, Numbers] | None = None
    path: PathShift | None = None
    gathered: bool = False

    def pieces(
        self,
        name: str,
        columns: Sequence[slice] | None = None,
        scratch: Scratch | None = None,
    ) -> Iterator[Piece]:
        """Yield one tensor piece by piece: all of each group before the next.

        Args:
            name: of the tensor.
            columns: where groups are cut that do not stay in the cache; anywhere by default.
            scratch: memory for the pieces; new memory by default.
        """
        return _pieces(self.points, self.nodes, name, columns, scratch)

    @property
    def motion(self) -> Mapping[str, Tensor]:
        """Return θ′ − θ of each tensor."""
        start, end = self.points.start, self.points.end
        return Computed(self.sums, lambda name: end[name].double() - start[name].double())

    @property
    def mean_gradient(self) -> Mapping[str, Tensor]:
        """Return the weighted mean of the gradients at the nodes, of each tensor."""
        return Computed(self.sums, lambda name: self._whole(name, "gradient"))

    @property
    def allocation(self) -> Mapping[str, Tensor]:
        """Return what each tensor's parameters are allocated, in units of loss."""
        return Computed(self.sums, lambda name: self._whole(name, "allocation"))

    def _whole(self, name: str, what: str) -> Tensor:
        like = self.nodes[0][1][name]
        whole = torch.empty(like.shape, dtype=torch.float64, device=like.device)
        rows = whole.reshape(-1, max(1, self.points.start[name].numel()))
        for piece in self.pieces(name):
            rows[piece.rows, piece.columns] = getattr(piece, what)
        return whole


def _unit_motion_by_use(gradient: Gradient) -> Motion:
    """Return the same for derivatives of examples, (examples, uses)."""
    return unit_motion(gradient, {name: of.shape[-1] for name, of in gradient.items()})


def _of_every_example(
    start: Evaluation, end: Evaluation, points: Motion, nodes: Sequence[Node]
) -> ExampleAllocation:
    """Return the allocation of every example from derivatives along the motion at nodes."""
    added = _sums(points, nodes, (), start.weight, None, False)
    sums = {name: of_tensor.total for name, of_tensor in added.items()}
    total = np.zeros_like(start.loss)
    for contribution in sums.values():
        total = total + contribution
    several = [name for name, motion in points.end.items() if len(motion) > 1]
    uses = _weighted_sum(nodes, several)
    return ExampleAllocation(
        sums=sums,
        uses=uses,
        loss_start=start.loss,
        loss_end=end.loss,
        weight=start.weight,
        residual=end.loss - start.loss - total,
    )


def sum_of(numbers: Iterable[Numbers]) -> Numbers:
    """Return the exact sum of a few numbers, of each group; 0 of none."""
    parts = list(numbers)
    if not parts:
        return np.float64(0.0)
    return np.asarray(
        [math.fsum(column) for column in np.stack(parts, -1).reshape(-1, len(parts))]
    ).reshape(np.shape(parts[0]))[()]


def _pieces(
    points: Motion,
    nodes: Sequence[Node],
    name: str,
    columns: Sequence[slice] | None = None,
    scratch: Scratch | None = None,
    change: Sequence[float] = (),
) -> Iterator[Piece]:
    """Yield a tensor's motion, mean gradient and allocation, see `SegmentAllocation.pieces`.

    Args:
        points: both ends of the segment.
        nodes: the gradients at the nodes, each with its weight.
        name: of the tensor.
        columns: where groups are cut.
        scratch: memory for the pieces; new memory by default.
        change: factors of the gradients in what the last refining changed of their mean; none by
            default.
    """
    start, end = points.start[name].reshape(-1), points.end[name].reshape(-1)
    shape = (math.prod(_groups(points, nodes, name)), start.numel())
    gradients = [gradient[name].reshape(shape) for _, gradient in nodes]
    factors = [[weight for weight, _ in nodes], *([change] if change else [])]
    scratch = Scratch(start.device) if scratch is None else scratch
    for row, column in blocks(*shape, columns):
        motion = scratch.room("motion", end[column].shape).copy_(end[column])
        motion.sub_(_exact(start[column], scratch))
        values = [gradient[row, column] for gradient in gradients]
        mean, *changed = _combinations(values, factors, scratch)
        product = torch.mul(mean, motion, out=scratch.room("product", mean.shape))
        yield Piece(
            rows=row,
            columns=column,
            motion=motion,
            gradient=mean,
            allocation=product,
            change=changed[0].mul_(motion) if changed else None,
        )


def _exact(values: Tensor, scratch: Scratch) -> Tensor:
    """Return numbers in float64."""
    if values.dtype == torch.float64:
        return values
    return scratch.room("exact", values.shape).copy_(values)


def _combinations(
    values: Sequence[Tensor], factors: Sequence[Sequence[float]], scratch: Scratch
) -> list[Tensor]:
    """Return Σ factor · values, float64, for some lists of factors.

    Those that are first and have one factor, the ends of a segment, are added before they are
    multiplied: opposite ones are then 0 together, and which comes first changes no bit.
    """
    alike = [
        len(list(itertools.takewhile(functools.partial(operator.eq, listed[0]), listed)))
        for listed in factors
    ]
    shared = min(alike)
    totals = [
        scratch.room(f"combination {number}", values[0].shape) for number in range(len(factors))
    ]
    totals[0].copy_(values[0])
    for following in values[1:shared]:
        totals[0].add_(_exact(following, scratch))
    for total, count, listed in reversed(list(zip(totals, alike, factors, strict=True))):
        torch.mul(totals[0], listed[0] if count == shared else 1.0, out=total)
    for position in range(shared, len(values)):
        exact = _exact(values[position], scratch)
        for total, count, listed in zip(totals, alike, factors, strict=True):
            total.add_(exact, alpha=listed[position] if position >= count else 1.0)
            if position == count - 1:
                total.mul_(listed[0])
    return totals


def _groups(points: Motion, nodes: Sequence[Node], name: str) -> tuple[int, ...]:
    """Return the shape of what a tensor has one number of for each group: () without groups."""
    like = nodes[0][1][name]
    return tuple(like.shape[: like.dim() - points.start[name].dim()])


class Scratch:
    """Memory that is used over and over: fresh memory costs more than what is computed in it.

    Args:
        device: where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rooms: dict[str, dict[tuple[int, ...], Tensor]] = {}
        self._flat: dict[str, Tensor] = {}

    def room(self, use: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return room for some numbers, which overwrite those of the same use before.

        Args:
            use: names them; those of one use have one type.
            shape: of the numbers.
            dtype: their type.
        """
        rooms = self._rooms.setdefault(use, {})
        if shape not in rooms:
            size, flat = math.prod(shape), self._flat.get(use)
            if flat is None or flat.numel() < size:
                flat = self._flat[use] = torch.empty(size, dtype=dtype, device=self._device)
                rooms.clear()
            rooms[shape] = flat[:size].view(shape)
        return rooms[shape]


class _Sums:
    """Adds up the allocation of one tensor, of each group, and |·| of what the last refining
    changed, where that is asked for.
    """

    def __init__(self, points: Motion, nodes: Sequence[Node], name: str) -> None:
        self._groups = _groups(points, nodes, name)
        rows, device = math.prod(self._groups), points.start[name].device
        self._total, self._changed = torch.zeros((2, rows), dtype=torch.float64, device=device)

    def added(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces of the tensor as they are added up."""
        for piece in pieces:
            self._total[piece.rows] += piece.allocation.sum(1)
            if piece.change is not None:
                self._changed[piece.rows] += piece.change.abs_().sum(1)
            yield piece

    @property
    def total(self) -> Numbers:
        """Return the sum of what was added."""
        return self._numbers(self._total)

    @property
    def changed(self) -> Numbers:
        """Return Σ|·| of what the last refining changed."""
        return self._numbers(self._changed)

    def _numbers(self, sums: Tensor) -> Numbers:
        numbers: Numbers = sums.reshape(self._groups).cpu().numpy()[()]
        return numbers


def _sums(
    points: Motion,
    nodes: Sequence[Node],
    change: Sequence[float],
    weight: Numbers,
    gather: Gathers | None,
    final: bool,
) -> dict[str, _Sums]:
    """Return the sums of every tensor of a segment.

    Args:
        points: both ends.
        nodes: the gradients at the nodes, each with its weight.
        change: see `_pieces`.
        weight: the sum of the elements' weights at the start.
        gather: takes in the pieces where they are final, and says where tensors are cut.
        final: whether they are.
    """
    sums = {}
    scratch = Scratch(next(iter(nodes[0][1].values())).device)
    for name in nodes[0][1]:
        sums[name] = _Sums(points, nodes, name)
        cuts = None if gather is None else gather.cuts(name)
        pieces = sums[name].added(_pieces(points, nodes, name, cuts, scratch, change))
        if final and gather is not None:
            gather.take(name, weight, pieces)
        for _ in pieces:  # what was not taken
            pass
    return sums


@dataclass
class _NodeSum:
    """The sum of the gradients at nodes that weigh alike; `node` is one of them."""

    node: float
    gradient: Gradient
    _is_own: bool = False

    def add(self, gradient: Gradient) -> None:
        """Add another one; sums are float64, a gradient alone is as it came."""
        self.gradient = {
            name: (values if self._is_own else values.to(torch.float64, copy=True)).add_(
                gradient[name]
            )
            for name, values in self.gradient.items()
        }
        self._is_own = True


class _Refinement:
    """One loss on one segment while its rule is refined.

    Nodes that weigh alike at all levels from the last one on are one sum of gradients: with the
    composite family the ends, the fresh nodes, those of the level before and the older inner ones.
    So sums carry every level and the one before it, and no old node is evaluated again.
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
        self.sums: Mapping[str, Numbers] = {}
        self.residual: Numbers = np.float64(math.nan)
        self._change: Numbers = np.float64(math.nan)
        # refined alike
        self._examples: _Refinement | None = None
        if start.examples is not None and end.examples is not None:
            unit_motion = _unit_motion_by_use(start.examples.gradient)
            self._examples = _Refinement(family, unit_motion, start.examples, end.examples)
        self._parts: _Refinement | None = None
        if start.parts is not None and end.parts is not None:
            self._parts = _Refinement(family, points, _of_parts(start), _of_parts(end))

    def refine(self) -> None:
        """Go on to the next level, whose fresh nodes are taken in next."""
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
        """Take in the gradient at a fresh node."""
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
        """The gradients at this level, each with its weight."""
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
        """Return what the last refining changed of the mean gradient, as factors of the gradients
        at nodes; at level 0 the difference of both ends.
        """
        if self.level == 0:
            return [-1.0, 1.0]
        before = self._weighted(self.level - 1, self._older)
        return [
            weight - (before[position][0] if position < len(before) else 0.0)
            for position, (weight, _) in enumerate(self.nodes)
        ]

    def measure(self, final: bool = False) -> bool:
        """Compute what tensors are allocated at this level, the residual, and Σ|·| of what the last
        refining changed.

        Args:
            final: whether the level is the last one in any case.

        Returns:
            Whether the pieces were gathered.
        """
        sums = _sums(
            self.points, self.nodes, self._changes(), self.start.weight, self._gather, final
        )
        self.sums = {name: of_tensor.total for name, of_tensor in sums.items()}
        self.residual = self.end.loss - self.start.loss - sum_of(self.sums.values())
        self._change = sum_of(of_tensor.changed for of_tensor in sums.values())
        return final and self._gather is not None

    def examples(self) -> ExampleAllocation | None:
        """Return the allocation of every example at this level; None where none is told apart."""
        if self._examples is None:
            return None
        return _of_every_example(
            self._examples.start, self._examples.end, self._examples.points, self._examples.nodes
        )

    def parts(self) -> Mapping[str, Numbers] | None:
        """Return what the parts of the motion are allocated at this level; None where there are
        none.
        """
        if self._parts is None:
            return None
        return _weighted_sum(self._parts.nodes, self._parts.start.gradient)

    def error_bound(self, calibration: float | None) -> Numbers:
        """Estimate Σ|A − A*|: what the last refining changed; at level 0 a calibrated share of
        Σ|(g₁ − g₀)·Δθ|.
        """
        if self.level:
            return self._change
        return self._change * (math.nan if calibration is None else calibration)


def _of_parts(evaluation: Evaluation) -> Evaluation:
    """Return the sums along parts of the motion in the place of the gradient."""
    return Evaluation(evaluation.loss, dict(evaluation.parts or {}), evaluation.weight)


def _weighted_sum(nodes: Sequence[Node], names: Iterable[str]) -> dict[str, Numbers]:
    """Return Σ weight · numbers of some tensors, float64."""
    total: dict[str, Numbers] = {}
    for name in names:
        products = (weight * of_tensors[name].cpu().numpy() for weight, of_tensors in nodes)
        total[name] = functools.reduce(operator.add, products)
    return total


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
        gather: takes in the pieces of a loss, where it has an entry.
        split: the parts of the motion, for what they are allocated as well.
        following_split: returns those of the motion after `end`, where there is one.
        path: another one from `start` to `end`, for what it changes as well.
        following_path: returns that of the segment after `end`, where there is one.

    Returns:
        The allocation of each loss, and the evaluations at `end` for the segment that follows.

    Raises:
        SpanError: where a loss or a gradient is not finite.
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
    """Allocate every loss on a segment by its evaluations at nodes, see `allocate`."""
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
    # those every loss will need, before the end, which may need the checkpoint after it as well
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
            for name in pending:
                done[name] = _judged(name, states[name], method, distance)
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
    """Return the sums in the middle of a segment, with which those of another path are compared, of
    the losses that want them.

    Args:
        segment: of which none are wanted where no other path is known.
        losses: names.
        method: says which are replicates, which want none.
        nodes: evaluations that are there already.
    """
    if not segment.bends:
        return {}
    chosen = [name for name in losses if name not in method.never_refined]
    evaluations = nodes[0.5] if 0.5 in nodes else segment.at(0.5, chosen)
    return segment.middle({name: evaluations[name] for name in chosen})


def _with_path(segment: SegmentAllocation, shift: PathShift | None) -> SegmentAllocation:
    """Return the same with what another path changes, and its evaluations counted."""
    if shift is None:
        return segment
    return replace(segment, path=shift, evaluations=segment.evaluations + shift.evaluations)


def _judged(
    name: str, state: _Refinement, method: Method, distance: Mapping[str, float]
) -> SegmentAllocation:
    tolerance, allocation_tolerance = method.bounds(name)
    gathered = state.measure(
        state.level == method.family.finest
        or name in method.never_refined
        or (math.isinf(tolerance) and math.isinf(allocation_tolerance))
    )
    bound = state.error_bound((method.calibration or {}).get(name))
    accurate = math.isinf(allocation_tolerance) or bool(np.all(bound <= allocation_tolerance))
    return _checked(
        SegmentAllocation(
            points=state.points,
            nodes=state.nodes,
            sums=state.sums,
            distance=distance,
            loss_start=state.start.loss,
            loss_end=state.end.loss,
            weight=state.start.weight,
            residual=state.residual,
            evaluations=len(state.family.rules[state.level].nodes) - 1,
            level=state.level,
            converged=bool(np.all(np.abs(state.residual) <= tolerance)) and accurate,
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
    """Use a rule as it stands; end losses that no node gives come from forward passes."""
    rule = method.rule
    apart = segment.has_paths  # which take gradients at both ends
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
        weight, gathering = first[name].weight, gather.get(name)
        sums = {
            tensor: of_tensor.total
            for tensor, of_tensor in _sums(
                segment.points, weighted, (), weight, gathering, True
            ).items()
        }
        residual = last[name].loss - first[name].loss - sum_of(sums.values())
        allocated = SegmentAllocation(
            points=segment.points,
            nodes=weighted,
            sums=sums,
            distance=distance,
            loss_start=first[name].loss,
            loss_end=last[name].loss,
            weight=weight,
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
    """Return the allocation of every example by a rule as it stands; None where none is told
    apart.
    """
    if first.examples is None or last.examples is None:
        return None
    weighted = [
        (weight, node.examples.gradient)
        for weight, node in zip(rule.weights, nodes, strict=True)
        if node.examples is not None
    ]
    points = _unit_motion_by_use(weighted[0][1])
    return _of_every_example(first.examples, last.examples, points, weighted)


def _fixed_parts(rule: Rule, nodes: Sequence[Evaluation]) -> dict[str, Numbers] | None:
    """Return what the parts of the motion are allocated by a rule as it stands; None where there
    are none.
    """
    of_nodes = [dict(node.parts) for node in nodes if node.parts is not None]
    if not of_nodes:
        return None
    return _weighted_sum(list(zip(rule.weights, of_nodes, strict=True)), of_nodes[0])


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
    gathering: Callable[[int], Mapping[str, Gathers]] = lambda row: {},
    parts: Callable[[int], Parts] | None = None,
    paths: Callable[[int], SegmentPath] | None = None,
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
        gathering: returns what takes in the pieces of losses on the segment at a position.
        parts: returns the parts of the motion of the segment at a position; None where none are
            wanted.
        paths: returns another path between the ends of the segment at a position; None likewise.

    Yields:
        The allocation of every loss on one segment.

    Raises:
        SpanError: where a loss or a gradient is not finite, naming the segment.
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
            raise between(error, step, next_step) from None
        step, start = next_step, end
        yield done
        del done  # gradients at nodes that the next segment has no use for
        split = None  # the signal where it began
        upcoming = ahead.item()
        split = None if upcoming is None else next_split()


def between(error: SpanError, step: int, next_step: int) -> SpanError:
    """Return an error of a segment that says between which training steps it is."""
    return SpanError(
        f"{error}, between steps {step} and {next_step}. Leave these steps out with --steps."
    )


def _split(parts: Callable[[int], Parts] | None, row: int) -> Split | None:
    """Return the parts of the motion of the segment at a position, where they are wanted."""
    return None if parts is None else Split(parts(row))


def _path(paths: Callable[[int], SegmentPath] | None, row: int) -> SegmentPath | None:
    """Return another path of the segment at a position, where one is wanted."""
    return None if paths is None else paths(row)
