"""Assumptions checked on a small sample before a long run; each failure names the usual culprits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import InputError
from ..task import Loss
from .evaluate import Evaluation, Objective, unpack

_SAMPLE = 256
_AGREE = 1e-4
_REPEATS = 1e-6


@dataclass(frozen=True)
class Identity:
    """What a loss is at one point of one sample: its value and its gradient's Euclidean norm."""

    loss: float
    gradient_norm: float

    def matches(self, other: Identity) -> bool:
        """Whether both are the same loss, up to what another machine's kernels may change."""
        return all(
            abs(mine - theirs) <= 1e-3 * max(abs(mine), abs(theirs), 1e-12)
            for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True)
        )


def _norm(evaluation: Evaluation) -> float:
    return math.sqrt(math.fsum(float((each**2).sum()) for each in evaluation.gradient.values()))


def _distance(one: Evaluation, other: Evaluation) -> float:
    """Largest relative difference of the values and of the gradients (Euclidean)."""
    apart = math.sqrt(
        math.fsum(float(((one.gradient[name] - other.gradient[name]) ** 2).sum()) for name in one.gradient)
    )
    scale = max(abs(one.loss), abs(other.loss), 1e-12)
    return max(abs(one.loss - other.loss) / scale, apart / max(_norm(one), _norm(other), 1e-12 * scale))


def identify(objective: Objective, name: str) -> Identity:
    """A loss's value and gradient norm on the first 256 examples, at the point the objective holds."""
    loss = objective.losses[name]
    found = objective.over(loss, iter([objective.splits[loss.on].slice(0, _sample(objective, loss))]))
    return Identity(found.loss, _norm(found))


def _sample(objective: Objective, loss: Loss) -> int:
    """A sample no larger than a batch, so that whatever fits a batch fits the probe."""
    return min(_SAMPLE, objective.batch_sizes[loss.on], objective.splits[loss.on].examples)


def check_loss(objective: Objective, name: str) -> list[str]:
    """Probe one loss at the point the objective holds; returns notes worth recording.

    Raises:
        InputError: where two evaluations or two batch sizes disagree, or the loss is not its function's own mean.
    """
    loss = objective.losses[name]
    split = objective.splits[loss.on]
    count = _sample(objective, loss)
    sample = [split.slice(0, count)]
    first = objective.over(loss, iter(sample))
    _finite(name, first)
    notes = _repeats(name, first, objective.over(loss, iter([split.slice(0, count)])))
    if objective.norm_stats == "running" and count > 1:
        half = (count + 1) // 2 if count < 3 else count // 2 + 1
        _batches(name, loss, first, objective.over(loss, iter([split.slice(0, half), split.slice(half, count)])))
    if loss.reduces:
        _own_mean(objective, name, loss, sample[0], first.loss)
    return notes


def _finite(name: str, evaluation: Evaluation) -> None:
    if not torch.isfinite(torch.tensor([evaluation.loss, _norm(evaluation)])).all():
        raise InputError(
            f"loss {name!r} is {evaluation.loss} at the first checkpoint, its gradient norm {_norm(evaluation)}. Start later "
            "with --steps A:, or look for a division or a logarithm of zero in the loss."
        )


def _repeats(name: str, first: Evaluation, second: Evaluation) -> list[str]:
    apart = _distance(first, second)
    if apart > _REPEATS:
        raise InputError(
            f"loss {name!r} is not deterministic: two evaluations at one point differ by {apart:.1e}. Usual culprits: random "
            "augmentation in the data set, dropout called with training=True, noise or sampling in the model or the loss."
        )
    return (
        [f"loss {name!r}: kernels do not repeat bit for bit (two evaluations differ by {apart:.1e})"]
        if apart > 0
        else []
    )


def _batches(name: str, loss: Loss, whole: Evaluation, parts: Evaluation) -> None:
    apart = _distance(whole, parts)
    if apart > _AGREE:
        raise InputError(
            f"loss {name!r} depends on how split {loss.on!r} is cut into batches: one batch or two give values {whole.loss:.6g} "
            f"and {parts.loss:.6g}, {apart:.1e} apart. Usual culprits: batch statistics (use --norm-stats batch --batch-size N), "
            "a loss that compares examples with each other, a mean taken inside Loss(call=fn)."
        )


def _own_mean(objective: Objective, name: str, loss: Loss, batch: Any, ours: float) -> None:
    inputs, targets = unpack(batch)
    mean = Loss(call=lambda model, _: loss.mean()(model(inputs), targets).reshape(1), on=loss.on)
    theirs = objective.over(mean, iter([batch]), gradient=False).loss
    if abs(ours - theirs) > _AGREE * max(abs(ours), abs(theirs), 1e-12):
        raise InputError(
            f"the mean of loss {name!r} over its elements is {ours:.6g}, but its own reduction='mean' gives {theirs:.6g}. Usual "
            "culprits: ignore_index or class weights. Say how elements are weighted: Loss(call=fn) returning (values, weights)."
        )
