"""`lca report`."""

from __future__ import annotations

from pathlib import Path

import click

from .show import stdout


@click.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="RUN [RUN…]")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page to write; an older one is replaced.",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME",
    help="Show this loss (repeatable); the first goes under the microscope.  [default: all that fit]",
)
def command(runs: tuple[str, ...], out: str, losses: tuple[str, ...]) -> None:
    """Write everything there is to see in one or several RUNs into one file that opens without a network.

    \b
    lca report checkpoints.lca
    lca report first.lca second.lca -o both.html
    lca report checkpoints.lca --loss validation
    """
    from ..errors import amount
    from ..report import write_report
    from ..store import open_run

    written = write_report([open_run(run) for run in runs], Path(out), losses=losses)
    stdout().print(f"wrote {written} ({amount(float(written.stat().st_size))})", markup=False)
