"""Draw peak moments of layers, and their alignments compared with chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ..base.colours import FAINT, INK, LAYERS, MUTED
from ..base.text import safe_in_figure
from ..findings.peaks import powerless
from .style import SMALL, colour, expect, fresh_figure, key, labels, note, rows_of_names, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_COLOURS = 6  # layers distinguished by colours and a legend
_NAMED = 10  # groups named in the order of their marks


def peaks(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the peak moments of each layer and group, and the number of alignments compared with
    rotated layers.

    Rows are groups, with the layers in colours; for one group, or more than six layers, rows are
    layers. A dark line marks a segment at which all layers peak for a group.

    Args:
        found: of `findings.peaks`.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.
    """
    expect(found, "peaks")
    if "group" not in found.dims:
        found = found.expand_dims("group")
    groups, layers = found.sizes["group"], found.sizes["layer"]
    by_layer = groups == 1 or layers > _COLOURS
    tall = 0.9 + 0.135 * layers if by_layer else 1.2 + 0.28 * groups
    above = 0.0 if by_layer else 0.16 * -(-(layers + 1) // _columns(found))  # a legend
    figure = fresh_figure(figure, 7.2, float(np.clip(tall, 2.4, 7.5)) + above)
    raster, null = figure.subplots(1, 2, width_ratios=(2.4, 1))
    (_by_layer if by_layer else _by_group)(raster, found)
    raster.set_xlim(found["step"].values[0], found["step_end"].values[-1])
    _null(null, found)
    order = labels(found["group"].values.tolist(), 14)
    more = f" and {groups - _NAMED} more" if groups > _NAMED else ""
    rows = (
        f"Within a row, from the top: {', '.join(order[:_NAMED])}{more}."
        if by_layer and groups > 1
        else ""
    )
    note(figure, found, rows)
    return figure


def _by_group(ax: Axes, finding: xr.Dataset) -> None:
    """Draw a row per group, with one line of marks per layer."""
    steps, layers = finding["step"].values, [str(name) for name in finding["layer"].values]
    groups = [str(label) for label in finding["group"].values]
    height = 0.76 / len(layers)
    for row in range(len(groups)):
        together = steps[finding["aligned"].isel(group=row).values.astype(bool)]
        ax.vlines(together, row - 0.46, row + 0.46, color=INK, linewidth=1.1, zorder=1)
        for which in range(len(layers)):
            moments = steps[finding["peak"].isel(group=row, layer=which).values.astype(bool)]
            low = row - 0.38 + which * height
            ax.vlines(
                moments, low, low + height * 0.9, color=colour(which), linewidth=1.3, zorder=2
            )
        if row:
            ax.axhline(row - 0.5, color=FAINT, linewidth=0.4)
    names = labels(layers)
    for which, name in enumerate(names):
        ax.plot([], [], color=colour(which), linewidth=2, label=name)
    ax.plot([], [], color=INK, linewidth=1.1, label="all together")
    key(ax, ncols=_columns(finding), handlelength=1)
    tidy(ax, x="training step", y="group")
    ax.set_yticks(range(len(groups)), labels(groups, 14))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(groups) - 0.5, -0.5)


