"""Assumptions checked on a small sample before a long run; each failure names the usual culprits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from ..task import Loss
from .evaluate import Evaluation, Objective, is_statistic, unpack

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


@dataclass(frozen=True)
class _Scale:
    """What differences are measured against: Σ|value| of an element, and the larger gradient of a sample and its half.

    At a minimum the gradient of the sample is pure rounding, and the loss itself may cross zero.
    """

    value: float
    gradient: float

    def apart(self, one: Evaluation, other: Evaluation) -> float:
        """The larger of the relative differences of the values and of the gradients (Euclidean); NaN where one is NaN."""
        gradients = math.sqrt(
            math.fsum(float(((one.gradient[name] - other.gradient[name]) ** 2).sum()) for name in one.gradient)
        )
        differences = [abs(one.loss - other.loss) / self.value, gradients / self.gradient]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def _scale(objective: Objective, loss: Loss, whole: Evaluation, half: Evaluation, batch: Any) -> _Scale:
    def absolute(model: Any, batch: Any) -> Any:
        values, weights = objective.values(loss, batch)
        return values.abs() if weights is None else (values.abs(), weights)

    value = max(objective.over(Loss(call=absolute, on=loss.on), iter([batch]), gradient=False).loss, 1e-12)
    return _Scale(value, max(_norm(whole), _norm(half), 1e-12 * value))


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
    cut = count // 2 + 1 if count > 2 else 1
    sample, half = split.slice(0, count), split.slice(0, cut)
    first = objective.over(loss, iter([sample]))
    _finite(name, first)
    scale = _scale(objective, loss, first, objective.over(loss, iter([half])), sample)
    notes = _repeats(name, scale.apart(first, objective.over(loss, iter([split.slice(0, count)]))))
    if objective.norm_stats == "batch":
        _statistics_unused(objective, name, loss, sample, first.loss, scale.value)
        last = (split.examples - 1) // objective.batch_sizes[loss.on] * objective.batch_sizes[loss.on]
        objective.over(loss, iter([split.slice(last, split.examples)]))  # it may be too small for batch statistics
    elif count > 1:
        parts = objective.over(loss, iter([half, split.slice(cut, count)]))
        _batches(name, loss, first, parts, scale.apart(first, parts))
    if loss.reduces:
        _own_mean(objective, name, loss, sample, first.loss, scale.value)
    return notes


def _finite(name: str, evaluation: Evaluation) -> None:
    if not math.isfinite(evaluation.loss) or not math.isfinite(_norm(evaluation)):
        raise InputError(
            f"loss {name!r} is {evaluation.loss} at the first checkpoint, its gradient norm {_norm(evaluation)}. Start later "
            "with --steps A:, or look for a division or a logarithm of zero in the loss."
        )


def _repeats(name: str, apart: float) -> list[str]:
    if not apart <= _REPEATS:
        raise InputError(
            f"loss {name!r} is not deterministic: two evaluations at one point differ by {apart:.1e}. Usual culprits: random "
            "augmentation in the data set, dropout called with training=True, noise or sampling in the model or the loss."
        )
    return (
        [f"loss {name!r}: kernels do not repeat bit for bit (two evaluations differ by {apart:.1e})"]
        if apart > 0
        else []
    )


def _batches(name: str, loss: Loss, whole: Evaluation, parts: Evaluation, apart: float) -> None:
    if not apart <= _AGREE:
        raise InputError(
            f"loss {name!r} depends on how split {loss.on!r} is cut into batches: one batch or two give values {whole.loss:.6g} "
            f"and {parts.loss:.6g}, {apart:.1e} apart. Usual culprits: batch statistics (use --norm-stats batch --batch-size N), "
            "a loss that compares examples with each other, a mean taken inside Loss(call=fn)."
        )


def _statistics_unused(objective: Objective, name: str, loss: Loss, batch: Any, before: float, scale: float) -> None:
    """In batch mode, moving the running statistics must not move the loss."""
    statistics = [tensor for key, tensor in objective.model.named_buffers() if is_statistic(key)]
    kept = [tensor.clone() for tensor in statistics]
    for tensor in statistics:
        tensor.mul_(1.5).add_(0.5)
    after = objective.over(loss, iter([batch]), gradient=False).loss
    for tensor, values in zip(statistics, kept, strict=True):
        tensor.copy_(values)
    if not abs(after - before) <= _AGREE * scale:
        raise InputError(
            f"loss {name!r} reads running statistics in spite of --norm-stats batch ({before:.6g} becomes {after:.6g} when they "
            "move). Usual culprits: batch_norm imported by name from torch.nn.functional, a scripted module. Call F.batch_norm or "
            "use the torch.nn layers."
        )


def _own_mean(objective: Objective, name: str, loss: Loss, batch: Any, ours: float, scale: float) -> None:
    inputs, targets = unpack(batch)
    mean = Loss(call=lambda model, _: loss.mean()(model(inputs), targets).reshape(1), on=loss.on)
    theirs = objective.over(mean, iter([batch]), gradient=False).loss
    if not abs(ours - theirs) <= _AGREE * scale:
        raise InputError(
            f"the mean of loss {name!r} over its elements is {ours:.6g}, but its own reduction='mean' gives {theirs:.6g}. Usual "
            "culprits: ignore_index or class weights. Say how elements are weighted: Loss(call=fn) returning (values, weights)."
        )
