"""Show the loss change inside a subspace of the motion and outside of it."""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.models import Range1d

from ...findings.directions import balance
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, View, clean, count
from ..downsample import over_segments, over_steps, thinned
from ..figures import ACCENT, INK, add_level, add_lines, steps_figure
from ..panels import Panel, Room
from .layers import largest

_OUTSIDE = "#ddaa33"


def section() -> Section:
    """Return two figures: the loss change inside and outside, and the share of the motion inside."""
    change = steps_figure("Σ allocation so far", 320)
    add_level(change, 0)
    for name, hue, words in (
        ("whole motion", INK, "all of the motion"),
        ("inside", ACCENT, "inside"),
        ("outside", _OUTSIDE, "outside"),
    ):
        tip = [("", words), ("step", "@x{0}"), ("Σ so far", "@y{%.5g}")]
        add_lines(change, name, hue, tip=tip)
    share = steps_figure("‖Δθ‖² inside", 220, percent=True, y_range=Range1d(0, 1.04))
    add_lines(share, "captured", ACCENT, width=1.25)
    add_level(share, 0, name="by chance")
    return Section(
        name="directions",
        title="Directions",
        reading="The motion of the weights is split into the part inside the subspace that this "
        "run's directions span and the part outside of it, each with its share of the loss "
        "change. If a subspace captures most of the motion and little of the loss change, the loss "
        "fell outside of it. As many random directions capture the share marked by the dashed line.",
        figures={"directions": change, "captured": share},
        legends={
            "directions": [("ink", "all"), ("accent", "inside"), ("outside", "outside")],
            "captured": [("accent", "share of the motion"), ("muted", "by chance")],
        },
        headings={
            "directions": "Loss change inside and outside the subspace",
            "captured": "Share of the motion inside, by segment",
        },
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the lines of every group, and the table of directions.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("directions")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    most = room.points(3 * len(panel.choices) + 1, 0.2)
    steps, ends = finding["step"].values, finding["step_end"].values
    captured = thinned(*over_segments(steps, finding["captured"].values, ends), most)
    overall = finding
    if panel.groups is not None:
        totals = {
            name: panel.of_group(finding[name], None) for name in ("inside_total", "outside_total")
        }
        overall = finding.drop_vars(list(totals)).assign(totals)
    views: dict[str, dict[str, View]] = {
        "directions": {
            f"{key}|": _lines(panel, finding, group, most) for key, _, group in panel.choices
        },
        "captured": {
            "|": {
                "captured": captured,
                "@level": {"by chance": float(finding["captured_by_chance"])},
            }
        },
    }
    return Block(
        captions={"directions": balance(overall)},
        views=views,
        tables=[_table(panel, finding, notes)],
        notes=notes,
    )


def _lines(panel: Panel, finding: xr.Dataset, group: int | None, most: int) -> View:
    """Return the cumulative sums of one group."""
    inside, outside = (
        panel.of_group(finding[name], group).values for name in ("inside", "outside")
    )
    view: dict[str, View] = {}
    for name, values in (
        ("whole motion", inside + outside),
        ("inside", inside),
        ("outside", outside),
    ):
        so_far = np.cumsum(values)
        line = over_steps(
            finding["step"].values, finding["step_end"].values, so_far - values, so_far
        )
        view[name] = thinned(*line, most)
    return view


def _table(panel: Panel, finding: xr.Dataset, notes: list[str]) -> Table:
    """Return the directions with the largest sums."""
    total = panel.of_group(finding["total"], None).values
    shown = largest(total, MOST_ROWS)
    if len(shown) < len(total):
        notes.append(
            f"{count(len(total) - len(shown), 'direction')} with smaller sums are not listed."
        )
    rows: list[list[Cell]] = [
        [
            clean(finding["direction"].values[position], 60),
            float(total[position]),
            float(finding["captured_direction"].values[position]),
        ]
        for position in shown
    ]
    return Table(
        title="Directions",
        columns=[
            Column("direction", "name"),
            Column("Σ allocation", "bar"),
            Column("share of the motion", "share"),
        ],
        rows=rows,
        open=True,
    )
