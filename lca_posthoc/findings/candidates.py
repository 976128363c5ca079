"""Find candidates to freeze, prune or reinitialise: layers that hurt, units and parameters that
never helped, dead units.
"""

from __future__ import annotations

import heapq

import numpy as np
import xarray as xr

from ..base.declarations import BY, Finding
from ..results import LossResults
from .bands import held_back
from .common import (
    Numbers,
    Variable,
    about,
    beyond_keep,
    described,
    each_total,
    largest,
    layer_of,
    parameter_name,
    place_of,
    refuse_part,
    unfinished,
)
from .errors import is_told, over_groups
from .layers import layers

FINDING = Finding(
    question="What might be frozen, pruned, reinitialised",
    needs="any run; units and parameters `--keep statistics`",
    place=90,
    options=(BY,),
)


def candidates(results: LossResults, *, by: str | int = "module", most: int = 20) -> xr.Dataset:
    """Return layers to freeze, units and parameters that hurt or never helped, and units at exactly
    zero throughout.

    A candidate is a question for an experiment, not its answer: the allocation tells what a
    parameter did on this path, not what the others would have done without it (Lan et al. 2019,
    section 4.2, freeze a layer that hurts and reach a lower loss).

    Layers are ordered by their sums, the largest first; a layer whose sum is within its error is no
    candidate. Tensors are ordered by the share of their parameters that never helped or never had
    an effect. Buffers, such as running statistics, are not trained and are excluded.

    Args:
        results: one loss of a run, at any level of `--keep`; units and parameters need `--keep
            statistics` and every segment.
        by: as of `layers`.
        most: how many units and parameters to name.

    Returns:
        By layer `total`, `mean` (loss), the errors of `total` with `error` and `verdict` as of
        `layers`, `helping` (share, from `--keep statistics` on) and `freeze` (whether its total is
        above zero by more than its error), for all groups together (`helping` is the mean of their
        shares); by tensor counts of parameters `never_helped` (they hurt on some segment and helped
        on none) and `silent` (exactly zero throughout), out of `tensor_elements`, and of `units` and
        `dead_units` (all incoming weights silent); `unit_total` (unit) of the units of modules that
        hurt most, with their bias, named by `unit_name`; `dead_name` (dead); `parameter_allocated`
        and `parameter_helping` (parameter), those that hurt most, named by `parameter_name`.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
    """
    refuse_part(results, "candidates")
    by_layer = layers(results, by=by)
    sums = over_groups(results, by_layer)
    total = sums["total"]
    trained = by_layer["role"].values != "buffer"
    left_out = [*unfinished(results), *sums.attrs["not_known"]]
    if (~trained).any():
        apart = float(total.values[~trained].sum())
        left_out.append(
            f"Buffers, such as running statistics, are excluded; their sum is {apart:+.4g}."
        )
    order = [position for position in np.argsort(-total.values, kind="stable") if trained[position]]
    by_layer, sums = by_layer.isel(layer=order), sums.isel(layer=order)
    total = sums["total"]
    variables: dict[str, Variable] = {
        **{
            str(name): (("layer",), column.values, column.attrs)
            for name, column in sums.data_vars.items()
        },
        "mean": described(
            total / np.maximum(1, by_layer["elements"]),
            "loss",
            "allocation per parameter over training",
        ),
    }
    if "helping" in by_layer:
        share = by_layer["helping"]
        share = share.mean("group") if "group" in share.dims else share
        variables["helping"] = described(
            share, "share", "share of parameters × segments that helped"
        )
    hurt = (total.values > 0) & is_told(sums)
    variables["freeze"] = described(
        (("layer",), hurt), "", "its total is above zero by more than its error: it hurt"
    )
    coords: dict[str, object] = {name: by_layer[name] for name in ("layer", "elements", "role")}
    beyond = beyond_keep(results, "statistics", "Units and parameters")
    on_lines = [] if beyond else held_back(results.tensors, "units and parameters that never help")
    left_out += on_lines
    if results.complete and not beyond and not on_lines:
        of_parameters, places = _of_parameters(results, most)
        variables |= of_parameters
        coords = {**coords, **places}
    elif not beyond and not on_lines:
        left_out.append("Units and parameters need every segment.")
    attrs = about(results, "candidates", left_out, beyond)
    return _by_evidence(xr.Dataset(variables, coords=coords, attrs=attrs))


def _by_evidence(data: xr.Dataset) -> xr.Dataset:
    """Sort tensors by the share of parameters that never helped, or never had an effect, the
    largest first.
    """
    if "tensor" not in data.dims:
        return data
    idle = (data["never_helped"] + data["silent"]).values / np.maximum(
        1, data["tensor_elements"].values
    )
    return data.isel(tensor=np.argsort(-idle, kind="stable"))


