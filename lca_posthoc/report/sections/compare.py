"""Several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import findings
from ...errors import LCAError
from ..content import MOST_ROWS, Block, Column, Section, Table, clean, count, plain
from ..figures import add_many, steps_figure
from ..panels import Panel, Room
from ..thin import lines, over_steps
from .layers import largest

_RUNS = 8  # beside each other in a table


def section() -> Section:
    """One figure: the loss of every run."""
    made = steps_figure("loss", 300)
    add_many(made, "runs", [("run", "@name"), ("step", "$snap_x{0}"), ("loss", "$snap_y{%.5g}")])
    return Section(
        "compare",
        "Run against run",
        "The same layer in different runs, so that what is due to the network can be told from what is due to the seed or the setting. "
        "A difference of single runs is an observation; for p-values group several seeds with findings.compare.",
        {"compare": made},
        headings={"compare": "Loss of every run"},
    )


def block(panels: Sequence[Panel], room: Room) -> Block | None:
    """All runs that have the first panel's loss."""
    first = panels[0]
    same = [panel for panel in panels if panel.loss == first.loss]
    if len({panel.run_label for panel in same}) < 2:
        return None
    curves = [(panel, panel.find("curve")[0]) for panel in same]
    names, xs, ys, said = [], [], [], []
    for panel, found in curves:
        if found is None:
            continue
        losses = [panel.of_group(found[name], None).values for name in ("loss_start", "loss")]
        x, y = over_steps(found["step"].values, found["step_end"].values, *losses)
        each_x, each_y = lines(x, y[None], room.points(len(curves), 0.1))
        xs.append(each_x)
        ys.append(each_y)
        names.append(panel.run_label)
        said.append(f"{panel.run_label} {plain(float(y[0]))} → {plain(float(y[-1]))}")
    views = {"compare": {"|": {"runs": {"xs": {"join": xs}, "ys": {"join": ys}, "name": names, "colour": "@palette"}}}}
    tables, notes = _tables(same)
    return Block({"compare": f"Loss {clean(first.loss, 60)}: {'; '.join(said)}."}, views, tables=tables, notes=notes)


def _tables(same: Sequence[Panel]) -> tuple[list[Table], list[str]]:
    shown = {panel.run_label: panel.results for panel in same[:_RUNS]}
    try:
        found: Any = findings.compare(shown)
    except LCAError as error:
        return [], [clean(error, 400)]
    notes = [clean(found.attrs["left_out"], 400)] if found.attrs.get("left_out") else []
    labels = [str(label) for label in found["label"].values]
    mean = found["mean"].transpose("label", "layer").values
    picked = largest(np.nanmax(np.abs(mean), axis=0), MOST_ROWS)
    if len(picked) < mean.shape[1]:
        notes.append(f"{count(mean.shape[1] - len(picked), 'layer')} with smaller sums are not compared.")
    rows = [[str(found["layer"].values[at]), *(float(value) for value in mean[:, at])] for at in picked]
    columns = [Column("layer", "name"), *(Column(label, "bar") for label in labels)]
    head = [
        [label, *(float(found[name].sel(label=label)) for name in ("loss_end", "loss_change", "helping"))]
        for label in labels
    ]
    overall = [
        Column("run", "name"),
        Column("loss at the end", "plain"),
        Column("loss change", "bar"),
        Column("helping", "share"),
    ]
    return [
        Table("Runs", overall, head, open=True),
        Table("Σ allocation of each layer", columns, rows, open=True),
    ], notes
