r"""Remove parameters of a trained network: which way to choose them costs the least?

```sh
export LCA_DATA=DIR
python docs/examples/validation/prune.py PLACE --network mnist_fc --seeds 0:5
```

0.1, 1 and 10 % of all parameters are set to zero, or put back to their initial values, chosen by
total allocation (those that hurt most; those to which least was allocated), by magnitude, by the
Fisher matrix, by motion, and at random. Thirty units are removed one by one as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from measures import (
    END_GRADIENT,
    FISHER,
    LCA,
    MOTION,
    Recorded,
    drawn,
    recorded_training,
    rise_if_undone,
    units,
)
from networks import Network, Weights
from seeds import Choice, Comparison, Outcome, compared, main

SHARES = (0.001, 0.01, 0.1)
DRAWS = 3
UNITS = 30
MAGNITUDE = "magnitude"
HURT_MOST = "allocation: hurt most"
LEAST_ALLOCATED = "allocation: least"


def removed(weights: Weights, others: Weights, scores: Weights, count: int) -> Weights:
    """Return the weights with the parameters of the lowest scores from elsewhere."""
    flat = torch.cat([scores[name].flatten() for name in weights])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.argsort(flat, stable=True)[:count]] = True
    parts = chosen.split([value.numel() for value in weights.values()])
    return {
        name: torch.where(part.reshape(value.shape), others[name], value)
        for (name, value), part in zip(weights.items(), parts, strict=True)
    }


def score_tables(weights: Weights, predicted: dict[str, Weights]) -> dict[str, Weights]:
    """Return what parameters are ordered by, lowest first."""
    return {
        HURT_MOST: predicted[LCA],
        LEAST_ALLOCATED: {name: value.abs() for name, value in predicted[LCA].items()},
        MAGNITUDE: {name: value.abs() for name, value in weights.items()},
        FISHER: predicted[FISHER],
        MOTION: predicted[MOTION],
    }


def prune(place: Path, name: str, network: Network, seed: int) -> Outcome:
    """Set to zero, and put back to their initial values, parameters and units."""
    recorded = recorded_training(place, name, network, seed)
    weights, initial = recorded.points[-1], recorded.points[0]
    zero = {name: torch.zeros_like(value) for name, value in weights.items()}
    undone = rise_if_undone(recorded, 0, network.size.steps)
    to_zero = Removal(recorded, "zero", zero, rise_at_zero(recorded, undone))
    to_initial = Removal(recorded, "initial values", initial, undone)
    return Outcome(
        recorded.loss.value(initial),
        recorded.loss.value(weights),
        [removal.of_units(seed) for removal in (to_zero, to_initial)],
        [choice for removal in (to_zero, to_initial) for choice in removal.of_shares(seed)],
    )


@dataclass(frozen=True)
class Removal:
    """The trained network, the values that take the place of what is removed, and what each
    predictor says of that.
    """

    recorded: Recorded
    where: str
    others: Weights
    predicted: dict[str, Weights]

    @property
    def weights(self) -> Weights:
        return self.recorded.points[-1]

    def rise(self, weights: Weights) -> float:
        return self.recorded.loss.value(weights) - self.recorded.loss.value(self.weights)

    def of_units(self, seed: int) -> Comparison:
        """Remove units one by one."""
        return compared(
            f"a unit to {self.where}",
            "",
            drawn(units(self.recorded.replay, self.weights), UNITS, seed),
            lambda part: self.rise(part.replaced(self.weights, self.others)),
            self.predicted,
        )

    def of_shares(self, seed: int) -> list[Choice]:
        """Remove shares of all parameters, chosen in every way."""
        scores = score_tables(self.weights, self.predicted)
        draw = torch.Generator().manual_seed(seed)
        draws = [
            {name: torch.rand(value.shape, generator=draw) for name, value in self.weights.items()}
            for _ in range(DRAWS)
        ]
        choices = []
        for share in SHARES:
            question = f"{100 * share:g} % to {self.where}"
            choices += [
                Choice(question, name, self._rise_without(share, values))
                for name, values in scores.items()
            ]
            at_random = mean(self._rise_without(share, values) for values in draws)
            choices.append(Choice(question, "random", at_random))
        return choices

    def _rise_without(self, share: float, scores: Weights) -> float:
        count = round(share * sum(value.numel() for value in self.weights.values()))
        return self.rise(removed(self.weights, self.others, scores, count))


def rise_at_zero(recorded: Recorded, undone: dict[str, Weights]) -> dict[str, Weights]:
    """Return by how much the loss is said to rise where a parameter is set to zero.

    What speaks of the motion says what it says of its undoing; the gradient at the end and the
    Fisher matrix speak of any change, here of that to zero.
    """
    weights = recorded.points[-1]
    gradient, fisher = recorded.loss.gradient(weights), recorded.loss.fisher(weights)
    return {
        **undone,
        END_GRADIENT: {name: -gradient[name] * value for name, value in weights.items()},
        FISHER: {name: fisher[name] * value.square() / 2 for name, value in weights.items()},
        MAGNITUDE: {name: value.abs() for name, value in weights.items()},
    }


if __name__ == "__main__":
    main("prune", __doc__, prune)
