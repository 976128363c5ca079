"""One span: allocate its segments for the pending losses, write and commit them."""

from __future__ import annotations

import gc
import math
import os
import resource
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ResourceError, SpanError
from ..records import in_units_of_loss
from ..trajectory import read_stored
from .state import Spec, checkpoint_at, objective_of, point_at, points_of, reported

if TYPE_CHECKING:
    from ..store import SpanReport

SAMPLED = {
    0,
    64,
    512,
}  # from here on the first segment that moves is measured: the same one however a run is cut or has grown
LOOKED = 64  # segments from there that are looked at


def stretch_of(row: int) -> range:
    """Return the segments one of which is measured that `row` is among; none where it is among none.

    >>> stretch_of(3), stretch_of(64), stretch_of(200)
    (range(0, 64), range(64, 128), range(0, 0))
    """
    first = max((each for each in SAMPLED if each <= row), default=row + 1)
    last = min((each for each in SAMPLED if each > first), default=first + LOOKED)
    stretch = range(first, min(last, first + LOOKED))
    return stretch if row in stretch else range(0)


def looks_back(row: int) -> range:
    """Return the checkpoints that tell, for a span from `row` on, whether the segment that is measured comes before it."""
    stretch = stretch_of(row)
    return range(stretch.start, row + 1) if row > stretch.start and stretch else range(0)


