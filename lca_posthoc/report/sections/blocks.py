"""Show components of repeated blocks by depth."""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.models import FixedTicker, Range1d

from ...findings.common import Numbers
from ...findings.names import fitting
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, View, clean, count, signed
from ..downsample import picture
from ..figures import add_picture, plain_figure
from ..panels import Panel, Room
from .layers import largest

_ROWS = 40
_LETTERS = 26  # characters of a name beside an axis
_DEPTHS = 500  # columns


def section() -> Section:
    """Return one figure: a heat map of components by depth."""
    chart = plain_figure(
        "depth (number of the block)", "", 300, x_range=Range1d(0, 1), y_range=Range1d(0, 1)
    )
    chart.yaxis.ticker = FixedTicker(ticks=[])
    chart.xaxis.ticker.min_interval = 1
    chart.ygrid.grid_line_color = None
    add_picture(chart, "blocks", [("depth", "$x{0}"), ("Σ allocation", "@image{%+.3e}")])
    return Section(
        name="blocks",
        title="Blocks",
        reading="The model repeats blocks. Each row is a component that they have in common, its "
        "kernel and its bias together, and each column is a block: the picture shows at which depth the "
        "attention, the MLP or the norms had an effect. Pale cells had little effect, or do not exist. "
        "The table has the layers outside of blocks.",
        figures={"blocks": chart},
        legends={"blocks": [("helping", "helped"), ("hurting", "hurt")]},
        headings={"blocks": "Components of the blocks, by depth"},
    )


def block(panel: Panel, room: Room) -> Block | None:
    """Return the picture for each group that can be picked; None where no block is repeated.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("blocks")
    if finding is None:
        return Block(notes=[left_out])
    if not finding.sizes["component"]:
        return None
    notes = [left_out] if left_out else []
    total = _of(panel, finding, None)
    shown = largest(np.nansum(np.abs(total), axis=1), _ROWS)
    if len(shown) < len(total):
        notes.append(
            f"{count(len(total) - len(shown), 'component')} with smaller sums are not drawn."
        )
    last = finding["depth"].values[0] + _DEPTHS
    if finding["depth"].values[-1] >= last:
        notes.append(f"Blocks from number {last:,} on are not drawn.")
        finding = finding.sel(depth=slice(None, last - 1))
        total = _of(panel, finding, None)
    one = len(set(finding["stack"].values)) == 1
    names = [clean(name, 60) for name in finding["name" if one else "component"].values]
    depths = finding["depth"].values
    ticks = fitting([names[row] for row in shown], [_LETTERS] * len(shown))
    start, end = float(depths[0]) - 0.5, float(depths[-1]) + 0.5
    views: dict[str, View] = {}
    for key, _, position in panel.choices:
        rows = _evenly(_of(panel, finding, position)[shown], depths)
        views[f"{key}|"] = {
            "blocks": {
                "image": picture(rows),
                "x": [start],
                "y": [-0.5],
                "dw": [end - start],
                "dh": [float(len(shown))],
            },
            "@ticks": {"y": ticks},
            "@range": {"x": [start, end]},
        }
    return Block(
        captions={"blocks": _sentence(finding, names, total)},
        views={"blocks": views},
        tables=[_table(panel, finding, notes)] if finding.sizes["outside_layer"] else [],
        notes=notes,
    )


def _of(panel: Panel, finding: xr.Dataset, group: int | None) -> Numbers:
    """Return (component, depth), of a group or the mean over groups."""
    values: Numbers = panel.of_group(finding["total"], group).transpose("component", "depth").values
    return values


def _evenly(rows: Numbers, depths: Numbers) -> Numbers:
    """Return rows with an empty column for each number that no block has."""
    spread = np.zeros((len(rows), int(depths[-1] - depths[0]) + 1))
    spread[:, depths - depths[0]] = np.nan_to_num(rows)
    return spread


def _sentence(finding: xr.Dataset, names: list[str], total: Numbers) -> str:
    """Name the components that helped and hurt most, with their depths."""
    parts = [f"{count(total.shape[1], 'block')} of {count(len(names), 'component')}."]
    for words, values in (("helped most", -total), ("hurt most", total)):
        if np.nanmax(values) > 0:
            row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
            depth, value = int(finding["depth"].values[column]), float(total[row, column])
            parts.append(f"{names[row]} at depth {depth} {words} ({signed(value)}).")
    return " ".join(parts)


def _table(panel: Panel, finding: xr.Dataset, notes: list[str]) -> Table:
    """Return the table of layers outside of blocks."""
    values = panel.of_group(finding["outside"], None).values
    shown = largest(values, MOST_ROWS)
    if len(shown) < len(values):
        notes.append(
            f"{count(len(values) - len(shown), 'layer')} outside of blocks have smaller sums."
        )
    rows: list[list[Cell]] = [
        [clean(finding["outside_layer"].values[position]), float(values[position])]
        for position in shown
    ]
    return Table(
        title="Outside of blocks",
        columns=[Column("layer", "name"), Column("Σ allocation", "bar")],
        rows=rows,
        open=True,
    )
