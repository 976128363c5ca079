"""What evaluating costs: seconds and memory, from a few timed batches."""

from __future__ import annotations

import functools
import resource
import time
from typing import Any

from .memory import ROOM, block_of, free_memory, needed
from .state import Spec, first_point, objective_of, reported

_TIMED_SECONDS = 1.0


@reported
def measure(spec: Spec) -> Spec:
    """What evaluating costs: seconds of each loss and of all together, batch sizes, memory; from a few timed batches."""
    import torch

    objective = objective_of(spec)
    objective.settle_batch_sizes(first_point(spec, objective), spec["batch_sizes"])
    losses = {name: _measured(spec, objective, name) for name in objective.losses}
    together = higher = 0.0
    for sources in objective.walks(objective.losses).values():
        slowest = [max(held, key=lambda name: losses[name]["seconds"]) for held in sources.values()]
        spared = [losses[name]["forward"] for name in slowest if objective.losses[name].kind == "function"][
            1:
        ]  # one is shared
        together += sum(losses[name]["seconds"] for name in slowest) - sum(spared)
        higher += sum(losses[name]["higher"] for name in slowest)
    blocks = {name: block_of(spec, objective, name) for name in losses}
    on_gpu = objective.device.type == "cuda"
    held = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "losses": losses,
        "together": together,
        "higher": higher,
        "recalibrating": _recalibrating(objective),
        "memory": held + needed(spec, objective, list(losses), blocks),
    }


def _recalibrating(objective: Any) -> float:
    """Return the seconds of one pass that recalibrates statistics; 0 in other modes."""
    recalibration = objective.recalibration
    if recalibration is None:
        return 0.0
    split, size = recalibration.split, recalibration.batch_size
    seconds = _seconds(objective, recalibration.loss, split.sample(0, size), gradient=False)
    return float(seconds / size * split.examples)


def _measured(spec: Spec, objective: Any, name: str) -> Spec:
    from ..objective import power_of_two

    loss, order = objective.losses[name], objective.order(name)
    if loss.split is None:
        return {"seconds": _seconds(objective, name, None), "forward": 0.0, "higher": 0.0, "fastest": 0, "largest": 0}
    split, chosen = objective.splits[loss.split], objective.batch_sizes[loss.split]
    most = split.examples if order is None else max(1, split.examples // len(order.labels))
    sizes = {min(max(1, size), most) for size in (chosen // 4, chosen // 2, chosen, chosen * 2, chosen * 4)}
    per_example = {size: _seconds(objective, name, split.sample(0, size)) / size for size in sorted(sizes)}
    used = min(chosen, most)
    room = ROOM * free_memory(spec["workers"], objective.device)
    return {
        "seconds": per_example[used] * split.examples,
        "forward": _seconds(objective, name, split.sample(0, used), gradient=False) / used * split.examples,
        "higher": _seconds(objective.higher, name, objective.higher.splits[loss.split].sample(0, used))
        / used
        * split.examples
        if spec["measured"]
        else 0.0,
        "fastest": min(per_example, key=lambda size: per_example[size]),
        "largest": min(power_of_two(room / objective.saved_bytes(name)), split.examples),
    }


def _seconds(objective: Any, name: str, batch: Any, gradient: bool = True) -> float:
    """The fastest of a few evaluations of one batch, the first one not counted."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < 8 and time.perf_counter() - began < _TIMED_SECONDS):
        start = time.perf_counter()
        objective.over(functools.partial(objective.values, name), [batch], gradient=gradient)
        times.append(time.perf_counter() - start)
    return min(times[1:])
