"""Show two losses over two splits, such as training and validation, and the layers that lowered one
and raised the other.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from ...findings.common import Numbers
from ...findings.generalisation import two_splits
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, clean, count, listed
from ..downsample import Json, kept, numbers
from ..figures import ACCENT, INK, add_level, add_lines, steps_figure
from ..panels import Panel, Room
from .layers import largest


def section() -> Section:
    """Return one figure: both cumulative sums of a layer."""
    chart = steps_figure("Σ allocation so far", 300)
    add_level(chart, 0)
    tip = [("loss", "@name"), ("step", "@x{0}"), ("Σ so far", "@y{%.5g}")]
    add_lines(chart, "first", INK, tip=tip)
    add_lines(chart, "second", ACCENT, width=2.25, dash="dashed", tip=tip)
    return Section(
        name="generalisation",
        title="One split against another",
        reading="The same path measured on two splits. A layer that lowers the loss on the "
        "training examples and raises "
        "it on others may be where the network overfits. Where the lines diverge, the layer's effect "
        "on one loss does not carry "
        "over to the other.",
        figures={"generalisation": chart},
        headings={"generalisation": "Cumulative sums of one layer on both losses"},
    )


def block(panel: Panel, room: Room) -> Block | None:
    """Return the layers, and the quadrants of their parameters, for the run's pair of losses; None
    for its other losses.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    pair = partner(panel)
    if pair is None:
        return None
    finding, left_out = (
        panel.find("generalisation", panel.run[pair[1]]) if pair[0] == panel.loss else (None, "")
    )
    if finding is None:
        return Block(notes=[left_out]) if left_out else None
    notes = [left_out] if left_out else []
    called = [str(finding.attrs[which]) for which in ("first", "second")]
    both = [finding[name].values for name in called]
    shown = largest(both[0], MOST_ROWS)
    names = [clean(finding["layer"].values[position]) for position in shown]
    if len(shown) < len(both[0]):
        notes.append(
            f"{count(len(both[0]) - len(shown), 'layer')} with smaller sums are not shown."
        )
    overfit = [
        name
        for name, position in zip(names, shown, strict=True)
        if both[0][position] < 0 < both[1][position]
    ]
    sentence = (
        f"Layers that lowered {clean(pair[0], 60)} and raised {clean(pair[1], 60)}: "
        f"{listed(overfit) if overfit else 'none'}."
    )
    most = room.points(2 * (len(shown) + 1), 0.2)
    return Block(
        captions={"generalisation": sentence},
        views={"generalisation": _views(finding, pair, called, shown, most)},
        choice="Layer",
        choices=["all layers", *names],
        tables=[_layers(pair, names, both, shown), *_more(finding, pair, called)],
        notes=notes,
    )


def _views(
    finding: xr.Dataset, pair: tuple[str, str], called: list[str], shown: list[int], most: int
) -> dict[str, dict[str, Json]]:
    """Return the cumulative sums on both losses, of all layers together and of each one shown."""
    x = np.append(finding["step"].values[:1], finding["step_end"].values)
    views: dict[str, dict[str, Json]] = {}
    for place, position in enumerate([None, *shown]):
        views[f"|{place}"] = {
            "@legend": [["ink", clean(pair[0], 60)], ["accent", f"{clean(pair[1], 60)} (dashed)"]]
        }
        for which, name, loss in zip(("first", "second"), called, pair, strict=True):
            sums = finding[f"cumulative_{name}"].transpose("step", "layer").values
            y = np.append(0.0, sums.sum(1) if position is None else sums[:, position])
            few = kept(y, most)
            of: Json = {"same": len(few), "v": clean(loss, 60)}
            views[f"|{place}"][which] = {"x": numbers(x[few]), "y": numbers(y[few]), "name": of}
    return views


def _layers(
    pair: tuple[str, str], names: list[str], both: list[Numbers], shown: list[int]
) -> Table:
    rows: list[list[Cell]] = [
        [name, float(both[0][position]), float(both[1][position])]
        for name, position in zip(names, shown, strict=True)
    ]
    columns = [
        Column("layer", "name"),
        Column(f"Σ on {pair[0]}", "bar"),
        Column(f"Σ on {pair[1]}", "bar"),
    ]
    return Table(title="Layers on both losses", columns=columns, rows=rows, open=True)


def partner(panel: Panel) -> tuple[str, str] | None:
    """Return two complete losses of the panel's run over two splits, such as training and
    validation; None if there are none.
    """
    return two_splits({name: results for name, results in panel.run.items() if results.complete})


def _more(finding: xr.Dataset, pair: tuple[str, str], called: list[str]) -> list[Table]:
    tables = []
    if "parameters" in finding:
        rows: list[list[Cell]] = [
            [
                str(name),
                int(finding["parameters"].sel(quadrant=name).sum()),
                *(float(finding[f"allocated_{loss}"].sel(quadrant=name).sum()) for loss in called),
            ]
            for name in finding["quadrant"].values
        ]
        columns = [
            Column("over all steps", "text"),
            Column("parameters", "count"),
            Column("Σ on " + pair[0], "bar"),
            Column("Σ on " + pair[1], "bar"),
        ]
        tables.append(
            Table(title="Parameters by their effects on both", columns=columns, rows=rows)
        )
    if "worst_name" in finding.coords:
        rows = [
            [str(name), *(float(finding[f"worst_{loss}"].values[position]) for loss in called)]
            for position, name in enumerate(finding["worst_name"].values)
        ]
        columns = [
            Column("parameter", "name"),
            Column("Σ on " + pair[0]),
            Column("Σ on " + pair[1], "bar"),
        ]
        tables.append(
            Table(
                title=f"Parameters that lowered {clean(pair[0], 60)} and raised "
                f"{clean(pair[1], 60)} most",
                columns=columns,
                rows=rows,
            )
        )
    return [table for table in tables if table.rows]
