"""Every figure of the gallery, each by the line that stands there.

```sh
python docs/examples/every_figure.py OUT
```

Trains a small network of three blocks on the digits that ship with the package, with and without
momentum, and runs in OUT the `lca` lines of `docs/gallery.md`. This file is also their task.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import lca_posthoc as lca
from lca_posthoc.cli import cli
from lca_posthoc.demo import digits

GALLERY = Path(__file__).parents[1] / "gallery.md"
LINES = re.compile(r"^lca .*$", re.MULTILINE)
REPEATS = 3  # of each setting that is compared, from seeds of their own
MOMENTUM = {"momentum": 0.9, "plain": 0.0}


class Block(torch.nn.Module):
    """A normalisation and two layers beside a line that goes straight on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, width)
        self.down = torch.nn.Linear(width, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.down(F.relu(self.up(self.norm(inputs))))
        return inputs + outputs


class Net(torch.nn.Module):
    """64-24-24-24-24-10 in three blocks: 5,554 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(64, 24)
        self.blocks = torch.nn.Sequential(*(Block(24) for _ in range(3)))
        self.head = torch.nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.blocks(self.embed(images)))
        return logits


def task() -> lca.Task:
    training, validation = digits()
    return lca.Task(
        model=Net,
        data={"train": training, "validation": validation},
        losses={
            "train": lca.Loss(F.cross_entropy, on="train"),
            "validation": lca.Loss(F.cross_entropy, on="validation"),
            "per_class": lca.Loss(
                F.cross_entropy, on="train", group_by=lambda images, labels: labels
            ),
            "probe": lca.Loss(F.cross_entropy, on="validation", per="example"),
        },
    )


def train(checkpoints: Path, steps: int, seed: int = 0, momentum: float = 0.9) -> None:
    """Train by SGD with weight decay, and record every iterate."""
    (images, labels), _ = digits()
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=momentum, weight_decay=1e-3)
    with lca.Recorder(checkpoints, model) as recorder:
        recorder.attach(optimizer)
        for _ in range(steps):
            batch = torch.randint(len(images), (50,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def train_repeats(out: Path, steps: int) -> None:
    """Train and replay both settings that `compare` is of."""
    for label, momentum in MOMENTUM.items():
        for seed in range(REPEATS):
            train(out / f"{label}{seed}", steps, seed, momentum)
            lca.run(
                out / f"{label}{seed}",
                out / "every_figure.py",
                losses=["train"],
                cluster="inline",
                keep="statistics",
            )


def main(out: Path, steps: int = 150) -> None:
    """Train, replay, and run the lines of the gallery in OUT; 256 colours do for a picture."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, out / "every_figure.py")
    train(out / "checkpoints", steps)
    train_repeats(out, steps)
    with contextlib.chdir(out):
        for line in LINES.findall(GALLERY.read_text("utf-8")):
            cli.main(shlex.split(line)[1:], standalone_mode=False)
    for picture in out.glob("*.png"):
        Image.open(picture).convert("RGB").quantize().save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
