"""What runs cost in an object store: requests and bytes of a span, and the time of a whole run at a
server on this machine beside one in a file system.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR python tests/benchmarks/object_store.py mnist-checkpoints [--segments 32] [--rounds 3]
```

MNIST-FC's training loss, inline, one thread. The server is moto's, which speaks like Amazon's S3,
behind a proxy that counts; both take processor time of this machine. Requests are those of whole runs
of so many segments and of twice as many, in spans of 16, on 500 images, of which their number does not
depend. What is written by the clock is left out: a sign of life every 10 seconds, and every 3 seconds a
report on the span for `lca status`.
Times alternate; shown are medians of the whole call, and of the ratio to the file system in the same
round.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import lca_posthoc
from lca_posthoc import Loss, Task
from lca_posthoc.numerics.schema import KEEP

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2]))
import mnist_fc
from tests.helpers.object_server import ObjectServer, object_server

SPAN = 16


def replay(checkpoints: str, task: Task, out: Path, keep: str, segments: int) -> float:
    """Seconds of a run of the first segments."""
    started = time.perf_counter()
    lca_posthoc.run(
        checkpoints,
        task,
        out=str(out),
        keep=keep,
        steps=f":{segments}",
        span=SPAN,
        tolerance=math.inf,
        cluster="inline",
        device="cpu",
        progress=lambda event: None,
    )
    return time.perf_counter() - started


def counted(server: ObjectServer, run: tuple[str, Task], keep: str, segments: int) -> list[float]:
    """Puts, other requests and megabytes of puts of a run."""
    server.requests.clear()
    replay(*run, server.place() / "run.lca", keep, segments)
    requests = [
        request
        for request in server.requests
        if "/log/.span-" not in request.path and not request.path.endswith("/lock")
    ]
    puts = [request for request in requests if request.method == "PUT"]
    size = sum(request.size for request in puts) / 1e6
    return [len(puts), len(requests) - len(puts), size]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints")
    parser.add_argument("--segments", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = mnist_fc.task().data["train"]
    loss = {"train": Loss(F.cross_entropy, on="train")}
    task = Task(mnist_fc.Net, {"train": (images, labels)}, loss)
    small = Task(mnist_fc.Net, {"train": (images[:500], labels[:500])}, loss)
    run, few = (given.checkpoints, task), given.segments
    with object_server() as server, tempfile.TemporaryDirectory() as place:
        os.environ.update(server.environment)
        spans = few // SPAN
        print(
            f"| `--keep` | puts, {spans} and {2 * spans} spans | other requests | MB | local, s | "
            "server, s | ratio |"
        )
        print("|---|---|---|---|---|---|---|")
        for keep in reversed(KEEP):
            once, twice = (
                counted(server, (given.checkpoints, small), keep, size) for size in (few, 2 * few)
            )
            times: list[tuple[float, float]] = []
            for turn in range(given.rounds):
                local = Path(place, f"{keep}-{turn}.lca")
                there = server.place() / "run.lca"
                both = {
                    out: replay(*run, out, keep, few)
                    for out in (local, there)[:: 1 - 2 * (turn % 2)]
                }
                times.append((both[local], both[there]))
            columns = [*zip(*times, strict=True)] or [(math.nan,)] * 2
            at_home, away = map(statistics.median, columns)
            ratio = statistics.median([b / a for a, b in times] or [math.nan])
            print(
                f"| `{keep}` | {once[0]:.0f}, {twice[0]:.0f} | {once[1]:.0f}, {twice[1]:.0f} | "
                f"{once[2]:.2f}, {twice[2]:.2f} | {at_home:.1f} | {away:.1f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
