"""Provide helpers for all plots: new axes, safe names, thin spines, labels at the ends of lines,
one diverging scale.

Nothing here changes rcParams; pyplot is imported only to make a default figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..base.colours import DIVERGING, FAINT, HELPING, HURTING, INK, LAYERS, MUTED
from ..base.text import count, safe_in_figure
from ..errors import InputError
from ..findings.common import Numbers
from ..findings.names import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.typing import LineStyleType
    from numpy.typing import ArrayLike

SMALL = 7.5  # points, at the size of print
DIVERGE = LinearSegmentedColormap.from_list("helping-hurting", DIVERGING, N=257).with_extremes(
    bad=FAINT
)
PALE = 0.35  # opacity of a bar within its error
_MORE = 8  # extra characters that allow a cut on one side alone
_DASHES: tuple[LineStyleType, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))


# --- figures and axes -----------------------------------------------------------------------------


def fresh_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the axes of a new pyplot figure.

    Args:
        ax: given by the caller; None for a new figure.
        width: of a new figure, in inches.
        height: of a new figure, in inches.
    """
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def fresh_figure(figure: Figure | None, width: float, height: float) -> Figure:
    """Return `figure`, or a new pyplot figure.

    Args:
        figure: given by the caller; None for a new one.
        width: of a new figure, in inches.
        height: of a new figure, in inches.
    """
    if figure is not None:
        return figure
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def tidy(ax: Axes, *, x: str = "", y: str = "", title: str = "", frame: bool = False) -> None:
    """Set thin spines on two sides, small ticks and labels, and a title on the left.

    Args:
        ax: to style.
        x: label of the x axis.
        y: label of the y axis.
        title: above the axes.
        frame: draws spines on all sides.
    """
    for side, spine in ax.spines.items():
        spine.set_linewidth(0.6)
        spine.set_color(INK)
        spine.set_visible(frame or side in ("left", "bottom"))
    ax.tick_params(width=0.6, length=2.5, labelsize=SMALL, color=INK, labelcolor=INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_offset_text().set_fontsize(SMALL - 0.5)
    ax.set_xlabel(x, fontsize=SMALL + 0.5, color=INK)
    ax.set_ylabel(y, fontsize=SMALL + 0.5, color=INK)
    if x == "training step":
        ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    if title:
        ax.set_title(title, loc="left", fontsize=SMALL + 0.5, color=INK)


def rows_of_names(ax: Axes, names: Sequence[str], *, most: int = 60, letters: int = 26) -> None:
    """Name the rows of the y axis, the first at the top.

    Args:
        ax: whose y axis has one unit per row.
        names: of the rows.
        most: names to draw; with more rows, every second, third, … is named.
        letters: the most characters of a name.
    """
    every = -(-len(names) // most)
    shown = labels(names, letters)
    ax.set_yticks(range(0, len(names), every), shown[::every])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def powers(ax: Axes, axis: Literal["x", "y"], *, most: int = 5) -> None:
    """Set few ticks, and move the power of ten of long numbers into the label's brackets, or to the
    axis's end without label.

    Call it after setting limits and label.

    Args:
        ax: to style.
        axis: "x" or "y".
        most: the most ticks.
    """
    ax.locator_params(axis=axis, nbins=most)
    of, limits = (ax.xaxis, ax.get_xlim()) if axis == "x" else (ax.yaxis, ax.get_ylim())
    power = _power(max(map(abs, limits)))
    label = of.get_label_text()
    if not power or "(" not in label:
        ax.ticklabel_format(axis=axis, style="sci", scilimits=(-3, 4), useMathText=True)
        return
    of.set_label_text(label.replace("(", f"($10^{{{power}}}$ ", 1))
    of.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 10**power:.4g}".replace("-", "\u2212"))
    )


def strongest(finding: xr.Dataset, dim: str, sizes: ArrayLike, top: int) -> tuple[xr.Dataset, str]:
    """Return the `top` largest along `dim`, in their order, and a sentence about the others; ""
    where there are none.

    Args:
        finding: to select from.
        dim: the axis, such as "layer".
        sizes: along `dim`, whose magnitudes are compared.
        top: how many to keep.

    Raises:
        InputError: for a `top` below one.
    """
    if top < 1:
        raise InputError(f"top is how many to show, 1 or more, got {top}.")
    magnitudes = np.nan_to_num(np.abs(np.asarray(sizes, dtype=float)))
    order = np.argsort(-magnitudes, kind="stable")
    rest = order[top:]
    if not len(rest):
        return finding, ""
    rest_text = f"Not shown: {len(rest):,} more, " + (
        f"each {float(magnitudes[rest].max()):.2g} at most."
        if magnitudes[rest].any()
        else "all of zero."
    )
    return finding.isel({dim: np.sort(order[:top])}), rest_text


