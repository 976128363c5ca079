"""Drive a replay: create or resume a run, send pending spans to workers, receive commits, repair,
drain.

`lca run` calls `run`, and `lca repair` calls `repair`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import results
from ..base.text import count, duration, quoted
from ..checkpoints.paths import is_remote, path_of
from ..checkpoints.places import Where, common_root, found_again, places_of
from ..checkpoints.trajectory import NOTHING_CONSUMED, Trajectory, open_trajectory
from ..cluster import (
    Cluster,
    ClusterConfig,
    Done,
    Lost,
    Outcome,
    Refused,
    Retried,
    Slow,
    Waiting,
    open_cluster,
)
from ..errors import (
    InputError,
    Interrupted,
    LCAError,
    NotFiniteError,
    ResourceError,
    SpanError,
    amount,
    few,
)
from ..numerics.settings import Settings, on_device, resolve
from ..results import Identity, LossRecord, Manifest, Run, RunWriter
from ..tasks.task import Entry, Task, digest, pack_task
from .consume import (
    Consumer,
    consumed_of,
    looked_back_at,
    refuse_a_part,
    refuse_gone,
    refuse_options,
    refuse_other_files,
    refuse_others,
)
from .display import listening
from .events import (
    Following,
    Listener,
    Log,
    Note,
    Planned,
    SpanDone,
    SpanFailed,
    SpanRetried,
    SpanSlow,
    Stage,
    Stopping,
)
from .follow import Follower, refuse_remote
from .parts import PartsAsked
from .prepare import Destination, Preparation, ask, calibrated, check_workers, prepare, relative
from .requests import (
    CompressionsRequest,
    Failure,
    LossSpan,
    RunRequest,
    ShardRequest,
    SpanAnswer,
    SpanRequest,
    answered,
    to_plain,
    work_of,
)
from .resume_checks import same_checkpoints, same_loss, same_tensors, same_values
from .shards import is_cut
from .stopping import Stop, stopped_by_signals
from .worker import committed, committed_result, compressions, replay_in_shards, replay_span

if TYPE_CHECKING:
    from .shard_queue import ShardQueue

# --- the run --------------------------------------------------------------------------------------


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
    durable = _durable(durability)
    with listening(progress) as listener:
        log = Log(listener)
        entry, data = pack_task(task)
        job = _Job(
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
        _Driver(job, log).run(where)
    return results.open_run(path)


@dataclass(frozen=True)
class Repaired:
    """The outcome of a repair: the damage, the recomputed spans by loss, and the number of leftover
    files removed.
    """

    damage: list[results.Damage]
    spans: dict[str, list[int]]
    leftovers: int


def repair(
    path: str | Path,
    task: str | Path | Task,
    *,
    checkpoints: str | Path | None = None,
    cluster: str = "local",
    workers: int | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    insecure: bool = False,
    durability: str = "full",
    progress: Listener | None = None,
) -> Repaired:
    """Recompute exactly the damaged spans of a run, restore its metadata, and remove what killed
    writers left.

    Args:
        path: the run directory.
        task: as for `run`; its losses must be those of the run.
        checkpoints: where the checkpoints are now; by default their recorded place.
        cluster: as for `run`, with the options that belong to it.
        workers: as for `run`.
        tls_ca: as for `run`.
        tls_cert: as for `run`.
        tls_key: as for `run`.
        insecure: as for `run`.
        durability: as for `run`.
        progress: as for `run`.

    Raises:
        InputError: if `path` is no run, or the task or the checkpoints are not those of the run.
        SpanError: if damaged spans could not be recomputed.
    """
    place, durable = path_of(path), _durable(durability)
    where = ClusterConfig(
        kind=cluster,
        workers=workers,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
    )
    entry, data = pack_task(task)
    manifest = results.read_manifest(place)
    damage, leftovers = _cleaned(place, durable)
    losses = {
        part.loss: True
        for part in damage
        if part.loss is not None and (part.span, part.window) != (None, None)
    }
    root = checkpoints if checkpoints is not None else manifest.root
    with listening(progress) as listener:
        job = _Job(
            checkpoints=found_again(root, manifest.settings.get("places", ())),
            task=entry,
            data=data,
            losses=list(losses),
            path=place,
            asked={},
            span=None,
            durable=durable,
            damage=damage,
        )
        driver = _Driver(job, Log(listener))
        if losses:
            driver.run(where)
    return Repaired(damage, driver.repair_spans or {}, leftovers)


def _cleaned(path: Path, durable: bool) -> tuple[list[results.Damage], int]:
    """Restore a run's metadata and remove what killed writers left; return its damage, and how many
    files were removed.
    """
    with results.hold(path, durable=durable) as lock:
        writer = RunWriter.open(path, durable)
        problems = list(results.verify(path))
        writer.restore_metadata()
        writer.sweep()
        lock.unclean = False
        leftovers = [problem for problem in problems if isinstance(problem, results.Leftover)]
        writer.remove_leftovers(leftovers)
    damage = [problem for problem in problems if isinstance(problem, results.Damage)]
    return damage, len(leftovers)


def _durable(durability: str) -> bool:
    if durability not in DURABILITY:
        raise InputError(f"--durability {durability!r} is not one of {', '.join(DURABILITY)}.")
    return durability == "full"


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


DURABILITY = ("full", "none")
_BLOCK = 4096  # bytes; most file systems round the size of a file to multiples

# --- one call -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The request to `run` or `repair`.

    Attributes:
        checkpoints: their directory or places.
        task: where the task is.
        data: its source, for workers.
        losses: their names; empty for the first, `["all"]` for every one.
        path: of the run.
        asked: settings by name, as the caller gave them.
        span: segments per span; None to choose.
        durable: whether to flush a span to disk before it counts.
        damage: to recompute; None if this is no repair.
        ignore_space: whether to start with too little space.
        parts: the parts of the motion that are asked for.
        follow: whether to replay iterates while a training records them.
        consume: whether to remove iterates once they are replayed.
        keep_every: iterates at multiples of this step stay.
    """

    checkpoints: Where
    task: Entry
    data: bytes
    losses: list[str]
    path: Path
    asked: dict[str, object]
    span: int | None
    durable: bool
    damage: list[results.Damage] | None = None
    ignore_space: bool = False
    parts: PartsAsked = field(default_factory=PartsAsked)
    follow: bool = False
    consume: bool = False
    keep_every: int | None = None

    @property
    def root(self) -> Path:
        """Return the directory that holds all checkpoints."""
        return common_root(places_of(self.checkpoints))

    def refuse_options(self, settings: Settings) -> None:
        """Reject `--follow` and `--consume` where they are impossible."""
        if self.follow:
            refuse_remote(self.checkpoints)
            refuse_a_part(settings, "--follow")
        if self.consume:
            refuse_options(
                self.checkpoints, settings, durable=self.durable, keep_every=self.keep_every
            )

    def recorded(self) -> Manifest | None:
        """Return the manifest of the run; None before it exists."""
        return results.read_manifest(self.path) if results.exists(self.path) else None


