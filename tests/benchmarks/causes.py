"""What it costs to tell what moved the weights, and the loss along directions, beside a plain run.

```sh
LCA_DATA=DIR python tests/benchmarks/causes.py [WIDTH,LAYERS,VOCABULARY,SEQUENCES ...]
    [--keep tensors] [--segments 4] [--rounds 5] [--work DIR]
```

The model, its data and its size are those of `large_models.py`, recorded with momentum 0.9 by SGD
and, with its moments, by AdamW. A plain run, one with `--causes` and one with `--along` ten random
directions take turns, each in a process of its own, inline, one thread, the check of precision
included in all. Shown are medians over rounds: processor seconds a segment, from the first segment's
beginning to the last one's commit, ratios to the plain run of the same round, of processor and of
wall time, and the most memory above 400 MB and above what autograd saves, in bytes a parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lca_posthoc.checkpoints.basis import write_basis  # noqa: E402  (the path is set above)
from tests.helpers import large_transformer  # noqa: E402

BASE = 400e6
DIRECTIONS = 10
RUNS = ("plain", "causes", "along")


def record(place: Path, optimizer: str, steps: int) -> None:
    """Record a short training, and write random directions beside it."""

    def of(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        if optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4)
        return torch.optim.AdamW(parameters, lr=1e-4)

    large_transformer.train_with(place, steps, of, "moments")
    write_basis(place, directions_of(place), random=DIRECTIONS, say=lambda note: None)


def directions_of(place: Path) -> Path:
    """Return the file of directions of a series."""
    return place.with_suffix(".directions.safetensors")


def replay(place: Path, keep: str, segments: int, kind: str) -> dict[str, float]:
    """Replay a series in this process, and say what it took."""
    options: dict[str, Any] = {"causes": True} if kind == "causes" else {}
    if kind == "along":
        options = {"along": directions_of(place)}
    return large_transformer.replay(place, segments, keep, **options)


def alone(*role: str) -> dict[str, float]:
    """Do something in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--role", *role]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(role)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(shape: str, optimizer: str, options: argparse.Namespace, work: Path) -> None:
    """Print the rows of one model and optimiser."""
    os.environ["LCA_SHAPE"] = shape
    place = work / f"{shape.replace(',', '-')}-{optimizer}"
    if not directions_of(place).exists():
        alone("record", str(place), optimizer, str(options.segments))
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in RUNS}
    for number in range(options.rounds):
        for position in range(len(RUNS)):
            kind = RUNS[(position + number) % len(RUNS)]
            role = ("replay", str(place), options.keep, str(options.segments), kind)
            rounds[kind].append(alone(*role))
    for kind, figures in rounds.items():
        ratios = {
            name: [
                ours[name] / plain[name]
                for ours, plain in zip(figures, rounds["plain"], strict=True)
            ]
            for name in ("seconds", "processor")
        }
        most = max(each["peak"] - BASE - each["activations"] for each in figures)
        spent = statistics.median(each["processor"] for each in figures)
        print(
            f"{figures[0]['parameters'] / 1e6:.1f} million, {optimizer}, {kind}: {spent:.2f} "
            f"processor seconds a segment, of plain {_ratio(ratios['processor'])}, "
            f"{_ratio(ratios['seconds'])} wall, {most / figures[0]['parameters']:.1f} bytes a "
            "parameter",
            flush=True,
        )


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Record, replay in turn, print."""
    if sys.argv[1:2] == ["--role"]:
        kind, place = sys.argv[2], Path(sys.argv[3])
        if kind == "record":
            record(place, sys.argv[4], int(sys.argv[5]))
            print("{}")
        else:
            print(json.dumps(replay(place, sys.argv[4], int(sys.argv[5]), sys.argv[6])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=["256,4,256,16"])
    parser.add_argument("--keep", default="tensors")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where checkpoints are made and kept")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for shape in options.shapes:
            for optimizer in ("sgd", "adamw"):
                compare(shape, optimizer, options, work)


if __name__ == "__main__":
    main()
