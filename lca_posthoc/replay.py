"""Pending spans to workers, commits back as a stream of progress events; creation, resume, drain.

`run` is what `lca run` calls.
"""

from __future__ import annotations

import contextlib
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from . import store
from .cluster import Cluster, Spec, open_cluster, visible_device
from .errors import InputError, Interrupted, LCAError, ResourceError, SpanError, unpack
from .quadrature import RULES
from .records import KEEP
from .store import LossRecord, Manifest, Run, RunWriter, StoredTensor
from .store.keys import encode_all
from .task import Entry, Task, digest, entry
from .trajectory import Checkpoint, TensorSpec, Trajectory, open_trajectory
from .worker import describe, probe, replay_span

if TYPE_CHECKING:
    from types import FrameType

DEFAULTS: dict[str, Any] = {
    "rule": "simpson",
    "tolerance": 1e-3,
    "allocation_tolerance": "inf",
    "keep": "parameters",
    "batch_size": None,
    "device": None,
    "precision": "float32",
    "norm_stats": "running",
    "steps": None,
    "pattern": None,
    "rename": [],
}
CHOICES = {
    "rule": tuple(RULES),
    "keep": KEEP,
    "precision": ("float32", "float64"),
    "norm_stats": ("running", "batch"),
    "device": ("cpu", "cuda"),
}
_SPAN_BYTES = 256 * 2**20
_LONGEST_SPAN = 16
_WINDOWS = 64


# --- what the caller hears ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """Something the user should know; the run goes on."""

    text: str


@dataclass(frozen=True)
class Planned:
    """Work is about to start: segments of all losses pending and in all, and the workers that will do it."""

    pending: int
    total: int
    workers: int


@dataclass(frozen=True)
class SpanDone:
    """A span was committed. `evaluations` and `forward_passes` are over its losses, `seconds` on the worker."""

    span: int
    losses: list[str]
    segments: int
    worst_residual: float
    unconverged: int
    evaluations: int
    forward_passes: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class SpanFailed:
    """A span could not be replayed; the others go on."""

    span: int
    first_step: int
    last_step: int
    message: str


Event = Note | Planned | SpanDone | SpanFailed
Listener = Callable[[Event], None]


# --- settings ----------------------------------------------------------------------------------------------------------


def _settings(asked: dict[str, Any], recorded: dict[str, Any] | None) -> dict[str, Any]:
    """What was asked, over what is recorded or the defaults; a recorded setting is never changed."""
    given = {name: value for name, value in asked.items() if value not in (None, [], "auto")}
    for name, value in given.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{_option(name)} {value!r} is not one of {', '.join(CHOICES[name])}.")
    for name in ("tolerance", "allocation_tolerance"):
        if name in given:
            given[name] = _positive(name, given[name])
    if given.get("batch_size") is not None and given["batch_size"] < 1:
        raise InputError(f"--batch-size must be 1 or more, got {given['batch_size']}.")
    if recorded is None:
        settings = {**DEFAULTS, **given}
        settings["device"] = settings["device"] or visible_device()
        return settings
    for name, value in given.items():
        if recorded[name] != value:
            raise InputError(
                f"this run was made with {_option(name)} {recorded[name]}, not {value}. Leave {_option(name)} out to go on with it, "
                "or write another run with --out."
            )
    return recorded


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(name: str, value: Any) -> float | str:
    number = float(value)
    if not number > 0:
        raise InputError(f"{_option(name)} must be a positive number or inf, got {value}.")
    return number if number < float("inf") else "inf"


