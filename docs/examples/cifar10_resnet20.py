r"""ResNet-20 of the paper (273,066 parameters) on CIFAR-10, at CPU size: trains it and is its own
task file.

```sh
export LCA_DATA=DIR
python docs/examples/cifar10_resnet20.py resnet
lca run resnet --task docs/examples/cifar10_resnet20.py --norm-stats batch --batch-size 500 \
    --subset 0:500 --tolerance 0.01 --keep statistics
```

DIR holds `cifar10.safetensors` with `train.images` (10000, 32, 32, 3) uint8 and `train.labels`; a
number after the checkpoints' directory is how many iterates to train for. Scaled down: trained for
80 iterates on 1,000 images and, with the command above, measured on 500 of them in one batch,
instead of 4,500 iterates and 45,000 images in batches of thousands. The first steps at a learning
rate of 0.1 are so large that a tolerance of 0.001 would refine them many times. Normalisations take
the statistics of their batch, which is one of 250 in training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Task
from mnist_fc import record

ITERATES = 80
IMAGES = 1000


class Block(nn.Module):
    """conv, norm, ReLU, conv, norm, plus the input (through a 1×1 convolution where the shape
    changes), ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(inputs, outputs, 3, stride, padding=1),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class Net(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 channels, He-normal initialisation."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 3) -> None:
        super().__init__()
        before = widths[0]
        self.conv, self.norm = nn.Conv2d(3, before, 3, padding=1), nn.BatchNorm2d(before)
        self.blocks = nn.Sequential()
        for stage, width in enumerate(widths, start=1):
            for block in range(1, depth + 1):
                self.blocks.add_module(
                    f"{stage}_{block}", Block(before, width, 2 if width > before else 1)
                )
                before = width
        self.fc = nn.Linear(before, 10)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        return self.fc(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def data(images: int | None = None) -> tuple[Tensor, Tensor]:
    """The first training images, or all of them, (N, 3, 32, 32) float32 in [0, 1], and labels,
    (N,).
    """
    if "LCA_DATA" not in os.environ:
        raise RuntimeError("set LCA_DATA to the directory that holds cifar10.safetensors")
    stored = load_file(Path(os.environ["LCA_DATA"]) / "cifar10.safetensors")
    return stored["train.images"][:images].permute(0, 3, 1, 2).float() / 255, stored[
        "train.labels"
    ][:images].long()


def task() -> Task:
    """Cross-entropy on the images it was trained on."""
    return Task(
        model=Net, data={"train": data(IMAGES)}, losses={"train": Loss(F.cross_entropy, on="train")}
    )


def train(directory: str, iterates: int = ITERATES) -> None:
    """SGD, learning rate 0.1, momentum 0.9, batches of 250."""
    torch.manual_seed(0)
    model = Net()
    record(
        directory,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data(IMAGES),
        iterates,
    )


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:3]))
