"""What might be frozen, pruned or set up anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..colours import HELPING, HURTING, MUTED
from .style import SMALL, fresh_figure, heading, key, note, powers, refuse_groups, rows_of_names, tidy, word, zero_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def candidates(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draws the sums of layers, the parameters of each tensor that never helped or never did anything, and the worst units and parameters.

    Args:
        found: of `findings.candidates`.
        figure: an empty one to draw in; default a new one.

    Returns:
        The figure.

    Raises:
        InputError: where there are groups and none was picked.
    """
    refuse_groups(found)
    panels = [
        ("layer", _layers),
        ("tensor", _tensors),
        ("unit", _units),
        ("parameter", _parameters),
    ]
    panels = [(dim, draw) for dim, draw in panels if found.sizes.get(dim, 0)]
    sizes = [min(found.sizes[dim], 40) for dim, _ in panels]
    tall = [max(sizes[at : at + 2]) * 0.16 + 0.6 for at in range(0, len(sizes), 2)]
    figure = fresh_figure(figure, 7.2, sum(tall) + 0.2)
    grid = figure.add_gridspec(len(tall), 2, height_ratios=tall)
    for at, (_, draw) in enumerate(panels):
        alone = at % 2 == 0 and at == len(panels) - 1
        draw(figure.add_subplot(grid[at // 2, :] if alone else grid[at // 2, at % 2]), found)
    note(figure, str(found.attrs.get("left_out", "")))
    return figure


def _bars(ax: Axes, names: Sequence[str], values: Any, label: str, title: str) -> None:
    ax.barh(range(len(names)), values, height=0.72, color=[HELPING if value < 0 else HURTING for value in values])
    zero_line(ax, vertical=True)
    tidy(ax, x=label, title=title)
    rows_of_names(ax, names, most=40)
    powers(ax, "x")


def _layers(ax: Axes, found: xr.Dataset) -> None:
    names = [str(name) for name in found["layer"].values]
    values = found["total"].values
    _bars(ax, names, values, "Σ allocation (units of loss)", f"layers: {heading(found)}")
    for at in np.flatnonzero(found["freeze"].values).tolist():
        word(ax, values[at], at, " freeze?", HURTING, SMALL - 1, va="center", transform=ax.transData)


def _tensors(ax: Axes, found: xr.Dataset) -> None:
    names = [str(name) for name in found["tensor"].values]
    never, silent = found["never_helped"].values, found["silent"].values
    ax.barh(range(len(names)), silent, height=0.72, color=MUTED, alpha=0.5, label="never did anything")
    ax.barh(range(len(names)), never, left=silent, height=0.72, color=HURTING, label="never helped")
    tidy(ax, x="parameters")
    rows_of_names(ax, names, most=40)
    key(ax, "lower right", ncols=2, handlelength=1)
    ax.set_xlim(left=0)
    said = dict[str, str]()
    for name, dead, units in zip(names, found["dead_units"].values, found["units"].values, strict=True):
        said.setdefault(name.rpartition(".")[0], f" {int(dead):,} of {int(units):,} units dead" if dead else "")
    for module, text in said.items():
        at = next(at for at, name in enumerate(names) if name.rpartition(".")[0] == module)
        word(ax, silent[at] + never[at], at, text, MUTED, SMALL - 1, va="center", transform=ax.transData)


def _units(ax: Axes, found: xr.Dataset) -> None:
    names = [str(name) for name in found["unit_name"].values]
    _bars(ax, names, found["unit_total"].values, "Σ allocation (units of loss)", "units that hurt most")


def _parameters(ax: Axes, found: xr.Dataset) -> None:
    names = [str(name) for name in found["parameter_name"].values]
    _bars(ax, names, found["parameter_allocated"].values, "Σ allocation (units of loss)", "parameters that hurt most")
