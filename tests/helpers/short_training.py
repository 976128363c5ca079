"""A training of a few steps that records itself: cross-entropy in batches that go round in order."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Recorder


def value(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each example."""
    return F.cross_entropy(outputs, targets, reduction="none")


def record_training(
    place: Path,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch: int,
) -> None:
    """Train for so many steps and record every iterate, with the numbers of the optimiser."""
    inputs, targets = data
    with Recorder(place, model) as recorder:
        recorder.attach(optimizer)
        for step in range(steps):
            first = batch * (step % (len(inputs) // batch))
            rows = slice(first, first + batch)
            optimizer.zero_grad()
            value(model(inputs[rows]), targets[rows]).mean().backward()
            optimizer.step()
