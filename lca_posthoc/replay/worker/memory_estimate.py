"""Estimate the memory a replay needs on a worker at each level of `--keep`, and how many groups of
a loss to evaluate at a time.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...base import available_memory
from ...numerics.schema import EXAMPLE_FIELDS, holds
from ..requests import SampleRequest

if TYPE_CHECKING:
    import torch

    from ...checkpoints.trajectory import TensorSpec
    from ...numerics.objective import Objective

ROOM = 0.5

_POINTS = 4  # numbers per parameter: the model, the start, the end and the next checkpoint

# --- levels of sums -------------------------------------------------------------------------------

_GRADIENTS = 1  # gradients of the largest tensor held at a time
_SUMS = 8  # float64 numbers per sum and group: two nodes, a level, a segment

# --- parts of the motion ---------------------------------------------------------------------------

_OF_CAUSES = 1  # numbers per parameter: the checkpoint before the start
_OF_SIGNAL = 2  # the signal where a motion begins, and where the next one does
_OF_MOMENTS = 8  # four directions of an optimiser with moments, of two motions
# numbers per parameter: the checkpoint before the start, one more after the next, and the current
# deviation
_OF_PATH = 3
_OF_DIRECTION = 2  # as read, and orthonormal

# --- levels with numbers of every parameter -------------------------------------------------------

_TOTALS = 19  # bytes per parameter and loss: a sum, counts and signs
_NODES = 2  # finished gradients per parameter, loss and group, in the type of the model
_SUM = 8  # bytes per parameter, loss and group: the sum over batches of another gradient
# bytes per parameter of the largest tensor: a gradient of a batch, and the totals being written
_LARGEST = 32
_HEAP = 1.1  # factor for freed memory that the heap keeps
_FEW = 1000  # with fewer examples in a group, page faults cost as much as evaluating
_HEAP_BYTES = 32 * 2**20  # larger arrays are mapped anew every time


def block_of(request: SampleRequest[Any], objective: Objective, name: str, keep: str) -> int | None:
    """Return how many groups of a loss to evaluate at a time, by the memory of this worker; None
    for all.

    Args:
        request: about a sample of the run.
        objective: evaluates the loss.
        name: of the loss.
        keep: a level of `--keep`.
    """
    from ...numerics.objective import ElementOrder, power_of_two

    order, split = objective.order(name), objective.losses[name].split
    if order is None or split is None:
        return None
    free = free_memory_each(request.sample.workers_per_host, objective.device)
    fits = int(ROOM * free // _bytes_of_group(request, objective, keep))
    few = objective.splits[split].examples < _FEW * len(order.labels)
    # a block of groups of elements costs a pass over all examples
    if few and holds(keep, "statistics") and not isinstance(order, ElementOrder):
        fits = min(
            fits, _HEAP_BYTES // (8 * max(tensor.elements for tensor in objective.allocated))
        )
    return None if fits >= len(order.labels) else power_of_two(fits)


def free_memory_each(workers: int, device: torch.device) -> float:
    """Return the free bytes for one worker of a host, or on the GPU.

    Args:
        workers: that share the host.
        device: that computes.
    """
    from ...numerics.objective import free_on

    if device.type == "cuda":
        return free_on(device)
    return available_memory.free_memory() / workers


def bytes_needed(
    request: SampleRequest[Any],
    objective: Objective,
    names: list[str],
    blocks: dict[str, int | None],
    keep: str,
) -> float:
    """Estimate the bytes a worker needs, beside model and data, to replay some losses; 0 without
    losses.

    There are four numbers for every parameter. Levels of sums add a gradient of the largest tensor.
    The others add 19 bytes for every kept parameter and loss, 32 for every parameter of the largest
    tensor, and a tenth of everything. Then come `bookkeeping` of the losses evaluated together, or
    of the largest evaluated alone, and on a CPU, where we choose batches, twice what autograd saves
    of one. Measured in docs/measurements/memory.md.

    Args:
        request: about a sample of the run.
        objective: evaluates the losses.
        names: of the losses.
        blocks: by loss, the groups evaluated at a time; None for all.
        keep: a level of `--keep`.
    """
    if not names:
        return 0.0
    numbers = {name: bookkeeping(request, objective, name, blocks[name], keep) for name in names}
    alone = [numbers[name] for name in names if blocks[name] is not None]
    most = max([sum(numbers.values()) - sum(alone), *alone])
    largest = _largest(objective)
    needed = _POINTS * objective.dtype.itemsize * _elements(objective.allocated) + most
    if holds(keep, "statistics"):
        needed += (
            _TOTALS * _elements(kept_tensors(request, objective)) * len(names) + _LARGEST * largest
        )
        needed = int(_HEAP * needed)
    else:
        needed += _GRADIENTS * objective.dtype.itemsize * largest
    needed += _bytes_of_parts(request, objective, names, keep)
    return float(needed + _activations(request, objective, names))


def _bytes_of_parts(
    request: SampleRequest[Any], objective: Objective, names: list[str], keep: str
) -> int:
    """Return the bytes of the parts of the motion: points and directions of every parameter."""
    settings, number = request.setup.settings, objective.dtype.itemsize
    of_parameter = 0
    if settings.path_band == "on":
        of_parameter += _OF_PATH * number
    if settings.signal is not None:
        of_parameter += _OF_CAUSES * number
        if settings.signal not in names or not holds(keep, "statistics"):  # otherwise it is a node
            of_parameter += _OF_SIGNAL * number + _SUM
        if _has_moments(request):
            of_parameter += _OF_MOMENTS * number
    if settings.directions is not None:
        of_parameter += _OF_DIRECTION * settings.directions["directions"] * number
    return of_parameter * _elements(objective.allocated)


def _has_moments(request: SampleRequest[Any]) -> bool:
    """Tell whether moments are stored beside the last of the sampled checkpoints."""
    checkpoints = request.sample.points.checkpoints
    return checkpoints[max(checkpoints)].moments is not None


def bookkeeping(
    request: SampleRequest[Any], objective: Objective, name: str, block: int | None, keep: str
) -> int:
    """Return the bytes of a loss's numbers for every group, replicate and example.

    Args:
        request: about a sample of the run.
        objective: evaluates the loss.
        name: of the loss.
        block: groups evaluated at a time; None for all.
        keep: a level of `--keep`.
    """
    order, hidden = objective.order(name), objective.replicates_of(name)
    parts_order = None if hidden is None else objective.order(hidden)
    groups = 1 if order is None else block or len(order.labels)
    parts = 0 if parts_order is None else len(parts_order.labels)
    examples = _bytes_of_examples(request, objective, name)
    if not holds(keep, "statistics"):
        return (groups + parts) * _bytes_of_group(request, objective, keep) + examples
    return int(
        (groups + parts) * _bytes_of_nodes(objective)
        + groups * _elements(kept_tensors(request, objective)) * _stored(request, keep)
        + examples
    )


def _bytes_of_examples(request: SampleRequest[Any], objective: Objective, name: str) -> int:
    """Return the bytes of the numbers of every example: derivatives at nodes, and results for the
    segments of a span; 0 for a loss without per-example results.
    """
    loss = objective.losses[name]
    if loss.per is None or loss.split is None:
        return 0
    kept = len(kept_tensors(request, objective)) + len(EXAMPLE_FIELDS)
    of_example = 8 * _SUMS * len(objective.allocated) + 4 * request.sample.span_length * kept
    rows = objective.splits[loss.split].examples
    rows *= objective.elements_of(name) if loss.per == "element" else 1
    return int(rows * of_example)


def _bytes_of_group(request: SampleRequest[Any], objective: Objective, keep: str) -> int:
    """Return the bytes of a loss's numbers for one group."""
    if holds(keep, "statistics"):
        stored = _elements(objective.allocated) * _stored(request, keep)
        return _bytes_of_nodes(objective) + stored
    sums = [tensor.units if holds(keep, "units") else 1 for tensor in objective.allocated]
    return 8 * _SUMS * sum(sums)


