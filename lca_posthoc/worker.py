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

import numpy as np

from .errors import InputError, LCAError, ResourceError, SpanError, pack
from .trajectory import Checkpoint, read_checkpoint

Spec = dict[str, Any]
_STATES: OrderedDict[str, Any] = OrderedDict()
_LOCK = threading.Lock()
_KEPT = 2
_SAMPLED = {0, 8, 64, 512}  # segments whose error is measured: as many in a run that grew as in one that did not
_SAME_FUNCTION = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2}


def _objective(spec: Spec) -> Any:
    """The objective of a spec, built once per process."""
    key = _key(spec, spec["losses"])
    with _LOCK:
        if key not in _STATES:
            while len(_STATES) >= _KEPT:
                _STATES.popitem(last=False)
            built = _same_data(_build(spec, spec["settings"]["precision"]), spec)
            key = _key(
                spec, list(built.losses)
            )  # losses that were asked for by "all", or not at all, are known by name now
            _STATES[key] = built
        _STATES.move_to_end(key)
        return _STATES[key]


def _key(spec: Spec, losses: list[str] | None) -> str:
    from . import task

    place = [spec["task"].get(name) for name in ("kind", "path", "module", "function")]
    settings = [spec["settings"][name] for name in ("device", "precision", "norm_stats", "batch_size", "subset")]
    return json.dumps([place, task.digest(spec["task"]), losses, settings], sort_keys=True)


def _same_data(objective: Any, spec: Spec) -> Any:
    """Refuse a task that builds other data here than it did where it was probed."""
    for what, digest in spec.get("digests", {}).items():
        if objective.digests[what] != digest:
            raise InputError(
                f"{what} is not the same in this worker process as where the task was probed: it is made anew in every process. "
                "Usual culprits: random augmentation, random_split without a seeded generator, a model that builds Task.fixed at random."
            )
    return objective


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
        subset=task.parse_subsets(settings["subset"]),
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
    return {
        "tensors": [asdict(each) for each in objective.table],
        "losses": {name: _described(objective, name) for name in objective.losses},
        "task_losses": list(objective.task.losses),
        "digests": objective.digests,
    }


