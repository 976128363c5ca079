"""Show the loss curve, measured and added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from ..content import Block, Section, View, clean, count, plain, signed
from ..downsample import numbers, over_segments, over_steps, thinned
from ..figures import ACCENT, INK, MUTED, add_dots, add_level, add_lines, steps_figure
from ..panels import Panel, Room

Numbers = np.ndarray[Any, Any]


def section() -> Section:
    """Return two figures: the loss, and the residual of every segment."""
    loss = steps_figure("loss", 320)
    add_lines(
        loss,
        "predicted",
        ACCENT,
        width=6,
        alpha=0.45,
        tip=[("step", "@x{0}"), ("start + Σ allocation", "@y{%.5g}")],
    )
    add_lines(loss, "true", INK, tip=[("step", "@x{0}"), ("loss", "@y{%.5g}")])
    residual = steps_figure("residual of a segment", 200)
    add_level(residual, 0)
    add_lines(residual, "residual", MUTED, width=1.25)
    add_dots(
        residual,
        "worst",
        [("segment from step", "@x{0}"), ("residual", "@y{%+.3e}"), ("", "@name")],
        size=6,
    )
    return Section(
        name="curve",
        title="Loss curve",
        reading="The dark line is the measured loss; the light band under it is the loss at the "
        "start plus everything allocated since. "
        "Where they coincide, the allocation explains the whole change; the residual below "
        "is what it misses on each segment.",
        figures={"curve": loss, "residual": residual},
        legends={
            "curve": [("ink", "loss"), ("accent", "start + Σ allocation")],
            "residual": [("hurting", "did not converge")],
        },
        headings={"curve": "Loss, measured and added up", "residual": "What the sum misses"},
    )


def without_faults(curve: Section) -> Section:
    """Return the section for a page on which every segment converged."""
    return replace(curve, legends={**curve.legends, "residual": []})


def block(panel: Panel, room: Room) -> Block:
    """Return the curve of every group.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("curve")
    if finding is None:
        return Block(notes=[left_out])
    views: dict[str, dict[str, View]] = {"curve": {}, "residual": {}}
    steps, ends = finding["step"].values, finding["step_end"].values
    most = room.points(3 * len(panel.choices), 0.15)
    captions: dict[str, str] = {}
    for key, label, position in panel.choices:
        of = {
            name: panel.of_group(finding[name], position).values
            for name in ("loss", "loss_start", "predicted", "residual")
        }
        residual = of["residual"]
        views["curve"][f"{key}|"] = {
            name: thinned(*over_steps(steps, ends, of["loss_start"], of[values]), most)
            for name, values in (("true", "loss"), ("predicted", "predicted"))
        }
        # one row is enough, because all groups of a segment are refined together
        bad = np.flatnonzero(~finding["converged"].values.reshape(len(steps), -1).all(1))
        worst = bad[np.argsort(-abs(residual[bad]))[:200]]
        views["residual"][f"{key}|"] = {
            "residual": thinned(*over_segments(steps, residual, ends), most),
            "worst": {
                "x": numbers(steps[worst]),
                "y": numbers(residual[worst]),
                "name": {"same": len(worst), "v": "did not converge"},
                "colour": {"same": len(worst), "v": "@hurting"},
            },
        }
        if not captions:
            captions = _captions(panel, finding, of, len(bad), label)
    return Block(captions=captions, views=views, notes=[left_out] if left_out else [])


def _captions(
    panel: Panel, finding: xr.Dataset, values: dict[str, Numbers], bad: int, label: str
) -> dict[str, str]:
    residual, start = values["residual"], float(values["loss_start"][0])
    end, predicted = float(values["loss"][-1]), float(values["predicted"][-1])
    worst = int(np.abs(residual).argmax())
    steps = finding["step"].values
    of, worst_of = f" ({label})" if label else "", ""
    if panel.groups is not None:
        every = np.abs(finding["residual"].transpose("step", "group").values)
        position, group = np.unravel_index(np.nanargmax(every), every.shape)
        worst_of = (
            f"; of one group, {clean(panel.groups[group], 60)}, "
            f"{plain(float(every[position, group]))} in magnitude, from step {steps[position]:,} on"
        )
    converged = f"{count(bad, 'segment')} did not converge" if bad else "Every segment converged"
    if panel.results.complete:
        added = f"added up, the allocation ends at {plain(predicted)}."
    else:
        added = (
            f"{panel.missing} are missing and not drawn: there the sum restarts "
            "at the measured loss."
        )
    return {
        "curve": f"From step {steps[0]:,} on, the loss{of} went from {plain(start)} to "
        f"{plain(end)}; {added}",
        "residual": f"Over {count(len(residual), 'segment')} the residuals{of} add up to "
        f"{signed(float(residual.sum()))}; the largest is "
        f"{signed(float(residual[worst]))}, from step {steps[worst]:,} on{worst_of}. {converged}.",
    }
