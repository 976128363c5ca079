"""Evaluate losses over some shards of their data, at nodes of a span, and write the sums."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from ...base.available_memory import peak_memory
from ...checkpoints.paths import path_of
from ...cluster import Spec
from ...errors import NotFiniteError
from ...numerics.nodes import Line, ends_of, part_of
from ..requests import ShardAnswer, ShardRequest, SpanRequest, to_plain, work_of
from ..shards import shards_of
from .kept_points import KeptPoints
from .out_of_memory import with_smaller_batches
from .spans import committed_result, ready, replay_span
from .state import reported

if TYPE_CHECKING:
    from ...numerics.objective import Objective
    from ...results import Manifest
    from ..sharded_span import ShardSums, SumsFiles


def replay_in_shards(spec: Spec) -> Spec:
    """Replay a span, or evaluate shards of it, as the request asks."""
    return sum_shards(spec) if isinstance(work_of(spec), ShardRequest) else replay_span(spec)


def committed(spec: Spec) -> Spec | None:
    """Return the answer of a worker that is out of reach, once its results are written; None
    before.
    """
    from ...results import read_sums

    request = work_of(spec)
    if isinstance(request, SpanRequest):
        return committed_result(spec)
    stored = read_sums(path_of(request.run), request.file)
    if stored is None:
        return None
    return to_plain(ShardAnswer(seconds=stored[0]["seconds"], peak_bytes=0))


@reported(ShardRequest)
def sum_shards(request: ShardRequest) -> ShardAnswer:
    """Evaluate losses over shards at some nodes, and write the sums to a file of the run."""
    from ...results import RunWriter
    from ..sharded_span import SumsFiles

    started = time.perf_counter()
    writer = RunWriter.open(path_of(request.run), durable=request.durable)
    manifest = writer.manifest
    objective = ready(request, writer, request.losses)
    files = SumsFiles(writer.path, manifest, request.span, request.losses, request.setup)
    work = _Shards(request, manifest, objective, files)
    splits = {split for name in request.losses if (split := manifest.losses[name].on) is not None}
    entries = with_smaller_batches(
        lambda: list(work.entries()), objective, splits, request.setup.settings.norm_stats
    )
    seconds = time.perf_counter() - started
    files.write(
        request.file,
        entries,
        work.distances(),
        work.not_finite,
        seconds=seconds,
        durable=request.durable,
    )
    return ShardAnswer(seconds=time.perf_counter() - started, peak_bytes=peak_memory())


class _Shards:
    """The evaluations of one request.

    Args:
        request: names losses, nodes and shards.
        manifest: of the run.
        objective: evaluates the losses.
        files: of the sums of the span.
    """

    def __init__(
        self, request: ShardRequest, manifest: Manifest, objective: Objective, files: SumsFiles
    ) -> None:
        from ...numerics.path import Course

        self._request, self._manifest, self._objective = request, manifest, objective
        self._axes = files.axes
        self._ends = {end for start in files.starts for end in ends_of(start)}
        self._points = KeptPoints(request.points, objective)
        checkpoints = request.points.checkpoints
        self._course = Course(self._points.at, lambda index: checkpoints[index].step)

    @cached_property
    def not_finite(self) -> frozenset[int]:
        """Return the checkpoints beside the span that nodes need and that are not finite.

        A checkpoint of the span itself that is not finite fails the span when it is read.
        """
        needed = {index for node in self._request.nodes for index in node.checkpoints}
        return frozenset(index for index in needed - self._ends if not self._is_finite(index))

    def _is_finite(self, index: int) -> bool:
        try:
            self._points.at(index)
        except NotFiniteError:
            return False
        return True

    def entries(self) -> Iterator[ShardSums]:
        """Yield the sums, node by node; none at nodes that need a checkpoint that is not finite.

        The driver requests other nodes in their place.
        """
        from ...numerics.objective import Along
        from ..sharded_span import ShardSums

        parts = {shard: self._parts(shard) for shard in self._request.shards}
        parts = {shard: of_losses for shard, of_losses in parts.items() if of_losses}
        for node in self._request.nodes:
            if self.not_finite.intersection(node.checkpoints):
                continue
            directions = [self._course.motion(direction) for direction in node.along]
            evaluated = self._objective.evaluate_parts(
                self._course.at(node),
                list(parts.values()),
                Along(self._axes, directions) if directions else None,
            )
            for shard, sums_of_losses in zip(parts, evaluated, strict=True):
                for loss, sums in sums_of_losses.items():
                    on = self._manifest.losses[loss].on
                    yield ShardSums(
                        loss=loss,
                        node=node,
                        shard=shard,
                        batch_size=0 if on is None else self._objective.batch_sizes[on],
                        sums=sums,
                    )

    def distances(self) -> dict[int, Mapping[str, float]]:
        """Return Σ|θ′ − θ| of every tensor on the requested segments."""
        from ...numerics.objective import distances

        return {
            start: distances(self._course.motion(Line(start)), self._axes)
            for start in self._request.distances
        }

    def _parts(self, shard: int) -> dict[str, range | None]:
        """Return the examples of a shard, by loss; losses with fewer shards are missing."""
        parts: dict[str, range | None] = {}
        for loss in self._request.losses:
            record, shards = self._manifest.losses[loss], shards_of(self._manifest, loss)
            if shard < shards:
                whole = record.on is None
                parts[loss] = (
                    None if whole else part_of(record.examples, record.batch_size, shards, shard)
                )
        return parts