class _Status:
    """The state of a job, as its listener and `lca status` see it.

    Attributes:
        tell: passes an event on.
        announcement: the file beside the run, while it is prepared.
        workers: that replay spans; 0 before the first span.
        span_seconds: of the last span.
    """

    def __init__(self, tell: Log) -> None:
        self.tell = tell
        self.announcement: results.Announcement | None = None
        self.workers = 0
        self.span_seconds: float | None = None
        self._stage = ""
        self._on_signal = ""  # the effect of a first signal while waiting for iterates
        self._said: set[str] = set()

    def begin(self, stage: str) -> None:
        """Report a stage that begins."""
        self._stage, self._on_signal = stage, ""
        if self.announcement is not None:
            self.announcement.stage(stage)
        self.tell(Stage(stage))  # a reader of the event finds the announcement

    def wait(self, stage: str, on_signal: str) -> None:
        """Report a wait for iterates; a first signal then has the effect that `on_signal`
        describes.
        """
        self.begin(stage)
        self._on_signal = on_signal

    def note(self, notes: Iterable[str]) -> None:
        """Report what the user should know, each thing once."""
        for text in notes:
            if text not in self._said:
                self._said.add(text)
                self.tell(Note(text))

    def plan(self, planned: Planned) -> None:
        """Report that the spans begin, or that there are none."""
        if self.announcement is not None:
            self.announcement.end()
        self._on_signal = ""
        self.tell(planned)
        self.workers = planned.workers if planned.pending else 0

    def say_stopping(self, number: int) -> None:
        """Report what a first signal waits for, and how to stop at once."""
        if self._on_signal:
            self.tell(Stopping(f"stopping to wait: {self._on_signal}."))
            return
        waits, lost = (
            (
                self._span_ends(),
                "committed results are kept, spans underway are recomputed next time",
            )
            if self.workers
            else (f"when this is done: {self._stage}", "no span has begun")
        )
        again = "Press Ctrl-C again" if number == signal.SIGINT else "Send SIGTERM again"
        with contextlib.suppress(OSError):  # of the log, where the run's file system is unreachable
            self.tell(Stopping(f"stopping {waits}. {again} to stop now: {lost}."))

    def _span_ends(self) -> str:
        on = f" on {self.workers} workers" if self.workers > 1 else ""
        took = (
            ""
            if self.span_seconds is None
            else f" (the last one took {duration(self.span_seconds)})"
        )
        return (
            f"when the span{'s' if on else ''} underway{on} {'are' if on else 'is'} committed{took}"
        )


