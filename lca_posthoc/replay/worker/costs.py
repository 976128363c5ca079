"""Measure the seconds and memory of evaluations, from a few timed batches."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.available_memory import peak_memory
from ...numerics.schema import KEEP, holds
from ..requests import (
    Compressions,
    CompressionsRequest,
    Costs,
    CostsRequest,
    LossCosts,
    SampleRequest,
)
from .checks import moving
from .memory_estimate import ROOM, block_of, bytes_needed, free_memory_each
from .state import first_point, objective_of, reported

if TYPE_CHECKING:
    from ...numerics.objective import Objective

_TIMED_SECONDS = 1.0
_TIMED_PASSES = 1.5  # of the split: all timed batches of a loss together hold no more examples
_PART = (
    # one of so many parts of a batch shows the costs of other evaluations, relative to the gradient
    # of the same part
    8
)
_GROWTH = 4  # from one timed batch of elements to the next
_SAMPLED_NUMBERS = 2**18  # allocations to compress, for an estimate of the disk space


class _Budget:
    """The number of examples that may still be evaluated to time a loss."""

    def __init__(self, examples: float) -> None:
        self.examples = examples

    def spend(self, examples: int) -> bool:
        """Tell whether so many examples still fit; if so, subtract them."""
        fits = examples <= self.examples
        self.examples -= examples if fits else 0
        return fits


@reported(CostsRequest)
def measure(request: CostsRequest) -> Costs:
    """Return the seconds of each loss and of all together, batch sizes and memory, from a few timed
    batches.
    """
    import torch

    objective = objective_of(request.setup)
    objective.settle_batch_sizes(first_point(request.sample, objective), request.batch_sizes)
    losses = {name: _measured(request, objective, name) for name in objective.losses}
    higher = sum(
        max(losses[name].higher for name in names)
        for sources in objective.data.passes(objective.losses).values()
        for names in sources.values()
    )
    on_gpu = objective.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    return Costs(
        losses=losses,
        compressed=_compressions(request, objective, request.segments_of_window),
        together={keep: _together(objective, losses, keep) for keep in KEEP},
        higher=higher,
        recalibrating=_recalibrating(objective),
        memory={keep: peak + _needed(request, objective, keep) for keep in KEEP},
    )


@reported(CompressionsRequest)
def compressions(request: CompressionsRequest) -> Compressions:
    """Return by loss the ratio that the store's compression leaves of each kind of array, see
    `compressed_share`.
    """
    objective = objective_of(request.setup)
    objective.settle_batch_sizes(first_point(request.sample, objective), request.batch_sizes)
    return Compressions(compressed=_compressions(request, objective, request.segments_of_window))


def _needed(request: CostsRequest, objective: Objective, keep: str) -> float:
    """Return the bytes that a replay of all losses needs at a level of `--keep`."""
    blocks = {name: block_of(request, objective, name, keep) for name in objective.losses}
    return bytes_needed(request, objective, list(blocks), blocks, keep)


def _together(objective: Objective, losses: dict[str, LossCosts], keep: str) -> float:
    """Return the seconds of one evaluation of all losses at a level of `--keep`.

    Losses with per-example results compute their sums over tensors together with the examples.
    """
    told = [name for name, loss in objective.losses.items() if loss.per is not None]
    others = [name for name in losses if holds(keep, "units") or name not in told]
    together = sum(losses[name].examples for name in told)
    for sources in objective.data.passes(others).values():
        slowest = [max(names, key=lambda name: losses[name].seconds) for names in sources.values()]
        passes: dict[Any, list[float]] = {}
        for (function, _), name in zip(sources, slowest, strict=True):
            shared = "outputs" if objective.losses[name].kind == "function" else function
            passes.setdefault(shared, []).append(losses[name].forward)
        # one of the passes runs, the others are spared
        spared = [seconds for times in passes.values() for seconds in times[1:]]
        together += sum(losses[name].seconds for name in slowest) - sum(spared)
    return together


def _seconds_of_examples(objective: Objective, name: str) -> float:
    """Return the seconds of computing every example's share of a split along two motions, from one
    batch; 0 for losses without per-example results.
    """
    from ...numerics.objective import Motion, one_batch, recalled, recorded

    loss = objective.losses[name]
    if loss.per is None or loss.split is None:
        return 0.0
    split = objective.splits[loss.split]
    if loss.per == "element":
        return _seconds_of_elements(objective, name)
    check = objective.find_examples(name)
    objective.example_axes.pop(name, None)
    if not check.untold:
        objective.example_axes[name] = recalled(recorded(check.axes))
    size = 1 if check.untold else objective.batch_sizes[split.name]
    batch, here = split.sample(0, size), objective.point
    times = []
    for _ in range(2):  # the first run is slower
        start = time.perf_counter()
        objective.tell_examples(name, [Motion(here, here)] * 2, one_batch(batch, size), size)
        times.append(time.perf_counter() - start)
    return min(times) / size * split.examples


def _seconds_of_elements(objective: Objective, name: str) -> float:
    """Return the seconds of computing every element's share of a split along two motions.

    Batches grow up to the full size: with few examples, a pass takes mostly constant time.
    """
    from ...numerics.objective import Motion

    split, here = objective.splits[str(objective.losses[name].split)], objective.point
    motions = [Motion(here, {tensor: values + 1 for tensor, values in here.items()})] * 2
    most, count, seconds = min(objective.batch_sizes[split.name], split.examples), 0, 0.0
    while count < most and seconds < _TIMED_SECONDS:
        count = min(_GROWTH * count or 1, most)
        batch, elements = split.sample(0, count), count * objective.elements_of(name)
        start = time.perf_counter()
        objective.tell_elements(name, motions, [batch], elements)
        seconds = time.perf_counter() - start
    return seconds / count * split.examples


def _recalibrating(objective: Objective) -> float:
    """Return the seconds of one pass that recalibrates statistics; 0 in other modes."""
    recalibration = objective.recalibration
    if recalibration is None:
        return 0.0
    split, size = recalibration.split, recalibration.batch_size
    seconds = _seconds(
        objective, recalibration.loss, split.sample(0, size), _Budget(size), size, gradient=False
    )
    return float(seconds / size * split.examples)


def _measured(request: CostsRequest, objective: Objective, name: str) -> LossCosts:
    from ...numerics.objective import ElementOrder, power_of_two

    loss, order = objective.losses[name], objective.order(name)
    if loss.split is None:
        alone = _seconds(objective, name, None, _Budget(8), 1)
        return LossCosts(seconds=alone, forward=0.0, higher=0.0, fastest=0, largest=0, examples=0.0)
    split, chosen = objective.splits[loss.split], objective.batch_sizes[loss.split]
    most, backward = split.examples, 1.0
    if isinstance(order, ElementOrder):
        backward = order.groups_per_batch(chosen)
    elif order is not None:
        most = max(1, split.examples // len(order.labels))
    used, budget = min(chosen, most), _Budget(_TIMED_PASSES * split.examples)
    part = max(1, used // _PART)
    few = split.sample(0, part)
    budget.spend(2 * part + (part if request.measured else 0))
    # the first evaluation of a model is slower
    of_part = _seconds(objective, name, few, _Budget(0), part, least=2)
    forward = _seconds(objective, name, few, _Budget(0), part, gradient=False) / of_part
    higher = 0.0
    if request.measured:
        wide = objective.reference
        higher = (
            _seconds(wide, name, wide.splits[loss.split].sample(0, part), _Budget(0), part)
            / of_part
        )
    budget.spend(used)
    per_example = {used: _seconds(objective, name, split.sample(0, used), budget, used) / used}
    for size in (chosen * 2, chosen // 2, chosen * 4, chosen // 4):
        size = min(max(1, size), most)
        if size not in per_example and budget.spend(size):
            per_example[size] = (
                _seconds(objective, name, split.sample(0, size), budget, size) / size
            )
    room = ROOM * free_memory_each(request.sample.workers_per_host, objective.device)
    return LossCosts(
        seconds=per_example[used] * split.examples * (1 + (backward - 1) * max(0.0, 1 - forward)),
        forward=forward * per_example[used] * split.examples,
        higher=higher * per_example[used] * split.examples,
        fastest=min(per_example, key=lambda size: per_example[size]),
        largest=min(power_of_two(room / objective.saved_bytes(name)), split.examples),
        examples=_seconds_of_examples(objective, name),
    )


def _seconds(
    objective: Objective,
    name: str,
    batch: Any,
    budget: _Budget,
    examples: int,
    gradient: bool = True,
    least: int = 1,
) -> float:
    """Return the seconds of the fastest of a few evaluations of one batch: at least `least`, more
    while time and budget last.
    """
    from ...numerics.objective import NoGradients, WholeGradients

    tensors = objective.tensors.differentiable
    taken = WholeGradients(tensors, objective.dtype) if gradient else NoGradients()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (
        len(times) < 8
        and time.perf_counter() - began < _TIMED_SECONDS / 4
        and budget.spend(examples)
    ):
        start = time.perf_counter()
        objective.evaluate_on_batches(functools.partial(objective.values, name), [batch], taken)
        times.append(time.perf_counter() - start)
    return min(times)


def _sampled_batch(objective: Objective, split: str) -> int:
    """Return how many examples a batch needs for its gradient to show which numbers are 0: more
    than a part where some examples are rare.
    """
    return int(
        min(objective.batch_sizes[split], max(32, objective.splits[split].examples // _PART))
    )


def _compressions(
    request: SampleRequest[Any], objective: Objective, segments_of_window: int
) -> dict[str, dict[str, float]]:
    """Return the ratio that the store's compression leaves of each kind of array, from one moving
    segment and one batch of each loss.

    The motion is of whole tensors, the gradient of one batch at the segment's start. If nothing
    moves, all numbers are zero.
    """
    from ...numerics.objective import WholeGradients
    from ...results import compressed_share

    pair = next((pair for _, pair in moving(request.sample, objective) if pair is not None), None)
    shares: dict[str, dict[str, float]] = {}
    for name, loss in objective.losses.items():
        parts = [] if pair is not None else [np.zeros(_SAMPLED_NUMBERS, "float32")]
        if pair is not None:
            size = 0 if loss.split is None else _sampled_batch(objective, loss.split)
            batch = None if loss.split is None else objective.splits[loss.split].sample(0, size)
            gradient = objective.evaluate_on_batches(
                functools.partial(objective.values, name),
                [batch],
                WholeGradients(objective.tensors.differentiable, objective.dtype),
            ).gradient
            elements = max(1, sum(values.numel() for values in gradient.values()))
            for tensor, values in gradient.items():
                motion = pair[1][tensor].double() - pair[0][tensor].double()
                product = (motion * values.cpu()).float()
                few = _SAMPLED_NUMBERS * values.numel() // elements + 1  # in proportion to its size
                parts.append(product.reshape(-1)[:few].numpy())
        shares[name] = compressed_share(parts, segments_of_window)
    return shares
