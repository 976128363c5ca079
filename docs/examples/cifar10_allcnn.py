r"""All-CNN with batch normalisation (1,371,658 parameters) on CIFAR-10, at CPU size: trains it and
is its own task file.

```sh
LCA_DATA=DIR python docs/examples/cifar10_allcnn.py allcnn-checkpoints
LCA_DATA=DIR lca run allcnn-checkpoints --task docs/examples/cifar10_allcnn.py --keep statistics \
    --norm-stats batch --batch-size 250
```

DIR holds `cifar10.safetensors`; a number after the checkpoints' directory is how many iterates to
train for. Scaled down: trained for 10 iterates and measured on 500 images in batches of 250 instead
of 45,000 in batches of thousands. A normalisation follows every convolution but the strided ones
and the last: that gives the paper's number of parameters, which is all we know of its place.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10_resnet20 import data
from lca_posthoc import Loss, Task
from mnist_fc import record

ITERATES = 10
IMAGES = 500
LAYERS = (
    (96, 3, 1),
    (96, 3, 1),
    (96, 3, 2),
    (192, 3, 1),
    (192, 3, 1),
    (192, 3, 2),
    (192, 3, 1),
    (192, 1, 1),
)


class Net(nn.Module):
    """Convolutions (channels, size, stride), the last of 1×1 to the ten classes, averaged over the
    image.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential()
        before = 3
        for number, (channels, size, stride) in enumerate(LAYERS, start=1):
            layers.add_module(
                f"conv{number}", nn.Conv2d(before, channels, size, stride, padding=size // 2)
            )
            if stride == 1:
                layers.add_module(f"norm{number}", nn.BatchNorm2d(channels))
            layers.add_module(f"relu{number}", nn.ReLU())
            before = channels
        self.layers, self.last = layers, nn.Conv2d(before, 10, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return self.last(self.layers(x)).mean((2, 3))


def task() -> Task:
    """Cross-entropy on the images it was trained on."""
    return Task(
        model=Net, data={"train": data(IMAGES)}, losses={"train": Loss(F.cross_entropy, on="train")}
    )


def train(directory: str, iterates: int = ITERATES) -> None:
    """SGD, learning rate 0.05, momentum 0.9, batches of 250."""
    torch.manual_seed(0)
    model = Net()
    record(
        directory,
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        data(IMAGES),
        iterates,
    )


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:3]))
