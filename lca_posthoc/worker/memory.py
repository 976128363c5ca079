"""What a replay holds on a worker, how many groups of a loss are taken at a time, and whether there is room at all."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from .. import host
from ..errors import amount
from ..text import count
from .state import Spec

ROOM = 0.5
_SHARED = 240  # bytes of every parameter whatever the losses: points, motion, totals to be written, what the heap keeps
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
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return host.free_memory() / workers


def needed(spec: Spec, objective: Any, names: list[str], blocks: dict[str, int | None]) -> float:
    """About how many bytes a worker takes, beside model and data, while it replays some losses.

    240 for every parameter, 18 more for every kept one and loss, `bookkeeping` of the losses that go together or of the largest that
    goes alone, and on a CPU, where batches are ours to choose, twice what autograd saves of one. Measured in docs/performance.md.
    """
    held = {name: bookkeeping(spec, objective, name, blocks[name]) for name in names}
    alone = [held[name] for name in names if blocks[name] is not None]
    most = max([sum(held.values()) - sum(alone), *alone])
    elements = sum(each.elements for each in objective.allocated)
    return float(
        elements * _SHARED + _kept(spec, objective) * _TOTALS * len(names) + most + _activations(spec, objective, names)
    )


def _activations(spec: Spec, objective: Any, names: list[str]) -> float:
    if objective.device.type == "cuda" or spec["settings"]["batch_size"] is not None:
        return 0.0
    splits = {name: objective.losses[name].split for name in names}
    each = [
        2 * objective.saved_bytes(name) * objective.batch_sizes[on] for name, on in splits.items() if on is not None
    ]
    return max(each, default=0.0)


def _kept(spec: Spec, objective: Any) -> int:
    """Elements of the tensors whose allocation is kept."""
    patterns = spec["settings"]["tensors"] or ["*"]
    return sum(
        each.elements for each in objective.allocated if any(fnmatchcase(each.name, pattern) for pattern in patterns)
    )


def short_of(spec: Spec, objective: Any, names: list[str], blocks: dict[str, int | None]) -> str | None:
    """What is missing on a CPU for some losses to be replayed, which would otherwise end in killed workers; None where nothing is.

    A GPU that runs out of memory says so itself, and its batches are halved.
    """
    if objective.device.type == "cuda" or not names:
        return None
    needs, free, crowd = (
        needed(spec, objective, names, blocks),
        free_memory(spec["workers"], objective.device),
        spec["workers"],
    )
    if needs <= free:
        return None
    ways = {
        "fewer --workers": crowd > 1,
        "fewer losses at a time (--loss)": len(names) > 1,
        "--keep units": spec["settings"]["keep"] == "parameters",
    }
    return (
        f"a replay of {count(len(names), 'loss', 'losses')} takes about {amount(needs)} beside model and data, and "
        f"{amount(free)} are free for each of {count(crowd, 'worker')} here. Try "
        f"{', '.join([way for way, helps in ways.items() if helps] + ['a machine with more memory'])}."
    )


def bookkeeping(spec: Spec, objective: Any, name: str, block: int | None) -> int:
    """Bytes of the numbers a loss holds of every group and parameter, its replicates' too."""
    order, hidden = objective.order(name), objective.replicates_of(name)
    groups = 1 if order is None else block or len(order.labels)
    parts = 0 if hidden is None else len(objective.order(hidden).labels)
    elements = sum(each.elements for each in objective.allocated)
    return int((groups + parts) * elements * 8 * _COPIES + groups * _kept(spec, objective) * _stored(spec))


def _stored(spec: Spec) -> int:
    """Bytes of one parameter's allocation on the segments of a span."""
    return 4 * int(spec["span"]) if spec["settings"]["keep"] == "parameters" else 0


def _bytes_per_number(spec: Spec) -> int:
    return 8 * _COPIES + _stored(spec)
