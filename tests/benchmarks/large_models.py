"""A large transformer replayed at the levels of `--keep`, beside a plain loop.

```sh
python tests/benchmarks/large_models.py WIDTH,LAYERS,VOCABULARY,SEQUENCES [--levels tensors …]
    [--segments 4] [--rounds 3] [--no-loop] [--threads 1] [--work DIR]
LCA_DATA=DIR python tests/benchmarks/large_models.py 1280,36,50257,4 --segments 3 --no-loop
    --levels units --rounds 1
```

The model, its training and its data are those of `tests/helpers/large_transformer.py`: with
LCA_DATA Tiny Shakespeare, else random tokens; sequences of 128. Checkpoints are made once in the
directory of --work and found there again.

The plain loop holds the data, the model and the gradients of three nodes in float32, and uses the
gradient at a segment's end for the next segment; it makes one batch of all sequences. Ours is
`lca_posthoc.run` with `cluster="inline"`, `tolerance=inf` and the rest by default: Simpson's rule,
the same evaluations. Every timing is a process of its own; contestants alternate. Seconds are those
from the first segment's beginning to the last one's commit, the measuring of the precision
included; `peak` is the most memory of the process, `a parameter` what of it is above 400 MB and,
for ours, above what autograd saves of a batch. Shown are medians over rounds, of ratios too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lca_posthoc.base.available_memory import peak_memory  # noqa: E402  (the path is set above)
from tests.helpers import large_transformer  # noqa: E402
from tests.helpers.large_transformer import (  # noqa: E402
    Figures,
    Shape,
    Transformer,
    next_token,
)

BASE = 400e6


def plain_loop(checkpoints: Path, segments: int) -> Figures:
    """Simpson's rule as somebody who knows what costs time writes it."""
    shape = Shape.of_environment()
    model, data = Transformer(shape), large_transformer.data(shape)
    parameters = dict(model.named_parameters())
    files = sorted(checkpoints.glob("*.safetensors"))[: segments + 1]

    def evaluate(point: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(point[name])
        model.zero_grad()
        loss = next_token(model, data).mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        return loss.item(), {name: each for name, each in gradients.items() if each is not None}

    began = time.perf_counter()
    start = load_file(files[0])
    start_loss, first = evaluate(start)
    residual = 0.0
    for file in files[1:]:
        end = load_file(file)
        middle_point = {name: (start[name] + end[name]) / 2 for name in start}
        _, middle = evaluate(middle_point)
        end_loss, last = evaluate(end)
        allocated = sum(
            float(((first[name] + 4 * middle[name] + last[name]) * (end[name] - start[name])).sum())
            for name in parameters
        )
        residual = max(residual, abs(end_loss - start_loss - allocated / 6))
        start, start_loss, first = end, end_loss, last
    seconds = (time.perf_counter() - began) / segments
    return {"seconds": seconds, "residual": residual, "peak": peak_memory(), "disk": 0.0}


def alone(role: str, checkpoints: Path, segments: int, threads: int) -> Figures:
    """Do something in a process of its own."""
    command = [sys.executable, __file__, "--role", role, str(checkpoints), str(segments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{role} ended with {done.returncode}: {done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def in_this_process(role: str, checkpoints: Path, segments: int) -> Figures:
    if role == "record":
        large_transformer.train(checkpoints, segments)
        return {}
    if role == "loop":
        return plain_loop(checkpoints, segments)
    return large_transformer.replay(checkpoints, segments, role)


def show(rounds: dict[str, list[Figures]], parameters: int) -> None:
    head = ("", "s a segment", "of the loop's", "peak MB", "a parameter", "disk kB", "|residual|")
    print("{:>11} {:>12} {:>22} {:>8} {:>12} {:>9} {:>10}".format(*head))
    for role, figures in rounds.items():
        ratios = [
            ours["seconds"] / loop["seconds"]
            for ours, loop in zip(figures, rounds.get("loop", []), strict=False)
        ]
        ratio = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            if ratios
            else "not measured"
        )
        most = max(each["peak"] for each in figures)
        above = most - BASE - figures[0].get("activations", 0.0)
        print(
            f"{role:>11} {statistics.median(each['seconds'] for each in figures):>12.2f} "
            f"{ratio:>22} {most / 1e6:>8.0f} {above / parameters:>12.1f} "
            f"{figures[0]['disk'] / 1e3:>9.0f} {figures[0]['residual']:>10.1e}"
        )


def main() -> None:
    """Record, time in turn, print the table."""
    if sys.argv[1] == "--role":
        print(json.dumps(in_this_process(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", help="WIDTH,LAYERS,VOCABULARY,SEQUENCES")
    parser.add_argument("--levels", nargs="+", default=["tensors", "parameters"])
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-loop", action="store_true", help="where it does not fit in memory")
    parser.add_argument("--work", type=Path, help="where checkpoints are made and kept")
    options = parser.parse_args()
    os.environ["LCA_SHAPE"] = options.shape
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = work / options.shape.replace(",", "-")
        if len(list(place.glob("*.safetensors"))) <= options.segments:
            alone("record", place, options.segments, options.threads)
        roles = [*([] if options.no_loop else ["loop"]), *options.levels]
        rounds: dict[str, list[Figures]] = {role: [] for role in roles}
        for number, role in itertools.product(range(options.rounds), roles):
            ordered = roles[(roles.index(role) + number) % len(roles)]
            rounds[ordered].append(alone(ordered, place, options.segments, options.threads))
    parameters = large_transformer.parameters()
    print(
        f"{parameters:,} parameters, {options.segments} segments, {options.rounds} rounds, "
        f"{options.threads} threads"
    )
    show(rounds, parameters)


if __name__ == "__main__":
    main()