def _described(objective: Any, name: str) -> Spec:
    loss, order = objective.losses[name], objective.order(name)
    split = None if loss.split is None else objective.splits[loss.split]
    replicated = objective.replicates_of(name)
    return {
        "on": loss.split,
        "kind": loss.kind,
        "examples": split.examples if split else 0,
        "total": split.total if split else 0,
        "groups": order.labels if order else None,
        "counts": order.counts if order else None,
        "replicates": len(objective.order(replicated).labels) if replicated else 0,
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
    new = [name for name in names if name not in spec["recorded"]]  # a recorded loss keeps what was settled for it
    block = {name: _block(spec, objective, name) for name in names}
    objective.join([name for name in names if block[name] is not None])
    measured, more = _can_measure(spec, objective, first, new)
    notes += more
    identities = _identities(spec, objective, first, names)
    calibrations = _calibrations(spec, objective, new) if new and spec["settings"]["rule"] == "trapezoid" else {}
    return {
        "batch_sizes": batch_sizes,
        "identity": identities,
        "calibration": {name: calibrations.get(name) for name in names},
        "block": block,
        "along": {name: along if along in objective.losses else None for name, along in objective.joined.items()},
        "measured": measured,
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
    if abs(wide - narrow) > _SAME_FUNCTION["float32"] * max(abs(wide), abs(narrow), 1e-12):
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


_ROOM = 0.5
_COPIES = 9  # float64 numbers a grouped loss holds of every group and parameter at a time
_FEW = 1000  # examples of a group below which page faults cost as much as evaluating
_HEAP_BYTES = 32 * 2**20  # larger arrays are mapped anew whenever they are made


def _block(spec: Spec, objective: Any, name: str) -> int | None:
    """How many groups of a loss are taken at a time, by the memory of this worker; None where all are."""
    from .objective import power_of_two

    order = objective.order(name)
    if order is None:
        return None
    elements = sum(each.elements for each in objective.allocated)
    fits = int(_ROOM * _free_memory(spec["workers"], objective.device) // (elements * _bytes_per_number(spec)))
    if objective.splits[objective.losses[name].split].examples < _FEW * len(order.labels):
        fits = min(fits, _HEAP_BYTES // (8 * max(each.elements for each in objective.allocated)))
    return None if fits >= len(order.labels) else power_of_two(fits)


def _free_memory(workers: int, device: Any) -> float:
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available) / workers


def _can_measure(spec: Spec, objective: Any, first: Any, names: list[str]) -> tuple[bool, list[str]]:
    """Whether some segments can be evaluated one precision higher as well, and a note where that cannot be done."""
    from .objective import HIGHER, identify

    precision = spec["settings"]["precision"]
    if precision not in HIGHER or not names:
        return False, []
    try:
        higher = objective.higher
        higher.place(first)
        for name in names:
            ours, theirs = identify(objective, name).loss, identify(higher, name).loss
            if not abs(ours - theirs) <= _SAME_FUNCTION[precision] * max(abs(ours), abs(theirs), 1e-12):
                raise InputError(f"loss {name!r} is {ours:.6g} in {precision} but {theirs:.6g} in {HIGHER[precision]}")
    except InputError as error:
        return False, [
            f"the error of {precision} is not measured, because the task does not run in {HIGHER[precision]}: {error}"
        ]
    return True, []


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


@_reported
def measure(spec: Spec) -> Spec:
    """What evaluating costs: seconds of each loss and of all together, batch sizes, memory; from a few timed batches."""
    import torch

    objective = _objective(spec)
    objective.settle_batch_sizes(_first_point(spec, objective), spec["batch_sizes"])
    losses = {name: _measured(spec, objective, name) for name in objective.losses}
    together = 0.0
    for sources in objective.walks(objective.losses).values():
        slowest = [max(held, key=lambda name: losses[name]["seconds"]) for held in sources.values()]
        spared = [losses[name]["forward"] for name in slowest[1:]]  # the forward pass is shared
        together += sum(losses[name]["seconds"] for name in slowest) - sum(spared)
    on_gpu = objective.device.type == "cuda"
    held = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers = sum(_bookkeeping(spec, objective, name) for name in losses)
    return {"losses": losses, "together": together, "memory": held + numbers}


def _measured(spec: Spec, objective: Any, name: str) -> Spec:
    from .objective import power_of_two

    loss, order = objective.losses[name], objective.order(name)
    if loss.split is None:
        return {"seconds": _seconds(objective, name, None), "forward": 0.0, "fastest": 0, "largest": 0}
    split, chosen = objective.splits[loss.split], objective.batch_sizes[loss.split]
    most = split.examples if order is None else max(1, split.examples // len(order.labels))
    sizes = {min(max(1, size), most) for size in (chosen // 4, chosen // 2, chosen, chosen * 2, chosen * 4)}
    per_example = {size: _seconds(objective, name, split.sample(0, size)) / size for size in sorted(sizes)}
    used = min(chosen, most)
    room = _ROOM * _free_memory(spec["workers"], objective.device)
    return {
        "seconds": per_example[used] * split.examples,
        "forward": _seconds(objective, name, split.sample(0, used), gradient=False) / used * split.examples,
        "fastest": min(per_example, key=lambda size: per_example[size]),
        "largest": min(power_of_two(room / objective.saved_bytes(name)), split.examples),
    }


def _bookkeeping(spec: Spec, objective: Any, name: str) -> int:
    """Bytes of the numbers a loss holds of every group and parameter."""
    order = objective.order(name)
    groups = 1 if order is None else _block(spec, objective, name) or len(order.labels)
    return int(groups * sum(each.elements for each in objective.allocated) * _bytes_per_number(spec))


def _bytes_per_number(spec: Spec) -> int:
    return 8 * _COPIES + (4 * int(spec["span"]) if spec["settings"]["keep"] == "parameters" else 0)


def _seconds(objective: Any, name: str, batch: Any, gradient: bool = True) -> float:
    """The fastest of a few evaluations of one batch, the first one not counted."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < 8 and time.perf_counter() - began < _TIMED_SECONDS):
        start = time.perf_counter()
        objective.over(functools.partial(objective.values, name), [batch], gradient=gradient)
        times.append(time.perf_counter() - start)
    return min(times[1:])


@_reported
def replay_span(spec: Spec) -> Spec:
    """Allocate the segments of one span for its pending losses, write and commit them."""
    from .store import RunWriter

    started = time.perf_counter()
    objective = _objective(spec)
    writer = RunWriter.open(Path(spec["run"]))
    objective.batch_sizes |= spec["batch_sizes"]
    records = {name: writer.manifest.losses[name] for name in spec["pending"]}
    for name, record in records.items():
        objective.joined[name] = objective.replicates_of(name) if record.replicates else record.along
    together = [name for name, record in records.items() if len(record.blocks) == 1]
    facts: Spec = {}
    for losses in [together, *([name] for name in records if name not in together)]:
        if losses:
            facts |= _replayed(spec, objective, writer, losses)
    return {
        "losses": facts,
        "segments": writer.manifest.length(spec["span"]),
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _replayed(spec: Spec, objective: Any, writer: Any, losses: list[str]) -> Spec:
    """Some losses on one span: evaluated together, block by block of their groups, written and committed."""
    from .allocation import Method, allocate_span
    from .quadrature import RULES
    from .tally import Tally

    started = time.perf_counter()
    manifest, settings = writer.manifest, spec["settings"]
    rule = RULES[settings["rule"]]
    records = {name: manifest.losses[name] for name in losses}
    rows, length = manifest.rows(spec["span"]), manifest.length(spec["span"])
    kept = [tensor.spec for tensor in manifest.allocated]
    replicates = {name: objective.replicates_of(name) for name in losses if records[name].replicates}
    method = Method(
        rule,
        float(settings["tolerance"]),
        float(settings["allocation_tolerance"]),
        spec["calibration"],
        frozenset(replicates.values()),
    )
    before = {name: (objective.evaluations[name], objective.forward_passes[name]) for name in losses}
    blocks = records[losses[0]].blocks
    levels = [0] * length
    while True:
        tallies = {
            name: Tally(kept, length, writer.keep, objective.device, len(record.groups) if record.groups else None)
            for name, record in records.items()
        }
        errors = {name: np.zeros((length, 2)) for name in losses}
        parts = {name: np.zeros((length, records[name].replicates, len(kept))) for name in replicates}
        reached = [set[int]() for _ in range(length)]
        for block in blocks:
            part = objective if len(blocks) == 1 else _Only(objective, block)
            if len(blocks) > 1:
                tallies[losses[0]].begin(block)
            walk = allocate_span(_points(spec, rows, objective), part, [*losses, *replicates.values()], method, levels)
            for at, (start, end, done) in enumerate(walk):
                reached[at] |= {done[name].level for name in losses}
                for name, tally in tallies.items():
                    tally.add(at, done[name])
                    if rows.start + at in _SAMPLED and records[name].measured:
                        higher = objective.higher if len(blocks) == 1 else _Only(objective.higher, block)
                        errors[name][at] += _precision_error(name, start, end, done[name], higher, rule)
                for name, hidden in replicates.items():
                    parts[name][at] = _sums(done[hidden], kept)
            for name, tally in tallies.items():
                writer.write_block(name, spec["span"], tally)
        if len(blocks) == 1 or all(len(each) == 1 for each in reached):
            break
        levels = [max(each) for each in reached]  # the groups of a loss are refined alike
    facts, seconds = {}, time.perf_counter() - started
    for name, tally in tallies.items():
        apart, scale = errors[name].T
        np.divide(apart, scale, out=tally.steps["precision_error"], where=scale > 0)
        facts[name] = {
            "evaluations": objective.evaluations[name] - before[name][0],
            "forward_passes": objective.forward_passes[name] - before[name][1],
        }
        where = {"host": socket.gethostname(), "pid": os.getpid(), "seconds": round(seconds / len(losses), 3)}
        writer.write_span(name, spec["span"], tally, {**facts[name], **where}, parts.get(name))
        facts[name]["worst_residual"] = float(abs(tally.steps["residual"]).max())
        facts[name]["unconverged"] = int((tally.steps["converged"] == 0).sum())
        facts[name]["silent"] = sorted(tally.silent)
    return facts


class _Only:
    """An objective over some of the groups of its losses."""

    def __init__(self, objective: Any, groups: range) -> None:
        self._objective, self._groups = objective, groups
        self.dtype = objective.dtype

    def evaluate(self, point: Any, losses: list[str], *, gradient: bool = True) -> Any:
        return self._objective.evaluate(point, losses, gradient=gradient, only=self._groups)


def _sums(segment: Any, kept: list[Any]) -> Any:
    """(replicates, tensors): what each replicate allocates to each tensor."""
    return np.stack([segment.allocation[each.name].flatten(1).sum(1).cpu().numpy() for each in kept], -1)


def _precision_error(name: str, start: Any, end: Any, found: Any, higher: Any, rule: Any) -> tuple[float, float]:
    """Σ|A − A*| and Σ|A*| of one segment, with A* from the same nodes one precision higher."""
    from .allocation import Method, allocate
    from .quadrature import NESTED

    dtype = higher.dtype
    first, last = (
        {key: each.to(dtype) if each.is_floating_point() else each for key, each in point.items()}
        for point in (start, end)
    )
    method = Method(rule if found.level < 0 else NESTED[found.level])
    exact = allocate(first, last, higher, [name], method)[0][name].allocation
    apart = math.fsum(float((found.allocation[key] - each).abs().sum()) for key, each in exact.items())
    return apart, math.fsum(float(each.abs().sum()) for each in exact.values())


def _points(spec: Spec, rows: slice, objective: Any) -> Iterator[tuple[int, Any]]:
    for index in range(rows.start, rows.stop + 1):
        yield _checkpoint(spec, index).step, _point(spec, index, objective)
