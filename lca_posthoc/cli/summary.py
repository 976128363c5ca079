"""`lca summary`."""

from __future__ import annotations

import math
from typing import Any

import click
from rich.text import Text

from .options import json_option
from .show import print_json, safe, say, share, stdout, table

_MOST = 8  # tensors beside each other on a screen


@click.command()
@click.argument("run", type=click.Path())
@click.option("--loss", "losses", multiple=True, metavar="NAME", help="A loss of the run (repeatable).  [default: all]")
@json_option
def command(run: str, losses: tuple[str, ...], as_json: bool) -> None:
    """Show headline figures of RUN and its table of tensors.

    \b
    lca summary checkpoints.lca
    lca summary checkpoints.lca --loss train --json
    """
    from ..errors import InputError
    from ..findings import summary
    from ..store import open_run

    opened = open_run(run)
    for name in losses:
        if name not in opened:
            raise InputError(f"{run} has no loss {name!r}; it has {', '.join(map(repr, opened))}.")
    found = {name: summary(opened[name]) for name in losses or opened}
    for name in found:
        if not opened[name].complete:
            say(f"loss {name!r} is not complete: figures are over the {found[name]['segments']} segments that are")
        if opened[name].behind:
            say(
                f"loss {name!r} ends at step {found[name]['last_step']}, {opened[name].behind} segments before the run does: it was not "
                f"asked for when checkpoints were added. Name it with --loss {name} to `lca run` to go on"
            )
    if as_json:
        print_json({"schema": 1, "losses": found})
    else:
        print_summary(found)


def print_summary(found: dict[str, dict[str, Any]]) -> None:
    """Headline figures side by side, then each loss's groups and its table of tensors."""
    console = stdout()
    if not found:
        console.print("no losses")
    plain = {name: each for name, each in found.items() if each["groups"] is None}
    if plain:
        headline = table("", *(safe(name) for name in plain))
        for label, key in (("loss at the start", "loss_start"), ("loss at the end", "loss_end")):
            headline.add_row(label, *(f"{each[key]:.6f}" for each in plain.values()))
        for label, key in (("loss change", "loss_change"), ("allocated, Σ over parameters and segments", "allocated")):
            headline.add_row(label, *(f"{each[key]:+.6f}" for each in plain.values()))
        if any(each["buffers"] for each in plain.values()):
            parts = (f"{each['buffers'] or 0.0:+.6f}" for each in plain.values())
            headline.add_row("of it to buffers (running statistics)", *parts)
        headline.add_row("residual", *(f"{each['residual']:+.1e}" for each in plain.values()))
        for key in ("helping", "hurting", "zero"):
            headline.add_row(f"{key} (share of parameters × segments)", *(share(each[key]) for each in plain.values()))
        if len({(each["first_step"], each["last_step"]) for each in plain.values()}) > 1:
            headline.add_row(
                "training steps", *(f"{each['first_step']}–{each['last_step']}" for each in plain.values())
            )
        console.print(headline)
    for at, (name, each) in enumerate(found.items()):
        if plain or at:
            console.print()
        console.print(Text(_caption(name, each)))
        if each["groups"] is None:
            _print_tensors(each)
        else:
            _print_groups(each)


def _print_tensors(each: dict[str, Any]) -> None:
    sampled = any(tensor["standard_error"] is not None for tensor in each["tensors"])
    rows = table(
        "tensor",
        "kind",
        "parameters",
        "allocated",
        *(["± standard error"] if sampled else []),
        "share of sum",
        "helping",
        names=2,
    )
    for tensor in each["tensors"]:
        rows.add_row(
            Text(safe(tensor["name"])),
            tensor["kind"],
            f"{tensor['parameters']:,}",
            f"{tensor['allocated']:+.6f}",
            *([f"{tensor['standard_error']:.1e}"] if sampled else []),
            _part(tensor["allocated"], each["allocated"]),
            share(tensor["helping"]),
        )
    if each["remainder"] is not None:
        blank = [""] if sampled else []
        rows.add_row(
            "(the others)", "", "", f"{each['remainder']:+.6f}", *blank, _part(each["remainder"], each["allocated"]), ""
        )
    stdout().print(rows)