class _Driver:
    """Drives one call of `run` or `repair`, from a trajectory and a task to a complete run
    directory.

    Attributes:
        repair_spans: in a repair, the spans to recompute, by loss.
    """

    def __init__(self, job: _Job, tell: Log) -> None:
        self._job, self._status = job, _Status(tell)
        self.repair_spans: dict[str, list[int]] | None = None
        self._follower: Follower | None = None

    def run(self, where: ClusterConfig) -> None:
        """Run the job on a cluster."""
        where.check()
        status = self._status
        with (
            stopped_by_signals(status.say_stopping) as stop,
            results.announced(self._job.path) as status.announcement,
            _named_disk_errors(),
        ):
            self._run(where, stop)

    def _run(self, where: ClusterConfig, stop: Stop) -> None:
        job, status, recorded = self._job, self._status, self._job.recorded()
        settings = resolve(job.asked, recorded.settings if recorded else None)
        job.refuse_options(settings)
        if job.follow or job.consume:  # other paths would depend on checkpoints that come and go
            settings = {**settings, "path_band": "off"}
        if recorded is not None:
            job.parts.refuse_new(recorded.settings)
        if job.follow:
            self._follower = self._following(stop, settings, recorded)
        status.begin("reading the headers of the checkpoints")
        trajectory = self._trajectory(settings, recorded)
        status.note(trajectory.notes)
        if job.consume:
            refuse_other_files(trajectory)
        if trajectory.places and recorded is None:
            settings = {**settings, "places": list(trajectory.places)}
        if recorded is not None:
            same_checkpoints(
                RunWriter(job.path, recorded), relative(trajectory), str(trajectory.root)
            )
            if job.damage is None and self._is_finished(recorded, trajectory, settings):
                if job.consume:
                    self._consume_all(recorded)
                return
        else:
            results.refuse_other(job.path)
        results.require_lock(job.path)
        status.begin("starting workers" if where.kind == "local" else "reaching the workers")
        with open_cluster(where, settings["device"], stop.event) as cluster:
            dashboard = cluster.crew().dashboard
            if dashboard:
                status.note([f"the dashboard of the workers is at {dashboard}"])
            try:
                self._work(cluster, settings, trajectory, stop, strangers=where.is_address)
            except Interrupted:
                raise stop.interrupted() from None

    def _following(self, stop: Stop, settings: Settings, recorded: Manifest | None) -> Follower:
        """Return a follower, once there are iterates to begin with."""
        job, status = self._job, self._status
        follower = Follower(
            job.root,
            stop,
            status.wait,
            status.note,
            consumes=job.consume,
            has_causes=job.parts.tells_causes(settings),
        )
        follower.wait_for_first(recorded, job.span)
        if recorded is None and not follower.is_over and not follower.is_told:
            status.note(
                [
                    "the recorder does not announce how many iterates will come (until=, steps=): space "
                    f"is planned for {count(follower.segments, 'segment')}"
                ]
            )
        return follower

    def _trajectory(self, settings: Settings, recorded: Manifest | None) -> Trajectory:
        job = self._job
        trajectory = open_trajectory(
            job.checkpoints,
            pattern=settings["pattern"],
            rename=settings["rename"],
            steps=settings["steps"],
            consumed=NOTHING_CONSUMED if recorded is None else consumed_of(recorded, job.root),
            moments=job.parts.tells_causes(settings),
        )
        if self._follower is not None:
            return self._follower.whole(trajectory, len(recorded.checkpoints) if recorded else 0)
        if recorded is None:
            return trajectory
        new = len(trajectory.checkpoints) - len(recorded.checkpoints)
        if recorded.sampled is not None and new > 0:
            self._status.note(
                [
                    f"{count(new, 'checkpoint')} after step {recorded.checkpoints[-1].step} "
                    f"{'is' if new == 1 else 'are'} not used: a random part of the segments, "
                    f"--segments {recorded.sampled}, stays one of those it was drawn from. Write "
                    "another run with --out to draw from all of them"
                ]
            )
        elif job.damage is None:
            return trajectory
        return trajectory.up_to(len(recorded.checkpoints))  # a repair adds no checkpoint

    def _consume_all(self, recorded: Manifest) -> None:
        """Remove the remaining iterates of a finished run."""
        job = self._job
        with results.hold(job.path):
            writer = RunWriter(job.path, recorded)
            consumer = Consumer(job.root, writer, job.keep_every)
            consumer.release(at_rest=True)
            self._status.note(consumer.told())

    def _is_finished(self, manifest: Manifest, trajectory: Trajectory, settings: Settings) -> bool:
        """Tell whether nothing is left to do, from the task file's bytes and the markers alone."""
        job = self._job
        if self._follower is not None and not self._follower.is_over:
            return False
        if manifest.provenance["task_sha256"] != digest(job.task) or len(
            trajectory.checkpoints
        ) != len(manifest.checkpoints):
            return False
        if settings["segments"] != manifest.sampled:
            return False
        known = manifest.provenance["task_losses"]
        losses = known if job.losses == ["all"] else job.losses or known[:1]
        writer = RunWriter(job.path, manifest)
        finished = set(losses) <= set(manifest.losses) and all(
            manifest.losses[name].covers is None and writer.is_complete(name) for name in losses
        )
        if finished:
            followed = self._follower is not None
            self._status.tell(Planned(0, manifest.segments * len(losses), 0, 0, followed=followed))
        return finished

    def _work(
        self,
        cluster: Cluster,
        settings: Settings,
        trajectory: Trajectory,
        stop: Stop,
        *,
        strangers: bool,
    ) -> None:
        existing = self._job.recorded()
        if strangers:
            self._status.begin("checking each worker")
            with results.shared_directory_token(self._job.path) as token:
                self._status.note(check_workers(cluster, trajectory, settings["device"], token))
        ready = self._prepare(cluster, settings, trajectory, existing)
        if stop.event.is_set():
            raise stop.interrupted()
        self._status.note(ready.notes)
        if ready.short_of:
            raise ResourceError(ready.short_of)
        ready = calibrated(cluster, ready)
        self._status.begin("laying out the run" if existing is None else "comparing with the run")
        if existing is None:
            manifest = ready.manifest
            in_the_end = ready.draft.in_the_end(manifest)
            self._check_space(cluster, ready, in_the_end, manifest.keep, manifest.losses)
            results.create(self._job.path, manifest, self._job.durable)
        self._replay(cluster, trajectory, ready, stop, strangers=strangers)

    def _prepare(
        self,
        cluster: Cluster,
        settings: Settings,
        trajectory: Trajectory,
        existing: Manifest | None,
    ) -> Preparation:
        job = self._job
        settings = on_device(settings, cluster.crew().device)
        parcel = cluster.deliver(job.data)
        self._status.begin("building and probing the task")
        return prepare(
            cluster,
            trajectory,
            job.task,
            parcel,
            job.losses,
            settings,
            self._destination(existing),
            job.parts,
        )

    def _destination(self, existing: Manifest | None) -> Destination:
        job, follower = self._job, self._follower
        destination = Destination(path=job.path, existing=existing, span=job.span)
        if follower is None or follower.is_over:
            return destination
        return replace(destination, segments=follower.segments, longest_span=follower.span)

    def _replay(
        self,
        cluster: Cluster,
        trajectory: Trajectory,
        ready: Preparation,
        stop: Stop,
        *,
        strangers: bool,
    ) -> None:
        """Replay what is pending, while the run is locked, and what is recorded meanwhile.

        Args:
            cluster: where.
            trajectory: the checkpoints.
            ready: the probed task.
            stop: the request to drain.
            strangers: whether late workers must see the checkpoints of this host.
        """
        job = self._job
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(results.hold(job.path, durable=job.durable))
            writer = RunWriter.open(job.path, job.durable)
            if lock.unclean:
                writer.sweep()
                lock.unclean = False
            if strangers:  # check late workers against the run directory itself
                token = stack.enter_context(results.shared_directory_token(job.path))
                check_workers(cluster, trajectory, cluster.crew().device, token)
            self._bring_up(cluster, writer, ready)
            common = _common(ready, job.path)
            again = writer.spans_of(job.damage or ())
            self._refuse_gone(writer, common, again, trajectory)
            same_values(cluster, writer, common, again)
            # everything needed to recompute the damage is now known to exist
            if job.damage is not None:
                self.repair_spans = writer.discard(job.damage)
            log = partial(results.append_events, job.path)
            stack.enter_context(self._status.tell.written_to(log))
            if job.consume and job.follow:
                refuse_others(writer.manifest, common.setup.losses, job.path)
            consumer = Consumer(job.root, writer, job.keep_every) if job.consume else None
            if consumer is not None:
                stack.callback(lambda: self._status.note(consumer.told()))
            while True:
                self._replay_pending(cluster, writer, common, lock, stop, consumer)
                if self._follower is None or self._follower.is_over:
                    break
                trajectory = self._grown(cluster, writer, common, trajectory, consumer)

    def _replay_pending(
        self,
        cluster: Cluster,
        writer: RunWriter,
        common: RunRequest[Any],
        lock: results.Held,
        stop: Stop,
        consumer: Consumer | None,
    ) -> None:
        """Replay the spans that are pending now.

        Raises:
            SpanError: if spans failed.
        """
        spans = _Spans(
            writer,
            common,
            self._status,
            durable=self._job.durable,
            root=self._job.root,
            consumer=consumer,
            follower=self._follower,
        )
        spans.replay(cluster, lock, self.repair_spans)
        if consumer is not None:
            consumer.release(at_rest=True)
        if stop.event.is_set():
            raise stop.interrupted()
        if spans.failed:
            raise SpanError(_failures(spans.failed))

    def _grown(
        self,
        cluster: Cluster,
        writer: RunWriter,
        common: RunRequest[Any],
        trajectory: Trajectory,
        consumer: Consumer | None,
    ) -> Trajectory:
        """Wait for more checkpoints and add them; at the end of the training, add everything
        recorded of the last one.
        """
        assert self._follower is not None, "nothing else grows"
        self._status.tell(Following(trajectory.checkpoints[-1].step))
        settings = resolve({}, writer.manifest.settings)
        trajectory = self._follower.more(trajectory, settings["rename"])
        if consumer is not None:
            trajectory = replace(trajectory, gone=consumer.gone)
        manifest = writer.manifest
        if self._follower.is_over:
            ready = self._prepare(cluster, settings, trajectory, manifest)
            self._status.note(ready.notes)
            self._bring_up(cluster, writer, ready)
            return trajectory
        unknown: dict[str, Identity] = {
            name: [manifest.losses[name].identity[0], None] for name in common.setup.losses
        }
        larger = replace(
            manifest,
            checkpoints=relative(trajectory),
            starts=trajectory.starts,
            breaks=sorted(trajectory.breaks),
        )
        writer.take_up(larger, unknown)
        return trajectory

    def _refuse_gone(
        self,
        writer: RunWriter,
        common: RunRequest[Any],
        again: Mapping[str, Sequence[int]],
        trajectory: Trajectory,
    ) -> None:
        """Reject spans whose checkpoints were removed."""
        if not trajectory.gone:
            return
        pending = {
            name: again.get(name, []) if self._job.damage is not None else writer.pending(name)
            for name in common.setup.losses
        }
        refuse_gone(writer.manifest, pending, trajectory.gone)

    def _check_space(
        self,
        cluster: Cluster,
        ready: Preparation,
        manifest: Manifest,
        keep: str,
        losses: Mapping[str, LossRecord],
    ) -> None:
        """Reject losses whose results need more than the free space, by a trial compression of a
        segment of each.

        Raises:
            ResourceError: naming both sizes, and what to do.
        """
        space = results.free_space(self._job.path)
        most = results.required_bytes(manifest, keep, losses)
        if space is None or most <= space[1]:
            return
        place, free = space
        shares = _compressed(cluster, ready, manifest)
        about = results.estimated_bytes(manifest, keep, losses, shares, _BLOCK)
        will_need = (
            f"the result will need about {amount(about)} after compression (at most "
            f"{amount(most)}), and {place} has {amount(free)} free"
        )
        if about > free and not self._job.ignore_space:
            lower = ready.draft.lower_levels(keep)
            raise ResourceError(f"{will_need}. {_less_space(lower)}")
        full = "a run on a full disk stops, and resumes once there is space"
        self._status.note([f"{will_need}: {full}"])

    def _bring_up(self, cluster: Cluster, writer: RunWriter, ready: Preparation) -> None:
        """Compare the run's record with the task and the checkpoints, then add new losses and
        checkpoints.
        """
        recorded, laid_out = writer.manifest, ready.manifest
        _refuse_others(writer, laid_out)
        behind = {name for name, record in recorded.losses.items() if record.covers is not None}
        in_repair = self._job.damage is not None
        extended = {name for name in laid_out.losses if not in_repair or name not in behind}
        unknown = {name for name, record in recorded.losses.items() if None in record.identity[1:]}
        grown = (laid_out.checkpoints, laid_out.starts) != (recorded.checkpoints, recorded.starts)
        if grown or (behind | unknown) & extended:
            identities = {name: self._identity(recorded, laid_out, name) for name in extended}
            writer.take_up(laid_out, identities)
            if not in_repair:
                self._status.note(_of_losses_left_behind(writer.manifest))
        new = {
            name: record for name, record in laid_out.losses.items() if name not in recorded.losses
        }
        if new:
            with_new = replace(writer.manifest, losses={**writer.manifest.losses, **new})
            refuse_gone(with_new, {name: range(with_new.spans) for name in new}, ready.draft.gone)
            self._check_space(cluster, ready, with_new, writer.keep, new)
            writer.add_losses(new)
        _note_task(writer, laid_out)

    def _identity(self, recorded: Manifest, laid_out: Manifest, name: str) -> Identity:
        """Return the identity of a loss, with that at the first checkpoint from the record, because
        the checkpoint may be gone.
        """
        first, last = laid_out.losses[name].identity
        known = recorded.losses[name].identity[0] if name in recorded.losses else None
        return [first if first is not None else known, last]


