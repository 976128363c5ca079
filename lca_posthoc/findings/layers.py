"""Sum the allocation of each layer over its parameters and over training."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ..base.declarations import BY, GROUPS, TOP, Finding, Option
from ..results import LossResults
from .bands import (
    bands_of_shifts,
    example_errors,
    held_back,
    long_segments,
    other_paths,
    straight_lines,
)
from .common import (
    ROLES,
    Numbers,
    Variable,
    about,
    described,
    estimated,
    grouping,
    label_of,
    moving_buffers,
    over_training,
    roles,
    so_far,
    tables,
    unfinished,
)
from .errors import described_errors, errors_of_sums, not_known

FINDING = Finding(
    question="Which layers learned? Sums and means by module, tensor or depth; kernels, biases, "
    "normalisation separate",
    needs="any run; shares that help `--keep statistics`",
    place=20,
    runs="beside",
    sampled=True,
    options=(
        GROUPS,
        BY,
        Option(
            name="by_role",
            flag="--by-role",
            kind=bool,
            help="Kernels, biases and normalisation as layers of their own.",
        ),
        Option(
            name="quantity",
            flag="--quantity",
            kind=("cumulative", "total", "mean"),
            help="What to draw of each layer.",
        ),
        TOP,
    ),
)


def layers(results: LossResults, *, by: str | int = "module", by_role: bool = False) -> xr.Dataset:
    """Return the sum and mean of the allocation of every layer, per segment, cumulative, and over
    all segments.

    A negative layer helped: it lowered the loss (Lan et al. 2019, section 4). Buffers that moved,
    such as running statistics, are a layer of their own, "NAME buffer", so that a layer's sum is
    that of its parameters.

    Args:
        results: one loss of a run, at any level of `--keep`.
        by: "module" (a kernel and its bias together), "tensor", or the number of parts of the
            module's name that name a layer.
        by_role: whether kernels, biases and normalisation of a layer are layers of their own too.

    Returns:
        `allocated` and `cumulative` (step[, group], layer), `total` and `mean` (layer[, group]; the
        mean is per parameter and over the whole training), in units of loss; from `--keep
        statistics` on, `helping` (layer[, group]), the share of its parameters × segments that
        helped, which excludes segments of more than one training step. For a random part of the
        segments (`--segments`), `cumulative`, `total` and `mean` are estimates for all segments.
        Coordinates of `layer`: `elements` and `role`.

        The errors of `total` that are known, each by itself, in units of loss: `quadrature`
        (layer[, group]), the layer's part of `error_bound`; `precision` (layer[, group]), the
        measured error of the precision; `path` (layer[, group]), the change by other paths through
        the same checkpoints, where segments are longer than one training step, see
        `bands.path_bands`, and with signs, `curve` and `doubling` (layer[, group]), the change by
        each of the two paths; `examples` (layer), the standard error from drawing examples, of a
        loss over a part of them; `segments` (layer[, group]), that from drawing segments. `error`
        (layer[, group]) is all of them together and `verdict` (layer[, group]) the conclusion, see
        `errors.described_errors`.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: for any other `by`.
    """
    table, role = tables(results, sampled=True), roles(results)
    members_of = _members(table, role, by, by_role)
    elements = np.array(
        [int(table["elements"].values[members].sum()) for members in members_of.values()]
    )
    names = [str(name) for name in table["tensor"].values]
    among = [_role(role, names, members) for members in members_of.values()]
    coords = {
        "layer": np.array(list(members_of), dtype=object),
        "elements": ("layer", elements),
        "role": ("layer", np.array(among, dtype=object)),
    }
    left_out = [*unfinished(results), *estimated(results)]
    if results.manifest.settings["tensors"]:
        left_out.append(
            "The run keeps only some tensors; the sum of the others is the remainder of `steps`."
        )
    about_lines = straight_lines(table)
    if "helping" in table:
        left_out += held_back(table, "shares of parameters that help")
    elif about_lines:
        left_out.append(f"{about_lines}.")
    shared = {
        name: column
        for name, column in table.coords.items()
        if name in ("step", "step_end", "group", "examples")
    }
    variables = _variables(results, table, members_of, elements)
    total = xr.DataArray(variables["total"][1], dims=variables["total"][0])
    shifts = other_paths(results, list(members_of.values()))
    errors = _errors(results, table, members_of, shifts, total)
    missing = not_known(results, table, errors, each_group=True)
    left_out += missing
    return xr.Dataset(
        variables
        | _along_other_paths(shifts, total)
        | described_errors(total, errors, all_known=not missing),
        coords={**shared, **coords},
        attrs=about(results, "layers", left_out),
    )


def _members(
    table: xr.Dataset, role: dict[str, str], by: str | int, by_role: bool
) -> dict[str, list[int]]:
    """Return the positions of the tensors of every layer; a buffer follows its layer."""
    names, buffers = [str(name) for name in table["tensor"].values], moving_buffers(table)
    members_of: dict[str, list[int]] = {}
    for members in grouping(names, by).values():
        for position in sorted(members, key=lambda index: _rank(role, names[index], by_role)):
            name = names[position]
            label = label_of(name, by, buffers if not by_role else ())
            if by != "tensor":
                label = f"{label} {role[name]}".strip() if by_role else label.strip()
            members_of.setdefault(label, []).append(position)
    return members_of


def _variables(
    results: LossResults, table: xr.Dataset, members_of: dict[str, list[int]], elements: Numbers
) -> dict[str, Variable]:
    """Return the sums and means of the layers, and their shares that helped where these were
    counted.
    """
    allocated = _sums(table["allocated"], members_of)
    total = over_training(results, allocated)
    per_parameter = xr.DataArray(np.maximum(1, elements), dims="layer")
    by_layer = ("layer", *(name for name in total.dims if name != "layer"))
    variables = {
        "allocated": described(allocated, "loss", "Σ allocation of the segment"),
        "cumulative": described(so_far(results, allocated), "loss", "Σ allocation so far"),
        "total": described(total.transpose(*by_layer), "loss", "Σ allocation over training"),
        "mean": described(
            (total / per_parameter).transpose(*by_layer),
            "loss",
            "allocation per parameter over training",
        ),
    }
    single = ~long_segments(table)
    if "helping" in table and single.any():
        counted = _sums(table["helping"].isel(step=single), members_of).sum("step")
        variables["helping"] = described(
            (counted / (per_parameter * int(single.sum()))).transpose(*by_layer),
            "share",
            "share of parameters × segments that helped",
        )
    return variables


def _errors(
    results: LossResults,
    table: xr.Dataset,
    members_of: dict[str, list[int]],
    shifts: tuple[Numbers, Numbers] | None,
    total: xr.DataArray,
) -> dict[str, xr.DataArray]:
    """Return the known errors of the sums over training, by kind."""
    column = table["allocated"]
    errors = errors_of_sums(
        results, table, _sums(column, members_of), _sums(abs(column), members_of)
    )
    examples = example_errors(results, list(members_of.values()))
    if shifts is not None:
        errors["path"] = _by_layer(bands_of_shifts(results, shifts), total)
    if examples is not None:
        errors["examples"] = xr.DataArray(examples, dims="layer")
    return {
        name: error.transpose(*(dim for dim in total.dims if dim in error.dims))
        for name, error in errors.items()
    }


def _along_other_paths(
    shifts: tuple[Numbers, Numbers] | None, total: xr.DataArray
) -> dict[str, Variable]:
    """Return the changes by two other paths, with signs."""
    if shifts is None:
        return {}
    words = {
        "curve": "Σ shift by the curve",
        "doubling": "Σ shift by leaving every second checkpoint out",
    }
    return {
        name: described(_by_layer(shift.sum(0), total), "loss", text)
        for (name, text), shift in zip(words.items(), shifts, strict=True)
    }


def _by_layer(values: Numbers, total: xr.DataArray) -> xr.DataArray:
    """Return numbers of shape ([group, ]layer) with the axes of the totals."""
    return xr.DataArray(values.T, dims=total.dims)


def _rank(role: dict[str, str], name: str, by_role: bool) -> int:
    return ROLES.index(role[name]) if by_role else int(role[name] == "buffer")


def _role(role: dict[str, str], names: list[str], members: list[int]) -> str:
    among = {role[names[member]] for member in members}
    return among.pop() if len(among) == 1 else "all"


def _sums(column: xr.DataArray, members_of: dict[str, list[int]]) -> xr.DataArray:
    """Return the sums over the tensors of each layer, (step[, group], layer)."""
    summed = [column.isel(tensor=members).sum("tensor").values for members in members_of.values()]
    dims = [name for name in column.dims if name != "tensor"]
    return xr.DataArray(np.stack(summed, axis=-1), dims=(*dims, "layer"))
