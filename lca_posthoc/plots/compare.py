"""Draw compared runs: the sums of each layer, with intervals over repeated runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..base.colours import FAINT
from ..base.text import count
from .layers import helped_hurt
from .style import (
    SMALL,
    colour,
    expect,
    fresh_axes,
    key,
    labels,
    note,
    powers,
    refuse_groups,
    rows_of_names,
    strongest,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vPX"
_LEVEL = 0.05


_PATHS = "Broad bars: the change by other paths through the same checkpoints."


def compare(found: xr.Dataset, *, ax: Axes | None = None, top: int = 40) -> Axes:
    """Draw each layer's mean sum with its confidence interval, one marker and colour per label, and
    single runs as faint dots.

    A filled marker differs from zero at 5 % after Holm's correction. A hollow one does not, or its
    label has a single run. The foot tells how the runs differ and which of them belong to one
    training.

    Args:
        found: of `findings.compare`.
        ax: where to draw; by default a new figure.
        top: how many layers to draw, those with the largest means; the foot counts the others.

    Returns:
        The axes.

    Raises:
        InputError: if there are groups and none was picked.
    """
    expect(found, "compare")
    refuse_groups(found)
    found, rest = strongest(found, "layer", abs(found["mean"]).max("label").values, top)
    names = [str(name) for name in found["layer"].values]
    label_texts = labels([str(name) for name in found["label"].values])
    ax = fresh_axes(ax, 4.6, 0.9 + len(names) * (0.12 + 0.09 * len(label_texts)))
    zero_line(ax, vertical=True)
    gap = 0.7 / len(label_texts)
    for position, word in enumerate(label_texts):
        rows = np.arange(len(names)) + (position - (len(label_texts) - 1) / 2) * gap
        _one_label(ax, found.isel(label=position), word, rows, position)
    for row in range(len(names) - 1):
        ax.axhline(row + 0.5, color=FAINT, linewidth=0.4, zorder=0)
    tidy(ax, x="Σ allocation over training (units of loss)")
    rows_of_names(ax, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.margins(x=0.05)
    powers(ax, "x")
    helped_hurt(ax)
    _key_of_labels(ax, several=bool((found["runs"].values > 1).any()))
    if bool(found["path_band"].notnull().any()):
        rest = f"{rest} {_PATHS}".strip()
    note(ax.figure, found, rest, *str(found.attrs.get("notes", "")).split("\n"))
    return ax


def _one_label(
    ax: Axes, one: xr.Dataset, word: str, rows: np.ndarray[Any, Any], position: int
) -> None:
    """Draw the runs, the interval and the mean of one label, at the heights `rows`."""
    mean, hue = one["mean"].values, colour(position)
    if "total" in one:
        totals = one["total"].transpose("layer", "run").values
        ax.plot(
            totals.ravel(),
            np.repeat(rows, totals.shape[1]),
            ".",
            color=hue,
            alpha=0.35,
            markersize=3,
            zorder=1,
        )
    path = one["path_band"].values
    if np.isfinite(path).any():
        ax.hlines(rows, mean - path, mean + path, color=hue, linewidth=4, alpha=0.25, zorder=0)
    ax.hlines(rows, one["low"].values, one["high"].values, color=hue, linewidth=1.2, zorder=2)
    marker: dict[str, Any] = {
        "marker": _MARKERS[position % len(_MARKERS)],
        "linestyle": "",
        "color": hue,
        "markersize": 4,
        "zorder": 3,
    }
    label = f"{word} ({count(int(one['runs']), 'run')})"
    ax.plot(mean, rows, markerfacecolor="white", label=label, **marker)
    ax.plot(np.where(one["p_holm"].values < _LEVEL, mean, np.nan), rows, **marker)


def _key_of_labels(ax: Axes, *, several: bool) -> None:
    """Draw the key beside the axes; it explains filled markers where a label has several runs."""
    key(
        ax,
        "center left",
        bbox_to_anchor=(1, 0.5),
        title=f"filled: p < {_LEVEL} (Holm)" if several else None,
        title_fontsize=SMALL - 1,
        alignment="left",
    )
