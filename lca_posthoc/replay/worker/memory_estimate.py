"""The memory a replay takes on a worker, how many groups of a loss are taken at a time, and whether
there is room at all.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...base import available_memory
from ...base.text import count
from ...errors import amount
from ..requests import SampleRequest

if TYPE_CHECKING:
    import torch

    from ...numerics.objective import Objective

ROOM = 0.5
# bytes of every parameter whatever the losses: points, motion, totals to be written, what the heap
# keeps
_SHARED = 240
_TOTALS = 18  # bytes of every parameter and loss: counts and signs
_COPIES = 9  # float64 numbers a grouped loss holds of every group and parameter at a time
_FEW = 1000  # examples of a group below which page faults cost as much as evaluating
_HEAP_BYTES = 32 * 2**20  # larger arrays are mapped anew whenever they are made


def block_of(request: SampleRequest[Any], objective: Objective, name: str) -> int | None:
    """Return how many groups of a loss are taken at a time, by the memory of this worker; None
    where all are.
    """
    from ...numerics.objective import power_of_two

    order, split = objective.order(name), objective.losses[name].split
    if order is None or split is None:
        return None
    elements = sum(tensor.elements for tensor in objective.allocated)
    fits = int(
        ROOM
        * free_memory_each(request.sample.workers_per_host, objective.device)
        // (elements * _bytes_per_number(request))
    )
    if objective.splits[split].examples < _FEW * len(order.labels):
        fits = min(
            fits, _HEAP_BYTES // (8 * max(tensor.elements for tensor in objective.allocated))
        )
    return None if fits >= len(order.labels) else power_of_two(fits)


def free_memory_each(workers: int, device: torch.device) -> float:
    """Return the bytes that are free for one of the workers of a host, or on the GPU."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_memory.free_memory() / workers


def bytes_needed(
    request: SampleRequest[Any],
    objective: Objective,
    names: list[str],
    blocks: dict[str, int | None],
) -> float:
    """Estimate how many bytes a worker takes, beside model and data, while it replays some losses.

    240 for every parameter, 18 more for every kept one and loss, `bookkeeping` of the losses that
    go together or of the largest that goes alone, and on a CPU, where batches are ours to choose,
    twice what autograd saves of one. Measured in docs/performance.md.
    """
    numbers = {name: bookkeeping(request, objective, name, blocks[name]) for name in names}
    alone = [numbers[name] for name in names if blocks[name] is not None]
    most = max([sum(numbers.values()) - sum(alone), *alone])
    elements = sum(tensor.elements for tensor in objective.allocated)
    return float(
        elements * _SHARED
        + _kept(request, objective) * _TOTALS * len(names)
        + most
        + _activations(request, objective, names)
    )


def _activations(request: SampleRequest[Any], objective: Objective, names: list[str]) -> float:
    if objective.device.type == "cuda" or request.setup.settings.batch_size is not None:
        return 0.0
    splits = {name: objective.losses[name].split for name in names}
    saved = [
        2 * objective.saved_bytes(name) * objective.batch_sizes[on]
        for name, on in splits.items()
        if on is not None
    ]
    return max(saved, default=0.0)


def _kept(request: SampleRequest[Any], objective: Objective) -> int:
    """Count the elements of the tensors whose allocation is kept."""
    patterns = request.setup.settings.tensors or ["*"]
    return sum(
        tensor.elements
        for tensor in objective.allocated
        if any(fnmatchcase(tensor.name, pattern) for pattern in patterns)
    )


def short_of(
    request: SampleRequest[Any],
    objective: Objective,
    names: list[str],
    blocks: dict[str, int | None],
) -> str | None:
    """Say what memory a CPU lacks to replay some losses, which would otherwise end in killed
    workers; None where there is enough.

    A GPU that runs out of memory says so itself, and its batches are halved.
    """
    if objective.device.type == "cuda" or not names:
        return None
    needs, free, max_per_host = (
        bytes_needed(request, objective, names, blocks),
        free_memory_each(request.sample.workers_per_host, objective.device),
        request.sample.workers_per_host,
    )
    if needs <= free:
        return None
    ways = {
        "fewer --workers": max_per_host > 1,
        "fewer losses at a time (--loss)": len(names) > 1,
        "--keep units": request.setup.settings.keep == "parameters",
    }
    return (
        f"a replay of {count(len(names), 'loss', 'losses')} takes about {amount(needs)} beside "
        f"model and data, and {amount(free)} are free for each of {count(max_per_host, 'worker')} "
        "here. Try "
        f"{', '.join([way for way, helps in ways.items() if helps] + ['a machine with more memory'])}."
    )


def bookkeeping(
    request: SampleRequest[Any], objective: Objective, name: str, block: int | None
) -> int:
    """Return the bytes of the numbers a loss holds of every group and parameter, its replicates'
    too.
    """
    order, hidden = objective.order(name), objective.replicates_of(name)
    parts_order = None if hidden is None else objective.order(hidden)
    groups = 1 if order is None else block or len(order.labels)
    parts = 0 if parts_order is None else len(parts_order.labels)
    elements = sum(tensor.elements for tensor in objective.allocated)
    return int(
        (groups + parts) * elements * 8 * _COPIES
        + groups * _kept(request, objective) * _stored(request)
    )


def _stored(request: SampleRequest[Any]) -> int:
    """Return the bytes of one parameter's allocation on the segments of a span."""
    return 4 * request.sample.span_length if request.setup.settings.keep == "parameters" else 0


def _bytes_per_number(request: SampleRequest[Any]) -> int:
    return 8 * _COPIES + _stored(request)
