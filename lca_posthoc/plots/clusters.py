"""Draw clusters of examples: the layers' contributions over training, and the variance the clusters
leave out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import FAINT, INK, MUTED
from ..base.text import count, safe_in_figure
from ..findings.clusters import central_name, judged, one_cluster
from ..findings.common import Numbers
from .style import (
    SMALL,
    colour,
    expect,
    fresh_figure,
    heading,
    key,
    labels,
    note,
    over_gaps,
    powers,
    strongest,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = 6
_PANELS = 11  # the foot counts further clusters
_ACROSS = 3
_TEXT = 30  # characters of a central example's text


def clusters(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the layers' contributions to each cluster over training, and the variance left out.

    Args:
        found: of `findings.clusters`.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.
    """
    expect(found, "clusters")
    shown = min(_PANELS, int((found["size"].values > 0).sum()))
    panels = shown + 1
    across = min(_ACROSS, panels)
    down = -(-panels // across)
    figure = fresh_figure(figure, 2.8 * across, 0.5 + 2.1 * down)
    grid = figure.add_gridspec(down, across)
    size = np.nan_to_num(np.abs(found["trajectory"].values)).max(axis=(0, 1))
    strong, rest = strongest(found, "layer", size, _LINES)
    first: Axes | None = None
    for cluster in range(shown):
        place = grid[cluster // across, cluster % across]
        ax = figure.add_subplot(place, sharex=first, sharey=first)
        _cluster(ax, found, strong, cluster, start=cluster % across == 0)
        first = first or ax
    if first is not None:
        powers(first, "y", most=4)
        first.locator_params(axis="x", nbins=4)
        first.set_title(
            f"{heading(found)}: {first.get_title(loc='left')}", loc="left", fontsize=SMALL
        )
        handles, names = first.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=SMALL
        )
    _left_out(figure.add_subplot(grid[shown // across, shown % across]), found)
    more = int((found["size"].values > 0).sum()) - shown
    lines = [judged(found), rest.replace("Not shown", "Layers in grey")]
    note(figure, found, *lines, f"Not shown: {more} smaller clusters." if more else "")
    return figure


def _cluster(
    ax: Axes, finding: xr.Dataset, strong: xr.Dataset, cluster: int, *, start: bool
) -> None:
    """Draw the mean of a cluster: the cumulative sum of each layer, and the change of the loss."""
    lines = one_cluster(finding, cluster)
    names = [str(name) for name in strong["layer"].values]
    zero_line(ax)
    for name in [name for name in finding["layer"].values if str(name) not in names]:
        ax.plot(
            *_line(lines, lines["allocated"].sel(layer=name).values), color=FAINT, linewidth=0.7
        )
    for position, (name, label) in enumerate(zip(names, labels(names, 18), strict=True)):
        values = lines["allocated"].sel(layer=name).values
        ax.plot(*_line(lines, values), color=colour(position), linewidth=1.2, label=label)
    ax.plot(*_line(lines, lines["change"].values), color=INK, linewidth=1.8, label="loss")
    size = count(finding["size"].values[cluster], str(finding.attrs["per"]))
    title = f"{size}, such as {central_name(finding, cluster)}"
    own = finding.isel(cluster_number=cluster)
    if "central_text" in own.coords and str(own["central_text"].item()):
        text = str(own["central_text"].item())
        title += f"\n{safe_in_figure(text if len(text) <= _TEXT else f'{text[: _TEXT - 1]}…')}"
    tidy(ax, x="training step")
    ax.set_title(title, loc="left", fontsize=SMALL)
    if start:
        ax.set_ylabel("change since the start\n(units of loss)", fontsize=SMALL, color=INK)
    ax.margins(x=0.01)


def _line(lines: xr.Dataset, values: Numbers) -> tuple[Numbers, Numbers]:
    """Return a line that starts at zero at the start of training."""
    return over_gaps(lines, values, np.append(0.0, values[:-1]))


def _left_out(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the share of the variance left out, by the number of clusters."""
    numbers, shares = finding["k"].values, finding["left_out_share"].values
    chosen = int(finding.attrs["clusters"])
    null = finding["null_share"].values
    ax.plot(numbers, 100 * shares, "o-", color=INK, markersize=3.5, linewidth=1, label="clusters")
    ax.plot(
        np.full(len(null), chosen),
        100 * null,
        "_",
        color=MUTED,
        markersize=9,
        label="learned at own times",
    )
    tidy(ax, x="clusters", y="variance left out (%)")
    ax.set_ylim(bottom=0)
    ax.locator_params(axis="x", integer=True)
    key(ax, "upper right")
