"""How much sooner two single-threaded workers finish MNIST-FC than one: alternating, median of
ratios.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR python tests/benchmarks/two_workers.py mnist-checkpoints [--segments 48] [--rounds 5]
```

Replay time: from the moment the work is planned to the last commit; without the start of processes,
the loading of the data in them and the probe. Both runs cut the same spans.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lca_posthoc
from lca_posthoc.replay.events import Planned, SpanDone

TASK = Path(__file__).parents[2] / "docs" / "examples" / "mnist_fc.py"


def replay_seconds(checkpoints: Path, segments: int, workers: int) -> float:
    marks: list[float] = []

    def listen(event: Any) -> None:
        if isinstance(event, Planned | SpanDone):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as place:
        options: dict[str, Any] = {
            "span": 4,
            "steps": f"0:{segments}",
            "workers": workers,
            "progress": listen,
        }
        lca_posthoc.run(checkpoints, TASK, out=Path(place) / "run.lca", device="cpu", **options)
    return marks[-1] - marks[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--segments", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ratios = []
    for _ in range(given.rounds):
        one, two = (
            replay_seconds(given.checkpoints, given.segments, workers) for workers in (1, 2)
        )
        ratios.append(two / one)
        print(f"one {one:.1f} s, two {two:.1f} s, ratio {two / one:.3f}", file=sys.stderr)
    print(
        f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of "
        f"{given.rounds} rounds"
    )


if __name__ == "__main__":
    main()
