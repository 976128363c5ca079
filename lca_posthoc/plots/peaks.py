"""When layers peak, and whether they peak together more often than chance lets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..colours import FAINT, HURTING, INK, MUTED
from .style import colour, escape, fresh_figure, key, labels, note, tidy, word

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def peaks(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draws the peak moments of each layer, one row per group, and the number of alignments against circular shifts.

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
    ax.set_ylim(len(groups) - 0.5, -0.5)


def _null(ax: Axes, found: xr.Dataset) -> None:
    shift, observed = found["shift"].values, float(found["observed_total"])
    top = int(max(shift.max(initial=0), observed)) + 1
    bins = np.arange(-0.5, top + 1, max(1, top // 40)).tolist()
    ax.hist(shift, bins=bins, color=FAINT, edgecolor=MUTED, linewidth=0.4)
    ax.axvline(observed, color=HURTING, linewidth=1.4)
    ax.axvline(float(found["expected_total"]), color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    right = observed < top / 2
    chance = {"shifts": float(found["p_shift"]), "independent": float(found["p_independent"])}
    said = [f" observed {observed:.0f} ", *(f" p = {p:.2g} ({null}) " for null, p in chance.items())]
    side = "left" if right else "right"
    word(ax, observed, 0.98, "\n".join(said), HURTING, va="top", ha=side, transform=ax.get_xaxis_transform())
    signal = escape(found.attrs.get("signal", "allocation"))
    tidy(ax, x=f"alignments of {signal} peaks", y="circular shifts")
    ax.locator_params(axis="both", nbins=5)
