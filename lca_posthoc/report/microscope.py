"""Turn every parameter's allocation over training into frames that a page can play."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import xarray as xr

from .. import findings
from ..checkpoints.trajectory import TensorSpec
from ..errors import LCAError
from ..findings.names import fitting
from .content import clean, count
from .downsample import Packed, raw
from .panels import Panel

FRAMES = 120
_FEWEST = 40  # frames, so that each parameter keeps a cell of its own
TENSORS = 1000
BYTES = 4_200_000  # of codes; base64 takes a third more
_QUANTILE = 0.995  # quantile of nonzero values at which colours saturate
_LARGEST_HALF = 32768.0
_LETTERS = 12  # characters above a narrow picture


class TensorPicture(TypedDict):
    """A tensor under the microscope: its names, the place of its cells in a frame, and the
    parameters of a cell.
    """

    name: str
    layer: str
    short: str
    rows: int
    columns: int
    offset: int
    shape: list[int]
    pool: list[int]
    axes: list[list[int]]


def microscope(panel: Panel, size: int = BYTES) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the frames of one loss, within `size` bytes of codes.

    The values of a small run are stored in half precision, those of a larger one in 255 levels and
    pooled over blocks of parameters and stretches of segments.

    Args:
        panel: of the loss.
        size: the most bytes.

    Returns:
        The data that the page's script reads (None without frames, as for a run that does not keep
        every parameter's allocation), and notes on what is missing.
    """
    manifest = panel.run.manifest
    if not panel.allows("microscope"):
        return None, []
    if not size:
        return None, ["The microscope did not fit into the file."]
    frames = min(FRAMES, max(1, panel.summary["segments"]))
    specs = [tensor.spec for tensor in manifest.allocated if tensor.spec.kind == "parameter"]
    chosen = set(
        sorted(range(len(specs)), key=lambda position: -specs[position].elements)[:TENSORS]
    )
    names = [spec.name for position, spec in enumerate(specs) if position in chosen]
    elements = sum(spec.elements for position, spec in enumerate(specs) if position in chosen)
    exact = elements * frames * 2 <= size
    if elements and _FEWEST <= size // elements < frames:
        frames = size // elements  # prefer fewer frames to several parameters in a cell
    pixels = max(2 * TENSORS, size // frames // (2 if exact else 1))
    try:
        pictures, scale = _pictures(
            panel,
            [spec for position, spec in enumerate(specs) if position in chosen],
            frames,
            pixels,
        )
    except LCAError as error:
        return None, [clean(error, 400)]
    tensors = _tensors(pictures, names)
    if not tensors:
        return None, ["The microscope has nothing to show."]
    values = np.concatenate(
        [np.asarray(pictures[name].values).reshape(pictures.sizes["step"], -1) for name in names],
        axis=1,
    )
    exact = values.size * 2 <= size
    codes, packed = _half(values) if exact else _levels(values)
    notes = _notes(panel, pictures, tensors, exact)
    if len(names) < len(specs):
        notes.append(
            f"The microscope shows the {len(names):,} largest of {count(len(specs), 'tensor')}."
        )
    return {
        **packed,
        "tensors": tensors,
        "frames": int(values.shape[0]),
        "pooled": any(math.prod(entry["pool"]) > 1 for entry in tensors),
        "segments": panel.summary["segments"],
        "step": [int(step) for step in pictures["step"].values],
        "step_end": [int(step) for step in pictures["step_end"].values],
        "loss_start": _floats(pictures["step:loss_start"]),
        "loss_end": _floats(pictures["step:loss_end"]),
        "scale": scale or 1.0,
        "data": raw(codes),
    }, notes


def _pictures(
    panel: Panel, specs: list[TensorSpec], frames: int, pixels: int
) -> tuple[xr.Dataset, float]:
    """Return the pictures of all tensors, and where their colours saturate; if not all fit, only
    the largest are pooled.
    """
    order, pixels_left, whole = sorted(specs, key=lambda spec: spec.elements), pixels, list[str]()
    for position, spec in enumerate(order):
        # the others, all larger, need as much room each when pooled to the size of this one
        if spec.elements * (len(order) - position) > pixels_left:
            break
        whole.append(spec.name)
        pixels_left -= spec.elements
    large = [spec.name for spec in specs if spec.name not in whole]
    finding: Callable[..., Any] = findings.microscope
    parts = [(whole, pixels), (large, pixels_left)]
    pictures = [
        finding(panel.results, tensors=names, frames=frames, pixels=room)
        for names, room in parts
        if names
    ]
    values = [
        abs(np.asarray(part[name].values, dtype=np.float64))
        for part in pictures
        for name in part.data_vars
    ]
    nonzero = np.concatenate([value[value != 0] for value in values])
    scale = float(np.quantile(nonzero, _QUANTILE)) if nonzero.size else 0.0
    return xr.merge(pictures, combine_attrs="override", compat="override", join="exact"), scale


def _tensors(pictures: xr.Dataset, names: list[str]) -> list[TensorPicture]:
    tensors, offset = list[TensorPicture](), 0
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    short = dict(zip(layers, fitting(layers, [_LETTERS] * len(layers)), strict=True))
    for name in names:
        variable = pictures[name]
        rows, columns = variable.shape[1:]
        tensors.append(
            {
                "name": clean(name),
                "layer": clean(name.rpartition(".")[0] or name),
                "short": clean(short[name.rpartition(".")[0] or name]),
                "rows": int(rows),
                "columns": int(columns),
                "offset": offset,
                "shape": [int(extent) for extent in variable.attrs["shape"]],
                "pool": [int(width) for width in variable.attrs["pool"]],
                "axes": [[int(axis) for axis in axes] for axes in variable.attrs["axes"]],
            }
        )
        offset += int(rows * columns)
    return tensors


def _half(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Packed]:
    """Return values in half precision, in units that scale the largest value close to the largest
    number.
    """
    peak = float(np.abs(values).max(initial=0.0)) or 1.0
    unit = peak / _LARGEST_HALF
    return (values / unit).astype("<f2").view("<u2"), {
        "code": "half",
        "unit": unit,
        "rounding": "rounded to 0.05 %",
    }


def _levels(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Packed]:
    """Return values in 255 levels, v = sign(q) (q / 127)² peak, with zero at 128: finer for small
    values than for large ones.
    """
    peak = float(np.abs(values).max(initial=0.0)) or 1.0
    levels = np.round(np.sqrt(np.abs(values.astype(np.float64)) / peak) * 127)
    codes = (128 + np.sign(values) * levels).astype("u1")
    return codes, {
        "code": "levels",
        "unit": peak,
        "rounding": "rounded to one of 255 levels, to 0.8 % of the largest value at worst",
    }


def _notes(
    panel: Panel, pictures: xr.Dataset, tensors: list[TensorPicture], exact: bool
) -> list[str]:
    notes = [clean(pictures.attrs["left_out"], 400)] if pictures.attrs.get("left_out") else []
    segments = panel.summary["segments"]
    if pictures.sizes["step"] < segments:
        most_segments = math.ceil(segments / pictures.sizes["step"])
        notes.append(
            f"The microscope shows {pictures.sizes['step']} frames, each the sum of up to "
            f"{most_segments} of {segments:,} segments."
        )
    pooled = [tensor for tensor in tensors if math.prod(tensor["pool"]) > 1]
    if pooled:
        most = max(math.prod(tensor["pool"]) for tensor in pooled)
        which = (
            f"{count(len(pooled), 'tensor')} of {len(tensors):,} "
            f"{'is' if len(pooled) == 1 else 'are'}"
        )
        notes.append(
            f"{which} pooled under the microscope: a cell is the sum of up to {most:,} parameters."
        )
    if not exact:
        notes.append("Values under the microscope are rounded to one of 255 levels.")
    if panel.groups is not None:
        notes.append("The microscope shows the mean over groups.")
    return notes


def _floats(data: xr.DataArray) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in data.values]
