"""Estimate the costs of a run or of a recording: evaluations, time from a few timed batches, bytes
against free space.
"""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .. import results
from ..checkpoints.headers import read_header
from ..checkpoints.paths import is_remote, nearest, path_of
from ..checkpoints.places import Where, places_of
from ..checkpoints.trajectory import Trajectory, open_trajectory
from ..cluster import ClusterConfig, local_workers, open_cluster, visible_device
from ..errors import InputError, amount
from ..numerics.long_segments import is_long, pairs
from ..numerics.objective import new_model
from ..numerics.quadrature import RULES
from ..numerics.schema import KEEP, holds
from ..numerics.settings import Settings, on_device, resolve
from ..recording import Recorder
from ..results import Manifest
from ..tasks.task import Task, loaded, pack_task
from .parts import PartsAsked
from .prepare import Destination, Preparation, prepare, unwrapped
from .requests import Costs, CostsRequest, answered, to_plain
from .run import default_out
from .shards import shards_of
from .worker import SAMPLED, measure

if TYPE_CHECKING:
    from torch import nn

_TRIED = 5  # iterates written to measure how long one takes


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """The costs of one loss: its data, its batches, gradient evaluations without refinement, and
    seconds of one evaluation and of all on one worker.

    `fastest_batch_size` took the least time of those tried, `largest_batch_size` is the largest
    that fits in memory. `bytes` are estimates after compression, by level of `--keep`.
    """

    examples: int
    groups: int
    batch_size: int
    fastest_batch_size: int
    largest_batch_size: int
    evaluations: int
    seconds_per_evaluation: float
    seconds: float
    bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs that `lca plan` prints.

    Attributes:
        segments: of the trajectory.
        parameters: of the model.
        device: "cuda" or "cpu".
        workers: that would share the work.
        losses: by name.
        keep: the level of `--keep` asked for, or the one a run would choose.
        shards: into which the data of every segment would be cut at that level; 1 where spans are
            replayed whole.
        seconds: by level, to evaluate all losses together on one worker; less than their sum where
            they share passes.
        bytes: by level, of the result's files after compression for all losses together, estimated
            from one segment and a batch of each loss.
        memory: by level, the bytes a worker needs.
        free: bytes of free space where the run would go; None in an object store, which reports no
            limit.
        free_memory: bytes that are free for each worker beside model and data.
        notes: for the user.
    """

    segments: int
    parameters: int
    device: str
    workers: int
    losses: dict[str, LossPlan]
    keep: str
    shards: int
    seconds: dict[str, float]
    bytes: dict[str, int]
    memory: dict[str, float]
    free: int | None
    free_memory: float
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """The costs of saving every iterate of a training, the initial weights included.

    `bytes_each` and `seconds_each` are of one iterate, the seconds measured on this disk, flushing
    included. `every` is the smallest interval at which the iterates fit into the `free` bytes; 0 if
    not even two do.
    """

    iterates: int
    parameters: int
    tensors: int
    bytes_each: int
    bytes: int
    free: int
    every: int
    seconds_each: float


def plan_recording(directory: str | Path, task: str | Path | Task, steps: int) -> RecordingPlan:
    """Estimate the cost of a recording before training, from the task's model and a few temporary
    files.

    Args:
        directory: where the iterates would go; its space and speed count.
        task: as for `run`.
        steps: optimiser steps of the training.

    Raises:
        InputError: if there are fewer than one step, or the task has no model that could be saved.
        ResourceError: if not even a few iterates can be written.
    """
    if steps < 1:
        raise InputError(f"--recording must be 1 or more optimiser steps, got {steps}.")
    place = nearest(Path(directory).resolve())
    model = new_model(loaded(task))
    with (
        tempfile.TemporaryDirectory(prefix=".lca-plan-", dir=place) as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # half precision is reported when recording
        seconds = _record_a_few(Path(folder), model)
        size, *_ = {file.stat().st_size for file in Path(folder).iterdir()}
        header = read_header(next(Path(folder).iterdir()))
    free = psutil.disk_usage(str(place)).free
    room = free // size
    return RecordingPlan(
        iterates=steps + 1,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tensors=len(header.tensors),
        bytes_each=size,
        bytes=(steps + 1) * size,
        free=free,
        every=steps // room + 1 if room >= 2 else 0,
        seconds_each=seconds,
    )


def _record_a_few(folder: Path, model: nn.Module) -> float:
    """Return the seconds that one iterate takes, measured by writing a few into a folder."""
    with Recorder(folder, model) as recorder:
        recorder.save(0)
        recorder.flush()
        started = time.perf_counter()
        for step in range(1, _TRIED + 1):
            recorder.save(step)
        recorder.flush()
    return (time.perf_counter() - started) / _TRIED


def plan(
    checkpoints: Where,
    task: str | Path | Task,
    *,
    losses: Sequence[str] = (),
    out: str | Path | None = None,
    workers: int | None = None,
    causes: bool = False,
    along: str | Path | None = None,
    tell: Callable[[str], None] = lambda stage: None,
    **requested: object,
) -> Plan:
    """Probe the task in this process and estimate what `run` with the same arguments costs.

    Args:
        checkpoints: as for `run`.
        task: as for `run`.
        losses: as for `run`.
        out: where the run would go; its free space counts.
        workers: how many would share the work; by default as for `run`.
        causes: as for `run`.
        along: as for `run`.
        tell: called with a few words when a stage begins.
        requested: settings as for `run`.

    Raises:
        InputError: for anything that `run` would reject before its first evaluation.
    """
    settings = resolve(requested, None)
    device = settings["device"] or visible_device()
    settings = on_device(settings, device)
    tell("reading the headers of the checkpoints")
    parts = PartsAsked(causes=causes, along=along)
    trajectory = open_trajectory(
        checkpoints,
        pattern=settings["pattern"],
        rename=settings["rename"],
        steps=settings["steps"],
        moments=parts.tells_causes(settings),
    )
    workers = workers or local_workers(device)
    path = path_of(out) if out is not None else _beside(checkpoints)
    destination = Destination(path=path, workers=workers)
    ready, costs = _measured(trajectory, task, list(losses), settings, destination, parts, tell)
    manifest = ready.manifest
    space = results.free_space(path)
    free = None if space is None else space[1]
    levels = {keep: ready.draft.at(keep) for keep in KEEP}
    stored = _stored(levels, list(manifest.losses), costs)
    return Plan(
        segments=manifest.segments,
        parameters=manifest.parameters,
        device=device,
        workers=workers,
        losses={name: _loss_plan(ready, levels, name, costs) for name in manifest.losses},
        keep=manifest.keep,
        shards=max(shards_of(manifest, name) for name in manifest.losses),
        seconds={keep: _seconds(level, costs) for keep, level in levels.items()},
        bytes=stored,
        memory=costs.memory,
        free=free,
        free_memory=ready.memory.free,
        notes=[*trajectory.notes, *ready.notes, *_shortages(ready, stored[manifest.keep], free)],
    )


def _measured(
    trajectory: Trajectory,
    task: str | Path | Task,
    losses: list[str],
    settings: Settings,
    destination: Destination,
    parts: PartsAsked,
    tell: Callable[[str], None],
) -> tuple[Preparation, Costs]:
    """Probe a task in this process, and time a few batches of it."""
    entry, data = pack_task(task)
    with open_cluster(ClusterConfig("inline"), settings["device"], threading.Event()) as cluster:
        parcel = cluster.deliver(data)
        tell("building the task, and probing it on a sample")
        ready = prepare(cluster, trajectory, entry, parcel, losses, settings, destination, parts)
        any_measured = next(iter(ready.manifest.losses.values())).measured
        request = CostsRequest(
            setup=ready.setup,
            sample=ready.sample,
            batch_sizes=ready.batch_sizes,
            segments_of_window=ready.manifest.length_of(0),
            measured=any_measured,
        )
        tell("timing a few batches")
        answer = answered(CostsRequest, measure(to_plain(request)))
        return ready, unwrapped(answer)


def _stored(levels: dict[str, Manifest], losses: list[str], costs: Costs) -> dict[str, int]:
    """Return the bytes of some losses after compression at each level of `--keep`."""
    return {
        keep: results.estimated_bytes(
            manifest, keep, {name: manifest.losses[name] for name in losses}, costs.compressed
        )
        for keep, manifest in levels.items()
    }


def _evaluations(manifest: Manifest) -> int:
    """Return how many gradients of a loss a run computes without refinement."""
    rule = RULES[manifest.settings["rule"]]
    per_segment = len(rule.nodes) - (1 if rule.has_start and rule.has_end else 0)
    evaluations = per_segment * manifest.segments
    evaluations += _stretches(manifest) if rule.has_end else 0
    return evaluations + _evaluations_of_path(manifest)


def _evaluations_of_path(manifest: Manifest) -> int:
    """Return how many more gradients the path band computes."""
    if manifest.settings["path_band"] != "on":
        return 0
    rule = RULES[manifest.settings["rule"]]
    lengths = manifest.lengths
    bent = [start for start in manifest.starts if is_long(lengths[start] or 0)]
    of_segment = 1 if 0.5 in rule.nodes else 2  # in the middle of the curve, and of the line
    of_ends = 0 if rule.has_end else _stretches(manifest)
    if not rule.has_start:
        of_ends += manifest.segments
    lines = set(pairs(lengths)).intersection(manifest.starts)
    return of_segment * len(bent) + len(lines) + of_ends


def _stretches(manifest: Manifest) -> int:
    """Return how many segments start from a checkpoint that is not the end of the segment before."""
    return sum(len(manifest.stretches(span)) for span in range(manifest.spans))


def _seconds(manifest: Manifest, costs: Costs) -> float:
    """Return the seconds of evaluating all losses together on one worker."""
    measured_segments = sum(first < manifest.segments for first in SAMPLED)
    evaluations_at_once = len(RULES[manifest.settings["rule"]].nodes)
    return (
        costs.together[manifest.keep] * _evaluations(manifest)
        + costs.recalibrating * (manifest.segments + _stretches(manifest))
        + costs.higher * evaluations_at_once * measured_segments
    )


def _shortages(ready: Preparation, needed: float, free: int | None) -> Iterator[str]:
    """Describe the memory and space that a run would lack."""
    if ready.short_of:
        yield ready.short_of
    if free is not None and needed > free:
        yield f"the result will need about {amount(needed)}, and {amount(free)} are free there"


def _beside(checkpoints: Where) -> Path:
    """Return where the result would go; a local directory for remote checkpoints or several places."""
    first, *more = places_of(checkpoints)
    return Path("run.lca") if is_remote(first.root) or more else default_out(checkpoints)


def _loss_plan(
    ready: Preparation, levels: dict[str, Manifest], name: str, costs: Costs
) -> LossPlan:
    manifest, record, measured = ready.manifest, ready.manifest.losses[name], costs.losses[name]
    evaluations, seconds = _evaluations(manifest), measured.seconds + measured.examples
    if record.per is not None and not holds(manifest.keep, "units"):
        seconds = measured.examples
    return LossPlan(
        examples=record.examples,
        groups=len(record.groups or []),
        batch_size=record.batch_size,
        fastest_batch_size=measured.fastest,
        largest_batch_size=measured.largest,
        evaluations=evaluations,
        seconds_per_evaluation=seconds,
        seconds=evaluations * seconds,
        bytes=_stored(levels, [name], costs),
    )
