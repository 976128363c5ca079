"""Define the colours of every figure and report as plain data.

Allocation is signed, so its scale diverges from a neutral middle: teal helps, vermilion hurts. Both
arms have the same lightness at the same distance from the middle. Lightness says how much and hue
says which way, under deuteranopia and protanopia too (`tests/plots/test_plots.py` simulates both
and measures CIE L*a*b* distances).
"""

from __future__ import annotations

from typing import Final

HELPING: Final = "#0f8b8d"
HURTING: Final = "#d9572b"
NEUTRAL: Final = "#f7f6f2"  # no effect, on a light page
NEUTRAL_DARK: Final = "#1e1e1e"  # no effect, on a dark page
INK: Final = "#222222"  # the loss itself, and text
MUTED: Final = "#6f6f6f"  # notes, zero lines, what is exactly zero
FAINT: Final = "#d9d8d3"  # grids, bands
STILL: Final = "#aaa9a4"  # the share that neither helps nor hurts, in a map of shares

# From the most helpful to the most harmful; evenly spaced, NEUTRAL in the middle.
DIVERGING: Final = (
    *("#053c42", "#08555a", "#0b6f72", HELPING, "#519fa0", "#7eb5b4", "#a7cac8", "#cfe0dd"),
    NEUTRAL,
    *("#f5d7cb", "#f1b8a4", "#eb997e", "#e37957", HURTING, "#b2431f", "#8e3114", "#6b1f0a"),
)
DIVERGING_DARK: Final = (
    *("#86dfd3", "#66c4bc", "#45aaa6", "#199190", "#237877", "#28605f", "#284948", "#243332"),
    NEUTRAL_DARK,
    *("#412b24", "#653728", "#8a422b", "#b24d2c", "#da582d", "#e7784f", "#f4966e", "#ffb48c"),
)

# Layers, groups and runs: no colour here looks like helping or hurting.
LAYERS: Final = ("#3b2c85", "#ddaa33", "#56b4e9", "#8c2f5f", "#0072b2", "#9e9e9e", "#5f4418")
LAYERS_DARK: Final = ("#7a6ff0", "#ddaa33", "#e07fb0", "#fff0a0", "#c49a6c", "#b7a6ff", "#f5f5f5")

# Causes of the motion: signal, noise, momentum, decay; the unexplained rest is grey.
CAUSES: Final = ("#0072b2", "#ddaa33", "#8c2f5f", "#5f4418", "#a9a9a9")
CAUSES_DARK: Final = ("#5b8ff9", "#ddaa33", "#e07fb0", "#fff0a0", "#6a6a6a")
