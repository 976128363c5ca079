"""A perceptron of three classes on 40 made-up examples: its task, the same steps of SGD each time,
and how tests replay them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task, run
from lca_posthoc.replay.events import silent
from lca_posthoc.results import Run


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


def file_of(place: Path, step: int) -> Path:
    return place / f"step_{step:08d}.safetensors"


def copied(source: Path, place: Path, steps: Sequence[int]) -> Path:
    """Copy the iterates of some steps."""
    place.mkdir(exist_ok=True)
    for step in steps:
        file_of(place, step).write_bytes(file_of(source, step).read_bytes())
    return place


def replay(iterates: Path, out: Path, **options: Any) -> Run:
    """Replay in this process in float64, without refining."""
    chosen = {
        "cluster": "inline",
        "tolerance": "inf",
        "precision": "float64",
        "keep": "tensors",
        "progress": silent,
    }
    return run(iterates, task(), out=out, **{**chosen, **options})