class _Unit:
    """Sums over the incoming weights (and the bias) of a module's units; a scalar is no unit of a
    layer.
    """

    def __init__(self, count: int) -> None:
        self.total, self.moved = np.zeros(count), np.zeros(count, bool)
        self.is_layer = False


def _of_parameters(
    results: LossResults, most: int
) -> tuple[dict[str, Variable], dict[str, object]]:
    specs = [
        tensor.spec for tensor in results.manifest.allocated if tensor.spec.kind == "parameter"
    ]
    index_of = {spec.name: position for position, spec in enumerate(specs)}
    counts = {
        name: np.zeros(len(specs), "int64")
        for name in ("never_helped", "silent", "units", "dead_units")
    }
    modules: dict[tuple[str, int], _Unit] = {}
    tensors: dict[str, _Unit] = {}
    worst: list[tuple[float, str, float]] = []
    for spec, part, values in each_total(results, ("allocated", "helping", "hurting")):
        allocated, helping, hurting = values
        counts["never_helped"][index_of[spec.name]] += int(((helping == 0) & (hurting > 0)).sum())
        counts["silent"][index_of[spec.name]] += int(((helping == 0) & (hurting == 0)).sum())
        units = 1 if spec.unit_axis is None else spec.shape[spec.unit_axis]
        own = tensors.setdefault(spec.name, _Unit(units))
        shared = modules.setdefault((layer_of(spec.name), units), _Unit(units))
        where = slice(0, 1) if spec.unit_axis is None else part[spec.unit_axis]
        others = tuple(axis for axis in range(allocated.ndim) if axis != spec.unit_axis)
        shared.is_layer |= spec.unit_axis is not None
        for unit in (own, shared):
            unit.total[where] += allocated.sum(others).reshape(-1)
            unit.moved[where] |= ((helping + hurting) > 0).any(others).reshape(-1)
        worst = heapq.nlargest(
            most, [*worst, *_hurting(spec.name, part, values, results.manifest.segments, most)]
        )
    for name, own in tensors.items():
        counts["units"][index_of[name]] = len(own.total)
        counts["dead_units"][index_of[name]] = int((~own.moved).sum())
    variables, coords = _tables(counts, modules, worst, most, [spec.name for spec in specs])
    return variables, {**coords, "tensor_elements": ("tensor", [spec.elements for spec in specs])}


def _hurting(
    name: str, part: tuple[slice, ...], values: Numbers, segments: int, most: int
) -> list[tuple[float, str, float]]:
    allocated, helping = values[0].ravel(), values[1].ravel()
    hurting = []
    for position in largest(allocated, most):
        if allocated[position] > 0:
            label = parameter_name(name, place_of(part, position))
            hurting.append((float(allocated[position]), label, float(helping[position] / segments)))
    return hurting


def _tables(
    counts: dict[str, Numbers],
    modules: dict[tuple[str, int], _Unit],
    worst: list[tuple[float, str, float]],
    most: int,
    tensors: list[str],
) -> tuple[dict[str, Variable], dict[str, object]]:
    units = [
        (float(value), f"{module}[{index}]")
        for (module, _), unit in modules.items()
        for index, value in _largest(unit.total, most)
    ]
    units = heapq.nlargest(most, units)
    dead = [
        f"{module}[{index}]"
        for (module, _), unit in modules.items()
        if unit.is_layer
        for index in np.flatnonzero(~unit.moved)[:most]
    ][:most]
    words = {
        "never_helped": ("parameters", "parameters that hurt on some segment and helped on none"),
        "silent": ("parameters", "parameters at exactly zero throughout"),
        "units": ("units", "neurons or channels"),
        "dead_units": ("units", "units whose incoming weights are all silent"),
    }
    variables = {name: described((("tensor",), counts[name]), *words[name]) for name in counts}
    variables |= {
        "unit_total": described(
            (("unit",), np.array([value for value, _ in units])), "loss", "Σ allocation of the unit"
        ),
        "parameter_allocated": described(
            (("parameter",), np.array([row[0] for row in worst])), "loss", "Σ allocation"
        ),
        "parameter_helping": described(
            (("parameter",), np.array([row[2] for row in worst])),
            "share",
            "share of segments on which it helped",
        ),
    }
    coords: dict[str, object] = {
        "tensor": np.array(tensors, dtype=object),
        "unit_name": ("unit", np.array([name for _, name in units], dtype=object)),
        "dead_name": ("dead", np.array(dead, dtype=object)),
        "parameter_name": ("parameter", np.array([row[1] for row in worst], dtype=object)),
    }
    return variables, coords


def _largest(total: Numbers, most: int) -> list[tuple[int, float]]:
    """Return the units that hurt and their sums, the largest first."""
    order = np.argsort(-total, kind="stable")[:most]
    return [(int(position), float(total[position])) for position in order if total[position] > 0]