def _columns(finding: xr.Dataset) -> int:
    """Return how many names of layers fit side by side above the axes."""
    names = labels(finding["layer"].values.tolist())
    return max(
        1, min(len(names) + 1, 70 // (max(len(name) for name in (*names, "all together")) + 4))
    )


def _by_layer(ax: Axes, finding: xr.Dataset) -> None:
    """Draw a row per layer, with one line of marks per group."""
    steps, layers = finding["step"].values, [str(name) for name in finding["layer"].values]
    groups = finding.sizes["group"]
    height = 0.76 / groups
    tidy(ax, x="training step")
    rows_of_names(ax, layers)
    if len(layers) > 15:
        ax.tick_params(axis="y", labelsize=SMALL - 1.5)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    for group in range(groups):
        together = steps[finding["aligned"].isel(group=group).values.astype(bool)]
        ax.vlines(together, -0.5, len(layers) - 0.5, color=INK, linewidth=1.1, zorder=1)
        for which in range(len(layers)):
            moments = steps[finding["peak"].isel(group=group, layer=which).values.astype(bool)]
            low = which - 0.38 + group * height
            hue = colour(which if len(layers) <= _COLOURS else 0)
            ax.vlines(moments, low, low + height * 0.9, color=hue, linewidth=1.3, zorder=2)
    for row in range(1, len(layers)):
        ax.axhline(row - 0.5, color=FAINT, linewidth=0.4, zorder=0)
    ax.plot(
        [],
        [],
        color=LAYERS[0] if len(layers) > _COLOURS else MUTED,
        linewidth=2,
        label="peak moment",
    )
    if bool(finding["aligned"].any()):
        ax.plot([], [], color=INK, linewidth=1.1, label="all layers together")
    key(ax, ncols=2, handlelength=1)


def _null(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the observed number of alignments over the distributions for rotations of whole layers
    and within parts of training.
    """
    observed = float(finding["observed_total"])
    drawn = {name: finding[name].values for name in ("shift", "local") if name in finding}
    top = int(max(*(values.max(initial=0) for values in drawn.values()), observed)) + 1
    bins = np.arange(-0.5, top + 1, max(1, top // 40)).tolist()
    looks: dict[str, dict[str, Any]] = {
        "shift": {"color": FAINT, "histtype": "stepfilled", "edgecolor": MUTED, "linewidth": 0.5},
        "local": {"color": LAYERS[0], "histtype": "step", "linewidth": 1.0},
    }
    for name, values in drawn.items():
        ax.hist(values, bins=bins, **looks[name])
    tallest = ax.get_ylim()[1]
    ax.vlines(observed, 0, tallest, color=INK, linewidth=1.6)  # the text stands above it
    lines = _said(finding, observed)
    tall = ax.get_window_extent().height / ax.figure.dpi * 72  # in points, before the layout
    ax.set_ylim(0, tallest / (1 - min((10 * len(lines) + 8) / tall, 0.7)))
    _write_lines(ax, lines, right=observed > top / 2 or top == 1)
    tidy(
        ax,
        x=f"aligned {safe_in_figure(str(finding.attrs.get('signal', 'allocation')))} peaks",
        y="rotations",
    )
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _said(finding: xr.Dataset, observed: float) -> list[tuple[str, str]]:
    """Return the lines above the bars, each with its colour: the number of alignments, their
    p-values, and advice where the test has no power.
    """
    lines = [
        (f"observed {observed:.0f}", INK),
        (f"rotated: p = {float(finding['p_shift']):.2g}", MUTED),
    ]
    if "p_local" in finding:
        lines.append((f"rotated within parts: p = {float(finding['p_local']):.2g}", LAYERS[0]))
    lines.append((f"independent: p = {float(finding['p_independent']):.2g}", MUTED))
    usual = powerless(finding)
    if usual is not None:
        count = (
            int(finding["counted"].sum()) if "counted" in finding.coords else finding.sizes["layer"]
        )
        about = f"{usual:.2f}" if usual >= 0.01 else "less than 0.01"
        advice = (
            f"asking all {count} layers to",
            "peak together has no",
            "power: chance alone gives",
            f"{about}. Try fewer (by).",
        )
        lines += [(text, INK) for text in advice]
    return lines


def _write_lines(ax: Axes, lines: list[tuple[str, str]], *, right: bool) -> None:
    """Write lines from the top, on the side without bars: the left one if `right` is occupied."""
    side: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "ha": "left" if right else "right",
    }
    for row, (line, hue) in enumerate(lines):
        ax.annotate(
            line,
            (0.02 if right else 0.98, 1),
            (0, -2 - 10 * row),
            va="top",
            color=hue,
            fontsize=SMALL,
            **side,
        )
