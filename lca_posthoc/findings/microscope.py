"""Lay out the allocation of every parameter as frames over time: one pixel per parameter, by
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from ..base.declarations import GROUPS, Finding, Option
from ..checkpoints.trajectory import TensorSpec
from ..errors import InputError
from ..results import LossResults
from .common import Numbers, about, blocks, described, stretches, tables, unfinished

FINDING = Finding(
    question="What did every parameter do, frame by frame",
    needs="`--keep parameters`",
    place=100,
    level="parameters",
    on_request=True,
    options=(
        GROUPS,
        Option(
            name="tensors",
            flag="--tensor",
            metavar="NAME",
            repeatable=True,
            help="Only this tensor's pixels (repeatable).",
        ),
        Option(
            name="step",
            flag="--step",
            kind=int,
            help="The training step to picture.  [default: the last with anything visible]",
        ),
        Option(
            name="fps",
            flag="--fps",
            kind=int,
            help="Frames of a film per second.  [default: 10]",
        ),
    ),
)

_QUANTILE = 0.995


def microscope(
    results: LossResults,
    *,
    tensors: Sequence[str] | None = None,
    frames: int = 120,
    pixels: int = 250_000,
    group: int | str | None = None,
) -> xr.Dataset:
    """Return the allocation of every parameter as pictures over time: a kernel as its matrix, a
    convolution as a grid of its filters.

    Rows of a picture run over the output axis (and the height of filters), columns over the input
    axis (and the width); a vector is one column. Frames are sums over stretches of consecutive
    segments, pixels over blocks of neighbouring parameters where not all fit: totals stay the same.

    Args:
        results: one loss of a run kept with `--keep parameters`.
        tensors: their names; None for all parameters.
        frames: the most stretches.
        pixels: the most pixels of a frame, over all tensors.
        group: of a loss with groups; None for their weighted mean.

    Returns:
        One variable per tensor, dims `(step, "NAME:row", "NAME:column")`, float32, in units of
        loss, with attributes `shape` (of the tensor), `axes` (of the tensor, those in rows and
        those in columns) and `pool` (parameters a pixel sums, [rows, columns]); coordinates `step`,
        `step_end`, `step:loss_start` and `step:loss_end`; attribute `scale`, the 99.5 % quantile of
        nonzero |values|, over all frames and tensors.

    Raises:
        LCAError: if the run does not keep parameters, no segment is finished yet, or stored
            numbers are damaged.
        InputError: for an unknown tensor or group.
    """
    table = tables(results, FINDING.level, "allocations of single parameters")
    steps, data = results.steps, results.allocation
    specs = {tensor.spec.name: tensor.spec for tensor in results.manifest.allocated}
    chosen = (
        list(tensors)
        if tensors is not None
        else [name for name in specs if specs[name].kind == "parameter"]
    )
    for name in chosen:
        if name not in specs:
            raise InputError(
                f"there is no tensor {name!r} with a kept allocation; there are "
                f"{', '.join(list(specs)[:6])}."
            )
    weights = _weights(steps, group, results.name)
    borders = stretches(table.sizes["step"], frames)
    axes = {name: _axes(specs[name]) for name in chosen}
    extents = {name: _extent(specs[name].shape, *axes[name]) for name in chosen}
    pool = _pools(extents, pixels)
    pictures = {}
    for name in chosen:
        values = _frames(
            data[name], specs[name], weights, borders, pool[name], results.manifest.span
        )
        dims, values, attrs = described(
            (("step", f"{name}:row", f"{name}:column"), values), "loss", f"allocation of {name}"
        )
        attrs |= {
            "shape": list(specs[name].shape),
            "axes": [list(side) for side in axes[name]],
            "pool": list(pool[name]),
        }
        pictures[name] = (dims, values, attrs)
    nonzero = np.concatenate(
        [abs(values[values != 0]) for _, values, _ in pictures.values()] or [np.zeros(0)]
    )
    scale = float(np.quantile(nonzero, _QUANTILE)) if nonzero.size else 0.0
    start, end = (_of_group(steps[f"loss_{which}"], weights).values for which in ("start", "end"))
    coords = {
        "step": table["step"].values[borders[:-1]],
        "step_end": ("step", table["step_end"].values[borders[1:] - 1]),
        "step:loss_start": ("step", start[borders[:-1]]),
        "step:loss_end": ("step", end[borders[1:] - 1]),
    }
    attrs = {
        **about(results, "microscope", unfinished(results)),
        "scale": scale,
        "group": "" if group is None else group,
    }
    return xr.Dataset(pictures, coords=coords, attrs=attrs)


def _weights(steps: xr.Dataset, group: int | str | None, name: str) -> xr.DataArray | None:
    """Return the weights of the groups, (step, group): their shares of the split, or 1 for `group`
    and 0 for the others.

    Raises:
        InputError: if the loss has no such group.
    """
    if "group" not in steps.dims:
        if group is not None:
            raise InputError(f"loss {name!r} has no groups, so there is no group {group!r}.")
        return None
    if group is None:
        return steps["weight"] / steps["weight"].sum("group")
    labels = list(steps["group"].values)
    if group not in labels:
        raise InputError(
            f"loss {name!r} has no group {group!r}; it has {', '.join(map(repr, labels[:6]))}."
        )
    return xr.ones_like(steps["weight"]) * (steps["group"] == group)


def _of_group(column: xr.DataArray, weights: xr.DataArray | None) -> xr.DataArray:
    return column if weights is None else (column * weights).sum("group")


def _axes(spec: TensorSpec) -> tuple[list[int], list[int]]:
    """Return the tensor's axes that run along the rows and along the columns of its picture."""
    if not spec.shape:
        return [], []
    first = spec.unit_axis or 0
    rest = [axis for axis in range(len(spec.shape)) if axis != first]
    rows = [first, rest.pop(-2)] if len(rest) > 2 else [first]
    return rows, rest


