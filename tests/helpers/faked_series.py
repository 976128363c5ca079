"""Small real trainings, healthy ones, and series of their checkpoints with one defect each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

State = Mapping[str, Tensor]
Series = dict[int, State]


@dataclass(frozen=True)
class Training:
    """A training of a small network on data of three classes with a tenth of wrong labels.

    `rate` is the largest learning rate; `shape` the factor on it at a step of how many.
    """

    seed: int = 0
    width: int = 24
    optimizer: str = "momentum"
    rate: float = 0.05
    batch: int = 32
    steps: int = 60
    shape: str = "constant"
    start: int = 0
    normalised: bool = False


def network(width: int, seed: int, *, normalised: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(width)] if normalised else []
    return nn.Sequential(
        nn.Linear(20, width),
        *norm,
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 3),
    )


def factor(shape: str, step: int, steps: int) -> float:
    """The learning rate of a step, of the largest."""
    if shape == "warm-up":
        return min(1.0, step / (steps // 4))
    if shape == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * step / (steps - 1))
    if shape == "restarts":
        return 0.5 + 0.5 * math.cos(math.pi * (step % (steps // 3)) / (steps // 3))
    if shape == "drops":
        return 0.1 ** (step // (steps // 3))
    return 1.0


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1),
}


@functools.cache
def trained(training: Training) -> tuple[State, ...]:
    """The weights at every step of a training, the initial ones first."""
    generator = torch.Generator().manual_seed(1000 + training.start)
    inputs = torch.randn(512, 20, generator=generator)
    labels = (inputs @ torch.randn(20, 3, generator=generator)).argmax(1)
    wrong = torch.rand(512, generator=generator) < 0.1
    labels[wrong] = torch.randint(0, 3, (int(wrong.sum()),), generator=generator)
    model = network(training.width, training.seed, normalised=training.normalised)
    draws = torch.Generator().manual_seed(training.seed)
    if training.start:  # a pretrained start, from other data
        before = Training(seed=training.seed, width=training.width, steps=400, rate=0.05)
        model.load_state_dict(trained(before)[-1])
        draws.manual_seed(training.start)
    optimizer = OPTIMIZERS[training.optimizer](model.parameters(), training.rate)
    states = [_copied(model)]
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * factor(training.shape, step, training.steps)
        chosen = torch.randint(0, 512, (training.batch,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        states.append(_copied(model))
    return tuple(states)


def _copied(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def series(training: Training, steps: Sequence[int] | None = None) -> Series:
    """The checkpoints of a training at some steps, or all."""
    states = trained(training)
    return {step: states[step] for step in (range(len(states)) if steps is None else steps)}


def save(directory: Path, checkpoints: Mapping[int, State]) -> Path:
    """Write a series as `step_N.safetensors`."""
    directory.mkdir()
    for step, state in checkpoints.items():
        save_file(dict(state), directory / f"step_{step}.safetensors")
    return directory
