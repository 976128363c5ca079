"""What keeping results costs beside computing them, on MNIST-FC with train and validation.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR python tests/benchmarks/bookkeeping.py mnist-checkpoints [--segments 32] [--rounds 5]
```

Inline, one thread. For each `--keep`, medians over the rounds of the share of a worker's time on
its spans that goes into sums, counts, histograms, units and totals, and into compressing, writing,
flushing to the disk and committing; reading checkpoints too. The measuring of the precision is left
out of the whole.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lca_posthoc
from lca_posthoc import Task
from lca_posthoc.checkpoints import trajectory
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.numerics.statistics import SpanSums
from lca_posthoc.replay.worker import read_ahead, spans
from lca_posthoc.results import RunWriter

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import mnist_fc


def timed(spent: dict[str, float], what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added up."""

    @functools.wraps(function)
    def measured(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            spent[what] += time.perf_counter() - began

    return measured


def shares(checkpoints: str, task: Task, keep: str, segments: int) -> dict[str, float]:
    """Shares of one run."""
    spent: dict[str, float] = defaultdict(float)
    patches = [
        mock.patch.object(SpanSums, "add", timed(spent, "statistics", SpanSums.add)),
        mock.patch.object(RunWriter, "write_block", timed(spent, "write", RunWriter.write_block)),
        mock.patch.object(RunWriter, "write_span", timed(spent, "write", RunWriter.write_span)),
        mock.patch.object(
            read_ahead, "read_checkpoint", timed(spent, "read", trajectory.read_checkpoint)
        ),
        mock.patch.object(spans, "SAMPLED", set()),
    ]
    with tempfile.TemporaryDirectory(dir=".") as place:
        for patch in patches:
            patch.start()
        try:
            lca_posthoc.run(
                checkpoints,
                task,
                losses=["all"],
                out=Path(place) / "run.lca",
                keep=keep,
                steps=f"0:{segments}",
                tolerance=float("inf"),
                cluster="inline",
                device="cpu",
                progress=lambda event: spent.update(
                    whole=spent["whole"] + getattr(event, "seconds", 0.0)
                ),
            )
        finally:
            for patch in patches:
                patch.stop()
    whole = spent.pop("whole")
    return {what: seconds / whole for what, seconds in spent.items()}


def main() -> None:
    """Print a line for each level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints")
    parser.add_argument("--segments", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    task = mnist_fc.task()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(given.rounds):
        for keep in KEEP:
            found[keep].append(shares(given.checkpoints, task, keep, given.segments))
    for keep, rounds in found.items():
        parts = {what: statistics.median(each[what] for each in rounds) for what in rounds[0]}
        total = statistics.median(each["statistics"] + each["write"] for each in rounds)
        listed = ", ".join(f"{what} {share:.2%}" for what, share in parts.items())
        print(f"--keep {keep:10} {total:.2%} of the time ({listed})")


if __name__ == "__main__":
    main()
