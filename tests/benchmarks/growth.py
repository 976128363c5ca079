"""Whether a segment costs the same in a short and in a long run, and whether the driver stays as
small.

```sh
LCA_DATA=DIR python tests/benchmarks/growth.py [--segments 50 200 500 1000 2000] [--rounds 5]
    [--work DIR]
```

MNIST-FC on its first 2,000 training images, checkpoints recorded on the way. Each run is a process
of its own with one local worker, so that driver and worker have a core each; lengths alternate.
Seconds per segment are those of the worker on its spans but the first (whose start builds the
model) and those whose precision is measured; the driver's memory is its resident size at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

import lca_posthoc
from lca_posthoc import Recorder
from lca_posthoc.replay.events import SpanDone
from lca_posthoc.replay.worker import SAMPLED

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import mnist_fc


def record(directory: Path, iterates: int) -> None:
    """SGD on MNIST; saves every iterate."""
    torch.manual_seed(0)
    images, labels = mnist_fc.data()
    net = mnist_fc.Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with Recorder(directory, net) as recorder:
        recorder.save(0)
        for step, rows in enumerate(mnist_fc.batches(mnist_fc.TRAIN, 250, iterates), start=1):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
            recorder.save(step)


def measure(checkpoints: str, segments: int, out: str) -> None:
    """One run; prints JSON."""
    done: list[SpanDone] = []
    run = lca_posthoc.run(
        checkpoints,
        mnist_fc.__file__,
        out=out,
        workers=1,
        device="cpu",
        steps=f"0:{segments}",
        subset=["train=0:2000"],
        tolerance=float("inf"),
        span=16,
        progress=lambda event: done.append(event) if isinstance(event, SpanDone) else None,
    )
    plain = [
        event
        for event in done
        if event.span and not SAMPLED & set(range(*run.manifest.rows(event.span).indices(segments)))
    ]
    seconds = sum(event.seconds for event in plain) / sum(event.segments for event in plain)
    print(
        json.dumps({"seconds": seconds, "megabytes": psutil.Process().memory_info().rss / 1e6}),
        flush=True,
    )


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, nargs="+", default=[50, 200, 500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        checkpoints, segments, out = given.one
        measure(checkpoints, int(segments), out)
        return
    with tempfile.TemporaryDirectory() as made:
        work = given.work or Path(made)
        checkpoints = work / f"mnist_fc-{max(given.segments)}"
        if not checkpoints.exists():
            record(checkpoints, max(given.segments))
        found: dict[int, list[dict[str, float]]] = defaultdict(list)
        for turn in range(given.rounds):
            for segments in given.segments:
                out = Path(made) / f"{segments}-{turn}.lca"
                command = [sys.executable, __file__, "--one", checkpoints, segments, out]
                done = subprocess.run(
                    list(map(str, command)), check=True, capture_output=True, text=True
                )
                found[segments].append(json.loads(done.stdout.splitlines()[-1]))
    first = statistics.median(each["seconds"] for each in found[given.segments[0]])
    for segments, rounds in found.items():
        seconds = [each["seconds"] for each in rounds]
        print(
            f"{segments:6} segments: {statistics.median(seconds) * 1e3:.2f} ms a segment "
            f"({min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f}), "
            f"{statistics.median(seconds) / first:.3f} of the first; driver "
            f"{statistics.median(each['megabytes'] for each in rounds):.0f} MB"
        )


if __name__ == "__main__":
    main()
