"""`lca status`."""

from __future__ import annotations

import click
from rich.text import Text

from .options import json_option
from .show import duration, print_json, safe, stdout, table


@click.command()
@click.argument("run", type=click.Path())
@json_option
def command(run: str, as_json: bool) -> None:
    """Say how far RUN is, from its commit markers alone; while it runs and after.

    \b
    lca status checkpoints.lca
    """
    from ..store import open_run

    found = {name: results.progress() for name, results in open_run(run).items()}
    if as_json:
        print_json({"schema": 1, "losses": found})
        return
    rows = table("loss", "spans", "segments", "training steps", "worker time", "state")
    for name, each in found.items():
        rows.add_row(
            Text(safe(name)),
            f"{each['spans_done']} / {each['spans']}",
            f"{each['segments_done']} / {each['segments']}",
            f"{each['first_step']}–{each['last_step']}",
            duration(each["seconds"]),
            (
                "complete"
                if not each["behind"]
                else f"complete so far; {each['behind']} more segments with --loss {safe(name)}"
            )
            if each["complete"]
            else "running"
            if each["running"]
            else "stopped: run `lca run` again to finish",
        )
    stdout().print(rows)
