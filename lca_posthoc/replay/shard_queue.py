"""Queue the spans that are computed in shards: requests that workers can take now, and those that
follow from answers.

A span is open from its first request until a worker takes it to commit it. This module refines its
segments, by the sums over all shards. All possible requests wait in one queue, which keeps workers
busy although each level of a segment waits for the one before.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import results
from ..cluster import Spec
from ..errors import SpanError
from ..numerics.nodes import Node, ends_of
from ..numerics.shards import Wanted
from ..results import RunWriter, SpanReport
from .requests import RunRequest, ShardRequest, SpanRequest, to_plain
from .sharded_span import KnownSpan, SumsFiles

Finishing = Callable[[int, list[str]], SpanRequest]


@dataclass(kw_only=True)
class _Open:
    """A span whose sums are being computed.

    Attributes:
        number: of the span.
        losses: that are computed.
        files: of its sums.
        known: the sums so far.
        starts: the segments not allocated yet, by where they start.
        report: publishes the progress of the span.
        requested: (loss, node, shard) already requested.
        distances: segments whose Σ|θ′ − θ| is already requested.
        underway: names of the files that are queued or being computed.
        worst: the largest residual of its segments.
    """

    number: int
    losses: list[str]
    files: SumsFiles
    known: KnownSpan
    starts: list[int]
    report: SpanReport
    requested: set[tuple[str, Node, int]] = field(default_factory=set)
    distances: set[int] = field(default_factory=set)
    underway: set[str] = field(default_factory=set)
    worst: float = 0.0


class ShardQueue:
    """The requests of all spans that are computed in shards.

    Args:
        writer: of the run.
        common: to all requests.
        spans: the losses that wait for each span.
        finishing: returns the request that commits a span for some losses.
        workers: that share the shards of a node.
        durable: whether to flush sums to disk before they count.
    """

    def __init__(
        self,
        writer: RunWriter,
        common: RunRequest[Any],
        spans: list[tuple[int, list[str]]],
        finishing: Finishing,
        *,
        workers: int,
        durable: bool,
    ) -> None:
        self._writer, self._common, self._finishing = writer, common, finishing
        self._workers, self._durable = workers, durable
        self._coming = deque(spans)
        self._open: dict[int, _Open] = {}
        self._ready: deque[ShardRequest | SpanRequest] = deque()
        self._failed: list[tuple[int, list[str], SpanError]] = []
        self._remove_strangers()

    def _remove_strangers(self) -> None:
        """Remove sums of spans that no longer need any."""
        path, waiting = self._writer.path, {span for span, _ in self._coming}
        for name in list(results.names_of_sums(path)):
            span = int(name.partition("-")[0])
            if span not in waiting:
                results.remove_sums(path, span)

    # --- requests

    def specs(self) -> Iterator[Spec | None]:
        """Yield requests as plain data; None while the next ones still depend on answers."""
        while True:
            if self._ready:
                yield to_plain(self._ready.popleft())
            elif self._coming:
                self._begin(*self._coming.popleft())
            elif self._open:
                yield None
            else:
                return

    def _begin(self, number: int, losses: list[str]) -> None:
        path, manifest = self._writer.path, self._writer.manifest
        files = SumsFiles(path, manifest, number, losses, self._common.setup)
        report = SpanReport(path, number)
        report.begin(losses)
        span = _Open(
            number=number,
            losses=losses,
            files=files,
            known=files.read(),
            starts=list(files.starts),
            report=report,
        )
        self._open[number] = span
        self._advance(span)

    def _advance(self, span: _Open) -> None:
        """Allocate the segments whose sums are complete, and request the sums others need; queue
        the commit once all segments are allocated.
        """
        try:
            for start in list(span.starts):
                try:
                    done = span.known.sums.allocate(start, span.losses)
                except Wanted as wanted:
                    self._ask(span, wanted)
                    continue
                span.starts.remove(start)
                residuals = [np.max(np.abs(segment.residual)) for segment in done.values()]
                span.worst = max(span.worst, *map(float, residuals))
        except SpanError as error:
            self.drop(span.number)
            self._failed.append((span.number, span.losses, error))
            return
        allocated = len(span.files.starts) - len(span.starts)
        span.report.reach(len(span.losses) * allocated, span.worst)
        if not span.starts:
            del self._open[span.number]
            span.report.close()
            self._ready.appendleft(self._finishing(span.number, span.losses))

    def _ask(self, span: _Open, wanted: Wanted) -> None:
        """Queue requests for the sums that a segment needs, and for its Σ|θ′ − θ|; spread the
        shards of a node over the workers.
        """
        sums = span.known.sums
        fresh: dict[int, set[Node]] = {}
        for node in wanted.nodes:
            for loss in wanted.losses:
                for shard in sums.missing(loss, node):
                    if (loss, node, shard) not in span.requested:
                        span.requested.add((loss, node, shard))
                        fresh.setdefault(shard, set()).add(node)
        start = wanted.distance
        distances = [] if start is None or start in span.distances else [start]
        span.distances.update(distances)
        for shards, nodes in self._bundles(fresh):
            in_order = [node for node in wanted.nodes if node in nodes]
            self._queue(span, wanted.losses, in_order, shards, distances)
            distances = []
        if distances:
            self._queue(span, wanted.losses, [], [], distances)

    def _bundles(self, fresh: dict[int, set[Node]]) -> Iterator[tuple[list[int], set[Node]]]:
        """Yield runs of consecutive shards that are needed at the same nodes, as many at a time as
        each worker's share.
        """
        most = max(1, -(-len(fresh) // self._workers))
        bundle: list[int] = []
        for shard in sorted(fresh):
            if bundle and (len(bundle) == most or fresh[shard] != fresh[bundle[0]]):
                yield bundle, fresh[bundle[0]]
                bundle = []
            bundle.append(shard)
        if bundle:
            yield bundle, fresh[bundle[0]]

    def _queue(
        self,
        span: _Open,
        losses: list[str],
        nodes: list[Node],
        shards: list[int],
        distances: list[int],
    ) -> None:
        positions = {index for node in nodes for index in node.checkpoints}
        positions |= {end for start in distances for end in ends_of(start)}
        checkpoints = self._writer.manifest.checkpoints
        request = ShardRequest(
            setup=self._common.setup,
            points=replace(
                self._common.points,
                checkpoints={index: checkpoints[index] for index in sorted(positions)},
            ),
            run=self._common.run,
            batch_sizes=self._common.batch_sizes,
            durable=self._durable,
            span=span.number,
            losses=losses,
            nodes=nodes,
            shards=shards,
            distances=distances,
            file=results.sums_name(span.number, uuid.uuid4().hex[:12]),
        )
        span.underway.add(request.file)
        self._ready.append(request)

    # --- answers

    def take(self, request: ShardRequest) -> None:
        """Read the sums that a worker has written; ignore those of a dropped span."""
        span = self._open.get(request.span)
        if span is None or request.file not in span.underway:
            return
        span.underway.remove(request.file)
        if span.files.take(span.known, request.file):
            self._advance(span)
            return
        self.drop(span.number)
        error = SpanError(f"its sums {request.file} were written but cannot be read back")
        self._failed.append((span.number, span.losses, error))

    def drop(self, number: int) -> list[str]:
        """Drop a span; return its losses, or none if it was dropped before.

        Its sums stay on disk for the next run.
        """
        span = self._open.pop(number, None)
        if span is None:
            return []
        span.report.close()
        self._ready = deque(request for request in self._ready if request.span != number)
        return span.losses

    def failures(self) -> list[tuple[int, list[str], SpanError]]:
        """Return the spans that failed here since the last call, with their losses."""
        failed, self._failed = self._failed, []
        return failed

    def finish(self, number: int) -> None:
        """Remove the sums of a committed span."""
        results.remove_sums(self._writer.path, number)
