"""Replay one span: allocate its segments for the pending losses, write and commit them."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.available_memory import give_back, peak_memory
from ...checkpoints.paths import path_of
from ...cluster import Spec
from ...errors import SpanError
from ..method import method_of
from ..requests import (
    LossesAnswer,
    LossesRequest,
    LossSpan,
    RunRequest,
    SpanAnswer,
    SpanRequest,
    from_plain,
    to_plain,
)
from ..shards import is_cut
from .kept_points import forget_points
from .out_of_memory import with_smaller_batches
from .parts import PartsOfStretch
from .passed import Passed
from .paths import PathsOfStretch
from .read_ahead import PointsAhead
from .state import (
    StoredPoint,
    differ,
    objective_of,
    point_at,
    point_read_twice,
    reported,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Along, Evaluation, Motion, Objective
    from ...numerics.segment_allocation import Gathers, SegmentAllocation
    from ...numerics.shards import ShardedSpan
    from ...numerics.statistics import SpanSums
    from ...results import ChunkWriter, Marker, RunWriter, SpanReport

# from here on the first segment that moves is measured, so that it is the same one however a run is
# cut or has grown
SAMPLED = {
    0,
    64,
    512,
}
LOOKED = 64  # segments from there to search


def stretch_of(row: int) -> range:
    """Return the stretch of segments that holds `row`, of which one segment is measured; an empty
    one where no stretch holds it.

    >>> stretch_of(3), stretch_of(64), stretch_of(200)
    (range(0, 64), range(64, 128), range(0, 0))
    """
    first = max((start for start in SAMPLED if start <= row), default=row + 1)
    last = min((start for start in SAMPLED if start > first), default=first + LOOKED)
    stretch = range(first, min(last, first + LOOKED))
    return stretch if row in stretch else range(0)


def looks_back(row: int) -> range:
    """Return the segments to check to tell whether the measured segment lies before a span from
    `row`.

    >>> looks_back(3), looks_back(64), looks_back(200)
    (range(0, 3), range(64, 64), range(0, 0))
    """
    stretch = stretch_of(row)
    return range(stretch.start, row) if stretch else range(0)


@reported(SpanRequest)
def replay_span(request: SpanRequest) -> SpanAnswer:
    """Allocate the segments of one span for its pending losses, write and commit them.

    Losses that another worker has committed meanwhile are skipped: a worker that was cut off, or
    whose driver died.
    """
    from ...results import RunWriter, SpanReport

    started = time.perf_counter()
    writer = RunWriter.open(path_of(request.run), durable=request.durable)
    losses = {name: LossSpan.of(marker) for name, marker in _markers(writer, request).items()}
    pending = [name for name in request.pending if name not in losses]
    if pending:
        objective = ready(request, writer, pending)
        forget_points(objective)  # a span has its own place in memory
        records = {name: writer.manifest.losses[name] for name in pending}
        cut = [name for name in pending if is_cut(writer.manifest, name)]
        together = [
            name for name, record in records.items() if len(record.blocks) == 1 and name not in cut
        ]
        apart = [[name] for name in records if name not in [*cut, *together]]
        with SpanReport(writer.path, request.span) as report:
            for names in [cut, together, *apart]:
                if names:
                    losses |= _replay_together(request, objective, writer, names, report)
        objective.release_reference()
    return SpanAnswer(
        losses=losses,
        segments=_length(writer, request),
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
    )


def committed_result(spec: Spec) -> Spec | None:
    """Return the answer of a span whose worker is out of reach, once all of it is committed; None
    before.
    """
    from ...results import RunWriter

    request = from_plain(SpanRequest, spec)
    writer = RunWriter.open(path_of(request.run))
    markers = _markers(writer, request)
    if len(markers) < len(request.pending):
        return None
    losses = {name: LossSpan.of(marker) for name, marker in markers.items()}
    seconds = sum(marker["seconds"] for marker in markers.values())
    return to_plain(
        SpanAnswer(losses=losses, segments=_length(writer, request), seconds=seconds, peak_bytes=0)
    )


def _length(writer: RunWriter, request: SpanRequest) -> int:
    """Return the number of segments of a span, the same for all of its losses."""
    return int(writer.manifest.of(request.pending[0]).length(request.span))


@reported(LossesRequest)
def losses_at(request: LossesRequest) -> LossesAnswer:
    """Return losses, groups averaged, at some checkpoints; those that cannot be evaluated are
    missing.
    """
    from ...numerics.objective import is_out_of_memory
    from ...results import RunWriter

    losses = [name for names in request.meetings.values() for name in names]
    objective = ready(request, RunWriter.open(path_of(request.run)), losses)
    values: dict[str, float] = {}
    for index, names in request.meetings.items():
        try:
            evaluations = objective.evaluate(
                point_at(request.points, index, objective), names, gradient=False
            )
            values |= {
                name: float(np.mean(evaluation.loss)) for name, evaluation in evaluations.items()
            }
        except SpanError:  # an unreadable checkpoint, which its span will report
            continue
        except Exception as error:
            if not is_out_of_memory(error):  # spans retry with smaller batches
                raise
    return LossesAnswer(losses=values)


def ready(request: RunRequest[Any], writer: RunWriter, losses: list[str]) -> Objective:
    """Return the objective with the recorded batches of some losses, in their order.

    Args:
        request: about the run.
        writer: of the run.
        losses: names.
    """
    from ...numerics.objective import recalled

    objective = objective_of(request.setup)
    objective.batch_sizes.update(request.batch_sizes)
    for name in losses:
        record = writer.manifest.losses[name]
        grouped = objective.replicates_of(name) if record.replicates else record.along
        objective.data.set_batch_order(name, grouped)
        objective.example_axes.pop(name, None)  # of another run
        if record.sites is not None:
            objective.example_axes[name] = recalled(record.sites)
    return objective


def _markers(writer: RunWriter, request: SpanRequest) -> dict[str, Marker]:
    """Return the markers of a span's pending losses that are committed nevertheless."""
    markers = {name: writer.span_summary(name, request.span) for name in request.pending}
    return {name: marker for name, marker in markers.items() if marker is not None}