def bars_of(ax: Axes, values: Numbers, untold: Numbers | None = None) -> None:
    """Draw a bar for each sum, in the colour of helping or hurting.

    Args:
        ax: where to draw.
        values: the sums.
        untold: which of them cannot be told from zero; these are pale.
    """
    pale = np.zeros(len(values), bool) if untold is None else untold
    ax.barh(
        range(len(values)),
        values,
        height=0.72,
        color=[
            (HELPING if value < 0 else HURTING, PALE if is_pale else 1.0)
            for value, is_pale in zip(values, pale, strict=True)
        ],
    )


def error_lines(ax: Axes, values: Numbers, errors: Numbers) -> None:
    """Draw a line over each bar that spans the error of its sum.

    Args:
        ax: with the bars.
        values: the sums.
        errors: of the sums.
    """
    rows = np.arange(len(values))
    ax.hlines(rows, values - errors, values + errors, INK, linewidth=1.0, zorder=3)


def zero_line(ax: Axes, *, vertical: bool = False) -> None:
    """Draw the line at zero, between helping and hurting.

    Args:
        ax: where to draw.
        vertical: draws at x = 0 in place of y = 0.
    """
    (ax.axvline if vertical else ax.axhline)(0, color=MUTED, linewidth=0.6, zorder=1)


def note(figure: FigureBase, finding: xr.Dataset, *more: str) -> None:
    """Write at the foot what a finding leaves out, the statistics of normalisation layers, and
    `more`; each line once.

    Args:
        figure: where to write.
        finding: that is drawn.
        more: further lines.
    """
    old = getattr(figure, "_supxlabel", None)
    lines = [line for line in (old.get_text() if old else "").split("\n") if line]
    mode = finding.attrs.get("norm_stats")
    more = (*more, f"Normalisation layers: {mode} statistics.") if mode else more
    lines += [
        line
        for text in (*more, str(finding.attrs.get("left_out", "")))
        if (line := safe_in_figure(text)) and line not in lines
    ]
    if lines:
        figure.supxlabel(
            "\n".join(lines), fontsize=SMALL - 0.5, color=MUTED, x=0.01, ha="left", wrap=True
        )


def word(
    ax: Axes, x: float, y: float, text: str, hue: str = INK, size: float = SMALL, **place: Any
) -> None:
    """Write small text.

    Args:
        ax: where to write.
        x: share of the axes' width, or a coordinate of `transform`.
        y: share of the axes' height, or a coordinate of `transform`.
        text: to write.
        hue: its colour.
        size: in points.
        place: options of `Axes.text`.
    """
    ax.text(x, y, text, color=hue, fontsize=size, **({"transform": ax.transAxes} | place))


def key(ax: Axes, where: str = "lower left", **place: Any) -> None:
    """Draw a legend without a frame.

    Args:
        ax: where to draw.
        where: a location inside the axes; by default above them.
        place: options of `Axes.legend`.
    """
    above = (
        {"bbox_to_anchor": (float(where.endswith("right")), 1)} if where.startswith("lower") else {}
    )
    tight: dict[str, Any] = {
        "frameon": False,
        "fontsize": SMALL,
        "borderpad": 0.2,
        "handletextpad": 0.4,
        "columnspacing": 1.2,
    }
    ax.legend(**(tight | above | {"loc": where} | place))


# --- words ----------------------------------------------------------------------------------------


def labels(names: Sequence[Any], most: int = 26) -> list[str]:
    """Return names to draw: short, distinct, without markup.

    >>> labels(["fc1", "_fc$"])
    ['fc1', '\\u200b_fc\\\\$']

    Args:
        names: of layers, tensors or groups.
        most: characters of a name.
    """
    return [safe_in_figure(name) for name in shorten([str(name) for name in names], most)]


