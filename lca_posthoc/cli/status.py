"""`lca status`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from ..base.text import count, safe
from ..errors import few
from .options import json_option
from .show import Table, duration, print_json, print_words, stdout, table

if TYPE_CHECKING:
    from ..results import LastRun, Run, Starting
    from ..results.run import Progress

_STOPPED = "stopped: run `lca run` again to finish"


@click.command()
@click.argument("run", type=click.Path())
@json_option
def command(run: str, as_json: bool) -> None:
    """Show the progress of RUN while it is prepared, while it runs, and after.

    \b
    lca status checkpoints.lca

    Finished work is read from commit markers. Work underway is read from reports of the workers,
    which are at most a few seconds old.

    \f

    Args:
        run: the path or URL of a run.
        as_json: prints a document in place of a table.

    Raises:
        InputError: if there is no run, and none is being prepared.
    """
    from ..checkpoints.paths import path_of
    from ..errors import InputError
    from ..results import last_run, open_run, starting

    preparing = starting(path_of(run))
    more: dict[str, object] = {} if preparing is None else {"preparing": asdict(preparing)}
    try:
        opened = open_run(run)
    except InputError:
        if preparing is None:
            raise
        if as_json:
            print_json({"schema": 1, "losses": {}, **more})
        else:
            print_words(f"{safe(run)} does not exist yet: {_preparing(preparing)}", stdout())
        return
    last = last_run(opened.path)
    by_loss = _status(opened, last)
    if as_json:
        losses = {name: status.document() for name, status in by_loss.items()}
        if (following := _following(by_loss, last)) is not None:
            more["following"] = {"waits_after": following.waits_after}
        print_json({"schema": 1, "losses": losses, **more})
    else:
        _print(opened, by_loss, last, preparing)


def _print(
    opened: Run, by_loss: dict[str, _Status], last: LastRun | None, preparing: Starting | None
) -> None:
    """Print a row for each loss, and a line about the driver."""
    console = stdout()
    following = _following(by_loss, last)
    stopped = _stopped_following(by_loss, last)
    console.print(_table(by_loss, follows=following is not None, stopped=stopped))
    if following is not None:
        print_words(_follows(following), console)
    if preparing is not None:
        print_words(f"a driver is about to resume it: {_preparing(preparing)}", console)
    elif following is not None and following.waits_after is not None:
        return
    elif last is not None and _stopped_following(by_loss, last):
        print_words(_after_following(opened), console)
    elif last is not None and any(status.progress["running"] for status in by_loss.values()):
        print_words(_pace(by_loss, last), console)
    elif last is not None and not all(status.progress["complete"] for status in by_loss.values()):
        print_words(_ending(last), console)


def _following(by_loss: dict[str, _Status], last: LastRun | None) -> LastRun | None:
    """Return the driver that replays iterates as a training records them; None where none does."""
    runs = any(status.progress["running"] for status in by_loss.values())
    return last if last is not None and runs and last.follows and last.ended is None else None


def _stopped_following(by_loss: dict[str, _Status], last: LastRun | None) -> bool:
    """Tell whether the last driver ended while following a recording."""
    runs = any(status.progress["running"] for status in by_loss.values())
    return last is not None and last.follows and not runs


def _after_following(opened: Run) -> str:
    """Describe the recording that the last driver followed, and what to do."""
    from ..checkpoints.recorded import read_sign

    root = Path(opened.manifest.root)
    sign = read_sign(root)
    stopped = f"it was stopped while following the recording in {safe(str(root))}"
    if sign is None:
        return f"{stopped}; no recorder is registered there now. `lca run` replays the iterates that exist"
    if sign.is_recording(root):
        return f"{stopped}; the recorder ({safe(sign.who)}) is still running. The same `lca run` follows it again"
    if sign.state == "closed":
        return f"{stopped}; the recorder has closed since. The same `lca run` replays the rest"
    return (
        f"{stopped}; the recorder ({safe(sign.who)}) ended without closing. Resume the training "
        "into the directory and run the same `lca run`, or leave --follow out to replay only the "
        "iterates that exist"
    )


def _follows(last: LastRun) -> str:
    waits = (
        ""
        if last.waits_after is None
        else f"; it has replayed up to step {last.waits_after} and waits for more"
    )
    return f"it follows a recorder{waits}"


def _table(by_loss: dict[str, _Status], *, follows: bool, stopped: bool) -> Table:
    rows = table("loss", "spans", "segments", "worker time", "steps done", "state", words=2)
    for name, status in by_loss.items():
        loss = status.progress
        underway = (
            f" + {loss['segments_underway']:.1f} underway" if loss["segments_underway"] else ""
        )
        rows.add_row(
            Text(safe(name)),
            f"{loss['spans_done']} / {loss['spans']}",
            f"{loss['segments_done']} / {loss['segments']}{underway}",
            duration(loss["seconds"]),
            _steps(loss),
            _state(name, status, follows=follows, stopped=stopped),
        )
    return rows


def _steps(loss: Progress) -> str:
    """Return which steps are finished, out of which."""
    stretches = [f"{first}–{last}" for first, last in loss["steps_done"]]
    whole = f"{loss['first_step']}–{loss['last_step']}"
    return whole if stretches == [whole] else f"{few(stretches) or 'none'} of {whole}"


def _state(name: str, status: _Status, *, follows: bool, stopped: bool) -> str:
    loss = status.progress
    if loss["complete"] and stopped:
        return "complete so far; stopped following"
    if loss["complete"] and follows:
        return "complete so far; following"
    if loss["complete"]:
        return (
            f"complete so far; {count(loss['behind'], 'more segment')} with --loss {safe(name)}"
            if loss["behind"]
            else "complete"
        )
    if loss["running"]:
        return "running"
    if steps := status.not_finite:
        where = f"steps {few([*map(str, steps)])}" if len(steps) > 1 else f"step {steps[0]}"
        return f"done except for NaN or Inf at {where}"
    return _STOPPED


def _not_finite(missing: list[int], last: LastRun | None) -> list[int]:
    """Return the steps of checkpoints with NaN or Inf, where these alone keep spans from finishing."""
    failed = {} if last is None or last.ended is None else last.not_finite
    return sorted({failed[span] for span in missing}) if set(missing) <= set(failed) else []


@dataclass(frozen=True, kw_only=True)
class _Status:
    """The progress of a loss, and its speed.

    Attributes:
        progress: from the commit markers.
        not_finite: the steps of the checkpoints with NaN or Inf, where these alone keep the loss
            from being complete.
        segments_per_second: of all losses together; None where the loss is not running.
        seconds_left: of all losses together; None where the loss is not running.
    """

    progress: Progress
    not_finite: list[int]
    segments_per_second: float | None = None
    seconds_left: float | None = None

    def document(self) -> dict[str, object]:
        """Return the entry of the loss in `lca status --json`."""
        return {
            **{name: value for name, value in self.progress.items() if name != "missing"},
            "segments_per_second": self.segments_per_second,
            "seconds_left": self.seconds_left,
            "not_finite": self.not_finite,
        }


def _status(opened: Run, last: LastRun | None) -> dict[str, _Status]:
    """Return the progress of each loss of a run."""
    from ..results import underway

    computing = sum(report.segments for report in underway(opened.path))
    rate = None if last is None or last.ended is not None else last.rate(computing)
    by_loss = {}
    for name, results in opened.items():
        progress = results.progress()
        status = _Status(progress=progress, not_finite=_not_finite(progress["missing"], last))
        working = progress["running"] and not progress["complete"]
        if last is not None and rate is not None and working:
            left = max(0.0, last.pending - last.done - computing) / rate
            status = replace(status, segments_per_second=rate, seconds_left=left)
        by_loss[name] = status
    return by_loss


def _preparing(state: Starting) -> str:
    now = time.time()
    return (
        f"{safe(state.stage)}, for {duration(max(0, int(now - state.since)))} now (begun "
        f"{duration(max(0, int(now - state.began)))} ago by process {int(state.pid)} on "
        f"{safe(state.host)})"
    )


def _pace(by_loss: dict[str, _Status], last: LastRun) -> str:
    since = f"for {duration(max(0, int(time.time() - last.began)))} now"
    for status in by_loss.values():
        if status.segments_per_second is not None and status.seconds_left is not None:
            return (
                f"running {since}: {status.segments_per_second:.3g} segments/s (each loss "
                f"counted), about {duration(status.seconds_left)} left"
            )
    return f"running {since}; no segment is done yet"


def _ending(last: LastRun) -> str:
    if last.ended is None:
        return "its driver was killed, or lost its machine; the same `lca run` resumes it"
    if not last.ended:
        return (
            "its last driver finished what it was asked for; `lca run` with the missing losses "
            "resumes it"
        )
    return f"the last driver ended with {safe(last.ended)}"
