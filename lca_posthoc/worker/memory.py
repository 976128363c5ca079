"""What a replay holds on a worker, how many groups of a loss are taken at a time, and whether there is room at all."""

from __future__ import annotations

from typing import Any

from ..errors import ResourceError, amount
from .state import Spec

ROOM = 0.5
_SHARED = 180  # bytes of every parameter whatever the losses: points, motion, the model, totals to be written
_TOTALS = 18  # bytes of every parameter and loss: counts and signs
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


def needed(spec: Spec, objective: Any, names: list[str]) -> float:
    """About how many bytes a worker takes, beside model and data, while it replays some losses.

    P · (180 + 18 · losses) for P parameters, `bookkeeping` of the losses that go together or of the largest that goes alone, and on a
    CPU twice what autograd saves of a batch (a GPU that runs out of memory gets smaller batches). Measured in docs/performance.md.
    """
    held = {name: bookkeeping(spec, objective, name) for name in names}
    alone = [held[name] for name in names if block_of(spec, objective, name) is not None]
    most = max([sum(held.values()) - sum(alone), *alone])
    elements = sum(each.elements for each in objective.allocated)
    return float(elements * (_SHARED + _TOTALS * len(names)) + most + _activations(objective, names))


def _activations(objective: Any, names: list[str]) -> float:
    if objective.device.type == "cuda":
        return 0.0
    splits = {name: objective.losses[name].split for name in names}
    each = [
        2 * objective.saved_bytes(name) * objective.batch_sizes[on] for name, on in splits.items() if on is not None
    ]
    return max(each, default=0.0)


def refuse_without_room(spec: Spec, objective: Any, names: list[str]) -> None:
    """Say before the first evaluation what would otherwise end in a killed worker.

    Raises:
        ResourceError: with what is needed and what is free.
    """
    needs, free, crowd = needed(spec, objective, names), free_memory(spec["workers"], objective.device), spec["workers"]
    if needs > free:
        place = (
            "on the GPU"
            if objective.device.type == "cuda"
            else f"for each of {crowd} worker{'s' if crowd > 1 else ''} here"
        )
        raise ResourceError(
            f"a replay of {len(names)} loss{'es' if len(names) > 1 else ''} takes about {amount(needs)} beside model and data, and "
            f"{amount(free)} are free {place}. Try fewer --workers, fewer losses at a time (--loss), --keep units, a smaller "
            "--batch-size, or a machine with more memory."
        )


def bookkeeping(spec: Spec, objective: Any, name: str) -> int:
    """Bytes of the numbers a loss holds of every group and parameter."""
    order = objective.order(name)
    groups = 1 if order is None else block_of(spec, objective, name) or len(order.labels)
    return int(groups * sum(each.elements for each in objective.allocated) * _bytes_per_number(spec))


def _bytes_per_number(spec: Spec) -> int:
    return 8 * _COPIES + (4 * int(spec["span"]) if spec["settings"]["keep"] == "parameters" else 0)
