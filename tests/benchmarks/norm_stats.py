"""A narrowed ResNet-18 from its first iterate on, under each choice of normalisation statistics:
the table of docs/numerics.md.

```sh
LCA_DATA=DIR python -m tests.benchmarks.norm_stats
```

DIR holds `cifar10.safetensors`. Prints, for two learning rates, what the loss goes through in each
mode, the largest |residual|, the seconds it took, and the convolutions whose sum over training has
another sign than with batch statistics.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Task, run

EXAMPLES, STEPS, BATCH = 200, 16, 32
MODES = ("running", "batch", "recalibrated")


class Block(nn.Module):
    """Two convolutions with batch norm, beside the input, projected where its shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        projected = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
        self.down = nn.Identity() if stride == 1 and inputs == outputs else projected

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.down(x))


class ResNet18(nn.Module):
    """The shape of torchvision's, 8 channels wide, for small images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for at in range(4):
            blocks = (
                Block(widths[at], widths[at + 1], 1 if at == 0 else 2),
                Block(widths[at + 1], widths[at + 1], 1),
            )
            setattr(self, f"layer{at + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for at in range(4):
            x = getattr(self, f"layer{at + 1}")(x)
        return self.fc(x.mean((2, 3)))


def data() -> tuple[Tensor, Tensor]:
    """Images of 16 × 16 and their labels."""
    stored = load_file(Path(os.environ["LCA_DATA"]) / "cifar10.safetensors")
    images = stored["train.images"][:EXAMPLES].permute(0, 3, 1, 2).float() / 255
    return (F.avg_pool2d(images, 2) - 0.45) / 0.25, stored["train.labels"][:EXAMPLES].long()


def record(directory: Path, learning_rate: float, train: tuple[Tensor, Tensor]) -> None:
    """Train and save every iterate."""
    torch.manual_seed(0)
    model = ResNet18().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    with Recorder(directory, model) as recorder:
        recorder.save(0)
        for step in range(1, STEPS + 1):
            chosen = torch.randperm(EXAMPLES)[:BATCH]
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
            optimizer.step()
            recorder.save(step)


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    train = data()
    task = Task(ResNet18, {"train": train}, {"train": Loss(F.cross_entropy, on="train")})
    settings = {
        "cluster": "inline",
        "device": "cpu",
        "keep": "tensors",
        "tolerance": math.inf,
        "batch_size": EXAMPLES,
    }
    for learning_rate in (0.05, 0.02):
        with tempfile.TemporaryDirectory() as place:
            record(Path(place, "ck"), learning_rate, train)
            sums: dict[str, dict[str, float]] = {}
            for mode in MODES:
                began = time.perf_counter()
                results = run(
                    Path(place, "ck"), task, out=Path(place, mode), norm_stats=mode, **settings
                )["train"]
                steps, tensors = results.steps, results.tensors["allocated"].sum("step")
                sums[mode] = dict(
                    zip(tensors["tensor"].values, tensors.values.tolist(), strict=True)
                )
                print(
                    f"{learning_rate:g} {mode:12} {float(steps['loss_start'][0]):.3f} → "
                    f"{float(steps['loss_end'][-1]):.3f}, largest |residual| "
                    f"{float(abs(steps['residual']).max()):.1e}, {time.perf_counter() - began:.1f} "
                    "s"
                )
            for name, own in sums["batch"].items():
                shares = [sums[mode][name] for mode in MODES]
                if "conv" in name and any(share * own < 0 for share in shares):
                    print(
                        f"  {name}: {', '.join(f'{mode} {share:+.4f}' for mode, share in zip(MODES, shares, strict=True))}"
                    )


if __name__ == "__main__":
    main()
