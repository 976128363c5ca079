"""Decide into how many shards the data of losses is cut, and tell why others stay whole.

A run records one number of shards. A loss has as many, or as many as its data has batches, or one
where it cannot be cut: its spans are then replayed whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..base.text import count
from ..errors import InputError
from ..numerics.schema import holds
from ..numerics.settings import Settings
from ..results import LossRecord, Manifest

# for each worker; with fewer, spans are single segments, whose ends are computed twice
_SPANS_EACH = 4


def shards_of(manifest: Manifest, loss: str) -> int:
    """Return how many shards the data of a loss is cut into.

    Args:
        manifest: of the run.
        loss: its name.
    """
    record, shards = manifest.losses[loss], manifest.settings["shards"]
    assert shards is not None, "a run is laid out once its number of shards is chosen"
    return min(shards, _batches(record)) if is_cut(manifest, loss) else 1


def is_cut(manifest: Manifest, loss: str) -> bool:
    """Tell whether the spans of a loss are computed in shards.

    Args:
        manifest: of the run.
        loss: its name.
    """
    return manifest.settings["shards"] != 1 and _why_whole_in(manifest, loss) is None


def _batches(record: LossRecord) -> int:
    """Return the number of batches of a loss; 1 for a term of the parameters."""
    return 1 if record.on is None else -(-record.examples // record.batch_size)


def why_whole(name: str, record: LossRecord, settings: Settings, keep: str) -> str | None:
    """Tell why a loss cannot be cut into shards; None where it can be.

    Args:
        name: of the loss.
        record: what the run records of it.
        settings: of the run.
        keep: its level of `--keep`.
    """
    if holds(keep, "statistics"):
        return f"--keep {keep} needs the whole gradient of every parameter"
    if settings["signal"] is not None:
        return "--causes needs the whole gradient of the training loss"
    if "directions" in settings:
        return "--along needs sums along directions of a file"
    if settings["norm_stats"] == "recalibrated":
        return "--norm-stats recalibrated reads all of the data at every checkpoint"
    if record.groups is not None:
        return f"loss {name!r} has groups"
    if record.along is not None:
        return f"loss {name!r} takes its batches in the order of the groups of {record.along!r}"
    if record.replicates:
        return f"loss {name!r} is over a random subset, whose parts give its standard error"
    if record.per is not None:
        return f"loss {name!r} gives results per {record.per}"
    return None


def choose_shards(
    segments: int, workers: int, losses: Mapping[str, LossRecord], settings: Settings, keep: str
) -> int:
    """Return the default number of shards of a run: one for each worker where segments are few and
    every loss can be cut; else 1.

    There are never more shards than batches.

    Args:
        segments: of the trajectory.
        workers: that will share the work.
        losses: of the run.
        settings: of the run.
        keep: its level of `--keep`.
    """
    if workers == 1 or segments >= _SPANS_EACH * workers:
        return 1
    reasons = [why_whole(name, record, settings, keep) for name, record in losses.items()]
    if any(reason is not None for reason in reasons):
        return 1
    return min(workers, max(map(_batches, losses.values()), default=1))


def refuse_uncut(
    shards: int, losses: Mapping[str, LossRecord], settings: Settings, keep: str
) -> None:
    """Reject a number of shards if a loss cannot be cut.

    Args:
        shards: the number asked for.
        losses: of the run.
        settings: of the run.
        keep: its level of `--keep`.

    Raises:
        InputError: with the reason.
    """
    reasons = (why_whole(name, record, settings, keep) for name, record in losses.items())
    why = next((reason for reason in reasons if reason is not None), None)
    if shards > 1 and why is not None:
        raise InputError(
            f"--shards {shards} is not possible: {why}. Leave one of them out"
            f"{', or use --keep tensors or --keep units' if holds(keep, 'statistics') else ''}."
        )


def about_shards(manifest: Manifest, workers: int, new: Iterable[str]) -> list[str]:
    """Describe into how many shards the data is cut, and which new losses cannot be cut.

    Args:
        manifest: of the run.
        workers: that will share the work.
        new: names of losses.
    """
    shards = manifest.settings["shards"]
    assert shards is not None, "a run is laid out once its number of shards is chosen"
    if shards == 1:
        return []
    names = list(new)
    most = max((shards_of(manifest, name) for name in names if is_cut(manifest, name)), default=0)
    notes = []
    if most:
        fewer = (
            f", not the {shards} of --shards, because it has {count(most, 'batch', 'batches')} and a "
            "shard takes at least one (a smaller --batch-size makes more)"
        )
        notes.append(
            f"the data of each segment is cut into {count(most, 'shard')}"
            f"{fewer if most < shards else ''}, so that "
            f"{count(manifest.segments, 'segment')} can keep up to {most * manifest.segments} "
            f"workers busy; there {'is' if workers == 1 else 'are'} {workers}. The run records the "
            "number of shards, and results depend on it, never on the number of workers"
        )
    for name in names:
        why = _why_whole_in(manifest, name)
        if why is not None:
            notes.append(f"spans of loss {name!r} are replayed whole, not in shards: {why}")
    return notes


def why_not_cut(manifest: Manifest, in_order_only: Iterable[str]) -> list[str]:
    """Tell why the data of a run with idle workers is not cut into shards.

    Args:
        manifest: of the run.
        in_order_only: splits whose examples can only be read in order.
    """
    reasons = [_why_whole_in(manifest, name) for name in manifest.losses]
    reasons += [
        f"every shard of split {split!r}, whose examples can only be read in order, would read all "
        "examples before it"
        for split in in_order_only
    ]
    why = next((reason for reason in reasons if reason is not None), None)
    if why is None:
        return []
    return [f"its data is not cut into shards, which would keep more workers busy: {why}"]


def _why_whole_in(manifest: Manifest, name: str) -> str | None:
    return why_whole(name, manifest.losses[name], manifest.settings, manifest.keep)
