"""Draw the mean intervals between turns of weights, gradients and allocations, and traces of single
parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..base.colours import FAINT, HELPING, HURTING, INK, LAYERS
from ..errors import InputError
from .style import (
    SMALL,
    expect,
    fresh_figure,
    heading,
    key,
    labels,
    note,
    over_gaps,
    powers,
    refuse_groups,
    rows_of_names,
    strongest,
    tidy,
    time_edges,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTERS = 26  # characters of a tensor's name above a trace
_TRACES = {"weight": "weight", "gradient": "gradient", "allocation": "allocation\n(units of loss)"}


def oscillation(found: xr.Dataset, *, figure: Figure | None = None, top: int = 40) -> Figure:
    """Draw the mean number of segments between two turns of each tensor's weights, gradients and
    allocations, and traces of single ones.

    Args:
        found: of `findings.oscillation`; for a part of training, `found.sel(step=slice(100,
            200))`.
        figure: an empty one to draw in; default a new one.
        top: how many tensors to draw, those with the most parameters; the foot counts the
            others.

    Returns:
        The figure.

    Raises:
        InputError: if there are groups and none was picked, or neither turns nor traces
            exist.
    """
    expect(found, "oscillation")
    refuse_groups(found)
    traces, rest = found.sizes.get("trace", 0), ""
    if "interval" in found:
        found, rest = strongest(found, "tensor", found["elements"].values, top)
        rest = rest.replace(" at most.", " parameters at most.")
    shown = [name for name in _TRACES if name in found] if traces else []
    tall = max(1.4, 0.5 + 0.17 * found.sizes["tensor"]) if "interval" in found else 0.0
    if not tall and not shown:
        raise InputError(f"nothing to draw yet: {found.attrs.get('left_out', '')}")
    figure = fresh_figure(figure, max(4.4, 1.9 + 1.6 * traces), tall + 1.05 * len(shown) + 0.3)
    heights = [*([tall] if tall else []), *[1.05] * len(shown)]
    rows = figure.add_gridspec(len(heights), max(1, traces), height_ratios=heights)
    if tall:
        _intervals(figure.add_subplot(rows[0, :]), found)
    titles = _titles(found) if shown else []
    for row, name in enumerate(shown, start=bool(tall)):
        for column in range(traces):
            ax = figure.add_subplot(rows[row, column])
            title = titles[column] if name == shown[0] else ""
            _trace(ax, found.isel(trace=column), name, last=name == shown[-1], title=title)
            if column == 0:
                ax.set_ylabel(_TRACES[name], fontsize=SMALL, color=INK)
        figure.align_ylabels()
    note(figure, found, rest)
    return figure


def _intervals(ax: Axes, finding: xr.Dataset) -> None:
    signals = [str(name) for name in finding["signal"].values]
    markers = ("o", "s", "D")
    names = ["all", *(str(name) for name in finding["tensor"].values)]
    for position, signal in enumerate(signals):
        every = np.append(
            float(finding["overall_interval"].sel(signal=signal)),
            finding["interval"].sel(signal=signal).values,
        )
        values = np.where(np.isfinite(every), every, np.nan)  # infinite intervals are not drawn
        ax.plot(
            values,
            range(len(names)),
            markers[position % 3],
            color=LAYERS[position],
            markersize=3.8,
            label=signal,
            linestyle="",
        )
    ax.grid(axis="y", color=FAINT, linewidth=0.4)
    ax.set_axisbelow(True)
    tidy(ax, x="segments between two turns (mean)", title=heading(finding))
    rows_of_names(ax, names)
    key(ax, "lower right", ncols=3, handletextpad=0.1)
    ax.set_xlim(left=0)


def _titles(finding: xr.Dataset) -> list[str]:
    """Return a title for each trace: its tensor, shortened in the middle, and below it the index
    and why it is drawn.
    """
    names = [str(name).partition("[") for name in finding["parameter"].values]
    tensors = labels([tensor for tensor, *_ in names], _LETTERS)
    return [
        f"{tensor}\n{mark}{rest} {why}".replace("\n ", "\n")
        for tensor, (_, mark, rest), why in zip(tensors, names, finding["why"].values, strict=True)
    ]


def _trace(ax: Axes, finding: xr.Dataset, name: str, *, last: bool, title: str) -> None:
    if name == "allocation":
        edges, heights = time_edges(finding, finding[name].values)
        # without a line, bars thinner than a pixel fade
        ax.stairs(np.where(heights < 0, heights, 0), edges, color=HELPING, fill=True, linewidth=0.4)
        ax.stairs(np.where(heights > 0, heights, 0), edges, color=HURTING, fill=True, linewidth=0.4)
    else:
        x, y = over_gaps(
            finding, finding[name].values, coordinate="step" if name == "weight" else "step_end"
        )
        ax.plot(x, y, color=INK, linewidth=0.7)
    if name != "weight":
        zero_line(ax)
    tidy(ax, x="training step" if last else "")
    ax.tick_params(labelsize=SMALL - 1.5, labelbottom=last)
    powers(ax, "y", most=4)
    ax.locator_params(axis="x", nbins=4)
    ax.margins(x=0.01)
    ax.yaxis.get_offset_text().set_fontsize(SMALL - 1.5)
    if title:
        hue = {"helped most": HELPING, "hurt most": HURTING}.get(str(finding["why"].item()), INK)
        ax.set_title(title, fontsize=SMALL - 0.5, color=hue, loc="left")
