"""Compute the errors of sums over training: each kind, all kinds together, and the conclusion
whether a sum helped, hurt, or cannot be told from zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ..numerics.precisions import PRECISIONS
from ..results import LossResults
from .bands import long_segments
from .common import Numbers, Variable, described, over_training, scale_of, segments_error
from .names import shorten

HELPS, HURTS, NOTHING, UNTOLD = "helps", "hurts", "did nothing", "cannot be told from zero"
_CLEARLY = ", clearly"
_LETTERS = 40  # of names in a sentence


@dataclass(frozen=True)
class _Kind:
    """A kind of error: its description, and its factor in the whole error: 1 for a bound, 2 for a
    standard error.
    """

    text: str
    times: float = 1.0


KINDS = {
    "quadrature": _Kind("missed by quadrature"),
    "precision": _Kind("lost to gradient precision"),
    "path": _Kind("changed by another path"),
    "examples": _Kind("standard error from drawing examples", 2.0),
    "segments": _Kind("standard error of the total from drawing segments", 2.0),
}


def errors_of_sums(
    results: LossResults, table: xr.Dataset, allocated: xr.DataArray, sizes: xr.DataArray
) -> dict[str, xr.DataArray]:
    """Return the errors of sums over training that every run knows, by kind and in units of loss.

    These are `quadrature`, except for fixed rules, which have no bound; `precision`, where it was
    measured; and `segments`, for a random part of them. Quadrature and precision are bounds. A sum
    gets its share of each segment's `error_bound` in proportion to its size; the measured error of
    the precision, Σ|A − A*| / Σ|A*|, is relative to its size.

    Args:
        results: one loss of a run.
        table: of its tensors.
        allocated: sums of each segment, (step[, group], …).
        sizes: Σ|A| of each over tensors, with the same axes.
    """
    steps = results.steps
    larger = scale_of(results, table.sizes["step"])
    errors = dict[str, xr.DataArray]()
    bound = _plain(steps["error_bound"])
    if not bound.isnull().any():
        whole = _plain(abs(table["allocated"]).sum("tensor"))
        share = (bound / whole.where(whole > 0)).fillna(0.0)
        errors["quadrature"] = larger * (sizes * share).sum("step")
    relative = _precision(steps, results.precision)
    if relative is not None:
        errors["precision"] = larger * relative * sizes.sum("step")
    drawn = segments_error(results, allocated)
    if drawn is not None:
        errors["segments"] = drawn
    dims = [dim for dim in allocated.dims if dim != "step"]
    return {name: error.transpose(*dims) for name, error in errors.items()}


def _plain(column: xr.DataArray) -> xr.DataArray:
    """Return an array without its coordinates, which sums of layers lack."""
    return xr.DataArray(column.values, dims=column.dims)


def _precision(steps: xr.Dataset, precision: str) -> float | None:
    """Return the mean relative error of the precision, 0 for the highest; None where it was not
    measured.
    """
    measured = steps["precision_error"].values
    measured = measured[~np.isnan(measured)]
    if len(measured):
        return float(measured.mean())
    return 0.0 if PRECISIONS[precision].reference is None else None


def described_errors(
    total: xr.DataArray, errors: Mapping[str, xr.DataArray], *, all_known: bool
) -> dict[str, Variable]:
    """Return the errors of sums over training as variables: each kind; `error`, all kinds together;
    and `verdict`, the conclusion.

    Bounds are added. Standard errors are independent: the root of the sum of their squares counts
    twice. A sum no larger than its error "cannot be told from zero". A larger one "helps, clearly"
    or "hurts, clearly", or only "helps" or "hurts" where some kind of error is unknown. A sum of
    exactly zero "did nothing".

    Args:
        total: the sums over training.
        errors: by kind, see `errors_of_sums`, and `path` and `examples` where they are known; each
            has the axes of `total`, or those without groups.
        all_known: whether no kind of error that the run has is unknown, see `not_known`.
    """
    bounds, squares = xr.zeros_like(total), xr.zeros_like(total)
    for name, error in errors.items():
        if KINDS[name].times == 1:
            bounds = bounds + error
        else:
            squares = squares + (KINDS[name].times * error) ** 2
    error = (bounds + np.sqrt(squares)).transpose(*total.dims)
    return {
        **{
            name: described(error_of_kind, "loss", KINDS[name].text)
            for name, error_of_kind in errors.items()
        },
        "error": described(error, "loss", "error of the total, all kinds that are known together"),
        "verdict": described(
            (total.dims, verdicts(total.values, error.values, all_known=all_known)),
            "",
            "conclusion on the total",
        ),
    }


def verdicts(total: Numbers, error: Numbers, *, all_known: bool) -> Numbers:
    """Return the conclusions on sums with errors, see `described_errors`.

    >>> verdicts(np.array([-3.0, 3.0, 0.5, 0.0]), np.array([1.0, 1.0, 1.0, 0.0]), all_known=True)
    array(['helps, clearly', 'hurts, clearly', 'cannot be told from zero',
           'did nothing'], dtype=object)

    Args:
        total: sums.
        error: their errors, of a shape that broadcasts.
        all_known: whether no kind of error is unknown.
    """
    surely = _CLEARLY if all_known else ""
    words = np.where(total < 0, HELPS + surely, HURTS + surely).astype(object)
    words[np.abs(total) <= error] = UNTOLD
    words[(total == 0) & (error == 0)] = NOTHING
    return words


def is_told(finding: xr.Dataset) -> Numbers:
    """Return which sums of a finding differ from zero by more than their errors, with the axes of
    its `verdict`.
    """
    verdict = finding["verdict"].values
    told: Numbers = (verdict != UNTOLD) & (verdict != NOTHING)
    return told


def untold_sentence(finding: xr.Dataset, most: int = 4) -> str:
    """Name the layers whose sums cannot be told from zero; "" where there are none, or several
    groups.

    Args:
        finding: with verdicts by layer.
        most: layers to name.
    """
    if finding["verdict"].ndim != 1:
        return ""
    names = finding["layer"].values[finding["verdict"].values == UNTOLD]
    if not len(names):
        return ""
    shown = shorten([str(name) for name in names[:most]], _LETTERS)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"Within their errors, so not told from zero: {', '.join(shown)}{more}."


def not_known(
    results: LossResults,
    segments: xr.Dataset,
    errors: Collection[str],
    *,
    each_group: bool,
) -> list[str]:
    """Name the kinds of error of sums over training that the run does not know; nothing where there
    are none.

    Args:
        results: one loss of a run.
        segments: with their coordinates.
        errors: the known kinds.
        each_group: whether the sums are of each group of the loss.
    """
    missing = list(_missing(results, segments, errors, each_group))
    return [f"Unknown errors of the sums: {', '.join(missing)}."] if missing else []


def _missing(
    results: LossResults, segments: xr.Dataset, errors: Collection[str], each_group: bool
) -> Iterator[str]:
    settings = results.manifest.settings
    if "quadrature" not in errors:
        yield f"quadrature (the rule {settings['rule']} has no bound)"
    if "precision" not in errors:
        yield "precision (it was not measured)"
    if "path" not in errors and long_segments(segments).any():
        yield "the change by another path"
    if results.record.examples < results.record.total and (
        "examples" not in errors or (each_group and results.record.groups is not None)
    ):
        yield "using only a part of the examples"
    if results.manifest.sampled is not None and "segments" not in errors:
        yield "using only a part of the segments"


def over_groups(results: LossResults, by_layer: xr.Dataset) -> xr.Dataset:
    """Return `total`, its errors and its verdict for all groups of a loss together, (layer,).

    `attrs["not_known"]` names the unknown kinds of error, as `not_known` does. The bound of the
    weighted mean over groups is the weighted mean of the bounds. Its standard error is at most the
    weighted mean of the standard errors, however the errors of groups are correlated.

    Args:
        results: one loss of a run.
        by_layer: of `layers`.
    """
    kinds = [name for name in KINDS if name in by_layer.data_vars]
    missing = not_known(results, by_layer, kinds, each_group=False)
    if "group" not in by_layer.dims:
        sums = by_layer[["total", *kinds, "error", "verdict"]]
        return sums.drop_vars([name for name in sums.coords if name != "layer"]).assign_attrs(
            not_known=missing
        )
    weight = results.steps["weight"]
    share = weight / weight.sum("group")
    mean = share.mean("step")
    total = over_training(results, (by_layer["allocated"] * share).sum("group"))
    errors = {
        name: (by_layer[name] * mean).sum("group")
        if "group" in by_layer[name].dims
        else by_layer[name]
        for name in kinds
    }
    return xr.Dataset(
        {
            "total": described(total, "loss", "Σ allocation over training"),
            **described_errors(total, errors, all_known=not missing),
        },
        coords={"layer": by_layer["layer"]},
        attrs={"not_known": missing},
    )
