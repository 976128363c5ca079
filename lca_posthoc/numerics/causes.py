r"""Split the motion of one optimiser step by its causes.

$\Delta\theta = u_\text{signal} + u_\text{noise} + u_\text{momentum} + u_\text{decay} +
u_\text{rest}$, and each part gets an allocation like the motion. *Signal* is the step that the
gradient of the whole training loss would have made in this state of the optimiser, *noise* what the
actual gradient added to it, *momentum* the memory of earlier gradients and earlier decay, *decay*
the decay of this step. *Rest* is what no formula explains.

Formulas follow torch's documentation of `torch.optim`. $P$ are the numbers by which an adaptive
optimiser multiplies, or 1:

| optimiser | signal | momentum | decay |
|---|---|---|---|
| SGD | $-\eta(1-\tau)\,g$ | $\mu\,\eta/\eta_{t-1}\,\Delta\theta_{t-1}$ | $-\eta(1-\tau)\lambda\,\theta$ |
| Adam | $-\kappa(1-\beta_1)\,\tilde P g$ | $-\kappa\beta_1 P m$ | $-\kappa(1-\beta_1)\lambda\,P\theta$ |
| AdamW | the same | the same | $-\eta\lambda\,\theta$ |
| RMSprop, Adagrad | $-\eta\,\tilde P g$ | | $-\eta\lambda\,P\theta$ |

$\tau$ is the dampening, 0 in an optimiser's first step, and $\kappa=\eta/(1-\beta_1^t)$. $\tilde P$
comes from the second moments that the full gradient would have produced. Those of the actual step
are 0 where the mini-batch had no gradient, and dividing by them would give a step that the
optimiser never makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.optimizer_steps import GroupStep, OptimizerStep
from .objective import Motion, Numbers, blocks
from .parts import Computed, Point, displacement, only
from .schema import CAUSES

_NO_SUMS = np.zeros(0)
_ADAM = ("Adam", "AdamW")
# How much the norm of a gradient computed from weights may differ from that of the actual gradient,
# relative to it and in roundings of the weights; noise or momentum is lost if rounding makes up a
# larger share of it than the last number.
_SAME_NORM, _ROUNDINGS, _LOST = 1e-4, 4.0, 0.1


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Describe how one step of an optimiser moved one tensor.

    Attributes:
        signal: factor of the gradient, or of P times it.
        factor: the same factor for the gradient as the optimiser received it, without clipping.
        momentum: factor of the previous motion, or of P times the first moment.
        decay: factor of the weights, or of P times them if `scales_decay`.
        scale: computes the numbers P from second moments; None if P is 1.
        renewed: computes second moments after a step from those before it and a gradient.
        first: β₁, if first moments are the momentum and reveal the gradient received; None if noise
            is whatever the other causes do not explain.
        scales_decay: whether the decay is part of the gradient.
        norm: norm of the gradient the optimiser received; NaN if unknown.
        unknown: why only the decay is known; "" if everything is.
    """

    signal: float = 0.0
    factor: float = 0.0
    momentum: float = 0.0
    decay: float = 0.0
    scale: Callable[[Tensor], Tensor] | None = None
    renewed: Callable[[Tensor | float, Tensor], Tensor] | None = None
    first: float | None = None
    scales_decay: bool = False
    norm: float = math.nan
    unknown: str = ""

    @property
    def follows_motion(self) -> bool:
        """Return whether the momentum is computed from the previous motion."""
        return self.momentum != 0.0 and self.first is None


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Read the moments of tensors before and after a step; each function returns None if a tensor
    has none.

    Attributes:
        first_before: first moment before the step, as Adam stores it.
        first_after: first moment after the step.
        second_before: second moment before the step.
        second_after: second moment after the step.
    """

    first_before: Callable[[str], Tensor | None]
    first_after: Callable[[str], Tensor | None]
    second_before: Callable[[str], Tensor | None]
    second_after: Callable[[str], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class StoredMoments:
    """List the tensors, by their names in the files, for which each of the `Moments` is stored."""

    first_before: frozenset[str]
    second_before: frozenset[str]
    first_after: frozenset[str]
    second_after: frozenset[str]


def formulas(
    step: OptimizerStep | None,
    before: OptimizerStep | None,
    since: int,
    stored: StoredMoments,
) -> dict[str, Formula]:
    """Return how the tensors of a model moved on one segment, by their names in the files.

    Args:
        step: record of the step to its end; None if there is none.
        before: record of the step to its start; None unless that is the step from the previous
            checkpoint.
        since: training step of its start.
        stored: the stored moments.
    """
    if step is None or step.optimizer_steps != 1 or step.since != since:
        return {}
    earlier = {
        name: group
        for group in (before.groups if before is not None and before.optimizer_steps == 1 else ())
        for name in group.tensors
    }
    clip = 1.0 if step.clip is None else step.clip
    return {
        name: replace(_formula(name, group, earlier.get(name), clip, stored), norm=norm)
        for group in step.groups
        for name, norm in zip(group.tensors, group.gradient_norms, strict=True)
    }


def _formula(
    name: str, group: GroupStep, before: GroupStep | None, clip: float, stored: StoredMoments
) -> Formula:
    has_second = name in stored.second_after
    if group.optimizer == "SGD":
        return _of_sgd(group, before, clip)
    if group.optimizer in _ADAM and not group.amsgrad:
        has_before = not group.has_memory or (
            name in stored.first_before and name in stored.second_before
        )
        return _of_adam(group, clip, has_second, has_before and name in stored.first_after)
    has_second = has_second and (group.steps == 1 or name in stored.second_before)
    if group.optimizer == "RMSprop" and not (group.momentum or group.centered):
        alpha = group.alpha or 0.0
        known = _of_scaled(group, group.lr, clip, has_second)
        return replace(
            known, renewed=lambda before, gradient: alpha * before + (1 - alpha) * gradient**2
        )
    if group.optimizer == "Adagrad":
        rate = group.lr / (1 + (group.steps - 1) * (group.lr_decay or 0.0))
        known = _of_scaled(group, rate, clip, has_second)
        return replace(known, renewed=lambda before, gradient: before + gradient**2)
    return _decay_alone(group, f"no formula for {group.optimizer} with these settings")


def _of_sgd(group: GroupStep, before: GroupStep | None, clip: float) -> Formula:
    if group.nesterov:
        formula = _decay_alone(group, "no formula for Nesterov's momentum")
        return replace(formula, decay=-group.lr * (1 + group.momentum) * group.weight_decay)
    remembers = bool(group.momentum) and group.has_memory
    factor = -group.lr * (1 - group.dampening if remembers else 1.0)
    known = Formula(
        signal=_signed(factor, group) * clip, factor=factor, decay=factor * group.weight_decay
    )
    if not remembers:
        return known
    # the previous motion equals the momentum up to the learning rate
    if before is None or before.optimizer != "SGD" or not before.momentum or before.nesterov:
        return replace(known, unknown="the previous step is not recorded")
    if before.steps + 1 != group.steps:
        return replace(known, unknown="its memory is not of the previous step")
    if not before.lr:
        return replace(known, unknown="the learning rate of the previous step was 0")
    return replace(known, momentum=group.momentum * group.lr / before.lr)


def _of_adam(group: GroupStep, clip: float, has_second: bool, has_first: bool) -> Formula:
    if group.betas is None or group.eps is None or not has_second:
        return _decay_alone(group, "no moments are recorded")
    (beta1, beta2), eps = group.betas, group.eps
    rate = group.lr / (1 - beta1**group.steps)
    correction = 1 - beta2**group.steps
    factor = -rate * (1 - beta1)
    known = Formula(
        signal=_signed(factor, group) * clip,
        factor=factor,
        decay=(-group.lr if group.decoupled else factor) * group.weight_decay,
        scale=lambda second: 1 / ((second / correction).sqrt() + eps),
        renewed=lambda before, gradient: beta2 * before + (1 - beta2) * gradient**2,
        scales_decay=not group.decoupled,
    )
    if not has_first:
        # without the moments before the step, the signal is unknown too
        why = "no first moments are recorded, or none before the step"
        return replace(known, signal=0.0, unknown=why)
    momentum = -rate * beta1 if group.has_memory else 0.0
    return replace(known, first=beta1, momentum=momentum)


def _of_scaled(group: GroupStep, rate: float, clip: float, has_second: bool) -> Formula:
    if group.eps is None or not has_second:
        return _decay_alone(group, "no moments are recorded")
    eps = group.eps
    return Formula(
        signal=_signed(-rate, group) * clip,
        factor=-rate,
        decay=-rate * group.weight_decay,
        scale=lambda second: 1 / (second.sqrt() + eps),
        scales_decay=True,
    )


def _decay_alone(group: GroupStep, why: str) -> Formula:
    """Return what is known for any optimiser: decay apart from the gradient."""
    return Formula(decay=-group.lr * group.weight_decay if group.decoupled else 0.0, unknown=why)


def _signed(factor: float, group: GroupStep) -> float:
    return -factor if group.maximize else factor


class SegmentCauses:
    """Provide the causes of the motion of one segment, as `Parts` of it.

    Directions of SGD are existing points. Those of an adaptive optimiser are computed once and
    stored: three numbers for every parameter, or four if decay is part of the gradient.

    Args:
        signal: name of the training loss.
        formulas: formula of each tensor; a tensor without one moved for no known cause.
        start: every tensor of the model at the segment's start.
        before: every tensor one checkpoint earlier; None if no formula needs it.
        moments: moments of the tensors.
        spacing: returns, for a tensor, the distance from 1 to the next number of its stored type.
    """

    def __init__(
        self,
        signal: str,
        formulas: Mapping[str, Formula],
        start: Point,
        before: Point | None,
        moments: Moments,
        spacing: Callable[[str], float],
    ) -> None:
        self.signal: str | None = signal
        self.needs_signal = any(formula.signal for formula in formulas.values())
        self._formulas, self._start, self._before = formulas, start, before
        self._moments, self._spacing = moments, spacing
        self._told: dict[str, _Told] = {}  # does not depend on the loss
        self._directions: dict[str, Motion] | None = None

    def directions(self, signal: Point | None) -> Sequence[Motion]:
        """Return the directions of the causes that have one on this segment."""
        if self._directions is None:
            known = signal is not None or not self.needs_signal
            assert known, "the signal is known where a segment begins"
            self._directions = self._computed(signal or {})
        return list(self._directions.values())

    def _computed(self, signal: Point) -> dict[str, Motion]:
        """Return the direction of each cause, and of the gradient the optimiser received if first
        moments reveal it.
        """
        start, formulas = self._start, self._formulas
        scaled: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("signal", "momentum", "decay", "gradient")
        }
        for name, formula in formulas.items():
            if formula.scale is not None:
                for kind, values in self._scaled(name, formula, signal.get(name)):
                    scaled[kind][name] = values
        plain = [name for name, formula in formulas.items() if formula.scale is None]
        directions = {}
        follow = {
            "signal": [name for name in plain if formulas[name].signal],
            "decay": [
                name
                for name, formula in formulas.items()
                if formula.decay and not formula.scales_decay
            ],
        }
        for kind, point in (("signal", signal), ("decay", start)):
            of_kind = {name: point[name] for name in follow[kind]} | scaled[kind]
            if of_kind:
                directions[kind] = displacement(of_kind, start)
        moved = [name for name in plain if formulas[name].momentum]
        if moved:
            assert self._before is not None, "the checkpoint before is read where it is needed"
            ends = only(start, moved, start)
            others = scaled[
                "momentum"
            ]  # tensors of an adaptive optimiser, whose directions start at 0
            directions["momentum"] = Motion(
                only(self._before, moved, start),
                Computed(start, lambda name: others[name] if name in others else ends[name]),
            )
        elif scaled["momentum"]:
            directions["momentum"] = displacement(scaled["momentum"], start)
        if scaled["gradient"]:
            directions["gradient"] = displacement(scaled["gradient"], start)
        return directions

    def _scaled(
        self, name: str, formula: Formula, signal: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the directions of a tensor that an adaptive optimiser moves, in the type of the
        model.
        """
        assert formula.scale is not None
        assert formula.renewed is not None
        weights = self._start[name]
        dtype = weights.dtype
        second = self._moments.second_after(name)
        assert second is not None, "a formula with a scale has second moments"
        scale = formula.scale(second.double())
        if formula.signal and signal is not None:
            gradient = formula.signal / formula.factor * signal.double()
            if formula.scales_decay:
                gradient = gradient + formula.decay / formula.factor * weights
            second_before = self._moments.second_before(name)
            earlier = 0.0 if second_before is None else second_before.double()
            yield "signal", (formula.scale(formula.renewed(earlier, gradient)) * signal).to(dtype)
        if formula.decay and formula.scales_decay:
            yield "decay", (scale * weights).to(dtype)
        if formula.first is None:
            return
        after, before = self._moments.first_after(name), self._moments.first_before(name)
        assert after is not None, "first moments are stored with the second"
        gradient = after.double()
        if before is not None:
            gradient = gradient - formula.first * before.double()
            if formula.momentum:
                yield "momentum", (scale * before).to(dtype)
        yield "gradient", (scale * (gradient / (1 - formula.first))).to(dtype)

    def shares(
        self, end: Point, allocated: Mapping[str, Numbers], sums: Mapping[str, Numbers]
    ) -> dict[str, Numbers]:
        """Return the allocation of each cause, ([groups, ]causes) for each tensor, in units of
        loss.

        The causes of a tensor add up to its allocation.

        Args:
            end: every tensor at the end of the segment.
            allocated: allocation of each tensor.
            sums: sums along the directions, ([groups, ]directions) for each tensor.
        """
        return {
            name: self._of_tensor(name, end, numbers, sums.get(name, _NO_SUMS))
            for name, numbers in allocated.items()
        }

    def _of_tensor(self, name: str, end: Point, allocated: Numbers, sums: Numbers) -> Numbers:
        formula = self._formulas.get(name, Formula(unknown="no record"))
        factors = {
            "signal": formula.signal,
            "momentum": formula.momentum,
            "decay": formula.decay,
            "gradient": formula.factor,
        }
        known: dict[str, Numbers] = {cause: np.zeros_like(allocated) for cause in CAUSES}
        of_gradient: Numbers | None = None
        for position, kind in enumerate(self._directions or ()):
            product = factors[kind] * np.asarray(sums)[..., position]
            if kind == "gradient":
                of_gradient = product
            else:
                known[kind] = product
        if name not in self._told:
            self._told[name] = self._telling(name, formula, end)
        told = self._told[name]
        if not told.momentum:
            known["momentum"] = np.zeros_like(allocated)
        left = allocated - known["signal"] - known["momentum"] - known["decay"]
        if formula.first is not None and of_gradient is not None:
            decay = known["decay"] if formula.scales_decay else 0.0
            known["noise"] = of_gradient - decay - known["signal"]
            known["rest"] = left - known["noise"]
        else:
            known["noise" if told.noise else "rest"] = left
        return np.stack([np.asarray(known[cause]) for cause in CAUSES], -1)

    def _telling(self, name: str, formula: Formula, end: Point) -> _Told:
        """Return what the motion of a tensor reveals, judging by the norm of the gradient the
        optimiser received; if that is unknown, trust the formula.
        """
        if formula.unknown:
            return _Told(noise=False)
        if formula.first is not None or math.isnan(formula.norm) or not formula.factor:
            return _Told()
        norms = self._norms(name, formula, end)
        if abs(norms["gradient"] - formula.norm) > _SAME_NORM * formula.norm + norms["lost"]:
            # something else contributed to this motion, or to the previous one
            return _Told(momentum=False, noise=False)
        lost = norms["rounding"]
        return _Told(
            momentum=lost <= _LOST * norms["momentum"], noise=lost <= _LOST * norms["noise"]
        )

    def _norms(self, name: str, formula: Formula, end: Point) -> dict[str, float]:
        """Return the norms of the gradient implied by a tensor's motion, of noise and momentum, and
        of the rounding errors in each.
        """
        flat = [point[name].reshape(1, -1) for point in (self._start, end)]
        before = None if self._before is None else self._before[name].reshape(1, -1)
        second = None if formula.scale is None else self._moments.second_after(name)
        scales = None if second is None else second.reshape(1, -1)
        signal = None
        if formula.signal and self._directions is not None:
            signal = self._directions["signal"].end[name].reshape(1, -1)
        squares: dict[str, list[float]] = {}
        for place in blocks(*flat[0].shape):
            start, after = (tensor[place].double() for tensor in flat)
            gradient, momentum = after - start, torch.zeros_like(start)
            scale: Tensor | float = 1.0
            if scales is not None and formula.scale is not None:
                scale = formula.scale(scales[place].double())
            if formula.momentum and before is not None:
                momentum = formula.momentum * (start - before[place].double())
            decay = formula.decay * start * (scale if formula.scales_decay else 1.0)
            gradient = gradient - momentum - decay
            noise = gradient
            if signal is not None:
                noise = gradient - formula.signal * signal[place].double()
            parts = {
                "gradient": gradient / (scale * formula.factor),
                "lost": start / (scale * formula.factor),
                "noise": noise,
                "momentum": momentum,
                "rounding": start,
            }
            for part, values in parts.items():
                squares.setdefault(part, []).append(float(values.square().sum()))
        norms = {part: math.sqrt(math.fsum(sums)) for part, sums in squares.items()}
        for part in ("lost", "rounding"):
            norms[part] *= _ROUNDINGS * self._spacing(name) * (1 + abs(formula.momentum))
        return norms


@dataclass(frozen=True, kw_only=True)
class _Told:
    """State which causes of a tensor's motion are known; the others count as rest.

    Attributes:
        momentum: whether momentum from the previous motion is known.
        noise: whether the unexplained motion is noise.
    """

    momentum: bool = True
    noise: bool = True
