"""Write TensorBoard events: scalars of every segment and histograms of the allocation, over
training steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..base.declarations import declared_findings
from ..base.text import count, no_loss
from ..errors import InputError, optional_package
from ..findings import curve, helping, layers
from ..numerics.schema import holds
from ..results import LossResults, Run
from .choose import Say, too_little_kept
from .tables import whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTOGRAMS = 500  # of a loss, over its segments and groups
SCALARS = 1_000_000  # of a loss, over its segments and curves
_FINDINGS = ("curve", "helping", "layers")


def write_events(run: Run, place: Path, losses: list[str], requested: list[str], say: Say) -> None:
    """Write a directory of events for each loss.

    Scalars (float64) are at the training step where a segment ends: `loss`, `predicted`,
    `residual`; `helping` and `hurting`, shares of the parameters; `allocated/LAYER` of the segment
    and `cumulative/LAYER` up to it. For a loss with groups, each is `…/group GROUP`. Histograms
    `allocation` hold the stored bins, with exact zeros in the bin that ends at 0. A run made with
    `--keep tensors` or `units` has neither shares nor histograms.

    Args:
        run: an open run.
        place: an empty directory.
        losses: names; empty for all.
        requested: of curve, helping and layers; empty for all. Histograms come with `helping`.
        say: called with a sentence on what is skipped or thinned.

    Raises:
        InputError: for an unknown name, a finding that is no curve over training, or one that the
            run does not allow.
        ResourceError: if tensorboard is not installed.
    """
    for name in losses:
        if name not in run:
            raise InputError(no_loss(run.path, name, run))
    for name in requested:
        if name not in _FINDINGS:
            raise InputError(
                f"TensorBoard takes {', '.join(_FINDINGS)}, not {name!r}. Choose another --format "
                "for it."
            )
    chosen = requested or _kept(run.manifest.keep, say)
    optional_package("tensorboard", "TensorBoard")
    writers, written = optional_package("torch.utils.tensorboard", "TensorBoard"), 0
    for name in dict.fromkeys(losses or run):
        results = run[name]
        if not results.progress()["segments_done"]:
            say(
                f"loss {name!r} is skipped: it has no finished segment yet. Let `lca run` commit "
                "a span first."
            )
            continue
        for name_of_finding in requested:
            if (obstacle := too_little_kept(results, name_of_finding)) is not None:
                raise InputError(
                    f"{name_of_finding} of loss {name!r} cannot be exported: {obstacle}"
                )
        written += 1
        with writers.SummaryWriter(str(place / run.manifest.losses[name].key)) as writer:
            _write_scalars(writer, results, chosen, say)
            if "helping" in chosen:
                _write_histograms(writer, results, say)
    if not written:
        raise InputError(
            f"{run.path} has nothing to export yet. Let `lca run` commit a span first."
        )


def _kept(keep: str, say: Say) -> list[str]:
    """Return the findings that a level of `--keep` allows, and say which it does not."""
    allowed = [name for name in _FINDINGS if holds(keep, declared_findings()[name].level)]
    if "helping" not in allowed:
        say(
            f"the run keeps {keep}, so shares of parameters that help and histograms (--keep "
            "statistics) are skipped."
        )
    return allowed


def _write_scalars(
    writer: SummaryWriter, results: LossResults, requested: list[str], say: Say
) -> None:
    curves = [line for name in requested for line in _curves(results, name)]
    steps = results.steps["step_end"].values
    rows = _thinned(len(steps), SCALARS // max(1, len(curves)))
    if len(rows) < len(steps):
        say(
            f"loss {results.name!r} has {count(len(curves), 'curve')}: {len(rows):,} of "
            f"{len(steps):,} segments are written."
        )
    for tag, values in curves:
        for row in rows:
            writer.add_scalar(
                whole(tag), values[row], int(steps[row]), new_style=True, double_precision=True
            )


def _curves(results: LossResults, finding: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tag of each curve, and its values over the segments."""
    if finding == "curve":
        data, names = curve(results), ["loss", "predicted", "residual"]
    elif finding == "helping":
        data, names = helping(results), ["helping", "hurting"]
    else:
        data, names = layers(results), ["allocated", "cumulative"]
    for name in names:
        yield from _apart(name, data[name])


def _apart(tag: str, values: xr.DataArray) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield each curve of a variable: one for every layer and group."""
    for dim, prefix in (("layer", ""), ("group", "group ")):
        if dim in values.dims:
            for index, label in enumerate(values[dim].values):
                yield from _apart(f"{tag}/{prefix}{label}", values.isel({dim: index}, drop=True))
            return
    yield tag, values.values


def _write_histograms(writer: SummaryWriter, results: LossResults, say: Say) -> None:
    stored = results.histogram
    groups = (
        [""]
        if "group" not in stored.dims
        else [f"/group {label}" for label in stored["group"].values]
    )
    steps, sums = results.steps["step_end"].values, results.tensors
    chosen = _thinned(len(steps), max(1, HISTOGRAMS // len(groups)))
    if len(chosen) < len(steps):
        say(
            f"loss {results.name!r}: histograms of {len(chosen):,} of {len(steps):,} segments are "
            "written."
        )
    edges = np.clip(
        stored["edge"].values, -np.finfo("float32").max, np.finfo("float32").max
    ).astype("float64")
    totals = (
        sums["allocated"]
        .isel(tensor=np.flatnonzero(sums["kind"].values == "parameter"))
        .sum("tensor")
        .values
    )
    for segment in chosen:
        counts = stored["count"].isel(step=segment).values.reshape(len(groups), -1)
        zeros = np.atleast_1d(stored["zero"].isel(step=segment).values)
        for row, label in enumerate(groups):
            bins = _histogram(counts[row], int(zeros[row]), edges)
            total = float(np.atleast_1d(totals[segment])[row])
            writer.add_histogram_raw(
                whole(f"allocation{label}"), sum=total, global_step=int(steps[segment]), **bins
            )


def _histogram(
    counts: np.ndarray[Any, Any], zeros: int, edges: np.ndarray[Any, Any]
) -> dict[str, float | list[float]]:
    """Return the occupied range in TensorBoard's format: each bin by its upper edge, with the bin
    below it empty.
    """
    counts = counts.copy()
    counts[len(counts) // 2 - 1] += zeros
    used = np.flatnonzero(counts)
    low, high = (
        (int(used[0]), int(used[-1]) + 1) if len(used) else (len(counts) // 2 - 1, len(counts) // 2)
    )
    middles = (edges[low:high] + edges[low + 1 : high + 1]) / 2
    occupied = counts[low:high].copy()
    of_squares = occupied.copy()
    if low <= len(counts) // 2 - 1 < high:
        of_squares[len(counts) // 2 - 1 - low] -= zeros
    return {
        "min": float(edges[low]),
        "max": float(edges[high]),
        "num": int(counts.sum()),
        "sum_squares": float((of_squares * middles**2).sum()),
        "bucket_limits": [float(edges[low]), *edges[low + 1 : high + 1].tolist()],
        "bucket_counts": [0, *occupied.tolist()],
    }


def _thinned(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced positions among `count`, always including the last."""
    if count <= most:
        return list(range(count))
    return sorted(
        {count - 1 - gap for gap in np.linspace(0, count - 1, max(1, most)).astype(int).tolist()}
    )
