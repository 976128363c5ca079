"""Compute the headline figures of a loss, and its tables of tensors and of modules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Generic, NotRequired, TypedDict, TypeGuard, TypeVar, cast

import numpy as np
import xarray as xr

from ..errors import LCAError
from ..results import LossResults
from .bands import bands_of_shifts, long_segments, other_paths, path_bands
from .causes import causes
from .common import has_part, label_of, moving_buffers, scale_of, segments_error
from .directions import directions

F = TypeVar("F", float, list[float])  # a figure of a loss, or of each of its groups


class Part(TypedDict, Generic[F]):
    """The figures of a tensor or a module; tensors have a kind, and both a share that helped where
    the run keeps statistics.
    """

    name: str
    kind: NotRequired[str]
    parameters: int
    moved: bool
    allocated: F
    standard_error: float | None
    path_band: F | None
    segments_error: F | None
    helping: NotRequired[F]


class Causes(TypedDict, Generic[F]):
    """The sums of a loss by what moved the weights, and Σ|A_rest| / Σ|A| over parameters."""

    signal: str
    allocated: dict[str, F]
    rest_share: F


class Directions(TypedDict, Generic[F]):
    """The loss change inside the subspace of a run's directions and outside of it, and the share of
    Σ‖Δθ‖² inside.
    """

    directions: int
    captured: float
    captured_by_chance: float
    inside: F
    outside: F


class Figures(TypedDict, Generic[F]):
    """The figures of one loss, see `summary`; shares where the run keeps statistics."""

    segments: int
    long_segments: int
    sampled_of: int | None
    identity_change: float | None
    gaps: int
    gaps_change: F | None
    segments_error: F | None
    first_step: int
    last_step: int
    norm_stats: str | None
    examples: int
    parameters: int
    loss_start: F
    loss_end: F
    loss_change: F
    allocated: F
    buffers: F | None
    remainder: F | None
    residual: F
    path_band: F | None
    doubling: F | None
    max_segment_residual: F
    unconverged: int
    evaluations: int
    forward_passes: int
    helping: NotRequired[F]
    hurting: NotRequired[F]
    zero: NotRequired[F]
    precision: str
    precision_error: float | None
    precision_segments: int
    precision_examples: int
    groups: list[int] | list[str] | None
    group_examples: list[int] | None
    group_weights: list[float] | None
    tensors: list[Part[F]]
    modules: list[Part[F]]
    causes: NotRequired[Causes[F]]
    directions: NotRequired[Directions[F]]


Summary = Figures[float] | Figures[list[float]]


def is_plain(figures: Summary) -> TypeGuard[Figures[float]]:
    """Tell whether figures are of a loss without groups."""
    return figures["groups"] is None


def is_grouped(figures: Summary) -> TypeGuard[Figures[list[float]]]:
    """Tell whether figures are of a loss with groups."""
    return figures["groups"] is not None


def summary(results: LossResults) -> Summary:
    """Return the figures of one loss that `lca summary --json` prints, over the finished segments.

    Figures are of training steps `first_step` to `last_step`. `norm_stats` names the statistics
    that normalisation layers used, null without such layers. `buffers` is the part of `allocated`
    that belongs to buffers (running statistics), null without buffers. `residual = loss_change −
    allocated`, and `allocated` includes the tensors that are not stored (`remainder`). `helping +
    hurting + zero = 1`, counted over parameters × segments without buffers; a run made with `--keep
    tensors` or `units` does not count, and lacks these keys, also for tensors and modules. For a
    loss with groups, figures are lists over the groups. `precision_error` is the measured Σ|A − A*|
    / Σ|A*| of the gradient at the start of up to three moving segments, with A* one precision
    higher, on at most `precision_examples` examples (0: on none, or for a loss without a split).
    `standard_error` of a tensor's allocation is that of drawing a random subset. Both are null
    where they do not apply.

    Of `segments`, `long_segments` are longer than one training step; shares exclude them, and are
    missing if no others exist. `path_band` of a tensor or a module is how much other paths through
    the same checkpoints would change its sum, see `bands.path_bands`, null where no segment is long
    or the run did not measure it; that of the loss is the sum over modules. `doubling` is the share
    of Σ|sum| over modules that leaving every second checkpoint out would move between them.

    For a random part of the segments (`--segments`), `sampled_of` is the number of segments they
    were drawn from, null for other runs. `loss_change`, `allocated`, `buffers`, `remainder` and
    `residual` are then estimates for all of these, `loss_start` and `loss_end` are those at
    `first_step` and `last_step`, between the first and the last drawn segment, and `segments_error`
    is the standard error of `allocated`, null for other runs. `identity_change` is no estimate: it
    is the loss change from the first checkpoint to the last, but on the first 256 examples alone
    (fewer if the data or a batch has fewer).

    `gaps` counts gaps between checkpoints that are not replayed, between bursts or ranges of steps;
    `loss_change` excludes them, and `gaps_change` is the loss change in all of them, null without
    gaps and for a random part of the segments.

    `modules` holds the same figures of the modules that hold the tensors, in the model's order:
    sums over the parameters of each. Buffers that moved are a module of their own, "NAME buffer",
    as in `layers`. `moved` is false where no element moved on any segment. Runs with `--causes`
    have `causes` too, those with `--along` `directions`, see the findings of these names.

    Args:
        results: one loss of a run.

    Returns:
        Plain numbers; losses and allocations in units of loss, shares between 0 and 1.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
    """
    steps, tensors, record = results.steps, results.tensors, results.record
    segments = steps.sizes["step"]
    if not segments:
        raise LCAError(
            f"loss {results.name!r} has no finished segment yet. Let `lca run` commit a span first."
        )
    larger = scale_of(results, segments)
    change = larger * _total(steps["loss_end"] - steps["loss_start"])
    remainder = larger * _total(steps["remainder"]) if "remainder" in steps else None
    allocated = larger * _total(tensors["allocated"], "tensor") + (
        0.0 if remainder is None else remainder
    )
    counted = tensors.isel(tensor=tensors["kind"].values == "parameter")
    buffers = tensors.isel(tensor=tensors["kind"].values == "buffer")
    measured = steps["precision_error"].values[~np.isnan(steps["precision_error"].values)]
    sampled = record.examples / max(1, record.total)
    markers = results.markers
    figures = {
        "segments": segments,
        **_of_sample(results, steps, tensors),
        "first_step": int(steps["step"].values[0]),
        "last_step": int(steps["step_end"].values[-1]),
        "norm_stats": results.norm_stats,
        "examples": record.examples,
        "parameters": int(counted["elements"].sum()),
        "loss_start": _plain(steps["loss_start"][0].values),
        "loss_end": _plain(steps["loss_end"][-1].values),
        "loss_change": _plain(change),
        "gaps": len(results.manifest.breaks),
        "gaps_change": _gaps_change(results, steps, change),
        "allocated": _plain(allocated),
        "buffers": _plain(larger * _total(buffers["allocated"], "tensor"))
        if buffers.sizes["tensor"]
        else None,
        "remainder": None if remainder is None else _plain(remainder),
        "residual": _plain(change - allocated),
        "max_segment_residual": _plain(abs(steps["residual"]).max("step").values),
        "unconverged": int((~steps["converged"]).sum()),
        "evaluations": sum(marker["evaluations"] for marker in markers),
        "forward_passes": sum(marker["forward_passes"] for marker in markers),
        **_shares(counted),
        "precision": results.precision,
        "precision_error": float(measured.mean()) if len(measured) else None,
        "precision_segments": len(measured),
        "precision_examples": results.precision_examples if len(measured) else 0,
        "groups": record.groups,
        "group_examples": record.counts,
        "group_weights": None if record.groups is None else _plain(steps["weight"][0].values),
        **_rows(results, tensors, sampled),
        **_parts(results),
    }
    return cast("Summary", figures)


def _rows(results: LossResults, tensors: xr.Dataset, sampled: float) -> dict[str, object]:
    """Return the figures of every tensor and module, the number of long segments, and how much
    other paths move between modules.
    """
    modules = _modules(tensors)
    of_tensors = path_bands(results, [[one] for one in range(tensors.sizes["tensor"])])
    shifts = other_paths(results, list(modules.values()))
    of_modules = None if shifts is None else bands_of_shifts(results, shifts)
    return {
        "long_segments": int(long_segments(tensors).sum()),
        "path_band": None if of_modules is None else _plain(of_modules.sum(-1)),
        "doubling": None if shifts is None else _doubling(shifts[1], tensors, modules.values()),
        "tensors": [
            {
                "name": str(tensors["tensor"].values[position]),
                "kind": str(tensors["kind"].values[position]),
                **_row(results, tensors.isel(tensor=[position]), sampled, of_tensors, position),
            }
            for position in range(tensors.sizes["tensor"])
        ],
        "modules": [
            {
                "name": name,
                **_row(results, tensors.isel(tensor=positions), sampled, of_modules, number),
            }
            for number, (name, positions) in enumerate(modules.items())
        ],
    }


def _doubling(
    shifts: np.ndarray[Any, Any], tensors: xr.Dataset, modules: Iterable[list[int]]
) -> float | list[float] | None:
    """Return the share of Σ|sum| over modules that leaving every second checkpoint out moves; None
    without doubled lines.

    Args:
        shifts: of doubled lines, (lines, [group, ]modules).
        tensors: their sums.
        modules: positions of the tensors of each.
    """
    if not len(shifts):
        return None
    over_training = tensors["allocated"].transpose("step", ..., "tensor").values.sum(0)
    sums = np.stack([over_training[..., some].sum(-1) for some in modules], axis=-1)
    size = np.abs(sums).sum(-1)
    return _plain(np.abs(shifts.sum(0)).sum(-1) / np.where(size > 0, size, np.inf))


def _parts(results: LossResults) -> dict[str, object]:
    """Return the figures of a run's optional parts."""
    figures: dict[str, object] = {}
    if has_part(results, "causes"):
        split = causes(results)
        sums = {
            str(cause): _plain(split["total"].sel(cause=cause).sum("layer").values)
            for cause in split["cause"].values
        }
        figures["causes"] = {
            "signal": split.attrs["signal"],
            "allocated": sums,
            "rest_share": _plain(split["rest_overall"].values),
        }
    if has_part(results, "along"):
        inside = directions(results)
        figures["directions"] = {
            "directions": inside.sizes["direction"],
            "captured": float(inside["captured_total"]),
            "captured_by_chance": float(inside["captured_by_chance"]),
            "inside": _plain(inside["inside_total"].values),
            "outside": _plain(inside["outside_total"].values),
        }
    return figures


