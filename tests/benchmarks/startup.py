"""How long `lca run` takes until the first segment is computed, and how long on a run that is
finished.

```sh
LCA_DATA=DIR python docs/examples/mnist_fc.py mnist-checkpoints
LCA_DATA=DIR python tests/benchmarks/startup.py mnist-checkpoints [--rounds 5]
    [--task docs/examples/mnist_fc.py]
```

A time runs from the start of the process, as the system tells it, to the event that says which
spans are pending: workers are up, the task is loaded, described and probed, the run directory is
laid out. On a finished run it is that of the whole command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = """
import json, sys, time
import psutil
import lca_posthoc
from lca_posthoc.replay.events import Planned


def listen(event):
    if isinstance(event, Planned):
        print(json.dumps(time.time() - psutil.Process().create_time()), flush=True)

if __name__ == "__main__":
    checkpoints, task, out, cluster = sys.argv[1:]
    lca_posthoc.run(checkpoints, task, losses=["all"], out=out, cluster=cluster, steps="0:8", device="cpu", progress=listen)
"""


def until_the_first_segment(place: Path, checkpoints: str, task: str, cluster: str) -> float:
    """Seconds of one new run."""
    script, out = place / "started.py", place / f"{time.monotonic_ns()}.lca"
    script.write_text(STARTED)
    command = [sys.executable, str(script), checkpoints, task, str(out), cluster]
    return float(
        json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        )
    )


def on_a_finished_run(checkpoints: str, task: str, out: Path) -> float:
    """Seconds of the whole command."""
    program = "from lca_posthoc.cli import main; main()"
    options = [
        "--loss",
        "all",
        "--steps",
        "0:8",
        "--out",
        str(out),
        "--cluster",
        "inline",
        "--device",
        "cpu",
    ]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, "run", checkpoints, "--task", task, *options],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


def main() -> None:
    """Print medians, smallest and largest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints")
    parser.add_argument(
        "--task", default=str(Path(__file__).parents[2] / "docs" / "examples" / "mnist_fc.py")
    )
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        on_a_finished_run(given.checkpoints, given.task, place / "finished.lca")  # makes it
        found: dict[str, list[float]] = {"inline": [], "local": [], "finished": []}
        for _ in range(given.rounds):
            for cluster in ("inline", "local"):
                found[cluster].append(
                    until_the_first_segment(place, given.checkpoints, given.task, cluster)
                )
            found["finished"].append(
                on_a_finished_run(given.checkpoints, given.task, place / "finished.lca")
            )
    for what, times in found.items():
        print(f"{what:10} {statistics.median(times):6.2f} s ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
