"""Draw the allocation of each layer, over training or in total."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..base.colours import FAINT, HELPING, HURTING, INK, LAYERS, MUTED
from ..errors import InputError
from ..findings.errors import KINDS, UNTOLD, untold_sentence
from .style import (
    DIVERGE,
    SMALL,
    bars_of,
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
    strongest,
    symmetric,
    tidy,
    word,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUANTITIES = ("cumulative", "total", "mean")
_LINES = 10  # layers with a name and a colour as lines; more are drawn as bars
_ROWS = 40
# of each error: the offset of its line from the middle of a bar, its width and opacity
_ERRORS = {
    "path": (0.0, 3.0, 0.35),
    "quadrature": (0.16, 0.8, 1.0),
    "precision": (0.28, 0.8, 0.6),
    "examples": (-0.16, 0.8, 0.6),
    "segments": (0.0, 1.2, 1.0),
}
_AT_THE_ENDS = ("path", "segments")  # errors drawn at the ends of lines over training
_SEEN = 0.005  # share of the largest sum below which an error is not drawn
_ABOUT_ERRORS = {
    "path": "Broad lines: change by other paths through the same checkpoints",
    "quadrature": "thin lines below: quadrature",
    "precision": "faint lines at the bottom: precision",
    "examples": "thin lines above: two standard errors from drawing examples",
    "segments": "lines in the middle: two standard errors from drawing segments",
}
_ABOUT_ENDS = {
    "path": "Broad bars at the ends of lines: change by other paths through the same checkpoints",
    "segments": "thin bars at the ends of lines: two standard errors from drawing segments",
}
_WORDS = {
    "cumulative": "Σ allocation so far",
    "total": "Σ allocation over training",
    "mean": "allocation per parameter over training",
}


def layers(
    found: xr.Dataset,
    *,
    ax: Axes | None = None,
    quantity: str | None = None,
    top: int | None = None,
) -> Axes:
    """Draw the sum of each layer over training or in total.

    If there are many layers, those with the largest sums stand out: as coloured lines with names
    over grey ones, or as rows, where the foot counts the others.

    Args:
        found: of `findings.layers`.
        ax: where to draw; by default a new figure.
        quantity: "cumulative" draws lines over training, "total" and "mean" (per parameter) draw
            bars, or with groups a picture of layer × group. By default lines for at most ten layers
            without groups, else the total.
        top: how many layers stand out; default 10 as lines, 40 as rows.

    Returns:
        The axes.

    Raises:
        InputError: for any other `quantity`, lines of a loss with groups, or a `top` below one.
    """
    expect(found, "layers")
    names = [str(name) for name in found["layer"].values]
    groups = "group" in found.dims
    if quantity is None:
        quantity = "cumulative" if not groups and len(names) <= _LINES else "total"
    if quantity not in _QUANTITIES:
        raise InputError(
            f"quantity is one of {', '.join(map(repr, _QUANTITIES))}, got {quantity!r}."
        )
    if groups and quantity == "cumulative":
        raise InputError(
            "lines over training show one group. Pick one: found.sel(group=…) or --group."
        )
    label = f"{_WORDS[quantity]} (units of loss)"
    lines = quantity == "cumulative"
    sums = found["cumulative"].isel(step=-1) if lines else found[quantity]
    sizes = abs(sums).max("group").values if groups else sums.values
    strong, rest = strongest(
        found, "layer", sizes, top if top is not None else _LINES if lines else _ROWS
    )
    if not lines:
        found, names = strong, [str(name) for name in strong["layer"].values]
    if groups:
        ax = fresh_axes(ax, 1.8 + 0.32 * found.sizes["group"], 1.2 + 0.24 * len(names))
        _by_group(ax, found, names, quantity, label)
        untold = "Dots: sums within their error, not told from zero." if _untold(found) else ""
    elif lines:
        longest = max((len(name) for name in labels(strong["layer"].values.tolist())), default=0)
        ax = fresh_axes(ax, 4.1 + 0.055 * longest, max(2.7, 0.8 + 0.14 * strong.sizes["layer"]))
        _lines(ax, found, strong, label)
        rest = f"{rest.replace('Not shown', 'In grey')} {about_ends(found)}".strip()
        untold = untold_sentence(strong)
    else:
        about = about_errors(found)
        # room for the texts about errors, and for the errors of segments
        ax = fresh_axes(ax, 4.4, 0.9 + 0.2 * len(names) + (0.8 if about else 0.0))
        _bars(ax, found, names, quantity, label)
        rest = f"{rest} {about}".strip()
        untold = "Pale bars are within their error: not told from zero." if _untold(found) else ""
    note(ax.figure, found, rest, untold)
    return ax


def _untold(finding: xr.Dataset) -> bool:
    return bool((finding["verdict"] == UNTOLD).any())


def _lines(ax: Axes, finding: xr.Dataset, strong: xr.Dataset, label: str) -> None:
    """Draw the strong layers in colours over the others in grey, with names and sums at the ends of
    the coloured lines.
    """
    zero_line(ax)
    names = [str(name) for name in strong["layer"].values]
    for one in (
        finding.isel(layer=position)
        for position, name in enumerate(finding["layer"].values)
        if str(name) not in set(names)
    ):
        ax.plot(*_line(finding, one), color=FAINT, linewidth=0.7, zorder=1.5)
    for position in range(len(names)):
        ax.plot(
            *_line(finding, strong.isel(layer=position)),
            color=colour(position),
            linestyle=dashes(position),
            linewidth=1.4,
        )
    _end_errors(ax, finding, strong)
    tidy(ax, x="training step", y=label, title=heading(finding))
    ax.margins(x=0.01)
    powers(ax, "y")
    totals = strong["cumulative"].isel(step=-1).values
    words = [
        f"{name}  {total:+#.3g}".rstrip(".").replace("-", "−")
        for name, total in zip(labels(names), totals, strict=True)
    ]
    styles = [dashes(position) for position in range(len(names))]
    end_labels(
        ax,
        totals,
        words,
        [colour(position) for position in range(len(names))],
        styles if len(names) > len(LAYERS) else None,
    )


def _line(finding: xr.Dataset, one: xr.Dataset) -> tuple[Any, Any]:
    return over_gaps(
        finding, one["cumulative"].values, (one["cumulative"] - one["allocated"]).values
    )


def _bars(ax: Axes, finding: xr.Dataset, names: list[str], quantity: str, label: str) -> None:
    bars_of(ax, finding[quantity].values, finding["verdict"].values == UNTOLD)
    _errors(ax, finding, quantity)
    zero_line(ax, vertical=True)
    tidy(ax, x=label.replace(" (", "\n(") if quantity == "mean" else label, title=heading(finding))
    rows_of_names(ax, names)
    powers(ax, "x")
    helped_hurt(ax)


def _errors(ax: Axes, finding: xr.Dataset, quantity: str) -> None:
    """Draw each error of the bars: another path as a broad bar, quadrature and examples as lines in
    it.
    """
    per = np.maximum(1, finding["elements"].values) if quantity == "mean" else 1.0
    rows, values = np.arange(finding.sizes["layer"]), finding[quantity].values
    for name in _drawn_errors(finding):
        shift, width, alpha = _ERRORS[name]
        error = KINDS[name].times * finding[name].values / per
        low, high = values - error, values + error
        ax.hlines(rows + shift, low, high, color=INK, linewidth=width, alpha=alpha, zorder=3)


def _drawn_errors(finding: xr.Dataset) -> list[str]:
    """Return the errors that are large enough to be seen beside the largest sum."""
    largest = float(abs(finding["total"]).max())
    return [
        name
        for name in _ERRORS
        if name in finding and KINDS[name].times * float(finding[name].max()) > _SEEN * largest
    ]


def _end_errors(ax: Axes, finding: xr.Dataset, strong: xr.Dataset) -> None:
    """Draw the errors of sums over training at the ends of their lines."""
    start, end = float(finding["step"].values[0]), float(finding["step_end"].values[-1])
    sums = strong["cumulative"].isel(step=-1).values
    for name in _drawn_at_ends(finding):
        _, width, alpha = _ERRORS[name]
        errors = KINDS[name].times * strong[name].values
        for position, (total, error) in enumerate(zip(sums, errors, strict=True)):
            place = end - 0.008 * position * (end - start)  # side by side
            hue = colour(position)
            ax.vlines(place, total - error, total + error, hue, linewidth=width, alpha=alpha)


def _drawn_at_ends(finding: xr.Dataset) -> list[str]:
    return [name for name in _drawn_errors(finding) if name in _AT_THE_ENDS]


def about_ends(finding: xr.Dataset) -> str:
    """Describe the errors drawn at the ends of lines over training."""
    drawn = [_ABOUT_ENDS[name] for name in _drawn_at_ends(finding)]
    return _sentence(drawn)


def _sentence(parts: list[str]) -> str:
    """Join parts into a sentence; "" for none."""
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def about_errors(finding: xr.Dataset) -> str:
    """Describe the errors of sums that are drawn, and how."""
    return _sentence([_ABOUT_ERRORS[name] for name in _drawn_errors(finding)])


def helped_hurt(ax: Axes) -> None:
    """Write above an axis of allocations which side helped and which hurt."""
    low, high = ax.get_xlim()
    place = float(np.clip((0 - low) / ((high - low) or 1), 0.0, 1.0))
    if place > 0.02:
        word(ax, place, 1.01, "← helped ", HELPING, ha="right", va="bottom")
    if place < 0.98:
        word(ax, place, 1.01, " hurt →", HURTING, ha="left", va="bottom")


def _by_group(ax: Axes, finding: xr.Dataset, names: list[str], quantity: str, label: str) -> None:
    values = finding[quantity].transpose("layer", "group").values
    groups = [str(group) for group in finding["group"].values]
    shown = ax.imshow(
        values, cmap=DIVERGE, norm=symmetric(scale=float(np.nanmax(np.abs(values)))), aspect="auto"
    )
    rows, columns = np.nonzero(finding["verdict"].transpose("layer", "group").values == UNTOLD)
    ax.plot(columns, rows, ".", color=MUTED, markersize=2.5)
    tidy(ax, x="group", title=heading(finding))
    every = -(-len(groups) // 20)
    words = labels(groups, 10)[::every]
    ax.set_xticks(range(0, len(groups), every), words)
    # in points, before the layout
    column = ax.get_window_extent().width / ax.figure.dpi * 72 / len(groups) * every
    if max(map(len, words)) * 0.62 * SMALL > column:
        ax.tick_params(axis="x", labelrotation=90)
    rows_of_names(ax, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    ax.spines["bottom"].set_visible(False)
    colour_bar(
        shown, ax, label.replace(" (", "\n(").replace(" over training", "").replace(" per", "\nper")
    )
