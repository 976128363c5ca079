"""Repair a run: `lca repair` calls `repair`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import results
from ..checkpoints.paths import path_of
from ..checkpoints.places import found_again
from ..cluster import ClusterConfig
from ..results import RunWriter
from ..tasks.task import Task, pack_task
from .display import listening
from .driver import Driver, Job, is_durable
from .events import Listener, Log


@dataclass(frozen=True)
class Repaired:
    """The outcome of a repair: the damage, the recomputed spans by loss, and the number of leftover
    files removed.
    """

    damage: list[results.Damage]
    spans: dict[str, list[int]]
    leftovers: int


def repair(
    path: str | Path,
    task: str | Path | Task,
    *,
    checkpoints: str | Path | None = None,
    cluster: str = "local",
    workers: int | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    insecure: bool = False,
    durability: str = "full",
    progress: Listener | None = None,
) -> Repaired:
    """Recompute exactly the damaged spans of a run, restore its metadata, and remove what killed
    writers left.

    Args:
        path: the run directory.
        task: as for `run`; its losses must be those of the run.
        checkpoints: where the checkpoints are now; by default their recorded place.
        cluster: as for `run`, with the options that belong to it.
        workers: as for `run`.
        tls_ca: as for `run`.
        tls_cert: as for `run`.
        tls_key: as for `run`.
        insecure: as for `run`.
        durability: as for `run`.
        progress: as for `run`.

    Raises:
        InputError: if `path` is no run, or the task or the checkpoints are not those of the run.
        SpanError: if damaged spans could not be recomputed.
    """
    place, durable = path_of(path), is_durable(durability)
    where = ClusterConfig(
        kind=cluster,
        workers=workers,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
    )
    entry, data = pack_task(task)
    manifest = results.read_manifest(place)
    damage, leftovers = _cleaned(place, durable)
    losses = {
        part.loss: True
        for part in damage
        if part.loss is not None and (part.span, part.window) != (None, None)
    }
    root = checkpoints if checkpoints is not None else manifest.root
    with listening(progress) as listener:
        job = Job(
            checkpoints=found_again(root, manifest.settings.get("places", ())),
            task=entry,
            data=data,
            losses=list(losses),
            path=place,
            asked={},
            span=None,
            durable=durable,
            damage=damage,
        )
        driver = Driver(job, Log(listener))
        if losses:
            driver.run(where)
    return Repaired(damage, driver.repair_spans or {}, leftovers)


def _cleaned(path: Path, durable: bool) -> tuple[list[results.Damage], int]:
    """Restore a run's metadata and remove what killed writers left; return its damage, and how many
    files were removed.
    """
    with results.hold(path, durable=durable) as lock:
        writer = RunWriter.open(path, durable)
        problems = list(results.verify(path))
        writer.restore_metadata()
        writer.sweep()
        lock.unclean = False
        leftovers = [problem for problem in problems if isinstance(problem, results.Leftover)]
        writer.remove_leftovers(leftovers)
    damage = [problem for problem in problems if isinstance(problem, results.Damage)]
    return damage, len(leftovers)
