"""Draw the loss change inside a subspace and outside of it, and the share of the motion inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import HELPING, HURTING, INK, LAYERS, MUTED
from ..findings.common import Numbers
from ..findings.directions import balance
from .layers import helped_hurt
from .style import (
    SMALL,
    expect,
    fresh_figure,
    heading,
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

_ROWS = 40
_INSIDE, _OUTSIDE = LAYERS[4], LAYERS[1]


def directions(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the loss change inside and outside the subspace, the motion inside, and each direction.

    Args:
        found: of `findings.directions`, for a loss without groups or one group; with `null=` the
            random directions are drawn too.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.

    Raises:
        InputError: if the loss has groups.
    """
    expect(found, "directions")
    refuse_groups(found)
    rows, rest = strongest(found, "direction", found["total"].values, _ROWS)
    figure = fresh_figure(figure, 8.4, max(4.2, 1.2 + 0.16 * rows.sizes["direction"]))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    change = figure.add_subplot(grid[0, 0])
    _change(change, found)
    _captured(figure.add_subplot(grid[1, 0], sharex=change), found)
    _each(figure.add_subplot(grid[:, 1]), rows)
    figure.legend(
        *change.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=4,
        frameon=False,
        fontsize=SMALL,
    )
    note(figure, found, balance(found), rest)
    return figure


def _change(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the cumulative sums inside, outside and together."""
    inside, outside = finding["inside"].values, finding["outside"].values
    zero_line(ax)
    ax.plot(*_grown(finding, inside + outside), color=INK, linewidth=1.7, label="all of the motion")
    ax.plot(*_grown(finding, inside), color=_INSIDE, linewidth=1.3, label="inside the subspace")
    ax.plot(*_grown(finding, outside), color=_OUTSIDE, linewidth=1.3, label="outside")
    if "null_inside" in finding:
        ax.plot(
            *_grown(finding, finding["null_inside"].values),
            color=MUTED,
            linewidth=1.2,
            linestyle=(0, (4, 1.5)),
            label="inside a random one",
        )
    tidy(ax, y="Σ allocation so far\n(units of loss)", title=heading(finding))
    ax.margins(x=0.01)
    powers(ax, "y")


def _captured(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the share of the motion of each segment that is inside."""
    ax.plot(
        *over_gaps(finding, 100 * finding["captured"].values),
        color=_INSIDE,
        linewidth=1.1,
    )
    if "null_captured" in finding:
        ax.plot(
            *over_gaps(finding, 100 * finding["null_captured"].values),
            color=MUTED,
            linewidth=1.0,
            linestyle=(0, (4, 1.5)),
        )
    ax.axhline(
        100 * float(finding["captured_by_chance"]), color=MUTED, linewidth=0.8, dashes=(1, 2)
    )
    tidy(ax, x="training step", y="‖Δθ‖² inside (%)", title="share of the motion; dots: by chance")
    ax.set_ylim(0, 104)


def _grown(finding: xr.Dataset, values: Numbers) -> tuple[Numbers, Numbers]:
    """Return a cumulative sum that restarts at each stretch of segments."""
    so_far = np.cumsum(values)
    return over_gaps(finding, so_far, so_far - values)


def _each(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the sum over training of each direction."""
    values = finding["total"].values
    ax.barh(
        range(len(values)),
        values,
        height=0.72,
        color=[HELPING if value < 0 else HURTING for value in values],
    )
    zero_line(ax, vertical=True)
    tidy(ax, x="Σ allocation (units of loss)", title="each direction\n")
    rows_of_names(ax, [str(label) for label in finding["direction"].values], letters=16)
    powers(ax, "x", most=4)
    helped_hurt(ax)