def _shares(counted: xr.Dataset) -> dict[str, float | list[float]]:
    """Return the shares of parameters × segments that helped, hurt and did nothing; none where they
    were not counted.
    """
    single = ~long_segments(counted)
    if "helping" not in counted or not single.any():
        return {}
    counted = counted.isel(step=single)
    # there may be only buffers
    elements = max(1, int(counted["elements"].sum()) * counted.sizes["step"])
    helping, hurting = (
        counted[name].sum(("step", "tensor")).values for name in ("helping", "hurting")
    )
    return {
        "helping": _plain(helping / elements),
        "hurting": _plain(hurting / elements),
        "zero": _plain((elements - helping - hurting) / elements),
    }


def _modules(tensors: xr.Dataset) -> dict[str, list[int]]:
    """Return the positions of each module's tensors, without unmoved buffers beside parameters."""
    buffers, members = moving_buffers(tensors), dict[str, list[int]]()
    for position, name in enumerate(map(str, tensors["tensor"].values)):
        members.setdefault(label_of(name, "module", buffers), []).append(position)
    is_parameter = tensors["kind"].values == "parameter"
    return {
        label: [position for position in positions if is_parameter[position]] or positions
        for label, positions in members.items()
    }


def _of_sample(
    results: LossResults, steps: xr.Dataset, tensors: xr.Dataset
) -> dict[str, float | list[float] | None]:
    """Return the figures of a random part of the segments: how many they were drawn from, and the
    standard error of the allocation.
    """
    manifest, whole = results.manifest, tensors["allocated"].sum("tensor")
    if "remainder" in steps:
        whole = whole + steps["remainder"]
    return {
        "sampled_of": None if manifest.sampled is None else manifest.all_segments,
        "identity_change": None if manifest.sampled is None else _identity_change(results),
        "segments_error": _segments_error(results, whole),
    }


