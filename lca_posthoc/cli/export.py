"""`lca export`."""

from __future__ import annotations

import click

from ..base.text import count
from .completion import complete_finding, complete_loss
from .options import Choice
from .show import say, stdout


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(),
    metavar="PLACE",
    help="A new directory, or a file for one table.",
)
@click.option(
    "--format",
    "format_",
    type=Choice(("netcdf", "csv", "parquet", "tensorboard")),
    help="Format of the files.  [default: as PLACE ends (.nc, .csv, .parquet), else netcdf]",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_loss,
    help="A loss of the run (repeatable).  [default: all]",
)
@click.option(
    "--finding",
    "findings",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_finding,
    help="A finding, such as layers (repeatable).  [default: all that the run allows except "
    "microscope]",
)
def command(
    run: str, out: str, format_: str | None, losses: tuple[str, ...], findings: tuple[str, ...]
) -> None:
    """Write findings of RUN for other programs: NetCDF, CSV and Parquet tables, TensorBoard events.

    \b
    lca export checkpoints.lca -o findings                        # findings/LOSS/FINDING.nc
    lca export checkpoints.lca -o tables --format csv --loss train
    lca export checkpoints.lca -o curve.csv --loss train --finding curve
    lca export checkpoints.lca -o events --format tensorboard     # tensorboard --logdir events

    Existing files are not overwritten. Parquet needs pyarrow, TensorBoard needs tensorboard: pip
    install 'lca_posthoc[export]'.

    \f

    Args:
        run: the path or URL of a run.
        out: a new directory, or a file for one table.
        format_: of the files; None to tell from `out`.
        losses: names; all where there are none.
        findings: names; all but microscope where there are none.
    """
    from ..export import export
    from ..results import open_run

    written = export(open_run(run), out, format=format_, losses=losses, findings=findings, say=say)
    stdout().print(f"wrote {count(len(written), 'file')} to {out}", markup=False)
