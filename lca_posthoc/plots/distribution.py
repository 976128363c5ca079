"""Draw the distribution of single allocations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..base.colours import HELPING, HURTING, INK, MUTED
from .style import SMALL, expect, fresh_figure, heading, note, powers, refuse_groups, tidy, word

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def distribution(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the sizes of helping and hurting allocations, their densities with a fit, and their
    inequality.

    Left: parameters × segments per decade of |A|. Middle: densities of both signs, with the double
    Weibull distribution fitted to a sample and the normal distribution of the same spread. Right:
    the share of Σ|A| of the top 1 % and the Gini coefficient, with the bounds from the bins.

    Args:
        found: of `findings.distribution`.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.

    Raises:
        InputError: if there are groups and none was picked.
    """
    expect(found, "distribution")
    refuse_groups(found)
    figure = fresh_figure(figure, 7.2, 2.7)
    sizes, densities, unequal = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 0.8))
    whole = float(found["count"].sum() + found["zero"])
    helped, hurt = (found["upper"].values <= 0), (found["lower"].values >= 0)
    for side, colour in ((helped, HELPING), (hurt, HURTING)):
        _sizes(sizes, found.isel(bin=side), colour)
        _density(densities, found.isel(bin=side), whole, colour)
    _shares(sizes, found, whole)
    _curves(densities, found, whole)
    _unequal(unequal, found)
    if found.sizes["bin"]:
        for ax in (sizes, densities):
            ax.set_xscale("log")
            ax.set_xlim(_visible(found))
        densities.set_yscale("log")
    else:
        for ax in (sizes, densities):
            ax.set(xticks=[], yticks=[])
        word(densities, 0.5, 0.5, "every allocation is exactly 0", MUTED, ha="center", va="center")
    tidy(sizes, x="|A| (units of loss)", y="parameters × segments\n(per decade)")
    sizes.set_title(heading(found), loc="left", fontsize=SMALL + 0.5, color=INK, pad=24)
    powers(sizes, "y")
    tidy(densities, x="|A| (units of loss)", y="density (1 / units of loss)")
    note(figure, found)
    return figure


def _edges(side: xr.Dataset) -> np.ndarray[Any, Any]:
    """Return the edges of |A|, rising, with zero replaced by an edge that a logarithmic axis can
    show.
    """
    ends = np.sort(np.abs(np.append(side["lower"].values, side["upper"].values[-1:])))
    edges: np.ndarray[Any, Any] = np.maximum(
        ends, ends[ends > 0].min() / 2 if (ends > 0).any() else 1e-45
    )
    return edges


def _rising(side: xr.Dataset) -> np.ndarray[Any, Any]:
    count = side["count"].values.astype(float)
    return count[::-1] if len(count) and side["upper"].values[-1] <= 0 else count


def _sizes(ax: Axes, side: xr.Dataset, colour: str) -> None:
    if side.sizes["bin"]:
        edges = _edges(side)
        ax.stairs(_rising(side) / np.diff(np.log10(edges)), edges, color=colour, linewidth=1.2)
        ax.stairs(
            _rising(side) / np.diff(np.log10(edges)), edges, color=colour, fill=True, alpha=0.1
        )


def _density(ax: Axes, side: xr.Dataset, whole: float, colour: str) -> None:
    if side.sizes["bin"]:
        edges, count = _edges(side), _rising(side)
        with np.errstate(divide="ignore"):
            values = np.where(count > 0, count / np.diff(edges) / whole, np.nan)
        ax.plot(
            np.sqrt(edges[:-1] * edges[1:]), values, ".", color=colour, markersize=2.5, alpha=0.8
        )


