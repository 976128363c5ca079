"""What it costs to tell every example apart, beside the plain loss on the same data.

```sh
LCA_DATA=DIR python tests/benchmarks/per_example.py [mnist_fc mnist_lenet resnet20 transformer]
    [--examples N] [--rounds 5]
```

The workloads are those of `speed.py`. Timed are the two evaluations a segment takes at `--keep
tensors`: one in its middle, along its motion, and one where it meets the next, along both; over the
first examples of the training split (as many as `EXAMPLES` says for each workload, or as
--examples says), in one process and one thread, alternating. Shown are medians of processor seconds
and of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import workloads  # noqa: E402  (the path is set above)

from lca_posthoc import Task  # noqa: E402
from lca_posthoc.numerics.objective import (  # noqa: E402
    Along,
    Motion,
    Objective,
    ObjectiveSettings,
    build_objective,
    recalled,
    recorded,
)

# so that a round takes less than a minute
EXAMPLES = {"mnist_fc": 10_000, "mnist_lenet": 10_000, "resnet20": 2_000, "transformer": 32}


def objective_of(name: str, examples: int) -> Objective:
    """Return the objective of a workload's first loss, plain and per example."""
    task: Task = getattr(workloads, name)()
    loss = next(iter(task.losses.values()))
    both = {"plain": loss, "per_example": replace(loss, per="example")}
    return prepared(replace(task, losses=both), "per_example", {"": f"0:{examples}"})


def prepared(task: Task, told_apart: str | None, subset: dict[str, str] | None = None) -> Objective:
    """Return an objective ready to be evaluated, which tells the examples of one loss apart."""
    settings = ObjectiveSettings(
        device=torch.device("cpu"),
        precision="float32",
        norm_stats="running",
        batch_size=None,
        subset=subset or {},
    )
    objective = build_objective(lambda: task, ["all"], settings)
    objective.settle_batch_sizes(objective.point)
    objective.data.share_batches()
    if told_apart is not None:
        check = objective.find_examples(told_apart)
        assert not check.untold, check.untold
        objective.example_axes[told_apart] = recalled(recorded(check.axes))
    return objective


def motions_of(objective: Objective) -> list[Motion]:
    """Return the motions of two segments that meet at the point the model holds."""
    generator = torch.Generator().manual_seed(0)
    here = {name: tensor.detach().clone() for name, tensor in objective.point.items()}
    ends = [
        {
            name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator).to(tensor)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in here.items()
        }
        for _ in range(2)
    ]
    return [Motion(ends[0], here), Motion(here, ends[1])]


def seconds(objective: Objective, loss: str, motions: list[Motion]) -> float:
    """Return the processor seconds of the evaluations of a segment."""
    axes = dict.fromkeys(objective.tensors.differentiable)
    began = time.process_time()
    for directions in (motions[:1], motions):
        along = Along(axes, directions)
        objective.evaluate(motions[1].start, [loss], along=along, examples=directions)
    return time.process_time() - began


def main() -> None:
    """Print a row for each workload."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(EXAMPLES))
    parser.add_argument("--examples", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| workload | examples | plain, s | per example, s | ratio |\n|---|---|---|---|---|")
    for name in given.names:
        objective = objective_of(name, given.examples or EXAMPLES[name])
        motions = motions_of(objective)
        pairs = []
        for _ in range(given.rounds + 1):  # the first one warms up
            pairs.append([seconds(objective, loss, motions) for loss in ("plain", "per_example")])
        plain, told = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs[1:])
        count = next(iter(objective.splits.values())).examples
        print(f"| {name} | {count:,} | {plain:.2f} | {told:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