def parameter_labels(names: Sequence[str], most: int = 38) -> list[str]:
    """Return names of parameters to draw: the index stays whole, a long tensor name is shortened in
    the middle.

    If that makes names equal, only their ends stay.

    >>> parameter_labels(["blocks.3_2.conv2.weight[6, 2]", "blocks.3_1.conv2.weight[6, 2]", "fc.bias[0]"], 20)
    ['…3_2.conv2.weight[6, 2]', '…3_1.conv2.weight[6, 2]', 'fc.bias[0]']

    Args:
        names: such as "fc1.weight[3, 17]".
        most: characters of a name.
    """
    split = [str(name).partition("[") for name in names]
    tensors = {tensor for tensor, *_ in split}
    index = max((len(mark + rest) for _, mark, rest in split), default=0)
    longest = max(map(len, tensors), default=0)
    room = max(8, most - index)
    middle = shorten(list(tensors), room)
    if max(map(len, middle), default=0) <= room:
        short = dict(zip(tensors, middle, strict=True))
        return [safe_in_figure(f"{short[tensor]}{mark}{rest}") for tensor, mark, rest in split]
    for width in range(room, min(longest, room + _MORE)):
        short = {name: name if len(name) <= width else _end(name, width) for name in tensors}
        if len(set(short.values())) == len(tensors):
            break
    else:  # they differ in the middle
        short = dict(zip(tensors, middle, strict=True))
    return [safe_in_figure(f"{short[tensor]}{mark}{rest}") for tensor, mark, rest in split]


def _end(name: str, most: int) -> str:
    """Return the end of a dotted name, from the start of a part if at least two parts fit."""
    tail = name[len(name) - most + 1 :]
    parts = tail.partition(".")[2]
    return f"…{parts if '.' in parts else tail}"


def heading(finding: xr.Dataset) -> str:
    """Return the loss of a finding, with its group if one was picked."""
    loss = safe_in_figure(str(finding.attrs.get("loss", "")))
    if "group" in finding.coords and "group" not in finding.dims:
        return f"{loss}, group {safe_in_figure(str(finding['group'].item()))}"
    if finding.attrs.get("group", "") != "":
        return f"{loss}, group {safe_in_figure(str(finding.attrs['group']))}"
    return loss


def expect(result: xr.Dataset, finding: str) -> None:
    """Reject anything but the finding that a plot draws.

    Args:
        result: the caller's argument.
        finding: the name of the finding that the plot draws.

    Raises:
        InputError: if `result` is another finding, or none.
    """
    name = getattr(result, "attrs", {}).get("finding")
    if name != finding:
        what = f"a result of findings.{name}" if name else "no result of a finding"
        raise InputError(f"this is {what}; plots.{finding} draws a result of findings.{finding}.")


def refuse_groups(finding: xr.Dataset) -> None:
    """Reject a finding with an axis of groups in a plot that shows one loss.

    Raises:
        InputError: if there are groups and none was picked.
    """
    if "group" in finding.dims:
        labels = ", ".join(map(repr, finding["group"].values.tolist()[:10]))
        raise InputError(
            f"loss {finding.attrs.get('loss')!r} has {count(finding.sizes['group'], 'group')}, and "
            f"a plot of {finding.attrs.get('finding')!r} shows one. Pick one: found.sel(group=…) "
            f"or --group, of {labels}{', …' if finding.sizes['group'] > 10 else ''}."
        )


# --- colours and scales ---------------------------------------------------------------------------


def colour(position: int) -> str:
    """Return the colour of the layer, group or run at a position."""
    return LAYERS[position % len(LAYERS)]


def palette(count: int) -> list[str]:
    """Return the colours of `count` lines: those of layers, or for more lines, steps along the
    spectrum.
    """
    if count <= len(LAYERS):
        return list(LAYERS[:count])
    from matplotlib import colormaps

    spectrum = 0.88 * colormaps["turbo"](np.linspace(0.03, 0.97, count))[:, :3]
    return [to_hex((float(red), float(green), float(blue))) for red, green, blue in spectrum]


