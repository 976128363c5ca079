r"""Freeze a layer from the middle of training on, or double its learning rate: does the final loss
change as its allocation says, and is what `candidates` names a better choice than a random one?

```sh
export LCA_DATA=DIR
python docs/examples/validation/freeze.py PLACE --network mnist_fc --seeds 0:5
```

Every layer is frozen in turn, and every layer's rate is doubled in turn; training goes on from the
same iterate with the same batches. What is compared is the final loss beside that of the training
where nothing was changed. It is predicted twice: in hindsight, from what the layer did in that
training after the middle, and in foresight, from what it did over a quarter of training before, for
as many steps as there are left. How much of what comes of it is the order of the batches is seen by
doing the same again, from the same iterate with other batches: no predictor can be expected to do
better than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch

import lca_posthoc as lca
from measures import (
    FISHER,
    MOTION,
    Part,
    Recorded,
    drawn,
    joined,
    layers,
    recorded_training,
    rise_if_undone,
    units,
)
from networks import Network, Training, Weights, replayed
from seeds import Choice, Comparison, Outcome, compared, main

AGAIN = "done with other batches"
DRAWS = 3
CANDIDATES = 20
SHARE_OF_UNITS = 10  # at most one unit in so many is frozen


@dataclass(frozen=True)
class Branches:
    """A training up to its middle, from where it goes on in several ways."""

    network: Network
    recorded: Recorded
    seed: int

    @property
    def middle(self) -> int:
        return self.network.size.steps // 2

    @cached_property
    def trained(self) -> Training:
        return Training(self.network, self.seed).run(self.middle)

    @cached_property
    def unchanged(self) -> float:
        return self._final_loss(self.trained, {})

    @cached_property
    def other_unchanged(self) -> float:
        return self._final_loss(self.trained.with_other_batches(), {})

    def rise(self, factors: Mapping[str, torch.Tensor]) -> float:
        """Return by how much the final loss is above that of the training that went on unchanged."""
        return self._final_loss(self.trained, factors) - self.unchanged

    def other_rise(self, factors: Mapping[str, torch.Tensor]) -> float:
        """Return the same where both go on with other batches."""
        other = self.trained.with_other_batches()
        return self._final_loss(other, factors) - self.other_unchanged

    def _final_loss(self, training: Training, factors: Mapping[str, torch.Tensor]) -> float:
        branch = training.copy().run(self.network.size.steps, factors)
        return self.recorded.loss.value(branch.weights())


def rise_if_doubled(undone: Mapping[str, Weights]) -> dict[str, Weights]:
    """Return what each predictor says of motion that is made twice, from what it says of motion
    that is undone: the opposite, but for the Fisher matrix, for which any motion away from the end
    raises the loss.
    """
    return {
        name: {tensor: value if name == FISHER else -value for tensor, value in values.items()}
        for name, values in undone.items()
    }


def scaled(predicted: Mapping[str, Weights], factor: float) -> dict[str, Weights]:
    return {
        name: {tensor: factor * value for tensor, value in values.items()}
        for name, values in predicted.items()
    }


def compared_layers(
    branches: Branches, action: str, factor: float, predicted: Mapping[str, dict[str, Weights]]
) -> list[Comparison]:
    """Multiply the motion of every layer in turn.

    Args:
        branches: the training.
        action: what is done, in words.
        factor: what the motion is multiplied with.
        predicted: in hindsight and in foresight, what each predictor says.
    """
    weights = branches.recorded.points[0]
    parts = layers(weights)
    factors = {part.name: part.factors(weights, factor) for part in parts}
    rises = {name: branches.rise(multipliers) for name, multipliers in factors.items()}
    again = [branches.other_rise(multipliers) for multipliers in factors.values()]
    comparisons = [
        compared(f"{action}, {sight}", "", parts, lambda part: rises[part.name], says)
        for sight, says in predicted.items()
    ]
    return [
        replace(comparison, predicted={**comparison.predicted, AGAIN: again})
        for comparison in comparisons
    ]


def freeze(place: Path, name: str, network: Network, seed: int) -> Outcome:
    """Freeze every layer, double the rate of every layer, and freeze units that are candidates."""
    recorded = recorded_training(place, name, network, seed)
    branches = Branches(network, recorded, seed)
    middle, steps = branches.middle, network.size.steps
    window = max(1, steps // 4)
    before = rise_if_undone(recorded, middle - window, middle)
    undone = {
        "hindsight": rise_if_undone(recorded, middle, steps),
        "foresight": scaled(before, (steps - middle) / window),
    }
    doubled = {sight: rise_if_doubled(says) for sight, says in undone.items()}
    comparisons = [
        *compared_layers(branches, "freeze a layer", 0.0, undone),
        *compared_layers(branches, "double a layer's rate", 2.0, doubled),
    ]
    late = replayed(
        recorded.checkpoints, network, "late", keep="statistics", steps=f"{middle}:{steps}"
    )
    candidates = lca.findings.candidates(late["train"], most=CANDIDATES)
    choices = [
        *choices_of_layers(comparisons, candidates["layer"].values.tolist()),
        *choices_of_units(branches, candidates["unit_name"].values.tolist(), undone["hindsight"]),
    ]
    first = recorded.loss.value(recorded.points[0])
    return Outcome(first, branches.unchanged, comparisons, choices)


def choices_of_layers(comparisons: list[Comparison], ordered: list[str]) -> list[Choice]:
    """Return what came of the layer that each way to choose would have taken: the one of which it
    says that the loss rises least.

    Args:
        comparisons: of which those in hindsight count.
        ordered: layers as `candidates` orders them, the one that hurt most first.
    """
    choices = []
    for comparison in comparisons:
        action, _, sight = comparison.question.rpartition(", ")
        if sight == "hindsight":
            rises = dict(zip(comparison.items, comparison.actual, strict=True))
            first, last = ordered[0], ordered[-1]
            named = first if action.startswith("freeze") else last
            choices.append(Choice(action, "candidates", rises[named]))
            choices.append(Choice(action, "random", mean(comparison.actual)))
            choices.append(Choice(action, "the best there is", min(comparison.actual)))
            choices += [
                Choice(action, name, rises[min(zip(said, rises, strict=True))[1]])
                for name, said in comparison.predicted.items()
                if name in (MOTION, FISHER)
            ]
    return choices


def choices_of_units(
    branches: Branches, named: list[str], predicted: Mapping[str, Weights]
) -> list[Choice]:
    """Return what came of freezing the units that `candidates` names, as many at random of the same
    layers, and as many of which another predictor says that the loss rises least.
    """
    weights = branches.recorded.points[0]
    parts = {part.name: part for part in units(branches.recorded.replay, weights)}
    chosen = [parts[name] for name in named][: max(1, len(parts) // SHARE_OF_UNITS)]

    def rise(some: list[Part]) -> float:
        return branches.rise(joined(some, weights))

    def least(values: Weights) -> list[Part]:
        return sorted(parts.values(), key=lambda part: part.sum_of(values))[: len(chosen)]

    ways: dict[str, Callable[[], float]] = {
        "candidates": lambda: rise(chosen),
        "random": lambda: mean(
            rise(alike(chosen, list(parts.values()), DRAWS * branches.seed + draw))
            for draw in range(DRAWS)
        ),
        MOTION: lambda: rise(least(predicted[MOTION])),
        FISHER: lambda: rise(least(predicted[FISHER])),
    }
    return [Choice("freeze units", name, follow()) for name, follow in ways.items()]


def alike(chosen: list[Part], parts: list[Part], seed: int) -> list[Part]:
    """Draw as many units of every layer as were chosen of it."""

    def layer(part: Part) -> str:
        return part.name.rpartition("[")[0]

    counts: dict[str, int] = {}
    for part in chosen:
        counts[layer(part)] = counts.get(layer(part), 0) + 1
    return [
        part
        for name, count in counts.items()
        for part in drawn([part for part in parts if layer(part) == name], count, seed)
    ]


if __name__ == "__main__":
    main("freeze", __doc__, freeze)
