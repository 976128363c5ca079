"""Training against validation: who lowered the one and raised the other."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import xarray as xr

from ..errors import InputError
from ..store import LossResults
from .layers import layers
from .parts import about, described, each_total, largest, parameter_name, place_of, unfinished

QUADRANTS = (
    "both helped",
    "helped train, hurt validation",
    "hurt train, helped validation",
    "both hurt",
    "zero on either",
)


def generalisation(
    train: LossResults, validation: LossResults, *, by: str | int = "module", most: int = 10
) -> xr.Dataset:
    """Allocations of one path to two losses side by side, by layer and by parameter.

    Args:
        train, validation: two losses of one run, at any level of `--keep`; parameters need every segment.
        by: as of `layers`.
        most: how many of the parameters that helped the first and hurt the second most: by the smaller of the two effects.

    Returns:
        `train`, `validation` (layer) and `cumulative_train`, `cumulative_validation` (step, layer), in units of loss; `parameters`
        (quadrant, tensor), a count of single parameters by what they did over training, `allocated_train` and
        `allocated_validation` (quadrant, tensor), their sums; `worst_train`, `worst_validation` (worst) with coordinate `worst_name`.

    Raises:
        LCAError: where no segment is there yet, or stored numbers are damaged.
        InputError: where the two are not of one run, have groups, or do not have the same segments.
    """
    if train.path != validation.path:
        raise InputError(f"{train.path} and {validation.path} are two runs; take two losses of one, for one path.")
    for each in (train, validation):
        if each.record.groups is not None:
            raise InputError(
                f"loss {each.name!r} has groups; take losses of whole splits, or compare groups in `layers`."
            )
    first, second = layers(train, by=by), layers(validation, by=by)
    left_out = list(dict.fromkeys(unfinished(train) + unfinished(validation)))
    same = train.behind == validation.behind
    if not same:
        first, second = _common(first, second)
        last = int(first["step_end"].values[-1]) if first.sizes["step"] else 0
        left_out.append(f"One loss goes on after the other ends: both are shown up to step {last:,}.")
    if not np.array_equal(first["step"].values, second["step"].values) or not first.sizes["step"]:
        raise InputError("the two losses do not have the same segments yet. Run `lca run` again to finish both.")
    made = {}
    for name, found in (("train", first), ("validation", second)):
        made[name] = described(found["allocated"].sum("step"), "loss", f"Σ allocation over training, {name}")
        made[f"cumulative_{name}"] = described(found["cumulative"], "loss", f"Σ allocation so far, {name}")
    coords: dict[Any, Any] = dict(first.coords)
    if train.complete and validation.complete and same:
        parameters, places = _quadrants(train, validation, most)
        made |= parameters
        coords |= places
    else:
        left_out.append("What single parameters did needs every segment of both.")
    attrs = {**about(train, "generalisation", left_out), "loss": f"{train.name}, {validation.name}"}
    return xr.Dataset(made, coords=coords, attrs={**attrs, "split": f"{train.record.on}, {validation.record.on}"})


def _common(first: xr.Dataset, second: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """Return both over the segments up to the last checkpoint that both cover."""
    last = min(each["step_end"].values[-1] for each in (first, second))
    one, other = (each.isel(step=each["step_end"].values <= last) for each in (first, second))
    return one, other


def _quadrants(train: LossResults, validation: LossResults, most: int) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = [tensor.spec.name for tensor in train.manifest.allocated if tensor.spec.kind == "parameter"]
    count = np.zeros((len(QUADRANTS), len(tensors)), "int64")
    sums = np.zeros((2, len(QUADRANTS), len(tensors)))
    worst: list[tuple[float, str, float, float]] = []
    wanted = ("allocated",)
    both = zip(each_total(train, wanted), each_total(validation, wanted), strict=True)
    for (spec, part, (one,)), (_, _, (two,)) in both:
        at = tensors.index(spec.name)
        which = np.select([(one == 0) | (two == 0), (one < 0) & (two < 0), one < 0, two < 0], [4, 0, 1, 2], 3)
        count[:, at] += np.bincount(which.ravel(), minlength=len(QUADRANTS))
        for row, values in enumerate((one, two)):
            sums[row, :, at] += np.bincount(which.ravel(), values.ravel(), len(QUADRANTS))
        harm = np.where(which == 1, np.minimum(-one, two), 0.0).ravel()
        for each in largest(harm, most):
            if harm[each] > 0:
                name = parameter_name(spec.name, place_of(part, each))
                worst.append((float(harm[each]), name, float(one.ravel()[each]), float(two.ravel()[each])))
        worst = heapq.nlargest(most, worst)
    dims = ("quadrant", "tensor")
    made = {
        "parameters": described((dims, count), "parameters", "parameters by what they did to both losses"),
        "allocated_train": described((dims, sums[0]), "loss", "Σ allocation of these parameters, train"),
        "allocated_validation": described((dims, sums[1]), "loss", "Σ allocation of these parameters, validation"),
        "worst_train": described((("worst",), np.array([each[2] for each in worst])), "loss", "Σ allocation, train"),
        "worst_validation": described(
            (("worst",), np.array([each[3] for each in worst])), "loss", "Σ allocation, validation"
        ),
    }
    coords = {
        "quadrant": list(QUADRANTS),
        "tensor": np.array(tensors, dtype=object),
        "worst_name": ("worst", np.array([each[1] for each in worst], dtype=object)),
    }
    return made, coords
