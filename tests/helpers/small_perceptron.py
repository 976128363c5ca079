"""A perceptron of three classes on 40 made-up examples: its task, and the same steps of SGD each
time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@functools.cache
def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator)
    return inputs, torch.randint(0, 3, (40,), generator=generator)


def value(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def task() -> Task:
    return Task(
        network,
        {"train": examples()},
        {
            "train": Loss(value, on="train"),
            "classes": Loss(value, on="train", group_by=examples()[1]),
            "examples": Loss(value, on="train", per="example"),
        },
    )


def train(place: Path, steps: int, learning_rate: float = 0.3) -> Path:
    """Record steps of SGD with momentum, each on eight examples."""
    model, (inputs, targets) = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
    with Recorder(place, model) as recorder:
        recorder.attach(optimizer)
        for step in range(steps):
            rows = slice(8 * (step % 5), 8 * (step % 5) + 8)
            optimizer.zero_grad()
            value(model(inputs[rows]), targets[rows]).mean().backward()
            optimizer.step()
    return place