def _extent(shape: tuple[int, ...], rows: list[int], columns: list[int]) -> tuple[int, int]:
    return math.prod(shape[axis] for axis in rows), math.prod(shape[axis] for axis in columns)


def _pools(extents: dict[str, tuple[int, int]], pixels: int) -> dict[str, tuple[int, int]]:
    """Return the smallest blocks, k × k where there is room, with which all pictures together have
    at most `pixels`.

    Raises:
        InputError: if the tensors do not fit.
    """
    if len(extents) > pixels:
        raise InputError(
            f"{len(extents):,} tensors do not fit into {pixels:,} pixels. Name some, or allow more "
            "pixels."
        )
    size = 1
    while (
        sum(-(-rows // size) * -(-columns // size) for rows, columns in extents.values()) > pixels
    ):
        size += 1
    return {
        name: (min(size, rows), min(size, columns)) for name, (rows, columns) in extents.items()
    }


def _frames(
    data: xr.DataArray,
    spec: TensorSpec,
    weights: xr.DataArray | None,
    borders: Numbers,
    pool: tuple[int, int],
    span: int,
) -> Numbers:
    """Return sums over stretches and blocks of pixels, (frames, rows, columns), reading the stored
    arrays in parts.
    """
    axes = _axes(spec)
    height, width = _extent(spec.shape, *axes)
    pictures = np.zeros((len(borders) - 1, -(-height // pool[0]), -(-width // pool[1])))
    groups = 1 if weights is None else weights.sizes["group"]
    for start in range(0, data.shape[0], span):
        rows = min(span, data.shape[0] - start)
        frames = np.searchsorted(borders, np.arange(start, start + rows), side="right") - 1
        for part in blocks(spec.shape, rows * groups):
            if weights is None:
                values = data[(slice(start, start + rows), *part)].values.astype("float64")
            else:
                stored = data[(slice(start, start + rows), slice(None), *part)].values
                values = np.einsum(
                    "tg,tg...->t...", weights[start : start + rows].values, stored.astype("float64")
                )
            places = [
                _places(spec.shape, part, side) // size
                for side, size in zip(axes, pool, strict=True)
            ]
            order = [0, *(axis + 1 for side in axes for axis in side)]
            values = values.transpose(order).reshape(rows, len(places[0]), len(places[1]))
            for axis, place in enumerate(places, start=1):
                values = np.add.reduceat(
                    values, np.flatnonzero(np.diff(place, prepend=-1)), axis=axis
                )
            low = [place[0] for place in places]
            inner = tuple(
                slice(first, first + extent)
                for first, extent in zip(low, values.shape[1:], strict=True)
            )
            for frame, picture in zip(frames, values, strict=True):
                pictures[(frame, *inner)] += picture
    return pictures.astype("float32")


def _places(shape: tuple[int, ...], part: tuple[slice, ...], axes: list[int]) -> Numbers:
    """Return the positions of a part's elements along the rows (or columns) of the whole picture,
    rising.
    """
    places = np.zeros(1, "int64")
    for axis in axes:
        places = (
            places[:, None] * shape[axis] + np.arange(part[axis].start, part[axis].stop)
        ).reshape(-1)
    return places
