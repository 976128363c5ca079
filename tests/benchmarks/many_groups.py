"""What a loss with a thousand groups costs at `--keep tensors`, beside the plain loss.

```sh
LCA_DATA=DIR python tests/benchmarks/many_groups.py [--groups 1000] [--rounds 5]
```

MNIST-FC of `speed.py` and its 55,000 training images, in groups of neighbours. Timed are the two
evaluations a segment takes, as in `per_example.py`, in one process and one thread, alternating.
Shown are medians of processor seconds and of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import workloads  # noqa: E402  (the path is set above)
from per_example import motions_of, prepared, seconds  # noqa: E402

from lca_posthoc.numerics.objective import Objective  # noqa: E402


def objective_of(groups: int | None) -> Objective:
    """Return the objective of MNIST-FC's training loss alone, in groups of neighbours if there are
    to be any: together, both would take the batches of the groups.
    """
    task = workloads.mnist_fc()
    loss = next(iter(task.losses.values()))
    if groups is not None:
        count = len(task.data["train"][0])
        loss = replace(loss, group_by=[number * groups // count for number in range(count)])
    grouped = replace(task, losses={"train": loss})
    return prepared(grouped, None if groups is None else "train")


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    objectives = [objective_of(None), objective_of(given.groups)]
    motions = motions_of(objectives[0])
    pairs = [
        [seconds(objective, "train", motions) for objective in objectives]
        for _ in range(given.rounds + 1)  # the first one warms up
    ]
    plain, grouped = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratios = [pair[1] / pair[0] for pair in pairs[1:]]
    print("| groups | plain, s | in groups, s | ratio |\n|---|---|---|---|")
    print(
        f"| {given.groups:,} | {plain:.2f} | {grouped:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


if __name__ == "__main__":
    main()
