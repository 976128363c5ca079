"""Show single examples by layer, their stories over training, and how strongly they pull against
each other.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.models import FixedTicker, Range1d

from ...findings.examples import fates, heat_rows, interference_over, one_story, story_name
from ...findings.names import fitting
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, View, clean, count
from ..downsample import Json, lines, over_segments, over_steps, picture, thinned
from ..figures import INK, add_level, add_lines, add_many, add_picture, plain_figure, steps_figure
from ..panels import Panel, Room
from .layers import largest

_LAYERS = 24  # rows of the picture
_DRAWN = 6  # lines
_LETTERS = 22  # characters of a name beside an axis
_FRAMES = 200  # stretches over which interference is drawn
_TEXT = 200  # characters of an example's text


def section() -> Section:
    """Return three figures: examples by layer, the story of one, and interference."""
    heat = plain_figure("most helped first", "", 300, x_range=Range1d(0, 1), y_range=Range1d(0, 1))
    heat.yaxis.ticker = FixedTicker(ticks=[])
    heat.xaxis.ticker.min_interval = 1
    heat.ygrid.grid_line_color = None
    add_picture(
        heat, "examples", [("place", "$x{0}"), ("Σ allocation over training", "@image{%+.3e}")]
    )
    story = steps_figure("change since the start (units of loss)", 320)
    add_level(story, 0)
    tip = [("layer", "@name"), ("step", "$snap_x{0}"), ("Σ so far", "$snap_y{%.5g}")]
    add_many(story, "story layers", tip)
    add_lines(
        story,
        "story loss",
        INK,
        width=2.5,
        tip=[("its loss", "changed"), ("step", "@x{0}"), ("since the start", "@y{%.5g}")],
    )
    pull = steps_figure("interference", 240, y_range=Range1d(0, 1))
    add_many(
        pull,
        "interference",
        [("layer", "@name"), ("step", "$snap_x{0}"), ("interference", "$snap_y{%.3f}")],
        width=1.25,
    )
    return Section(
        name="examples",
        title="Examples",
        reading="The loss is a mean over examples, and so is every allocation. This section shows each "
        "layer's effect on each of them. An example is forgotten when its loss, after a fall, rises "
        "again by more than half of the way. Interference is the share of a layer's effects on "
        "examples that cancels in their mean: at 0 it helps all or hurts all, at 1 its help for "
        "some costs others as much.",
        figures={"examples": heat, "story": story, "interference": pull},
        legends={"examples": [("helping", "helped"), ("hurting", "hurt")]},
        headings={
            "examples": "Effect of each layer on each example or element",
            "story": "One example over training: its loss (thick) and the cumulative sum of each layer",
            "interference": "Interference of each layer",
        },
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the picture of the examples, the stories of extremes, and the interference.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("examples")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    size = finding["absolute"].sum("step").values
    names = [clean(name, 60) for name in finding["layer"].values]
    drawn = largest(size, _DRAWN)
    if len(drawn) < len(names):
        notes.append(
            f"Lines show the {len(drawn)} of {len(names):,} layers with the largest effects."
        )
    views: dict[str, dict[str, View]] = {
        "examples": {"|": _heat(finding, names, largest(size, _LAYERS), room, notes)},
        "interference": {"|": _interference(finding, names, drawn)},
        "story": _stories(finding, names, drawn, room),
    }
    return Block(
        captions={"examples": fates(finding), "interference": _pull(finding, names, drawn)},
        views={name: of for name, of in views.items() if of},
        choice="Example",
        choices=[_choice(finding, story) for story in range(finding.sizes["story"])],
        tables=[_extremes(finding), _layers(finding, names, largest(size, MOST_ROWS), notes)],
        notes=notes,
    )


def _heat(
    finding: xr.Dataset, names: list[str], shown: list[int], room: Room, notes: list[str]
) -> View:
    """Return the picture, a row for each layer."""
    if len(shown) < len(names):
        notes.append(
            f"The picture has the {len(shown)} of {len(names):,} layers with the largest effects."
        )
    most = max(8, min(1000, room.pixels(0.2) // max(1, len(shown))))
    values, together = heat_rows(finding, most)
    if together > 1:
        notes.append(f"Each column of the picture is the mean of {together:,} examples.")
    rows, columns = values[:, shown].T, float(len(values) * together)
    return {
        "examples": {
            "image": picture(rows),
            "x": [0.0],
            "y": [-0.5],
            "dw": [columns],
            "dh": [float(len(shown))],
        },
        "@ticks": {"y": fitting([names[layer] for layer in shown], [_LETTERS] * len(shown))},
        "@range": {"x": [0.0, columns]},
    }


def _stories(
    finding: xr.Dataset, names: list[str], drawn: list[int], room: Room
) -> dict[str, View]:
    """Return the lines of every story."""
    views: dict[str, View] = {}
    most = room.points(finding.sizes["story"] * (len(drawn) + 1), 0.4)
    for place in range(finding.sizes["story"]):
        one = one_story(finding, place)
        series = np.concatenate([one["allocated"].values[:, drawn].T, one["change"].values[None]])
        before = np.concatenate([np.zeros((len(series), 1)), series[:, :-1]], axis=1)
        x, ys = over_steps(one["step"].values, one["step_end"].values, before, series)
        xs, packed = lines(x, ys[:-1], most)
        layers: dict[str, Json] = {
            "xs": xs,
            "ys": packed,
            "name": [names[layer] for layer in drawn],
            "colour": "@palette",
        }
        views[f"|{place}"] = {
            "story layers": layers,
            "story loss": thinned(x, ys[-1], most),
        }
    return views


def _interference(finding: xr.Dataset, names: list[str], drawn: list[int]) -> View:
    over = interference_over(finding, _FRAMES)
    x, ys = over_segments(
        over["step"].values, over["interference"].values[:, drawn].T, over["step_end"].values
    )
    xs, packed = lines(x, ys)
    return {
        "interference": {
            "xs": xs,
            "ys": packed,
            "name": [names[layer] for layer in drawn],
            "colour": "@palette",
        }
    }


def _pull(finding: xr.Dataset, names: list[str], drawn: list[int]) -> str:
    """Return the mean interference of the layers that are drawn."""
    means = finding["interference_mean"].values
    parts = [f"{names[layer]} {means[layer]:.2f}" for layer in drawn if np.isfinite(means[layer])]
    return f"Mean of all segments: {', '.join(parts)}." if parts else ""


def _words(finding: xr.Dataset, story: int, most: int) -> str:
    """Return an example's text; "" if the run has none."""
    one = finding.isel(story=story)
    return clean(one["story_text"].item(), most) if "story_text" in one.coords else ""


