"""Replay a training: `lca run` calls `run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import results
from ..checkpoints.paths import is_remote, path_of
from ..checkpoints.places import Where, places_of
from ..cluster import ClusterConfig
from ..errors import InputError
from ..results import Run
from ..tasks.task import Task, pack_task
from .display import listening
from .driver import Driver, Job, is_durable
from .events import Listener, Log
from .parts import PartsAsked


def run(
    checkpoints: Where,
    task: str | Path | Task,
    *,
    losses: Sequence[str] | None = None,
    out: str | Path | None = None,
    rule: str | None = None,
    tolerance: float | str | None = None,
    allocation_tolerance: float | str | None = None,
    keep: str | None = None,
    shards: int | str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    precision_check: str | None = None,
    norm_stats: str | None = None,
    tensors: Sequence[str] = (),
    subset: Sequence[str] = (),
    causes: bool = False,
    signal: str | None = None,
    along: str | Path | None = None,
    path_band: str | None = None,
    steps: str | None = None,
    segments: str | None = None,
    pattern: str | None = None,
    rename: Sequence[str] = (),
    cluster: str = "local",
    workers: int | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    insecure: bool = False,
    dashboard: bool = False,
    durability: str = "full",
    ignore_space: bool = False,
    span: int | None = None,
    follow: bool = False,
    consume: bool = False,
    keep_every: int | None = None,
    progress: Listener | None = None,
) -> Run:
    """Allocate the loss change of every segment to every parameter; run again, it resumes.

    Args:
        checkpoints: directory of safetensors iterates, a path with `{step}` in it such as
            `ROOT/step{step}/model.safetensors`, a hub's cache, or a list of such places that hold
            one series together; a URL of fsspec's, such as `s3://…`, is read
            through its driver.
        task: `FILE`, `FILE:FUNCTION`, `pkg.module:FUNCTION`, or a Task.
        losses: names of the task's losses; None for its first, `["all"]` for every one.
        out: the run directory; `CHECKPOINTS.lca` by default.
        rule: "simpson" (default), "trapezoid", or fixed: "left", "midpoint", "gauss-2", "gauss-3".
        tolerance: bound on |residual| per segment and loss, in units of loss (default 1e-3, inf for
            bfloat16; inf never refines), or a share of each loss at the first checkpoint, such as
            "0.1%".
        allocation_tolerance: bound on the allocation's own L1 error as well, written alike (default
            inf).
        keep: "tensors", "units", "statistics" or "parameters"; each includes those before it. By
            default the highest that fits the memory of a worker and half of the free space.
        shards: at keep "tensors" or "units", into how many shards the data of every segment is cut,
            so that few segments keep many workers busy. By default one for each worker where
            segments are few, else 1, which cuts nothing. Recorded: results never depend on how
            many workers there are later.
        batch_size: examples per batch; a deterministic choice by default.
        device: "cuda" or "cpu"; by default a GPU where there is one.
        precision: "float32" (default), "tf32", "bfloat16" or "float64".
        precision_check: the examples on which its error is measured: "sample" (default) or "full".
        norm_stats: "running" (default), "batch" or "recalibrated".
        tensors: patterns (`*`, `?`) of the tensors whose allocation is kept; the sum of the others
            is kept as one remainder.
        subset: `[SPLIT=]A:B`, `[SPLIT=]I,J,K` or `[SPLIT=]FRACTION@SEED`: the examples of a split to
            evaluate losses on; each split once.
        causes: True to split each loss's allocation by what moved the weights: signal, noise,
            momentum, decay and rest, from what a recorder wrote of the optimiser.
        signal: the training loss, whose full gradient is the signal; by default the first of
            `losses`. It is replayed too.
        along: a file of directions, written by `lca basis`; also allocates the loss change to each
            of them.
        path_band: "on" to measure how much another path through the same checkpoints would change, on
            segments longer than one step, at one to two more evaluations on each; "off". By
            default on where there are such segments.
        steps: training steps: `A:B[:K]`, single ones, or several of both with commas between
            them.
        segments: `FRACTION@SEED`, such as "0.1@7": a random part of the segments, for totals with
            standard errors. A larger fraction of the same seed adds to what is there.
        pattern: regular expression with a group `step` for names of checkpoints.
        rename: `OLD=NEW` pairs for tensor names.
        cluster: "local", "inline", or a scheduler: `tcp://HOST:PORT`, `tls://HOST:PORT`,
            `file:SCHEDULER.json`.
        workers: local workers, by default one per GPU, or one per core; for a scheduler, how many to
            wait for.
        tls_ca: certificate authority (PEM) for `tls://`.
        tls_cert: this user's certificate (PEM).
        tls_key: its key (PEM).
        insecure: use a cluster whose listeners are open to the network without TLS.
        dashboard: serve Dask's dashboard for local workers on loopback.
        durability: "full" (default: every span is flushed to disk before it counts) or "none"
            (survives kills, but no power cut).
        ignore_space: start even if the result, estimated after compression, does not fit into the
            free space.
        span: segments per span, a power of two; decides how work is cut, never a result.
        follow: replay iterates while a `Recorder` writes them, until the training closes it.
        consume: delete each iterate once everything computed from it is on disk; afterwards no other
            loss can be computed on its steps. The last one stays.
        keep_every: under `consume`, iterates at multiples of this step stay.
        progress: called with every event, and nothing else is shown; `lca_posthoc.replay.events.silent`
            shows nothing at all. By default notes, retries and failures are warnings
            (`lca_posthoc.errors.LCAWarning`), and progress is a bar on a terminal or in a
            notebook, elsewhere a line a minute on stderr.

    Returns:
        The run, opened.

    Raises:
        InputError: for anything wrong before the first evaluation.
        SpanError: if spans failed; the others are complete.
        ResourceError: if workers, a GPU or space are missing.
        Interrupted: after Ctrl-C or SIGTERM, once the spans in flight are committed; it is a
            `KeyboardInterrupt` too.
    """
    asked: dict[str, object] = {
        "rule": rule,
        "tolerance": tolerance,
        "allocation_tolerance": allocation_tolerance,
        "keep": keep,
        "shards": shards,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "precision_check": precision_check,
        "norm_stats": norm_stats,
        "tensors": tensors,
        "subset": subset,
        "signal": signal,
        "path_band": path_band,
        "steps": steps,
        "segments": segments,
        "pattern": pattern,
        "rename": rename,
    }
    if span is not None and (span < 1 or span & (span - 1)):
        raise InputError(f"span must be a power of two, got {span}.")
    if isinstance(losses, str):
        raise InputError(f"losses must be a list of names, such as [{losses!r}], got {losses!r}.")
    if keep_every is not None and not consume:
        raise InputError(
            "--keep-every selects the iterates that --consume keeps. Give both or neither."
        )
    where = ClusterConfig(
        kind=cluster,
        workers=workers,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        dashboard=dashboard,
    )
    path = path_of(out) if out is not None else default_out(checkpoints)
    durable = is_durable(durability)
    with listening(progress) as listener:
        log = Log(listener)
        entry, data = pack_task(task)
        job = Job(
            checkpoints=checkpoints,
            task=entry,
            data=data,
            losses=list(losses or []),
            path=path,
            asked=asked,
            parts=PartsAsked(causes=causes or signal is not None, along=along),
            span=span,
            durable=durable,
            ignore_space=ignore_space,
            follow=follow,
            consume=consume,
            keep_every=keep_every,
        )
        Driver(job, log).run(where)
    return results.open_run(path)


def default_out(checkpoints: Where) -> Path:
    """Return the default path of a run: beside the checkpoints, with `.lca` added.

    Raises:
        InputError: if the checkpoints are remote, or in several places.
    """
    places = places_of(checkpoints)
    directory = places[0].root
    if is_remote(directory):
        raise InputError(
            f"{places[0]} is remote: name a directory or a writable URL for the results with "
            "--out RUN."
        )
    if len(places) > 1:
        raise InputError(
            f"the checkpoints lie in {len(places)} places: name a directory for the results with "
            "--out RUN."
        )
    directory = directory.resolve() if directory.name in ("", "..") else directory
    return directory.with_name(f"{directory.name}.lca")
