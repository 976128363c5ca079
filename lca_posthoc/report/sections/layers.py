"""The allocation of each layer, in all and over time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ..content import (
    MOST_ROWS,
    Block,
    Cell,
    Column,
    Section,
    Table,
    View,
    clean,
    count,
    listed,
    signed,
)
from ..downsample import lines, over_steps
from ..figures import add_level, add_many, steps_figure
from ..panels import Panel, Room

_DRAWN = 6  # layers ticked at first


def section() -> Section:
    """Return one figure: the running sums of the ticked layers."""
    chart = steps_figure("Σ allocation so far", 340)
    add_level(chart, 0)
    add_many(
        chart, "layers", [("layer", "@name"), ("step", "$snap_x{0}"), ("Σ so far", "$snap_y{%.5g}")]
    )
    return Section(
        name="layers",
        title="Layers",
        reading="A layer whose sum is negative lowered the loss; one whose sum is positive raised "
        "it, and it may be worth a try "
        "not to move it. Sums grow with the number of parameters, so compare layers of different "
        "size by the mean.",
        figures={"layers": chart},
        headings={"layers": "Running sum of each layer"},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the table and the running sums of the layers with the largest sums."""
    finding, left_out = panel.find("layers")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    total = panel.of_group(finding["total"], None).values
    shown = largest(total, MOST_ROWS)
    if len(shown) < len(total):
        notes.append(f"{count(len(total) - len(shown), 'layer')} with smaller sums are not shown.")
    names = [clean(finding["layer"].values[position]) for position in shown]
    steps = finding["step"].values
    most = room.points(len(shown) * len(panel.choices), 0.4)
    if most <= len(steps):
        notes.append(
            f"Running sums are drawn with {most:,} of {len(steps) + 1:,} points each, extremes "
            "kept."
        )
    return Block(
        captions={"layers": sentence(names, total[shown])},
        views=_views(panel, finding, shown, names, most),
        tables=[_table(panel, finding, shown, names)],
        notes=notes,
    )


def _views(
    panel: Panel, finding: xr.Dataset, shown: list[int], names: list[str], most: int
) -> dict[str, dict[str, View]]:
    """Return the running sums and the cells of the table, for each group that can be picked."""
    steps, ends = finding["step"].values, finding["step_end"].values
    views: dict[str, dict[str, View]] = {"layers": {}, "@layers": {}}
    for key, _, position in panel.choices:
        sums = (
            panel.of_group(finding["cumulative"], position)
            .transpose("step", "layer")
            .values[:, shown]
        )
        x, ys = over_steps(
            steps, ends, np.concatenate([np.zeros((1, len(shown))), sums[:-1]]).T, sums.T
        )
        xs, packed = lines(x, ys, most)
        views["layers"][f"{key}|"] = {
            "layers": {"xs": xs, "ys": packed, "name": names, "colour": "@palette"}
        }
        columns = [
            panel.of_group(finding[name], position).values[shown] for name in ("total", "mean")
        ]
        if "path" in finding:
            columns.insert(1, panel.of_group(finding["path"], position).values[shown])
        if "helping" in finding:
            columns.append(panel.share_of_group(finding["helping"], position).values[shown])
        views["@layers"][f"{key}|"] = {
            str(place): column.tolist() for place, column in enumerate(columns, 1)
        }
    return views


def _table(panel: Panel, finding: xr.Dataset, shown: list[int], names: list[str]) -> Table:
    total, mean = (panel.of_group(finding[name], None).values for name in ("total", "mean"))
    counted = "helping" in finding
    helping = panel.share_of_group(finding["helping"], None).values if counted else None
    path = panel.of_group(finding["path"], None).values if "path" in finding else None
    ticked = set(largest(total[shown], _DRAWN))
    rows: list[list[Cell]] = [
        [
            name,
            float(total[position]),
            *([] if path is None else [float(path[position])]),
            float(mean[position]),
            *([] if helping is None else [float(helping[position])]),
            int(finding["elements"].values[position]),
        ]
        for name, position in zip(names, shown, strict=True)
    ]
    columns = [
        Column("layer", "name"),  # what a phone shows without scrolling comes first
        Column("Σ allocation", "bar"),
        *([] if path is None else [Column("± path", "plain")]),
        Column("mean", "number"),
        *([Column("helping", "share")] if counted else []),
        Column("parameters", "count"),
    ]
    return Table(
        title="Layers, in the model's order: tick the ones to draw",
        columns=columns,
        rows=rows,
        note=" ".join(_notes(path is not None, panel.groups is not None and counted)),
        open=True,
        live="layers",
        pick=[position in ticked for position in range(len(rows))],
    )


def _notes(bent: bool, grouped: bool) -> Iterator[str]:
    if bent:
        yield (
            "± path: what other paths through the same checkpoints would change; no part of the "
            "residual, which is 0 for every path."
        )
    if grouped:
        yield "Helping is a share of parameters in one group: pick a group."


def sentence(names: list[str], total: np.ndarray[Any, Any]) -> str:
    """Say which layers helped most, and which hurt."""
    order = np.argsort(total, kind="stable")
    helped = [
        f"{names[position]} ({signed(float(total[position]))})"
        for position in order[:3]
        if total[position] < 0
    ]
    hurt = [
        f"{names[position]} ({signed(float(total[position]))})"
        for position in order[::-1]
        if total[position] > 0
    ]
    best = (
        f"Most of the loss was taken out by {listed(helped)}."
        if helped
        else "No layer lowered the loss."
    )
    return f"{best} {f'Layers that hurt: {listed(hurt, 4)}.' if hurt else 'No layer hurt.'}"


def largest(values: np.ndarray[Any, Any], most: int) -> list[int]:
    """Return the positions of the largest magnitudes, in their own order."""
    picked = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:most]
    return sorted(picked.tolist())
