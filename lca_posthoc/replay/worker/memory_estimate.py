"""The memory a replay takes on a worker at each level of `--keep`, and how many groups of a loss are
taken at a time.
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

_POINTS = 4  # numbers of every parameter: the model, the start, the end and the next checkpoint

# --- levels of sums -------------------------------------------------------------------------------

_GRADIENTS = 1  # of the largest tensor, which are there at a time
_SUMS = 8  # float64 numbers of every sum and group: those of two nodes, of a level, of a segment

# --- parts of the motion ---------------------------------------------------------------------------

_OF_CAUSES = 1  # numbers of every parameter: the checkpoint before the start
_OF_SIGNAL = 2  # the signal where a motion begins, and where the next one does
_OF_MOMENTS = 8  # four directions of an optimiser with moments, of two motions
_OF_PATH = 3  # numbers of every parameter: the checkpoint before the start, one more after the next
# and the deviation at hand
_OF_DIRECTION = 2  # as it is read, and orthonormal

# --- levels with numbers of every parameter -------------------------------------------------------

_TOTALS = 19  # bytes of every parameter and loss: a sum, counts and signs
_NODES = 2  # gradients of every parameter, loss and group that are done, in the type of the model
_SUM = 8  # bytes of every parameter, loss and group: the sum over batches of another one
# bytes of every parameter of the largest tensor: a gradient of a batch, and what is written of
# totals
_LARGEST = 32
_HEAP = 1.1  # with what the heap keeps of freed memory
_FEW = 1000  # examples of a group below which page faults cost as much as evaluating
_HEAP_BYTES = 32 * 2**20  # larger arrays are mapped anew whenever they are made


def block_of(request: SampleRequest[Any], objective: Objective, name: str, keep: str) -> int | None:
    """Return how many groups of a loss are taken at a time at a level of `--keep`, by the memory of
    this worker; None where all are.
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
    """Return the bytes that are free for one of the workers of a host, or on the GPU."""
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
    """Estimate how many bytes a worker takes, beside model and data, while it replays some losses
    at a level of `--keep`; 0 where there are none.

    Four numbers for every parameter. To that come, at levels of sums, a gradient of the largest
    tensor; at the others 19 bytes for every kept parameter and loss, 32 for every one of the
    largest tensor, and a tenth more of everything. To that come `bookkeeping` of the losses that go
    together or of the largest that goes alone, and on a CPU, where batches are ours to choose,
    twice what autograd saves of one. Measured in docs/performance.md.
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
    """Return the bytes that the parts of the motion take: points and directions of every
    parameter.
    """
    settings, number = request.setup.settings, objective.dtype.itemsize
    of_parameter = 0
    if settings.path_band == "on":
        of_parameter += _OF_PATH * number
    if settings.signal is not None:
        of_parameter += _OF_CAUSES * number
        if settings.signal not in names or not holds(keep, "statistics"):  # else it is a node
            of_parameter += _OF_SIGNAL * number + _SUM
        if _has_moments(request):
            of_parameter += _OF_MOMENTS * number
    if settings.directions is not None:
        of_parameter += _OF_DIRECTION * settings.directions["directions"] * number
    return of_parameter * _elements(objective.allocated)


def _has_moments(request: SampleRequest[Any]) -> bool:
    """Tell whether moments are stored beside the last of the checkpoints that are looked at."""
    checkpoints = request.sample.points.checkpoints
    return checkpoints[max(checkpoints)].moments is not None


def bookkeeping(
    request: SampleRequest[Any], objective: Objective, name: str, block: int | None, keep: str
) -> int:
    """Return the bytes of the numbers a loss holds of every group, of its replicates and of its
    examples, at a level of `--keep`.
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
    """Return the bytes of the numbers of every example: derivatives at nodes, and what is kept of
    the segments of a span; 0 of a loss that does not tell them apart.
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
    """Return the bytes of the numbers a loss holds of one group."""
    if holds(keep, "statistics"):
        stored = _elements(objective.allocated) * _stored(request, keep)
        return _bytes_of_nodes(objective) + stored
    sums = [tensor.units if holds(keep, "units") else 1 for tensor in objective.allocated]
    return 8 * _SUMS * sum(sums)


def _bytes_of_nodes(objective: Objective) -> int:
    """Return the bytes of the gradients at nodes, of a loss or one of its groups: those that are
    done, the sum of another one, and the mean of a tensor beside its sum.
    """
    number, elements = objective.dtype.itemsize, _elements(objective.allocated)
    return (_NODES * number + _SUM) * elements + number * _largest(objective)


def _largest(objective: Objective) -> int:
    return max((tensor.elements for tensor in objective.allocated), default=0)


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


def kept_tensors(request: SampleRequest[Any], objective: Objective) -> list[TensorSpec]:
    """Return the tensors whose allocation is kept, by `--tensors`."""
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
