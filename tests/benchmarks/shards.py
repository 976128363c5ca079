"""What ten segments of MNIST-FC cost in shards of their data and in whole spans, on two workers:
processor time of driver and workers and time on the clock, in turn, medians; and how far the sums of
tensors are apart. Whole spans are as long as a run chooses, and as long as those in shards, which
takes the same number of evaluations.

```sh
LCA_DATA=DIR python tests/benchmarks/shards.py [--segments 10] [--every 20] [--shards 2 16] [--rounds 3]
```

From the moment the work is planned to the last commit; without the start of processes, the loading
of the data in them and the probe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import lca_posthoc
from lca_posthoc.replay.events import Planned, SpanDone

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import mnist_fc

TASK = Path(mnist_fc.__file__)


def record(place: Path, segments: int, every: int) -> None:
    """Checkpoints of a training with SGD, so many steps apart."""
    torch.manual_seed(0)
    made = mnist_fc.task()
    model, (inputs, targets) = made.model(), made.data["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with lca_posthoc.Recorder(place, model, every=every) as recorder:
        for step in range(segments * every + 1):
            recorder.save(step)
            batch = torch.randint(len(inputs), (250,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()


def processor_seconds() -> float:
    """Of this process and of every one that it started and that lives."""
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children(recursive=True)))


def replay(
    checkpoints: Path, out: Path, shards: int, span: int | None
) -> tuple[float, float, np.ndarray]:
    """Processor seconds, seconds, and what tensors are allocated."""
    marks: list[tuple[float, float]] = []

    def listen(event: Any) -> None:
        if isinstance(event, Planned | SpanDone):
            marks.append((processor_seconds(), time.perf_counter()))

    made = lca_posthoc.run(
        checkpoints,
        TASK,
        out=out,
        keep="tensors",
        shards=shards,
        span=span,
        workers=2,
        device="cpu",
        tolerance="inf",
        progress=listen,
    )
    took = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    return (*took, made["train"].tensors["allocated"].values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    kinds: dict[str, tuple[int, int | None]] = {
        "whole spans": (1, None),
        "whole spans of 8": (1, 8),
        **{f"{shards} shards": (shards, None) for shards in given.shards},
    }
    costs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        record(place / "checkpoints", given.segments, given.every)
        for number in range(given.rounds):
            whole = None
            for kind, cut in kinds.items():
                out = place / f"{kind}-{number}.lca"
                processor, clock, sums = replay(place / "checkpoints", out, *cut)
                whole = sums if whole is None else whole
                costs[kind].append((processor, clock))
                apart = float(np.abs(sums - whole).sum() / np.abs(whole).sum())
                print(
                    f"{kind}: {processor:.1f} s of processors, {clock:.1f} s, sums of tensors "
                    f"{apart:.1e} of the sum of sizes apart",
                    flush=True,
                )
    for kind, taken in costs.items():
        for other in list(kinds)[:2]:
            ratios = [
                statistics.median(
                    mine[part] / theirs[part]
                    for mine, theirs in zip(taken, costs[other], strict=True)
                )
                for part in (0, 1)
            ]
            if kind not in list(kinds)[:2]:
                print(
                    f"{kind} against {other}: {ratios[0]:.3f} of the processor time, "
                    f"{ratios[1]:.3f} of the time"
                )


if __name__ == "__main__":
    main()
