"""Show moments at which layers learn together."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import FixedTicker, Range1d

from ...findings.names import fitting
from ...findings.peaks import powerless
from ..content import Block, Cell, Column, Section, Table, View, clean, count, plain
from ..downsample import numbers
from ..figures import ACCENT, add_boxes, add_dots, add_level, plain_figure, steps_figure
from ..panels import Panel, Room

_LAYERS = 40
_DOTS = 6000
_LETTERS = 22  # characters of a name beside an axis


def section() -> Section:
    """Return two figures: when layers peak, and how many alignments to expect by chance."""
    chart = steps_figure("", 300, y_range=Range1d(0, 1))
    chart.yaxis.ticker = FixedTicker(ticks=[])
    add_dots(
        chart,
        "peaks",
        [("layer", "@name"), ("group", "@group"), ("segment from step", "@x{0}")],
        size=5,
    )
    chart.ygrid.grid_line_color = None
    null = plain_figure("segments at which every layer peaks", "draws", 240, x_range=Range1d(0, 1))
    null.xaxis.ticker.min_interval = 1
    add_boxes(
        null, "draws", ACCENT, [("alignments", "@left{0} to @right{0}"), ("draws", "@top{0}")], 0.5
    )
    add_level(null, 0, "height", "observed")
    return Section(
        name="peaks",
        title="Peak moments",
        reading="A dot is one of a layer's strongest moments of learning, a local minimum of its "
        "allocation; "
        "darker ones are segments at which every layer has one. "
        "The bars below show how many such coincidences to expect if the layers were shifted "
        "against each other at random, "
        "each within stretches of training.",
        figures={"peaks": chart, "null": null},
        legends={
            "peaks": [("muted", "one layer"), ("ink", "all layers")],
            "null": [
                ("accent", "shifted at random within stretches"),
                ("muted", "observed (dashed)"),
            ],
        },
        headings={"peaks": "When each layer peaks", "null": "Coincidences, against chance"},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the dots of all groups together and of each one.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("peaks")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    names = [clean(name) for name in finding["layer"].values]
    shown = _largest(panel, finding["layer"].values)
    if len(shown) < len(names):
        notes.append(
            f"Peaks are drawn for {len(shown)} of {count(len(names), 'layer')}: the first, the "
            "last, and those with the largest sums."
        )
    views: dict[str, dict[str, View]] = {"peaks": {}, "null": {}}
    for key, _, position in panel.choices:
        views["peaks"][f"{key}|"] = _dots(finding, names, shown, position)
    if "local" in finding:
        views["null"]["|"] = _null(finding)
    observed, expected = float(finding["observed_total"]), float(finding["expected_total"])
    of = " (all groups together)" if panel.groups is not None else ""
    usual = powerless(finding)
    power = (
        f" Asking all of {count(len(names), 'layer')} to peak together has no power here: only "
        f"{f'{usual:.2f}' if usual >= 0.01 else 'less than 0.01'} such segments are expected by chance."
        if usual is not None
        else ""
    )
    captions = {
        "peaks": f"All of {count(len(names), 'layer')} peak together at "
        f"{count(observed, 'segment')}{of}.",
        "null": f"Observed: {count(observed)}. Layers shifted within stretches of training, which "
        f"keeps the number of peaks in each part of it, "
        f"give as many or more with p = {_chance(finding, 'local')}: quote this one. "
        f"Shifted over the whole of training, as if "
        f"peaks were as likely late as early, p = {_chance(finding, 'shift')}; expected of "
        f"independent layers: {plain(expected)}.{power}",
    }
    tables = []
    if panel.groups is not None and "p_shift_group" in finding:
        labels = finding["group"].values
        rows: list[list[Cell]] = [
            [
                str(labels[position]),
                int(finding["observed"].values[position]),
                float(finding["p_shift_group"].values[position]),
            ]
            for position in range(min(len(labels), 60))
        ]
        columns = [
            Column("group", "name"),
            Column("aligned segments", "count"),
            Column("p", "plain"),
        ]
        tables.append(Table(title="Coincidences in each group", columns=columns, rows=rows))
    return Block(captions=captions, views=views, tables=tables, notes=notes)


def _chance(finding: xr.Dataset, which: str) -> str:
    """Return a p-value as text, marked if it is the least that so many rotations can give."""
    p, draws = float(finding[f"p_{which}"]), finding.sizes["draw"]
    least = f", the least that {draws:,} rotations can give" if p <= 1 / (draws + 1) else ""
    return plain(p) + least


def _largest(panel: Panel, names: np.ndarray[Any, Any]) -> list[int]:
    """Return the positions of the layers to draw: those with the largest sums, and always the first
    and the last.
    """
    if len(names) <= _LAYERS:
        return list(range(len(names)))
    layers, _ = panel.find("layers")
    total = dict(
        zip(layers["layer"].values, panel.of_group(layers["total"], None).values, strict=True)
    )
    size = np.array([abs(float(total.get(name, 0.0))) for name in names])
    size[[0, -1]] = np.inf
    return sorted(np.argsort(-size, kind="stable")[:_LAYERS].tolist())


def _dots(
    finding: xr.Dataset, every: list[str], shown: list[int], group_position: int | None
) -> View:
    names = [every[layer] for layer in shown]
    peak, aligned = (
        finding["peak"].transpose("step", "group", "layer").values,
        finding["aligned"].transpose("step", "group").values,
    )
    steps, labels = finding["step"].values, finding["group"].values
    groups = range(peak.shape[1]) if group_position is None else [group_position]
    where = [
        (step, group, layer)
        for group in groups
        for step, layer in np.argwhere(peak[:, group][:, shown])
    ]
    where.sort(key=lambda dot: (not aligned[dot[0], dot[1]], dot[0]))
    where = where[:_DOTS][::-1]
    return {
        "peaks": {
            "x": numbers([steps[step] for step, _, _ in where]),
            "y": [layer for _, _, layer in where],
            "name": {"of": names, "at": [int(layer) for _, _, layer in where]},
            "group": {
                "of": [clean(label, 60) for label in labels],
                "at": [int(group) for _, group, _ in where],
            },
            "colour": {
                "of": ["@muted", "@ink"],
                "at": [int(aligned[step, group]) for step, group, _ in where],
            },
        },
        "@ticks": {"y": fitting(names, [_LETTERS] * len(names))},
    }


def _null(finding: xr.Dataset) -> View:
    draws = finding["local"].values
    width = max(1, -(-int(draws.max(initial=0) - draws.min(initial=0) + 1) // 40))
    edges = np.arange(int(draws.min(initial=0)), int(draws.max(initial=0)) + width + 1, width)
    amount, _ = np.histogram(draws, edges)
    return {
        "draws": {
            "left": numbers(edges[:-1] - 0.5),
            "right": numbers(edges[1:] - 0.5),
            "top": numbers(amount),
            "bottom": {"same": len(amount), "v": 0},
        },
        "@level": {"observed": float(finding["observed_total"])},
        "@range": {
            "x": [
                min(edges[0], float(finding["observed_total"])) - 1,
                max(edges[-1], float(finding["observed_total"])) + 1,
            ]
        },
    }
