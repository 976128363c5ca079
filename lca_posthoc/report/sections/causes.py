"""Show the allocation of each layer by what moved its weights."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ...base.colours import CAUSES as COLOURS
from ...findings.causes import culprits, size_of_rest
from ...findings.common import Numbers
from ...numerics.schema import CAUSES
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, View, clean, count
from ..downsample import lines, over_steps
from ..figures import add_level, add_many, steps_figure
from ..panels import Panel, Room
from .layers import largest

_LAYERS, _LAYERS_OF_GROUPS = 24, 8  # layers that can be chosen
_ALL = "all causes"


def section() -> Section:
    """Return one figure: the cumulative sums of the causes of the chosen layer."""
    assert len(COLOURS) == len(CAUSES), "every cause has a colour"
    chart = steps_figure("Σ allocation so far", 340)
    add_level(chart, 0)
    add_many(
        chart, "causes", [("cause", "@name"), ("step", "$snap_x{0}"), ("Σ so far", "$snap_y{%.5g}")]
    )
    return Section(
        name="causes",
        title="Causes",
        reading="What moved the weights, and how that changed the loss. Signal is the step along the "
        "gradient of the whole training loss; noise is the difference that the mini-batch "
        "makes; momentum is the memory of earlier gradients; decay is weight decay; rest is what "
        "no formula explains. Causes add up to the layer's allocation. Look at rest first: "
        "where it is large, the other causes explain only a part of the motion.",
        figures={"causes": chart},
        legends={"causes": [*((cause, cause) for cause in CAUSES), ("ink", _ALL)]},
        headings={"causes": "One layer over training: the cumulative sum of each cause"},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the cumulative sums of the layers with the largest sums by cause, and their table.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("causes")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    sizes = np.abs(panel.of_group(finding["total"], None).values).sum(-1)
    shown = largest(sizes, _LAYERS if panel.groups is None else _LAYERS_OF_GROUPS)
    listed = largest(sizes, MOST_ROWS)
    names = [clean(name, 60) for name in finding["layer"].values]
    if len(shown) < len(names):
        notes.append(
            f"The {len(shown):,} layers with the largest sums of causes can be chosen, of {len(names):,}."
        )
    if len(listed) < len(names):
        notes.append(
            f"{count(len(names) - len(listed), 'layer')} with smaller sums of causes are not "
            "in the table."
        )
    worst = "" if panel.groups is not None else f" {clean(culprits(finding), 400)}"
    return Block(
        captions={"causes": f"{clean(size_of_rest(finding), 1000)}{worst}"},
        views={
            "causes": _views(panel, finding, shown, room),
            "@causes": _cells(panel, finding, listed),
        },
        choice="Layer",
        choices=[names[position] for position in shown],
        tables=[_table(panel, finding, names, listed)],
        notes=notes,
    )


def _views(panel: Panel, finding: xr.Dataset, shown: list[int], room: Room) -> dict[str, View]:
    """Return the lines of each group and layer that can be picked."""
    views: dict[str, View] = {}
    steps, ends = finding["step"].values, finding["step_end"].values
    most = room.points((len(CAUSES) + 1) * len(shown) * len(panel.choices), 0.4)
    for key, _, group in panel.choices:
        of_group = panel.of_group(finding["allocated"], group).transpose("layer", "cause", "step")
        for place, layer in enumerate(shown):
            allocated = of_group.values[layer]
            allocated = np.concatenate([allocated, allocated.sum(0, keepdims=True)])
            so_far = np.cumsum(allocated, axis=1)
            xs, ys = lines(*over_steps(steps, ends, so_far - allocated, so_far), most)
            views[f"{key}|{place}"] = {
                "causes": {
                    "xs": xs,
                    "ys": ys,
                    "name": [*CAUSES, _ALL],
                    "colour": {
                        "of": [*(f"@{cause}" for cause in CAUSES), "@ink"],
                        "at": list(range(len(CAUSES) + 1)),
                    },
                }
            }
    return views


def _columns(panel: Panel, finding: xr.Dataset, group: int | None) -> list[Numbers]:
    """Return the columns of the table, each (layer,); errors and shares of the mean over groups are
    unknown.
    """
    total = panel.of_group(finding["total"], group).transpose("cause", "layer").values
    rest = panel.share_of_group(finding["rest_share"], group).values
    if group is None and panel.groups is not None:
        error, verdict = np.full(len(rest), np.nan), np.full(len(rest), "–")
    else:
        one = finding if group is None else finding.isel(group=group)
        error, verdict = one["layer_error"].values, one["layer_verdict"].values
    return [total.sum(0), error, verdict, *total, rest]


def _cells(panel: Panel, finding: xr.Dataset, listed: list[int]) -> dict[str, View]:
    """Return the numbers of the table for each group that can be picked."""
    return {
        f"{key}|": {
            str(place): column[listed].tolist()
            for place, column in enumerate(_columns(panel, finding, group), 1)
        }
        for key, _, group in panel.choices
    }


def _table(panel: Panel, finding: xr.Dataset, names: list[str], listed: list[int]) -> Table:
    columns = _columns(panel, finding, None)
    rows: list[list[Cell]] = [
        [names[position], *(column.tolist()[position] for column in columns)] for position in listed
    ]
    return Table(
        title="Causes by layer, over training",
        columns=[
            Column("layer", "name"),
            Column("Σ allocation", "bar"),
            Column("±", "plain"),
            Column("verdict", "text"),
            *(Column(cause, "bar") for cause in CAUSES),
            Column("rest of Σ|A|", "share"),
        ],
        rows=rows,
        note=""
        if panel.groups is None
        else "Errors and the share of rest are of one group: pick a group.",
        open=True,
        live="causes",
        shared=True,
    )
