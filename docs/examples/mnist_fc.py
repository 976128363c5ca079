r"""MNIST-FC of the paper (784-100-50-10, 84,060 parameters): trains it and is its own task file.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR lca run mnist-checkpoints --task docs/examples/mnist_fc.py --loss all
LCA_DATA=DIR lca run mnist-checkpoints --task docs/examples/mnist_fc.py:per_class \
    --out mnist-classes.lca --keep statistics
```

A number after the directory is how many iterates to train for, 220 (one epoch) by default: 1,100
are five epochs.

DIR holds `mnist.safetensors` with `train.images` (60000, 28, 28) uint8 and `train.labels`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lca_posthoc import Loss, Recorder, Task

ITERATES = 220
TRAIN = 55_000
BATCH = 250


class Net(nn.Sequential):
    """784-100-50-10 with ReLU, He-normal initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu1 = nn.Linear(784, 100), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(100, 50), nn.ReLU()
        self.fc3 = nn.Linear(50, 10)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """All 60,000 training images, (N, 784) float32 in [0, 1], and labels, (N,)."""
    if "LCA_DATA" not in os.environ:
        raise RuntimeError("set LCA_DATA to the directory that holds mnist.safetensors")
    stored = load_file(Path(os.environ["LCA_DATA"]) / "mnist.safetensors")
    return stored["train.images"].flatten(1).float() / 255, stored["train.labels"].long()


def task() -> Task:
    """Cross-entropy on the first 55,000 images (train) and the last 5,000 (validation)."""
    images, labels = data()
    return Task(
        model=Net,
        data={
            "train": (images[:TRAIN], labels[:TRAIN]),
            "validation": (images[TRAIN:], labels[TRAIN:]),
        },
        losses={
            "train": Loss(F.cross_entropy, on="train"),
            "validation": Loss(F.cross_entropy, on="validation"),
        },
    )


def per_class() -> Task:
    """The same cross-entropy on the training images, of each digit apart; a task of its own, for it
    takes ten times the space.
    """
    images, labels = data()
    loss = Loss(F.cross_entropy, on="train", group_by=lambda images, labels: labels)
    return Task(Net, {"train": (images[:TRAIN], labels[:TRAIN])}, {"per_class": loss})


def batches(examples: int, size: int, iterates: int) -> Iterator[torch.Tensor]:
    """Which examples each step learns from, (size,), an epoch's last perhaps fewer; every epoch has
    an order of its own.
    """
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(iterates):
        if not len(order):
            order = torch.randperm(examples)
        yield order[:size]
        order = order[size:]


def record(
    directory: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: tuple[torch.Tensor, torch.Tensor],
    iterates: int,
    size: int = BATCH,
) -> None:
    """Train on cross-entropy in batches of `size` and save every iterate, the first one
    included.
    """
    images, labels = examples
    with Recorder(directory, model) as recorder:
        recorder.attach(optimizer)  # the initial weights, and every step from here on
        for step, batch in enumerate(batches(len(labels), size, iterates), start=1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}: loss of the batch {loss.item():.4f}", flush=True)


def train(directory: str, iterates: int = ITERATES) -> None:
    """SGD, learning rate 0.05, momentum 0.9, batches of 250 of the first 55,000 images."""
    torch.manual_seed(0)
    images, labels = data()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    record(directory, model, optimizer, (images[:TRAIN], labels[:TRAIN]), iterates)


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:3]))
