"""Show neurons and channels over time."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import Range1d

from ..content import Block, Cell, Column, Section, Table, View, clean, count, listed, signed
from ..downsample import gaps, picture
from ..figures import add_picture, steps_figure
from ..panels import Panel, Room

_LAYERS = 12
_ROWS = 256  # units side by side in a picture


def section() -> Section:
    """Return one figure: a heat map of units over steps."""
    chart = steps_figure("unit", 360, y_range=Range1d(0, 1))
    add_picture(
        chart, "units", [("unit", "$y{0}"), ("step", "$x{0}"), ("Σ allocation", "@image{%+.3e}")]
    )
    chart.yaxis.ticker.min_interval = 1
    chart.ygrid.grid_line_color = None
    return Section(
        name="units",
        title="Neurons and channels",
        reading="Each row is a neuron or channel, its incoming weights and its bias together, each "
        "column a stretch of training. "
        "Units in pale rows had little effect: they may be dead, or not needed.",
        figures={"units": chart},
        legends={"units": [("helping", "helped"), ("hurting", "hurt")]},
        headings={"units": "Units over training"},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return pictures of the layers with the largest sums, for the mean over groups.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("units")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    data = panel.of_group(finding["allocated"], None).transpose("step", "unit").values
    total = panel.of_group(finding["total"], None).values
    names = finding["layer"].values.astype(str)
    index = finding["index"].values
    order = list(dict.fromkeys(names.tolist()))
    if not order:
        return Block(notes=[*notes, "This model has no units."])
    sizes = {name: float(np.abs(total[names == name]).sum()) for name in order}
    shown = [
        name for name in order if name in sorted(order, key=lambda name: -sizes[name])[:_LAYERS]
    ]
    if len(shown) < len(order):
        notes.append(
            f"Units are drawn for the {len(shown)} layers with the largest sums of {len(order):,}."
        )
    if panel.groups is not None:
        notes.append("Units are drawn for the mean over groups.")
    steps, ends = finding["step"].values, finding["step_end"].values
    data = _evenly(data, steps, ends)
    edges = np.append(finding["step"].values[:1], finding["step_end"].values).astype(float)
    pixels = room.pixels(0.2) // len(shown)
    views: dict[str, View] = {}
    for place, name in enumerate(shown):
        picked = np.flatnonzero(names == name)
        views[f"|{place}"] = _view(data[:, picked].T, edges, pixels, notes, clean(name, 60))
    best, worst = int(np.nanargmin(total)), int(np.nanargmax(total))
    return Block(
        captions={
            "units": f"{count(len(total), 'unit')} in "
            f"{listed([clean(name, 60) for name in order])}. Most helpful: "
            f"{clean(names[best], 60)}[{index[best]}] ({signed(float(total[best]))}); least: "
            f"{clean(names[worst], 60)}"
            f"[{index[worst]}] ({signed(float(total[worst]))})."
        },
        views={"units": views},
        choice="Layer",
        choices=[clean(name, 60) for name in shown],
        tables=[_table(names, index, total)],
        notes=notes,
    )


def _evenly(
    data: np.ndarray[Any, Any], steps: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return (step, unit) with an empty row for each missing segment, so that rows lie at their
    steps in the picture.
    """
    after = gaps(steps, ends)
    width = float(np.median(ends - steps))
    missing = np.round((steps[after + 1] - ends[after]) / width).astype(int)
    return np.insert(data, np.repeat(after + 1, missing), 0.0, axis=0)


def _view(
    rows: np.ndarray[Any, Any],
    edges: np.ndarray[Any, Any],
    pixels: int,
    notes: list[str],
    name: str,
) -> View:
    """Return a picture of some units; if there are more than fit, sum blocks of units, then of
    steps.
    """
    units_in_row = max(1, -(-len(rows) // _ROWS))
    units = len(rows)
    if units_in_row > 1:
        rows = np.add.reduceat(rows, np.arange(0, units, units_in_row), axis=0)
        notes.append(f"{name}: each row is the sum of {units_in_row} units.")
    columns = max(8, pixels // len(rows))
    if columns < rows.shape[1]:
        starts = np.unique(np.linspace(0, rows.shape[1], columns + 1).astype(int)[:-1])
        rows = np.add.reduceat(rows, starts, axis=1)
    return {
        "units": {
            "image": picture(rows),
            "x": [float(edges[0])],
            "y": [-0.5],
            "dw": [float(edges[-1] - edges[0])],
            "dh": [float(len(rows) * units_in_row)],
        },
        "@range": {"y": [-0.5, len(rows) * units_in_row - 0.5]},
    }


def _table(
    names: np.ndarray[Any, Any], index: np.ndarray[Any, Any], total: np.ndarray[Any, Any]
) -> Table:
    order = np.argsort(total, kind="stable")
    picked = [*order[:5].tolist(), *order[-5:].tolist()] if len(order) > 10 else order.tolist()
    rows: list[list[Cell]] = [
        [f"{clean(names[position], 100)}[{index[position]}]", float(total[position])]
        for position in picked
    ]
    return Table(
        title="Units that helped most and least",
        columns=[Column("unit", "name"), Column("Σ allocation", "bar")],
        rows=rows,
    )
