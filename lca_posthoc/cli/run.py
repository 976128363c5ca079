"""`lca run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..base.text import count, quoted
from ..replay.display import Display
from .options import cluster_options, json_option, replay_options
from .show import print_json, print_words, prints_to_stderr, say, stdout

if TYPE_CHECKING:
    from pathlib import Path

    from ..findings.summary import Summary


@click.command()
@replay_options
@cluster_options
@click.option(
    "--dashboard", is_flag=True, help="Serve Dask's dashboard for local workers on loopback."
)
@click.option(
    "--ignore-space",
    is_flag=True,
    help="Start even if the estimated result does not fit into the free space.",
)
@click.option(
    "--follow",
    is_flag=True,
    help="Replay iterates while a Recorder writes them, until the training closes it.",
)
@click.option(
    "--consume",
    is_flag=True,
    help="Delete each iterate once everything computed from it is on disk. The last one stays.",
)
@click.option(
    "--keep-every",
    type=int,
    metavar="K",
    help="With --consume: keep the iterates of every K-th step.",
)
@json_option
def command(checkpoints: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Allocate the loss change between consecutive CHECKPOINTS to every parameter.

    Run again, it resumes, adds missing losses, and replays new checkpoints at the end.

    CHECKPOINTS is a directory of checkpoints, a path with {step} in it
    (step{step}/model.safetensors, hf://ORG/NAME@step{step} with --steps), the cache of a hub
    (models--ORG--NAME), or several of these that hold one series. Remote files are cached, at most
    20 GB (LCA_CACHE_SIZE, LCA_CACHE).

    \b
    lca run checkpoints --task my_task.py
    lca run checkpoints --task my_task.py --loss all
    lca run checkpoints --task my_task.py --rule trapezoid --keep tensors --out quick.lca
    lca run checkpoints --task my_task.py --follow --consume
    lca run checkpoints --task my_task.py --cluster tls://head:8786 \\
        --tls-ca ca.pem --tls-cert me.pem --tls-key me.key

    \f

    Args:
        checkpoints: directories, or paths with {step} in them.
        as_json: prints a document in place of tables.
        options: of `lca_posthoc.run`, None where not given.
    """
    from ..findings import summary
    from ..replay.run import run
    from .summary import print_causes, print_directions, print_examples, print_summary

    with prints_to_stderr(), Display() as listen:
        opened = run(checkpoints, progress=listen, **options)
    names = list(options["losses"] or opened.manifest.provenance["task_losses"][:1])
    named = (
        opened
        if "all" in names
        else [loss for name in names for loss in opened.manifest.meant_by(name)]
    )
    summaries = {name: summary(opened[name]) for name in named}
    _say_unconverged(summaries)
    if as_json:
        print_json({"schema": 1, "losses": summaries})
        return
    print_summary(summaries, opened.path)
    print_causes(opened, summaries)
    print_directions(opened, summaries)
    print_examples(opened, summaries)
    _print_ways_on(opened.path)


def _print_ways_on(run: Path) -> None:
    """Print where a run is, with commands to copy that show it."""
    console = stdout()
    ways = "To write all findings into one page, report.html, or print this again:"
    print_words(f"\n{ways}", console)
    for name in ("report", "summary"):
        console.print(f"  lca {name} {quoted(run)}")
    console.print(f"results in {run}")


def _say_unconverged(summaries: dict[str, Summary]) -> None:
    """Warn of the segments of each loss that stay above the tolerance."""
    for name, figures in summaries.items():
        if figures["unconverged"]:
            say(
                f"loss {name!r}: {figures['unconverged']:,} of "
                f"{count(figures['segments'], 'segment')} "
                f"stay{'s' * (figures['unconverged'] == 1)} above the tolerance; see `converged` "
                "in steps"
            )
