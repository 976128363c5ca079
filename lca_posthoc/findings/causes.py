"""Split each layer's allocation by the causes of the motion: signal, noise, momentum, decay and
rest.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from ..base.declarations import BY, GROUPS, TOP, Finding
from ..numerics.schema import CAUSES
from ..results import LossResults
from .common import (
    Numbers,
    Variable,
    about,
    described,
    estimated,
    grouping,
    label_of,
    moving_buffers,
    over_training,
    part_of,
    so_far,
    tables,
    unfinished,
)
from .errors import HURTS, described_errors, errors_of_sums, not_known
from .layers import layers
from .names import shorten

FINDING = Finding(
    question="What moved the weights: how much each layer did by signal, noise, momentum and decay; "
    "which of them makes a layer hurt",
    needs="a run with `--causes`",
    place=27,
    part="causes",
    sampled=True,
    options=(GROUPS, BY, TOP),
)
LARGE = 0.05  # share of rest above which the other causes are not trusted
_NAMED = 3  # layers in a sentence
_LETTERS = 40  # of their names


def causes(results: LossResults, *, by: str | int = "module") -> xr.Dataset:
    """Return the allocation of every layer by what moved its weights, and how much of it no formula
    explains.

    Summed over causes, the numbers equal those of `layers`. *Rest* is what no formula explains; its
    size tells how far to trust the other causes. `rest_share` is Σ|A_rest| / Σ|A| over the segments
    and the tensors of a layer, `rest_overall` over all parameters. Buffers that moved are a layer
    of their own, "NAME buffer". No optimiser moves them, so all of their allocation is rest, and
    `rest_overall` excludes them.

    Args:
        results: one loss of a run with `--causes`, at any level of `--keep`.
        by: "module" (a kernel and its bias together), "tensor", or the number of parts of the
            module's name that name a layer.

    Returns:
        `allocated` and `cumulative` (step[, group], layer, cause), `total` (layer, cause[, group])
        and `layer_total` (layer[, group]), in units of loss; `hurts` (layer[, group]), the cause that
        raised the loss most in a layer whose sum is above 0, "" for other layers; `rest_share`
        (layer[, group]) and `rest_overall` ([group]); `rest_size` and `size` (step[, group]), Σ|A_rest|
        and Σ|A| over parameters. A share of nothing is 0. For a random part of the segments
        (`--segments`), `cumulative`, `total` and `layer_total` are estimates. Coordinates of `layer`:
        `elements` and `kind`, "buffer" or "parameter". `attrs["signal"]` names the training loss.

        The errors of `total`, each (layer, cause[, group]) and in units of loss: `quadrature`,
        `precision` and `segments`, where they are known, as of `layers`; `error`, all of them
        together, and `verdict`, the conclusion. `layer_error` and `layer_verdict`
        (layer[, group]) are those of `layer_total`, with all kinds of error that `layers` has.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: if the run was made without `--causes`, or for another `by`.
    """
    table, data = tables(results, sampled=True), part_of(results, "causes")
    members = _members(table, by)
    groups = [dim for dim in data["allocated"].dims if dim == "group"]
    by_tensor = data["allocated"].transpose("step", *groups, "tensor", "cause")
    allocated = _summed(by_tensor, members)
    total = over_training(results, allocated).transpose("layer", "cause", *groups)
    errors = errors_of_sums(results, table, allocated, _summed(abs(by_tensor), members))
    missing = not_known(results, table, errors, each_group=True)
    whole = layers(results, by=by).sel(layer=list(members)).transpose("layer", *groups, ...)
    left_out = [*unfinished(results), *estimated(results), *missing]
    if results.manifest.settings["tensors"]:
        left_out.append(
            "The run keeps only some tensors; the remainder of `steps`, that of the others, is not "
            "split by cause."
        )
    kinds = table["kind"].values
    coords = {
        **{
            name: column
            for name, column in table.coords.items()
            if name in ("step", "step_end", "group", "examples")
        },
        "layer": np.array(list(members), dtype=object),
        "cause": np.array(CAUSES, dtype=object),
        "elements": (
            "layer",
            [int(table["elements"].values[positions].sum()) for positions in members.values()],
        ),
        "kind": (
            "layer",
            np.array(
                [
                    "buffer" if all(kinds[positions] == "buffer") else "parameter"
                    for positions in members.values()
                ],
                dtype=object,
            ),
        ),
    }
    return xr.Dataset(
        {
            **_sums(results, allocated, total),
            **described_errors(
                total,
                {name: error.transpose(*total.dims) for name, error in errors.items()},
                all_known=not missing,
            ),
            "layer_error": described(
                (("layer", *groups), whole["error"].values), "loss", "error of the layer's total"
            ),
            "layer_verdict": described(
                (("layer", *groups), whole["verdict"].values),
                "",
                "conclusion on the layer's total",
            ),
            **_rest(by_tensor, members, kinds == "parameter", groups),
        },
        coords=coords,
        attrs={
            **about(results, "causes", left_out),
            "signal": str(results.manifest.settings["signal"]),
        },
    )


def _members(table: xr.Dataset, by: str | int) -> dict[str, list[int]]:
    """Return the positions of the tensors of every layer; a buffer follows its layer."""
    names, buffers = [str(name) for name in table["tensor"].values], moving_buffers(table)
    members: dict[str, list[int]] = {}
    for positions in grouping(names, by).values():
        for position in sorted(positions, key=lambda place: names[place] in buffers):
            label = label_of(names[position], by, buffers).strip()
            members.setdefault(label, []).append(position)
    return members


def _summed(by_tensor: xr.DataArray, members: dict[str, list[int]]) -> xr.DataArray:
    """Return the sums over the tensors of each layer, (step[, group], layer, cause)."""
    values = by_tensor.values
    sums = [values[..., positions, :].sum(-2) for positions in members.values()]
    dims = [*(dim for dim in by_tensor.dims if dim not in ("tensor", "cause")), "layer", "cause"]
    return xr.DataArray(np.stack(sums, axis=-2), dims=dims)


def _sums(
    results: LossResults, allocated: xr.DataArray, total: xr.DataArray
) -> dict[str, Variable]:
    """Return the sums over time of each layer and cause, and the cause by which a layer hurts."""
    layer_total = total.sum("cause")
    largest = np.array([*CAUSES], dtype=object)[total.argmax("cause").values]
    hurts = np.where(layer_total.values > 0, largest, "").astype(object)
    return {
        "allocated": described(allocated, "loss", "Σ allocation of the segment"),
        "cumulative": described(so_far(results, allocated), "loss", "Σ allocation so far"),
        "total": described(total, "loss", "Σ allocation over training"),
        "layer_total": described(layer_total, "loss", "Σ allocation over training, all causes"),
        "hurts": described((layer_total.dims, hurts), "", "cause by which the layer hurt most"),
    }


def _rest(
    by_tensor: xr.DataArray,
    members: dict[str, list[int]],
    parameters: Numbers,
    groups: list[str],
) -> dict[str, Variable]:
    """Return the size of rest relative to the allocation, by layer, by segment and overall."""
    rest = abs(by_tensor.isel(cause=CAUSES.index("rest"), drop=True))
    size = abs(by_tensor.sum("cause"))
    shares = [
        share_of(
            rest.isel(tensor=positions).sum(("step", "tensor")).values,
            size.isel(tensor=positions).sum(("step", "tensor")).values,
        )
        for positions in members.values()
    ]
    own_rest, own_size = (of.isel(tensor=parameters).sum("tensor") for of in (rest, size))
    overall = share_of(own_rest.sum("step").values, own_size.sum("step").values)
    return {
        "rest_share": described(
            (("layer", *groups), np.stack(shares)), "share", "Σ|A_rest| / Σ|A| of the layer"
        ),
        "rest_overall": described(
            (tuple(groups), overall), "share", "Σ|A_rest| / Σ|A| over parameters"
        ),
        "rest_size": described(own_rest, "loss", "Σ|A_rest| of the segment over parameters"),
        "size": described(own_size, "loss", "Σ|A| of the segment over parameters"),
    }


def share_of(part: Numbers, whole: Numbers) -> Numbers:
    """Return parts as shares; 0 / 0 is 0, and anything else over 0 is infinite.

    >>> share_of(np.array([1.0, 0.0, 1.0]), np.array([4.0, 0.0, 0.0])).tolist()
    [0.25, 0.0, inf]

    Args:
        part: sizes.
        whole: sizes, of a shape that broadcasts with it.
    """
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    ratio = np.divide(part, whole, out=np.full(part.shape, np.inf), where=whole > 0)
    shares: Numbers = np.where(part == 0, 0.0, ratio)
    return shares


def size_of_rest(finding: xr.Dataset) -> str:
    """Describe the size of rest, and where it is large, what that means and possible reasons.

    For a loss with groups, shares are the largest of any group.
    """
    overall = float(finding["rest_overall"].max())
    within = " in the group with most of it" if finding["rest_overall"].ndim else ""
    subject = f"Rest is {percent(overall)} of Σ|A| over parameters{within}"
    if not overall > LARGE:
        return f"{subject}.{_layers_with_rest(finding)}{_buffers(finding)}"
    above = share_of(finding["rest_size"].values, finding["size"].values) > LARGE
    segments = int(above.reshape(len(above), -1).any(1).sum())
    return (
        f"{subject}, and above {percent(LARGE)} on {segments:,} of {len(above):,} segments: there, "
        "much of the motion has no known cause, and the other causes do not add up to it. Possible "
        "reasons: an optimiser without a formula, Adam's moments that were not recorded, steps without a "
        "record between checkpoints, or weights that were averaged, rounded or otherwise changed."
        f"{_layers_with_rest(finding)}{_buffers(finding)}"
    )


def _layers_with_rest(finding: xr.Dataset) -> str:
    """Name the layers with a large share of rest, unless all layers have one."""
    layers = finding.isel(layer=finding["kind"].values == "parameter")
    shares = layers["rest_share"]
    shares = shares.max("group") if "group" in shares.dims else shares
    order = np.argsort(-shares.values, kind="stable")
    large = [position for position in order if shares.values[position] > LARGE]
    if not large or len(large) == len(order):
        return ""
    shown = large[:_NAMED]
    parts = [
        f"{name} ({percent(float(shares.values[position]))})"
        for name, position in zip(_names(layers, shown), shown, strict=True)
    ]
    more = f" and {len(large) - _NAMED:,} more" if len(large) > _NAMED else ""
    return f" It is large in {', '.join(parts)}{more}."


def _buffers(finding: xr.Dataset) -> str:
    """Describe the allocation of buffers, all of which is rest."""
    buffers = finding.isel(layer=finding["kind"].values == "buffer")
    sums = buffers["layer_total"].sum("layer").values
    if not sums.any():
        return ""
    numbers = " to ".join(amount(value) for value in sorted({float(sums.min()), float(sums.max())}))
    of = " by group" if sums.ndim else ""
    return f" Buffers, which no optimiser moves, are separate: Σ {numbers}{of}."


def percent(share: float) -> str:
    """Return a share as a percentage with two significant digits.

    >>> percent(0.3141), percent(0.05), percent(1.4e-7), percent(0.0), percent(2.5)
    ('31 %', '5 %', 'under 0.01 %', '0 %', '250 %')
    """
    value = 100 * share
    if 0 < value < 0.01:
        return "under 0.01 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def amount(value: float) -> str:
    """Return a loss or an allocation with its sign.

    >>> amount(-0.01234), amount(2.5)
    ('−0.0123', '+2.5')
    """
    return f"{value:+.3g}".replace("-", "−")


def culprits(finding: xr.Dataset, most: int = _NAMED) -> str:
    """Describe by which cause each layer that hurts does so, the worst first.

    Args:
        finding: of one group.
        most: layers to name.
    """
    total, verdict = finding["layer_total"].values, finding["layer_verdict"].values
    raised = [position for position in np.argsort(-total, kind="stable") if total[position] > 0]
    order = [position for position in raised if str(verdict[position]).startswith(HURTS)]
    if not order:
        return "No layer hurt by more than its error." if raised else "No layer hurt."
    parts = []
    for name, position in zip(_names(finding, order[:most]), order, strict=False):
        cause = str(finding["hurts"].values[position])
        part = float(finding["total"].sel(cause=cause).values[position])
        parts.append(f"{name} ({amount(total[position])}) by {cause} ({amount(part)})")
    more = f" and {len(order) - most:,} more" if len(order) > most else ""
    return f"Layers that hurt: {', '.join(parts)}{more}."


def _names(finding: xr.Dataset, positions: list[int]) -> list[str]:
    """Return names of layers, short enough for a sentence."""
    return shorten([str(finding["layer"].values[position]) for position in positions], _LETTERS)
