"""Headline figures of a loss, and its table of tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from ..errors import LCAError
from ..store import LossResults


def summary(results: LossResults) -> dict[str, Any]:
    """What `lca summary --json` gives for one loss, over the segments that are there.

    Figures are of training steps `first_step` to `last_step`; `norm_stats` is whose statistics normalisation layers had, null where
    there are none. `buffers` is the part of `allocated` that is theirs (running statistics), null where there are none.
    `residual = loss_change − allocated`, with what the tensors that are not kept did (`remainder`) inside `allocated`;
    `helping + hurting + zero = 1`, counted over parameters × segments, buffers not counted. Of a loss with groups, figures are
    lists over the groups. `precision_error` is the measured Σ|A − A*| / Σ|A*| on up to three segments that move, A* one precision higher;
    `standard_error` of a tensor's allocation is that of drawing a random subset, both null where there is none.

    Args:
        results: one loss of a run.

    Returns:
        Plain numbers; losses and allocations in units of loss, shares between 0 and 1.

    Raises:
        LCAError: where no segment is there yet, or stored numbers are damaged.
    """
    steps, tensors, record = results.steps, results.tensors, results.record
    segments = steps.sizes["step"]
    if not segments:
        raise LCAError(f"loss {results.name!r} has no finished segment yet. Let `lca run` commit a span first.")
    change = _total(steps["loss_end"] - steps["loss_start"])
    remainder = _total(steps["remainder"]) if "remainder" in steps else None
    allocated = _total(tensors["allocated"], "tensor") + (0.0 if remainder is None else remainder)
    counted = tensors.isel(tensor=tensors["kind"].values == "parameter")
    buffers = tensors.isel(tensor=tensors["kind"].values == "buffer")
    elements = max(1, int(counted["elements"].sum()) * segments)  # there may be buffers alone
    helping, hurting = (counted[name].sum(("step", "tensor")).values for name in ("helping", "hurting"))
    measured = steps["precision_error"].values[~np.isnan(steps["precision_error"].values)]
    errors = _standard_errors(tensors, record.examples / max(1, record.total))
    markers = results.markers
    return {
        "segments": segments,
        "first_step": int(steps["step"].values[0]),
        "last_step": int(steps["step_end"].values[-1]),
        "norm_stats": results.norm_stats,
        "examples": record.examples,
        "parameters": int(counted["elements"].sum()),
        "loss_start": _plain(steps["loss_start"][0].values),
        "loss_end": _plain(steps["loss_end"][-1].values),
        "loss_change": _plain(change),
        "allocated": _plain(allocated),
        "buffers": _plain(_total(buffers["allocated"], "tensor")) if buffers.sizes["tensor"] else None,
        "remainder": None if remainder is None else _plain(remainder),
        "residual": _plain(change - allocated),
        "max_segment_residual": _plain(abs(steps["residual"]).max("step").values),
        "unconverged": int((~steps["converged"]).sum()),
        "evaluations": sum(marker["evaluations"] for marker in markers),
        "forward_passes": sum(marker["forward_passes"] for marker in markers),
        "helping": _plain(helping / elements),
        "hurting": _plain(hurting / elements),
        "zero": _plain((elements - helping - hurting) / elements),
        "precision": results.precision,
        "precision_error": float(measured.mean()) if len(measured) else None,
        "precision_segments": len(measured),
        "groups": record.groups,
        "group_examples": record.counts,
        "group_weights": None if record.groups is None else _plain(steps["weight"][0].values),
        "tensors": [
            _tensor(tensors.isel(tensor=at), segments, None if errors is None else float(errors[at]))
            for at in range(tensors.sizes["tensor"])
        ],
    }


def _tensor(column: xr.Dataset, segments: int, standard_error: float | None) -> dict[str, Any]:
    elements = int(column["elements"])
    return {
        "name": str(column["tensor"].item()),
        "kind": str(column["kind"].item()),
        "parameters": elements,
        "allocated": _plain(_total(column["allocated"])),
        "standard_error": standard_error,
        "helping": _plain(column["helping"].sum("step").values / max(1, elements * segments)),
    }


def _total(column: xr.DataArray, *more: str) -> Any:
    """The exact sum over segments (and more), of each group; numpy, shape () or (groups,)."""
    groups = [name for name in column.dims if name == "group"]
    rows = column.transpose(*groups, ...).values.reshape(*(column.sizes[name] for name in groups), -1)
    return np.apply_along_axis(math.fsum, -1, rows)


def _standard_errors(tensors: xr.Dataset, sampled: float) -> Any:
    """Of each tensor's sum over the segments, from random parts of the sample; `sampled` is its share of the split."""
    if "replicates" not in tensors:
        return None
    parts = tensors["replicates"].sum("step").transpose("replicate", "tensor").values
    if len(parts) < 2:
        return None
    return np.sqrt(parts.var(axis=0, ddof=1) / len(parts) * (1 - sampled))


def _plain(values: Any) -> Any:
    """A float, or a list of floats."""
    return np.asarray(values, dtype=float).tolist()
