"""What might be frozen, pruned or initialised again: layers that hurt, units and parameters that never helped, dead units."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import xarray as xr

from ..store import LossResults
from .layers import layers
from .parts import Numbers, about, described, each_total, largest, layer_of, parameter_name, place_of, unfinished


def candidates(results: LossResults, *, by: str | int = "module", most: int = 20) -> xr.Dataset:
    """Layers to freeze, units and parameters that hurt or never helped, units at exactly zero throughout.

    A candidate is a question for an experiment and not its answer: the allocation says what a parameter did on this path, not what
    the others would have done without it (Lan et al. 2019, section 4.2, freeze a layer that hurts and end lower).

    Layers come by their sums, the one that hurt most first, tensors by the share of their parameters that never helped or never did
    anything. Buffers, such as running statistics, are not trained and no candidates.

    Args:
        results: one loss of a run, at any level of `--keep`; units and parameters need every segment.
        by: as of `layers`.
        most: how many units and parameters to name.

    Returns:
        By layer `total`, `mean` (loss), `helping` (share) and `freeze` (whether its total is above zero), of all groups together
        (of `helping`, the mean of their shares);
        by tensor counts of parameters `never_helped` (they hurt on some segment and helped on none) and `silent` (exactly zero
        throughout), of `tensor_elements`, and of `units` and `dead_units` (all incoming weights silent); `unit_total` (unit) of the
        units of modules that hurt most, with their bias, named by `unit_name`; `dead_name` (dead); `parameter_allocated` and
        `parameter_helping` (parameter), those that hurt most, named by `parameter_name`.

    Raises:
        LCAError: where no segment is there yet, or stored numbers are damaged.
    """
    found = layers(results, by=by)
    total, helping = found["total"], found["helping"]
    if "group" in found.dims:
        weight = results.steps["weight"]
        total = (found["allocated"] * weight / weight.sum("group")).sum(("step", "group"))
        helping = helping.mean("group")
    trained = found["role"].values != "buffer"
    left_out = unfinished(results)
    if (~trained).any():
        apart = float(total.values[~trained].sum())
        left_out.append(f"Buffers, such as running statistics, are no candidates; their sum is {apart:+.4g}.")
    order = [at for at in np.argsort(-total.values, kind="stable") if trained[at]]
    found, total, helping = found.isel(layer=order), total.isel(layer=order), helping.isel(layer=order)
    made: dict[str, Any] = {
        "total": described(total, "loss", "Σ allocation over training"),
        "mean": described(total / np.maximum(1, found["elements"]), "loss", "allocation per parameter over training"),
        "helping": described(helping, "share", "share of parameters × segments that helped"),
        "freeze": described((("layer",), total.values > 0), "", "its total is above zero: it hurt"),
    }
    coords: dict[Any, Any] = {name: found[name] for name in ("layer", "elements", "role")}
    if results.complete:
        each, places = _of_parameters(results, most)
        made |= each
        coords = {**coords, **places}
    else:
        left_out.append("Units and parameters need every segment.")
    return _by_evidence(xr.Dataset(made, coords=coords, attrs=about(results, "candidates", left_out)))


def _by_evidence(found: xr.Dataset) -> xr.Dataset:
    """Put tensors with the largest share of parameters that never helped, or never did anything, first."""
    if "tensor" not in found.dims:
        return found
    idle = (found["never_helped"] + found["silent"]).values / np.maximum(1, found["tensor_elements"].values)
    return found.isel(tensor=np.argsort(-idle, kind="stable"))


class _Unit:
    """Sums over the incoming weights (and the bias) of the units of one module."""

    def __init__(self, count: int) -> None:
        self.total, self.moved = np.zeros(count), np.zeros(count, bool)


def _of_parameters(results: LossResults, most: int) -> tuple[dict[str, Any], dict[str, Any]]:
    specs = [tensor.spec for tensor in results.manifest.allocated if tensor.spec.kind == "parameter"]
    at = {spec.name: position for position, spec in enumerate(specs)}
    counts = {name: np.zeros(len(specs), "int64") for name in ("never_helped", "silent", "units", "dead_units")}
    modules: dict[tuple[str, int], _Unit] = {}
    tensors: dict[str, _Unit] = {}
    worst: list[tuple[float, str, float]] = []
    for spec, part, values in each_total(results, ("allocated", "helping", "hurting")):
        allocated, helping, hurting = values
        counts["never_helped"][at[spec.name]] += int(((helping == 0) & (hurting > 0)).sum())
        counts["silent"][at[spec.name]] += int(((helping == 0) & (hurting == 0)).sum())
        units = 1 if spec.unit_axis is None else spec.shape[spec.unit_axis]
        own = tensors.setdefault(spec.name, _Unit(units))
        shared = modules.setdefault((layer_of(spec.name), units), _Unit(units))
        where = slice(0, 1) if spec.unit_axis is None else part[spec.unit_axis]
        others = tuple(axis for axis in range(allocated.ndim) if axis != spec.unit_axis)
        for each in (own, shared):
            each.total[where] += allocated.sum(others).reshape(-1)
            each.moved[where] |= ((helping + hurting) > 0).any(others).reshape(-1)
        worst = heapq.nlargest(most, [*worst, *_hurting(spec.name, part, values, results.manifest.segments, most)])
    for name, own in tensors.items():
        counts["units"][at[name]] = len(own.total)
        counts["dead_units"][at[name]] = int((~own.moved).sum())
    made, coords = _tables(counts, modules, worst, most, [spec.name for spec in specs])
    return made, {**coords, "tensor_elements": ("tensor", [spec.elements for spec in specs])}


def _hurting(
    name: str, part: tuple[slice, ...], values: Numbers, segments: int, most: int
) -> list[tuple[float, str, float]]:
    allocated, helping = values[0].ravel(), values[1].ravel()
    found = []
    for each in largest(allocated, most):
        if allocated[each] > 0:
            label = parameter_name(name, place_of(part, each))
            found.append((float(allocated[each]), label, float(helping[each] / segments)))
    return found


def _tables(
    counts: dict[str, Numbers], modules: dict[tuple[str, int], _Unit], worst: list[Any], most: int, tensors: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    units = [
        (float(value), f"{module}[{index}]")
        for (module, _), each in modules.items()
        for index, value in _largest(each.total, most)
    ]
    units = heapq.nlargest(most, units)
    dead = [
        f"{module}[{index}]"
        for (module, count), each in modules.items()
        if count > 1
        for index in np.flatnonzero(~each.moved)[:most]
    ][:most]
    words = {
        "never_helped": ("parameters", "parameters that hurt on some segment and helped on none"),
        "silent": ("parameters", "parameters at exactly zero throughout"),
        "units": ("units", "neurons or channels"),
        "dead_units": ("units", "units whose incoming weights are all silent"),
    }
    made = {name: described((("tensor",), counts[name]), *words[name]) for name in counts}
    made |= {
        "unit_total": described(
            (("unit",), np.array([value for value, _ in units])), "loss", "Σ allocation of the unit"
        ),
        "parameter_allocated": described(
            (("parameter",), np.array([each[0] for each in worst])), "loss", "Σ allocation"
        ),
        "parameter_helping": described(
            (("parameter",), np.array([each[2] for each in worst])), "share", "share of segments on which it helped"
        ),
    }
    coords = {
        "tensor": np.array(tensors, dtype=object),
        "unit_name": ("unit", np.array([name for _, name in units], dtype=object)),
        "dead_name": ("dead", np.array(dead, dtype=object)),
        "parameter_name": ("parameter", np.array([each[1] for each in worst], dtype=object)),
    }
    return made, coords


def _largest(total: Numbers, most: int) -> list[tuple[int, float]]:
    """The units that hurt, the largest first."""
    order = np.argsort(-total, kind="stable")[:most]
    return [(int(each), float(total[each])) for each in order if total[each] > 0]
