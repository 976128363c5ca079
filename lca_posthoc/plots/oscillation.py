"""How often weights, gradients and allocations turn, and what that looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..colours import FAINT, HELPING, HURTING, INK, LAYERS, MUTED
from .style import (
    SMALL,
    fresh_figure,
    heading,
    key,
    labels,
    note,
    over_gaps,
    refuse_groups,
    rows_of_names,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRACES = {"weight": "weight", "gradient": "gradient", "allocation": "allocation\n(units of loss)"}


def oscillation(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draws the mean number of segments between two turns of each tensor's weights, gradients and allocations, and traces of single ones.

    Args:
        found: of `findings.oscillation`; for a part of the training, `found.sel(step=slice(100, 200))`.
        figure: an empty one to draw in; default a new one.

    Returns:
        The figure.

    Raises:
        InputError: where there are groups and none was picked.
    """
    refuse_groups(found)
    traces = found.sizes.get("trace", 0)
    shown = [name for name in _TRACES if name in found] if traces else []
    tall = max(1.4, 0.5 + 0.17 * found.sizes["tensor"]) if "interval" in found else 0.0
    figure = fresh_figure(figure, max(4.4, 1.0 + 1.7 * traces), tall + 1.05 * len(shown) + 0.3)
    heights = [*([tall] if tall else []), *[1.05] * len(shown)]
    rows = figure.add_gridspec(len(heights), max(1, traces), height_ratios=heights)
    if tall:
        _intervals(figure.add_subplot(rows[0, :]), found)
    for row, name in enumerate(shown, start=bool(tall)):
        first: Any = None
        for column in range(traces):
            ax = figure.add_subplot(rows[row, column])
            _trace(ax, found.isel(trace=column), name, last=name == shown[-1], title=name == shown[0])
            if column == 0:
                first = ax
        first.set_ylabel(_TRACES[name], fontsize=SMALL, color=INK)
        figure.align_ylabels()
    note(figure, str(found.attrs.get("left_out", "")))
    return figure


def _intervals(ax: Axes, found: xr.Dataset) -> None:
    signals = [str(name) for name in found["signal"].values]
    markers = ("o", "s", "D")
    names = ["all", *(str(name) for name in found["tensor"].values)]
    for at, signal in enumerate(signals):
        values = np.append(
            float(found["overall_interval"].sel(signal=signal)), found["interval"].sel(signal=signal).values
        )
        ax.plot(
            values, range(len(names)), markers[at % 3], color=LAYERS[at], markersize=3.8, label=signal, linestyle=""
        )
    ax.grid(axis="y", color=FAINT, linewidth=0.4)
    ax.set_axisbelow(True)
    tidy(ax, x="segments between two turns (mean)", title=heading(found))
    rows_of_names(ax, names)
    ax.set_xscale("log")
    key(ax, "lower right", ncols=3, handletextpad=0.1)
    _plain_ticks(ax)


def _plain_ticks(ax: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _trace(ax: Axes, found: xr.Dataset, name: str, *, last: bool, title: bool) -> None:
    values = found[name].values
    x, y = over_gaps(found, values)
    if name == "allocation":
        helped, hurt = np.where(y < 0, y, 0), np.where(y > 0, y, 0)
        ax.fill_between(x, helped, color=HELPING, linewidth=0, step="pre")
        ax.fill_between(x, hurt, color=HURTING, linewidth=0, step="pre")
    if name != "weight":
        zero_line(ax)
    ax.plot(x, y, color=INK if name != "allocation" else MUTED, linewidth=0.7 if name != "allocation" else 0.25)
    tidy(ax, x="training step" if last else "")
    ax.tick_params(labelsize=SMALL - 1.5, labelbottom=last)
    ax.yaxis.get_offset_text().set_fontsize(SMALL - 1.5)
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.locator_params(axis="both", nbins=4)
    if title:
        why = str(found["why"].item())
        hue = {"helped most": HELPING, "hurt most": HURTING}.get(why, INK)
        ax.set_title(f"{labels([found['parameter'].item()])[0]}\n{why}", fontsize=SMALL - 0.5, color=hue, loc="left")
