"""What `speed.py` replays: five tasks, how their checkpoints are made, and how much of them is
replayed.

Every function that returns a Task is a task function of this file: `lca run DIR --task
tests/benchmarks/workloads.py:resnet20`. LCA_DATA is the directory that holds `mnist.safetensors`,
`cifar10.safetensors` and `tinyshakespeare.txt`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import cifar10_resnet20
import mnist_fc as mnist_fc_example
import mnist_lenet as mnist_lenet_example

LENGTH = 256  # characters of a sequence
WIDTH, LAYERS, HEADS, CHARACTERS = 384, 6, 6, 65


# --- the transformer ------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention to what came before, then a perceptron of four times the width; both added to the
    input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            self.attention(self.norm1(x))
            .unflatten(-1, (3, HEADS, WIDTH // HEADS))
            .permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder of 10.8 million parameters that predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.norm(self.layers(x)))


def sequences() -> tuple[Tensor, Tensor]:
    """All of Tiny Shakespeare in sequences of 256 characters, (N, 256), and the character after
    each, (N, 256).
    """
    text = (Path(os.environ["LCA_DATA"]) / "tinyshakespeare.txt").read_text()
    code = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([code[character] for character in text])
    count = (len(ids) - 1) // LENGTH
    return ids[: count * LENGTH].view(count, LENGTH), ids[1 : count * LENGTH + 1].view(
        count, LENGTH
    )


def next_character(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One value per character, (N, 256)."""
    ids, targets = batch
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


# --- task functions -------------------------------------------------------------------------------


def mnist_fc() -> Task:
    return mnist_fc_example.task()


def mnist_fc_classes() -> Task:
    return mnist_fc_example.per_class()


def mnist_lenet() -> Task:
    images, labels = mnist_fc_example.data()
    loss = Loss(F.cross_entropy, on="train")
    return Task(
        mnist_lenet_example.Net, {"train": (images[:55_000], labels[:55_000])}, {"train": loss}
    )


def resnet20() -> Task:
    return Task(
        cifar10_resnet20.Net,
        {"train": cifar10_resnet20.data()},
        {"train": Loss(F.cross_entropy, on="train")},
    )


def transformer() -> Task:
    return Task(
        Transformer, {"train": sequences()}, {"train": Loss(call=next_character, on="train")}
    )


# --- what is replayed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A task and its training.

    `examples` of each split are replayed (None: all) on `segments` segments, in the full form all
    on `full_segments`. `batch` is the expert's, by device, `first_batch` that of the first loop;
    where `norm_stats` is "batch", which makes the batch a part of the loss, everybody takes the
    expert's.
    """

    task: Callable[[], Task]
    learning_rate: float
    training_batch: int
    segments: int
    full_segments: int
    examples: int | None
    batch: dict[str, int]
    first_batch: int = 1000
    norm_stats: str = "running"

    @property
    def trajectory(self) -> str:
        """Tasks of the same trajectory share checkpoints."""
        return self.task.__name__.removesuffix("_classes")


WORKLOADS = {
    "mnist-fc": Workload(mnist_fc, 0.05, 250, 32, 220, None, {"cpu": 5000, "cuda": 55_000}),
    "mnist-fc-classes": Workload(
        mnist_fc_classes, 0.05, 250, 32, 220, None, {"cpu": 7000, "cuda": 55_000}
    ),
    "mnist-lenet": Workload(mnist_lenet, 0.02, 250, 64, 100, 500, {"cpu": 250, "cuda": 11_000}),
    "resnet20": Workload(
        resnet20, 0.1, 250, 64, 200, 250, {"cpu": 250, "cuda": 5000}, norm_stats="batch"
    ),
    "transformer": Workload(transformer, 0.1, 8, 4, 8, 6, {"cpu": 6, "cuda": 128}, first_batch=6),
}


def train(workload: Workload, directory: Path, iterates: int, device: str) -> None:
    """SGD with momentum 0.9 on the first split; saves every iterate, the first one included."""
    torch.manual_seed(0)
    task = workload.task()
    inputs, targets = (each.to(device) for each in next(iter(task.data.values())))
    model = task.model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate, momentum=0.9)
    with Recorder(directory, model) as recorder:
        recorder.attach(optimizer)
        for rows in mnist_fc_example.batches(len(inputs), workload.training_batch, iterates):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]).flatten(0, -2), targets[rows].flatten()).backward()
            optimizer.step()
