"""Draw the sums of each layer for two losses, such as those of training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import FAINT, INK, LAYERS
from .layers import helped_hurt
from .style import (
    SMALL,
    expect,
    fresh_axes,
    key,
    labels,
    note,
    powers,
    rows_of_names,
    strongest,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def generalisation(found: xr.Dataset, *, ax: Axes | None = None, top: int = 40) -> Axes:
    """Draw each layer's sum for both losses, joined by a line; the key names the losses.

    Below the axis stand the shares of parameters that helped both losses, one of them, or neither.

    Args:
        found: of `findings.generalisation`.
        ax: where to draw; by default a new figure.
        top: how many layers to draw, those with the largest sums for either loss; the foot counts
            the others.

    Returns:
        The axes.
    """
    expect(found, "generalisation")
    losses = [str(found.attrs[which]) for which in ("first", "second")]
    sizes = np.maximum(*(abs(found[name].values) for name in losses))
    found, rest = strongest(found, "layer", sizes, top)
    names = [str(name) for name in found["layer"].values]
    ax = fresh_axes(ax, 4.6, 1.5 + 0.2 * len(names))
    names_of, rows = labels(losses), np.arange(len(names))
    first, second = (found[name].values for name in losses)
    zero_line(ax, vertical=True)
    ax.hlines(rows, first, second, color=FAINT, linewidth=2.5, zorder=1)
    ax.plot(first, rows, "o", color=INK, markersize=4.5, label=names_of[0])
    ax.plot(
        second, rows, "o", color=LAYERS[1], markersize=4.5, markeredgecolor=INK, label=names_of[1]
    )
    key(ax, ncols=2, handletextpad=0.1, borderaxespad=1.8)
    tidy(ax, x="Σ allocation over training (units of loss)")
    rows_of_names(ax, names)
    ax.margins(x=0.06)
    powers(ax, "x")
    helped_hurt(ax)
    if "parameters" in found:
        ax.set_xlabel(f"{ax.get_xlabel()}\n{_quadrants(found)}", fontsize=SMALL, loc="right")
    note(ax.figure, found, rest)
    return ax


def _quadrants(finding: xr.Dataset) -> str:
    """Return in words the share of parameters in each quadrant, two quadrants a line."""
    counts = finding["parameters"].sum("tensor").values
    shares = zip(finding["quadrant"].values, 100 * counts / (counts.sum() or 1), strict=True)
    words = [f"{share:.1f} % {quadrant}" for quadrant, share in shares if share]
    return "parameters: " + "\n".join(
        " · ".join(words[start : start + 2]) for start in range(0, len(words), 2)
    )
