"""Split the loss change into the part inside a subspace of the motion and the part outside,
compared with a random subspace.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from ..base.declarations import GROUPS, Finding, Option
from ..base.text import no_loss
from ..errors import InputError
from ..results import LossResults, open_run
from .causes import amount, percent
from .common import (
    Variable,
    about,
    described,
    estimated,
    over_training,
    part_of,
    segments_error,
    so_far,
    tables,
    unfinished,
)

FINDING = Finding(
    question="Did the loss fall along a few directions or outside them, and how much of the motion do "
    "they capture; compared with random ones",
    needs="a run with `--along`",
    place=28,
    part="along",
    sampled=True,
    options=(
        GROUPS,
        Option(
            name="null",
            flag="--null",
            kind="path",
            metavar="RUN",
            help="A run of the same loss along as many random directions.",
        ),
    ),
)
_SAME = 1e-3  # relative to the largest change of a segment; two runs of one training differ by less


def directions(results: LossResults, *, null: LossResults | str | Path | None = None) -> xr.Dataset:
    """Return the loss change inside the subspace of a run's directions and outside of it.

    Directions are orthonormal. The part of the motion inside, its share `captured` of Σ‖Δθ‖², and
    the loss change there, Σ_b ⟨b, Δθ⟩⟨b, ḡ⟩, do not depend on how the subspace is spanned; single
    directions do. If the motion is independent of the directions, k of them capture on average k /
    P of it, with P the number of elements that moved: `captured_by_chance`.

    Args:
        results: one loss of a run with `--along`, at any level of `--keep`.
        null: the same loss in another run of the same checkpoints along as many random directions:
            that loss, or the path of the run.

    Returns:
        `allocated` and `cumulative` (step[, group], direction), `total` (direction[, group]); `inside`
        and `outside`, `inside_cumulative` and `outside_cumulative` (step[, group]), `inside_total`
        and `outside_total` ([group]), in units of loss. Shares of the squared length of the motion:
        `captured` (step), NaN where nothing moved, `captured_total`, `captured_direction`
        (direction), `captured_by_chance`. With `null` also `null_inside`, `null_inside_cumulative`,
        `null_inside_total`, `null_captured` and `null_captured_total`. For a random part of the
        segments (`--segments`), cumulative sums and those over training are estimates, and
        `inside_segments`, `outside_segments` and `null_inside_segments` the standard errors of the
        latter.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: if a run was made without `--along`, or `null` has other segments, another loss
            or another number of directions.
    """
    table, data = tables(results, sampled=True), part_of(results, "along")
    groups = [dim for dim in data["allocated"].dims if dim == "group"]
    allocated = data["allocated"].transpose("step", *groups, "direction")
    outside = data["remainder"].transpose("step", *groups)
    sums = {
        "allocated": (allocated, "Σ allocation of the segment along the direction"),
        "cumulative": (so_far(results, allocated), "Σ allocation so far along the direction"),
        "total": (
            over_training(results, allocated).transpose("direction", *groups),
            "Σ allocation over training along the direction",
        ),
        **_series(results, "inside", allocated.sum("direction"), "inside"),
        **_series(results, "outside", outside, "outside"),
    }
    variables = {name: described(values, "loss", words) for name, (values, words) in sums.items()}
    moving = table["motion"].sum("step").values > 0
    chance = allocated.sizes["direction"] / max(1, int(table["elements"].values[moving].sum()))
    left_out = [*unfinished(results), *estimated(results)]
    if results.manifest.settings["tensors"]:
        left_out.append(
            "The run keeps only some tensors; motion and loss change are those of these tensors."
        )
    attributes = about(results, "directions", left_out)
    variables |= _captured(data, min(1.0, chance))
    if null is not None:
        other = _null(results, null)
        variables |= _beside(data, other, groups)
        attributes["null"] = str(other.path)
    numbers = np.arange(allocated.sizes["direction"])
    coords = {
        **{
            name: column
            for name, column in table.coords.items()
            if name in ("step", "step_end", "group", "examples")
        },
        "direction": data["direction"].values if "direction" in data.coords else numbers,
    }
    return xr.Dataset(variables, coords=coords, attrs=attributes)


def _series(
    results: LossResults, name: str, values: xr.DataArray, where: str
) -> dict[str, tuple[xr.DataArray, str]]:
    """Return a loss change by segment, cumulative and over training, with descriptions."""
    error = segments_error(results, values)
    words = f"standard error of {name}_total from drawing segments"
    return {
        **({} if error is None else {f"{name}_segments": (error, words)}),
        name: (values, f"Σ allocation of the segment {where} the subspace"),
        f"{name}_cumulative": (
            so_far(results, values),
            f"Σ allocation so far {where} the subspace",
        ),
        f"{name}_total": (
            over_training(results, values),
            f"Σ allocation over training {where} the subspace",
        ),
    }


def _captured(data: xr.Dataset, chance: float) -> dict[str, Variable]:
    """Return the shares of the squared length of the motion."""
    inside = (data["motion"] ** 2).transpose("step", "direction").values
    length = data["distance"].values ** 2
    moved = length > 0
    of_steps = np.full(len(length), np.nan)
    of_steps[moved] = inside[moved].sum(1) / length[moved]
    whole = length.sum() or np.nan
    return {
        "captured": described((("step",), of_steps), "share", "share of ‖Δθ‖² inside"),
        "captured_total": described(((), inside.sum() / whole), "share", "share of Σ‖Δθ‖² inside"),
        "captured_direction": described(
            (("direction",), inside.sum(0) / whole), "share", "share of Σ‖Δθ‖² along the direction"
        ),
        "captured_by_chance": described(
            ((), chance), "share", "share of ‖Δθ‖² of as many random directions on average"
        ),
    }


def _null(results: LossResults, null: LossResults | str | Path) -> LossResults:
    """Return the loss of the run with random directions.

    Raises:
        InputError: if that run lacks the loss.
    """
    if isinstance(null, LossResults):
        return null
    run = open_run(null)
    if results.name not in run:
        raise InputError(
            f"{no_loss(null, results.name, run)} The null is the same loss along random directions."
        )
    return run[results.name]


def _beside(data: xr.Dataset, other: LossResults, groups: list[str]) -> dict[str, Variable]:
    """Return the numbers of the random directions.

    Raises:
        InputError: if they cannot be compared.
    """
    null = part_of(other, "along")
    if null.sizes["direction"] != data.sizes["direction"]:
        raise InputError(
            f"{other.path} has {null.sizes['direction']:,} directions, and this run "
            f"{data.sizes['direction']:,}. Compare with as many: lca basis --random "
            f"{data.sizes['direction']}."
        )
    change, other_change = (
        (of["allocated"].sum("direction") + of["remainder"]).transpose("step", ...).values
        for of in (data, null)
    )
    tolerance = _SAME * float(np.abs(change).max())
    same = (
        np.array_equal(data["step"].values, null["step"].values)
        and change.shape == other_change.shape
        and bool((np.abs(change - other_change) <= tolerance).all())
    )
    if not same:
        raise InputError(
            f"loss {other.name!r} of {other.path} has other segments, or changed differently "
            "on them. The null is the same loss, along random directions, of the same checkpoints."
        )
    inside = null["allocated"].transpose("step", *groups, "direction").sum("direction")
    captured = _captured(null, 0.0)
    series = _series(other, "null_inside", inside, "inside a random")
    variables = {name: described(values, "loss", words) for name, (values, words) in series.items()}
    return {
        **variables,
        "null_captured": captured["captured"],
        "null_captured_total": captured["captured_total"],
    }


def balance_of(
    number: int,
    captured: float,
    by_chance: float,
    inside: float | list[float],
    outside: float | list[float],
) -> list[str]:
    """Describe how much of the motion and of the loss change is inside, in parts of a sentence.

    Args:
        number: of directions.
        captured: share of the squared length of the motion inside.
        by_chance: the same for as many random directions.
        inside: Σ allocation inside; a list over groups is not described.
        outside: the same outside.
    """
    subject = "The direction captures" if number == 1 else f"The {number:,} directions capture"
    parts = [
        f"{subject} {percent(captured)} of the squared length of the motion "
        f"({percent(by_chance)} by chance)"
    ]
    if isinstance(inside, float) and isinstance(outside, float):
        parts.append(f"Σ allocation inside {amount(inside)}, outside {amount(outside)}")
    return parts


def balance(finding: xr.Dataset) -> str:
    """Describe how much of the motion and the loss change a finding has inside, and of random
    directions if it has them.
    """
    parts = balance_of(
        finding.sizes["direction"],
        float(finding["captured_total"]),
        float(finding["captured_by_chance"]),
        finding["inside_total"].values.tolist(),
        finding["outside_total"].values.tolist(),
    )
    if "null_captured_total" in finding:
        null = f"random ones capture {percent(float(finding['null_captured_total']))}"
        if not finding["null_inside_total"].ndim:
            null += f", Σ allocation inside {amount(float(finding['null_inside_total']))}"
        parts.append(null)
    return f"{'; '.join(parts)}."
