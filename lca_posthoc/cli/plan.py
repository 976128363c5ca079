"""`lca plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from ..errors import InputError, amount
from .options import json_option, replay_options
from .show import duration, print_json, safe, say, stdout, table


@click.command()
@replay_options
@json_option
def command(checkpoints: str, as_json: bool, **options: Any) -> None:
    """Say what `lca run` with the same options would cost, and probe the task.

    \b
    lca plan checkpoints --task my_task.py
    lca plan checkpoints --task my_task.py --loss all --rule trapezoid
    """
    from ..plan import plan

    if options["workers"] is not None and options["workers"] < 1:
        raise InputError(f"--workers must be 1 or more, got {options['workers']}.")
    workers = options.pop("workers") or 1
    found = plan(checkpoints, **options)
    for note in found.notes:
        say(note)
    if as_json:
        print_json({"schema": 1, **asdict(found)})
        return
    console = stdout()
    console.print(
        f"{found.segments:,} segments of {found.parameters:,} parameters on {found.device}, without refinement:"
    )
    rows = table(
        "loss",
        "examples",
        "batch",
        "evaluations",
        "each",
        f"evaluating on {workers} worker{'s' if workers > 1 else ''}",
    )
    for name, loss in found.losses.items():
        rows.add_row(
            Text(safe(name)),
            f"{loss.examples:,}",
            f"{loss.batch_size:,}",
            f"{loss.evaluations:,}",
            duration(loss.seconds_per_evaluation),
            duration(loss.seconds / workers),
        )
    console.print(rows)
    hours = sum(loss.seconds for loss in found.losses.values()) / 3600
    console.print(f"device-hours: {hours:.3g} (start-up, reading and storing come on top)")
    sizes = ", ".join(f"--keep {keep} {amount(size)}" for keep, size in found.bytes.items())
    console.print(f"result before compression: {sizes}; free: {amount(found.free)}", markup=False)
