"""`lca run`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .options import json_option, replay_options
from .show import print_json, say, stderr, stdout


@click.command()
@replay_options
@click.option("--cluster", default="local", show_default=True, metavar="KIND", help="Where work runs: local or inline.")
@json_option
def command(checkpoints: str, cluster: str, as_json: bool, **options: Any) -> None:
    """Allocate the loss change between consecutive CHECKPOINTS to every parameter.

    Run again, it resumes, adds losses that are missing, and takes up new checkpoints at the end.

    \b
    lca run checkpoints --task my_task.py
    lca run checkpoints --task my_task.py --loss all
    lca run checkpoints --task my_task.py --rule trapezoid --keep tensors --out quick.lca
    """
    from ..findings import summary
    from ..replay import run
    from .summary import print_summary

    with listener() as listen, contextlib.redirect_stdout(sys.stderr):
        opened = run(checkpoints, cluster=cluster, progress=listen, **options)
    asked = list(options["losses"] or opened.manifest.provenance["task_losses"][:1])
    found = {name: summary(opened[name]) for name in (opened if "all" in asked else asked)}
    for name, each in found.items():
        if each["unconverged"]:
            say(
                f"loss {name!r}: {each['unconverged']} of {each['segments']} segments stay above the tolerance; see `converged` in steps"
            )
    if as_json:
        print_json({"schema": 1, "losses": found})
        return
    print_summary(found)
    stdout().print(f"\nwrote {opened.path}", markup=False)


@contextmanager
def listener() -> Iterator[Any]:
    """Shows events of a replay: a bar on a terminal, notes and failures everywhere."""
    from ..replay import Note, Planned, SpanDone, SpanFailed

    console = stderr()
    columns = (
        TextColumn("replay"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("segments · {task.fields[speed]}worst residual {task.fields[worst]:.1e} ·"),
        TimeElapsedColumn(),
        TextColumn("· left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("replay", total=None, worst=0.0, speed="", visible=False)

        def listen(event: Any) -> None:
            state = progress.tasks[bar]
            if isinstance(event, Note):
                say(event.text)
            elif isinstance(event, Planned):
                progress.update(bar, total=event.total, completed=event.total - event.pending, visible=True)
                if event.pending == 0:
                    say("nothing to do: every span is committed, and the task file is the one of the last run")
            elif isinstance(event, SpanDone):
                worst = max(state.fields["worst"], event.worst_residual)
                speed = f"{state.speed:.3g} segments/s · " if state.speed else ""
                progress.update(bar, advance=event.segments * len(event.losses), worst=worst, speed=speed)
            elif isinstance(event, SpanFailed):
                say(f"span {event.span} (steps {event.first_step} to {event.last_step}) failed: {event.message}")

        yield listen
