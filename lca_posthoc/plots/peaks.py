"""When layers peak, and whether they peak together more often than chance lets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..colours import FAINT, INK, LAYERS, MUTED
from .style import SMALL, colour, escape, fresh_figure, key, labels, note, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def peaks(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draws the peak moments of each layer, one row per group, and the number of alignments against what rotating the layers gives.

    A dark line marks a segment at which all layers peak for that group.

    Args:
        found: of `findings.peaks`.
        figure: an empty one to draw in; default a new one.

    Returns:
        The figure.
    """
    if "group" not in found.dims:
        found = found.expand_dims("group")
    figure = fresh_figure(figure, 7.2, float(np.clip(1.2 + 0.28 * found.sizes["group"], 2.2, 7)))
    raster, null = figure.subplots(1, 2, width_ratios=(2.6, 1))
    _raster(raster, found)
    _null(null, found)
    note(figure, str(found.attrs.get("left_out", "")))
    return figure


def _raster(ax: Axes, found: xr.Dataset) -> None:
    steps, layers = found["step"].values, [str(name) for name in found["layer"].values]
    groups = [str(label) for label in found["group"].values]
    height = 0.76 / len(layers)
    for at, _ in enumerate(groups):
        together = steps[found["aligned"].isel(group=at).values.astype(bool)]
        ax.vlines(together, at - 0.46, at + 0.46, color=INK, linewidth=1.1, zorder=1)
        for which in range(len(layers)):
            moments = steps[found["peak"].isel(group=at, layer=which).values.astype(bool)]
            low = at - 0.38 + which * height
            ax.vlines(moments, low, low + height * 0.9, color=colour(which), linewidth=1.3, zorder=2)
        if at:
            ax.axhline(at - 0.5, color=FAINT, linewidth=0.4)
    for which, name in enumerate(labels(layers)):
        ax.plot([], [], color=colour(which), linewidth=2, label=name)
    ax.plot([], [], color=INK, linewidth=1.1, label="all together")
    key(ax, ncols=min(len(layers) + 1, 6), handlelength=1)
    tidy(ax, x="training step", y="" if groups == ["all"] else "group")
    ax.set_yticks(range(len(groups)), [] if groups == ["all"] else labels(groups, 14))
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(steps[0], found["step_end"].values[-1])
    ax.set_ylim(len(groups) - 0.5, -0.5)


def _null(ax: Axes, found: xr.Dataset) -> None:
    """Alignments under rotations of whole layers, and under rotations within parts of the training; the observed number."""
    observed = float(found["observed_total"])
    drawn = {name: found[name].values for name in ("shift", "local") if name in found}
    top = int(max(*(values.max(initial=0) for values in drawn.values()), observed)) + 1
    bins = np.arange(-0.5, top + 1, max(1, top // 40)).tolist()
    looks: dict[str, dict[str, Any]] = {
        "shift": {"color": FAINT, "histtype": "stepfilled", "edgecolor": MUTED, "linewidth": 0.5},
        "local": {"color": LAYERS[0], "histtype": "step", "linewidth": 1.0},
    }
    for name, values in drawn.items():
        ax.hist(values, bins=bins, **looks[name])
    tallest = ax.get_ylim()[1]
    ax.vlines(observed, 0, tallest, color=INK, linewidth=1.6)  # the words stand above it
    ax.set_ylim(0, tallest * 1.6)
    lines = [(f"observed {observed:.0f}", INK), (f"rotated: p = {float(found['p_shift']):.2g}", MUTED)]
    if "p_local" in found:
        lines.append((f"rotated within parts: p = {float(found['p_local']):.2g}", LAYERS[0]))
    lines.append((f"independent: p = {float(found['p_independent']):.2g}", MUTED))
    right = observed > top / 2
    side: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "ha": "left" if right else "right",
    }
    for at, (said, hue) in enumerate(lines):
        ax.annotate(said, (0.02 if right else 0.98, 1), (0, -2 - 10 * at), va="top", color=hue, fontsize=SMALL, **side)
    tidy(ax, x=f"aligned {escape(found.attrs.get('signal', 'allocation'))} peaks", y="rotations")
    ax.locator_params(axis="both", nbins=5)
