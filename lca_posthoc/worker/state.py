"""What a worker process holds: the model and the data, built once in a cache keyed by what they were built from; checkpoints on
the device; one way of computing, and failures as plain strings.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from .. import task
from ..cluster import delivered
from ..errors import InputError, LCAError, ResourceError, SpanError, pack
from ..places import located
from ..trajectory import Checkpoint, read_checkpoint

Spec = dict[str, Any]
_STATES: OrderedDict[str, Any] = OrderedDict()
_ONE_AT_A_TIME = threading.RLock()  # a model holds the values of one point, also where a worker has several threads
_KEPT = 2


def objective_of(spec: Spec) -> Any:
    """The objective of a spec, built once per process."""
    task.use(spec["task"], delivered(spec["parcel"]))
    key = _key(spec, spec["losses"])
    if key not in _STATES:
        while len(_STATES) >= _KEPT:
            _STATES.popitem(last=False)
        built = build(spec, spec["settings"]["precision"])
        _recall_statistics(built, spec)  # they are of data that must be the same too
        _same_data(built, spec)
        key = _key(spec, list(built.losses))  # by name, however they were asked for
        _STATES[key] = built
    _STATES.move_to_end(key)
    _recall_statistics(_STATES[key], spec)
    return _STATES[key]


def divided(spec: Spec, objective: Any) -> Any:
    """Return the objective of a spec with a loss for every entry of losses that return a dict, which later specs name."""
    other = objective.divided()
    if other is not objective:
        _STATES.pop(_key(spec, list(objective.losses)), None)
        _STATES[_key(spec, list(other.losses))] = other
    return other


def _recall_statistics(objective: Any, spec: Spec) -> None:
    """Recalibrate as was settled when the run was created, if it was yet."""
    if objective.recalibration is not None:
        objective.recalibration.recall(spec["settings"].get("statistics"))


def _key(spec: Spec, losses: list[str] | None) -> str:
    place = [spec["task"].get(name) for name in ("kind", "path", "module", "function")]
    settings = [spec["settings"][name] for name in ("device", "precision", "norm_stats", "batch_size", "subset")]
    return json.dumps([place, task.digest(spec["task"]), losses, settings, spec.get("held")], sort_keys=True)


def _same_data(objective: Any, spec: Spec) -> None:
    """Refuse a task that builds other data here than it did where it was probed."""
    wanted = spec.get("digests")
    found = objective.digests if wanted else {}
    for what, digest in (wanted or {}).items():
        if found[what] != digest:
            raise InputError(
                f"{what} is not the same in this worker process as where the task was probed: it is made anew in every process. "
                "Usual culprits: random augmentation, random_split without a seeded generator, tensors that checkpoints do not "
                "hold (frozen ones, Task.fixed, buffers) and the model builds at random."
            )


def build(spec: Spec, precision: str) -> Any:
    """The objective of a spec in a precision, built anew."""
    import torch

    from ..objective import Objective

    settings = spec["settings"]
    device = torch.device(settings["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no GPU is visible to this worker. Use --device cpu, or make one visible with CUDA_VISIBLE_DEVICES."
        )
    with _deterministic():  # once more: what the task's own code sets ends with this
        return Objective(
            lambda: task.load(spec["task"], delivered(spec["parcel"])),
            spec["losses"],
            device=device,
            precision=precision,
            norm_stats=settings["norm_stats"],
            batch_size=settings["batch_size"],
            subset=task.parse_subsets(settings["subset"]),
            held=frozenset(spec["held"]) if "held" in spec else None,
        )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """One thread on the CPU, float32 as float32 everywhere, one kernel with and without gradients; put back afterwards."""
    import torch

    from ..objective import float32

    cudnn = torch.backends.cudnn
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    kernels = cudnn.benchmark, cudnn.deterministic
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with float32():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)
        cudnn.benchmark, cudnn.deterministic = kernels


def reported(work: Callable[[Spec], Spec]) -> Callable[[Spec], Spec]:
    """Failures come back as plain strings: an exception that cannot be unpickled elsewhere would hide its cause."""

    @functools.wraps(work)
    def reported(spec: Spec) -> Spec:
        try:
            with _ONE_AT_A_TIME, _deterministic():
                return work(spec)
        except LCAError as error:
            return {"error": pack(error), "trace": traceback.format_exc()}
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind: LCAError = (
                ResourceError(f"no space left for the result ({error}). Free some and run again.")
                if full
                else SpanError(str(error))
            )
            return {"error": pack(kind), "trace": traceback.format_exc()}
        except Exception as error:
            from ..objective import is_out_of_memory

            kind = SpanError(f"{type(error).__name__}: {error}")
            if is_out_of_memory(error):
                hint = "Give a smaller --batch-size" + (
                    "" if spec["settings"]["batch_size"] is None else f" than {spec['settings']['batch_size']}"
                )
                kind = ResourceError(f"out of memory ({str(error)[:200]}). {hint}.")
            return {"error": pack(kind), "trace": traceback.format_exc()}

    return reported


def checkpoint_at(spec: Spec, index: int) -> Checkpoint:
    """A checkpoint of the trajectory, by its position."""
    step, files, size, fingerprint = spec["checkpoints"][str(index)]
    return Checkpoint(step, tuple(located(spec["root"]) / file for file in files), size, fingerprint)


def point_at(spec: Spec, index: int, objective: Any) -> Any:
    """Return a checkpoint as losses are evaluated there: as it is stored, or with statistics recalibrated to its weights."""
    point = stored_point_at(spec, index, objective)
    return point if objective.recalibration is None else objective.recalibration.at(point)


def stored_point_at(spec: Spec, index: int, objective: Any) -> Any:
    """A checkpoint on the device, floating tensors in the precision of the run or the one they were stored in, if higher."""
    stored = read_checkpoint(checkpoint_at(spec, index), spec["names"])
    wider = {name for name, tensor in stored.items() if tensor.element_size() > objective.dtype.itemsize}
    return {
        name: tensor.to(objective.device, objective.dtype)
        if tensor.is_floating_point() and name not in wider
        else tensor.to(objective.device)
        for name, tensor in stored.items()
    }


def points_of(spec: Spec, rows: slice, objective: Any) -> Iterator[tuple[int, Any]]:
    """Step and tensors of the checkpoints at both ends of some segments."""
    for index in range(rows.start, rows.stop + 1):
        yield checkpoint_at(spec, index).step, point_at(spec, index, objective)


def first_point(spec: Spec, objective: Any) -> Any:
    """The first checkpoint as it is stored; what is wrong with it is wrong input."""
    try:
        return stored_point_at(spec, 0, objective)
    except SpanError as error:
        raise InputError(str(error)) from None
