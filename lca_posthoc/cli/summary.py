"""`lca summary`."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from .options import json_option
from .show import print_json, safe, say, share, stdout, table


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
    if as_json:
        print_json({"schema": 1, "losses": found})
    else:
        print_summary(found)


def print_summary(found: dict[str, dict[str, Any]]) -> None:
    """Headline figures side by side, then each loss's table of tensors."""
    console = stdout()
    headline = table("", *(safe(name) for name in found))
    for label, key in (("loss at the start", "loss_start"), ("loss at the end", "loss_end")):
        headline.add_row(label, *(f"{each[key]:.6f}" for each in found.values()))
    for label, key in (("loss change", "loss_change"), ("allocated, Σ over parameters and segments", "allocated")):
        headline.add_row(label, *(f"{each[key]:+.6f}" for each in found.values()))
    headline.add_row("residual", *(f"{each['residual']:+.1e}" for each in found.values()))
    for key in ("helping", "hurting", "zero"):
        headline.add_row(f"{key} (share of parameters × segments)", *(share(each[key]) for each in found.values()))
    console.print(headline)
    for name, each in found.items():
        console.print()
        console.print(Text(_caption(name, each)))
        rows = table("tensor", "kind", "parameters", "allocated", "share of sum", "helping", names=2)
        for tensor in each["tensors"]:
            rows.add_row(
                Text(safe(tensor["name"])),
                tensor["kind"],
                f"{tensor['parameters']:,}",
                f"{tensor['allocated']:+.6f}",
                _part(tensor["allocated"], each["allocated"]),
                share(tensor["helping"]),
            )
        console.print(rows)


def _part(part: float, whole: float) -> str:
    return share(part / whole + 0.0) if whole and abs(part / whole) >= 5e-4 else "0.0 %"


def _caption(name: str, each: dict[str, Any]) -> str:
    unconverged = f"{each['unconverged']} segments above the tolerance, " if each["unconverged"] else ""
    return (
        f"{safe(name)}: {each['segments']:,} segments, {each['parameters']:,} parameters, {each['evaluations']:,} gradient evaluations, "
        f"{unconverged}largest |residual| {each['max_segment_residual']:.1e}"
    )
