"""Measure the rounding error of a precision: compare gradients along the motion at the start of a
segment, on a sample of the examples, with those one precision higher.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...base.available_memory import freed_at_once, give_back
from ...errors import InputError
from ..schema import sampled_examples
from .directions import Along, Gradients, Motion, SumsAlong, WholeGradients, blocks
from .evaluate import Objective
from .probe import weighty_part
from .sums import Evaluation


def rounding_errors(
    objective: Objective,
    losses: Iterable[str],
    start: Mapping[str, Tensor],
    end: MutableMapping[str, Tensor],
    axes: Mapping[str, int | None] | None,
    *,
    every: bool,
) -> dict[str, tuple[float, float]]:
    """Return Σ|A − A*| and Σ|A*| of losses, where A is the motion times the gradient at its start,
    on a sample of the examples, and A* the same one precision higher.

    Besides `start`, memory holds one point in the precision of the run and one in the higher
    precision.

    Args:
        objective: evaluates losses; its reference is one precision higher.
        losses: names of the losses.
        start: start of the motion; preferably one that reads tensors on demand.
        end: end of the motion; its tensors may be replaced by others with the same values.
        axes: by tensor, the axis of its units, to sum A over units; None to use every parameter.
        every: use all examples instead of a sample.
    """

    def evaluated(side: Objective, name: str, motion: Motion) -> Evaluation:
        tensors = side.tensors.differentiable
        gradients: Gradients = (
            WholeGradients(tensors) if axes is None else SumsAlong(tensors, Along(axes, [motion]))
        )
        values = partial(side.values, name)
        for batches in _samples(side, name, every):
            evaluation = side.evaluate_on_batches(values, batches, gradients)
            if _has_weight(evaluation):
                break
        return evaluation  # where nothing has weight, the walk refuses the loss by name

    objective.place(start)
    motion = Motion(objective.point, end)
    ours = {name: evaluated(objective, name, motion) for name in losses}
    # memory also holds a point in twice the precision
    with objective.holding(end), freed_at_once(objective.parameter_bytes):
        give_back(objective.parameter_bytes)
        finer = objective.reference
        finer.place(start)
        motion = Motion(finer.point, end)
        return {
            name: _apart(evaluation, evaluated(finer, name, motion), motion, axes)
            for name, evaluation in ours.items()
        }


def _samples(objective: Objective, name: str, every: bool) -> Iterator[Iterable[Any]]:
    """Yield samples in order of preference, each as batches. For a term of the parameters, a batch is
    None.
    """
    on = objective.losses[name].split
    if on is None:
        yield [None]
        return
    split, size = objective.splits[on], objective.batch_sizes[on]
    if every or objective.norm_stats == "batch":  # in batch mode, a batch is part of the loss
        for first in range(1 if every else -(-split.examples // size)):
            batches = (batch for _, batch in split.batches(size))
            yield batches if every else itertools.islice(batches, first, first + 1)
        return
    count = sampled_examples(split.examples)
    positions = split.spread(count)
    whole = torch.arange(count, device="cpu") if positions is None else positions
    most = max(1, size // 2)  # a batch takes twice the memory in the higher precision
    spread = None
    # examples of different shapes only stack in the order of the data
    with contextlib.suppress(InputError):
        spread = [split.at(part) for part in torch.split(whole, most)]
    if spread is not None:
        yield spread
    yield [weighty_part(objective, name, min(count, most))]


def _has_weight(evaluation: Evaluation) -> bool:
    """Return whether the weights of the elements sum to more than 0."""
    try:
        return bool(evaluation.weight > 0)
    except InputError:  # as reading the totals says of others
        return False


@torch.no_grad()
def _apart(
    ours: Evaluation, exact: Evaluation, motion: Motion, axes: Mapping[str, int | None] | None
) -> tuple[float, float]:
    parts = []
    for name, values in exact.gradient.items():
        own, true = ours.gradient[name].reshape(1, -1), values.reshape(1, -1)
        for rows, columns in blocks(*true.shape):
            right, wrong = true[rows, columns], own[rows, columns] - true[rows, columns]
            if axes is None:
                ends = (motion.end[name], motion.start[name])
                end, start = (tensor.reshape(1, -1)[rows, columns].double() for tensor in ends)
                right, wrong = right * (end - start), wrong * (end - start)
            parts.append((float(wrong.abs().sum()), float(right.abs().sum())))
    apart, scale = zip(*parts, strict=True) if parts else ((), ())
    return math.fsum(apart), math.fsum(scale)
