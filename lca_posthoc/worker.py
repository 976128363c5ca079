"""What runs on a worker: describe a task, probe it, replay one span. Each takes a JSON-like spec and returns one.

The model and the data are built once per process, in a cache keyed by what they were built from.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import resource
import socket
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import InputError, LCAError, ResourceError, SpanError, pack
from .trajectory import Checkpoint, read_checkpoint

Spec = dict[str, Any]
_STATES: OrderedDict[str, Any] = OrderedDict()
_LOCK = threading.Lock()
_KEPT = 2


def _objective(spec: Spec) -> Any:
    """The objective of a spec, built once per process."""
    from . import task

    settings = spec["settings"]
    place = [spec["task"].get(name) for name in ("kind", "path", "module", "function")]
    parts = {"task": [*place, task.digest(spec["task"])], "losses": spec["losses"]}
    key = json.dumps(
        [parts, [settings[name] for name in ("device", "precision", "norm_stats", "batch_size")]], sort_keys=True
    )
    with _LOCK:
        if key not in _STATES:
            while len(_STATES) >= _KEPT:
                _STATES.popitem(last=False)
            _STATES[key] = _build(spec, settings["precision"])
        _STATES.move_to_end(key)
        return _STATES[key]


def _build(spec: Spec, precision: str) -> Any:
    import torch

    from . import task
    from .objective import Objective

    settings = spec["settings"]
    device = torch.device(settings["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no GPU is visible to this worker. Use --device cpu, or make one visible with CUDA_VISIBLE_DEVICES."
        )
    return Objective(
        lambda: task.load(spec["task"]),
        spec["losses"],
        device=device,
        precision=precision,
        norm_stats=settings["norm_stats"],
        batch_size=settings["batch_size"],
    )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """One thread on the CPU, float32 as float32 on a GPU, one kernel with and without gradients; put back afterwards."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    threads, tf32, fast = torch.get_num_threads(), matmul.allow_tf32, torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    matmul.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
        matmul.allow_tf32 = tf32
        torch.backends.mha.set_fastpath_enabled(fast)


def _reported(work: Callable[[Spec], Spec]) -> Callable[[Spec], Spec]:
    """Failures come back as plain strings: an exception that cannot be unpickled elsewhere would hide its cause."""

    @functools.wraps(work)
    def reported(spec: Spec) -> Spec:
        import torch

        try:
            with _deterministic():
                return work(spec)
        except LCAError as error:
            return {"error": pack(error), "trace": traceback.format_exc()}
        except (MemoryError, torch.OutOfMemoryError) as error:
            hint = "Give a smaller --batch-size" + (
                "" if spec["settings"]["batch_size"] is None else f" than {spec['settings']['batch_size']}"
            )
            return {
                "error": pack(ResourceError(f"out of memory ({str(error)[:200]}). {hint}.")),
                "trace": traceback.format_exc(),
            }
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = (
                ResourceError(f"no space left for the result ({error}). Free some and run again.")
                if full
                else SpanError(str(error))
            )
            return {"error": pack(kind), "trace": traceback.format_exc()}
        except Exception as error:
            return {"error": pack(SpanError(f"{type(error).__name__}: {error}")), "trace": traceback.format_exc()}

    return reported


@_reported
def describe(spec: Spec) -> Spec:
    """What the task holds: the model's tensors, and of each loss its split and its kind."""
    objective = _objective(spec)
    losses = {
        name: {
            "on": loss.on,
            "kind": "call" if loss.call else "function",
            "examples": objective.splits[loss.on].examples,
        }
        for name, loss in objective.losses.items()
    }
    return {
        "tensors": [asdict(each) for each in objective.table],
        "losses": losses,
        "task_losses": objective.task_losses,
    }


@_reported
def probe(spec: Spec) -> Spec:
    """Check the task on a small sample at the first checkpoint; identify each loss there and at the last one."""
    objective = _objective(spec)
    names = list(objective.losses)
    first = _first_point(spec, objective)
    batch_sizes = objective.settle_batch_sizes(first, spec["batch_sizes"])
    _same_ties(spec)
    notes = [note for name in names for note in _checks(spec, objective, name)]
    notes += _unmoved(spec)
    identities = _identities(spec, objective, first, names)
    new = [name for name in names if name not in spec["recorded"]]  # a recorded loss keeps its calibration
    calibrations = _calibrations(spec, objective, new) if new and spec["settings"]["rule"] == "trapezoid" else {}
    return {
        "batch_sizes": batch_sizes,
        "identity": identities,
        "calibration": {name: calibrations.get(name) for name in names},
        "notes": notes,
    }


