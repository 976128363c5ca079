"""Draw the allocation of layers by what moved their weights: in total, and over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import CAUSES as COLOURS
from ..base.colours import INK
from ..findings.causes import culprits, percent, size_of_rest
from ..findings.common import Numbers
from .layers import helped_hurt
from .style import (
    SMALL,
    error_lines,
    expect,
    fresh_figure,
    heading,
    labels,
    note,
    over_gaps,
    powers,
    refuse_groups,
    rows_of_names,
    strongest,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = 6  # layers drawn over training
_ROWS = 30
_ACROSS = 2
_ALL = "all causes"


def causes(found: xr.Dataset, *, figure: Figure | None = None, top: int | None = None) -> Figure:
    """Draw each layer's allocation by cause, in total and over training.

    The left panel shows sums over training: causes that lowered the loss left of zero, those that
    raised it right of zero, and the layer's sum as a mark with its error. The right panels show the
    cumulative sums of the layers with the largest contributions. The foot gives the size of rest,
    and each name its share.

    Args:
        found: of `findings.causes`, for a loss without groups or one group.
        figure: an empty figure to draw in; by default a new one.
        top: how many layers to draw over training; default 6.

    Returns:
        The figure.

    Raises:
        InputError: if the loss has groups, or for a `top` below one.
    """
    expect(found, "causes")
    refuse_groups(found)
    sizes = abs(found["total"]).sum("cause").values
    strong, _ = strongest(found, "layer", sizes, _PANELS if top is None else top)
    rows, rest = strongest(found, "layer", sizes, _ROWS)
    down = -(-strong.sizes["layer"] // _ACROSS)
    tall = max(1.4 * down, 0.2 * rows.sizes["layer"])
    figure = fresh_figure(figure, 9.4, max(3.2, 1.1 + tall))
    grid = figure.add_gridspec(down, 1 + _ACROSS, width_ratios=(1.25, *(1,) * _ACROSS))
    _bars(figure.add_subplot(grid[:, 0]), rows)
    first: Axes | None = None
    names = labels([str(name) for name in strong["layer"].values], 20)
    for position, name in enumerate(names):
        place = grid[position // _ACROSS, 1 + position % _ACROSS]
        ax = figure.add_subplot(place, sharex=first)
        _lines(ax, strong.isel(layer=position), name)
        ax.set_xlabel("" if position + _ACROSS < len(names) else "training step")
        first = first or ax
    if first is not None:
        figure.legend(
            *first.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=6,
            frameon=False,
            fontsize=SMALL,
        )
    marks = "Marks: the sums of layers, with error bars of all their known errors together."
    note(figure, found, size_of_rest(found), culprits(found), rest, marks)
    return figure


def _bars(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the sums over training, stacking causes of one sign."""
    total = finding["total"].transpose("layer", "cause").values
    for sign in (-1, 1):
        sized = np.where(np.sign(total) == sign, total, 0.0)
        starts = np.cumsum(sized, axis=1) - sized
        for cause, hue in enumerate(COLOURS):
            ax.barh(
                range(len(total)), sized[:, cause], left=starts[:, cause], height=0.72, color=hue
            )
    error_lines(ax, finding["layer_total"].values, finding["layer_error"].values)
    ax.plot(
        finding["layer_total"].values,
        range(len(total)),
        linestyle="",
        marker="D",
        markersize=4.5,
        markerfacecolor="white",
        markeredgecolor=INK,
    )
    # otherwise bars would end at the edge of the page
    ax.use_sticky_edges = False
    ax.margins(x=0.05)
    zero_line(ax, vertical=True)
    tidy(ax, x="Σ allocation over training (units of loss)", title=f"{heading(finding)}\n")
    rows_of_names(ax, [str(name) for name in finding["layer"].values], letters=22)
    powers(ax, "x")
    helped_hurt(ax)


def _lines(ax: Axes, finding: xr.Dataset, name: str) -> None:
    """Draw the cumulative sums of one layer."""
    zero_line(ax)
    allocated = finding["allocated"].transpose("step", "cause").values
    for cause, hue in enumerate(COLOURS):
        word = str(finding["cause"].values[cause])
        ax.plot(*_grown(finding, allocated[:, cause]), color=hue, linewidth=1.2, label=word)
    ax.plot(*_grown(finding, allocated.sum(1)), color=INK, linewidth=1.7, label=_ALL)
    share = percent(float(finding["rest_share"]))
    tidy(ax, x="training step", y="Σ so far (units of loss)", title=f"{name}, rest {share}")
    ax.margins(x=0.01)
    ax.locator_params(axis="x", nbins=5)
    powers(ax, "y", most=4)


def _grown(finding: xr.Dataset, values: Numbers) -> tuple[Numbers, Numbers]:
    """Return a cumulative sum that restarts at each stretch of segments."""
    so_far = np.cumsum(values)
    return over_gaps(finding, so_far, so_far - values)