def _print_groups(each: dict[str, Any]) -> None:
    """One row per group and one for all: their losses, and what each tensor, or each module where those are many, did to them."""
    columns = _columns(each["tensors"])
    rows = table("group", "examples", "loss", "change", "residual", "helping", *map(safe, columns))
    for at, label in enumerate(each["groups"]):
        rows.add_row(
            Text(safe(str(label))),
            f"{each['group_examples'][at]:,}",
            f"{each['loss_start'][at]:.4f} → {each['loss_end'][at]:.4f}",
            f"{each['loss_change'][at]:+.6f}",
            f"{each['residual'][at]:+.1e}",
            share(each["helping"][at]),
            *(f"{column[at]:+.4f}" for column in columns.values()),
        )
    rows.add_row(
        Text("(all)"),
        f"{sum(each['group_examples']):,}",
        f"{_mean(each, 'loss_start'):.4f} → {_mean(each, 'loss_end'):.4f}",
        f"{_mean(each, 'loss_change'):+.6f}",
        f"{_mean(each, 'residual'):+.1e}",
        "",
        *(f"{_weighted(column, each['group_weights']):+.4f}" for column in columns.values()),
    )
    stdout().print(rows)


def _columns(tensors: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What is shown beside the groups: tensors, or the sums of modules, the smaller ones of which are put together."""
    if len(tensors) <= _MOST:
        return {tensor["name"]: tensor["allocated"] for tensor in tensors}
    modules: dict[str, list[list[float]]] = {}
    for tensor in tensors:
        module = tensor["name"].rpartition(".")[0] or tensor["name"]
        apart = " buffer" if tensor["kind"] == "buffer" and any(tensor["allocated"]) else ".*"
        modules.setdefault(f"{module}{apart}", []).append(tensor["allocated"])
    sums = {name: [math.fsum(column) for column in zip(*parts, strict=True)] for name, parts in modules.items()}
    largest = sorted(sums, key=lambda name: -sum(map(abs, sums[name])))[: _MOST if len(sums) <= _MOST else _MOST - 1]
    shown = {name: column for name, column in sums.items() if name in largest}
    left = [column for name, column in sums.items() if name not in largest]
    return shown | ({"(others)": [math.fsum(column) for column in zip(*left, strict=True)]} if left else {})


def _mean(each: dict[str, Any], name: str) -> float:
    return _weighted(each[name], each["group_weights"])


def _weighted(column: list[float], weights: list[float]) -> float:
    return math.fsum(value * weight for value, weight in zip(column, weights, strict=True)) / math.fsum(weights)


def _part(part: float, whole: float) -> str:
    return share(part / whole + 0.0) if whole and abs(part / whole) >= 5e-4 else "0.0 %"


def _caption(name: str, each: dict[str, Any]) -> str:
    unconverged = f"{each['unconverged']} segments above the tolerance, " if each["unconverged"] else ""
    groups = f"{len(each['groups'])} groups, " if each["groups"] is not None else ""
    worst = each["max_segment_residual"] if each["groups"] is None else max(each["max_segment_residual"])
    error = (
        f", measured error of {each['precision']} {each['precision_error']:.1e} ({each['precision_segments']} segments)"
        if each["precision_error"] is not None
        else ""
    )
    mode = f", {each['norm_stats']} statistics in normalisation layers" if each["norm_stats"] else ""
    return (
        f"{safe(name)}: {groups}{each['segments']:,} segments, {each['parameters']:,} parameters, {each['evaluations']:,} gradient "
        f"evaluations, {unconverged}largest |residual| {worst:.1e}{error}{mode}"
    )
