"""Drive a job: create or resume a run, send pending spans to workers, receive commits, drain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import results
from ..base.text import count
from ..checkpoints.places import Where, common_root, places_of
from ..checkpoints.trajectory import NOTHING_CONSUMED, Trajectory, open_trajectory
from ..cluster import Cluster, ClusterConfig, open_cluster
from ..errors import InputError, Interrupted, ResourceError, SpanError
from ..numerics.settings import Settings, on_device, resolve
from ..results import Identity, LossRecord, Manifest, RunWriter
from ..tasks.task import Entry, digest
from .consume import (
    Consumer,
    consumed_of,
    refuse_a_part,
    refuse_gone,
    refuse_options,
    refuse_other_files,
    refuse_others,
)
from .events import Following, Log, Planned
from .follow import Follower, refuse_remote
from .parts import PartsAsked
from .pending_spans import PendingSpans, failures_message
from .prepare import Destination, Preparation, calibrated, check_workers, prepare, relative
from .requests import RunRequest
from .resume_checks import same_checkpoints, same_loss, same_tensors, same_values
from .space import check_space, named_disk_errors
from .status import Status
from .stopping import Stop, stopped_by_signals

_DURABILITY = ("full", "none")


def is_durable(durability: str) -> bool:
    """Return whether a span must be flushed to disk before it counts.

    Args:
        durability: as of `run`.

    Raises:
        InputError: for an unknown word.
    """
    if durability not in _DURABILITY:
        raise InputError(f"--durability {durability!r} is not one of {', '.join(_DURABILITY)}.")
    return durability == "full"


@dataclass(frozen=True, kw_only=True)
class Job:
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


class Driver:
    """Drives one call of `run` or `repair`, from a trajectory and a task to a complete run
    directory.

    Attributes:
        repair_spans: in a repair, the spans to recompute, by loss.
    """

    def __init__(self, job: Job, tell: Log) -> None:
        self._job, self._status = job, Status(tell)
        self.repair_spans: dict[str, list[int]] | None = None
        self._follower: Follower | None = None

    def run(self, where: ClusterConfig) -> None:
        """Run the job on a cluster."""
        where.check()
        status = self._status
        with (
            stopped_by_signals(status.say_stopping) as stop,
            results.announced(self._job.path) as status.announcement,
            named_disk_errors(),
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
        spans = PendingSpans(
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
            raise SpanError(failures_message(spans.failed))

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
        job = self._job
        self._status.note(
            check_space(
                job.path, cluster, ready, manifest, keep, losses, ignore_space=job.ignore_space
            )
        )

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