def _gaps_change(
    results: LossResults, steps: xr.Dataset, change: np.ndarray[Any, Any]
) -> float | list[float] | None:
    """Return the loss change between the segments; None for a run without gaps, or a random part."""
    if not results.manifest.breaks or results.manifest.sampled is not None:
        return None
    return _plain(steps["loss_end"][-1].values - steps["loss_start"][0].values - change)


def _identity_change(results: LossResults) -> float | None:
    """Return the change from the first to the last checkpoint on the examples that identify the
    loss.

    None if it is not finite at one of them, or the last checkpoint is another one.
    """
    first, last = results.record.identity
    return None if first is None or last is None else last["loss"] - first["loss"]


def _segments_error(results: LossResults, column: xr.DataArray) -> float | list[float] | None:
    """Return the standard error of a sum over training from drawing segments, of each group; None
    for a run of all segments.
    """
    error = segments_error(results, column)
    return None if error is None else _plain(error.values)


def _row(
    results: LossResults,
    part: xr.Dataset,
    sampled: float,
    bands: np.ndarray[Any, Any] | None,
    position: int,
) -> dict[str, object]:
    """Return the figures of some tensors together; `sampled` is the share of examples of the split,
    `bands` are ([groups, ]parts).
    """
    shares, larger = _shares(part), scale_of(results, part.sizes["step"])
    return {
        "parameters": int(part["elements"].sum()),
        "moved": bool(part["motion"].values.any()),
        "allocated": _plain(larger * _total(part["allocated"], "tensor")),
        "standard_error": larger * error if (error := _standard_error(part, sampled)) else error,
        "segments_error": _segments_error(results, part["allocated"].sum("tensor")),
        "path_band": None if bands is None else _plain(bands[..., position]),
        **({"helping": shares["helping"]} if shares else {}),
    }


def _total(column: xr.DataArray, *more: str) -> np.ndarray[Any, Any]:
    """Return the exact sum over segments (and more axes), of each group, as numpy of shape () or
    (groups,).
    """
    groups = [name for name in column.dims if name == "group"]
    rows = column.transpose(*groups, ...).values.reshape(
        *(column.sizes[name] for name in groups), -1
    )
    return np.apply_along_axis(math.fsum, -1, rows)


def _standard_error(part: xr.Dataset, sampled: float) -> float | None:
    """Return the standard error of the sum over segments, from random parts of the sample;
    `sampled` is its share of the split.
    """
    if "replicates" not in part or part.sizes["replicate"] < 2:
        return None
    sums = part["replicates"].sum(("step", "tensor")).values
    return float(np.sqrt(sums.var(ddof=1) / len(sums) * (1 - sampled)))


def _plain(values: np.ndarray[Any, Any]) -> float | list[float]:
    """Return a float, or a list of floats."""
    plain: float | list[float] = np.asarray(values, dtype=float).tolist()
    return plain
