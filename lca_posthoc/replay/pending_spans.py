"""Replay the pending spans of a run on a cluster, report on each, and merge their totals."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import results
from ..base.text import count, duration, quoted
from ..cluster import Cluster, Done, Lost, Outcome, Refused, Retried, Slow, Waiting
from ..errors import LCAError, NotFiniteError, ResourceError, few
from ..results import Manifest, RunWriter
from .consume import Consumer, looked_back_at
from .events import Planned, SpanDone, SpanFailed, SpanRetried, SpanSlow
from .follow import Follower
from .requests import (
    Failure,
    LossSpan,
    RunRequest,
    ShardRequest,
    SpanAnswer,
    SpanRequest,
    answered,
    to_plain,
    work_of,
)
from .shards import is_cut
from .status import Status
from .worker import committed, committed_result, replay_in_shards, replay_span

if TYPE_CHECKING:
    from .shard_queue import ShardQueue


class _Unreached(NamedTuple):
    """A tensor that moved and that no gradient of a loss reaches, and whether the loss depends on
    it nevertheless.
    """

    loss: str
    tensor: str
    depends: bool


class PendingSpans:
    """The pending spans of a run, and the reports on them.

    Attributes:
        failed: the spans that could not be replayed.
    """

    def __init__(
        self,
        writer: RunWriter,
        common: RunRequest[Any],
        status: Status,
        *,
        durable: bool,
        root: Path,
        consumer: Consumer | None,
        follower: Follower | None,
    ) -> None:
        self._writer, self._common, self._status, self._durable = writer, common, status, durable
        self._root, self._consumer = root, consumer
        self._follows = follower is not None and not follower.is_over
        self._followed = follower is not None and follower.is_over
        self._covered = {name: writer.manifest.of(name) for name in common.setup.losses}
        self.failed: list[SpanFailed] = []
        self._oom_retries = 0
        self._left_partials = False
        self._reported_ends: dict[str, dict[int, list[float]]] = {}
        self._unreached: set[_Unreached] = set()
        self._shards: ShardQueue | None = None

    def replay(
        self, cluster: Cluster, lock: results.Held, repair_spans: dict[str, list[int]] | None
    ) -> None:
        """Replay the spans on a cluster, and merge their totals.

        Args:
            cluster: where.
            lock: of the run.
            repair_spans: the spans to replay, by loss; None for all pending ones.

        Raises:
            ResourceError: if another driver took the run over.
        """
        path = self._writer.path
        results.remove_reports(path)
        pending = self._pending(repair_spans)
        if not pending and self._follows:
            return
        self._plan(pending, cluster.crew().workers)
        lock.unclean = True  # until the end, workers may leave temporary files
        with contextlib.closing(self._outcomes(cluster, pending)) as outcomes:
            for outcome in outcomes:
                self._hear(outcome)
                if lock.lost.is_set():
                    raise ResourceError(
                        f"another driver took {path} over, because this one was silent for "
                        "minutes. Committed results are kept."
                    )
        self._fold()
        results.remove_reports(path)
        if self._left_partials:  # dead workers leave temporary files
            self._writer.sweep()
        lock.unclean = False
        self._status.note(self._notes())

    # --- before

    def _pending(
        self, repair_spans: dict[str, list[int]] | None
    ) -> dict[tuple[int, int], list[str]]:
        """Return the losses that wait for each span, keyed by span and number of segments; in a
        repair losses may end at different segments.
        """
        waiting: dict[tuple[int, int], list[str]] = {}
        for name, manifest in self._covered.items():
            self._writer.fold_all(name)
            for span in self._writer.pending(name):
                if repair_spans is None or span in repair_spans[name]:
                    waiting.setdefault((span, manifest.length(span)), []).append(name)
        return waiting

    def _plan(self, waiting: dict[tuple[int, int], list[str]], workers: int) -> None:
        pending = sum(len(names) * length for (_, length), names in waiting.items())
        total = sum(manifest.segments for manifest in self._covered.values())
        directory = self._common.run if pending else ""
        self._status.plan(
            Planned(
                pending=pending,
                total=total,
                spans=len(waiting),
                workers=workers,
                directory=directory,
                follows=self._follows,
                followed=self._followed,
            )
        )

    def _requests(self, waiting: dict[tuple[int, int], list[str]]) -> Iterator[SpanRequest]:
        for (span, _), names in sorted(waiting.items()):
            manifest = self._covered[names[0]]
            yield span_request(
                self._common, manifest, span, names, self._root, durable=self._durable
            )

    def _outcomes(
        self, cluster: Cluster, waiting: dict[tuple[int, int], list[str]]
    ) -> Generator[Outcome]:
        """Compute the spans: whole, or in shards of the data where losses are cut."""
        manifest = self._writer.manifest
        whole = {
            key: names
            for key, all_names in waiting.items()
            if (names := [name for name in all_names if not is_cut(manifest, name)])
        }
        specs = map(to_plain, self._requests(whole))
        cut = [
            (span, names)
            for (span, _), all_names in sorted(waiting.items())
            if (names := [name for name in all_names if is_cut(manifest, name)])
        ]
        if not cut:
            return cluster.map(replay_span, specs, committed_result)
        from .shard_queue import ShardQueue

        self._shards = ShardQueue(
            self._writer,
            self._common,
            cut,
            self._finishing,
            workers=cluster.crew().workers,
            durable=self._durable,
        )
        every = itertools.chain(specs, self._shards.specs())
        return cluster.map(replay_in_shards, every, committed)

    def _finishing(self, span: int, names: list[str]) -> SpanRequest:
        """Return the request to commit a span whose sums over shards are complete."""
        return span_request(
            self._common,
            self._covered[names[0]],
            span,
            names,
            self._root,
            durable=self._durable,
        )

    # --- while they are replayed

    def _hear(self, outcome: Outcome) -> None:
        """Report an outcome of the cluster."""
        if isinstance(outcome, Refused):
            self._status.note([f"worker {outcome.worker} joined but is not used: it {outcome.why}"])
        elif isinstance(outcome, Waiting):
            self._status.note(
                [f"no worker is left; waiting {duration(outcome.seconds)} for one to join"]
            )
        elif isinstance(outcome, Done):
            if outcome.result is not None:
                self._take(outcome)
        else:
            self._hear_trouble(outcome)
        for span, names, error in self._shards.failures() if self._shards else ():
            self._take_failure(span, names, error)

    def _hear_trouble(self, outcome: Lost | Retried | Slow) -> None:
        request = work_of(outcome.spec)
        names = request.losses if isinstance(request, ShardRequest) else request.pending
        span, manifest = request.span, self._writer.manifest.of(names[0])
        where = (span, *_steps(manifest, span))
        self._left_partials |= not isinstance(outcome, Slow)
        if isinstance(outcome, Lost):
            if self._gives_up(request):
                self._fail(manifest, span, f"no worker could finish it ({outcome.why})")
        elif isinstance(outcome, Retried):
            self._status.tell(SpanRetried(*where, outcome.worker, outcome.why))
        else:
            self._status.tell(SpanSlow(*where, outcome.worker, outcome.seconds, outcome.doing))

    def _gives_up(self, request: SpanRequest | ShardRequest) -> bool:
        """Tell whether the failure of a request is the first of its span."""
        if not isinstance(request, ShardRequest):
            return True
        return self._shards is not None and bool(self._shards.drop(request.span))

    def _fail(
        self, manifest: Manifest, span: int, message: str, not_finite: int | None = None
    ) -> None:
        failure = SpanFailed(span, *_steps(manifest, span), message, not_finite)
        self.failed.append(failure)
        self._status.tell(failure)

    def _take(self, done: Done) -> None:
        request = work_of(done.spec)
        if isinstance(request, ShardRequest):
            self._take_sums(request, done)
            return
        answer = answered(SpanRequest, done.result)
        if isinstance(answer, Failure):
            self._take_failure(request.span, request.pending, answer.exception())
            return
        if self._shards is not None and is_cut(self._writer.manifest, request.pending[0]):
            self._shards.finish(request.span)
        self._status.span_seconds, self._status.workers = answer.seconds, done.workers
        for name, part in answer.losses.items():
            self._compare_ends(name, request.span, part.ends)
            self._mind_memory(name, request.span, part, done.worker)
            self._unreached |= {
                _Unreached(name, tensor, tensor in part.hidden) for tensor in part.silent
            }
        self._status.tell(_span_done(request.span, answer, done))
        if self._consumer is not None:
            self._consumer.release(at_rest=False)

    def _take_sums(self, request: ShardRequest, done: Done) -> None:
        """Store the sums of some shards; the requests that depend on them follow next."""
        assert self._shards is not None, "only the queue of shards asks for sums"
        answer = answered(ShardRequest, done.result)
        if not isinstance(answer, Failure):
            self._shards.take(request)
            return
        error = answer.exception()
        if isinstance(error, ResourceError) or self._gives_up(request):
            self._take_failure(request.span, request.losses, error)

    def _take_failure(self, span: int, losses: list[str], error: Exception) -> None:
        if isinstance(error, ResourceError):
            raise error
        step = error.step if isinstance(error, NotFiniteError) else None
        self._fail(self._writer.manifest.of(losses[0]), span, str(error), step)

    def _mind_memory(self, name: str, span: int, part: LossSpan, worker: str) -> None:
        """Report once that memory ran out and a span was computed in smaller batches."""
        whole = self._writer.manifest.losses[name].batch_size
        if part.batch_size >= whole:
            return
        self._oom_retries += 1
        if self._oom_retries == 1:
            self._status.note(
                [
                    f"out of memory on {worker}: span {span} of loss {name!r} was computed in "
                    f"batches of {part.batch_size} instead of {whole}, equal within rounding; its "
                    "marker records it"
                ]
            )

    def _compare_ends(self, loss: str, span: int, ends: list[float]) -> None:
        """Compare a span with its neighbours, once they are committed.

        Only the driver compares, so that no two processes miss each other.

        Raises:
            LCAError: if losses at a shared checkpoint differ.
        """
        reported = self._reported_ends.setdefault(loss, {})
        reported[span] = ends
        for later in (span, span + 1):
            what = results.disagreement(self._writer.commits(loss), later, reported)
            if what is not None:
                run = quoted(self._writer.path)
                raise LCAError(
                    f"{what}: one was computed from different data or another model, or a machine "
                    f"made an error. `lca verify {run}` lists where, `lca repair {run} --task FILE` "
                    "recomputes it."
                )

    # --- afterwards

    def _fold(self) -> None:
        """Merge the totals of windows; spans whose waiting totals were damaged have failed."""
        unfolded = {
            span: manifest
            for name, manifest in self._covered.items()
            for span in self._writer.fold_all(name)
        }
        for span, manifest in sorted(unfolded.items(), key=lambda item: item[0]):
            self._fail(manifest, span, "its totals were damaged before they were merged")

    def _notes(self) -> Iterator[str]:
        if self._oom_retries > 1:
            yield (
                f"out of memory {self._oom_retries} times; a smaller --batch-size from the start, "
                "in another run, is faster"
            )
        yield from _of_unreached(self._unreached)


def _span_done(span: int, answer: SpanAnswer, done: Done) -> SpanDone:
    parts = answer.losses.values()
    return SpanDone(
        span=span,
        losses=list(answer.losses),
        segments=answer.segments,
        worst_residual=max(part.worst_residual for part in parts),
        unconverged=sum(part.unconverged for part in parts),
        evaluations=sum(part.evaluations for part in parts),
        forward_passes=sum(part.forward_passes for part in parts),
        seconds=answer.seconds,
        peak_bytes=answer.peak_bytes,
        worker=done.worker,
        workers=done.workers,
    )


def _of_unreached(unreached: set[_Unreached]) -> Iterator[str]:
    """Yield notes on tensors that moved but that no gradient of a loss reaches: hidden from the
    loss, or unused.
    """
    for loss in sorted({entry.loss for entry in unreached}):
        tensors = {entry.tensor for entry in unreached if entry.loss == loss}
        hidden = {entry.tensor for entry in unreached if entry.loss == loss and entry.depends}
        unused = tensors - hidden
        if unused:
            yield (
                f"tensors moved without loss {loss!r} depending on them (allocated 0): "
                f"{few(sorted(unused), 5)}"
            )
        if hidden:
            yield (
                f"loss {loss!r} depends on some tensors that moved through detach() or no_grad() "
                f"alone, so no gradient reaches them (allocated 0): {few(sorted(hidden), 5)}. Their "
                "share is in the residual, which no smaller tolerance reduces"
            )


def failures_message(failed: list[SpanFailed]) -> str:
    """Describe the failures of spans: how many failed, the first one, and which of them no other
    call can mend.
    """
    first = failed[0]
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (
        f"{count(len(failed), 'span')} failed; the others are complete. Steps {first.first_step} "
        f"to {first.last_step}{more}: {first.message}{_not_finite(failed)}"
    )


def _not_finite(failed: list[SpanFailed]) -> str:
    """Return which checkpoints hold NaN or Inf, if spans failed for that: running again does not
    help.
    """
    steps = sorted({failure.not_finite for failure in failed if failure.not_finite is not None})
    if not steps:
        return ""
    several = len(steps) > 1
    of = (
        f"the checkpoints of steps {few([*map(str, steps)])} hold"
        if several
        else f"that of step {steps[0]} holds"
    )
    return f" Running again cannot replay their spans: {of} NaN or Inf."


def _steps(manifest: Manifest, span: int) -> tuple[int, int]:
    """Return the training steps at both ends of a span."""
    return manifest.ends(manifest.rows(span))


def span_request(
    common: RunRequest[Any],
    manifest: Manifest,
    span: int,
    pending: list[str],
    root: Path,
    *,
    durable: bool,
) -> SpanRequest:
    """Return the request to replay one span for its pending losses, with the checkpoints it reads.

    Args:
        common: to all spans.
        manifest: of the run up to where the pending losses end.
        span: its number.
        pending: the losses.
        root: the directory of the checkpoints.
        durable: whether to flush it to disk before it counts.
    """
    rows = manifest.rows(span)
    looked = looked_back_at(root, manifest, rows.start)
    starts = [manifest.starts[row] for row in looked or ()]
    positions = manifest.reads(rows) | {end for start in starts for end in (start, start + 1)}
    return SpanRequest(
        setup=common.setup,
        points=replace(
            common.points,
            checkpoints={index: manifest.checkpoints[index] for index in sorted(positions)},
        ),
        run=common.run,
        batch_sizes=common.batch_sizes,
        durable=durable,
        span=span,
        pending=pending,
        looks_back=looked,
    )
