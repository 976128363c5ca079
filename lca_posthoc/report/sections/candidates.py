"""List candidates to try next: layers to freeze, parameters to prune or reinitialise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from ..content import MOST_ROWS, Block, Cell, Column, Section, Table, clean, count, listed
from ..panels import Panel, Room
from .layers import largest

_NAMED = 20  # units that the finding names by default
_MOST_DEAD = 1000


def section() -> Section:
    """Return a section of lists, without figures."""
    return Section(
        name="candidates",
        title="Candidates",
        reading="These are suggestions to test, not verdicts: freezing a layer changes the path of "
        "every other one. "
        "Layers that hurt in total may be worth freezing, units without any effect may be worth "
        "pruning or reinitialising.",
    )


def of_layers_alone(candidates: Section) -> Section:
    """Return the section for runs that keep sums, which name only layers."""
    reading = (
        "These are suggestions to test, not verdicts: freezing a layer changes the path of every "
        "other one. Layers that hurt in total may be worth freezing."
    )
    return replace(candidates, reading=reading)


def block(panel: Panel, room: Room) -> Block:
    """Return layers above zero, dead units, and the parameters that hurt most.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("candidates")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    total = panel.of_group(finding["total"], None).values if "total" in finding else np.empty(0)
    freeze = np.flatnonzero(finding["freeze"].values).tolist() if "freeze" in finding else []
    names = finding["layer"].values
    grouped = panel.groups is not None
    shares = [] if grouped or "helping" not in finding else [finding["helping"].values]
    rows: list[list[Cell]] = [
        [
            str(names[position]),
            float(total[position]),
            float(finding["error"].values[position]),
            *(float(share[position]) for share in shares),
        ]
        for position in sorted(freeze, key=lambda position: -total[position])
    ]
    columns = [
        Column("layer", "name"),
        Column("Σ allocation", "bar"),
        Column("±", "plain"),
        *(Column("helping", "share") for _ in shares),
    ]
    tables = [
        Table(
            title="Layers that hurt in total: try freezing them",
            columns=columns,
            rows=rows[:MOST_ROWS],
            open=True,
        ),
        _named(finding, "unit", "Units that hurt most", [("total", "Σ allocation", "bar")]),
        _named(
            finding,
            "parameter",
            "Parameters that hurt most",
            [("allocated", "Σ allocation", "bar"), ("helping", "helped on", "share")],
        ),
        _tensors(finding, notes),
    ]
    to_freeze = (
        listed([clean(names[position], 60) for position in freeze])
        if freeze
        else "none, no sum of parameters is above zero by more than its error"
    )
    sentence = f"Layers to try freezing: {to_freeze}."
    if "dead_name" in finding.coords:
        sentence += f" Units without any effect: {_dead(panel, finding)}."
    return Block(
        captions={"": sentence},
        tables=[table for table in tables if table is not None and table.rows],
        notes=notes,
    )


def _dead(panel: Panel, finding: xr.Dataset) -> str:
    """Tell how many units had no effect, each counted once however many tensors it has, and name
    some.
    """
    dead, most = [clean(name, 60) for name in finding["dead_name"].values], _NAMED
    if len(dead) >= most:
        more, _ = panel.find("candidates", most=_MOST_DEAD)
        dead, most = [clean(name, 60) for name in more["dead_name"].values], _MOST_DEAD
    amount = (
        f"at least {count(most)}" if len(dead) >= most else count(len(dead)) if dead else "none"
    )
    return f"{amount}{f', such as {listed(dead[:6])}' if len(dead) > 6 else f' ({listed(dead)})' if dead else ''}"


def _named(
    finding: xr.Dataset, kind: str, title: str, values: list[tuple[str, str, str]]
) -> Table | None:
    if f"{kind}_name" not in finding.variables:
        return None
    rows: list[list[Cell]] = [
        [str(name), *(float(finding[f"{kind}_{value}"].values[position]) for value, _, _ in values)]
        for position, name in enumerate(finding[f"{kind}_name"].values)
    ]
    return Table(
        title=title,
        columns=[Column(kind, "name"), *(Column(heading, how) for _, heading, how in values)],
        rows=rows,
    )


def _tensors(finding: xr.Dataset, notes: list[str]) -> Table | None:
    if "silent" not in finding:
        return None
    elements = finding["tensor_elements"].values
    shown = largest(elements, MOST_ROWS)
    if len(shown) < len(elements):
        notes.append(
            f"The table lists silent parameters of the {len(shown)} largest of "
            f"{count(len(elements), 'tensor')}."
        )
    rows: list[list[Cell]] = [
        [
            str(finding["tensor"].values[position]),
            int(elements[position]),
            int(finding["silent"].values[position]),
            int(finding["never_helped"].values[position]),
        ]
        for position in shown
    ]
    columns = [
        Column("tensor", "name"),
        Column("parameters", "count"),
        Column("silent", "count"),
        Column("never helped", "count"),
    ]
    return Table(
        title="Parameters without effect, tensor by tensor",
        columns=columns,
        rows=rows,
        note="Silent: exactly zero on every segment. Never helped: hurt at least once and never "
        "helped.",
    )
