"""A span whose data is cut into shards: the sums over shards that are known at nodes, and the
allocation that follows from them.

A loss is a mean over all elements, and so is the sum of its gradient along a motion: both follow
from sums over shards of the data, which are added in the order of the shards, in float64. Bits
depend on the number of shards, and on nothing else of how the work was spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import SpanError
from .allocation import Method, SegmentAllocation, allocate_nodes, between
from .long_segments import lengths_around
from .nodes import Direction, Line, Node, ends_of
from .objective import Distances, Evaluation, Motion, Numbers, PartialSums, joined
from .path import OtherPaths, PathShift, summed_along
from .segments import unit_motion


class Wanted(Exception):
    """Sums of shards are wanted before a segment can be allocated.

    Attributes:
        nodes: at which.
        losses: of which losses.
        distance: the segment of which Σ|θ′ − θ| is wanted too; None where it is known.
    """

    def __init__(self, nodes: list[Node], losses: list[str], distance: int | None = None) -> None:
        super().__init__(f"sums of {losses} at {nodes}")
        self.nodes, self.losses, self.distance = nodes, losses, distance


class ShardedSpan:
    """The sums of shards that are known of one span, and its segments allocated from them.

    Args:
        starts: the segments of the span, by the positions of the checkpoints they start from.
        steps: the training step of each of its checkpoints, by their position.
        shards: of each loss, the number of its shards.
        units: of each tensor that takes part in the allocation, the number of its units.
        method: the rule and its tolerances.
        lengths: training steps from each checkpoint to the next, None where no segment follows it,
            where other paths are told; None where they are not.
    """

    def __init__(
        self,
        starts: Sequence[int],
        steps: Mapping[int, int],
        shards: Mapping[str, int],
        units: Mapping[str, int],
        method: Method,
        lengths: Sequence[int | None] | None,
    ) -> None:
        self.starts, self.shards, self.units, self.method = (
            starts,
            dict(shards),
            dict(units),
            method,
        )
        self._steps, self._lengths = steps, lengths
        self._not_finite: set[int] = set()
        self._sums: dict[tuple[str, Node], dict[int, PartialSums]] = {}
        self._means: dict[tuple[str, Node], Evaluation] = {}
        self._distances: dict[int, Mapping[str, float]] = {}

    # --- what is known

    def take(self, loss: str, node: Node, shard: int, sums: PartialSums) -> None:
        """Take in the sums of a loss over one shard at a node."""
        self._sums.setdefault((loss, node), {})[shard] = sums

    def take_distance(self, start: int, distance: Mapping[str, float]) -> None:
        """Take in Σ|θ′ − θ| of each tensor on a segment."""
        self._distances[start] = distance

    def take_not_finite(self, checkpoint: int) -> None:
        """Take in that a checkpoint beside the span holds a number that is not finite."""
        self._not_finite.add(checkpoint)

    def missing(self, loss: str, node: Node) -> list[int]:
        """Return the shards of a loss of which no sums are known at a node."""
        known = self._sums.get((loss, node), {})
        return [shard for shard in range(self.shards[loss]) if shard not in known]

    def has_distance(self, start: int) -> bool:
        """Tell whether Σ|θ′ − θ| is known of a segment."""
        return start in self._distances

    def counts(self, loss: str) -> tuple[int, int]:
        """Return how often a loss was evaluated over all of its data with a gradient, and
        without.
        """
        whole = [node for name, node in self._sums if name == loss and not self.missing(loss, node)]
        with_gradient = sum(bool(node.along) for node in whole)
        return with_gradient, len(whole) - with_gradient

    # --- allocation

    def allocate(self, start: int, losses: list[str]) -> dict[str, SegmentAllocation]:
        """Allocate losses on one segment.

        Raises:
            Wanted: where sums are missing.
            SpanError: where a loss or a gradient is not finite.
        """
        segment = _Segment(self, start)
        step, next_step = (self._steps[end] for end in ends_of(start))
        segment.expect(losses)
        try:
            return allocate_nodes(segment, losses, self.method)[0]
        except SpanError as error:
            raise SpanError(between(error, step, next_step)) from None

    def paths(self, start: int) -> OtherPaths | None:
        """Return the other paths of a segment; None where none are told.

        A neighbour beside the span counts as finite until a worker that read it says otherwise.
        """
        if self._lengths is None:
            return None
        around = lengths_around(start, self._lengths)
        return OtherPaths(start, around, lambda index: index not in self._not_finite)

    def at_checkpoint(self, checkpoint: int) -> Node:
        """Return the node at a checkpoint, where the sums along the motions of both segments that
        meet there are taken at once, and those along what is beside them.
        """
        along = [
            direction
            for start in self.starts
            if checkpoint in ends_of(start)
            for direction in self._directions(start, ends_of(start).index(checkpoint))
        ]
        return Node(Line(checkpoint, 0), 0.0, tuple(along))

    def _directions(self, start: int, end: int) -> list[Direction]:
        """Return the directions of a segment at its start (0) or at its end (1): its motion where the
        rule takes it, or other paths are told, and what is beside it.
        """
        rule, paths = self.method.rule, self.paths(start)
        if paths is not None:
            return [Line(start), *paths.directions(end)]
        return [Line(start)] if (rule.has_start, rule.has_end)[end] else []

    def evaluation(self, loss: str, node: Node) -> Evaluation:
        """Return a loss over all of its data at a node whose sums are known."""
        key = (loss, node)
        if key not in self._means:
            known = self._sums[key]
            shapes = {name: (len(node.along), units) for name, units in self.units.items()}
            parts = [known[shard] for shard in range(self.shards[loss])]
            shapes = shapes if node.along else {}
            self._means[key] = joined(parts, shapes, f"loss {loss!r}")
        return self._means[key]

    def distance(self, start: int) -> Mapping[str, float]:
        """Return Σ|θ′ − θ| of each tensor on a segment."""
        return self._distances[start]

    @cached_property
    def unit_motion(self) -> Motion:
        """Ends that are 1 apart, by which sums along a motion are multiplied."""
        like: dict[str, Tensor] = {name: torch.empty(0, device="cpu") for name in self.units}
        return unit_motion(like, self.units)


class _Segment:
    """One segment of a sharded span, as `Nodes`.

    Args:
        span: knows the sums.
        start: of the segment.
    """

    def __init__(self, span: ShardedSpan, start: int) -> None:
        self._span, self._paths = span, span.paths(start)
        self._start, self._end = ends_of(start)

    @property
    def points(self) -> Motion:
        """See `Nodes.points`."""
        return self._span.unit_motion

    def distance(self, names: Iterable[str]) -> Distances:
        """See `Nodes.distance`."""
        known = self._span.distance(self._start)
        return Distances.known({name: known[name] for name in names})

    def expect(self, losses: list[str]) -> None:
        """Ask for all that the rule and other paths need in any case.

        Raises:
            Wanted: where it is not known.
        """
        method = self._span.method
        level = method.family.level_of(method.rule)
        inner = (
            [x for x in method.rule.nodes if 0 < x < 1]
            if level is None
            else [x for finer in range(1, level + 1) for x in method.family.fresh_nodes(finer)]
        )
        if self.bends and 0.5 not in inner:
            inner.append(0.5)
        ends = [self._span.at_checkpoint(end) for end in (self._start, self._end)]
        of_paths = [] if self._paths is None else self._paths.nodes
        missing = self._missing([ends[0], *map(self._inside, inner), ends[1], *of_paths], losses)
        distance = None if self._span.has_distance(self._start) else self._start
        if missing or distance is not None:
            raise Wanted(missing, losses, distance)

    def at(self, x: float, losses: list[str], *, gradient: bool = True) -> dict[str, Evaluation]:
        """See `Nodes.at`; where sums at a fresh node of a level are missing, those at all of them
        are asked for.
        """
        if x == 0:
            return self._at_checkpoint(self._start, losses, gradient=gradient)
        assert gradient, "inside a segment gradients are wanted, never losses alone"
        node = self._inside(x)
        if self._missing([node], losses):
            of_level = [self._inside(other) for other in self._level_of(x)]
            raise Wanted(self._missing(of_level, losses), losses)
        return {loss: self._span.evaluation(loss, node).along(0) for loss in losses}

    def know_signal(self) -> None:
        """See `Nodes.know_signal`: no motion of a sharded span has parts."""

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """See `Nodes.at_end`; the segment that follows looks up what it needs itself."""
        return self._at_checkpoint(self._end, losses, gradient=here), {}

    @property
    def has_paths(self) -> bool:
        """See `Nodes.has_paths`."""
        return self._paths is not None

    @property
    def bends(self) -> bool:
        """See `Nodes.bends`."""
        return self._paths is not None and self._paths.is_known

    def middle(self, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Numbers]]:
        """See `Nodes.middle`."""
        return {
            name: {tensor: sums.sum(-1).numpy()[()] for tensor, sums in evaluation.gradient.items()}
            for name, evaluation in evaluations.items()
        }

    def shifts(
        self,
        first: Mapping[str, Evaluation],
        last: Mapping[str, Evaluation],
        middle: Mapping[str, Mapping[str, Numbers]],
    ) -> dict[str, PathShift]:
        """See `Nodes.shifts`."""
        if self._paths is None:
            return {}
        return {
            name: self._paths.shift(
                (first[name], last[name]),
                on_line,
                [summed_along(self._span.evaluation(name, node)) for node in self._paths.nodes],
            )
            for name, on_line in middle.items()
        }

    def _inside(self, x: float) -> Node:
        line = Line(self._start)
        return Node(line, x, (line,))

    def _level_of(self, x: float) -> Sequence[float]:
        """Return the fresh nodes of the level at which a node is fresh."""
        family = self._span.method.family
        levels = (family.fresh_nodes(level) for level in range(1, family.finest + 1))
        return next(nodes for nodes in levels if x in nodes)

    def _at_checkpoint(
        self, checkpoint: int, losses: list[str], *, gradient: bool
    ) -> dict[str, Evaluation]:
        node = self._span.at_checkpoint(checkpoint)
        evaluations = {loss: self._span.evaluation(loss, node) for loss in losses}
        if not gradient:
            return evaluations
        position, end = node.along.index(Line(self._start)), checkpoint - self._start
        beside = 0 if self._paths is None else len(self._paths.directions(end))
        return {
            loss: evaluation.along(position, beside=beside)
            for loss, evaluation in evaluations.items()
        }

    def _missing(self, nodes: Sequence[Node], losses: list[str]) -> list[Node]:
        """Return the nodes at which sums are missing."""
        return [node for node in nodes if any(self._span.missing(loss, node) for loss in losses)]