def dashes(position: int, count: int = 0) -> LineStyleType:
    """Return the line style of the layer, group or run at a position; where colours repeat, the
    style differs.

    Args:
        position: of the line.
        count: of a palette with more colours than layers have; neighbours along its spectrum get
            different styles.
    """
    if count:
        return _DASHES[position % 3] if count > len(LAYERS) else "-"
    return _DASHES[position // len(LAYERS) % len(_DASHES)]


def symmetric(*values: ArrayLike, scale: float | None = None) -> Normalize:
    """Return limits at equal distance from zero.

    Args:
        values: arrays of any shapes that the limits are for.
        scale: the distance; by default the 99.5 % quantile of |values|, which ignores extremes.
    """
    if scale is None:
        sizes = np.abs(np.concatenate([np.ravel(array) for array in values]))
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        scale = float(np.quantile(sizes, 0.995)) if sizes.size else 0.0
    scale = scale or 1.0
    return Normalize(-scale, scale)


def share_colours(axes: Sequence[Axes]) -> None:
    """Give the pictures of several axes one scale, the widest of them."""
    shown = [
        picture
        for ax in axes
        for picture in (*ax.images, *ax.collections)
        if picture.get_array() is not None
    ]
    widest = max(
        (high for picture in shown if (high := picture.get_clim()[1]) is not None), default=0.0
    )
    for picture in shown:
        picture.set_clim(-widest, widest)


def colour_bar(
    shown: ScalarMappable,
    axes: Axes,
    label: str,
    *,
    below: bool = False,
    into: Axes | None = None,
    ends: tuple[str, str] = ("helped", "hurt"),
    ticks: Callable[[float], str] | None = None,
) -> None:
    """Draw a thin colour bar with its ends labelled; its label takes the power of ten of long
    numbers.

    Args:
        shown: what the colours stand for.
        axes: beside which to draw.
        label: of the bar.
        below: draws it below in place of beside.
        into: axes that become the bar; None to make them.
        ends: words at the low and the high end.
        ticks: formats a value.
    """
    figure = axes.figure
    tall = axes.get_window_extent().height / figure.dpi  # in inches, before the layout
    place: dict[str, Any] = (
        {"orientation": "horizontal", "aspect": 50, "shrink": 0.6}
        if below
        else {"aspect": max(24, 10 * tall), "pad": 0.02}
    )
    if into is not None:
        place = {"cax": into, "orientation": "horizontal" if below else "vertical"}
    bar = figure.colorbar(shown, ax=None if into else axes, extend="both", **place)
    bar.outline.set_linewidth(0.4)
    bar.locator = MaxNLocator(4, symmetric=True)
    power = 0 if ticks else _power(float(np.max(shown.norm.vmax or 1)))
    write = ticks or (lambda value: f"{value / 10**power:.3g}".replace("-", "\u2212"))
    bar.formatter = FuncFormatter(lambda value, _: write(value))
    bar.ax.tick_params(width=0.6, length=2, labelsize=SMALL - 0.5)
    bar.update_ticks()
    bar.set_label(
        label.replace("(", f"($10^{{{power}}}$ ") if power else label, fontsize=SMALL, color=INK
    )
    for word, hue, away in zip(ends, (HELPING, HURTING), (-1, 1), strict=True):
        where = (0.5 + 0.57 * away, 0.5) if below else (0.5, 0.5 + 0.56 * away)
        ha, va = (
            ("right" if away < 0 else "left", "center")
            if below
            else ("center", "top" if away < 0 else "bottom")
        )
        bar.ax.text(
            *where, word, color=hue, fontsize=SMALL, ha=ha, va=va, transform=bar.ax.transAxes
        )


def _power(scale: float) -> int:
    """Return the power of ten that moves into a label; 0 where numbers are short without it."""
    power = int(np.floor(np.log10(scale))) if scale > 0 else 0
    return power if not -2 <= power <= 3 else 0


# --- time -----------------------------------------------------------------------------------------


def pieces(finding: xr.Dataset) -> list[slice]:
    """Return the stretches of consecutive segments: an unfinished run has gaps, which no line
    crosses.
    """
    start, end = finding["step"].values, finding["step_end"].values
    cuts = [0, *(np.flatnonzero(start[1:] != end[:-1]) + 1), len(start)]
    return [slice(int(a), int(b)) for a, b in pairwise(cuts)]


def over_gaps(
    finding: xr.Dataset,
    values: ArrayLike,
    start: ArrayLike | None = None,
    coordinate: str = "step_end",
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return x, the ends of segments, and y, the values, with NaN between stretches to break lines.

    Args:
        finding: with the segments.
        values: at the ends of segments.
        start: values at the starts of segments; each stretch's line then starts there.
        coordinate: of the ends.
    """
    x: list[ArrayLike] = []
    y: list[ArrayLike] = []
    for piece in pieces(finding):
        x += [finding[coordinate].values[piece].astype(float), [np.nan]]
        y += [np.asarray(values, dtype=float)[piece], [np.nan]]
        if start is not None:
            x[-2:-2], y[-2:-2] = (
                [finding["step"].values[piece][:1]],
                [np.asarray(start, dtype=float)[piece][:1]],
            )
    return np.concatenate(x)[:-1], np.concatenate(y)[:-1]


def time_edges(
    finding: xr.Dataset, values: ArrayLike
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the edges over time and the columns between them; a gap is a column of NaN.

    Args:
        finding: with the segments.
        values: (…, step).
    """
    start, end = finding["step"].values.astype(float), finding["step_end"].values.astype(float)
    gaps = np.array([piece.start for piece in pieces(finding)[1:]], dtype=int)
    edges = np.append(start, end[-1:])
    return np.insert(edges, gaps, end[gaps - 1]), np.insert(
        np.asarray(values, dtype=float), gaps, np.nan, axis=-1
    )


def heat(ax: Axes, finding: xr.Dataset, values: ArrayLike, norm: Normalize) -> QuadMesh:
    """Draw one row of pixels per row of values, from the top, over training steps.

    Args:
        ax: where to draw.
        finding: with the segments.
        values: (row, step).
        norm: of the colours.
    """
    x, columns = time_edges(finding, values)
    shown = ax.pcolormesh(
        x, np.arange(len(columns) + 1) - 0.5, columns, cmap=DIVERGE, norm=norm, rasterized=True
    )
    ax.set_ylim(len(columns) - 0.5, -0.5)
    return shown


# --- labels at the ends of lines ------------------------------------------------------------------


def end_labels(
    ax: Axes,
    heights: ArrayLike,
    words: Sequence[str],
    colours: Sequence[str],
    styles: Sequence[LineStyleType] | None = None,
) -> None:
    """Write words beside the right ends of lines, moved apart until none overlap; call it after
    setting the limits.

    Args:
        ax: with the lines.
        heights: of their ends, in data coordinates.
        words: for each line.
        colours: of the words.
        styles: of the lines; if any is dashed, a piece of the line stands before each word.
    """
    low, high = ax.get_ylim()
    tall = ax.get_window_extent().height / ax.figure.dpi * 72
    gap = 1.25 * SMALL / max(tall, 1)
    shares = (np.asarray(heights, dtype=float) - low) / ((high - low) or 1)
    dashed = styles if styles and any(style != "-" for style in styles) else None
    for which, (word, hue, place) in enumerate(
        zip(words, colours, spread(shares, gap), strict=True)
    ):
        if dashed:
            piece: dict[str, Any] = {
                "transform": ax.transAxes,
                "clip_on": False,
                "scalex": False,
                "scaley": False,
            }
            ax.plot(
                (1.015, 1.085),
                (place, place),
                color=hue,
                linestyle=dashed[which],
                linewidth=1.2,
                **piece,
            )
        beside = 1.1 if dashed else 1.015
        ax.text(
            beside,
            place,
            word,
            color=hue,
            fontsize=SMALL,
            va="center",
            transform=ax.transAxes,
            clip_on=False,
        )


def spread(targets: ArrayLike, gap: float) -> list[float]:
    """Return positions nearest to `targets` with `gap` between neighbours, within 0 and 1 if they
    fit.

    >>> spread([0.5, 0.5, 0.9], 0.1), spread([0.0, 0.0], 0.1)
    ([0.45, 0.55, 0.9], [0.0, 0.1])

    Args:
        targets: wanted positions.
        gap: the least distance of neighbours.
    """
    order = np.argsort(targets, kind="stable")
    blocks: list[tuple[float, int]] = []  # centre and members; touching neighbours move as one
    for place in np.nan_to_num(np.asarray(targets, dtype=float)[order], nan=0.5):
        blocks.append((_inside(float(place), 1, gap), 1))
        while (
            len(blocks) > 1
            and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2 - 1e-9
        ):
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append((_inside((a * n + b * m) / (n + m), n + m, gap), n + m))
    places = [
        centre + gap * (member - (count - 1) / 2)
        for centre, count in blocks
        for member in range(count)
    ]
    result = [0.0] * len(places)
    for position, place in zip(order, places, strict=True):
        result[int(position)] = round(place, 6)
    return result


def _inside(centre: float, members: int, gap: float) -> float:
    half = gap * (members - 1) / 2
    return min(max(centre, half), 1 - half) if half < 0.5 else 0.5
