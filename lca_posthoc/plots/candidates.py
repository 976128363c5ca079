"""Draw candidates to freeze, prune or reinitialise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..base.colours import HURTING, MUTED
from ..findings.errors import UNTOLD
from .style import (
    SMALL,
    bars_of,
    error_lines,
    expect,
    fresh_figure,
    heading,
    key,
    note,
    parameter_labels,
    powers,
    refuse_groups,
    rows_of_names,
    tidy,
    word,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS = 15  # layers, and tensors
_ABOUT_ERRORS = (
    "Lines over the sums of layers: all known errors together. Pale bars are within them, so they "
    "are not told from zero."
)
_LETTERS = 18  # characters of a name, where two panels share the width


def candidates(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the sums of layers, the parameters of each tensor that never helped or never had an
    effect, and the worst units and parameters.

    At most 15 layers and tensors are shown, the largest; empty panels are omitted.

    Args:
        found: of `findings.candidates`.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.

    Raises:
        InputError: if there are groups and none was picked.
    """
    expect(found, "candidates")
    refuse_groups(found)
    panels = [
        ("layer", _layers),
        ("tensor", _tensors),
        ("unit", _units),
        ("parameter", _parameters),
    ]
    panels = [
        (dim, draw)
        for dim, draw in panels
        if found.sizes.get(dim, 0) and (dim != "tensor" or _idle(found))
    ]
    sizes = [
        min(found.sizes[dim], 40 if dim in ("unit", "parameter") else _MOST_ROWS + 1)
        for dim, _ in panels
    ]
    tall = [
        max(sizes[position : position + 2]) * 0.16 + 0.6 for position in range(0, len(sizes), 2)
    ]
    figure = fresh_figure(figure, 7.2, sum(tall) + 0.2)
    grid = figure.add_gridspec(len(tall), 2, height_ratios=tall)
    for position, (_, draw) in enumerate(panels):
        alone = position % 2 == 0 and position == len(panels) - 1
        draw(
            figure.add_subplot(
                grid[position // 2, :] if alone else grid[position // 2, position % 2]
            ),
            found,
        )
    active = (
        ""
        if _idle(found) or not found.sizes.get("tensor")
        else "Every parameter helped on some segment."
    )
    note(figure, found, active, _ABOUT_ERRORS)
    return figure


def _idle(finding: xr.Dataset) -> bool:
    """Tell whether some parameter never helped, or some unit is dead."""
    return any(
        bool((finding[name] > 0).any())
        for name in ("never_helped", "silent", "dead_units")
        if name in finding
    )


def _largest(ax: Axes, finding: xr.Dataset, dim: str, sizes: np.ndarray[Any, Any]) -> xr.Dataset:
    """Return the `_MOST_ROWS` largest along `dim`, in their order, and write below the axis how
    many are missing.
    """
    order = np.argsort(-np.nan_to_num(np.abs(sizes)), kind="stable")
    rest = order[_MOST_ROWS:]
    if len(rest):
        above = (
            f", each {float(np.nanmax(np.abs(sizes[rest]))):.2g} at most"
            if np.any(sizes[rest])
            else " of zero"
        )
        place: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "left",
            "va": "bottom",
        }
        ax.annotate(
            f"and {len(rest):,} more{above}",
            (0, 0),
            (3, 2),
            fontsize=SMALL - 0.5,
            color=MUTED,
            **place,
        )
    return finding.isel({dim: np.sort(order[:_MOST_ROWS])})


def _room_for_more(ax: Axes, shown: int, whole: int) -> None:
    """Leave an empty row below the last one for the text of `_largest`."""
    if whole > shown:
        ax.set_ylim(shown + 0.6, -0.6)


def _bars(ax: Axes, names: Sequence[str], values: np.ndarray[Any, Any], title: str) -> None:
    bars_of(ax, values)
    _about_bars(ax, names, title)


def _about_bars(ax: Axes, names: Sequence[str], title: str) -> None:
    zero_line(ax, vertical=True)
    tidy(ax, x="Σ allocation (units of loss)", title=title)
    rows_of_names(ax, names, most=40, letters=_LETTERS)
    powers(ax, "x", most=3)


def _layers(ax: Axes, finding: xr.Dataset) -> None:
    whole, finding = finding.sizes["layer"], _largest(ax, finding, "layer", finding["total"].values)
    names = [str(name) for name in finding["layer"].values]
    values = finding["total"].values
    bars_of(ax, values, finding["verdict"].values == UNTOLD)
    error_lines(ax, values, finding["error"].values)
    _about_bars(ax, names, f"layers: {heading(finding)}")
    _room_for_more(ax, len(names), whole)
    if finding["freeze"].any():
        low, high = ax.get_xlim()
        ax.set_xlim(low, high + 0.22 * (high - low))  # for the words behind the bars
    for position in np.flatnonzero(finding["freeze"].values).tolist():
        word(
            ax,
            values[position],
            position,
            " freeze?",
            HURTING,
            SMALL - 1,
            va="center",
            transform=ax.transData,
        )


def _tensors(ax: Axes, finding: xr.Dataset) -> None:
    whole, finding = (
        finding.sizes["tensor"],
        _largest(ax, finding, "tensor", (finding["never_helped"] + finding["silent"]).values),
    )
    names = [str(name) for name in finding["tensor"].values]
    never, silent = finding["never_helped"].values, finding["silent"].values
    ax.barh(
        range(len(names)), silent, height=0.72, color=MUTED, alpha=0.5, label="never had an effect"
    )
    ax.barh(range(len(names)), never, left=silent, height=0.72, color=HURTING, label="never helped")
    tidy(ax, x="parameters")
    rows_of_names(ax, names, most=40, letters=_LETTERS)
    ax.locator_params(axis="x", nbins=4, integer=True)
    _room_for_more(ax, len(names), whole)
    key(ax, "lower right", ncols=2, handlelength=1)
    ax.set_xlim(left=0)
    words = dict[str, str]()
    for name, dead, units in zip(
        names, finding["dead_units"].values, finding["units"].values, strict=True
    ):
        words.setdefault(
            name.rpartition(".")[0], f" {int(dead):,} of {int(units):,} units dead" if dead else ""
        )
    for module, text in words.items():
        position = next(
            position for position, name in enumerate(names) if name.rpartition(".")[0] == module
        )
        word(
            ax,
            silent[position] + never[position],
            position,
            text,
            MUTED,
            SMALL - 1,
            va="center",
            transform=ax.transData,
        )


def _units(ax: Axes, finding: xr.Dataset) -> None:
    names = [str(name) for name in finding["unit_name"].values]
    _bars(ax, names, finding["unit_total"].values, "units that hurt most")
    ax.set_yticks(range(len(names)), parameter_labels(names, _letters(ax)))


def _letters(ax: Axes) -> int:
    """Return how many characters of a parameter's name fit beside a panel; more where it has the
    full width.
    """
    place = ax.get_subplotspec()
    return 40 if place is not None and len(place.colspan) == 2 else 26


def _parameters(ax: Axes, finding: xr.Dataset) -> None:
    names = [str(name) for name in finding["parameter_name"].values]
    _bars(ax, names, finding["parameter_allocated"].values, "parameters that hurt most")
    ax.set_yticks(range(len(names)), parameter_labels(names, _letters(ax)))
