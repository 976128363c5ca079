"""Show shares of parameters that help: per step, and per parameter."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from ...findings.helping import joined_shares
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, View, clean, count, percent
from ..downsample import numbers, over_segments, thinned
from ..figures import ACCENT, INK, add_boxes, add_level, add_lines, plain_figure, steps_figure
from ..panels import Panel, Room
from .layers import largest

_ALL = "all parameters"


def section() -> Section:
    """Return two figures: the share that helps on every segment, and how often single parameters
    do.
    """
    shares = steps_figure("share of parameters", 300, percent=True)
    add_level(shares, 0.5)
    add_lines(
        shares,
        "hurting",
        "hurting",
        width=1.25,
        tip=[("segment from step", "@x{0}"), ("hurting", "@y{0.0%}")],
    )
    add_lines(
        shares, "helping", "helping", tip=[("segment from step", "@x{0}"), ("helping", "@y{0.0%}")]
    )
    over = plain_figure("share of segments helped", "parameters", 280)
    tip = [("share", "@left{0.0%} to @right{0.0%}"), ("parameters", "@top{0,0}")]
    add_boxes(over, "observed", ACCENT, tip, 0.55)
    add_lines(
        over,
        "expected",
        INK,
        width=1.5,
        dash="dashed",
        tip=[("share", "@x{0.0%}"), ("by chance", "@y{0,0.0}")],
    )
    return Section(
        name="helping",
        title="Who helps",
        reading="The first figure shows the share of parameters that lower the loss at each "
        "step, and the share that raises it. "
        "Where the bars of the second figure exceed the dashed line, parameters help or hurt "
        "more often than by chance.",
        figures={"helping": shares, "over_time": over},
        legends={
            "helping": [("helping", "help"), ("hurting", "hurt")],
            "over_time": [("accent", "parameters"), ("ink", "expected by chance")],
        },
        headings={
            "helping": "Share of parameters that help, step by step",
            "over_time": "How often one parameter helps",
        },
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the shares of all parameters and of the larger tensors; heroes and villains.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("helping")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    grouped = panel.groups is not None
    tensors = finding["tensor"].values
    picked = (
        largest(finding["elements"].values, 12 if grouped else MOST_ROWS)
        if "elements" in finding.coords
        else []
    )
    choices = [_ALL, *(clean(tensors[position]) for position in picked)]
    if len(picked) < len(tensors):
        notes.append(
            f"Shares are drawn for the {len(picked)} largest of {count(len(tensors), 'tensor')}."
        )
    views: dict[str, dict[str, View]] = {"helping": {}, "over_time": {}}
    steps, ends = finding["step"].values, finding["step_end"].values
    most = room.points((len(picked) + 2) * len(panel.choices), 0.2)
    for key, _, position in panel.choices:
        shares = {
            name: panel.of_group(finding[name], position).values for name in ("helping", "hurting")
        }
        views["helping"][f"{key}|0"] = {
            name: thinned(*over_segments(steps, values, ends), most)
            for name, values in shares.items()
        }
        columns = (
            panel.of_group(finding["tensor_helping"], position).transpose("step", "tensor").values
        )
        for place, tensor in enumerate(picked, 1):
            views["helping"][f"{key}|{place}"] = {
                "helping": thinned(*over_segments(steps, columns[:, tensor], ends), most),
                "hurting": {"x": [], "y": []},
            }
    captions = {"helping": _shares(panel, finding)}
    tables = []
    if "parameters" in finding:
        views["over_time"]["|"] = _over_time(finding)
        captions["over_time"] = _often(finding)
        tables = [
            _list(finding, "hero", "Parameters that helped most often"),
            _list(finding, "villain", "Parameters that helped least often"),
        ]
    return Block(
        captions=captions,
        views=views,
        choice="Tensor",
        choices=choices,
        tables=[table for table in tables if table.rows],
        notes=notes,
    )


def _over_time(finding: xr.Dataset) -> View:
    edges, parameters, expected = joined_shares(finding)
    low, high = edges[:-1], edges[1:]
    occupied = np.flatnonzero((parameters > 0) | (expected > 0.05))
    first, last = (occupied[0], occupied[-1] + 1) if len(occupied) else (0, len(parameters))
    part = slice(int(first), int(last))
    return {
        "observed": {
            "left": numbers(low[part]),
            "right": numbers(high[part]),
            "top": numbers(parameters[part]),
            "bottom": {"same": int(last - first), "v": 0},
        },
        "expected": {"x": numbers(((low + high) / 2)[part]), "y": numbers(expected[part])},
    }


def _shares(panel: Panel, finding: xr.Dataset) -> str:
    helping = panel.of_group(finding["helping"], None).values
    zero = panel.of_group(finding["zero"], None).values
    of = (
        ""
        if panel.groups is None
        else "one group's loss (averaged over the groups; unknown for the mean loss)  "
    )
    return (
        f"On average {percent(float(helping.mean()))} of the parameters help {of}on a segment, "
        f"between {percent(float(helping.min()))} and {percent(float(helping.max()))}; "
        f"{percent(float(zero.mean()))} have an allocation of exactly zero."
    )


def _often(finding: xr.Dataset) -> str:
    parameters, share = finding["parameters"].values.astype(float), finding["share"].values
    total = float(parameters.sum())
    if not total:
        return "No parameter had any effect."
    mean = float(parameters @ share) / total
    spread = math.sqrt(float(parameters @ (share - mean) ** 2) / total)
    expected = finding["expected"].values
    weight = float(expected.sum()) or 1.0
    middle = float(expected @ share) / weight
    chance = math.sqrt(float(expected @ (share - middle) ** 2) / weight)
    return (
        f"{count(total, 'parameter')} had an effect; they help on {percent(mean)} of their "
        f"segments, with a standard deviation of {percent(spread)}. If each helped by chance alone, "
        f"it would be {percent(chance)}."
    )


def _list(finding: xr.Dataset, who: str, title: str) -> Table:
    names = finding[f"{who}_name"].values.tolist() if f"{who}_name" in finding.coords else []
    columns = [
        Column("parameter", "name"),
        Column("helped on", "share"),
        Column("segments", "count"),
        Column("Σ allocation", "bar"),
        Column("p (Bonferroni)", "plain"),
    ]
    values = (
        [finding[f"{who}_{name}"].values for name in ("share", "segments", "allocated", "p")]
        if len(names)
        else []
    )
    rows: list[list[Cell]] = [
        [
            name,
            float(values[0][position]),
            int(values[1][position]),
            float(values[2][position]),
            float(values[3][position]),
        ]
        for position, name in enumerate(names)
    ]
    note = (
        "p: the chance of as extreme a count for any of the parameters, if all helped "
        "independently with the same probability."
    )
    return Table(title=title, columns=columns, rows=rows, note=note)
