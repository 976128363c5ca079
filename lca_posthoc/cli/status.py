"""`lca status`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from ..display import wrapped
from ..errors import few
from ..text import count, safe
from .options import json_option
from .show import duration, print_json, stdout, table

if TYPE_CHECKING:
    from ..store import LastRun, Run, Starting

_STOPPED = "stopped: run `lca run` again to finish"


@click.command()
@click.argument("run", type=click.Path())
@json_option
def command(run: str, as_json: bool) -> None:
    """Say how far RUN is: while it is prepared, while it runs, and after.

    \b
    lca status checkpoints.lca

    What is done is read from the commit markers, what is underway from reports of the workers, at
    most a few seconds old.
    """
    from ..errors import InputError
    from ..store import last_run, open_run, starting

    preparing = starting(Path(run))
    try:
        opened = open_run(run)
    except InputError:
        if preparing is None:
            raise
        if as_json:
            print_json({"schema": 1, "losses": {}, "preparing": asdict(preparing)})
        else:
            stdout().print(f"{safe(run)} is not there yet: {_preparing(preparing)}")
        return
    last = last_run(opened.path)
    progress = _progress(opened, last)
    if as_json:
        more = {} if preparing is None else {"preparing": asdict(preparing)}
        print_json({"schema": 1, "losses": progress, **more})
        return
    rows = table("loss", "spans", "segments", "worker time", "steps done", "state", words=2)
    for name, loss in progress.items():
        underway = (
            f" + {loss['segments_underway']:.1f} underway" if loss["segments_underway"] else ""
        )
        rows.add_row(
            Text(safe(name)),
            f"{loss['spans_done']} / {loss['spans']}",
            f"{loss['segments_done']} / {loss['segments']}{underway}",
            duration(loss["seconds"]),
            _steps(loss),
            _state(name, loss),
        )
    console = stdout()
    console.print(rows)
    running = any(loss["running"] for loss in progress.values())
    incomplete = not all(loss["complete"] for loss in progress.values())
    if preparing is not None:
        console.print(
            Text(wrapped(f"a driver is about to go on with it: {_preparing(preparing)}", console))
        )
    elif running and last is not None:
        console.print(Text(wrapped(_pace(progress, last), console)))
    elif incomplete and last is not None:
        console.print(Text(wrapped(_ending(last), console)))


def _steps(loss: dict[str, Any]) -> str:
    """Return which steps are done, and of which."""
    stretches = [f"{first}–{last}" for first, last in loss["steps_done"]]
    whole = f"{loss['first_step']}–{loss['last_step']}"
    return whole if stretches == [whole] else f"{few(stretches) or 'none'} of {whole}"


def _state(name: str, loss: dict[str, Any]) -> str:
    if loss["complete"]:
        return (
            f"complete so far; {count(loss['behind'], 'more segment')} with --loss {safe(name)}"
            if loss["behind"]
            else "complete"
        )
    if loss["running"]:
        return "running"
    if steps := loss["not_finite"]:
        where = f"steps {few([*map(str, steps)])}" if len(steps) > 1 else f"step {steps[0]}"
        return f"done but for NaN or Inf at {where}"
    return _STOPPED


def _not_finite(missing: list[int], last: LastRun | None) -> list[int]:
    """Return the steps of checkpoints whose NaN or Inf keeps all missing spans from being replayed;
    none where one misses otherwise.
    """
    failed = {} if last is None or last.ended is None else last.not_finite
    return sorted({failed[span] for span in missing}) if set(missing) <= set(failed) else []


def _progress(opened: Run, last: LastRun | None) -> dict[str, dict[str, Any]]:
    """Return how far each loss is; of a running one also segments per second, and seconds left, of
    all losses together.

    `not_finite` are the steps of the checkpoints with NaN or Inf where these alone keep the loss
    from being complete.
    """
    from ..store import underway

    progress = {name: results.progress() for name, results in opened.items()}
    computing = sum(report.segments for report in underway(opened.path))
    for loss in progress.values():
        loss["segments_per_second"] = loss["seconds_left"] = None
        loss["not_finite"] = _not_finite(loss.pop("missing"), last)
        if loss["running"] and not loss["complete"] and last is not None and last.ended is None:
            rate = last.rate(computing)
            if rate is not None:
                loss["segments_per_second"] = rate
                loss["seconds_left"] = max(0.0, last.pending - last.done - computing) / rate
    return progress


def _preparing(state: Starting) -> str:
    now = time.time()
    return (
        f"{safe(state.stage)}, for {duration(max(0, int(now - state.since)))} now (begun "
        f"{duration(max(0, int(now - state.began)))} "
        f"ago by process {int(state.pid)} on {safe(state.host)})"
    )


def _pace(progress: dict[str, dict[str, Any]], last: LastRun) -> str:
    rates = [loss for loss in progress.values() if loss["segments_per_second"] is not None]
    since = f"for {duration(max(0, int(time.time() - last.began)))} now"
    if not rates:
        return f"running {since}; no segment is done yet"
    return (
        f"running {since}: {rates[0]['segments_per_second']:.3g} segments/s (each loss counted), "
        f"about "
        f"{duration(rates[0]['seconds_left'])} left"
    )


def _ending(last: LastRun) -> str:
    if last.ended is None:
        return (
            "its driver was killed, or lost its machine; the same `lca run` goes on where it "
            "stopped"
        )
    if not last.ended:
        return (
            "its last driver did what it was asked for; `lca run` with the losses that are missing "
            "goes on"
        )
    return f"the last driver ended with {safe(last.ended)}"
