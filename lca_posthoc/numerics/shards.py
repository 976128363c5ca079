"""Allocate a span whose data is cut into shards, from the sums over shards at its nodes.

A loss is a mean over all elements, and so is the sum of its gradient along a motion. Both follow
from sums over shards of the data, added in the order of the shards in float64. The bits depend on
the number of shards, and not on how the work was distributed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import SpanError
from .allocation import Method, allocate_nodes, between
from .long_segments import lengths_around
from .nodes import Direction, Line, Node, ends_of
from .objective import Distances, Evaluation, Motion, Numbers, PartialSums, joined
from .path import OtherPaths, PathShift, summed_along
from .segment_allocation import SegmentAllocation
from .segments import unit_motion


class Wanted(Exception):
    """Request sums of shards that are needed before a segment can be allocated.

    Attributes:
        nodes: nodes where sums are needed.
        losses: losses whose sums are needed.
        distance: segment whose Σ|θ′ − θ| is needed too; None if it is known.
    """

    def __init__(self, nodes: list[Node], losses: list[str], distance: int | None = None) -> None:
        super().__init__(f"sums of {losses} at {nodes}")
        self.nodes, self.losses, self.distance = nodes, losses, distance


class ShardedSpan:
    """Collect the sums of shards of one span, and allocate its segments from them.

    Args:
        starts: segments of the span, by the positions of the checkpoints where they start.
        steps: position → training step of each checkpoint of the span.
        shards: loss → number of its shards.
        units: tensor → number of its units, for tensors that take part in the allocation.
        method: the rule and its tolerances.
        lengths: training steps from each checkpoint to the next, None if no segment follows; None
            as a whole if other paths are not computed.
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
        """Add the sums of a loss over one shard at a node.

        Args:
            loss: name of the loss.
            node: the node.
            shard: index of the shard.
            sums: sums over the shard.
        """
        self._sums.setdefault((loss, node), {})[shard] = sums

    def take_distance(self, start: int, distance: Mapping[str, float]) -> None:
        """Add Σ|θ′ − θ| of each tensor on a segment.

        Args:
            start: position of the checkpoint where the segment starts.
            distance: Σ|θ′ − θ| by tensor.
        """
        self._distances[start] = distance

    def take_not_finite(self, checkpoint: int) -> None:
        """Note that a checkpoint next to the span holds a number that is not finite."""
        self._not_finite.add(checkpoint)

    def missing(self, loss: str, node: Node) -> list[int]:
        """Return the shards of a loss whose sums at a node are not known.

        Args:
            loss: name of the loss.
            node: the node.
        """
        known = self._sums.get((loss, node), {})
        return [shard for shard in range(self.shards[loss]) if shard not in known]

    def has_distance(self, start: int) -> bool:
        """Return whether Σ|θ′ − θ| of a segment is known."""
        return start in self._distances

    def counts(self, loss: str) -> tuple[int, int]:
        """Return how often a loss was evaluated over all of its data, with a gradient and without."""
        whole = [node for name, node in self._sums if name == loss and not self.missing(loss, node)]
        with_gradient = sum(bool(node.along) for node in whole)
        return with_gradient, len(whole) - with_gradient

    # --- allocation

    def allocate(self, start: int, losses: list[str]) -> dict[str, SegmentAllocation]:
        """Allocate losses on one segment.

        Args:
            start: position of the checkpoint where the segment starts.
            losses: names of the losses.

        Raises:
            Wanted: if sums are missing.
            SpanError: if a loss or a gradient is not finite.
        """
        segment = _Segment(self, start)
        step, next_step = (self._steps[end] for end in ends_of(start))
        segment.expect(losses)
        try:
            return allocate_nodes(segment, losses, self.method)[0]
        except SpanError as error:
            raise SpanError(between(error, step, next_step)) from None

    def paths(self, start: int) -> OtherPaths | None:
        """Return the other paths of a segment; None if they are not computed.

        A neighbour outside the span counts as finite until a worker that read it reports otherwise.
        """
        if self._lengths is None:
            return None
        around = lengths_around(start, self._lengths)
        return OtherPaths(start, around, lambda index: index not in self._not_finite)

    def at_checkpoint(self, checkpoint: int) -> Node:
        """Return the node at a checkpoint, which combines the directions of both segments that meet
        there.
        """
        along = [
            direction
            for start in self.starts
            if checkpoint in ends_of(start)
            for direction in self._directions(start, ends_of(start).index(checkpoint))
        ]
        return Node(Line(checkpoint, 0), 0.0, tuple(along))

    def _directions(self, start: int, end: int) -> list[Direction]:
        """Return the directions of a segment at its start (0) or end (1): its motion if the rule or
        other paths need it, and further directions of other paths.
        """
        rule, paths = self.method.rule, self.paths(start)
        if paths is not None:
            return [Line(start), *paths.directions(end)]
        return [Line(start)] if (rule.has_start, rule.has_end)[end] else []

    def evaluation(self, loss: str, node: Node) -> Evaluation:
        """Return a loss over all of its data at a node whose sums are known.

        Args:
            loss: name of the loss.
            node: the node.
        """
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
        """Return ends that are 1 apart, by which sums along a motion are multiplied."""
        like: dict[str, Tensor] = {name: torch.empty(0, device="cpu") for name in self.units}
        return unit_motion(like, self.units)


class _Segment:
    """Present one segment of a sharded span as `Nodes`.

    Args:
        span: holds the sums.
        start: position of the checkpoint where the segment starts.
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
        """Request everything that the rule and other paths certainly need.

        Raises:
            Wanted: if something is missing.
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
        """See `Nodes.at`; if sums at a fresh node of a level are missing, request those at all
        fresh nodes of the level.

        Raises:
            Wanted: if sums are missing.
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
        """See `Nodes.know_signal`: motions of a sharded span have no parts."""

    def at_end(
        self, losses: list[str], *, here: bool, following: bool
    ) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
        """See `Nodes.at_end`; the next segment looks up its own evaluations."""
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
        """Return the nodes with missing sums."""
        return [node for node in nodes if any(self._span.missing(loss, node) for loss in losses)]
