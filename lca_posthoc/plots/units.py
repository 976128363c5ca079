"""Draw the allocation of each neuron or channel over training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import INK
from ..base.text import safe_in_figure
from ..errors import InputError
from .style import (
    SMALL,
    colour_bar,
    expect,
    fresh_axes,
    heading,
    heat,
    labels,
    note,
    refuse_groups,
    symmetric,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 10  # up to so many layers, stronger lines separate them


def units(found: xr.Dataset, *, ax: Axes | None = None, layer: str | None = None) -> Axes:
    """Draw one row of pixels per neuron or channel, teal where it helped and vermilion where it
    hurt.

    Args:
        found: of `findings.units`.
        ax: where to draw; by default a new figure.
        layer: name of the only layer to show; None for all, below each other.

    Returns:
        The axes.

    Raises:
        InputError: for an unknown layer, or if there are groups and none was picked.
    """
    expect(found, "units")
    refuse_groups(found)
    known = list(dict.fromkeys(str(name) for name in found["layer"].values))
    if layer is not None:
        if layer not in known:
            raise InputError(
                f"no units of layer {layer!r}; there are {', '.join(map(repr, known[:20]))}."
            )
        found = found.isel(unit=np.flatnonzero(found["layer"].values == layer))
    rows = found.sizes["unit"]
    ax = fresh_axes(ax, 4.8, float(np.clip(0.9 + 0.025 * rows, 2.4, 6.5)))
    values = found["allocated"].transpose("unit", "step").values
    shown = heat(ax, found, values, symmetric(values))
    ax.margins(x=0)
    if layer is None:
        tidy(ax, x="training step", title=heading(found), frame=True)
        _borders(ax, [str(name) for name in found["layer"].values])
    else:
        tidy(
            ax,
            x="training step",
            y="unit",
            title=f"{safe_in_figure(str(layer))}: {heading(found)}",
            frame=True,
        )
    colour_bar(shown, ax, "Σ allocation (units of loss)")
    note(ax.figure, found)
    return ax


def _borders(ax: Axes, names: list[str]) -> None:
    """Draw thin lines between layers, and names at their middles, taller layers first where there
    is no room for all.
    """
    starts = [0, *(row for row in range(1, len(names)) if names[row] != names[row - 1])]
    ends = [*starts[1:], len(names)]
    for start in starts[1:]:
        ax.axhline(start - 0.5, color=INK, linewidth=0.5 if len(starts) <= _FEW else 0.2)
    # height of a label
    rows = 1.1 * SMALL / max(ax.get_window_extent().height / ax.figure.dpi * 72, 1) * len(names)
    named: list[tuple[float, str]] = []
    for a, b in sorted(
        zip(starts, ends, strict=True), key=lambda ends_of_one: ends_of_one[0] - ends_of_one[1]
    ):
        middle = (a + b - 1) / 2
        if all(abs(middle - other) >= rows for other, _ in named):
            named.append((middle, names[a]))
    named.sort()
    ax.set_yticks([middle for middle, _ in named], labels([name for _, name in named]))
    ax.tick_params(axis="y", length=0)