def choose_span(segments: int, workers: int, elements: int) -> int:
    """Segments per span: a power of two, at most 16, at most 256 MiB of allocation, at least two spans per worker."""
    most = min(_LONGEST_SPAN, max(1, segments // (2 * workers)), max(1, _SPAN_BYTES // (4 * max(1, elements))))
    return int(2 ** (most.bit_length() - 1))


def _choose_window(segments: int, span: int) -> int:
    """Spans per window of totals: a power of two that gives at most 64 windows."""
    window = 1
    while -(-segments // (span * window)) > _WINDOWS:
        window *= 2
    return window


# --- the run -----------------------------------------------------------------------------------------------------------


def run(
    checkpoints: str | Path,
    task: str | Path | Task,
    *,
    losses: Sequence[str] | None = None,
    out: str | Path | None = None,
    rule: str | None = None,
    tolerance: float | None = None,
    allocation_tolerance: float | None = None,
    keep: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    norm_stats: str | None = None,
    steps: str | None = None,
    pattern: str | None = None,
    rename: Sequence[str] = (),
    cluster: str = "local",
    workers: int | None = None,
    span: int | None = None,
    progress: Listener | None = None,
) -> Run:
    """Allocate the loss change of every segment to every parameter; run again, it resumes.

    Args:
        checkpoints: directory of safetensors iterates.
        task: `FILE`, `FILE:FUNCTION`, `pkg.module:FUNCTION`, or a Task.
        losses: names of the task's losses; None for its first, `["all"]` for every one.
        out: the run directory; `CHECKPOINTS.lca` by default.
        rule: "simpson" (default), "trapezoid", or fixed: "left", "midpoint", "gauss-2", "gauss-3".
        tolerance: bound on |residual| per segment and loss, in units of loss (default 1e-3; inf never refines).
        allocation_tolerance: bound on the allocation's own L1 error as well (default inf).
        keep: "parameters" (default), "units" or "tensors".
        batch_size: examples per batch; a deterministic choice by default.
        device: "cuda" or "cpu"; by default a GPU where there is one.
        precision: "float32" (default) or "float64".
        norm_stats: "running" (default) or "batch".
        steps: `A:B[:K]`, training steps.
        pattern: regular expression with a group `step` for names of checkpoints.
        rename: `OLD=NEW` pairs for tensor names.
        cluster: "local" or "inline".
        workers: local workers; by default one per GPU, or one per core.
        span: segments per span, a power of two; decides how work is cut, never a result.
        progress: called with every event.

    Returns:
        The run, opened.

    Raises:
        InputError: for anything wrong before the first evaluation.
        SpanError: where spans failed; the others are complete.
        ResourceError: where workers, a GPU or space are missing.
        Interrupted: after Ctrl-C or SIGTERM, when the spans in flight are done.
    """
    asked = {
        "rule": rule,
        "tolerance": tolerance,
        "allocation_tolerance": allocation_tolerance,
        "keep": keep,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "norm_stats": norm_stats,
        "steps": steps,
        "pattern": pattern,
        "rename": list(rename),
    }
    if span is not None and (span < 1 or span & (span - 1)):
        raise InputError(f"span must be a power of two, got {span}.")
    path = Path(out) if out is not None else default_out(checkpoints)
    job = _Job(Path(checkpoints), entry(task), list(losses or []), path, asked, span, progress or (lambda event: None))
    with _signals() as stop:
        job.run(cluster, workers, stop)
    return store.open_run(path)


def default_out(checkpoints: str | Path) -> Path:
    """Where a run goes unless told: beside the checkpoints, with `.lca` added."""
    place = Path(checkpoints)
    place = place.resolve() if place.name in ("", "..") else place
    return place.with_name(f"{place.name}.lca")


@dataclass
class _Stop:
    """A request to drain: the event a cluster listens to, and the signal that asked."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: int = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """The first Ctrl-C or SIGTERM drains, the second one aborts."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.event.is_set():
            raise _interrupted(number)
        stop.signal = number
        stop.event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int) -> Interrupted:
    error = Interrupted("stopped; what was committed is kept. Run the same command again to go on.")
    error.exit_code = 128 + number
    return error


@dataclass
class _Job:
    """One call of `run`: from a trajectory and a task to a complete run directory."""

    checkpoints: Path
    task: Entry
    wanted: list[str]
    path: Path
    asked: dict[str, Any]
    span: int | None
    tell: Listener
    failed: list[SpanFailed] = field(default_factory=list)

    def run(self, kind: str, workers: int | None, stop: _Stop) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"--workers must be 1 or more, got {workers}.")
        recorded = store.read_manifest(self.path) if (self.path / "run.json").exists() else None
        settings = _settings(self.asked, recorded.settings if recorded else None)
        trajectory = open_trajectory(
            self.checkpoints, pattern=settings["pattern"], rename=settings["rename"], steps=settings["steps"]
        )
        for note in trajectory.notes:
            self.tell(Note(note))
        if recorded is not None:
            _same_checkpoints(recorded, trajectory, self.path)
            if self._is_finished(recorded, trajectory):
                return
        elif self.path.exists():
            raise InputError(f"{self.path} exists and is not a run directory (it has no run.json). Choose another place with --out.")
        with _inline_threads(kind), open_cluster(kind, workers, settings["device"], stop.event) as cluster:
            self._work(cluster, settings, trajectory, stop)
        if self.failed:
            raise SpanError(_failures(self.failed))

    def _is_finished(self, manifest: Manifest, trajectory: Trajectory) -> bool:
        """Whether nothing is left to do, told from the task file's bytes and the markers alone."""
        if manifest.provenance["task_sha256"] != digest(self.task) or len(trajectory.checkpoints) != len(manifest.checkpoints):
            return False
        known = manifest.provenance["task_losses"]
        wanted = known if self.wanted == ["all"] else self.wanted or known[:1]
        writer = RunWriter(self.path, manifest)
        finished = set(wanted) <= set(manifest.losses) and all(writer.is_complete(name) for name in wanted)
        if finished:
            self.tell(Planned(0, manifest.segments * len(wanted), 0))
        return finished

    # --- before the spans ---

    def _work(self, cluster: Cluster, settings: dict[str, Any], trajectory: Trajectory, stop: _Stop) -> None:
        found = self._ask(cluster, describe, {"task": self.task, "settings": settings, "losses": self.wanted or None}, stop)
        table = [TensorSpec(**{**each, "shape": tuple(each["shape"]), "aliases": tuple(each["aliases"])}) for each in found["tensors"]]
        names = trajectory.match(table)
        existing = store.read_manifest(self.path) if (self.path / "run.json").exists() else None
        common = {
            "task": self.task,
            "settings": settings,
            "losses": list(found["losses"]),
            "names": names,
            "root": str(trajectory.root.resolve()),
        }
        batch_sizes = {record.on: record.batch_size for record in existing.losses.values()} if existing else {}
        probed = self._ask(cluster, probe, {**common, **_probe_part(trajectory, table), "batch_sizes": batch_sizes}, stop)
        for note in probed["notes"]:
            self.tell(Note(note))
        records = _records(found["losses"], probed, [record.key for record in existing.losses.values()] if existing else [])
        if existing is None:
            manifest = self._manifest(trajectory, table, names, settings, records, cluster.workers, found["task_losses"])
            self._check_space(store.required_bytes(manifest, settings["keep"], len(records)))
            store.create(self.path, manifest)
        with store.hold(self.path) as unclean:
            writer = RunWriter.open(self.path)
            if unclean:
                writer.sweep()
            self._bring_up(writer, trajectory, records)
            self._replay(cluster, writer, common, batch_sizes | probed["batch_sizes"], stop)

    def _ask(self, cluster: Cluster, work: Callable[[Spec], Spec], spec: Spec, stop: _Stop) -> Spec:
        """One answer from one worker."""
        answers = list(cluster.map(work, [spec]))
        if not answers or (answers[0].result is None and answers[0].lost is None):
            raise _interrupted(stop.signal)
        answer = answers[0]
        if answer.lost is not None:
            raise ResourceError(
                f"a worker died while it looked at the task ({answer.lost}). Often memory: try fewer --workers or a smaller "
                "--batch-size, or --cluster inline to see the cause."
            )
        return _unwrapped(answer.result)

    def _manifest(
        self,
        trajectory: Trajectory,
        table: list[TensorSpec],
        names: dict[str, str],
        settings: dict[str, Any],
        records: dict[str, LossRecord],
        workers: int,
        task_losses: list[str],
    ) -> Manifest:
        keys = encode_all(spec.name for spec in table)
        segments = len(trajectory.checkpoints) - 1
        span = self.span or choose_span(segments, workers, sum(spec.elements for spec in table))
        return Manifest(
            str(trajectory.root),
            [StoredTensor(spec, names[spec.name], keys[spec.name]) for spec in table],
            _relative(trajectory),
            span,
            _choose_window(segments, span),
            settings,
            records,
            _provenance(self.task, task_losses),
        )

    def _check_space(self, needed: int) -> None:
        place = self.path.resolve().parent
        while not place.exists():
            place = place.parent
        free = psutil.disk_usage(str(place)).free
        if needed > free:
            raise ResourceError(
                f"the result may need {needed / 1e9:,.2f} GB but {place} has {free / 1e9:,.2f} GB free. Keep less with --keep units or "
                "--keep tensors, or write elsewhere with --out."
            )

    def _bring_up(self, writer: RunWriter, trajectory: Trajectory, records: dict[str, LossRecord]) -> None:
        """Compare with what is recorded, then take up new losses and new checkpoints."""
        manifest = writer.manifest
        _same_checkpoints(manifest, trajectory, self.path)
        for name, record in records.items():
            if name in manifest.losses:
                _same_loss(name, manifest.losses[name], record, len(trajectory.checkpoints) == len(manifest.checkpoints))
        if len(trajectory.checkpoints) > len(manifest.checkpoints):
            writer.extend(_relative(trajectory))
        new = {name: record for name, record in records.items() if name not in manifest.losses}
        if new:
            self._check_space(store.required_bytes(writer.manifest, writer.keep, len(new)))
            writer.add_losses(new)

    # --- the spans ---

    def _replay(self, cluster: Cluster, writer: RunWriter, common: dict[str, Any], batch_sizes: dict[str, int], stop: _Stop) -> None:
        manifest = writer.manifest
        for name in common["losses"]:
            writer.fold_all(name)
        waiting: dict[int, list[str]] = {}
        for name in common["losses"]:
            for span in writer.pending(name):
                waiting.setdefault(span, []).append(name)
        pending = sum(len(names) * _length(manifest, span) for span, names in waiting.items())
        self.tell(Planned(pending, manifest.segments * len(common["losses"]), cluster.workers))
        specs = (
            {**common, **_span_part(manifest, span), "run": str(self.path.resolve()), "pending": names, "batch_sizes": batch_sizes}
            for span, names in sorted(waiting.items())
        )
        silent: set[str] = set()
        for done in cluster.map(replay_span, specs):
            if done.result is not None or done.lost is not None:
                self._take(done.spec, done.result or {"error": {"kind": "SpanError", "message": f"its worker died twice ({done.lost})"}}, manifest, silent, stop)
        for name in common["losses"]:
            writer.fold_all(name)
        if silent:
            self.tell(Note(f"buffers moved without the loss depending on them (allocated 0): {', '.join(sorted(silent)[:5])}"))
        if stop.event.is_set():
            raise _interrupted(stop.signal)

    def _take(self, spec: Spec, result: Spec, manifest: Manifest, silent: set[str], stop: _Stop) -> None:
        """Pass on what became of one span."""
        if "error" in result:
            error = unpack(result["error"])
            if isinstance(error, ResourceError):
                raise error
            rows = manifest.rows(spec["span"])
            failure = SpanFailed(spec["span"], manifest.checkpoints[rows.start].step, manifest.checkpoints[rows.stop].step, str(error))
            self.failed.append(failure)
            self.tell(failure)
            return
        facts = result["losses"].values()
        silent.update(name for fact in facts for name in fact["silent"])
        self.tell(
            SpanDone(
                spec["span"],
                list(result["losses"]),
                result["segments"],
                max(fact["worst_residual"] for fact in facts),
                sum(fact["unconverged"] for fact in facts),
                sum(fact["evaluations"] for fact in facts),
                sum(fact["forward_passes"] for fact in facts),
                result["seconds"],
                result["peak_bytes"],
            )
        )


def _unwrapped(answer: Spec) -> Spec:
    if "error" in answer:
        error = unpack(answer["error"])
        # A failure before the first span is never "some spans failed".
        raise (InputError(str(error)) if isinstance(error, SpanError) else error) from RuntimeError(answer["trace"])
    return answer


def _length(manifest: Manifest, span: int) -> int:
    rows = manifest.rows(span)
    return rows.stop - rows.start


def _failures(failed: list[SpanFailed]) -> str:
    first = failed[0]
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return (
        f"{len(failed)} span{'s' if len(failed) > 1 else ''} failed; the others are complete. Steps {first.first_step} to "
        f"{first.last_step}{more}: {first.message}"
    )


def _relative(trajectory: Trajectory) -> list[Checkpoint]:
    """Checkpoints with their files relative to the trajectory's root, so that a directory can be moved."""
    return [
        Checkpoint(each.step, tuple(file.relative_to(trajectory.root) for file in each.files), each.size, each.fingerprint)
        for each in trajectory.checkpoints
    ]


def _json(checkpoint: Checkpoint) -> list[Any]:
    return [checkpoint.step, [str(file) for file in checkpoint.files], checkpoint.size, checkpoint.fingerprint]


def _probe_part(trajectory: Trajectory, table: list[TensorSpec]) -> dict[str, Any]:
    ends = len(trajectory.checkpoints) - 1
    middle = (ends - 1) // 2
    relative = _relative(trajectory)
    return {
        "ends": ends,
        "half": trajectory.half_precision,
        "checkpoints": {str(index): _json(relative[index]) for index in {0, 1, middle, middle + 1, ends - 1, ends}},
    }


def _span_part(manifest: Manifest, span: int) -> dict[str, Any]:
    rows = manifest.rows(span)
    return {
        "span": span,
        "checkpoints": {str(index): _json(manifest.checkpoints[index]) for index in range(rows.start, rows.stop + 1)},
        "calibration": {name: record.calibration for name, record in manifest.losses.items()},
    }


def _records(losses: dict[str, Any], probed: dict[str, Any], taken: list[str]) -> dict[str, LossRecord]:
    keys = encode_all(losses, taken)
    return {
        name: LossRecord(
            keys[name],
            loss["on"],
            loss["kind"],
            loss["examples"],
            probed["batch_sizes"][loss["on"]],
            probed["calibration"][name],
            probed["identity"][name],
        )
        for name, loss in losses.items()
    }


def _same_checkpoints(manifest: Manifest, trajectory: Trajectory, path: Path) -> None:
    """The recorded checkpoints must be the first ones found; more may follow."""
    found = _relative(trajectory)
    for index, recorded in enumerate(manifest.checkpoints):
        if index >= len(found) or found[index].step != recorded.step:
            what = f"step {recorded.step} is missing" if recorded.step not in trajectory.steps else f"step {found[index].step} is new before it"
        elif (found[index].size, found[index].fingerprint) != (recorded.size, recorded.fingerprint):
            what = f"the content of step {recorded.step} differs"
        else:
            continue
        raise InputError(f"{trajectory.root} holds other checkpoints than {path} was made from: {what}. Restore them, or write another run with --out.")


def _same_loss(name: str, recorded: LossRecord, found: LossRecord, same_end: bool) -> None:
    """A recorded name must mean the same loss: same settings, same value and gradient norm on a fixed sample."""
    from .objective import Identity

    for setting in ("on", "kind", "examples"):
        if getattr(recorded, setting) != getattr(found, setting):
            raise InputError(_other_loss(name, setting, getattr(recorded, setting), getattr(found, setting)))
    for place in (0, 1) if same_end else (0,):
        before, now = recorded.identity[place], found.identity[place]
        if (before is None) != (now is None) or (before and now and not Identity(**before).matches(Identity(**now))):
            where = "first" if place == 0 else "last"
            raise InputError(_other_loss(name, f"value and gradient norm at the {where} checkpoint", before, now))


def _other_loss(name: str, field: str, before: object, now: object) -> str:
    return (
        f"loss {name!r} is not the one recorded under that name: its {field} was {before}, now {now}. Give the new loss another "
        "name, or write another run with --out."
    )


def _provenance(task: Entry, task_losses: list[str]) -> dict[str, Any]:
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": task.get("path") or task.get("module") or "an object",
        "task_function": task.get("function"),
        "task_sha256": digest(task),
        "task_losses": task_losses,
        "lca_posthoc": version("lca_posthoc"),
        **{name: version(name) for name in ("torch", "safetensors", "numpy", "zarr")},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@contextlib.contextmanager
def _inline_threads(kind: str) -> Iterator[None]:
    """Give back the threads a replay in this process took."""
    if kind != "inline" or "torch" not in sys.modules:
        yield
        return
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["DEFAULTS", "Event", "LCAError", "Note", "Planned", "SpanDone", "SpanFailed", "choose_span", "default_out", "run"]
