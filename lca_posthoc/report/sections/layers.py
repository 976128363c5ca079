"""Show the allocation of each layer, in total and over time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ...findings.errors import HELPS, HURTS, UNTOLD, over_groups
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
    """Return one figure: the cumulative sums of the ticked layers."""
    chart = steps_figure("Σ allocation so far", 340)
    add_level(chart, 0)
    add_many(
        chart, "layers", [("layer", "@name"), ("step", "$snap_x{0}"), ("Σ so far", "$snap_y{%.5g}")]
    )
    return Section(
        name="layers",
        title="Layers",
        reading="A layer with a negative sum lowered the loss. One with a positive sum raised "
        "it, and freezing it may be worth a try. "
        "Sums grow with the number of parameters, so compare layers of different "
        "size by the mean.",
        figures={"layers": chart},
        headings={"layers": "Cumulative sum of each layer"},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the table and the cumulative sums of the layers with the largest sums.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("layers")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    total = panel.of_group(finding["total"], None).values
    shown = largest(total, MOST_ROWS)
    if len(shown) < len(total):
        notes.append(f"{count(len(total) - len(shown), 'layer')} with smaller sums are not shown.")
    names = [clean(finding["layer"].values[position]) for position in shown]
    together = over_groups(panel.results, finding)
    steps = finding["step"].values
    most = room.points(len(shown) * len(panel.choices), 0.4)
    if most <= len(steps):
        notes.append(
            f"Cumulative sums are drawn with {most:,} of {len(steps) + 1:,} points each, which keep "
            "the extremes."
        )
    return Block(
        captions={"layers": sentence(names, total[shown], together["verdict"].values[shown])},
        views=_views(panel, finding, together, shown, names, most),
        tables=[_table(panel, finding, together, shown, names)],
        notes=notes,
    )


def _views(
    panel: Panel,
    finding: xr.Dataset,
    together: xr.Dataset,
    shown: list[int],
    names: list[str],
    most: int,
) -> dict[str, dict[str, View]]:
    """Return the cumulative sums and the cells of the table, for each group that can be picked."""
    steps, ends = finding["step"].values, finding["step_end"].values
    views: dict[str, dict[str, View]] = {"layers": {}, "@layers": {}}
    for key, _, group in panel.choices:
        sums = (
            panel.of_group(finding["cumulative"], group).transpose("step", "layer").values[:, shown]
        )
        x, ys = over_steps(
            steps, ends, np.concatenate([np.zeros((1, len(shown))), sums[:-1]]).T, sums.T
        )
        xs, packed = lines(x, ys, most)
        views["layers"][f"{key}|"] = {
            "layers": {"xs": xs, "ys": packed, "name": names, "colour": "@palette"}
        }
        views["@layers"][f"{key}|"] = {
            str(place): [values[position] for position in shown]
            for place, values in enumerate(_values(panel, finding, together, group), 1)
        }
    return views


def _values(
    panel: Panel, finding: xr.Dataset, together: xr.Dataset, group: int | None
) -> list[list[Cell]]:
    """Return the columns of the table that depend on the group, each over layers.

    Args:
        panel: of the loss.
        finding: of `layers`.
        together: its sums over all groups.
        group: the one that is picked; None for all together.
    """
    sums = together if group is None else finding.isel(group=group)
    columns = [
        panel.of_group(finding["total"], group),
        sums["error"],
        sums["verdict"],
        panel.of_group(finding["mean"], group),
    ]
    if "path" in finding:
        columns.insert(3, panel.of_group(finding["path"], group))
    if "helping" in finding:
        columns.append(panel.share_of_group(finding["helping"], group))
    return [column.values.tolist() for column in columns]


def _table(
    panel: Panel, finding: xr.Dataset, together: xr.Dataset, shown: list[int], names: list[str]
) -> Table:
    counted, bent = "helping" in finding, "path" in finding
    total = panel.of_group(finding["total"], None).values
    ticked = set(largest(total[shown], _DRAWN))
    values = _values(panel, finding, together, None)
    rows: list[list[Cell]] = [
        [
            name,
            *(column[position] for column in values),
            int(finding["elements"].values[position]),
        ]
        for name, position in zip(names, shown, strict=True)
    ]
    columns = [
        Column("layer", "name"),  # first what a phone shows without scrolling
        Column("Σ allocation", "bar"),
        Column("±", "plain"),
        Column("verdict", "text"),
        *([Column("± path", "plain")] if bent else []),
        Column("mean", "number"),
        *([Column("helping", "share")] if counted else []),
        Column("parameters", "count"),
    ]
    return Table(
        title="Layers, in the model's order: tick the ones to draw",
        columns=columns,
        rows=rows,
        note=" ".join(_notes(bent, panel.groups is not None and counted)),
        open=True,
        live="layers",
        pick=[position in ticked for position in range(len(rows))],
    )


def _notes(bent: bool, grouped: bool) -> Iterator[str]:
    yield (
        "±: all known errors of the sum together, bounds once and standard errors twice. A "
        "sum no larger than its error cannot be told from zero."
    )
    if bent:
        yield (
            "± path: the change by other paths through the same checkpoints; it is no part of the "
            "residual, which is 0 for every path."
        )
    if grouped:
        yield "Helping is the share of parameters for one group. Pick a group."


def sentence(names: list[str], total: np.ndarray[Any, Any], verdict: np.ndarray[Any, Any]) -> str:
    """Name the layers that helped most, those that hurt, and those that cannot be told from zero.

    Args:
        names: of the layers.
        total: their sums, (layer,).
        verdict: the conclusions on them, (layer,).
    """
    order = np.argsort(total, kind="stable")
    told = [position for position in order if str(verdict[position]).startswith((HELPS, HURTS))]
    helped = [_named(names, total, position) for position in told if total[position] < 0][:3]
    hurt = [_named(names, total, position) for position in told[::-1] if total[position] > 0]
    best, worst = "No layer lowered the loss", "No layer hurt"
    if helped:
        best = f"The loss was lowered most by {listed(helped)}"
    elif (total < 0).any():
        best += " by more than its error"
    if hurt:
        worst = f"Layers that hurt: {listed(hurt, 4)}"
    elif (total > 0).any():
        worst += " by more than its error"
    untold = [names[position] for position in order if verdict[position] == UNTOLD]
    return f"{best}. {worst}.{f' Not told from zero: {listed(untold, 4)}.' if untold else ''}"


def _named(names: list[str], total: np.ndarray[Any, Any], position: int) -> str:
    return f"{names[position]} ({signed(float(total[position]))})"


def largest(values: np.ndarray[Any, Any], most: int) -> list[int]:
    """Return the positions of the largest magnitudes, in their order.

    Args:
        values: (n,).
        most: how many.
    """
    picked = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:most]
    return sorted(picked.tolist())
