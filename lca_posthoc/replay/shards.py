"""Choose which losses are cut into shards of their data, into how many, and say why others are not.

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

_SPANS_EACH = 4  # for each worker: with fewer, spans are single segments, their ends computed twice


def shards_of(manifest: Manifest, loss: str) -> int:
    """Return how many shards the data of a loss is cut into."""
    record, shards = manifest.losses[loss], manifest.settings["shards"]
    assert shards is not None, "a run is laid out once its number of shards is chosen"
    return min(shards, _batches(record)) if is_cut(manifest, loss) else 1


def is_cut(manifest: Manifest, loss: str) -> bool:
    """Tell whether the spans of a loss are computed in shards."""
    return manifest.settings["shards"] != 1 and _why_whole_in(manifest, loss) is None


def _batches(record: LossRecord) -> int:
    """Return the batches of a loss's data; 1 of a term of the parameters."""
    return 1 if record.on is None else -(-record.examples // record.batch_size)


def why_whole(name: str, record: LossRecord, settings: Settings, keep: str) -> str | None:
    """Say why a loss cannot be cut into shards; None where it can be."""
    if holds(keep, "statistics"):
        return f"--keep {keep} takes the whole gradient of every parameter"
    if settings["signal"] is not None:
        return "--causes takes the whole gradient of the training loss"
    if settings["path_band"] == "on":
        return "--path-band evaluates beside the straight lines as well"
    if "directions" in settings:
        return "--along takes sums along directions of a file"
    if settings["norm_stats"] == "recalibrated":
        return "--norm-stats recalibrated goes over all of the data at every checkpoint"
    if record.groups is not None:
        return f"loss {name!r} has groups"
    if record.along is not None:
        return f"loss {name!r} takes its batches in the order of the groups of {record.along!r}"
    if record.replicates:
        return f"loss {name!r} is over a random subset, whose parts give its standard error"
    if record.per is not None:
        return f"loss {name!r} tells every {record.per} apart"
    return None


def choose_shards(
    segments: int, workers: int, losses: Mapping[str, LossRecord], settings: Settings, keep: str
) -> int:
    """Return the number of shards of a run where none is asked for: one for each worker, as far as
    there are batches, where segments are few and every loss can be cut; else 1.

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
    """Refuse a number of shards that is asked for where a loss cannot be cut.

    Raises:
        InputError: says why.
    """
    reasons = (why_whole(name, record, settings, keep) for name, record in losses.items())
    why = next((reason for reason in reasons if reason is not None), None)
    if shards > 1 and why is not None:
        raise InputError(
            f"--shards {shards} cannot be had: {why}. Leave --shards out, or use --keep tensors or "
            "--keep units, with losses over all of their data."
        )


def about_shards(manifest: Manifest, workers: int, new: Iterable[str]) -> list[str]:
    """Say into how many shards the data is cut, and which of new losses cannot be.

    Args:
        manifest: of the run.
        workers: that will share the work.
        new: names of losses.
    """
    if manifest.settings["shards"] == 1:
        return []
    names = list(new)
    cut = [shards_of(manifest, name) for name in names if is_cut(manifest, name)]
    notes = []
    if cut:
        notes.append(
            f"the data of each segment is cut into {count(max(cut), 'shard')}, so that "
            f"{count(manifest.segments, 'segment')} can keep up to {max(cut) * manifest.segments} "
            f"workers busy; there {'is' if workers == 1 else 'are'} {workers}. The number of shards "
            "is recorded, and results follow from it, never from the number of workers"
        )
    for name in names:
        why = _why_whole_in(manifest, name)
        if why is not None:
            notes.append(f"spans of loss {name!r} are replayed whole, not in shards: {why}")
    return notes


def why_not_cut(manifest: Manifest, in_order_only: Iterable[str]) -> list[str]:
    """Say why the data of a run with idle workers is not cut into shards, where it could not be.

    Args:
        manifest: of the run.
        in_order_only: splits whose examples can only be read in order.
    """
    reasons = [_why_whole_in(manifest, name) for name in manifest.losses]
    reasons += [
        f"every shard of split {split!r}, whose examples can only be read in order, reads all that "
        "come before it"
        for split in in_order_only
    ]
    why = next((reason for reason in reasons if reason is not None), None)
    if why is None:
        return []
    return [f"its data is not cut into shards, which would keep more workers busy: {why}"]


def _why_whole_in(manifest: Manifest, name: str) -> str | None:
    return why_whole(name, manifest.losses[name], manifest.settings, manifest.keep)
