"""What is measured in every experiment: the loss at any weights, and what each predictor says of
doing something to a part of a network.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

import lca_posthoc as lca
from networks import Batch, Network, Weights, iterates, of_kind, recorded, replayed

LCA = "LCA"
FIRST_ORDER = "first-order LCA"
MOTION = "motion"
FISHER = "Fisher"
END_GRADIENT = "gradient at the end"
STRAIGHT_LINE = "integrated gradients"
PREDICTORS = (LCA, FIRST_ORDER, MOTION, FISHER, END_GRADIENT, STRAIGHT_LINE)
IN_LOSS = (LCA, FIRST_ORDER, FISHER, END_GRADIENT, STRAIGHT_LINE)  # those in units of the loss
FISHER_EXAMPLES = 100
SIMPSON = {0.0: 1 / 12, 0.25: 4 / 12, 0.5: 2 / 12, 0.75: 4 / 12, 1.0: 1 / 12}

Index = tuple[int | slice, ...]


# --- the loss -------------------------------------------------------------------------------------


class MeasuredLoss:
    """The mean loss over the measured examples of a network, or over those of one kind, at any
    weights.

    It is the loss that is replayed: dropout is off, and normalisations that take the statistics of
    their batch do so over all examples at once.
    """

    def __init__(self, network: Network, kind: int | None = None) -> None:
        self._network, self._examples = network, network.measured_examples()
        self._model = network.build().train(network.batch_statistics)
        self._kind = kind
        self._values = network.values
        if kind is not None:
            self._values = partial(of_kind, values=network.values, kind=kind)

    def value(self, weights: Weights) -> float:
        self._load(weights)
        with torch.no_grad():
            return float(self._mean(self._examples))

    def gradient(self, weights: Weights) -> Weights:
        self._load(weights)
        return self._gradient(self._examples)

    def mean_gradient(self, start: Weights, end: Weights) -> Weights:
        """Return the mean gradient along the straight line between two points, by Simpson's rule on
        two intervals.
        """
        mean = {name: torch.zeros_like(value) for name, value in end.items()}
        for share, weight in SIMPSON.items():
            point = {name: torch.lerp(start[name], end[name], share) for name in end}
            for name, gradient in self.gradient(point).items():
                mean[name] += weight * gradient
        return mean

    def fisher(self, weights: Weights) -> Weights:
        """Return the mean of the squared gradients of single examples, of at most the first
        hundred: the diagonal of the empirical Fisher matrix.

        Normalisations hold the statistics of all examples meanwhile: one example has none.
        """
        self._load(weights)
        if self._network.batch_statistics:
            update_bn([self._examples["images"]], self._model)
            self._model.eval()
        rows = torch.arange(len(self._examples["kind"]))
        if self._kind is not None:
            rows = rows[self._examples["kind"] == self._kind]
        rows = rows[:FISHER_EXAMPLES]
        squares = {name: torch.zeros_like(value) for name, value in self._parameters().items()}
        for row in rows.tolist():
            one = {name: values[row : row + 1] for name, values in self._examples.items()}
            for name, gradient in self._gradient(one).items():
                squares[name] += gradient.square() / len(rows)
        self._model.train(self._network.batch_statistics)
        return squares

    def _parameters(self) -> Weights:
        return dict(self._model.named_parameters())

    def _load(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(weights[name])

    def _mean(self, batch: Batch) -> Tensor:
        values, weights = self._values(self._model, batch)
        return (values * weights).sum() / weights.sum()

    def _gradient(self, batch: Batch) -> Weights:
        parameters = self._parameters()
        gradients = torch.autograd.grad(self._mean(batch), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))


# --- parts of a network ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A layer or a unit: which elements of which parameters belong to it."""

    name: str
    where: Mapping[str, Index]

    def sum_of(self, values: Weights) -> float:
        return float(sum(values[name][index].double().sum() for name, index in self.where.items()))

    def replaced(self, weights: Weights, others: Weights) -> Weights:
        """Return the weights with this part from elsewhere."""
        changed = dict(weights)
        for name, index in self.where.items():
            changed[name] = weights[name].clone()
            changed[name][index] = others[name][index]
        return changed

    def factors(self, weights: Weights, factor: float) -> Weights:
        """Return what multiplies the motion of every element: `factor` in this part, 1 elsewhere."""
        multipliers = {name: torch.ones_like(weights[name]) for name in self.where}
        for name, index in self.where.items():
            multipliers[name][index] = factor
        return multipliers