def _first_point(spec: Spec, objective: Any) -> Any:
    try:
        return _point(spec, 0, objective)
    except SpanError as error:
        raise InputError(str(error)) from None


def _same_ties(spec: Spec) -> None:
    """Names the task ties must hold one value in the checkpoints, or the model that was trained did not tie them."""
    checkpoint = _checkpoint(spec, 0)
    for name, sources in spec["ties"].items():
        held = read_checkpoint(checkpoint, {source: source for source in sources})
        for source in sources[1:]:
            if not bool((held[source] == held[sources[0]]).all()):
                raise InputError(
                    f"the task's model ties {name!r}, but {sources[0]!r} and {source!r} differ in {checkpoint.files[0]} (step "
                    f"{checkpoint.step}). Build the model that was trained."
                )


def _checks(spec: Spec, objective: Any, name: str) -> list[str]:
    from .objective import check_loss

    notes: list[str] = check_loss(objective, name)
    if spec["settings"]["precision"] == "float64":
        _same_in_float32(spec, objective, name)
    return notes


def _same_in_float32(spec: Spec, objective: Any, name: str) -> None:
    """Refuse float64 where code with float32 constants makes it another function."""
    from .objective import identify

    single = _build(spec, "float32")
    single.settle_batch_sizes(_point(spec, 0, single), objective.batch_sizes)
    wide, narrow = identify(objective, name).loss, identify(single, name).loss
    if abs(wide - narrow) > 1e-4 * max(abs(wide), abs(narrow), 1e-12):
        raise InputError(
            f"loss {name!r} is {wide:.6g} in float64 but {narrow:.6g} in float32 at the first checkpoint: the model or the loss "
            "holds float32 constants (a mask, say). Use --precision float32."
        )


def _identities(spec: Spec, objective: Any, first: Any, names: list[str]) -> dict[str, list[dict[str, float] | None]]:
    from .objective import identify

    found: dict[str, list[dict[str, float] | None]] = {name: [] for name in names}
    for index in (0, spec["ends"]):
        try:
            objective.place(first if index == 0 else _point(spec, index, objective))
        except SpanError:  # a run that diverged: its last spans will fail and say so
            for name in names:
                found[name].append(None)
            continue
        for name in names:
            identity = asdict(identify(objective, name))
            found[name].append(identity if all(map(math.isfinite, identity.values())) else None)
    return found


