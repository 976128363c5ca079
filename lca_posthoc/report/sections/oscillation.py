"""Show mean intervals between turns of parameters, and traces of a few of them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, View, clean, count, plain
from ..downsample import over_segments, thinned
from ..figures import INK, MUTED, add_level, add_lines, steps_figure
from ..panels import Panel, Room
from .layers import largest

_SIGNALS = ("weight", "gradient", "allocation")


def section() -> Section:
    """Return three figures below each other: weight, gradient and allocation of one parameter."""
    figures = {}
    for signal in _SIGNALS:
        chart = steps_figure(signal, 170, x="training step" if signal == "allocation" else "")
        if signal != "weight":
            add_level(chart, 0)
        add_lines(
            chart,
            signal,
            MUTED if signal == "gradient" else INK,
            width=1.25,
            tip=[("step", "@x{0}"), (signal, "@y{%+.3e}")],
            mode="vline",
        )
        figures[f"trace_{signal}"] = chart
    return Section(
        name="oscillation",
        title="Oscillation",
        reading="A weight that turns every few steps swings across the bottom of a valley: it "
        "helps on the way down and hurts on the "
        "way up. Turns of the weight, of the gradient and of the allocation are counted separately; "
        "they need not coincide.",
        figures=figures,
        headings={f"trace_{signal}": f"One parameter: {signal}" for signal in _SIGNALS},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return traces to choose from, and the mean interval between turns for each tensor.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("oscillation")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    views: dict[str, dict[str, View]] = {}
    choices: list[str] = []
    if "trace" in finding.dims and finding.sizes["trace"]:
        choices = [
            f"{clean(name, 60)} ({why})"
            for name, why in zip(finding["parameter"].values, finding["why"].values, strict=True)
        ]
        views = _traces(panel, finding, room)
    tables = [_table(finding, notes, is_open=not views)] if "interval" in finding else []
    last = next((f"trace_{name}" for name in _SIGNALS[::-1] if f"trace_{name}" in views), "")
    return Block(
        captions={last: sentence} if (sentence := _intervals(finding)) else {},
        views=views,
        choice="Parameter",
        choices=choices,
        tables=tables,
        notes=notes,
    )


def _intervals(finding: xr.Dataset) -> str:
    """Tell how often weights, gradients and allocations turn, over all parameters; "" where that is
    unknown.
    """
    if "overall_interval" not in finding:
        return ""
    overall = {
        str(name): float(finding["overall_interval"].sel(signal=name))
        for name in finding["signal"].values
    }
    parts = [
        f"{name} every {plain(value)}" for name, value in overall.items() if np.isfinite(value)
    ]
    if not parts:
        return ""
    sentence = (
        f"Mean number of segments between two turns, over all parameters: {', '.join(parts)}."
    )
    weight, gradient = overall["weight"], overall["gradient"]
    if np.isfinite(weight) and np.isfinite(gradient) and weight != gradient:
        sentence += (
            f" The gradient turns more {'rarely' if gradient > weight else 'often'} than the "
            "weight does."
        )
    return sentence


def _traces(panel: Panel, finding: xr.Dataset, room: Room) -> dict[str, dict[str, View]]:
    traces = finding.sizes["trace"]
    most = room.points(3 * traces * len(panel.choices), 0.12)
    views: dict[str, dict[str, View]] = {}
    for signal in _SIGNALS:
        if signal not in finding.data_vars:
            continue
        steps, ends = finding["step"].values, finding["step_end"].values
        for key, _, position in panel.choices:
            columns = panel.of_group(finding[signal], position).transpose("trace", "step").values
            for trace in range(traces):
                views.setdefault(f"trace_{signal}", {})[f"{key}|{trace}"] = {
                    signal: thinned(*over_segments(steps, columns[trace], ends), most)
                }
    return views


def _table(finding: xr.Dataset, notes: list[str], *, is_open: bool) -> Table:
    signals = [str(name) for name in finding["signal"].values]
    shown = largest(finding["elements"].values, MOST_ROWS)
    if len(shown) < finding.sizes["tensor"]:
        notes.append(
            f"The table lists the turns of the {len(shown)} largest of "
            f"{count(finding.sizes['tensor'], 'tensor')}."
        )
    rows: list[list[Cell]] = [
        [
            str(finding["tensor"].values[position]),
            *(float(finding["interval"].sel(signal=name).values[position]) for name in signals),
        ]
        for position in shown
    ]
    columns = [Column("tensor", "name"), *(Column(name, "plain") for name in signals)]
    return Table(
        title="Mean number of segments between two turns",
        columns=columns,
        rows=rows,
        note="A turn is a change of sign; zeros in between do not count.",
        open=is_open,
    )