@contextlib.contextmanager
def _named_disk_errors() -> Iterator[None]:
    """Translate an error of the file system into one that names a remedy.

    Raises:
        ResourceError: if space or a permission is missing.
        LCAError: for any other error of a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                f"no permission: {error}. Grant it to this user, or write elsewhere with --out."
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise LCAError(
                f"a file cannot be read or written: {error}. Committed results are kept; fix it "
                "and run again."
            ) from error
        raise ResourceError(
            f"no space left for the result ({error}). Free some and run again."
        ) from error


def _less_space(lower: Sequence[str]) -> str:
    """Return what to do where results need more than the free space.

    Args:
        lower: levels of `--keep` that may replace the current one, the lowest first.
    """
    options = [f"--keep {level}" for level in reversed(lower)]
    ways = [
        *([f"keep less with {' or '.join(options)}"] if options else []),
        "write elsewhere with --out",
        "or start anyway with --ignore-space: a run on a full disk stops, and resumes "
        "once there is space",
    ]
    text = ", ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def _compressed(
    cluster: Cluster, ready: Preparation, manifest: Manifest
) -> dict[str, dict[str, float]]:
    """Return the ratio that compression leaves of each loss's arrays, by a trial; see
    `Compressions`.
    """
    request = CompressionsRequest(
        setup=ready.setup,
        sample=ready.sample,
        batch_sizes=ready.batch_sizes,
        segments_of_window=manifest.length_of(0),
    )
    return ask(cluster, compressions, request).compressed


def _refuse_others(writer: RunWriter, laid_out: Manifest) -> None:
    """Reject checkpoints, tensors and losses that differ from those of the run."""
    recorded = writer.manifest
    same_checkpoints(writer, laid_out.checkpoints, laid_out.root)
    same_tensors(writer, laid_out.tensors)
    for name, record in laid_out.losses.items():
        if name in recorded.losses:
            same_end = len(laid_out.checkpoints) == len(recorded.of(name).checkpoints)
            same_loss(name, recorded.losses[name], record, same_end)


def _note_task(writer: RunWriter, laid_out: Manifest) -> None:
    """Record the path of the task, if it changed."""
    task = {name: value for name, value in laid_out.provenance.items() if name.startswith("task")}
    recorded = writer.manifest.provenance
    if any(recorded[name] != value for name, value in task.items()):
        writer.note(task)


def _of_losses_left_behind(manifest: Manifest) -> Iterator[str]:
    """Yield notes on losses that were not asked for, and so do not include the added checkpoints."""
    for name, record in manifest.losses.items():
        if record.covers is not None:
            last, step = manifest.checkpoints[-1].step, manifest.of(name).checkpoints[-1].step
            if manifest.sampled is not None:
                yield (
                    f"loss {name!r} stays as it is, over {record.covers:,} of the "
                    f"{manifest.segments:,} segments of --segments {manifest.sampled}. Extend it to "
                    f"all of these with --loss {name}, or every loss with --loss all"
                )
                continue
            yield (
                f"loss {name!r} stays as it is, up to step {step}; the checkpoints reach step "
                f"{last}. Extend it with --loss {name}, or every loss with --loss all"
            )


def _common(ready: Preparation, path: Path) -> RunRequest[Any]:
    """Return the fields that requests of spans share."""
    return RunRequest[Any](
        setup=ready.setup,
        points=replace(ready.sample.points, checkpoints={}),
        run=str(path.resolve()),
        batch_sizes=ready.batch_sizes,
    )


# --- the spans ------------------------------------------------------------------------------------


class _Unreached(NamedTuple):
    """A tensor that moved and that no gradient of a loss reaches, and whether the loss depends on
    it nevertheless.
    """

    loss: str
    tensor: str
    depends: bool


class _Spans:
    """The pending spans of a run, and the reports on them.

    Attributes:
        failed: the spans that could not be replayed.
    """

    def __init__(
        self,
        writer: RunWriter,
        common: RunRequest[Any],
        status: _Status,
        *,
        durable: bool,
        root: Path,
        consumer: Consumer | None,
        follower: Follower | None,
    ) -> None:
        self._writer, self._common, self._status, self._durable = writer, common, status, durable
        self._root, self._consumer = root, consumer
        self._follows = follower is not None and not follower.is_over
        self._followed = follower is not None and follower.is_over
        self._covered = {name: writer.manifest.of(name) for name in common.setup.losses}
        self.failed: list[SpanFailed] = []
        self._oom_retries = 0
        self._left_partials = False
        self._reported_ends: dict[str, dict[int, list[float]]] = {}
        self._unreached: set[_Unreached] = set()
        self._shards: ShardQueue | None = None

    def replay(
        self, cluster: Cluster, lock: results.Held, repair_spans: dict[str, list[int]] | None
    ) -> None:
        """Replay the spans on a cluster, and merge their totals.

        Args:
            cluster: where.
            lock: of the run.
            repair_spans: the spans to replay, by loss; None for all pending ones.

        Raises:
            ResourceError: if another driver took the run over.
        """
        path = self._writer.path
        results.remove_reports(path)
        pending = self._pending(repair_spans)
        if not pending and self._follows:
            return
        self._plan(pending, cluster.crew().workers)
        lock.unclean = True  # until the end, workers may leave temporary files
        with contextlib.closing(self._outcomes(cluster, pending)) as outcomes:
            for outcome in outcomes:
                self._hear(outcome)
                if lock.lost.is_set():
                    raise ResourceError(
                        f"another driver took {path} over, because this one was silent for "
                        "minutes. Committed results are kept."
                    )
        self._fold()
        results.remove_reports(path)
        if self._left_partials:  # dead workers leave temporary files
            self._writer.sweep()
        lock.unclean = False
        self._status.note(self._notes())

    # --- before

    def _pending(
        self, repair_spans: dict[str, list[int]] | None
    ) -> dict[tuple[int, int], list[str]]:
        """Return the losses that wait for each span, keyed by span and number of segments; in a
        repair losses may end at different segments.
        """
        waiting: dict[tuple[int, int], list[str]] = {}
        for name, manifest in self._covered.items():
            self._writer.fold_all(name)
            for span in self._writer.pending(name):
                if repair_spans is None or span in repair_spans[name]:
                    waiting.setdefault((span, manifest.length(span)), []).append(name)
        return waiting

    def _plan(self, waiting: dict[tuple[int, int], list[str]], workers: int) -> None:
        pending = sum(len(names) * length for (_, length), names in waiting.items())
        total = sum(manifest.segments for manifest in self._covered.values())
        directory = self._common.run if pending else ""
        self._status.plan(
            Planned(
                pending=pending,
                total=total,
                spans=len(waiting),
                workers=workers,
                directory=directory,
                follows=self._follows,
                followed=self._followed,
            )
        )

    def _requests(self, waiting: dict[tuple[int, int], list[str]]) -> Iterator[SpanRequest]:
        for (span, _), names in sorted(waiting.items()):
            manifest = self._covered[names[0]]
            yield _span_request(
                self._common, manifest, span, names, self._root, durable=self._durable
            )

    def _outcomes(
        self, cluster: Cluster, waiting: dict[tuple[int, int], list[str]]
    ) -> Generator[Outcome]:
        """Compute the spans: whole, or in shards of the data where losses are cut."""
        manifest = self._writer.manifest
        whole = {
            key: names
            for key, all_names in waiting.items()
            if (names := [name for name in all_names if not is_cut(manifest, name)])
        }
        specs = map(to_plain, self._requests(whole))
        cut = [
            (span, names)
            for (span, _), all_names in sorted(waiting.items())
            if (names := [name for name in all_names if is_cut(manifest, name)])
        ]
        if not cut:
            return cluster.map(replay_span, specs, committed_result)
        from .shard_queue import ShardQueue

        self._shards = ShardQueue(
            self._writer,
            self._common,
            cut,
            self._finishing,
            workers=cluster.crew().workers,
            durable=self._durable,
        )
        every = itertools.chain(specs, self._shards.specs())
        return cluster.map(replay_in_shards, every, committed)

    def _finishing(self, span: int, names: list[str]) -> SpanRequest:
        """Return the request to commit a span whose sums over shards are complete."""
        return _span_request(
            self._common,
            self._covered[names[0]],
            span,
            names,
            self._root,
            durable=self._durable,
        )

    # --- while they are replayed

    def _hear(self, outcome: Outcome) -> None:
        """Report an outcome of the cluster."""
        if isinstance(outcome, Refused):
            self._status.note([f"worker {outcome.worker} joined but is not used: it {outcome.why}"])
        elif isinstance(outcome, Waiting):
            self._status.note(
                [f"no worker is left; waiting {duration(outcome.seconds)} for one to join"]
            )
        elif isinstance(outcome, Done):
            if outcome.result is not None:
                self._take(outcome)
        else:
            self._hear_trouble(outcome)
        for span, names, error in self._shards.failures() if self._shards else ():
            self._take_failure(span, names, error)

    def _hear_trouble(self, outcome: Lost | Retried | Slow) -> None:
        request = work_of(outcome.spec)
        names = request.losses if isinstance(request, ShardRequest) else request.pending
        span, manifest = request.span, self._writer.manifest.of(names[0])
        where = (span, *_steps(manifest, span))
        self._left_partials |= not isinstance(outcome, Slow)
        if isinstance(outcome, Lost):
            if self._gives_up(request):
                self._fail(manifest, span, f"no worker could finish it ({outcome.why})")
        elif isinstance(outcome, Retried):
            self._status.tell(SpanRetried(*where, outcome.worker, outcome.why))
        else:
            self._status.tell(SpanSlow(*where, outcome.worker, outcome.seconds, outcome.doing))

    def _gives_up(self, request: SpanRequest | ShardRequest) -> bool:
        """Tell whether the failure of a request is the first of its span."""
        if not isinstance(request, ShardRequest):
            return True
        return self._shards is not None and bool(self._shards.drop(request.span))

    def _fail(
        self, manifest: Manifest, span: int, message: str, not_finite: int | None = None
    ) -> None:
        failure = SpanFailed(span, *_steps(manifest, span), message, not_finite)
        self.failed.append(failure)
        self._status.tell(failure)

    def _take(self, done: Done) -> None:
        request = work_of(done.spec)
        if isinstance(request, ShardRequest):
            self._take_sums(request, done)
            return
        answer = answered(SpanRequest, done.result)
        if isinstance(answer, Failure):
            self._take_failure(request.span, request.pending, answer.exception())
            return
        if self._shards is not None and is_cut(self._writer.manifest, request.pending[0]):
            self._shards.finish(request.span)
        self._status.span_seconds, self._status.workers = answer.seconds, done.workers
        for name, part in answer.losses.items():
            self._compare_ends(name, request.span, part.ends)
            self._mind_memory(name, request.span, part, done.worker)
            self._unreached |= {
                _Unreached(name, tensor, tensor in part.hidden) for tensor in part.silent
            }
        self._status.tell(_span_done(request.span, answer, done))
        if self._consumer is not None:
            self._consumer.release(at_rest=False)

    def _take_sums(self, request: ShardRequest, done: Done) -> None:
        """Store the sums of some shards; the requests that depend on them follow next."""
        assert self._shards is not None, "only the queue of shards asks for sums"
        answer = answered(ShardRequest, done.result)
        if not isinstance(answer, Failure):
            self._shards.take(request)
            return
        error = answer.exception()
        if isinstance(error, ResourceError) or self._gives_up(request):
            self._take_failure(request.span, request.losses, error)

    def _take_failure(self, span: int, losses: list[str], error: Exception) -> None:
        if isinstance(error, ResourceError):
            raise error
        step = error.step if isinstance(error, NotFiniteError) else None
        self._fail(self._writer.manifest.of(losses[0]), span, str(error), step)

    def _mind_memory(self, name: str, span: int, part: LossSpan, worker: str) -> None:
        """Report once that memory ran out and a span was computed in smaller batches."""
        whole = self._writer.manifest.losses[name].batch_size
        if part.batch_size >= whole:
            return
        self._oom_retries += 1
        if self._oom_retries == 1:
            self._status.note(
                [
                    f"out of memory on {worker}: span {span} of loss {name!r} was computed in "
                    f"batches of {part.batch_size} instead of {whole}, equal within rounding; its "
                    "marker records it"
                ]
            )

    def _compare_ends(self, loss: str, span: int, ends: list[float]) -> None:
        """Compare a span with its neighbours, once they are committed.

        Only the driver compares, so that no two processes miss each other.

        Raises:
            LCAError: if losses at a shared checkpoint differ.
        """
        reported = self._reported_ends.setdefault(loss, {})
        reported[span] = ends
        for later in (span, span + 1):
            what = results.disagreement(self._writer.commits(loss), later, reported)
            if what is not None:
                run = quoted(self._writer.path)
                raise LCAError(
                    f"{what}: one was computed from different data or another model, or a machine "
                    f"made an error. `lca verify {run}` lists where, `lca repair {run} --task FILE` "
                    "recomputes it."
                )

    # --- afterwards

    def _fold(self) -> None:
        """Merge the totals of windows; spans whose waiting totals were damaged have failed."""
        unfolded = {
            span: manifest
            for name, manifest in self._covered.items()
            for span in self._writer.fold_all(name)
        }
        for span, manifest in sorted(unfolded.items(), key=lambda item: item[0]):
            self._fail(manifest, span, "its totals were damaged before they were merged")

    def _notes(self) -> Iterator[str]:
        if self._oom_retries > 1:
            yield (
                f"out of memory {self._oom_retries} times; a smaller --batch-size from the start, "
                "in another run, is faster"
            )
        yield from _of_unreached(self._unreached)


def _span_done(span: int, answer: SpanAnswer, done: Done) -> SpanDone:
    parts = answer.losses.values()
    return SpanDone(
        span=span,
        losses=list(answer.losses),
        segments=answer.segments,
        worst_residual=max(part.worst_residual for part in parts),
        unconverged=sum(part.unconverged for part in parts),
        evaluations=sum(part.evaluations for part in parts),
        forward_passes=sum(part.forward_passes for part in parts),
        seconds=answer.seconds,
        peak_bytes=answer.peak_bytes,
        worker=done.worker,
        workers=done.workers,
    )


def _of_unreached(unreached: set[_Unreached]) -> Iterator[str]:
    """Yield notes on tensors that moved but that no gradient of a loss reaches: hidden from the
    loss, or unused.
    """
    for loss in sorted({entry.loss for entry in unreached}):
        tensors = {entry.tensor for entry in unreached if entry.loss == loss}
        hidden = {entry.tensor for entry in unreached if entry.loss == loss and entry.depends}
        unused = tensors - hidden
        if unused:
            yield (
                f"tensors moved without loss {loss!r} depending on them (allocated 0): "
                f"{few(sorted(unused), 5)}"
            )
        if hidden:
            yield (
                f"loss {loss!r} depends on some tensors that moved through detach() or no_grad() "
                f"alone, so no gradient reaches them (allocated 0): {few(sorted(hidden), 5)}. Their "
                "share is in the residual, which no smaller tolerance reduces"
            )


def _failures(failed: list[SpanFailed]) -> str:
    first = failed[0]
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (
        f"{count(len(failed), 'span')} failed; the others are complete. Steps {first.first_step} "
        f"to {first.last_step}{more}: {first.message}{_not_finite(failed)}"
    )


def _not_finite(failed: list[SpanFailed]) -> str:
    """Return which checkpoints hold NaN or Inf, if spans failed for that: running again does not
    help.
    """
    steps = sorted({failure.not_finite for failure in failed if failure.not_finite is not None})
    if not steps:
        return ""
    several = len(steps) > 1
    of = (
        f"the checkpoints of steps {few([*map(str, steps)])} hold"
        if several
        else f"that of step {steps[0]} holds"
    )
    return f" Running again cannot replay their spans: {of} NaN or Inf."


def _steps(manifest: Manifest, span: int) -> tuple[int, int]:
    """Return the training steps at both ends of a span."""
    return manifest.ends(manifest.rows(span))


def _span_request(
    common: RunRequest[Any],
    manifest: Manifest,
    span: int,
    pending: list[str],
    root: Path,
    *,
    durable: bool,
) -> SpanRequest:
    """Return the request to replay one span for its pending losses, with the checkpoints it reads.

    Args:
        common: to all spans.
        manifest: of the run up to where the pending losses end.
        span: its number.
        pending: the losses.
        root: the directory of the checkpoints.
        durable: whether to flush it to disk before it counts.
    """
    rows = manifest.rows(span)
    looked = looked_back_at(root, manifest, rows.start)
    starts = [manifest.starts[row] for row in looked or ()]
    positions = manifest.reads(rows) | {end for start in starts for end in (start, start + 1)}
    return SpanRequest(
        setup=common.setup,
        points=replace(
            common.points,
            checkpoints={index: manifest.checkpoints[index] for index in sorted(positions)},
        ),
        run=common.run,
        batch_sizes=common.batch_sizes,
        durable=durable,
        span=span,
        pending=pending,
        looks_back=looked,
    )
