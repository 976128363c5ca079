"""LeNet of the paper (808,970 parameters) on MNIST, at CPU size: trains it and is its own task
file.

```sh
LCA_DATA=DIR python docs/examples/mnist_lenet.py lenet-checkpoints
LCA_DATA=DIR lca run lenet-checkpoints --task docs/examples/mnist_lenet.py --keep statistics
```

DIR holds `mnist.safetensors`; a number after the checkpoints' directory is how many iterates to
train for. Scaled down: trained for 50 iterates and measured on 3,000 images instead of 55,000.
Dropout is off, as in the paper's measurements.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lca_posthoc import Loss, Task
from mnist_fc import data, record

ITERATES = 50
IMAGES = 3000


class Net(nn.Module):
    """Two convolutions of 5×5 (20 and 40 channels), each pooled, and layers of 400 and 10; ReLU,
    He-normal initialisation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5, padding=2), nn.Conv2d(20, 40, 5, padding=2)
        self.fc1, self.fc2 = nn.Linear(40 * 7 * 7, 400), nn.Linear(400, 10)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x.unflatten(1, (1, 28, 28)))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def examples() -> tuple[Tensor, Tensor]:
    images, labels = data()
    return images[:IMAGES], labels[:IMAGES]


def task() -> Task:
    """Cross-entropy on the images it was trained on."""
    return Task(
        model=Net, data={"train": examples()}, losses={"train": Loss(F.cross_entropy, on="train")}
    )


def train(directory: str, iterates: int = ITERATES) -> None:
    """SGD, learning rate 0.02, momentum 0.9, batches of 250."""
    torch.manual_seed(0)
    model = Net()
    record(
        directory,
        model,
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        examples(),
        iterates,
    )


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:3]))
