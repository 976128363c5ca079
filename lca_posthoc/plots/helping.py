"""Draw shares of parameters that help: over time, per tensor, and per parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ..base.colours import FAINT, HELPING, HURTING, INK, MUTED, STILL
from ..findings.helping import joined_shares
from .style import (
    SMALL,
    colour_bar,
    end_labels,
    expect,
    fresh_figure,
    heading,
    heat,
    key,
    note,
    over_gaps,
    parameter_labels,
    refuse_groups,
    rows_of_names,
    tidy,
    time_edges,
    word,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def helping(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the share of parameters that help on each segment, per tensor too, and the share of
    segments each parameter helps on.

    Below: parameters by how often they helped, with the expectation by chance, and beside it the
    heroes and villains, which helped most and least often. These two panels need a complete run.

    Args:
        found: of `findings.helping`.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.

    Raises:
        InputError: if there are groups and none was picked.
    """
    expect(found, "helping")
    refuse_groups(found)
    whole = "parameters" in found
    tensors = found.sizes["tensor"]
    middle = min(4.0, 0.5 + 0.14 * tensors)
    figure = fresh_figure(figure, 7.2, 1.9 + middle + (2.8 if whole else 0))
    rows = figure.add_gridspec(
        3 if whole else 2, 2, height_ratios=[1.8, middle, 2.7][: 3 if whole else 2]
    )
    lowest = rows[2, :].subgridspec(1, 2, width_ratios=(1, 1.4)) if whole else None
    _over_time(figure.add_subplot(rows[0, :]), found)
    _tensors(figure.add_subplot(rows[1, :]), found)
    if lowest is not None:
        _often(figure.add_subplot(lowest[0]), found)
        _names(figure.add_subplot(lowest[1]), found)
    note(figure, found)
    return figure


def _over_time(ax: Axes, finding: xr.Dataset) -> None:
    shares = (("helping", HELPING), ("hurting", HURTING), ("zero", MUTED))
    for name, colour in shares:
        x, y = over_gaps(finding, finding[name].values)
        ax.plot(x, y, color=colour, linewidth=0.9, label=name)
    ax.axhline(0.5, color=MUTED, linewidth=0.5, linestyle=(0, (4, 3)))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylim(bottom=0)
    _whole_time(ax, finding)
    tidy(ax, x="training step", y="share of parameters", title=heading(finding))
    ends = [
        float(finding[name][-max(1, finding.sizes["step"] // 20) :].mean()) for name, _ in shares
    ]
    end_labels(ax, ends, [name for name, _ in shares], [colour for _, colour in shares])


def _whole_time(ax: Axes, finding: xr.Dataset) -> None:
    """Set the limits of a panel over time to those of the training."""
    ax.set_xlim(finding["step"].values[0], finding["step_end"].values[-1])


def _tensors(ax: Axes, finding: xr.Dataset) -> None:
    """Draw shares above one half teal, below it vermilion, and tensors without an effect grey.

    The scale is reversed, because a high share helps. A tensor that did not move, or on which the
    loss does not depend, neither helps nor hurts.
    """
    helping, hurting, moved = (
        finding[f"tensor_{name}"].transpose("tensor", "step").values
        for name in ("helping", "hurting", "moved")
    )
    still, idle = moved == 0, (moved != 0) & (helping + hurting == 0)
    values = np.where(still | idle, np.nan, helping)
    effects = np.abs(values - 0.5)[np.isfinite(values)]
    away = float(np.quantile(effects, 0.995)) if len(effects) else 0.0
    away = away or 0.5
    shown = heat(ax, finding, 0.5 - values, Normalize(-away, away))
    tidy(ax, x="training step")
    rows_of_names(ax, [str(name) for name in finding["tensor"].values], most=28)
    ax.set_ylim(len(values) - 0.5, -0.5)
    _whole_time(ax, finding)
    colour_bar(
        shown,
        ax,
        "share that helps",
        ends=("", ""),
        ticks=lambda away: f"{100 * (0.5 - away):.0f} %",
    )
    words = [
        word
        for word, cells in (("did not move", still), ("moved without effect", idle))
        if cells.any()
    ]
    if words:
        x, cells = time_edges(finding, np.where(still | idle, 1.0, np.nan))
        ax.pcolormesh(
            x, np.arange(len(cells) + 1) - 0.5, cells, cmap=ListedColormap([STILL]), rasterized=True
        )
        key(ax, "lower right", handles=[Patch(facecolor=STILL, label=" or ".join(words))])


def _often(ax: Axes, finding: xr.Dataset) -> None:
    edges, parameters, expected = joined_shares(finding)
    ax.stairs(parameters, edges, color=INK, fill=True, alpha=0.2)
    ax.stairs(parameters, edges, color=INK, linewidth=1)
    ax.plot((edges[1:] + edges[:-1]) / 2, expected, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    _percent(ax)
    word(ax, 0.02, 0.97, "parameters", va="top")
    probability = float(finding["probability"])
    chance = (
        "none has an effect"
        if np.isnan(probability)
        else f"- - by chance alone,\n{100 * probability:.1f} % each"
    )
    word(ax, 0.02, 0.88, chance, MUTED, va="top")
    ax.set_ylim(top=1.3 * max(float(parameters.max()), float(expected.max()), 1))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    tidy(ax, x="share of segments helped", y="parameters")


def _percent(ax: Axes) -> None:
    """Set the axis of shares, equal in both panels."""
    ax.set_xlim(-0.02, 1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _names(ax: Axes, finding: xr.Dataset) -> None:
    sides = (("hero", HELPING), ("villain", HURTING))
    names: list[str] = []
    for side, colour in sides:
        shares = finding[f"{side}_share"].values
        rows = np.arange(len(shares)) + len(names)
        ax.hlines(rows, float(finding["probability"]), shares, color=colour, linewidth=1)
        ax.plot(shares, rows, "o", color=colour, markersize=3)
        names += [str(name) for name in finding[f"{side}_name"].values]
        for place, chance in zip(rows.tolist(), finding[f"{side}_p"].values, strict=True):
            p_text = f"p = {chance:.0e}".replace("-", "−") if chance < 0.05 else "p > 0.05"
            word(
                ax,
                1.02,
                place,
                p_text,
                MUTED,
                SMALL - 2,
                va="center",
                transform=ax.get_yaxis_transform(),
            )
    ax.axvline(float(finding["probability"]), color=MUTED, linewidth=0.6, linestyle=(0, (4, 2)))
    ax.set_yticks(range(len(names)), parameter_labels(names))
    ax.set_ylim(len(names) - 0.4, -0.6)
    _percent(ax)
    tidy(ax, x="share of segments helped: heroes, villains")
    ax.tick_params(axis="y", length=0, labelsize=SMALL - 1.5)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y", color=FAINT, linewidth=0.3)
    ax.set_axisbelow(True)