def _samples(spec: Spec) -> list[int]:
    """A few segments: the first, the middle, the last."""
    return sorted({0, (spec["ends"] - 1) // 2, spec["ends"] - 1})


def _calibrations(spec: Spec, objective: Any, names: list[str]) -> dict[str, float]:
    from .allocation import calibrate

    found = dict.fromkeys(names, 0.0)
    for index in _samples(spec):
        try:
            shares = calibrate(_point(spec, index, objective), _point(spec, index + 1, objective), objective, names)
        except SpanError:
            continue
        found |= {name: max(found[name], share) for name, share in shares.items() if math.isfinite(share)}
    return found


def _unmoved(spec: Spec) -> list[str]:
    """The share of half-precision parameters that did not move at all on a few segments."""
    if not spec["half"]:
        return []
    same = count = 0
    for index in _samples(spec):
        try:
            before, after = (read_checkpoint(_checkpoint(spec, at), spec["names"]) for at in (index, index + 1))
        except SpanError:
            continue
        for name in before:
            if before[name].is_floating_point():
                same += int((before[name].float() == after[name].float()).sum())
                count += before[name].numel()
    return [
        f"checkpoints are stored in half precision ({len(spec['half'])} tensors): {same / max(1, count):.1%} of the parameters do not "
        "move at all on sampled segments, and what does not move is allocated nothing. Record float32 weights."
    ]


def _checkpoint(spec: Spec, index: int) -> Checkpoint:
    step, files, size, fingerprint = spec["checkpoints"][str(index)]
    return Checkpoint(step, tuple(Path(spec["root"]) / file for file in files), size, fingerprint)


def _point(spec: Spec, index: int, objective: Any) -> Any:
    """A checkpoint on the device, floating tensors in the precision of the run or the one they were stored in, if higher."""
    stored = read_checkpoint(_checkpoint(spec, index), spec["names"])
    wider = {name for name, tensor in stored.items() if tensor.element_size() > objective.dtype.itemsize}
    return {
        name: tensor.to(objective.device, objective.dtype)
        if tensor.is_floating_point() and name not in wider
        else tensor.to(objective.device)
        for name, tensor in stored.items()
    }


_TIMED_SECONDS = 1.0
_WORTH_SAYING = 1.15


@_reported
def measure(spec: Spec) -> Spec:
    """Seconds of one evaluation of each loss, from a few timed batches, and advice on the batch size."""
    objective = _objective(spec)
    objective.settle_batch_sizes(_first_point(spec, objective), spec["batch_sizes"])
    seconds, advice = {}, []
    for name, loss in objective.losses.items():
        split, chosen = objective.splits[loss.on], objective.batch_sizes[loss.on]
        per_example = {size: _seconds_per_example(objective, loss, size) for size in _sizes(chosen, split.examples)}
        seconds[name] = per_example[chosen] * split.examples
        fastest = min(per_example, key=lambda size: per_example[size])
        gain = per_example[chosen] / per_example[fastest]
        if gain > _WORTH_SAYING and objective.norm_stats == "running":
            advice.append(
                f"loss {name!r}: batches of {fastest} were {gain:.2f} times as fast as {chosen} (--batch-size {fastest})"
            )
    return {"seconds": seconds, "advice": advice}


def _sizes(chosen: int, examples: int) -> list[int]:
    """The batch size in use and its neighbours."""
    return sorted({min(max(1, size), examples) for size in (chosen // 4, chosen // 2, chosen, chosen * 2, chosen * 4)})


def _seconds_per_example(objective: Any, loss: Any, size: int) -> float:
    """The fastest of a few batches, the first one not counted."""
    batch = objective.splits[loss.on].slice(0, size)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < 8 and time.perf_counter() - began < _TIMED_SECONDS):
        start = time.perf_counter()
        objective.over(loss, iter([batch]))
        times.append(time.perf_counter() - start)
    return min(times[1:]) / size


@_reported
def replay_span(spec: Spec) -> Spec:
    """Allocate the segments of one span for its pending losses, write and commit them."""
    from .allocation import Method, allocate_span
    from .quadrature import RULES
    from .store import RunWriter
    from .tally import Tally

    started = time.perf_counter()
    objective = _objective(spec)
    writer = RunWriter.open(Path(spec["run"]))
    objective.batch_sizes |= spec["batch_sizes"]
    rows = writer.manifest.rows(spec["span"])
    settings = spec["settings"]
    method = Method(
        RULES[settings["rule"]],
        float(settings["tolerance"]),
        float(settings["allocation_tolerance"]),
        spec["calibration"],
    )
    losses = spec["pending"]
    before = {name: (objective.evaluations[name], objective.forward_passes[name]) for name in losses}
    tallies = {
        name: Tally(objective.allocated, writer.manifest.length(spec["span"]), writer.keep, objective.device)
        for name in losses
    }
    for start, end, done in allocate_span(_points(spec, rows, objective), objective, losses, method):
        for name in losses:
            tallies[name].add(start, end, done[name])
    facts = {}
    for name, tally in tallies.items():
        facts[name] = {
            "evaluations": objective.evaluations[name] - before[name][0],
            "forward_passes": objective.forward_passes[name] - before[name][1],
        }
        where = {"host": socket.gethostname(), "pid": os.getpid(), "seconds": round(time.perf_counter() - started, 3)}
        writer.write_span(name, spec["span"], tally, {**facts[name], **where})
        facts[name]["worst_residual"] = float(abs(tally.steps["residual"]).max())
        facts[name]["unconverged"] = int((tally.steps["converged"] == 0).sum())
        facts[name]["silent"] = sorted(tally.silent)
    return {
        "losses": facts,
        "segments": writer.manifest.length(spec["span"]),
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _points(spec: Spec, rows: slice, objective: Any) -> Iterator[tuple[int, Any]]:
    for index in range(rows.start, rows.stop + 1):
        yield _checkpoint(spec, index).step, _point(spec, index, objective)
