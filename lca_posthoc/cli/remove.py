"""`lca remove`."""

from __future__ import annotations

import click

from .completion import complete_loss
from .show import stdout


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--loss",
    required=True,
    metavar="NAME",
    shell_complete=complete_loss,
    help="The loss to remove, with everything stored for it.",
)
def command(run: str, loss: str) -> None:
    """Remove a loss from RUN; the results of other losses stay.

    \b
    lca remove checkpoints.lca --loss per_class

    \f

    Args:
        run: the path or URL of a run.
        loss: its name.
    """
    from ..results import remove_loss

    remove_loss(run, loss)
    stdout().print(f"removed loss {loss!r} from {run}", markup=False)
