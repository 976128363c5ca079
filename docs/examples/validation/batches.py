r"""Drop the training batches that hurt a class most: does its loss end lower?

```sh
export LCA_DATA=DIR
python docs/examples/validation/batches.py PLACE --network mnist_fc --seeds 0:5
```

The class (of the transformer, the speaker) is the one whose loss is highest at the end. Its loss is
replayed, and what each predictor says of leaving out a step is compared with what comes of it:
training goes on without that step, with all batches that follow. Ten steps are left out one by one,
and then, from the whole of training, the tenth of all steps that each predictor names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean

import torch

from measures import (
    END_GRADIENT,
    FIRST_ORDER,
    FISHER,
    LCA,
    MOTION,
    STRAIGHT_LINE,
    MeasuredLoss,
    recorded_training,
)
from networks import Network, Training, Weights, replayed
from seeds import Choice, Comparison, Outcome, main

STEPS = 10
DRAWS = 3
SHARE_DROPPED = 10  # one step in so many
GRADIENTS_AGREE = "gradients agree"
COUNT = "examples of the class"


@dataclass(frozen=True)
class Dropping:
    """A training with one class in view."""

    network: Network
    seed: int
    kind: int
    loss: MeasuredLoss

    def final_loss(self, training: Training, skipped: set[int]) -> float:
        """Return the loss of the class at the end of a training that leaves out some steps."""
        branch = training.copy().run(self.network.size.steps, skipped=skipped)
        return self.loss.value(branch.weights())

    def predictions(self, points: list[Weights], allocated: list[float]) -> dict[str, list[float]]:
        """Return by how much each predictor says the loss of the class rises where a step is left
        out, for every step.

        "gradients agree" is the product of the gradient of the step's batch with that of the class,
        as TracIn (Pruthi et al. 2020) takes it, in no unit; the last is how many of the batch's
        examples are of the class.
        """
        training = Training(self.network, self.seed)
        at_end, fisher = self.loss.gradient(points[-1]), self.loss.fisher(points[-1])
        along_line = self.loss.mean_gradient(points[0], points[-1])
        rises: dict[str, list[float]] = {LCA: [-value for value in allocated]}
        for step, rows in enumerate(training.batches):
            motion = difference(points[step + 1], points[step])
            here, batch = self.loss.gradient(points[step]), self._batch_gradient(training, step)
            squares = {name: moved.square() for name, moved in motion.items()}
            for name, value in {
                FIRST_ORDER: -product(here, motion),
                MOTION: sum(float(moved.abs().sum()) for moved in motion.values()),
                FISHER: product(fisher, squares) / 2,
                END_GRADIENT: -product(at_end, motion),
                STRAIGHT_LINE: -product(along_line, motion),
                GRADIENTS_AGREE: product(here, batch),
                COUNT: float((training.examples["kind"][rows] == self.kind).sum()),
            }.items():
                rises.setdefault(name, []).append(value)
            training.run(step + 1)
        return rises

    def _batch_gradient(self, training: Training, step: int) -> Weights:
        parameters = dict(training.model.named_parameters())
        gradients = torch.autograd.grad(training.batch_loss(step), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))


def difference(after: Weights, before: Weights) -> Weights:
    return {name: after[name] - before[name] for name in after}


def product(one: Weights, other: Weights) -> float:
    return float(sum((one[name].double() * other[name].double()).sum() for name in one))


def hardest_kind(network: Network, weights: Weights) -> int:
    """Return the class whose loss is highest."""
    kinds = network.measured_examples()["kind"].unique().tolist()
    return max(kinds, key=lambda kind: MeasuredLoss(network, kind).value(weights))


def drop(place: Path, name: str, network: Network, seed: int) -> Outcome:
    """Leave out single steps, and the steps that each predictor says hurt the class most."""
    recorded = recorded_training(place, name, network, seed)
    points, steps = recorded.points, network.size.steps
    kind = hardest_kind(network, points[-1])
    dropping = Dropping(network, seed, kind, MeasuredLoss(network, kind))
    run = replayed(recorded.checkpoints, network, f"kind{kind}", kind, keep="tensors")
    allocated = run["train"].tensors["allocated"].sum("tensor").values.tolist()
    rises = dropping.predictions(points, allocated)
    unchanged = dropping.loss.value(points[-1])

    draw = Random(seed)
    chosen = sorted(draw.sample(range(steps), min(STEPS, steps)))
    actual: list[float] = []
    training = Training(network, seed)
    for step in chosen:
        training.run(step)
        actual.append(dropping.final_loss(training, {step}) - unchanged)
    comparison = Comparison(
        "leave out a step",
        f"kind {kind}",
        [f"step {step}" for step in chosen],
        actual,
        {name: [values[step] for step in chosen] for name, values in rises.items()},
    )

    count = max(1, steps // SHARE_DROPPED)
    fresh = Training(network, seed)

    def rise(dropped: list[int]) -> float:
        return dropping.final_loss(fresh, set(dropped)) - unchanged

    question = "leave out a tenth of the steps"
    choices = [
        Choice(question, name, rise(sorted(range(steps), key=values.__getitem__)[:count]))
        for name, values in rises.items()
    ]
    at_random = mean(rise(draw.sample(range(steps), count)) for _ in range(DRAWS))
    choices.append(Choice(question, "random", at_random))
    first = dropping.loss.value(points[0])
    return Outcome(first, unchanged, [comparison], choices)


if __name__ == "__main__":
    main("batches", __doc__, drop)
