"""What each layer did to the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..colours import HELPING, HURTING, INK, LAYERS
from ..errors import InputError
from .style import (
    DIVERGE,
    colour,
    colour_bar,
    dashes,
    end_labels,
    expect,
    fresh_axes,
    heading,
    labels,
    note,
    over_gaps,
    powers,
    rows_of_names,
    symmetric,
    tidy,
    word,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWS = ("cumulative", "total", "mean")
_LINES = 10  # more are shown as bars
_WORDS = {
    "cumulative": "Σ allocation so far",
    "total": "Σ allocation over training",
    "mean": "allocation per parameter over training",
}


def layers(found: xr.Dataset, *, ax: Axes | None = None, show: str | None = None) -> Axes:
    """Draws the sum of each layer as it grows over training, or in the end.

    Args:
        found: of `findings.layers`.
        ax: where to draw; default a new figure.
        show: "cumulative" draws lines over training, "total" and "mean" (per parameter) bars, or with groups a picture of layer × group.
            Default: lines for at most ten layers without groups, else the total.

    Returns:
        The axes.

    Raises:
        InputError: for another `show`, or lines of a loss with groups.
    """
    expect(found, "layers")
    names = [str(name) for name in found["layer"].values]
    groups = "group" in found.dims
    if show is None:
        show = "cumulative" if not groups and len(names) <= _LINES else "total"
    if show not in _SHOWS:
        raise InputError(f"show is one of {', '.join(map(repr, _SHOWS))}, got {show!r}.")
    if groups and show == "cumulative":
        raise InputError("lines over training are of one group: pick one: found.sel(group=…) or --group.")
    label = f"{_WORDS[show]} (units of loss)"
    if groups:
        ax = fresh_axes(ax, 1.8 + 0.32 * found.sizes["group"], 1.2 + 0.24 * len(names))
        _by_group(ax, found, names, show, label)
    elif show == "cumulative":
        ax = fresh_axes(ax, 4.4, 2.7)
        _lines(ax, found, names, label)
    else:
        ax = fresh_axes(ax, 4.4, 0.7 + 0.2 * min(len(names), 60))
        _bars(ax, found, names, show, label)
    note(ax.figure, found)
    return ax


def _lines(ax: Axes, found: xr.Dataset, names: list[str], label: str) -> None:
    zero_line(ax)
    for at in range(len(names)):
        one = found.isel(layer=at)
        line = over_gaps(found, one["cumulative"].values, (one["cumulative"] - one["allocated"]).values)
        ax.plot(*line, color=colour(at), linestyle=dashes(at), linewidth=1.4)
    tidy(ax, x="training step", y=label, title=heading(found))
    ax.margins(x=0.01)
    totals = found["cumulative"].isel(step=-1).values
    words = [f"{name}  {total:+#.3g}".replace("-", "−") for name, total in zip(labels(names), totals, strict=True)]
    styles = [dashes(at) for at in range(len(names))]
    end_labels(
        ax, totals, words, [colour(at) for at in range(len(names))], styles if len(names) > len(LAYERS) else None
    )


def _bars(ax: Axes, found: xr.Dataset, names: list[str], show: str, label: str) -> None:
    values = found[show].values
    ax.barh(range(len(names)), values, height=0.72, color=[HELPING if value < 0 else HURTING for value in values])
    zero_line(ax, vertical=True)
    tidy(ax, x=label, title=heading(found))
    rows_of_names(ax, names)
    powers(ax, "x")
    helped_hurt(ax)


def helped_hurt(ax: Axes) -> None:
    """Says above an axis of allocations which side is which."""
    low, high = ax.get_xlim()
    place = float(np.clip((0 - low) / ((high - low) or 1), 0.0, 1.0))
    if place > 0.02:
        word(ax, place, 1.01, "← helped ", HELPING, ha="right", va="bottom")
    if place < 0.98:
        word(ax, place, 1.01, " hurt →", HURTING, ha="left", va="bottom")


def _by_group(ax: Axes, found: xr.Dataset, names: list[str], show: str, label: str) -> None:
    values = found[show].transpose("layer", "group").values
    groups = [str(group) for group in found["group"].values]
    shown = ax.imshow(values, cmap=DIVERGE, norm=symmetric(scale=float(np.nanmax(np.abs(values)))), aspect="auto")
    tidy(ax, x="group", title=heading(found))
    every = -(-len(groups) // 20)
    ax.set_xticks(range(0, len(groups), every), labels(groups, 10)[::every])
    rows_of_names(ax, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.spines["bottom"].set_visible(False)
    colour_bar(shown, ax, label.replace(" (", "\n(").replace(" over training", "").replace(" per", "\nper"))
