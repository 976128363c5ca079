"""`lca plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from ..base.text import safe
from ..errors import InputError, amount
from ..replay.display import Display
from ..replay.events import Stage
from .options import json_option, replay_options, workers_option
from .show import Table, duration, print_json, print_words, say, stdout, table

if TYPE_CHECKING:
    from ..replay.plan import Plan, RecordingPlan

_COLUMNS = (
    *("loss", "examples", "groups", "batch", "fastest", "largest"),
    *("evaluations", "each", "alone", "stored"),
)


@click.command()
@replay_options
@workers_option
@json_option
@click.option(
    "--recording",
    type=int,
    metavar="STEPS",
    help="Before training: estimate what saving STEPS iterates takes.",
)
def command(
    checkpoints: tuple[str, ...], as_json: bool, recording: int | None, **options: Any
) -> None:
    """Estimate what `lca run` with the same options costs, and probe the task.

    \b
    lca plan checkpoints --task my_task.py
    lca plan checkpoints --task my_task.py --loss all --rule trapezoid
    lca plan checkpoints --task my_task.py --recording 5000

    \f

    Args:
        checkpoints: directories, or paths with {step} in them.
        as_json: prints a document in place of tables.
        recording: how many iterates a training will save; None to plan a run.
        options: of `lca run`, None where not given.

    Raises:
        InputError: for several directories to record into, or fewer than one worker.
    """
    if recording is not None:
        directory, *more = checkpoints
        if more:
            raise InputError(
                "--recording takes one directory, in which training will save checkpoints."
            )
        _of_recording(directory, recording, as_json, **options)
        return
    from ..replay.plan import plan

    if options["workers"] is not None and options["workers"] < 1:
        raise InputError(f"--workers must be 1 or more, got {options['workers']}.")
    with Display(stages=True) as listen:
        planned = plan(checkpoints, tell=lambda stage: listen(Stage(stage)), **options)
    for note in planned.notes:
        say(note)
    if as_json:
        print_json({"schema": 1, **asdict(planned)})
    else:
        _print(planned, asked=options["keep"] not in (None, "auto"))


def _print(planned: Plan, *, asked: bool) -> None:
    """Print a row for each loss, and one for each level of `--keep`.

    Args:
        planned: what a run costs.
        asked: whether the user chose a level.
    """
    console = stdout()
    print_words(
        f"{planned.segments:,} segments of {planned.parameters:,} parameters on {planned.device}, "
        "without refinement:",
        console,
    )
    console.print(_losses(planned))
    console.print()
    console.print(_levels(planned, asked=asked))
    print_words(
        f"free: {amount(planned.free_memory)} of memory for each worker, beside what it already uses, "
        f"and {_space(planned.free)}",
        console,
    )
    print_words(
        "Memory and disk are estimates; disk is the space after compression. The time is that of "
        "evaluating all losses together, on one "
        f"{'GPU' if planned.device == 'cuda' else 'CPU core'}. Starting, reading checkpoints, "
        "adding up allocations and storing results take additional time.",
        console,
    )
    print_words(
        "An evaluation computes the gradient of a loss over all its examples, at one point. A run "
        "evaluates at the ends of segments, at the points between them that the rule uses, and "
        "on other paths if segments are long. The column 'each' has the time of one evaluation, "
        "'alone' the time of all evaluations of this loss if no other loss is computed, and "
        "'stored' the disk space of the loss at the chosen level of --keep.",
        console,
    )


def _space(free: int | None) -> str:
    return "the store reports no limit of space" if free is None else f"{amount(free)} on disk"


def _levels(planned: Plan, *, asked: bool) -> Table:
    several = planned.workers > 1
    shared = [f"on {planned.workers} workers"] if several else []
    rows = table("--keep", "memory a worker", "disk", "time", *shared, "", words=1)
    for keep, seconds in planned.seconds.items():
        rows.add_row(
            keep,
            amount(planned.memory[keep]),
            amount(planned.bytes[keep]),
            duration(seconds),
            *([duration(seconds / planned.workers)] if several else []),
            ("asked for" if asked else "auto takes this") if keep == planned.keep else "",
        )
    return rows


def _losses(planned: Plan) -> Table:
    rows = table(*_COLUMNS)
    for name, loss in planned.losses.items():
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
            amount(loss.bytes[planned.keep]),
        )
    return rows


def _of_recording(directory: str, count: int, as_json: bool, task: str, **others: Any) -> None:
    from ..replay.plan import plan_recording

    called = {option.name: option.opts[0] for option in command.params}
    without_effect = sorted(
        called[name] for name, value in others.items() if value not in (None, (), False)
    )
    if without_effect:
        raise InputError(f"{', '.join(without_effect)}: --recording uses only --task and --json.")
    planned = plan_recording(directory, task, count)
    if as_json:
        print_json({"schema": 1, **asdict(planned)})
    else:
        _print_recording(planned)


def _print_recording(planned: RecordingPlan) -> None:
    """Print what saving every iterate takes."""
    console = stdout()
    print_words(
        f"{planned.iterates:,} iterates of {planned.parameters:,} parameters ({planned.tensors:,} "
        f"tensors, buffers included), {amount(planned.bytes_each)} each: {amount(planned.bytes)}; "
        f"free: {amount(planned.free)}",
        console,
    )
    print_words(
        f"writing one took {duration(planned.seconds_each)} here, flushing included: training steps "
        "shorter than that wait",
        console,
    )
    if not planned.every:
        print_words("not even two iterates fit: record elsewhere", console)
    elif planned.every > 1:
        print_words(f"they fit with Recorder(..., every={planned.every}), or elsewhere", console)