def _replay_together(
    request: SpanRequest,
    objective: Objective,
    writer: RunWriter,
    losses: list[str],
    report: SpanReport,
) -> dict[str, LossSpan]:
    """Allocate several losses together, with smaller batches where memory runs out."""
    splits = {split for name in losses if (split := writer.manifest.losses[name].on) is not None}
    return with_smaller_batches(
        lambda: _SpanReplay(request, objective, writer, losses, report).run(),
        objective,
        splits,
        request.setup.settings.norm_stats,
    )


class _SpanReplay:
    """The replay of one span: of several losses at once, or of one loss by blocks of its groups."""

    def __init__(
        self,
        request: SpanRequest,
        objective: Objective,
        writer: RunWriter,
        losses: list[str],
        report: SpanReport,
    ) -> None:
        from ...numerics.objective import replicates_of
        from ...numerics.statistics import unit_axes

        self.request, self.objective, self.writer, self.report = request, objective, writer, report
        report.begin(losses)
        self.records = {name: writer.manifest.losses[name] for name in losses}
        self.replicates = {
            name: replicates_of(name) for name in losses if self.records[name].replicates
        }
        covered = writer.manifest.of(losses[0])
        self.rows, self.length = covered.rows(request.span), covered.length(request.span)
        self.starts, self.stretches = covered.starts, covered.stretches(request.span)
        self.breaks = frozenset(covered.breaks)
        self.tensors = [tensor.spec for tensor in writer.manifest.allocated]
        self.trained = {
            tensor.spec.name: tensor.source
            for tensor in writer.manifest.tensors
            if tensor.spec.kind == "parameter"
        }
        self.blocks = self.records[losses[0]].blocks
        self.signal = request.setup.settings.signal
        self.axes = unit_axes(objective.allocated, self.tensors, writer.keep)
        self.method = method_of(request.setup.settings, self.records, self.replicates.values())
        self.known = None
        if is_cut(writer.manifest, losses[0]):
            from ..sharded_span import SumsFiles

            files = SumsFiles(writer.path, writer.manifest, request.span, losses, request.setup)
            self.known = files.read()

    def run(self) -> dict[str, LossSpan]:
        """Allocate, write and commit; return the figures of each loss."""
        with self.writer.chunks() as chunks:
            return self._run(chunks)

    def _run(self, chunks: ChunkWriter) -> dict[str, LossSpan]:
        started, before = time.perf_counter(), self._counts()
        errors = self._rounding()
        levels = [0] * self.length
        while True:
            reached = self._walk(levels, chunks)
            if all(len(of_segment) == 1 for of_segment in reached) or len(self.blocks) == 1:
                break
            # the groups of a loss share a refinement level
            levels = [max(of_segment) for of_segment in reached]
            chunks.wait()  # before writing the same chunks again
        losses: dict[str, LossSpan] = {}
        seconds = time.perf_counter() - started
        if self.known is not None:
            seconds += self.known.seconds
        seconds /= len(self.records)
        for name, statistics in self.statistics.items():
            apart, scale = errors[name].T
            np.divide(apart, scale, out=statistics.steps["precision_error"], where=scale > 0)
            evaluations, passes = self._counted(name, before[name])
            on = self.records[name].on
            silent = sorted(statistics.moved_unused) if on is not None else []
            losses[name] = LossSpan(
                evaluations=evaluations,
                forward_passes=passes,
                batch_size=self._batch_size(name),
                worst_residual=float(abs(statistics.steps["residual"]).max()),
                unconverged=int((statistics.steps["converged"] == 0).sum()),
                silent=silent,
                hidden=self._hidden(name, silent),
                ends=[
                    float(np.mean(statistics.steps[end][row]))
                    for end, row in (("loss_start", 0), ("loss_end", -1))
                ],
            )
            where = {"host": socket.gethostname(), "pid": os.getpid(), "seconds": round(seconds, 3)}
            marker = {**to_plain(losses[name]), **where}
            self.writer.write_span(
                name, self.request.span, statistics, marker, chunks, self.parts.get(name)
            )
        return losses

    def _counted(self, name: str, before: tuple[int, int]) -> tuple[int, int]:
        """Return how often a loss was evaluated with and without a gradient since `before`; in
        shards, the totals.
        """
        if self.known is not None:
            return self.known.sums.counts(name)
        now = self._counts()[name]
        return now[0] - before[0], now[1] - before[1]

    def _batch_size(self, name: str) -> int:
        """Return the batch size of a loss's evaluations; 0 for a term of the parameters."""
        if self.known is not None:
            return self.known.batch_sizes[name]
        on = self.records[name].on
        return 0 if on is None else self.objective.batch_sizes[on]

    def _hidden(self, name: str, silent: list[str]) -> list[str]:
        """Return the tensors that moved without a gradient although the loss depends on them,
        through detach() or no_grad().
        """
        from ...numerics.objective import hidden_from_autograd

        if silent and self.known is not None:  # the model holds no point of the span yet
            last = self.starts[self.rows.stop - 1] + 1
            self.objective.place(point_at(self.request.points, last, self.objective))
        return hidden_from_autograd(self.objective, name, silent) if silent else []

    def _counts(self) -> dict[str, tuple[int, int]]:
        return {
            name: (self.objective.evaluations[name], self.objective.forward_passes[name])
            for name in self.records
        }

    def _walk(self, levels: list[int], chunks: ChunkWriter) -> list[set[int]]:
        """Allocate every block on all segments, at least at the given levels, and write it; return
        the levels reached.
        """
        self.statistics = self._gathering()
        self.parts = {
            name: np.zeros((self.length, self.records[name].replicates, len(self.tensors)))
            for name in self.replicates
        }
        if self.known is not None:
            return self._walk_known(self.known.sums, chunks)
        reached = [set[int]() for _ in range(self.length)]
        every = [*self.records, *self.replicates.values()]
        for part_before, block in enumerate(self.blocks):
            part = (
                self.objective
                if len(self.blocks) == 1
                else _Only(self.objective, block, self.signal)
            )
            if len(self.blocks) > 1:
                next(iter(self.statistics.values())).begin(block)
            done = itertools.count(1 + part_before * self.length)
            for stretch in self.stretches:
                rows = [row - self.rows.start for row in stretch]
                for row, (levels_of_losses, residual) in zip(
                    rows, self._allocate(part, every, rows, levels), strict=True
                ):
                    reached[row] |= levels_of_losses
                    reached_segments = len(self.records) * next(done) / len(self.blocks)
                    self.report.reach(reached_segments, residual)
            for name, statistics in self.statistics.items():
                self.writer.write_block(name, self.request.span, statistics, chunks)
        return reached

    def _walk_known(self, sums: ShardedSpan, chunks: ChunkWriter) -> list[set[int]]:
        """Allocate every block from the sums of shards, and write it; return the levels reached.

        Raises:
            SpanError: if sums are missing, because a file was damaged since the driver read it.
        """
        from ...numerics.shards import Wanted

        names, reached = list(self.records), []
        for row, start in enumerate(sums.starts):
            try:
                done = sums.allocate(start, names)
            except Wanted:
                raise SpanError(
                    "sums of shards were damaged since they were read; run again"
                ) from None
            levels, residual = self._take(row, row, done, None)
            reached.append(levels)
            self.report.reach(len(names) * (row + 1), residual)
        for name, statistics in self.statistics.items():
            self.writer.write_block(name, self.request.span, statistics, chunks)
        return reached

    def _allocate(
        self, part: Objective | _Only, losses: list[str], rows: list[int], levels: list[int]
    ) -> Iterator[tuple[set[int], float]]:
        """Allocate consecutive segments, and add each to the statistics.

        Args:
            part: evaluates the block's groups.
            losses: names, those of replicates among them.
            rows: of the segments, counted from the first of the span.
            levels: the least level of each row of the span.

        Yields:
            The levels that losses reached on a segment, and the largest residual.
        """
        from ...numerics.allocation import allocate_span

        first = self.starts[self.rows.start + rows[0]]
        for statistics in self.statistics.values():
            statistics.cut(rows[0])
        segments_of = slice(first, first + len(rows))
        with PointsAhead(self.request.points, self._read(segments_of), self.objective) as points:
            passed = Passed(self.request.points, segments_of, self.objective)
            parts, paths = self._parts(first, passed), self._paths(first, passed)
            segments = allocate_span(
                points if parts is None and paths is None else passed.remember(points),
                part,
                losses,
                self.method,
                axes=self.axes,
                at_least=[levels[row] for row in rows],
                # two are then in memory
                begin=points.begin_next,
                gathering=lambda position: self._gathering_at(rows[position]),
                parts=None if parts is None else parts.of,
                paths=None if paths is None else paths.of,
            )
            for position, row in enumerate(rows):
                # free a segment, with its gradients, before computing the next one
                yield self._take(position, row, next(segments), parts)
                passed.forget(first + position - 1)

    def _parts(self, first: int, passed: Passed) -> PartsOfStretch | None:
        """Return an object that computes the parts of the motion from a checkpoint; None where none
        are asked for.
        """
        settings = self.request.setup.settings
        if settings.signal is None and settings.directions is None:
            return None
        return PartsOfStretch(self.request.points, first, passed, self.objective, settings)

    def _paths(self, first: int, passed: Passed) -> PathsOfStretch | None:
        """Return an object that builds another path from a checkpoint; None where none is asked
        for.
        """
        if self.request.setup.settings.path_band != "on":
            return None
        return PathsOfStretch(self.request.points, self.breaks, first, passed)

    def _read(self, segments: slice) -> slice:
        """Return the segments whose ends are read in turn: consecutive ones, and the one after them
        where another path needs it.
        """
        beyond = (
            self.request.setup.settings.path_band == "on"
            and segments.stop not in self.breaks
            and segments.stop + 1 in self.request.points.checkpoints
        )
        return slice(segments.start, segments.stop + beyond)

    def _gathering_at(self, row: int) -> Mapping[str, Gathers]:
        """Return the functions that take a segment of each loss as it is computed; none at levels
        of sums.
        """
        from ...numerics.statistics import SpanStatistics

        return {
            name: statistics.gathering(row)
            for name, statistics in self.statistics.items()
            if isinstance(statistics, SpanStatistics)
        }

    def _gathering(self) -> Mapping[str, SpanSums]:
        """Return the statistics of each loss at the level of the run."""
        import torch

        from ...numerics.statistics import SpanStatistics, SpanSums

        device = self.objective.device if self.known is None else torch.device("cpu")
        of_span = (self.tensors, self.length, self.writer.keep, device)
        directions = self.request.setup.settings.directions
        parts = (
            self.signal is not None,
            0 if directions is None else directions["directions"],
            self.request.setup.settings.path_band == "on",
        )
        groups = {
            name: len(record.groups) if record.groups else None
            for name, record in self.records.items()
        }
        examples = {name: self._groups_of_examples(name) for name in self.records}
        uses = {name: self.writer.manifest.uses(record) for name, record in self.records.items()}
        if self.axes is not None:
            return {
                name: SpanSums(*of_span, groups[name], examples[name], uses[name], *parts)
                for name in self.records
            }
        statistics: dict[str, SpanStatistics] = {}
        first: dict[int, SpanStatistics] = {}  # by the segment from which they count
        for name, record in self.records.items():
            since = self.writer.commits(name).counted(self.request.span)
            statistics[name] = SpanStatistics(
                *of_span,
                groups[name],
                examples[name],
                uses[name],
                *parts,
                unit=record.unit,
                since=since,
                like=first.get(since),
            )
            first.setdefault(since, statistics[name])
        return statistics

    def _groups_of_examples(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return the position of every example's group, 0 without groups; None for losses without
        per-example results.
        """
        from ...numerics.objective import ElementOrder

        record, order = self.records[name], self.objective.order(name)
        if record.per is None:
            return None
        if order is None:
            return np.zeros(record.rows or 0, "int32")
        assert not isinstance(order, ElementOrder), "groups of a loss per example are of examples"
        return order.codes.numpy()

    def _take(
        self,
        position: int,
        row: int,
        done: dict[str, SegmentAllocation],
        parts: PartsOfStretch | None,
    ) -> tuple[set[int], float]:
        """Add a segment of a stretch to its row of the statistics; return the levels that losses
        reached, and the largest residual.
        """
        for name, statistics in self.statistics.items():
            statistics.add(row, done[name])
        if parts is not None:
            parts.add(position, row, done, self.statistics)
        for name, hidden in self.replicates.items():
            sums = done[hidden].sums
            self.parts[name][row] = np.stack([sums[tensor.name] for tensor in self.tensors], -1)
        segments = [done[name] for name in self.records]
        residual = max(float(np.max(np.abs(segment.residual))) for segment in segments)
        return {segment.level for segment in segments}, residual

    def _rounding(self) -> dict[str, np.ndarray[Any, Any]]:
        """Measure the rounding of the precision on the span's chosen segments.

        Returns:
            Σ|A − A*| and Σ|A*| of each loss, (segments, 2); zeros on the other segments.
        """
        from ...numerics.objective import rounding_errors

        errors = {name: np.zeros((self.length, 2)) for name in self.records}
        names = [name for name, record in self.records.items() if record.measured]
        for row in self._measured_rows() if names else ():
            for name, error in rounding_errors(
                self.objective,
                names,
                point_read_twice(self.request.points, self.starts[row], self.objective),
                point_at(self.request.points, self.starts[row] + 1, self.objective),
                self.axes,
                every=self.request.setup.settings.precision_check == "full",
            ).items():
                errors[name][row - self.rows.start] = error
            self.objective.release_reference()
            give_back(self.objective.parameter_bytes, cycles=True)
        return errors

    def _measured_rows(self) -> Iterator[int]:
        """Yield the segments of the span that are the first of their stretch to move."""
        looked = self.request.looks_back
        waits = looked is not None and self._still(looked)
        for row in range(self.rows.start, self.rows.stop):
            stretch = stretch_of(row)
            waits = bool(stretch) and (row == stretch.start or waits)
            if waits and not self._still(range(row, row + 1)):
                waits = False
                yield row

    def _still(self, rows: Iterable[int]) -> bool:
        """Tell whether no parameter moves on some segments.

        An unreadable segment counts as moved: its span reports why. Running statistics are ignored,
        because they move in every forward pass of training.
        """
        try:
            return not any(map(self._moves, rows))
        except SpanError:
            return False

    def _moves(self, row: int) -> bool:
        before, after = (
            StoredPoint(self.request.points, index, self.objective, self.trained)
            for index in (self.starts[row], self.starts[row] + 1)
        )
        return differ(before, after, self.trained)


class _Only:
    """An objective restricted to some of the groups of its losses.

    Args:
        objective: over all of them.
        groups: the chosen ones.
        whole: a loss without groups, evaluated unchanged; None for none.
    """

    def __init__(self, objective: Objective, groups: range, whole: str | None) -> None:
        self._objective, self._groups, self._whole = objective, groups, whole

    def evaluate(
        self,
        point: Mapping[str, Tensor],
        losses: list[str],
        *,
        gradient: bool = True,
        along: Along | None = None,
        examples: Sequence[Motion] | None = None,
    ) -> dict[str, Evaluation]:
        return self._objective.evaluate(
            point,
            losses,
            gradient=gradient,
            along=along,
            only=None if losses == [self._whole] else self._groups,
            # once, with the first of the groups
            examples=examples if self._groups.start == 0 else None,
        )

    def holding(
        self, point: MutableMapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return self._objective.holding(point)
