"""Draw examples by layers, one example's story over training, and how strongly examples pull
against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.ticker import MaxNLocator

from ..base.colours import FAINT, INK
from ..base.text import safe_in_figure
from ..findings.common import Numbers
from ..findings.errors import untold_sentence
from ..findings.examples import (
    fates,
    heat_rows,
    interference_over,
    one_story,
    stories_to_show,
    story_name,
)
from .style import (
    DIVERGE,
    colour,
    colour_bar,
    end_labels,
    expect,
    fresh_figure,
    heading,
    labels,
    note,
    over_gaps,
    powers,
    strongest,
    symmetric,
    tidy,
    zero_line,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 400  # rows of the picture; thinner ones are invisible
_COLUMNS = 40
_FRAMES = 100  # stretches of the interference, which is noisy from segment to segment
_LINES = 6
_TEXT = 60  # characters of an example's text


def examples(found: xr.Dataset, *, figure: Figure | None = None) -> Figure:
    """Draw the layers' contributions to each example, the story of one, and the interference of
    layers.

    The stories are those of the named examples, else that of the most forgotten one.

    Args:
        found: of `findings.examples`; for other stories `findings.examples(…, named=[12, 7])`.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.
    """
    expect(found, "examples")
    untold = untold_sentence(found)
    positions = stories_to_show(found)
    rows = max(1, len(positions)) + 1
    figure = fresh_figure(figure, 8.6, 0.1 + 2.4 * rows + (0.3 if untold else 0.0))
    panels = figure.add_gridspec(rows, 2, width_ratios=(1, 1.25))
    sizes = found["absolute"].sum("step").values
    strong, _ = strongest(found, "layer", sizes, _LINES)
    rest = _heat(figure.add_subplot(panels[:, 0]), found, sizes)
    if not positions:
        story = figure.add_subplot(panels[0, 1])
        tidy(story, x="training step", title=f"no {found.attrs['per']} changed")
    for row, position in enumerate(positions):
        _story(figure.add_subplot(panels[row, 1]), found, strong, position)
    _interference(figure.add_subplot(panels[-1, 1]), found, strong)
    note(figure, found, fates(found), rest, untold)
    return figure


def _heat(ax: Axes, finding: xr.Dataset, sizes: Numbers) -> str:
    """Draw the rows of examples, and return a sentence on the layers not shown."""
    shown, rest = strongest(finding, "layer", sizes, _COLUMNS)
    values, together = heat_rows(shown, _ROWS)
    names = [str(name) for name in shown["layer"].values]
    edges = np.arange(len(values) + 1) * together
    picture = ax.pcolormesh(
        np.arange(len(names) + 1) - 0.5,
        np.minimum(edges, (finding["weight"].values > 0).sum()),
        values,
        cmap=DIVERGE,
        norm=symmetric(values),
        rasterized=True,
    )
    per = str(finding.attrs["per"])
    of = f"{per}s" if together == 1 else f"{per}s, means of {together:,}"
    tidy(ax, y=f"{of}, most helped first", title=heading(finding), frame=True)
    ax.set_ylim(edges[-1] if len(values) else 1, 0)
    ax.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    every = -(-len(names) // 20)
    ax.set_xticks(range(0, len(names), every), labels(names, 16)[::every], rotation=90)
    ax.tick_params(axis="x", length=0)
    colour_bar(picture, ax, "Σ allocation over training\n(units of loss)")
    return rest.replace("Not shown", "Layers not shown")


def _story(ax: Axes, finding: xr.Dataset, strong: xr.Dataset, position: int) -> None:
    """Draw the change of an example's loss, and the cumulative sum of each layer."""
    lines = one_story(finding, position)
    zero_line(ax)
    names = [str(name) for name in strong["layer"].values]
    start = np.zeros(lines.sizes["step"])
    for name in finding["layer"].values:
        values = lines["allocated"].sel(layer=name).values
        begin = np.append(start[:1], values[:-1])
        which = names.index(str(name)) if str(name) in names else None
        ax.plot(
            *over_gaps(lines, values, begin),
            color=FAINT if which is None else colour(which),
            linewidth=0.7 if which is None else 1.2,
            zorder=1.5 if which is None else 2,
        )
    change = lines["change"].values
    ax.plot(*over_gaps(lines, change, np.append(start[:1], change[:-1])), color=INK, linewidth=1.8)
    one = finding.isel(story=position)
    title = f"{finding.attrs['per']} {story_name(finding, position)}"
    if "story_group" in one.coords:
        title += f", group {safe_in_figure(str(one['story_group'].item()))}"
    kind, (layer,) = str(one["story_kind"].item()), labels([one["story_layer"].item()], 22)
    if kind == "named":
        kind = "forgotten" if one["story_fate"].item() == "forgotten" else ""
    what = f"{change[-1]:+.3g}"
    if kind in ("forgotten", "most forgotten"):
        what = f"{float(one['story_forgotten']):.3g} above its lowest"
    title += f": {f'{kind}, ' if kind else ''}{what}, mostly by {layer}"
    if "story_text" in one.coords and str(one["story_text"].item()):
        title += f"\n{safe_in_figure(_start(str(one['story_text'].item())))}"
    tidy(ax, x="training step", y="change since the start\n(units of loss)", title=title)
    ax.margins(x=0.01)
    powers(ax, "y")
    heights = [*lines["allocated"].sel(layer=names).values[-1], change[-1]]
    end_labels(
        ax,
        heights,
        [*labels(names, 18), "its loss"],
        [*(colour(which) for which in range(len(names))), INK],
    )


def _start(text: str) -> str:
    """Return the beginning of an example's text."""
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"


def _interference(ax: Axes, finding: xr.Dataset, strong: xr.Dataset) -> None:
    """Draw the interference of the strong layers over training."""
    names = [str(name) for name in strong["layer"].values]
    over = interference_over(finding, _FRAMES)
    for which, name in enumerate(names):
        values = over["interference"].sel(layer=name).values
        ax.plot(*over_gaps(over, values), color=colour(which), linewidth=1.0)
    tidy(
        ax,
        x="training step",
        y="interference",
        title=f"interference between {finding.attrs['per']}s; at the right, its mean over segments",
    )
    ax.set_ylim(0, 1)
    ax.margins(x=0.01)
    means = strong["interference_mean"].values
    words = [f"{name}  {mean:.2f}" for name, mean in zip(labels(names, 18), means, strict=True)]
    last = np.nan_to_num(over["interference"].sel(layer=names).values[-1])
    end_labels(ax, last, words, [colour(which) for which in range(len(names))])
