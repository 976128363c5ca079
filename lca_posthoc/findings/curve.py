"""Compare the loss over training with the sum of its allocations."""

from __future__ import annotations

import itertools

import numpy as np
import xarray as xr

from ..base.declarations import GROUPS, Finding
from ..results import LossResults
from .common import Numbers, about, described, tables, unfinished

FINDING = Finding(
    question="Does it add up? True loss against start + Σ allocation, residuals",
    needs="any run",
    place=10,
    sampled=True,
    runs="beside",
    options=(GROUPS,),
)


def curve(results: LossResults) -> xr.Dataset:
    """Return the true loss, start + Σ allocation, and their difference.

    `predicted[t] = loss_start[0] + Σ_{s ≤ t} Σ_i A[s, i]`: it equals the true loss if every segment
    adds up. After a gap of missing segments it restarts from the true loss, and so does the
    residual's sum.

    Args:
        results: one loss of a run, at any level of `--keep`.

    Returns:
        `loss_start`, `loss` (at the end of the segment), `predicted`, `residual` (of the segment),
        `residual_total` (`loss − predicted`), all (step[, group]) and in units of loss; and by step
        `converged`, `level`, `evaluations`.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
    """
    table, steps = tables(results, sampled=True), results.steps
    allocated = table["allocated"].sum("tensor")
    if "remainder" in steps:
        allocated = allocated + steps["remainder"]
    order = steps["loss_start"].dims
    start, end = steps["loss_start"].values, steps["loss_end"].values
    predicted = _added_up(
        start, allocated.transpose(*order).values, steps["step"].values, steps["step_end"].values
    )
    variables = {
        "loss_start": described((order, start), "loss", "loss at the start of the segment"),
        "loss": described((order, end), "loss", "loss at the end of the segment"),
        "predicted": described((order, predicted), "loss", "loss at the start + Σ allocation"),
        "residual": described(
            steps["residual"], "loss", "loss change − Σ allocation of the segment"
        ),
        "residual_total": described((order, end - predicted), "loss", "loss − predicted"),
        "converged": described(steps["converged"], "", "|residual| within the tolerance"),
        "level": described(steps["level"], "", "how often the rule was halved"),
        "evaluations": described(steps["evaluations"], "evaluations", "evaluations of the segment"),
    }
    return xr.Dataset(
        variables, coords=steps.coords, attrs=about(results, "curve", unfinished(results))
    )


def _added_up(start: Numbers, allocated: Numbers, begin: Numbers, end: Numbers) -> Numbers:
    """Return the running sum (step[, group]), restarted from the true loss at the start of every
    stretch without a gap.
    """
    borders = [0, *(np.flatnonzero(begin[1:] != end[:-1]) + 1), len(begin)]
    parts = [
        start[low] + np.cumsum(allocated[low:high], axis=0)
        for low, high in itertools.pairwise(borders)
    ]
    return np.concatenate(parts)
