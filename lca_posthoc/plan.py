"""What a run would cost: evaluations, time from a few timed batches, bytes against free space."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .cluster import Where, local_workers, open_cluster, visible_device
from .preparation import Preparation, prepare, unwrapped
from .quadrature import RULES
from .records import KEEP
from .replay import default_out
from .settings import on_device, resolve
from .store import required_bytes
from .task import Task, pack
from .trajectory import open_trajectory
from .worker import SAMPLED, measure


@dataclass(frozen=True)
class LossPlan:
    """One loss: what it is over, its batches, gradient evaluations without refinement, seconds of one and of all on one worker.

    `fastest_batch_size` of those tried took the least time, `largest_batch_size` is the largest that fits in memory; `bytes` are
    before compression, under each level of `--keep`.
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


@dataclass(frozen=True)
class Plan:
    """What `lca plan` prints.

    `seconds` is what all losses together take on one worker, which is less than their sum where they share passes; `bytes` are
    before compression, for all losses together; `memory` is what a worker holds.
    """

    segments: int
    parameters: int
    device: str
    workers: int
    losses: dict[str, LossPlan]
    seconds: float
    bytes: dict[str, int]
    free: int
    memory: int
    notes: list[str]


def plan(
    checkpoints: str | Path,
    task: str | Path | Task,
    *,
    losses: Sequence[str] = (),
    out: str | Path | None = None,
    workers: int | None = None,
    **asked: Any,
) -> Plan:
    """Probe the task in this process and say what `run` with the same arguments would cost.

    Args:
        checkpoints: directory of safetensors iterates.
        task: as for `run`.
        losses: as for `run`.
        out: where the run would go; tells whose free space counts.
        workers: how many would share the work; by default as for `run`.
        asked: settings as for `run`.

    Raises:
        InputError: for anything `run` would refuse before its first evaluation.
    """
    settings = resolve(asked, None)
    settings = on_device(settings, settings["device"] or visible_device())
    trajectory = open_trajectory(
        checkpoints, pattern=settings["pattern"], rename=settings["rename"], steps=settings["steps"]
    )
    workers = workers or local_workers(settings["device"])
    entry, data = pack(task)
    with open_cluster(Where("inline"), settings["device"], threading.Event()) as cluster:
        parcel = cluster.deliver(data)
        ready = prepare(cluster, trajectory, entry, parcel, list(losses), settings, workers=workers)
        some = next(iter(ready.manifest.losses.values())).measured
        spec = {**ready.common, **ready.probe_part, "batch_sizes": ready.batch_sizes, "measured": some}
        measured = unwrapped(measure(spec))
    manifest = ready.manifest
    found = {name: _loss_plan(ready, name, measured["losses"][name]) for name in manifest.losses}
    return Plan(
        manifest.segments,
        manifest.parameters,
        manifest.settings["device"],
        workers,
        found,
        measured["together"] * max(loss.evaluations for loss in found.values())
        + measured["higher"] * _at_once(settings["rule"]) * sum(at < manifest.segments for at in SAMPLED),
        {keep: required_bytes(manifest, keep, manifest.losses.values()) for keep in KEEP},
        psutil.disk_usage(str(_existing(Path(out) if out is not None else default_out(checkpoints)))).free,
        measured["memory"],
        [*trajectory.notes, *ready.notes, *([ready.short_of] if ready.short_of else [])],
    )


def _existing(place: Path) -> Path:
    """The nearest directory above a path that is there already."""
    place = place.resolve().parent
    return place if place.exists() else _existing(place)


def _at_once(rule: str) -> int:
    """Evaluations of one segment on its own."""
    return len(RULES[rule].nodes)


def _loss_plan(ready: Preparation, name: str, measured: dict[str, Any]) -> LossPlan:
    manifest, record = ready.manifest, ready.manifest.losses[name]
    rule = RULES[manifest.settings["rule"]]
    per_segment = len(rule.nodes) - (1 if rule.has_start and rule.has_end else 0)
    evaluations = per_segment * manifest.segments + (manifest.spans if rule.has_end else 0)
    return LossPlan(
        record.examples,
        len(record.groups or []),
        record.batch_size,
        measured["fastest"],
        measured["largest"],
        evaluations,
        measured["seconds"],
        evaluations * measured["seconds"],
        {keep: required_bytes(manifest, keep, [record]) for keep in KEEP},
    )
