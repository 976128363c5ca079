"""`lca report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .compare import labelled
from .completion import complete_loss
from .show import stdout

if TYPE_CHECKING:
    from ..results import Run


@click.command()
@click.argument("runs", type=click.Path(), nargs=-1, required=True, metavar="[LABEL=]RUN…")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page to write; replaces an older one.",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_loss,
    help="A loss to show (repeatable). The microscope shows the first of a run made with --keep "
    "parameters.  [default: all that fit]",
)
def command(runs: tuple[str, ...], out: str, losses: tuple[str, ...]) -> None:
    """Write all findings of one or several RUNs into one HTML file that opens offline.

    \b
    lca report checkpoints.lca
    lca report first.lca second.lca -o both.html
    lca report checkpoints.lca --loss validation
    lca report 'free=free-*.lca' 'frozen=frozen-*.lca'

    Runs under one LABEL are repeats, such as seeds: the report compares layers over them, as `lca
    compare` does.

    \f

    Args:
        runs: paths of runs, each with "LABEL=" before it or without.
        out: the path of the page.
        losses: names; all that fit where there are none.
    """
    from pathlib import Path

    from ..errors import amount
    from ..report import write_report
    from ..results import open_run

    opened: list[Run] | dict[str, list[Run]]
    if any("=" in run and not Path(run).exists() for run in runs):
        opened = {
            label: [open_run(path) for path in paths] for label, paths in labelled(runs).items()
        }
    else:
        opened = [open_run(run) for run in runs]
    written = write_report(opened, Path(out), losses=losses)
    stdout().print(f"wrote {written} ({amount(float(written.stat().st_size))})", markup=False)
