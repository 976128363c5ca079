"""What runs cost in an object store: requests and bytes of a span, and the time of a whole run at a
server on this machine beside one in a file system.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR python tests/benchmarks/object_store.py mnist-checkpoints [--segments 32] [--rounds 3]
```

MNIST-FC's training loss, inline, one thread. The server is moto's, which speaks like Amazon's S3,
behind a proxy that counts; both take processor time of this machine. Requests of a span are the
difference between a run of twice as many segments and one of so many, over the spans between them.
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
    puts = [request for request in server.requests if request.method == "PUT"]
    size = sum(request.size for request in puts) / 1e6
    return [len(puts), len(server.requests) - len(puts), size]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints")
    parser.add_argument("--segments", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(mnist_fc.Net, mnist_fc.task().data, {"train": Loss(F.cross_entropy, on="train")})
    run, few = (given.checkpoints, task), given.segments
    with object_server() as server, tempfile.TemporaryDirectory() as place:
        os.environ.update(server.environment)
        print("| `--keep` | puts a span | others | MB a span | local, s | server, s | ratio |")
        print("|---|---|---|---|---|---|---|")
        for keep in reversed(KEEP):
            once, twice = (counted(server, run, keep, size) for size in (few, 2 * few))
            spans = few // SPAN
            of_a_span = [
                (after - before) / spans for before, after in zip(once, twice, strict=True)
            ]
            times: list[tuple[float, float]] = []
            for turn in range(given.rounds):
                local = Path(place, f"{keep}-{turn}.lca")
                there = server.place() / "run.lca"
                both = {
                    out: replay(*run, out, keep, few)
                    for out in (local, there)[:: 1 - 2 * (turn % 2)]
                }
                times.append((both[local], both[there]))
            at_home, away = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(b / a for a, b in times)
            print(
                f"| `{keep}` | {of_a_span[0]:.1f} | {of_a_span[1]:.1f} | {of_a_span[2]:.2f} | "
                f"{at_home:.1f} | {away:.1f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
