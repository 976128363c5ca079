"""`lca run`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .options import cluster_options, json_option, replay_options
from .show import duration, print_json, say, stderr, stdout

_SHOWN = 10  # failures, one by one


@click.command()
@replay_options
@cluster_options
@click.option("--dashboard", is_flag=True, help="Serve Dask's dashboard of local workers on loopback.")
@json_option
def command(checkpoints: str, as_json: bool, **options: Any) -> None:
    """Allocate the loss change between consecutive CHECKPOINTS to every parameter.

    Run again, it resumes, adds losses that are missing, and takes up new checkpoints at the end.

    \b
    lca run checkpoints --task my_task.py
    lca run checkpoints --task my_task.py --loss all
    lca run checkpoints --task my_task.py --rule trapezoid --keep tensors --out quick.lca
    lca run checkpoints --task my_task.py --cluster tls://head:8786 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key
    """
    from ..findings import summary
    from ..replay import run
    from .summary import print_summary

    with listener() as listen, contextlib.redirect_stdout(sys.stderr):
        opened = run(checkpoints, progress=listen, **options)
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
    stdout().print(f"\nresults in {opened.path}", markup=False)


@contextmanager
def listener() -> Iterator[Any]:
    """Shows events of a replay: a bar on a terminal; notes, retries and failures everywhere."""
    from ..progress import Note, Planned, SpanDone, SpanFailed, SpanRetried, SpanSlow

    console = stderr()
    columns = (
        TextColumn("replay"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("segments · {task.fields[speed]}worst residual {task.fields[worst]:.1e}{task.fields[trouble]} ·"),
        TimeElapsedColumn(),
        TextColumn("· left"),
        _Left(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("replay", total=None, worst=0.0, speed="", trouble="", due=None, visible=False)
        began = time.monotonic()
        count = {"spans": 0, "of": 0, "before": 0, "retried": 0, "failed": 0}

        def trouble() -> None:
            said = "".join(f" · {count[what]} {what}" for what in ("retried", "failed") if count[what])
            progress.update(bar, trouble=said)

        def listen(event: Any) -> None:
            nonlocal began
            state = progress.tasks[bar]
            if isinstance(event, Note):
                say(event.text)
            elif isinstance(event, Planned):
                began, count["of"], count["before"] = time.monotonic(), event.spans, event.total - event.pending
                speed = f"{event.workers} worker{'' if event.workers == 1 else 's'} · "
                done = event.total - event.pending
                progress.update(bar, total=event.total, completed=done, visible=True, speed=speed)
                if event.pending == 0:
                    say("nothing to do: every span is committed, and the task file is the one of the last run")
            elif isinstance(event, SpanDone):
                count["spans"] += 1
                worst = max(state.fields["worst"], event.worst_residual)
                done = int(state.completed) + event.segments * len(event.losses)
                rate = (done - count["before"]) / (time.monotonic() - began)
                each = f"{rate / max(1, event.workers):.3g} segments/s"
                workers = f"{event.workers} worker{'' if event.workers == 1 else 's'} at {each}"
                speed = f"{count['spans']}/{count['of']} spans · {workers} · "
                due = time.monotonic() + ((state.total or done) - done) / rate
                progress.update(bar, completed=done, worst=worst, speed=speed, due=due)
            elif isinstance(event, SpanRetried):
                count["retried"] += 1
                trouble()
                say(f"{_span(event)} is tried again: {event.message} ({event.worker})")
            elif isinstance(event, SpanSlow):
                doing = (
                    f"; it is in {' < '.join(reversed(event.doing[-3:]))}" if event.doing else "; it does not answer"
                )
                say(
                    f"{_span(event)} takes {duration(event.seconds)}, far longer than its peers, on worker {event.worker}{doing}"
                )
            elif isinstance(event, SpanFailed):
                count["failed"] += 1
                trouble()
                if count["failed"] <= _SHOWN:
                    say(f"{_span(event)} failed: {event.message}")
                elif count["failed"] == _SHOWN + 1:
                    say("more spans failed; log/run.jsonl in the run directory has them all")

        yield listen


class _Left(ProgressColumn):
    """The time left at the rate since work began; spans end in bunches, of which a moving rate makes nothing."""

    def render(self, task: Any) -> Text:
        due = task.fields["due"]
        left = "-:--:--" if due is None else str(timedelta(seconds=int(max(0.0, due - time.monotonic()))))
        return Text(left, style="progress.remaining")


def _span(event: Any) -> str:
    return f"span {event.span} (steps {event.first_step} to {event.last_step})"
