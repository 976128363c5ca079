"""The driver of a replay: pending spans go to workers, commits come back as events; creation,
resume, repair, drain.

`run` is what `lca run` calls, `repair` what `lca repair` calls.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from . import store
from .cluster import (
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
from .display import duration, listening
from .errors import (
    InputError,
    Interrupted,
    LCAError,
    NotFiniteError,
    ResourceError,
    SpanError,
    amount,
    few,
)
from .paths import here, is_remote, located, nearest
from .prepare import Preparation, ask, check_workers, prepare, relative
from .progress import (
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
from .requests import (
    CompressionsRequest,
    Failure,
    RunRequest,
    SpanRequest,
    answered,
    from_plain,
    to_plain,
)
from .resume_checks import same_checkpoints, same_loss, same_tensors, same_values
from .settings import Settings, on_device, resolve
from .store import LossRecord, Manifest, Run, RunWriter
from .task import Entry, Task, digest, pack
from .text import count
from .trajectory import Trajectory, open_trajectory
from .worker import committed_result, compressions, looks_back, replay_span

if TYPE_CHECKING:
    from types import FrameType

# --- the run
# -----------------------------------------------------------------------------------------------------------


def run(
    checkpoints: str | Path,
    task: str | Path | Task,
    *,
    losses: Sequence[str] | None = None,
    out: str | Path | None = None,
    rule: str | None = None,
    tolerance: float | str | None = None,
    allocation_tolerance: float | str | None = None,
    keep: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    norm_stats: str | None = None,
    tensors: Sequence[str] = (),
    subset: Sequence[str] = (),
    steps: str | None = None,
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
    progress: Listener | None = None,
) -> Run:
    """Allocate the loss change of every segment to every parameter; run again, it resumes.

    Args:
        checkpoints: directory of safetensors iterates; a URL of fsspec's, such as `s3://…`, is read
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
        keep: "parameters" (default), "units" or "tensors".
        batch_size: examples per batch; a deterministic choice by default.
        device: "cuda" or "cpu"; by default a GPU where there is one.
        precision: "float32" (default), "tf32", "bfloat16" or "float64".
        norm_stats: "running" (default), "batch" or "recalibrated".
        tensors: patterns (`*`, `?`) of the tensors whose allocation is kept; what the others did is
            kept as one remainder.
        subset: `[SPLIT=]A:B`, `[SPLIT=]I,J,K` or `[SPLIT=]FRACTION@SEED`: which examples losses are
            over; each split once.
        steps: `A:B[:K]`, training steps.
        pattern: regular expression with a group `step` for names of checkpoints.
        rename: `OLD=NEW` pairs for tensor names.
        cluster: "local", "inline", or a scheduler: `tcp://HOST:PORT`, `tls://HOST:PORT`,
            `file:SCHEDULER.json`.
        workers: local workers, by default one per GPU, or one per core; at an address, how many to
            wait for.
        tls_ca: certificate authority (PEM) for `tls://`.
        tls_cert: this user's certificate (PEM).
        tls_key: its key (PEM).
        insecure: use a cluster whose listeners are open to the network without TLS.
        dashboard: serve Dask's dashboard of local workers on loopback.
        durability: "full" (default: every span is on the disk before it counts) or "none"
            (kill-safe, not power-safe).
        ignore_space: begin although the result, estimated after compression, does not fit into the
            space that is free.
        span: segments per span, a power of two; decides how work is cut, never a result.
        progress: called with every event, and nothing else is shown; `lca_posthoc.progress.silent`
            shows nothing at all. By default notes, retries and failures are warnings
            (`lca_posthoc.errors.LCAWarning`), and how far the run is stands in a bar on a terminal
            or in a notebook, elsewhere in a line a minute on stderr.

    Returns:
        The run, opened.

    Raises:
        InputError: for anything wrong before the first evaluation.
        SpanError: where spans failed; the others are complete.
        ResourceError: where workers, a GPU or space are missing.
        Interrupted: after Ctrl-C or SIGTERM, when the spans in flight are done; a
            `KeyboardInterrupt` too.
    """
    asked: dict[str, object] = {
        "rule": rule,
        "tolerance": tolerance,
        "allocation_tolerance": allocation_tolerance,
        "keep": keep,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "norm_stats": norm_stats,
        "tensors": tensors,
        "subset": subset,
        "steps": steps,
        "pattern": pattern,
        "rename": rename,
    }
    if span is not None and (span < 1 or span & (span - 1)):
        raise InputError(f"span must be a power of two, got {span}.")
    where = ClusterConfig(
        kind=cluster,
        workers=workers,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        dashboard=dashboard,
    )
    what = "results are written to file systems. Give --out a directory."
    path = here(out, what) if out is not None else default_out(checkpoints)
    durable = _durable(durability)
    with listening(progress) as listener:
        log = Log(listener)
        entry, data = pack(task)
        job = _Job(
            checkpoints=located(checkpoints),
            task=entry,
            data=data,
            losses=list(losses or []),
            path=path,
            asked=asked,
            span=span,
            durable=durable,
            tell=log,
            ignore_space=ignore_space,
        )
        job.run(where)
    return store.open_run(path)


@dataclass(frozen=True)
class Repaired:
    """The outcome of a repair: the damage, the spans computed again by loss, and the leftover files
    removed.
    """

    damage: list[store.Damage]
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
    """Compute again exactly what is damaged in a run, put its metadata right, and sweep what killed
    writers left.

    Args:
        path: the run directory.
        task: as for `run`; its losses must be those of the run.
        checkpoints: where the checkpoints are now; by default where they were.
        cluster: as for `run`, with the options that go with it.
        workers: see `cluster`.
        tls_ca: see `cluster`.
        tls_cert: see `cluster`.
        tls_key: see `cluster`.
        insecure: see `cluster`.
        durability: as for `run`.
        progress: as for `run`.

    Raises:
        InputError: where `path` is no run, or the task or the checkpoints are not those of the run.
        SpanError: where damaged spans could not be computed again.
    """
    place, durable = Path(path), _durable(durability)
    where = ClusterConfig(
        kind=cluster,
        workers=workers,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
    )
    packed = pack(task)
    store.read_manifest(place)
    with store.hold(place):
        writer = RunWriter.open(place, durable)
        problems = list(store.verify(place))
        damage = [problem for problem in problems if isinstance(problem, store.Damage)]
        writer.restore_metadata()
        writer.sweep()
        writer.remove_leftovers(
            problem for problem in problems if isinstance(problem, store.Leftover)
        )
    losses = {
        part.loss: True
        for part in damage
        if part.loss is not None and (part.span, part.window) != (None, None)
    }
    root = located(checkpoints if checkpoints is not None else writer.manifest.root)
    with listening(progress) as listener:
        entry, data = packed
        job = _Job(
            checkpoints=root,
            task=entry,
            data=data,
            losses=list(losses),
            path=place,
            asked={},
            span=None,
            durable=durable,
            tell=Log(listener),
            damage=damage,
        )
        if losses:
            job.run(where)
    return Repaired(damage, job.only or {}, len(problems) - len(damage))


def _durable(durability: str) -> bool:
    if durability not in DURABILITY:
        raise InputError(f"--durability {durability!r} is not one of {', '.join(DURABILITY)}.")
    return durability == "full"


def default_out(checkpoints: str | Path) -> Path:
    """Return where a run goes by default: beside the checkpoints, with `.lca` added.

    Raises:
        InputError: where the checkpoints are remote, which results cannot be.
    """
    directory = located(checkpoints)
    if is_remote(directory):
        raise InputError(
            f"{directory} is remote, and results are not: say where they go with --out RUN."
        )
    directory = directory.resolve() if directory.name in ("", "..") else directory
    return directory.with_name(f"{directory.name}.lca")


DURABILITY = ("full", "none")
_BLOCK = 4096  # bytes to whose multiples most file systems round the size of a file
_AT_ONCE = 0.1  # seconds after a signal when it is told of at the latest


@dataclass
class _Stop:
    """A request to drain: the event a cluster listens to, the signal that asked, and how many
    signals arrived.
    """

    event: threading.Event = field(default_factory=threading.Event)
    signal: int = 0
    arrived: int = 0


@contextlib.contextmanager
def _signals(tell: Callable[[int], None]) -> Iterator[_Stop]:
    """Drain at the first Ctrl-C or SIGTERM, of which a thread tells at once, and abort at the
    second one.

    Python's own handlers wait until the main thread is back from what it computes; the thread hears
    of a signal when it arrives.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.event.is_set() or stop.arrived > 1:  # two may arrive before Python calls this once
            # which no `except Exception` on the way takes for a failure of the task
            raise KeyboardInterrupt
        stop.signal = number
        stop.event.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    arrives, leaves = socket.socketpair()
    leaves.setblocking(False)  # as `set_wakeup_fd` has it

    def listen() -> None:
        while arrived := arrives.recv(1):  # nothing when the other end is closed
            if arrived[0] not in numbers:
                continue
            stop.arrived += 1
            if stop.arrived == 1:
                # once the handler ran, a second signal that follows what is told is one of its own
                stop.event.wait(_AT_ONCE)
                tell(arrived[0])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    earlier = signal.set_wakeup_fd(leaves.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    except KeyboardInterrupt:
        raise _interrupted(stop.signal or signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier)
        leaves.close()
        listener.join()
        arrives.close()


def _interrupted(number: int) -> Interrupted:
    error = Interrupted("stopped; what was committed is kept. Run the same command again to go on.")
    error.exit_code = 128 + number
    return error


@dataclass(kw_only=True)
class _Job:
    """One call of `run`: from a trajectory and a task to a complete run directory."""

    checkpoints: Path
    task: Entry
    data: bytes
    losses: list[str]
    path: Path
    asked: dict[str, object]
    span: int | None
    durable: bool
    tell: Log
    damage: list[store.Damage] | None = None
    only: dict[str, list[int]] | None = None
    failed: list[SpanFailed] = field(default_factory=list)
    smaller: int = 0
    torn: bool = False
    heard: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    announcement: store.Announcement | None = None
    stage: str = ""
    workers: int = 0  # that replay spans; 0 before the first span
    ignore_space: bool = False
    span_seconds: float | None = None  # that the last span took

    def _begin(self, stage: str) -> None:
        """Tell the listener, and whoever asks `lca status`, what is done now."""
        self.stage = stage
        self.tell(Stage(stage))
        if self.announcement is not None:
            self.announcement.stage(stage)

    def _say_stopping(self, number: int) -> None:
        """Tell what a first signal waits for, and how to stop at once."""
        if self.workers:
            on = f" on {self.workers} workers" if self.workers > 1 else ""
            took = (
                ""
                if self.span_seconds is None
                else f" (the last one took {duration(self.span_seconds)})"
            )
            waits = (
                f"when the span{'s' if on else ''} underway{on} {'are' if on else 'is'} "
                f"committed{took}"
            )
            lost = "what is committed is kept, what is underway is computed again next time"
        else:
            waits, lost = f"when this is done: {self.stage}", "no span has begun"
        again = "Press Ctrl-C again" if number == signal.SIGINT else "Send SIGTERM again"
        self.tell(Stopping(f"stopping {waits}. {again} to stop now: {lost}."))

    def run(self, where: ClusterConfig) -> None:
        where.check()
        with _signals(self._say_stopping) as stop, store.announced(self.path) as self.announcement:
            try:
                self._run(where, stop)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise ResourceError(
                        f"not allowed: {error}. Give this user the right to it, or write elsewhere "
                        f"with --out."
                    ) from error
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise LCAError(
                        f"a file cannot be read or written: {error}. What was committed is kept; "
                        f"put it right and run again."
                    ) from error
                raise ResourceError(
                    f"no space left for the result ({error}). Free some and run again."
                ) from error

    def _run(self, where: ClusterConfig, stop: _Stop) -> None:
        recorded = store.read_manifest(self.path) if store.exists(self.path) else None
        settings = resolve(self.asked, recorded.settings if recorded else None)
        self._begin("reading the headers of the checkpoints")
        trajectory = open_trajectory(
            self.checkpoints,
            pattern=settings["pattern"],
            rename=settings["rename"],
            steps=settings["steps"],
        )
        if recorded is not None and self.damage is not None:  # a repair takes up no checkpoint
            trajectory = replace(
                trajectory, checkpoints=trajectory.checkpoints[: len(recorded.checkpoints)]
            )
        for note in trajectory.notes:
            self.tell(Note(note))
        if recorded is not None:
            same_checkpoints(
                RunWriter(self.path, recorded), relative(trajectory), str(trajectory.root)
            )
            if self.damage is None and self._is_finished(recorded, trajectory):
                return
        else:
            store.refuse_other(self.path)
        self._begin("starting workers" if where.kind == "local" else "reaching the workers")
        with open_cluster(where, settings["device"], stop.event) as cluster:
            if cluster.dashboard:
                self.tell(Note(f"the dashboard of the workers is at {cluster.dashboard}"))
            try:
                self._work(cluster, settings, trajectory, stop, strangers=where.is_address)
            except Interrupted:
                raise _interrupted(stop.signal) from None

    def _is_finished(self, manifest: Manifest, trajectory: Trajectory) -> bool:
        """Tell whether nothing is left to do, from the task file's bytes and the markers alone."""
        if manifest.provenance["task_sha256"] != digest(self.task) or len(
            trajectory.checkpoints
        ) != len(manifest.checkpoints):
            return False
        known = manifest.provenance["task_losses"]
        losses = known if self.losses == ["all"] else self.losses or known[:1]
        writer = RunWriter(self.path, manifest)
        finished = set(losses) <= set(manifest.losses) and all(
            manifest.losses[name].covers is None and writer.is_complete(name) for name in losses
        )
        if finished:
            self.tell(Planned(0, manifest.segments * len(losses), 0, 0))
        return finished

    def _work(
        self,
        cluster: Cluster,
        settings: Settings,
        trajectory: Trajectory,
        stop: _Stop,
        *,
        strangers: bool,
    ) -> None:
        existing = store.read_manifest(self.path) if store.exists(self.path) else None
        if strangers:
            self._begin("asking each worker what it has")
            with store.token(self.path) as token:
                notes = check_workers(cluster, trajectory, settings["device"], token)
            for note in notes:
                self.tell(Note(note))
        settings = on_device(settings, cluster.device)
        parcel = cluster.deliver(self.data)
        self._begin("building and probing the task")
        ready = prepare(
            cluster,
            trajectory,
            self.task,
            parcel,
            self.losses,
            settings,
            existing=existing,
            span=self.span,
        )
        if stop.event.is_set():
            raise _interrupted(stop.signal)
        for note in ready.notes:
            self.tell(Note(note))
        if ready.short_of:
            raise ResourceError(ready.short_of)
        self._begin("laying out the run" if existing is None else "comparing with what is recorded")
        if existing is None:
            self._check_space(
                cluster, ready, ready.manifest, settings["keep"], ready.manifest.losses
            )
            store.create(self.path, ready.manifest, self.durable)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(store.hold(self.path))
            writer = RunWriter.open(self.path, self.durable)
            if lock.unclean:
                writer.sweep()
            if strangers:  # who comes late is asked about the run directory itself
                check_workers(
                    cluster, trajectory, cluster.device, stack.enter_context(store.token(self.path))
                )
            self._bring_up(cluster, writer, ready)
            common = RunRequest[Any](
                setup=ready.setup,
                points=replace(ready.sample.points, checkpoints={}),
                run=str(self.path.resolve()),
                batch_sizes=ready.batch_sizes,
            )
            same_values(cluster, writer, common, writer.spans_of(self.damage or ()))
            # now that all that is needed to compute it again is known to be there
            if self.damage is not None:
                self.only = writer.discard(self.damage)
            stack.enter_context(self.tell.written_to(partial(store.append_events, self.path)))
            self._replay(cluster, writer, common, stop, lock)
            if self.failed:
                raise SpanError(_failures(self.failed))

    def _check_space(
        self,
        cluster: Cluster,
        ready: Preparation,
        manifest: Manifest,
        keep: str,
        losses: Mapping[str, LossRecord],
    ) -> None:
        """Refuse losses for whose results there is too little space, by what compression leaves of
        a segment of each.
        """
        place = nearest(self.path.resolve().parent)
        free = psutil.disk_usage(str(place)).free
        most = store.required_bytes(manifest, keep, losses)
        if most <= free:
            return
        request = CompressionsRequest(
            setup=ready.setup,
            sample=ready.sample,
            batch_sizes=ready.batch_sizes,
            segments_of_window=manifest.length_of(0),
        )
        shares = ask(cluster, compressions, request).compressed
        about = store.estimated_bytes(manifest, keep, losses, shares, _BLOCK)
        sizes = (
            f"about {amount(about)} after compression (at most {amount(most)}), and {place} has "
            f"{amount(free)} free"
        )
        if about > free and not self.ignore_space:
            raise ResourceError(
                f"the result will need {sizes}. Keep less with --keep units or --keep tensors, "
                f"write elsewhere with --out, or begin all "
                "the same with --ignore-space: a run that meets a full disk stops, and goes on "
                "where it was once there is space."
            )
        self.tell(
            Note(
                f"the result will need {sizes}: a run that meets a full disk stops, and goes on "
                f"once there is space"
            )
        )

    def _bring_up(self, cluster: Cluster, writer: RunWriter, ready: Preparation) -> None:
        """Compare what is recorded with what was found, then take up new losses and new
        checkpoints.
        """
        recorded, laid_out = writer.manifest, ready.manifest
        same_checkpoints(writer, laid_out.checkpoints, laid_out.root)
        same_tensors(writer, laid_out.tensors)
        for name, record in laid_out.losses.items():
            if name in recorded.losses:
                same_end = len(laid_out.checkpoints) == len(recorded.of(name).checkpoints)
                same_loss(name, recorded.losses[name], record, same_end)
        behind = {name for name, record in recorded.losses.items() if record.covers is not None}
        extended = {name for name in laid_out.losses if self.damage is None or name not in behind}
        if laid_out.checkpoints != recorded.checkpoints or behind & extended:
            writer.take_up(
                laid_out.checkpoints, {name: laid_out.losses[name].identity for name in extended}
            )
            if self.damage is None:
                self._say_what_stays(writer.manifest)
        new = {
            name: record for name, record in laid_out.losses.items() if name not in recorded.losses
        }
        if new:
            with_new = replace(writer.manifest, losses={**writer.manifest.losses, **new})
            self._check_space(cluster, ready, with_new, writer.keep, new)
            writer.add_losses(new)
        task = {
            name: value for name, value in laid_out.provenance.items() if name.startswith("task")
        }
        if any(recorded.provenance[name] != value for name, value in task.items()):
            writer.note(task)

    def _say_what_stays(self, manifest: Manifest) -> None:
        """Say which losses were not asked for, and so do not cover the checkpoints that were
        added.
        """
        for name, record in manifest.losses.items():
            if record.covers is not None:
                last, step = manifest.checkpoints[-1].step, manifest.of(name).checkpoints[-1].step
                self.tell(
                    Note(
                        f"loss {name!r} stays as it is, up to step {step}; the checkpoints go on "
                        f"to step {last}. Take it there with "
                        f"--loss {name}, or every loss with --loss all"
                    )
                )

    def _replay(
        self,
        cluster: Cluster,
        writer: RunWriter,
        common: RunRequest[Any],
        stop: _Stop,
        lock: store.Held,
    ) -> None:
        manifest, losses = writer.manifest, common.setup.losses
        store.remove_reports(self.path)
        covered = {name: manifest.of(name) for name in losses}
        waiting: dict[
            tuple[int, int], list[str]
        ] = {}  # by span and its segments: in a repair losses may end at different ones
        for name in losses:
            writer.fold_all(name)
            for span in writer.pending(name):
                if self.only is None or span in self.only[name]:
                    waiting.setdefault((span, covered[name].length(span)), []).append(name)
        pending = sum(len(names) * length for (_, length), names in waiting.items())
        total = sum(of_loss.segments for of_loss in covered.values())
        directory = common.run
        if self.announcement is not None:
            self.announcement.end()
        self.tell(
            Planned(pending, total, len(waiting), cluster.workers, directory if pending else "")
        )
        self.workers = cluster.workers if pending else 0
        specs = (
            to_plain(_span_request(common, covered[names[0]], span, names, durable=self.durable))
            for (span, _), names in sorted(waiting.items())
        )
        silent: set[tuple[str, str, bool]] = set()
        lock.working = True  # until its end, workers may leave temporary files
        with contextlib.closing(cluster.map(replay_span, specs, committed_result)) as outcomes:
            for outcome in outcomes:
                silent |= self._hear(cluster, writer, outcome)
                if lock.lost.is_set():
                    raise ResourceError(
                        f"another driver took {self.path} over, because this one did not show for "
                        f"minutes. What was committed is kept."
                    )
        unfolded = {span: name for name in losses for span in writer.fold_all(name)}
        for span, name in sorted(unfolded.items()):
            self._failed(
                covered[name], span, "its totals were damaged while they waited to be joined"
            )
        lock.working = False
        store.remove_reports(self.path)
        if self.torn:  # of a worker that died while it wrote, temporary files stay
            writer.sweep()
        if self.smaller > 1:
            self.tell(
                Note(
                    f"out of memory {self.smaller} times; a smaller --batch-size from the start, "
                    f"in another run, is faster"
                )
            )
        for note in _of_silent(silent):
            self.tell(Note(note))
        if stop.event.is_set():
            raise _interrupted(stop.signal)

    def _hear(
        self, cluster: Cluster, writer: RunWriter, outcome: Outcome
    ) -> set[tuple[str, str, bool]]:
        """Pass on what a cluster says; return losses, tensors without a gradient, and whether the
        loss depends on them.
        """
        manifest = writer.manifest
        if isinstance(outcome, Refused):
            self.tell(Note(f"worker {outcome.worker} joined and takes no part: it {outcome.why}"))
        elif isinstance(outcome, Waiting):
            self.tell(Note(f"no worker is left; waiting {outcome.seconds:.0f} s for one to join"))
        elif isinstance(outcome, Done):
            return (
                self._take(writer, outcome, cluster.workers)
                if outcome.result is not None
                else set()
            )
        else:
            request = from_plain(SpanRequest, outcome.spec)
            span, manifest = request.span, manifest.of(request.pending[0])
            where = (span, *_steps(manifest, span))
            if isinstance(outcome, Lost):
                self.torn = True
                self._failed(manifest, span, f"no worker could finish it ({outcome.why})")
            elif isinstance(outcome, Retried):
                self.torn = True
                self.tell(SpanRetried(*where, outcome.worker, outcome.why))
            elif isinstance(outcome, Slow):
                self.tell(SpanSlow(*where, outcome.worker, outcome.seconds, outcome.doing))
        return set()

    def _failed(
        self, manifest: Manifest, span: int, message: str, not_finite: int | None = None
    ) -> None:
        failure = SpanFailed(span, *_steps(manifest, span), message, not_finite)
        self.failed.append(failure)
        self.tell(failure)

    def _take(self, writer: RunWriter, done: Done, workers: int) -> set[tuple[str, str, bool]]:
        request, answer = from_plain(SpanRequest, done.spec), answered(SpanRequest, done.result)
        manifest, span = writer.manifest, request.span
        if isinstance(answer, Failure):
            error = answer.exception()
            if isinstance(error, ResourceError):
                raise error
            step = error.step if isinstance(error, NotFiniteError) else None
            self._failed(manifest.of(request.pending[0]), span, str(error), step)
            return set()
        self.span_seconds, self.workers = answer.seconds, workers
        parts = answer.losses.values()
        for name, part in answer.losses.items():
            self._join(writer, name, span, part.ends)
            whole = manifest.losses[name].batch_size
            if part.batch_size < whole:
                self.smaller += 1
                if self.smaller == 1:
                    self.tell(
                        Note(
                            f"out of memory on {done.worker}: span {span} of loss {name!r} was "
                            f"computed in batches of "
                            f"{part.batch_size} instead of {whole}, equal within rounding; its "
                            f"marker says so"
                        )
                    )
        self.tell(
            SpanDone(
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
                workers=workers,
            )
        )
        return {
            (loss, tensor, tensor in part.hidden)
            for loss, part in answer.losses.items()
            for tensor in part.silent
        }

    def _join(self, writer: RunWriter, loss: str, span: int, ends: list[float]) -> None:
        """Compare a span with those beside it, once they are committed; here alone, so that no two
        miss each other.
        """
        heard = self.heard.setdefault(loss, {})
        heard[span] = ends
        for later in (span, span + 1):
            what = store.disagreement(writer.commits(loss), later, heard)
            if what is not None:
                raise LCAError(
                    f"{what}: not both are of the data and the model that are meant, or a machine "
                    f"erred. `lca verify {self.path}` lists "
                    f"where, `lca repair {self.path} --task FILE` computes it again."
                )


def _of_silent(silent: set[tuple[str, str, bool]]) -> Iterator[str]:
    """Yield notes about tensors that moved and that no gradient of a loss reaches, by loss: hidden
    from it, or not used at all.
    """
    for loss in sorted({loss for loss, _, _ in silent}):
        hidden = {tensor for other, tensor, depends in silent if other == loss and depends}
        unused = {tensor for other, tensor, _ in silent if other == loss} - hidden
        if unused:
            yield f"tensors moved without loss {loss!r} depending on them (allocated 0): {few(sorted(unused), 5)}"
        if hidden:
            yield (
                f"tensors moved that loss {loss!r} depends on through detach() or no_grad() alone, "
                f"so that no gradient reaches them "
                f"(allocated 0): {few(sorted(hidden), 5)}. Their share is in the residual, which "
                f"no smaller tolerance mends"
            )


def _failures(failed: list[SpanFailed]) -> str:
    first = failed[0]
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (
        f"{count(len(failed), 'span')} failed; the others are complete. Steps {first.first_step} "
        f"to "
        f"{first.last_step}{more}: {first.message}{_not_finite(failed)}"
    )


def _not_finite(failed: list[SpanFailed]) -> str:
    """Return which checkpoints hold NaN or Inf, where spans failed for that, and that trying again
    does not help.
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
    """Return the training steps a span runs from and to."""
    rows = manifest.rows(span)
    return manifest.checkpoints[rows.start].step, manifest.checkpoints[rows.stop].step


def _span_request(
    common: RunRequest[Any], manifest: Manifest, span: int, pending: list[str], *, durable: bool
) -> SpanRequest:
    """Return the request to replay one span for its pending losses, with the checkpoints it reads.

    Args:
        common: to all spans.
        manifest: of the run up to where the pending losses end.
        span: its number.
        pending: the losses.
        durable: whether it is on the disk before it counts.
    """
    rows = manifest.rows(span)
    positions = (*looks_back(rows.start), *range(rows.start, rows.stop + 1))
    return SpanRequest(
        setup=common.setup,
        points=replace(
            common.points, checkpoints={index: manifest.checkpoints[index] for index in positions}
        ),
        run=common.run,
        batch_sizes=common.batch_sizes,
        durable=durable,
        span=span,
        pending=pending,
        calibration={name: record.calibration for name, record in manifest.losses.items()},
    )
