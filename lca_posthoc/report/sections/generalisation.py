"""Training against validation: what lowered the one and raised the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..content import MOST_ROWS, Block, Column, Section, Table, clean, count, listed
from ..figures import ACCENT, INK, add_level, add_lines, steps_figure
from ..panels import Panel, Room
from ..thin import kept, numbers
from .layers import largest


def section() -> Section:
    """One figure: both running sums of a layer."""
    made = steps_figure("Σ allocation so far", 300)
    add_level(made, 0)
    add_lines(made, "train", INK, tip=[("step", "@x{0}"), ("training loss", "@y{%.5g}")])
    add_lines(
        made,
        "validation",
        ACCENT,
        width=2.25,
        dash="dashed",
        tip=[("step", "@x{0}"), ("validation loss", "@y{%.5g}")],
    )
    return Section(
        "generalisation",
        "Training against validation",
        "A layer that lowers the training loss and raises the validation loss may be where the network overfits. "
        "Where the lines part, what the layer did to the one loss does not carry over to the other.",
        {"generalisation": made},
        {"generalisation": [("ink", "training loss"), ("accent", "validation loss (dashed)")]},
        {"generalisation": "Running sums of one layer on both losses"},
    )


def block(panel: Panel, room: Room) -> Block | None:
    """The layers, and the quadrants their parameters lie in; for the pair of losses of the run."""
    pair = partner(panel)
    if pair is None:
        return None
    train, validation = (panel.run[name] for name in pair)
    found, left_out = panel.find("generalisation", validation) if train.name == panel.loss else (None, "")
    if found is None:
        return Block(notes=[left_out]) if left_out else None
    notes = [left_out] if left_out else []
    both = [found[name].values for name in ("train", "validation")]
    shown = largest(both[0], MOST_ROWS)
    names = [clean(found["layer"].values[at]) for at in shown]
    if len(shown) < len(both[0]):
        notes.append(f"{count(len(both[0]) - len(shown), 'layer')} with smaller sums are not shown.")
    x = np.append(found["step"].values[:1], found["step_end"].values)
    most = room.points(2 * (len(shown) + 1), 0.2)
    views: dict[str, Any] = {}
    for place, at in enumerate([None, *shown]):
        views[f"|{place}"] = {}
        for name in ("train", "validation"):
            sums = found[f"cumulative_{name}"].transpose("step", "layer").values
            y = np.append(0.0, sums.sum(1) if at is None else sums[:, at])
            few = kept(y, most)
            views[f"|{place}"][name] = {"x": numbers(x[few]), "y": numbers(y[few])}
    rows = [[name, float(both[0][at]), float(both[1][at])] for name, at in zip(names, shown, strict=True)]
    columns = [Column("layer", "name"), Column(f"Σ on {pair[0]}", "bar"), Column(f"Σ on {pair[1]}", "bar")]
    overfit = [name for name, at in zip(names, shown, strict=True) if both[0][at] < 0 < both[1][at]]
    said = f"Layers that lowered {clean(pair[0], 60)} and raised {clean(pair[1], 60)}: {listed(overfit) if overfit else 'none'}."
    tables = [Table("Layers on both losses", columns, rows, open=True), *_more(found, pair)]
    return Block({"generalisation": said}, {"generalisation": views}, "Layer", ["all layers", *names], tables, notes)


def partner(panel: Panel) -> tuple[str, str] | None:
    """The training and the validation loss of the panel's run: plain losses over different splits, named so if any is."""
    plain = [
        (name, each.record)
        for name, each in panel.run.items()
        if each.record.groups is None and each.record.on is not None
    ]
    plain = [(name, record) for name, record in plain if panel.run[name].complete]
    order = sorted(plain, key=lambda each: (each[1].on != "train", each[0] != "train"))
    if not order:
        return None
    first = order[0]
    others = [each for each in plain if each[1].on != first[1].on and each[1].kind == first[1].kind]
    others.sort(key=lambda each: not str(each[1].on).startswith(("val", "test", "dev", "eval")))
    return (first[0], others[0][0]) if others else None


def _more(found: Any, pair: tuple[str, str]) -> list[Table]:
    tables = []
    if "parameters" in found:
        rows = [
            [
                str(name),
                int(found["parameters"].sel(quadrant=name).sum()),
                float(found["allocated_train"].sel(quadrant=name).sum()),
                float(found["allocated_validation"].sel(quadrant=name).sum()),
            ]
            for name in found["quadrant"].values
        ]
        columns = [
            Column("over all steps", "text"),
            Column("parameters", "count"),
            Column("Σ on " + pair[0], "bar"),
            Column("Σ on " + pair[1], "bar"),
        ]
        tables.append(Table("Parameters by what they did to both", columns, rows))
    if "worst_name" in found.coords:
        rows = [
            [str(name), float(found["worst_train"].values[at]), float(found["worst_validation"].values[at])]
            for at, name in enumerate(found["worst_name"].values)
        ]
        columns = [Column("parameter", "name"), Column("Σ on " + pair[0]), Column("Σ on " + pair[1], "bar")]
        tables.append(
            Table(f"Parameters that lowered {clean(pair[0], 60)} and raised {clean(pair[1], 60)} most", columns, rows)
        )
    return [table for table in tables if table.rows]
