"""A run of a hundred layers and ten groups, and one in which every name is hostile; both replayed
for real.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F

import lca_posthoc
from lca_posthoc import Loss, Recorder, Run, Task
from tests.helpers.cli import UNSAFE_NAMES

NASTY = (
    "</script><img src=x onerror=alert(1)>",
    "<svg onload=alert(2)>",
    '"><img src=x onerror=alert(3)>',
    "$$\\frac{1}{0}$$",
    "<!--<script>",
    "{{ 7 * 7 }}@{name}",
    f"a{''.join(UNSAFE_NAMES)}b",
    "&lt;b&gt;'\\",
)
_WIDTH = 4


def data(groups: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty examples of four numbers, and their classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, _WIDTH, generator=generator), torch.arange(40) % groups


def replayed(place: Path, name: str, modules: list[str], task: Task, steps: int) -> Run:
    """Train a chain of small layers under those names, record it, replay it."""
    inputs, targets = next(iter(task.data.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Recorder(place / "checkpoints", model) as recorder:
        recorder.save(0)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            recorder.save(step)
    return lca_posthoc.run(
        place / "checkpoints",
        task,
        losses=["all"],
        out=place / name,
        rule="trapezoid",
        cluster="inline",
        durability="none",
    )


class Chain(torch.nn.Module):
    """Linear layers with residual connections, under given names."""

    def __init__(self, modules: list[str], classes: int) -> None:
        super().__init__()
        for name in modules:
            self.add_module(name, torch.nn.Linear(_WIDTH, _WIDTH))
        self.last = torch.nn.Linear(_WIDTH, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layers = [module for module in self.children() if module is not self.last]
        hidden = functools.reduce(
            lambda found, layer: found + torch.tanh(layer(found)) / len(layers), layers, inputs
        )
        return self.last(hidden)


def deep(place: Path, layers: int = 99, steps: int = 5) -> Run:
    """A hundred layers; the mean loss, and that of each of ten classes."""
    names = [f"block{at}" for at in range(layers)]
    losses = {
        "train": Loss(F.cross_entropy, on="train"),
        "per_class": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets),
    }
    task = Task(model=lambda: Chain(names, 10), data={"train": data()}, losses=losses)
    return replayed(place, "deep.lca", names, task, steps)


def hostile(place: Path, steps: int = 6) -> Run:
    """Modules, splits, losses, groups and the run itself are named to break out of a page."""
    modules = [name.replace(".", "") for name in NASTY]
    train, validation = f"train {NASTY[0]}", f"validation {NASTY[2]}"
    losses = {
        f"loss {NASTY[0]}": Loss(F.cross_entropy, on=train),
        f"loss {NASTY[1]}": Loss(F.cross_entropy, on=validation),
        f"groups {NASTY[3]}": Loss(
            F.cross_entropy,
            on=train,
            group_by=lambda inputs, targets: [NASTY[at] for at in targets.tolist()],
        ),
    }
    task = Task(
        model=lambda: Chain(modules, len(NASTY)),
        data={train: data(len(NASTY)), validation: data(len(NASTY))},
        losses=losses,
    )
    return replayed(place, f"{NASTY[1]} & {NASTY[4]}.lca", modules, task, steps)
