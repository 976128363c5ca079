"""`lca plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from ..display import Display
from ..errors import InputError, amount
from ..progress import Stage
from ..text import safe
from .options import json_option, replay_options, workers_option
from .show import duration, print_json, say, stdout, table


@click.command()
@replay_options
@workers_option
@json_option
@click.option("--recording", type=int, metavar="STEPS", help="Before training: what saving every iterate would take.")
def command(checkpoints: str, as_json: bool, recording: int | None, **options: Any) -> None:
    """Say what `lca run` with the same options would cost, and probe the task.

    \b
    lca plan checkpoints --task my_task.py
    lca plan checkpoints --task my_task.py --loss all --rule trapezoid
    lca plan checkpoints --task my_task.py --recording 5000
    """
    if recording is not None:
        _of_recording(checkpoints, recording, as_json, **options)
        return
    from ..plan import plan

    if options["workers"] is not None and options["workers"] < 1:
        raise InputError(f"--workers must be 1 or more, got {options['workers']}.")
    keep = options["keep"] or "parameters"
    with Display(stages=True) as listen:
        found = plan(checkpoints, tell=lambda stage: listen(Stage(stage)), **options)
    for note in found.notes:
        say(note)
    if as_json:
        print_json({"schema": 1, **asdict(found)})
        return
    console = stdout()
    console.print(
        f"{found.segments:,} segments of {found.parameters:,} parameters on {found.device}, without refinement:"
    )
    rows = table("loss", "examples", "groups", "batch", "fastest", "largest", "evaluations", "each", "alone", "stored")
    for name, loss in found.losses.items():
        rows.add_row(
            Text(safe(name)),
            f"{loss.examples:,}",
            f"{loss.groups:,}" if loss.groups else "",
            f"{loss.batch_size:,}",
            f"{loss.fastest_batch_size:,}",
            f"{loss.largest_batch_size:,}",
            f"{loss.evaluations:,}",
            duration(loss.seconds_per_evaluation),
            duration(loss.seconds),
            amount(loss.bytes[keep]),
        )
    console.print(rows)
    shared = f", {duration(found.seconds / found.workers)} on {found.workers} workers" if found.workers > 1 else ""
    on_gpu = found.device == "cuda"
    whole = f"{found.seconds / 3600:.3g} device-hours" if on_gpu else f"{duration(found.seconds)} of one CPU core"
    console.print(f"evaluating all together: {whole}{shared} (start-up, reading and storing come on top)")
    sizes = ", ".join(f"--keep {each} {amount(size)}" for each, size in found.bytes.items())
    console.print(f"result after compression, about: {sizes}; free: {amount(found.free)}", markup=False)
    console.print(f"memory per worker: about {amount(found.memory)}")


def _of_recording(directory: str, count: int, as_json: bool, task: str, **others: Any) -> None:
    from ..plan import plan_recording

    called = {each.name: each.opts[0] for each in command.params}
    given = sorted(called[name] for name, value in others.items() if value not in (None, ()))
    if given:
        raise InputError(f"{', '.join(given)}: of a training that is yet to be recorded, only --task and --json count.")
    found = plan_recording(directory, task, count)
    if as_json:
        print_json({"schema": 1, **asdict(found)})
        return
    console = stdout()
    console.print(
        f"{found.iterates:,} iterates of {found.parameters:,} parameters ({found.tensors:,} tensors, buffers included), "
        f"{amount(found.bytes_each)} each: {amount(found.bytes)}; free: {amount(found.free)}",
        markup=False,
    )
    console.print(f"writing one took {duration(found.seconds_each)} here, flushing included: faster steps would wait")
    if not found.every:
        console.print("not even two iterates fit: record elsewhere")
    elif found.every > 1:
        console.print(f"they fit with Recorder(..., every={found.every}), or elsewhere")
