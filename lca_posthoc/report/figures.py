"""Make Bokeh figures without data or colours: the page's script fills them in and paints them for
day and night.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    GlyphRenderer,
    HoverTool,
    LinearColorMapper,
    Range1d,
    Span,
)
from bokeh.plotting import figure

from ..base.colours import HELPING, HURTING, NEUTRAL

INK, MUTED, ACCENT = "ink", "muted", "accent"  # tags that the script replaces by colours
_BLUE = "#3b7dd8"
_GREY = "#8a8f98"


def steps_figure(
    y: str, height: int = 300, x: str = "training step", percent: bool = False, **options: Any
) -> figure:
    """Return a figure over training steps; all of them zoom together.

    Args:
        y: label of the y axis.
        height: in pixels.
        x: label of the x axis.
        percent: writes y as percentages.
        options: of `bokeh.plotting.figure`.
    """
    chart = plain_figure(x, y, height, x_range=Range1d(0, 1), **options)
    chart.tags = ["steps", *(["percent"] if percent else [])]
    chart.window_axis = "x"
    chart.xaxis.ticker.min_interval = 1
    return chart


def plain_figure(x: str, y: str, height: int = 300, **options: Any) -> figure:
    """Return a quiet figure: without outline, and with tools hidden until the pointer enters.

    Args:
        x: label of the x axis.
        y: label of the y axis.
        height: in pixels.
        options: of `bokeh.plotting.figure`.
    """
    chart = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag=None,
        active_scroll=None,
        toolbar_location="above",
        x_axis_label=x,
        y_axis_label=y,
        min_border_left=80,
        output_backend="canvas",
        **options,
    )
    chart.toolbar.logo = None
    chart.toolbar.autohide = True
    # never painted white first, which would leave traces at the canvas's edge
    chart.outline_line_color = chart.background_fill_color = chart.border_fill_color = None
    chart.xgrid.grid_line_color = None
    for axis in (chart.xaxis, chart.yaxis):
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "12px"
        axis.major_label_text_font_size = "12px"
        axis.minor_tick_line_color = None
        axis.major_tick_in = 0
    return chart


def source(name: str, columns: Sequence[str]) -> ColumnDataSource:
    """Return an empty table that the script finds by its name.

    Args:
        name: of the source.
        columns: their names.
    """
    return ColumnDataSource({column: [] for column in columns}, name=name)


def add_lines(
    chart: figure,
    name: str,
    colour: str,
    *,
    tip: list[tuple[str, str]] | None = None,
    width: float = 1.75,
    dash: str = "solid",
    alpha: float = 1.0,
    mode: str = "mouse",
) -> None:
    """Add one line, from the columns x and y of a source.

    Args:
        chart: to add to.
        name: of the source.
        colour: a tag of this module, or a colour.
        tip: what the pointer shows, as pairs of name and format; None for nothing.
        width: of the line in pixels.
        dash: Bokeh's pattern.
        alpha: opacity, between 0 and 1.
        mode: of the hover tool.
    """
    drawn = chart.line(
        "x",
        "y",
        source=source(name, columns=("x", "y")),
        line_color=_colour(colour),
        line_width=width,
        line_dash=dash,
        line_alpha=alpha,
        line_join="round",
    )
    drawn.glyph.tags = [colour]
    if tip:
        chart.add_tools(_hover(drawn, tip, mode=mode))


def add_many(chart: figure, name: str, tip: list[tuple[str, str]], width: float = 1.75) -> None:
    """Add many lines, each with its own name and colour.

    Args:
        chart: to add to.
        name: of the source.
        tip: what the pointer shows, as pairs of name and format.
        width: of the lines in pixels.
    """
    drawn = chart.multi_line(
        "xs",
        "ys",
        source=source(name, columns=("xs", "ys", "name", "colour")),
        line_color="colour",
        line_width=width,
        hover_line_width=width + 1.5,
        hover_line_color="colour",
        line_join="round",
    )
    chart.add_tools(_hover(drawn, tip, line_policy="nearest"))


def add_boxes(
    chart: figure, name: str, colour: str, tip: list[tuple[str, str]], alpha: float = 0.8
) -> None:
    """Add the boxes of a histogram.

    Args:
        chart: to add to.
        name: of the source.
        colour: a tag of this module, or a colour.
        tip: what the pointer shows, as pairs of name and format.
        alpha: opacity, between 0 and 1.
    """
    drawn = chart.quad(
        "left",
        "right",
        "top",
        "bottom",
        source=source(name, columns=("left", "right", "top", "bottom")),
        fill_color=_colour(colour),
        fill_alpha=alpha,
        line_color=None,
    )
    drawn.glyph.tags = [colour]
    chart.add_tools(_hover(drawn, tip))


def add_dots(chart: figure, name: str, tip: list[tuple[str, str]], size: float = 7) -> None:
    """Add dots, each with its own colour.

    Args:
        chart: to add to.
        name: of the source.
        tip: what the pointer shows, as pairs of name and format.
        size: of a dot in pixels.
    """
    drawn = chart.scatter(
        "x",
        "y",
        source=source(name, columns=("x", "y", "name", "colour")),
        size=size,
        fill_color="colour",
        fill_alpha=0.75,
        line_color=None,
    )
    chart.add_tools(_hover(drawn, tip))


def add_picture(chart: figure, name: str, tip: list[tuple[str, str]]) -> None:
    """Add a matrix in the colours of helping and hurting; the script sets its scale.

    Args:
        chart: to add to.
        name: of the source.
        tip: what the pointer shows, as pairs of name and format.
    """
    mapper = LinearColorMapper(
        palette=[HELPING, NEUTRAL, HURTING],
        low=-1,
        high=1,
        name=f"{name} colours",
        tags=["diverging"],
    )
    drawn = chart.image(
        "image",
        "x",
        "y",
        "dw",
        "dh",
        # one real image to start with: the script makes others of its class, for which Bokeh has no
        # public name
        source=ColumnDataSource(
            {"image": [np.zeros((1, 1), "float32")], "x": [0], "y": [0], "dw": [1], "dh": [1]},
            name=name,
        ),
        color_mapper=mapper,
    )
    chart.add_tools(_hover(drawn, tip))


def add_level(chart: figure, level: float, dimension: str = "width", name: str = "") -> None:
    """Add a straight line across, for example at zero, at one half, or at an observed value.

    Args:
        chart: to add to.
        level: where, in data coordinates.
        dimension: "width" for a horizontal line, "height" for a vertical one.
        name: by which the script finds it.
    """
    drawn = Span(
        location=level,
        dimension=dimension,
        line_color=_GREY,
        line_width=1,
        line_dash="dashed",
        tags=[MUTED],
    )
    if name:
        drawn.name = name
    chart.add_layout(drawn)


def _hover(drawn: GlyphRenderer, tip: list[tuple[str, str]], **options: Any) -> HoverTool:
    """Return the hover tool; formats that begin with % are printf's, which small numbers need."""
    fields = (re.match(r"([@$]\w+)\{%", text) for _, text in tip)
    return HoverTool(
        renderers=[drawn],
        tooltips=tip,
        formatters={match[1]: "printf" for match in fields if match},
        **options,
    )


def _colour(colour: str) -> str:
    return {
        INK: "#30343b",
        MUTED: _GREY,
        ACCENT: _BLUE,
        "helping": HELPING,
        "hurting": HURTING,
    }.get(colour, colour)
