"""What grouped and further losses cost beside the plain one, on MNIST-FC: alternating, medians of
ratios.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR python tests/benchmarks/several_losses.py mnist-checkpoints [--segments 16]
    [--rounds 5] [CASE ...]
```

A time is that of a worker on the spans of a run (reading, evaluating, allocating, writing), inline,
on one thread; without the start of the process, the loading of the data and the probe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import lca_posthoc
from lca_posthoc import Loss, Task

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import mnist_fc

TRAIN, VALIDATION = Loss(F.cross_entropy, on="train"), Loss(F.cross_entropy, on="validation")
PER_CLASS = Loss(F.cross_entropy, on="train", group_by=lambda images, labels: labels)
GROUPS_OF_55 = Loss(F.cross_entropy, on="train", group_by=torch.arange(mnist_fc.TRAIN) % 1000)
CASES: dict[str, tuple[dict[str, Loss], list[dict[str, Loss]], str]] = {
    "10 classes": ({"per_class": PER_CLASS}, [{"train": TRAIN}], "parameters"),
    "10 classes, tensors kept": ({"per_class": PER_CLASS}, [{"train": TRAIN}], "tensors"),
    "1,000 groups of 55, tensors kept": ({"groups": GROUPS_OF_55}, [{"train": TRAIN}], "tensors"),
    "train + validation + per class": (
        {"train": TRAIN, "validation": VALIDATION, "per_class": PER_CLASS},
        [{"train": TRAIN}, {"validation": VALIDATION}],
        "parameters",
    ),
}


def seconds(
    checkpoints: str, losses: dict[str, Loss], keep: str, steps: str, data: Callable[[], object]
) -> float:
    """Worker seconds of one run, refinement off so that both sides evaluate alike."""
    task = Task(mnist_fc.Net, data(), losses)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as place:
        spent: list[float] = []
        lca_posthoc.run(
            checkpoints,
            task,
            losses=["all"],
            out=Path(place) / "run.lca",
            keep=keep,
            steps=steps,
            tolerance=float("inf"),
            cluster="inline",
            device="cpu",
            progress=lambda event: spent.append(getattr(event, "seconds", 0.0)),
        )
        return sum(spent)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints")
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_intermixed_args()
    held = mnist_fc.task().data
    for name in options.cases:
        ours, theirs, keep = CASES[name]
        ratios, times = [], []
        for _ in range(options.rounds):
            spent = [
                seconds(options.checkpoints, losses, keep, f"0:{options.segments}", lambda: held)
                for losses in (ours, *theirs)
            ]
            times.append(spent)
            ratios.append(spent[0] / sum(spent[1:]))
        medians = ", ".join(
            f"{statistics.median(column):.2f} s" for column in zip(*times, strict=True)
        )
        print(
            f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); "
            f"medians {medians}",
            flush=True,
        )


if __name__ == "__main__":
    main()