@reported
def replay_span(spec: Spec) -> Spec:
    """Allocate the segments of one span for its pending losses, write and commit them.

    What another worker committed meanwhile (one that was cut off, or whose driver died) is not done again.
    """
    from ..store import RunWriter, SpanReport

    started = time.perf_counter()
    writer = RunWriter.open(Path(spec["run"]), durable=spec["durable"])
    facts = _committed(writer, spec)
    pending = [name for name in spec["pending"] if name not in facts]
    if pending:
        objective = _ready(spec, writer, pending)
        records = {name: writer.manifest.losses[name] for name in pending}
        together = [name for name, record in records.items() if len(record.blocks) == 1]
        with SpanReport(writer.path, spec["span"]) as report:
            for losses in [together, *([name] for name in records if name not in together)]:
                if losses:
                    facts |= _within_memory(spec, objective, writer, losses, report)
        objective.release_higher()
    return {
        "losses": facts,
        "segments": _length(writer, spec),
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def settled(spec: Spec) -> Spec | None:
    """The result of a span whose worker is out of reach, once everything of it is committed."""
    from ..store import RunWriter

    writer = RunWriter.open(Path(spec["run"]))
    facts = _committed(writer, spec)
    if len(facts) < len(spec["pending"]):
        return None
    seconds = sum(fact["seconds"] for fact in facts.values())
    return {"losses": facts, "segments": _length(writer, spec), "seconds": seconds, "peak_bytes": 0}


def _length(writer: Any, spec: Spec) -> int:
    """Return how many segments the span of a spec has, for any of its losses alike."""
    return int(writer.manifest.of(spec["pending"][0]).length(spec["span"]))


@reported
def losses_at(spec: Spec) -> Spec:
    """Losses, groups averaged, at checkpoints: `meetings` has position → names. What cannot be had there is left out."""
    from ..objective import is_out_of_memory
    from ..store import RunWriter

    losses = [name for names in spec["meetings"].values() for name in names]
    objective = _ready(spec, RunWriter.open(Path(spec["run"])), losses)
    found: Spec = {}
    for index, names in spec["meetings"].items():
        try:
            there = objective.evaluate(point_at(spec, int(index), objective), names, gradient=False)
            found |= {name: float(np.mean(each.loss)) for name, each in there.items()}
        except SpanError:  # of a checkpoint that cannot be read, whose span will say so
            continue
        except Exception as error:
            if not is_out_of_memory(error):  # spans go on with smaller batches
                raise
    return {"losses": found}


def _ready(spec: Spec, writer: Any, losses: list[str]) -> Any:
    """The objective, with the batches that are recorded for some losses and in their order."""
    objective = objective_of(spec)
    objective.batch_sizes |= spec["batch_sizes"]
    for name in losses:
        record = writer.manifest.losses[name]
        objective.follow(name, objective.replicates_of(name) if record.replicates else record.along)
    return objective


def _committed(writer: Any, spec: Spec) -> Spec:
    """What markers say of the pending losses of a span that are committed after all."""
    found = {name: writer.facts(name, spec["span"]) for name in spec["pending"]}
    return {name: facts for name, facts in found.items() if facts is not None}


def _within_memory(spec: Spec, objective: Any, writer: Any, losses: list[str], report: SpanReport) -> Spec:
    """Allocate some losses, with half the batch as often as memory runs out."""
    import torch

    from ..objective import is_out_of_memory

    while True:
        try:
            return _Together(spec, objective, writer, losses, report).run()
        except Exception as error:
            splits = {writer.manifest.losses[name].on for name in losses} - {None}
            largest = max((objective.batch_sizes[split] for split in splits), default=1)
            if not is_out_of_memory(error) or largest == 1:
                raise
            if spec["settings"]["norm_stats"] == "batch":
                raise ResourceError(
                    f"out of memory with batches of {largest} ({str(error)[:200]}). With --norm-stats batch the batch is part of the "
                    "loss and is not halved: use a device with more memory, or another run with a smaller --batch-size."
                ) from error
            for split in splits:
                objective.batch_sizes[split] = min(objective.batch_sizes[split], largest // 2)
        gc.collect()  # the failed pass's tensors, which its traceback held
        if objective.device.type == "cuda":
            torch.cuda.empty_cache()


class _Together:
    """Losses on one span that are evaluated together, or one loss block by block of its groups."""

    def __init__(self, spec: Spec, objective: Any, writer: Any, losses: list[str], report: SpanReport) -> None:
        from ..allocation import Method
        from ..quadrature import RULES

        self.spec, self.objective, self.writer, self.report = spec, objective, writer, report
        report.begin(losses)
        self.records = {name: writer.manifest.losses[name] for name in losses}
        self.replicates = {name: objective.replicates_of(name) for name in losses if self.records[name].replicates}
        covered = writer.manifest.of(losses[0])
        self.rows, self.length = covered.rows(spec["span"]), covered.length(spec["span"])
        self.kept = [tensor.spec for tensor in writer.manifest.allocated]
        self.trained = {
            tensor.spec.name: tensor.source for tensor in writer.manifest.tensors if tensor.spec.kind == "parameter"
        }
        self.blocks = self.records[losses[0]].blocks
        settings = spec["settings"]
        self.method = Method(
            RULES[settings["rule"]],
            {name: in_units_of_loss(settings["tolerance"], each.scale) for name, each in self.records.items()},
            {
                name: in_units_of_loss(settings["allocation_tolerance"], each.scale)
                for name, each in self.records.items()
            },
            spec["calibration"],
            frozenset(self.replicates.values()),
        )

    def run(self) -> Spec:
        """Allocate, write, commit; returns what each loss took."""
        started, before = time.perf_counter(), self._counts()
        levels = [0] * self.length
        while True:
            reached = self._walk(levels)
            if all(len(each) == 1 for each in reached) or len(self.blocks) == 1:
                break
            levels = [max(each) for each in reached]  # the groups of a loss are refined alike
        facts: Spec = {}
        seconds = (time.perf_counter() - started) / len(self.records)
        for name, tally in self.tallies.items():
            apart, scale = self.errors[name].T
            np.divide(apart, scale, out=tally.steps["precision_error"], where=scale > 0)
            evaluations, passes = (now - then for now, then in zip(self._counts()[name], before[name], strict=True))
            facts[name] = {"evaluations": evaluations, "forward_passes": passes}
            on = self.records[name].on
            facts[name]["batch_size"] = 0 if on is None else self.objective.batch_sizes[on]
            facts[name]["worst_residual"] = float(abs(tally.steps["residual"]).max())
            facts[name]["unconverged"] = int((tally.steps["converged"] == 0).sum())
            facts[name]["silent"] = sorted(tally.silent) if on is not None else []
            facts[name]["hidden"] = self._hidden(name, facts[name]["silent"])
            facts[name]["ends"] = [
                float(np.mean(tally.steps[end][at])) for end, at in (("loss_start", 0), ("loss_end", -1))
            ]
            where = {"host": socket.gethostname(), "pid": os.getpid(), "seconds": round(seconds, 3)}
            self.writer.write_span(name, self.spec["span"], tally, {**facts[name], **where}, self.parts.get(name))
        return facts

    def _hidden(self, name: str, silent: list[str]) -> list[str]:
        """Which tensors that moved and have no gradient the loss depends on, through detach() or no_grad()."""
        from ..objective import hidden_from_autograd

        return hidden_from_autograd(self.objective, name, silent) if silent else []

    def _counts(self) -> dict[str, tuple[int, int]]:
        return {name: (self.objective.evaluations[name], self.objective.forward_passes[name]) for name in self.records}

    def _walk(self, levels: list[int]) -> list[set[int]]:
        """Allocate every block over all segments, at least at the levels given; returns the levels that were reached."""
        from ..allocation import allocate_span
        from ..tally import Tally

        keep, device = self.writer.keep, self.objective.device
        self.tallies = {
            name: Tally(self.kept, self.length, keep, device, len(record.groups) if record.groups else None)
            for name, record in self.records.items()
        }
        self.errors = {name: np.zeros((self.length, 2)) for name in self.records}
        self.parts = {
            name: np.zeros((self.length, self.records[name].replicates, len(self.kept))) for name in self.replicates
        }
        measures = any(record.measured for record in self.records.values())
        self.waits_before = measures and _still(self.spec, looks_back(self.rows.start), self.trained)
        reached = [set[int]() for _ in range(self.length)]
        every = [*self.records, *self.replicates.values()]
        for part_before, block in enumerate(self.blocks):
            part = self.objective if len(self.blocks) == 1 else _Only(self.objective, block)
            if len(self.blocks) > 1:
                next(iter(self.tallies.values())).begin(block)
            points = points_of(self.spec, self.rows, self.objective)
            self.waits = self.waits_before
            for at, (start, end, done) in enumerate(allocate_span(points, part, every, self.method, levels)):
                self._take(at, start, end, done, block)
                reached[at] |= {done[name].level for name in self.records}
                segments = len(self.records) * (at + 1 + part_before * self.length) / len(self.blocks)
                self.report.reach(segments, max(float(np.max(np.abs(done[name].residual))) for name in self.records))
            for name, tally in self.tallies.items():
                self.writer.write_block(name, self.spec["span"], tally)
        return reached

    def _take(self, at: int, start: Any, end: Any, done: Any, block: range) -> None:
        for name, tally in self.tallies.items():
            tally.add(at, done[name])
        for name, hidden in self.replicates.items():
            self.parts[name][at] = _sums(done[hidden], self.kept)
        measured = {name: done[name] for name, record in self.records.items() if record.measured}
        if measured and self._is_measured(self.rows.start + at, next(iter(measured.values())).motion):
            higher = self.objective.higher if len(self.blocks) == 1 else _Only(self.objective.higher, block)
            for name, error in _precision_errors(measured, start, end, higher, self.method.rule).items():
                self.errors[name][at] += error

    def _is_measured(self, row: int, motion: Any) -> bool:
        """Tell whether a segment, the one after that of the last call, is the first of its stretch that moves."""
        stretch = stretch_of(row)
        self.waits = bool(stretch) and (row == stretch.start or self.waits)
        if not self.waits or not any(bool(motion[name].any()) for name in self.trained if name in motion):
            return False
        self.waits = False
        return True


def _still(spec: Spec, checkpoints: range, trained: dict[str, str]) -> bool:
    """Tell whether no parameter moves over some consecutive checkpoints.

    One that cannot be read counts as moved: its span says why. Statistics move in every forward pass of training and count for nothing.

    Args:
        spec: of the span.
        checkpoints: their positions.
        trained: the parameters' names, and those inside the files.
    """
    if not checkpoints:
        return False
    try:
        before = read_stored(checkpoint_at(spec, checkpoints.start), trained)
        for index in checkpoints[1:]:
            after = read_stored(checkpoint_at(spec, index), trained)
            if any(bool((after[name].double() != before[name].double()).any()) for name in after):
                return False
            before = after
    except SpanError:
        return False
    return True


class _Only:
    """An objective over some of the groups of its losses."""

    def __init__(self, objective: Any, groups: range) -> None:
        self._objective, self._groups = objective, groups
        self.dtype = objective.dtype

    def evaluate(self, point: Any, losses: list[str], *, gradient: bool = True) -> Any:
        return self._objective.evaluate(point, losses, gradient=gradient, only=self._groups)


def _sums(segment: Any, kept: list[Any]) -> Any:
    """(replicates, tensors): what each replicate allocates to each tensor."""
    return np.stack([segment.allocation[each.name].flatten(1).sum(1).cpu().numpy() for each in kept], -1)


def _precision_errors(found: Any, start: Any, end: Any, higher: Any, rule: Any) -> dict[str, tuple[float, float]]:
    """Σ|A − A*| and Σ|A*| of losses on one segment, with A* from the same nodes one precision higher."""
    from ..allocation import Method, allocate
    from ..quadrature import COMPOSITE

    first, last = (
        {key: each.to(higher.dtype) if each.is_floating_point() else each for key, each in point.items()}
        for point in (start, end)
    )
    errors = {}
    for level in {each.level for each in found.values()}:
        names = [name for name, each in found.items() if each.level == level]
        exact, _ = allocate(first, last, higher, names, Method(rule if level < 0 else COMPOSITE.rules[level]))
        for name in names:
            ours, theirs = found[name].allocation, exact[name].allocation
            apart = math.fsum(float((ours[key] - each).abs().sum()) for key, each in theirs.items())
            errors[name] = apart, math.fsum(float(each.abs().sum()) for each in theirs.values())
    return errors