def _bytes_of_nodes(objective: Objective) -> int:
    """Return the bytes of the gradients at nodes, of a loss or one of its groups: the finished
    ones, the sum of another, and the mean of a tensor beside its sum.
    """
    number, elements = objective.dtype.itemsize, _elements(objective.allocated)
    return (_NODES * number + _SUM) * elements + number * _largest(objective)


def _largest(objective: Objective) -> int:
    return max((tensor.elements for tensor in objective.allocated), default=0)


def _activations(request: SampleRequest[Any], objective: Objective, names: list[str]) -> float:
    """Return twice the bytes that autograd saves of a batch: a backward pass holds gradients of
    these values beside them. 0 if the user set the batch size, and on a GPU, where batches are
    halved if memory runs out.
    """
    if objective.device.type == "cuda" or request.setup.settings.batch_size is not None:
        return 0.0
    splits = {name: objective.losses[name].split for name in names}
    saved = [
        2 * objective.saved_bytes(name) * objective.batch_sizes[on]
        for name, on in splits.items()
        if on is not None
    ]
    return max(saved, default=0.0)


def kept_tensors(request: SampleRequest[Any], objective: Objective) -> list[TensorSpec]:
    """Return the tensors whose allocation is kept, by `--tensors`.

    Args:
        request: about a sample of the run.
        objective: of the task.
    """
    patterns = request.setup.settings.tensors or ["*"]
    return [
        tensor
        for tensor in objective.allocated
        if any(fnmatchcase(tensor.name, pattern) for pattern in patterns)
    ]


def _elements(tensors: list[TensorSpec]) -> int:
    return sum(tensor.elements for tensor in tensors)


def _stored(request: SampleRequest[Any], keep: str) -> int:
    """Return the bytes of one parameter's allocation on the segments of a span."""
    return 4 * request.sample.span_length if holds(keep, "parameters") else 0
