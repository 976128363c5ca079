"""Show several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from ... import findings
from ...errors import LCAError
from ...findings.common import left_out_of
from ...results import LossResults
from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, clean, count, percent, plain
from ..downsample import Json, lines, over_steps
from ..figures import add_many, steps_figure
from ..panels import Panel, Room
from .layers import largest

_SAID = 6  # runs in the sentence
_VALUES = ("mean", "high", "p_holm", "difference", "p_difference_holm")
_LINES = 40  # runs whose loss is drawn


def section() -> Section:
    """Return one figure: the loss of every run."""
    chart = steps_figure("loss", 300)
    add_many(chart, "runs", [("run", "@name"), ("step", "$snap_x{0}"), ("loss", "$snap_y{%.5g}")])
    return Section(
        name="compare",
        title="Run against run",
        reading="The same layer in different runs: does it depend on the network, or on the seed or "
        "the setting? A difference of single runs is an observation. "
        "For intervals and p-values, put repeats, such as seeds, under one label, "
        "LABEL=RUN, as for `lca compare`.",
        figures={"compare": chart},
        headings={"compare": "Loss of every run"},
    )


def block(
    first: Panel, runs: Sequence[Panel | None], labelled: Sequence[str] | None, room: Room
) -> Block | None:
    """Compare all runs that have the first panel's loss.

    Args:
        first: the first panel.
        runs: the panel of its loss in each run; None where a run lacks it.
        labelled: the label of each run, where repeats share one; else None.
        room: the bytes for its data.
    """
    labels = (
        [panel.run_label if panel is not None else "" for panel in runs]
        if labelled is None
        else labelled
    )
    same = [(label, panel) for label, panel in zip(labels, runs, strict=True) if panel is not None]
    if len(same) < 2:
        return None
    notes = []
    if len(same) < len(runs):
        notes.append(
            f"{count(len(runs) - len(same), 'run')} without a segment of loss "
            f"{clean(first.loss, 60)} are not compared."
        )
    if len(same) > _LINES:
        notes.append(f"The loss is drawn for the first {_LINES} of {len(same):,} runs.")
    drawn = same[:_LINES]
    kinds = list(dict.fromkeys(labels))
    names, xs, ys, tints, sentences = [], [], [], [], []
    for label, panel in drawn:
        finding, _ = panel.find("curve")
        if finding is None:
            continue
        losses = [panel.of_group(finding[name], None).values for name in ("loss_start", "loss")]
        x, y = over_steps(finding["step"].values, finding["step_end"].values, *losses)
        each_x, each_y = lines(x, y[None], room.points(len(drawn), 0.1))
        xs.append(each_x)
        ys.append(each_y)
        names.append(panel.run_label)
        tints.append(kinds.index(label))
        sentences.append(f"{panel.run_label} {plain(float(y[0]))} → {plain(float(y[-1]))}")
    some = f"{'; '.join(sentences[:_SAID])}{f'; and {count(len(sentences) - _SAID)} more, in the table' if len(sentences) > _SAID else ''}"
    view: dict[str, Json] = {
        "xs": {"join": xs},
        "ys": {"join": ys},
        "name": names,
        "colour": "@palette",
    }
    if labelled is not None:
        view["kind"] = tints
        view["@kinds"] = [clean(kind, 60) for kind in kinds]
    tables, left_out = _tables(same, labelled is not None)
    return Block(
        captions={"compare": f"Loss {clean(first.loss, 60)}: {some}."},
        views={"compare": {"|": {"runs": view}}},
        tables=tables,
        notes=[*notes, *left_out],
    )


def _tables(same: Sequence[tuple[str, Panel]], labelled: bool) -> tuple[list[Table], list[str]]:
    shown: dict[str, list[LossResults]] = {}
    for label, panel in same:
        shown.setdefault(label, []).append(panel.results)
    try:
        finding: xr.Dataset = findings.compare(shown)
    except LCAError as error:
        return [], [clean(error, 400)]
    left_out = left_out_of(finding)
    notes = [clean(left_out, 400)] if left_out else []
    notes += [clean(line, 400) for line in finding.attrs["notes"].split("\n") if line]
    repeats = bool((finding["runs"] > 1).any())
    tables = [_runs(finding, repeats)]
    if repeats:
        tables.append(_every(same))
    tables.append(_layers(finding, repeats, notes))
    if not labelled and len(same) > 2:
        notes.append(
            "Repeats can share a label, as in LABEL=RUN; layers then have intervals and p-values."
        )
    return tables, notes


def _runs(finding: xr.Dataset, repeats: bool) -> Table:
    """Return the headline figures of each label."""
    rows: list[list[Cell]] = []
    counted = "helping" in finding
    for position, label in enumerate(finding["label"].values):
        of = finding.isel(label=position)
        end = _interval(of, "loss_end", plain)
        share = _interval(of, "helping", percent) if counted else []
        p = [int(of["runs"]), *end, float(of["p_loss_end"]), float(of["loss_change"]), *share]
        names = ("loss_end", "loss_change", *(["helping"] if counted else []))
        rows.append([str(label), *(p if repeats else [float(of[name]) for name in names])])
    if not repeats:
        columns = [
            Column("run", "name"),
            Column("loss at the end", "plain"),
            Column("loss change", "bar"),
            *([Column("helping", "share")] if counted else []),
        ]
        return Table(title="Runs", columns=columns, rows=rows, open=True)
    columns = [
        Column("label", "name"),
        Column("runs", "count"),
        Column("loss at the end", "right"),
        Column("p against the first label", "plain"),
        Column("loss change", "bar"),
        *([Column("helping", "right")] if counted else []),
    ]
    interval = f"{100 * finding.attrs['confidence']:g} %"
    note = (
        f"Brackets: the {interval} t interval of the mean over the runs of a label. p: "
        f"{_test(finding)} against the first label."
    )
    return Table(title="Labels", columns=columns, rows=rows, note=note, open=True)


def _interval(of: xr.Dataset, name: str, write: Callable[[float], str]) -> list[str]:
    low, high = (float(of[f"{name}_{end}"]) for end in ("low", "high"))
    text = write(float(of[name]))
    return [text if np.isnan(low) else f"{text} [{write(low)}, {write(high)}]"]


def _every(same: Sequence[tuple[str, Panel]]) -> Table:
    """Return the headline figures of each run."""
    counted = any("helping" in panel.whole for _, panel in same)
    rows: list[list[Cell]] = []
    for label, panel in same:
        of = panel.whole
        shares = [of.get("helping")] if counted else []
        rows.append([panel.run_label, clean(label, 60), of["loss_end"], of["loss_change"], *shares])
    columns = [
        Column("run", "name"),
        Column("label", "text"),
        Column("loss at the end", "plain"),
        Column("loss change", "bar"),
        *([Column("helping", "share")] if counted else []),
    ]
    return Table(title="Every run", columns=columns, rows=rows)


def _layers(finding: xr.Dataset, repeats: bool, notes: list[str]) -> Table:
    """Return each layer's sum in each run or label; for labels with repeats also intervals,
    differences and p-values.
    """
    columns_of = {name: finding[name].transpose("label", "layer").values for name in _VALUES}
    mean = columns_of["mean"]
    picked = largest(np.nanmax(np.abs(mean), axis=0), MOST_ROWS)
    if len(picked) < mean.shape[1]:
        notes.append(
            f"{count(mean.shape[1] - len(picked), 'layer')} with smaller sums are not compared."
        )
    columns = [Column("layer", "name")]
    for position, label in enumerate(finding["label"].values):
        columns.append(Column(str(label), "bar"))
        if repeats:
            columns += [Column("± half the interval", "plain"), Column("p", "plain")]
            columns += (
                [Column(f"less {finding['label'].values[0]}"), Column("p of that", "plain")]
                if position
                else []
            )
    rows: list[list[Cell]] = []
    for layer in picked:
        row: list[Cell] = [str(finding["layer"].values[layer])]
        for position in range(len(mean)):
            row.append(float(mean[position, layer]))
            if repeats:
                row += [
                    float(columns_of["high"][position, layer] - mean[position, layer]),
                    float(columns_of["p_holm"][position, layer]),
                ]
                row += (
                    [
                        float(columns_of[name][position, layer])
                        for name in ("difference", "p_difference_holm")
                    ]
                    if position
                    else []
                )
        rows.append(row)
    note = (
        f"p of a layer: t-test of its mean against 0; of a difference: {_test(finding)}; both "
        "corrected by Holm over layers and labels."
        if repeats
        else ""
    )
    return Table(
        title="Σ allocation of each layer, bars on one scale",
        columns=columns,
        rows=rows,
        note=note,
        open=True,
        shared=True,
    )


def _test(finding: xr.Dataset) -> str:
    """Return the name of the test of differences to the first label."""
    paired = finding["paired"].values[1:]
    if not paired.any():
        return "Welch's test"
    return (
        "paired t-test"
        if paired.all()
        else "paired t-test where runs come in pairs, else Welch's test"
    )