def _shares(ax: Axes, finding: xr.Dataset, whole: float) -> None:
    """Write the shares above the panel, where they cover no data, and mark the mean."""
    mean, zero = float(finding["mean"]), float(finding["zero"]) / whole if whole else 0.0
    shares = {
        "helping": float(finding["helping"]),
        "hurting": float(finding["hurting"]),
        "exactly zero": zero,
    }
    lines = [
        (f"{name} {100 * share:.1f} %", hue)
        for hue, (name, share) in zip((HELPING, HURTING, MUTED), shares.items(), strict=True)
    ]
    if mean:
        hue = HELPING if mean < 0 else HURTING
        ax.axvline(abs(mean), color=hue, linewidth=0.9, linestyle=(0, (3, 2)))
        lines.append(("- - mean " + f"{mean:.1e}".replace("-", "−"), hue))
    for line, (text, hue) in enumerate(lines):
        where: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "va": "bottom",
        }
        ax.annotate(
            text,
            (0.57 * (line % 2), 1),
            (0, 13 - 10 * (line // 2)),
            color=hue,
            fontsize=SMALL,
            **where,
        )


def _curves(ax: Axes, finding: xr.Dataset, whole: float) -> None:
    """Draw the fit to nonzero allocations, and the normal distribution of the same spread, within
    the data's range.
    """
    low, high = ax.get_ylim()
    data = [line.get_ydata() for line in ax.lines]
    values = np.concatenate(data) if data else np.array([np.nan])
    if not np.isfinite(values).any():
        return
    low, high = np.nanmin(values) / 4, np.nanmax(values) * 10
    x = np.geomspace(*_range(finding), num=400)
    spread = float(finding["standard_deviation"])
    if spread > 0:
        normal = np.exp(-((x / spread) ** 2) / 2) / (spread * np.sqrt(2 * np.pi))
        ax.plot(
            x,
            np.where(normal >= low, normal, np.nan),
            ":",
            color=MUTED,
            linewidth=1.1,
            label="normal",
        )
        word(ax, 0.03, 0.05, "···  normal, same spread", MUTED)
    fitted = "weibull_shape" in finding and bool(np.isfinite(finding["weibull_shape"]))
    if fitted and "group" not in finding.coords:  # the sample includes all groups
        shape, scale = float(finding["weibull_shape"]), float(finding["weibull_scale"])
        moved = 1 - float(finding["zero"]) / whole
        fit = (
            moved
            * shape
            / (2 * scale)
            * (x / scale) ** (shape - 1)
            * np.exp(-((x / scale) ** shape))
        )
        ax.plot(
            x, np.where(fit >= low, fit, np.nan), color=INK, linewidth=1, label="double Weibull"
        )
        word(ax, 0.03, 0.14, f"—  double Weibull, shape {shape:.2f}")
    ax.set_ylim(low, high)


def _range(finding: xr.Dataset) -> tuple[float, float]:
    ends = np.abs(np.append(finding["lower"].values, finding["upper"].values))
    return float(ends[ends > 0].min()), float(ends.max())


def _visible(finding: xr.Dataset) -> tuple[float, float]:
    """Return limits that include all large elements and all but a thousandth of the rest; small
    ones span thirty decades.
    """
    inner = np.minimum(np.abs(finding["lower"].values), np.abs(finding["upper"].values))
    order = np.argsort(inner)
    below = np.cumsum(finding["count"].values[order]) / max(1, int(finding["count"].sum()))
    smallest, largest = _range(finding)
    low = inner[order][np.searchsorted(below, 1e-3)]
    return max(float(low), smallest) / 2, largest * 2


def _unequal(ax: Axes, finding: xr.Dataset) -> None:
    rows = (
        ("top_share", "share of Σ|A| carried\nby the top 1 %"),
        ("gini", "Gini coefficient of |A|"),
    )
    for row, (name, text) in enumerate(rows):
        middle, low, high = (float(finding[f"{name}{end}"]) for end in ("", "_low", "_high"))
        word(ax, 0, row - 0.22, text, va="bottom", transform=ax.transData)
        if np.isnan(middle):
            word(ax, 0, row + 0.16, "not defined", MUTED, va="top", transform=ax.transData)
            continue
        ax.plot([low, high], [row, row], color=INK, linewidth=3, alpha=0.25, solid_capstyle="butt")
        ax.plot([middle], [row], "o", color=INK, markersize=4)
        word(ax, middle, row + 0.16, f"{middle:.2f}", ha="center", va="top", transform=ax.transData)
    ax.set(xlim=(0, 1), ylim=(1.6, -0.8), yticks=[])
    tidy(ax, x="0 all alike,  1 all in one")
    ax.spines["left"].set_visible(False)