def _choice(finding: xr.Dataset, story: int) -> str:
    one, words = finding.isel(story=story), _words(finding, story, 40)
    return f"{story_name(finding, story)} ({one['story_kind'].item()})" + (
        f" · {words}" if words else ""
    )


def _extremes(finding: xr.Dataset) -> Table:
    """Return the most forgotten, hurt and helped examples."""
    grouped, worded = "story_group" in finding.coords, "story_text" in finding.coords
    rows: list[list[Cell]] = []
    for story in range(finding.sizes["story"]):
        one = finding.isel(story=story)
        rows.append(
            [
                story_name(finding, story),
                str(one["story_kind"].item()),
                float(one["story_change"]),
                float(one["story_forgotten"]),
                clean(one["story_layer"].item(), 60),
                *([clean(one["story_group"].item(), 60)] if grouped else []),
                *([_words(finding, story, _TEXT)] if worded else []),
            ]
        )
    columns = [
        Column(str(finding.attrs["per"]), "name"),
        Column("why", "text"),
        Column("change", "bar"),
        Column("forgotten", "plain"),
        Column("mostly by", "text"),
        *([Column("group", "text")] if grouped else []),
        *([Column("it is", "text")] if worded else []),
    ]
    return Table(
        title="Most forgotten, most hurt, most helped",
        columns=columns,
        rows=rows,
        note="Forgotten is the final loss minus the lowest, in units of loss; the most "
        "forgotten are chosen among examples that are forgotten at the end. Mostly by names the layer "
        "with the largest part of the change, for forgotten ones since the loss was lowest.",
        open=True,
    )


def _layers(finding: xr.Dataset, names: list[str], shown: list[int], notes: list[str]) -> Table:
    """Return the table of layers."""
    if len(shown) < len(names):
        notes.append(
            f"{count(len(names) - len(shown), 'layer')} with smaller effects are not listed."
        )
    columns = ("total", "error", "verdict", "interference_mean", "interference_total")
    counts = ("helped_most", "hurt_most", "forgot_most")
    rows: list[list[Cell]] = [
        [
            names[layer],
            *(finding[name].values.tolist()[layer] for name in columns),
            *(int(finding[name].values[layer]) for name in counts),
        ]
        for layer in shown
    ]
    return Table(
        title="Layers over examples",
        columns=[
            Column("layer", "name"),
            Column("Σ allocation, mean", "bar"),
            Column("±", "plain"),
            Column("verdict", "text"),
            Column("interference, a segment", "plain"),
            Column("over training", "plain"),
            Column("helped most", "count"),
            Column("hurt most", "count"),
            Column("forgot most", "count"),
        ],
        rows=rows,
        note="The last three columns count examples: those that the layer helped or hurt most of all layers, "
        "and forgotten ones whose loss it raised most since it was lowest.",
    )
