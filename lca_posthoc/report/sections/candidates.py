"""What to try next: layers to freeze, parameters to prune or to initialise again."""

from __future__ import annotations

from typing import Any

from ..content import MOST_ROWS, Block, Column, Section, Table, clean, count, listed
from ..panels import Panel, Room
from .layers import largest

_NAMED = 20  # units that the finding names unless asked for more
_MOST_DEAD = 1000


def section() -> Section:
    """No figure: lists."""
    return Section(
        "candidates",
        "Candidates",
        "These are suggestions to test, not verdicts: freezing a layer changes the path of every other one. "
        "Layers that hurt in sum may be worth freezing, units that never did anything worth pruning or initialising again.",
    )


def block(panel: Panel, room: Room) -> Block:
    """Layers above zero, dead units, and the parameters that hurt most."""
    found, left_out = panel.find("candidates")
    if found is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    total: Any = panel.of_group(found["total"], None).values if "total" in found else []
    freeze = [at for at in range(len(total)) if total[at] > 0]
    names = found["layer"].values
    grouped = panel.groups is not None
    helping = found["helping"].values
    rows = [
        [str(names[at]), float(total[at]), *([] if grouped else [float(helping[at])])]
        for at in sorted(freeze, key=lambda at: -total[at])
    ]
    columns = [
        Column("layer", "name"),
        Column("Σ allocation", "bar"),
        *([] if grouped else [Column("helping", "share")]),
    ]
    tables = [
        Table("Layers that hurt in sum: try freezing them", columns, rows[:MOST_ROWS], open=True),
        _named(found, "unit", "Units that hurt most", [("total", "Σ allocation", "bar")]),
        _named(
            found,
            "parameter",
            "Parameters that hurt most",
            [("allocated", "Σ allocation", "bar"), ("helping", "helped on", "share")],
        ),
        _tensors(found, notes),
    ]
    said = f"Layers to try freezing: {listed([clean(names[at], 60) for at in freeze]) if freeze else 'none, every sum is negative'}."
    if "dead_name" in found.coords:
        said += f" Units without any effect: {_dead(panel, found)}."
    return Block({"": said}, tables=[table for table in tables if table is not None and table.rows], notes=notes)


def _dead(panel: Panel, found: Any) -> str:
    """How many units had no effect, each counted once whatever tensors it has, and which."""
    dead, most = [clean(name, 60) for name in found["dead_name"].values], _NAMED
    if len(dead) >= most:
        more, _ = panel.find("candidates", most=_MOST_DEAD)
        dead, most = [clean(name, 60) for name in more["dead_name"].values], _MOST_DEAD
    amount = f"at least {count(most)}" if len(dead) >= most else count(len(dead)) if dead else "none"
    return f"{amount}{f', such as {listed(dead[:6])}' if len(dead) > 6 else f' ({listed(dead)})' if dead else ''}"


def _named(found: Any, kind: str, title: str, values: list[tuple[str, str, str]]) -> Table | None:
    if f"{kind}_name" not in found.variables:
        return None
    rows = [
        [str(name), *(float(found[f"{kind}_{value}"].values[at]) for value, _, _ in values)]
        for at, name in enumerate(found[f"{kind}_name"].values)
    ]
    return Table(title, [Column(kind, "name"), *(Column(heading, how) for _, heading, how in values)], rows)


def _tensors(found: Any, notes: list[str]) -> Table | None:
    if "silent" not in found:
        return None
    elements = found["tensor_elements"].values
    shown = largest(elements, MOST_ROWS)
    if len(shown) < len(elements):
        notes.append(f"Silent parameters are listed for the {len(shown)} largest of {count(len(elements), 'tensor')}.")
    rows = [
        [
            str(found["tensor"].values[at]),
            int(elements[at]),
            int(found["silent"].values[at]),
            int(found["never_helped"].values[at]),
        ]
        for at in shown
    ]
    columns = [
        Column("tensor", "name"),
        Column("parameters", "count"),
        Column("silent", "count"),
        Column("never helped", "count"),
    ]
    return Table(
        "Parameters without effect, tensor by tensor",
        columns,
        rows,
        "Silent: exactly zero on every segment. Never helped: hurt at least once and helped never.",
    )
