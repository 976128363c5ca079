"""`lca repair`."""

from __future__ import annotations

from typing import Any

import click

from ..base.text import count
from ..replay.display import Display
from .completion import complete_path
from .options import cluster_options
from .show import prints_to_stderr, stdout


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--task",
    required=True,
    metavar="FILE[:FUNCTION]",
    shell_complete=complete_path,
    help="The task that the run was made with; a run does not record its path.",
)
@click.option(
    "--checkpoints",
    type=click.Path(),
    metavar="DIR",
    help="Where the checkpoints are now.  [default: where they were]",
)
@cluster_options
def command(run: str, task: str, **options: Any) -> None:
    """Recompute the damaged spans of RUN, restore its metadata, and remove leftover files.

    \b
    lca verify checkpoints.lca
    lca repair checkpoints.lca --task my_task.py

    \f

    Args:
        run: the path or URL of a run.
        task: as for `lca run`.
        options: of `repair`, None where not given.
    """
    from ..replay.repair import repair
    from ..results import open_run

    with prints_to_stderr(), Display() as listen:
        done = repair(run, task, progress=listen, **options)
    console = stdout()
    for name, spans in done.spans.items():
        console.print(f"loss {name!r}: recomputed {_some(spans)}", markup=False)
    rest = len(done.damage) - sum(damage.span is not None for damage in done.damage)
    if rest:
        console.print(f"restored {count(rest, 'other file')}")
    if done.leftovers:
        console.print(f"removed {count(done.leftovers, 'leftover file')}")
    if not done.damage:
        console.print(f"{run} is whole", markup=False)
    unfinished = [name for name, results in open_run(run).items() if not results.complete]
    if unfinished:
        console.print(
            f"not finished yet: {', '.join(unfinished)}; `lca run` resumes them", markup=False
        )


def _some(spans: list[int]) -> str:
    shown = ", ".join(map(str, spans[:10]))
    return (
        f"span{'' if len(spans) == 1 else 's'} "
        f"{shown}{f' and {len(spans) - 10} more' if len(spans) > 10 else ''}"
    )
