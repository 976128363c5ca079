"""Headline figures of a loss, and its table of tensors."""

from __future__ import annotations

import math
from typing import Any

from ..errors import LCAError
from ..store import LossResults


def summary(results: LossResults) -> dict[str, Any]:
    """What `lca summary --json` gives for one loss, over the segments that are there.

    `residual = loss_change − allocated`; `helping + hurting + zero = 1`, counted over parameters × segments, buffers not
    counted.

    Args:
        results: one loss of a run.

    Returns:
        Plain numbers: losses and allocations in units of loss, shares between 0 and 1.

    Raises:
        LCAError: where no segment is there yet, or stored numbers are damaged.
    """
    steps, tensors = results.steps, results.tensors
    if not steps.sizes["step"]:
        raise LCAError(f"loss {results.name!r} has no finished segment yet. Let `lca run` commit a span first.")
    loss_change = math.fsum((steps["loss_end"] - steps["loss_start"]).values.tolist())
    allocated = math.fsum(tensors["allocated"].values.ravel().tolist())
    counted = tensors.isel(tensor=tensors["kind"].values == "parameter")
    elements = int(counted["elements"].sum()) * steps.sizes["step"]
    helping, hurting = int(counted["helping"].sum()), int(counted["hurting"].sum())
    markers = results.markers
    return {
        "segments": steps.sizes["step"],
        "parameters": int(counted["elements"].sum()),
        "loss_start": float(steps["loss_start"][0]),
        "loss_end": float(steps["loss_end"][-1]),
        "loss_change": loss_change,
        "allocated": allocated,
        "residual": loss_change - allocated,
        "max_segment_residual": float(abs(steps["residual"]).max()),
        "unconverged": int((~steps["converged"]).sum()),
        "evaluations": sum(marker["evaluations"] for marker in markers),
        "forward_passes": sum(marker["forward_passes"] for marker in markers),
        "helping": helping / elements,
        "hurting": hurting / elements,
        "zero": (elements - helping - hurting) / elements,
        "groups": None,
        "tensors": [
            _tensor(tensors.isel(tensor=position), steps.sizes["step"]) for position in range(tensors.sizes["tensor"])
        ],
    }


def _tensor(column: Any, segments: int) -> dict[str, Any]:
    elements = int(column["elements"])
    return {
        "name": str(column["tensor"].item()),
        "kind": str(column["kind"].item()),
        "parameters": elements,
        "allocated": math.fsum(column["allocated"].values.tolist()),
        "helping": int(column["helping"].sum()) / max(1, elements * segments),
    }
