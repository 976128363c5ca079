"""Draw components of repeated blocks by depth, layers outside blocks, and attention heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import HELPING, HURTING, INK
from ..findings.common import Numbers
from ..findings.names import shorten
from .layers import helped_hurt
from .style import (
    DIVERGE,
    SMALL,
    colour_bar,
    expect,
    fresh_figure,
    heading,
    labels,
    note,
    powers,
    refuse_groups,
    rows_of_names,
    strongest,
    symmetric,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 40
_COLUMNS = 24  # up to so many columns are all numbered


def blocks(found: xr.Dataset, *, figure: Figure | None = None, top: int = _ROWS) -> Figure:
    """Draw the allocation of each component of each block, of the layers outside blocks, and of
    heads.

    Components are rows and depths are columns; values are sums over training.

    Args:
        found: of `findings.blocks`.
        figure: an empty figure to draw in; by default a new one.
        top: how many components and how many layers outside to draw, those with the largest sums;
            the foot counts the others.

    Returns:
        The figure.

    Raises:
        InputError: if there are groups and none was picked, or for a `top` below one.
    """
    expect(found, "blocks")
    refuse_groups(found)
    sizes = np.nansum(abs(found["total"].transpose("component", "depth").values), axis=1)
    found, rest = strongest(found, "component", sizes, top)
    found, rest_outside = strongest(found, "outside_layer", found["outside"].values, top)
    rows, outside = found.sizes["component"], found.sizes["outside_layer"]
    heads = found.sizes.get("projection", 0) * found.sizes.get("head", 0)
    heights = {
        "components": 0.75 + 0.2 * rows if rows else 0.0,
        "heads": min(6.0, 0.75 + 0.14 * heads) if heads else 0.0,
        "outside": 0.85 + 0.2 * outside if outside else 0.0,
    }
    heights = {name: height for name, height in heights.items() if height}
    wide = 4.4 + 0.18 * min(_COLUMNS, found.sizes["depth"])
    figure = fresh_figure(figure, wide, min(13.0, sum(heights.values(), 0.3)))
    panels = figure.add_gridspec(len(heights), 1, height_ratios=list(heights.values()))
    axes = {name: figure.add_subplot(panels[row]) for row, name in enumerate(heights)}
    if rows:
        _components(axes["components"], found)
    if heads:
        _heads(axes["heads"], found)
    if outside:
        _outside(axes["outside"], found, heading(found) if not rows else "")
    note(
        figure,
        found,
        rest.replace(" more,", " more of the components,"),
        rest_outside.replace(" more,", " more outside of blocks,"),
    )
    return figure


def _components(ax: Axes, finding: xr.Dataset) -> None:
    """Draw a row for each component; thin lines separate stacks of blocks."""
    stacks = [str(name) for name in finding["stack"].values]
    one = len(set(stacks)) == 1
    names = finding["name" if one else "component"].values
    title = (
        f"{heading(finding)}: {labels([stacks[0]], 30)[0]}"
        if one and stacks[0]
        else heading(finding)
    )
    _picture(ax, finding["total"].values, [str(name) for name in names], finding, title)
    for row in range(1, len(stacks)):
        if stacks[row] != stacks[row - 1]:
            ax.axhline(row - 0.5, color=INK, linewidth=0.5)


def _picture(ax: Axes, values: Numbers, names: list[str], finding: xr.Dataset, title: str) -> None:
    """Draw rows by depth; cells without such a component stay blank."""
    depths = finding["depth"].values
    shown = ax.pcolormesh(
        np.arange(len(depths) + 1) - 0.5,
        np.arange(len(names) + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=DIVERGE.with_extremes(bad=(0, 0, 0, 0)),
        norm=symmetric(scale=float(np.nanmax(np.abs(values), initial=0.0))),
        rasterized=True,
    )
    tidy(ax, x="depth (number of the block)", title=title)
    rows_of_names(ax, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    every = -(-len(depths) // _COLUMNS)
    ax.set_xticks(range(0, len(depths), every), [str(depth) for depth in depths[::every]])
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.spines["bottom"].set_visible(False)
    colour_bar(shown, ax, "Σ allocation\n(units of loss)")


def _heads(ax: Axes, finding: xr.Dataset) -> None:
    """Draw a row for each head of each projection."""
    values = finding["head_total"].transpose("projection", "head", "depth").values
    several = len(set(finding["projection_stack"].values)) > 1
    projections = [str(name) for name in finding["projection"].values]
    short = shorten([name if several else name.rpartition("*.")[2] for name in projections], 22)
    names = [f"{name} {head}" for name in short for head in range(values.shape[1])]
    _picture(ax, values.reshape(-1, values.shape[-1]), names, finding, "attention heads")
    for border in range(values.shape[1], len(names), values.shape[1]):
        ax.axhline(border - 0.5, color=INK, linewidth=0.5)


def _outside(ax: Axes, finding: xr.Dataset, title: str) -> None:
    """Draw bars of the layers in no block."""
    names = [str(name) for name in finding["outside_layer"].values]
    values = finding["outside"].values
    ax.barh(
        range(len(names)),
        values,
        height=0.72,
        color=[HELPING if value < 0 else HURTING for value in values],
    )
    zero_line(ax, vertical=True)
    tidy(ax, x="Σ allocation over training (units of loss)")
    ax.set_title(title or "outside of blocks", loc="left", fontsize=SMALL + 0.5, color=INK, pad=14)
    rows_of_names(ax, names)
    powers(ax, "x")
    helped_hurt(ax)
