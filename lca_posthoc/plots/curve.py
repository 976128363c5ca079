"""Draw the loss, and the start plus everything allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..base.colours import FAINT, HURTING, INK, MUTED
from ..base.text import count, safe_in_figure
from ..errors import InputError
from ..findings.names import shorten
from .style import (
    SMALL,
    dashes,
    end_labels,
    expect,
    fresh_axes,
    heading,
    key,
    note,
    over_gaps,
    palette,
    powers,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import LineStyleType

_MOST_GROUPS = 28  # groups that colours and dashes distinguish


def curve(found: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Draw the true loss as a dark line over a light band, the loss at the start plus Σ allocation;
    the distance is the residual.

    With groups, each has its colour. Without, a small inset shows the cumulative residual on its
    own scale, and ticks at the foot mark segments that stayed above the tolerance.

    Args:
        found: of `findings.curve`.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        InputError: if there are more groups than colours and dashes distinguish.
    """
    expect(found, "curve")
    if found.sizes.get("group", 1) > _MOST_GROUPS:
        raise InputError(
            f"loss {found.attrs.get('loss')!r} has {found.sizes['group']} groups, and a plot shows "
            f"at most {_MOST_GROUPS}: pick some with found.sel(group=[…]) or --group."
        )
    ax = fresh_axes(ax, 4.4, 2.7)
    if "group" in found.dims:
        _groups(ax, found)
        note(ax.figure, found)
        return ax
    _lines(ax, found, INK, "-")
    tidy(ax, x="training step", y="loss", title=heading(found))
    ax.margins(x=0.01)
    key(ax, "lower right", ncols=2)
    bad = found["step_end"].values[~found["converged"].values.astype(bool)]
    if len(bad):
        _mark(ax, bad)
    _residual(ax, found)
    note(ax.figure, found)
    return ax


def _groups(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the lines of every group in its colour, with its name at the end."""
    groups = finding["group"].values
    hues = palette(len(groups))
    styles = [dashes(position, len(groups)) for position in range(len(groups))]
    for group, hue, style in zip(groups, hues, styles, strict=True):
        _lines(ax, finding.sel(group=group), hue, style)
    ax.plot([], [], color=FAINT, linewidth=4, label="start + Σ allocation")
    ax.plot([], [], color=INK, linewidth=1, label="loss")
    key(ax, "lower right", ncols=2)
    tidy(ax, x="training step", y="loss", title=heading(finding))
    ax.margins(x=0.01)
    ends = finding["loss"].isel(step=-1).values
    words = [safe_in_figure(name) for name in shorten([str(group) for group in groups])]
    end_labels(ax, ends, words, hues, styles)


def _mark(ax: Axes, bad: np.ndarray[Any, Any]) -> None:
    """Draw ticks at the foot where segments stayed above the tolerance, and their number."""
    ax.plot(
        bad,
        np.zeros(len(bad)),
        "|",
        color=HURTING,
        markersize=5,
        transform=ax.get_xaxis_transform(),
    )
    faults = f"{count(len(bad), 'segment')} above the tolerance"
    place: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "ha": "right",
        "va": "top",
    }
    ax.set_xlabel(ax.get_xlabel(), loc="left")
    ax.annotate(faults, (1, 0), (0, -16), fontsize=SMALL - 0.5, color=HURTING, **place)


def _lines(ax: Axes, finding: xr.Dataset, hue: str, style: LineStyleType) -> None:
    """Draw start plus Σ allocation, wide and pale, and over it the loss, thin and dark; each
    stretch starts at its own first loss.
    """
    alone = hue == INK  # several lines are distinguished by colours
    pale: dict[str, Any] = {
        "color": FAINT if alone else hue,
        "alpha": 1 if alone else 0.25,
        "linewidth": 4 if alone else 2.5,
    }
    start = finding["loss_start"].values
    band, line = (over_gaps(finding, finding[name].values, start) for name in ("predicted", "loss"))
    legend = (
        {"band": "start + Σ allocation", "line": "loss"} if alone else {"band": None, "line": None}
    )
    ax.plot(*band, solid_capstyle="round", zorder=2, label=legend["band"], **pale)
    ax.plot(*line, color=hue, linewidth=1, linestyle=style, zorder=3, label=legend["line"])


def _residual(ax: Axes, finding: xr.Dataset) -> None:
    """Draw the cumulative residual into the empty corner above a falling curve."""
    inset = ax.inset_axes((0.52, 0.58, 0.46, 0.34))
    x, y = over_gaps(finding, finding["residual_total"].values)
    inset.axhline(0, color=MUTED, linewidth=0.5)
    inset.plot(x, y, color=MUTED, linewidth=0.9)
    tidy(inset, title="")
    inset.set_title(
        "residual so far (units of loss)", fontsize=SMALL - 1, color=MUTED, loc="right", pad=3
    )
    inset.tick_params(labelsize=SMALL - 1.5, length=1.5, labelbottom=False)
    powers(inset, "y", most=3)
    inset.yaxis.get_offset_text().set_fontsize(SMALL - 1.5)
    inset.patch.set_alpha(0)
