"""Layer sums of thinned series beside those of the dense one, and how often the path band covers the
distance.

```sh
python tests/benchmarks/thinning.py [--steps 512] [--only NAME ...] [--work DIR]
```

Three networks learn handwritten digits, every iterate recorded: a perceptron and a convolutional
network by SGD with momentum, a transformer over the rows of the image by AdamW, each with a warm-up.
All are replayed densely and with every 2nd, 4th … 64th checkpoint, `--keep tensors`. For each
thinning: the segments; Σ|thinned − dense| over modules as a share of Σ|dense|; the largest band of a
module, and the median, as a share of its sum; of how many modules the band covers the distance from
the dense sum, of all and of those whose band is below half of their sum.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lca_posthoc import Loss, Recorder, Task, run  # noqa: E402  (the path is set above)
from lca_posthoc.demo import digits  # noqa: E402
from lca_posthoc.findings import layers  # noqa: E402
from lca_posthoc.replay.events import silent  # noqa: E402

THINNINGS = (2, 4, 8, 16, 32, 64)
EXAMPLES, BATCH, WARM_UP = 512, 32, 40


class Rows(nn.Module):
    """A transformer whose tokens are the eight rows of an image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        values = self.embed(images.view(-1, 8, 8)) + self.place
        for block in self.blocks:
            values = block(values)
        return self.head(self.norm(values).mean(1))  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 48),
        nn.ReLU(),
        nn.Linear(48, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(2, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


Parameters = Iterable[nn.Parameter]
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Parameters], torch.optim.Optimizer]]] = {
    "perceptron": (perceptron, lambda of: torch.optim.SGD(of, 0.05, 0.9)),
    "convolutional": (convolutional, lambda of: torch.optim.SGD(of, 0.02, 0.9)),
    "transformer": (Rows, lambda of: torch.optim.AdamW(of, 2e-3)),
}


def task(build: Callable[[], nn.Module]) -> Task:
    """Return the task over the first examples, on which the networks are trained."""
    (inputs, targets), _ = digits()
    data = inputs[:EXAMPLES].flatten(1), targets[:EXAMPLES]
    loss = Loss(
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"), "train"
    )
    return Task(build, {"train": data}, {"train": loss})


def train(name: str, steps: int, place: Path) -> None:
    """Record every iterate: a linear warm-up, then a cosine to 0."""
    build, optimizer_of = CASES[name]
    torch.manual_seed(0)
    model, ((inputs, targets), _) = build(), digits()
    inputs = inputs[:EXAMPLES].flatten(1)
    optimizer = optimizer_of(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(1)
    with Recorder(place, model) as recorder:
        recorder.attach(optimizer)
        for _ in range(steps):
            rows = torch.randint(EXAMPLES, (BATCH,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()


def replayed(name: str, place: Path, out: Path, steps: str | None) -> xr.Dataset:
    """Return the sums of the layers of a replay."""
    results = run(
        place,
        task(CASES[name][0]),
        out=out,
        steps=steps,
        keep="tensors",
        cluster="inline",
        durability="none",
        progress=silent,
    )
    return layers(results["train"])


def compared(thinned: xr.Dataset, dense: xr.Dataset) -> list[str]:
    """Return a row of the table: how far sums are from the dense ones, and how often the band covers
    that.
    """
    total, band = thinned["total"].values, thinned["path"].values
    far = abs(total - dense["total"].values)
    share, covered = band / abs(total), far <= band
    telling = share < 0.5
    return [
        f"{thinned.sizes['step']}",
        f"{far.sum() / abs(dense['total'].values).sum():.1%}",
        f"{np.median(share):.0%}",
        f"{share.max():.0%}",
        f"{covered.sum()} of {len(covered)}",
        f"{(covered & telling).sum()} of {telling.sum()}",
    ]


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        print(
            "| network | thinned by | segments | Σ\\|distance\\| | median band | largest band | "
            "covered | of bands below half |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name in arguments.only:
            place = Path(work) / name
            train(name, arguments.steps, place / "checkpoints")
            dense = replayed(name, place / "checkpoints", place / "dense.lca", None)
            for thinning in THINNINGS:
                thinned = replayed(
                    name,
                    place / "checkpoints",
                    place / f"{thinning}.lca",
                    f"0:{arguments.steps}:{thinning}",
                )
                cells = [name, str(thinning), *compared(thinned, dense)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
