"""Sum the allocation of each neuron or channel over training: its incoming weights and its bias."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import xarray as xr

from ..base.declarations import GROUPS, Finding, Option
from ..errors import InputError
from ..results import LossResults
from .common import (
    BLOCK,
    Numbers,
    about,
    described,
    estimated,
    grouping,
    label_of,
    moving_buffers,
    over_training,
    segments_error,
    stretches,
    tables,
    unfinished,
)

FINDING = Finding(
    question="What did each neuron or channel do over time",
    needs="`--keep units`",
    place=60,
    sampled=True,
    level="units",
    runs="beside",
    options=(
        GROUPS,
        Option(
            name="layer",
            flag="--layer",
            metavar="NAME",
            help="Only the units of this layer.",
        ),
    ),
)


def units(results: LossResults, *, layer: str | None = None, frames: int = 500) -> xr.Dataset:
    """Return the allocation of every neuron or channel over time: sums over its incoming weights
    and its bias.

    Tensors of one module with the same number of units belong together; buffers that moved are a
    layer of their own, as in `layers`. A long training is cut into stretches of consecutive
    segments; values are sums over them, so totals stay the same.

    Args:
        results: one loss of a run made with `--keep units` or more.
        layer: name of a module; None for all.
        frames: the most stretches.

    Returns:
        `allocated` (step[, group], unit) and `total` (unit[, group]), in units of loss; coordinates
        `layer` and `index` of unit, and `step`, `step_end`: the training steps at which stretches
        start and end. For a random part of the segments (`--segments`), `total` is an
        estimate, and `segments` (unit[, group]) its standard error.

    Raises:
        LCAError: if the run keeps no units, no segment is finished yet, or stored numbers are
            damaged.
        InputError: for an unknown layer.
    """
    table = tables(results, FINDING.level, "sums of units", sampled=True)
    data = results.units
    modules = _modules(data, moving_buffers(table))
    if layer is not None and layer not in modules:
        raise InputError(f"there is no layer {layer!r}; there are {', '.join(map(repr, modules))}.")
    borders = stretches(table.sizes["step"], frames)
    chosen = {module: names for module, names in modules.items() if layer in (None, module)}
    values, labels = _columns(results, data, chosen, borders)
    group = ("group",) if "group" in data.dims else ()
    total, error = values.sum(0), None
    if results.manifest.sampled is not None:
        every = np.arange(table.sizes["step"] + 1)
        by_segment, _ = _columns(results, data, chosen, every)
        column = xr.DataArray(by_segment, dims=("step", *group, "unit"))
        total = over_training(results, column).values
        told = segments_error(results, column)
        error = None if told is None else told.values
    variables = {
        "allocated": described(
            (("step", *group, "unit"), values), "loss", "Σ allocation of the unit over the stretch"
        ),
        "total": described(
            (("unit", *group), total.T), "loss", "Σ allocation of the unit over training"
        ),
    }
    if error is not None:
        variables["segments"] = described(
            (("unit", *group), error.T), "loss", "standard error of the total from drawing segments"
        )
    coords = {
        "step": table["step"].values[borders[:-1]],
        "step_end": ("step", table["step_end"].values[borders[1:] - 1]),
        "layer": ("unit", np.array([module for module, _ in labels], dtype=object)),
        "index": ("unit", [index for _, index in labels]),
    }
    left_out = [*unfinished(results), *estimated(results)]
    coords |= {
        name: column for name, column in table.coords.items() if name in ("group", "examples")
    }
    return xr.Dataset(variables, coords=coords, attrs=about(results, "units", left_out))


def _columns(
    results: LossResults, data: xr.Dataset, modules: dict[str, list[str]], borders: Numbers
) -> tuple[Numbers, list[tuple[str, int]]]:
    """Return the sums of every unit over stretches of segments, (stretch[, group], unit), and each
    unit's module and index.
    """
    columns: list[Numbers] = []
    labels: list[tuple[str, int]] = []
    for module, names in modules.items():
        for summed in _by_count(data, names, borders, results.manifest.span):
            columns.append(summed)
            labels += [(module, index) for index in range(summed.shape[-1])]
    return np.concatenate(columns, axis=-1), labels


def _modules(data: xr.Dataset, buffers: set[str]) -> dict[str, list[str]]:
    """Return the names of the tensors of every layer that has units."""
    modules: dict[str, list[str]] = {}
    names = [str(name) for name in data.data_vars]
    for members in grouping(names).values():
        for position in members:
            label = label_of(names[position], "module", buffers)
            modules.setdefault(label, []).append(names[position])
    return modules


def _by_count(data: xr.Dataset, names: list[str], borders: Numbers, span: int) -> Iterable[Numbers]:
    """Yield (stretch[, group], unit) for each number of units among a layer's tensors, summed over
    the tensors that have as many.
    """
    by_count: dict[int, Numbers] = {}
    for name in names:
        summed = in_stretches(data[name], borders, span)
        count = summed.shape[-1]
        by_count[count] = by_count[count] + summed if count in by_count else summed
    return by_count.values()


def in_stretches(data: xr.DataArray, borders: Numbers, span: int) -> Numbers:
    """Return sums over stretches of rows, float64; read whole rows of chunks, a bounded number at a
    time.

    Args:
        data: by segment.
        borders: of the stretches, (stretches + 1,).
        span: rows of a chunk.
    """
    rows = max(1, BLOCK // max(1, math.prod(data.shape[1:])))
    rows = max(span, rows - rows % span)
    summed = np.zeros((len(borders) - 1, *data.shape[1:]))
    for start in range(0, data.shape[0], rows):
        part = data[start : start + rows].values
        where = np.searchsorted(borders, np.arange(start, start + len(part)), side="right") - 1
        np.add.at(summed, where, part)
    return summed
