"""What a loss holds on a worker, and how many of its groups are taken at a time."""

from __future__ import annotations

from typing import Any

from .state import Spec

ROOM = 0.5
_COPIES = 9  # float64 numbers a grouped loss holds of every group and parameter at a time
_FEW = 1000  # examples of a group below which page faults cost as much as evaluating
_HEAP_BYTES = 32 * 2**20  # larger arrays are mapped anew whenever they are made


def block_of(spec: Spec, objective: Any, name: str) -> int | None:
    """How many groups of a loss are taken at a time, by the memory of this worker; None where all are."""
    from ..objective import power_of_two

    order = objective.order(name)
    if order is None:
        return None
    elements = sum(each.elements for each in objective.allocated)
    fits = int(ROOM * free_memory(spec["workers"], objective.device) // (elements * _bytes_per_number(spec)))
    if objective.splits[objective.losses[name].split].examples < _FEW * len(order.labels):
        fits = min(fits, _HEAP_BYTES // (8 * max(each.elements for each in objective.allocated)))
    return None if fits >= len(order.labels) else power_of_two(fits)


def free_memory(workers: int, device: Any) -> float:
    """Bytes that are free for one of the workers of a host, or on the GPU."""
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available) / workers


def bookkeeping(spec: Spec, objective: Any, name: str) -> int:
    """Bytes of the numbers a loss holds of every group and parameter."""
    order = objective.order(name)
    groups = 1 if order is None else block_of(spec, objective, name) or len(order.labels)
    return int(groups * sum(each.elements for each in objective.allocated) * _bytes_per_number(spec))


def _bytes_per_number(spec: Spec) -> int:
    return 8 * _COPIES + (4 * int(spec["span"]) if spec["settings"]["keep"] == "parameters" else 0)
