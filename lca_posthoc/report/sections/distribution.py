"""Show the distribution of single allocations."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.models import FixedTicker

from ..content import Block, Cell, Column, Section, Table, View, count, percent, plain, signed
from ..downsample import Json, numbers
from ..figures import add_boxes, plain_figure
from ..panels import Panel, Room

_LEAST = 1e-5  # share below which a bar is not drawn
_CHOICES = ("how many there are", "what they add up to")


def section() -> Section:
    """Return one figure: sizes on a logarithmic axis, helping above and hurting below the line."""
    chart = plain_figure(
        "size of an allocation, |A|, in units of loss", "share per doubling", 320, x_axis_type="log"
    )
    # as many as fit on a phone
    chart.xaxis.ticker = FixedTicker(ticks=[10.0**power for power in range(-45, 40, 3)])
    chart.tags = ["percent"]
    tip = [("|A|", "@left{%.2e} to @right{%.2e}"), ("share", "@value{0.00%}")]
    for name in ("helping", "hurting"):
        add_boxes(chart, name, name, tip)
    return Section(
        name="distribution",
        title="Sizes",
        reading="Each bar counts allocations of one size, those that helped above the line and "
        "those that hurt below, on an axis of "
        "powers of ten. As sums in place of counts, the bars show how few large "
        "allocations carry the change.",
        figures={"distribution": chart},
        legends={"distribution": [("helping", "helped"), ("hurting", "hurt")]},
        headings={"distribution": "Allocations by size"},
    )


def block(panel: Panel, room: Room) -> Block:
    """Return both histograms of every group.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("distribution")
    if finding is None:
        return Block(notes=[left_out])
    views: dict[str, dict[str, View]] = {"distribution": {}}
    lower, upper = finding["lower"].values, finding["upper"].values
    for key, _, position in panel.choices:
        data = finding["count"].astype(float)
        amount = (
            data.sum("group")
            if position is None and "group" in data.dims
            else panel.of_group(data, position)
        ).values
        middle = (np.abs(lower) + np.abs(upper)) / 2
        for place, values in enumerate((amount, amount * middle)):
            views["distribution"][f"{key}|{place}"] = _boxes(lower, upper, values)
    return Block(
        captions={"distribution": _sentence(panel, finding)},
        views=views,
        choice="Bars show",
        choices=_CHOICES,
        tables=[_table(panel, finding)],
        notes=[
            *([left_out] if left_out else []),
            f"Bars with less than {percent(_LEAST)} of the whole are not drawn.",
        ],
    )


def _boxes(
    lower: np.ndarray[Any, Any], upper: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
) -> View:
    share = values / values.sum() if values.sum() else values
    boxes: dict[str, Json] = {}
    for name, side, sign in (("helping", upper <= 0, 1), ("hurting", lower >= 0, -1)):
        low, high = (
            np.minimum(abs(lower), abs(upper))[side],
            np.maximum(abs(lower), abs(upper))[side],
        )
        # the outermost bins reach to zero and to infinity; draw them as wide as an octave
        low, high = np.where(low > 0, low, high / 2), np.where(high < 1e30, high, low * 2)
        some = np.flatnonzero((share[side] > _LEAST) & (low > 0))
        # bins have unequal width on a logarithmic axis; only densities have a smooth outline
        density = share[side][some] / np.log2(high[some] / low[some])
        boxes[name] = {
            "left": numbers(low[some]),
            "right": numbers(high[some]),
            "top": numbers(sign * density),
            "bottom": {"same": len(some), "v": 0},
            "value": numbers(share[side][some]),
        }
    return boxes


def _sentence(panel: Panel, finding: xr.Dataset) -> str:
    of = {
        name: float(panel.of_group(finding[name], None))
        for name in ("mean", "standard_deviation", "top_share", "gini")
        if name in finding
    }
    sentence = (
        f"The mean allocation is {signed(of['mean'])}, against a standard deviation of "
        f"{plain(of['standard_deviation'])}."
    )
    if not finding.sizes["bin"]:
        return "Every allocation is exactly 0."
    if "top_share" in of:
        sentence += (
            f" The largest 1 % of them carry {percent(of['top_share'])} of Σ|A|; their Gini "
            f"coefficient is {plain(of['gini'])}."
        )
    return sentence


def _table(panel: Panel, finding: xr.Dataset) -> Table:
    rows: list[list[Cell]] = []
    for name, title, kind in (
        ("helping", "share that helped", "share"),
        ("hurting", "share that hurt", "share"),
        ("mean", "mean", "number"),
        ("mean_absolute", "mean of |A|", "plain"),
        ("standard_deviation", "standard deviation", "plain"),
        ("top_share", "share of Σ|A| in the largest 1 %", "share"),
        ("gini", "Gini coefficient of |A|", "plain"),
        ("weibull_shape", "double Weibull: shape", "plain"),
        ("weibull_scale", "double Weibull: scale", "plain"),
        ("kurtosis", "kurtosis of the sample", "plain"),
    ):
        if name in finding:
            value = float(panel.of_group(finding[name], None))
            write = {"share": percent, "number": signed, "plain": plain}[kind]
            text = write(value)
            if f"{name}_low" in finding:
                low, high = (
                    float(panel.of_group(finding[f"{name}_{end}"], None)) for end in ("low", "high")
                )
                text += f" ({write(low)} to {write(high)})"
            rows.append([title if panel.groups is None else f"{title}, averaged over groups", text])
    zero = finding["zero"].sum() if "group" in finding["zero"].dims else finding["zero"]
    rows.append(["exactly zero", count(float(zero))])
    return Table(
        title="The distribution in numbers",
        columns=[Column("what", "text"), Column("value", "right")],
        rows=rows,
    )