def layer_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def layers(weights: Weights) -> list[Part]:
    """Return every module that has parameters of its own."""
    members: dict[str, dict[str, Index]] = {}
    for name in weights:
        members.setdefault(layer_of(name), {})[name] = (slice(None),)
    return [Part(layer, where) for layer, where in members.items()]


def units(run: lca.Run, weights: Weights) -> list[Part]:
    """Return every neuron or channel of the layers that have several: its incoming weights, its
    bias.
    """
    parts = []
    axes = {tensor.spec.name: tensor.spec.unit_axis for tensor in run.manifest.allocated}
    for layer in layers(weights):
        along = {name: axes[name] for name in layer.where if axes[name] is not None}
        counts = {weights[name].shape[axis] for name, axis in along.items()}
        if len(counts) == 1 and counts != {1}:
            parts += [
                Part(
                    f"{layer.name}[{number}]",
                    {name: (slice(None),) * axis + (number,) for name, axis in along.items()},
                )
                for number in range(counts.pop())
            ]
    return parts


def drawn(parts: Sequence[Part], count: int, seed: int) -> list[Part]:
    """Draw parts: each from a random layer, so that large layers do not hide small ones."""
    draw = random.Random(seed)
    by_layer: dict[str, list[Part]] = {}
    for part in parts:
        by_layer.setdefault(part.name.rpartition("[")[0], []).append(part)
    chosen = []
    while by_layer and len(chosen) < count:
        layer = draw.choice(sorted(by_layer))
        chosen.append(by_layer[layer].pop(draw.randrange(len(by_layer[layer]))))
        if not by_layer[layer]:
            del by_layer[layer]
    return chosen


def joined(parts: Sequence[Part], weights: Weights) -> Weights:
    """Return factors that freeze several units at once."""
    multipliers: Weights = {}
    for part in parts:
        for name, factors in part.factors(weights, 0.0).items():
            multipliers[name] = torch.minimum(multipliers.get(name, factors), factors)
    return multipliers


# --- predictors -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A recorded training with the parameters of all its iterates, its replay by Simpson's rule and
    at the left end of every segment, and its loss.
    """

    checkpoints: Path
    points: list[Weights]
    replay: lca.Run
    left: lca.Run
    loss: MeasuredLoss


def recorded_training(place: Path, name: str, network: Network, seed: int) -> Recorded:
    """Train, record and replay a network, or open what is there of it."""
    checkpoints = recorded(place / "trainings" / name, network, seed)
    parameters = [name for name, _ in network.build().named_parameters()]
    return Recorded(
        checkpoints=checkpoints,
        points=[{name: point[name] for name in parameters} for point in iterates(checkpoints)],
        replay=replayed(checkpoints, network, "simpson", keep="parameters"),
        left=replayed(checkpoints, network, "left", keep="parameters", rule="left"),
        loss=MeasuredLoss(network),
    )


def summed(run: lca.Run, start: int, end: int, names: Iterable[str]) -> Weights:
    """Return what a replay allocated to every parameter from one step to another."""
    data = run["train"].allocation.isel(step=slice(start, end))
    return {name: torch.from_numpy(data[name].values.sum(0, dtype="float64")) for name in names}


def rise_if_undone(recorded: Recorded, start: int, end: int) -> dict[str, Weights]:
    """Return by how much each predictor says the loss rises where a parameter is put back from
    where it was at the step `end` to where it was at the step `start`.

    What an allocation says is its opposite. The motion says that what moved further did more. The
    Fisher matrix says what it is at a minimum: half of it times the squared motion.
    """
    before, after = recorded.points[start], recorded.points[end]
    motion = {name: after[name] - before[name] for name in after}
    at_end, fisher = recorded.loss.gradient(after), recorded.loss.fisher(after)
    along_line = recorded.loss.mean_gradient(before, after)
    allocated = summed(recorded.replay, start, end, motion)
    first_order = summed(recorded.left, start, end, motion)
    return {
        LCA: {name: -value for name, value in allocated.items()},
        FIRST_ORDER: {name: -value for name, value in first_order.items()},
        MOTION: {name: moved.abs() for name, moved in motion.items()},
        FISHER: {name: fisher[name] * moved.square() / 2 for name, moved in motion.items()},
        END_GRADIENT: {name: -at_end[name] * moved for name, moved in motion.items()},
        STRAIGHT_LINE: {name: -along_line[name] * moved for name, moved in motion.items()},
    }
