"""Forward and backward pass of a linear layer, by torch and by oneDNN as `numerics/objective/linear.py`
calls it; one thread.

```sh
python tests/benchmarks/linear.py [--repeats 100]
```

Medians, alternating. On a processor for which `preferred()` is false, the second column is what
would have been.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lca_posthoc.numerics.objective import linear as ours

SHAPES = [  # examples, inputs, outputs
    (100, 64, 32),
    (1000, 64, 32),
    (2048, 50, 10),
    (500, 100, 50),
    (55, 784, 100),
    (2048, 784, 100),
    (1536, 384, 1536),
    (1024, 1024, 1024),
]


def seconds(linear: Callable[..., Tensor], tensors: list[Tensor], above: Tensor) -> float:
    """One pass forth and back."""
    began = time.perf_counter()
    torch.autograd.grad(linear(*tensors), tensors, above)
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    least, ours._LEAST = ours._LEAST, 1
    print(f"preferred on this processor: {ours.preferred()}, from {least:,} multiplications on")
    for examples, inputs, outputs in SHAPES:
        tensors = [
            torch.randn(shape, requires_grad=True)
            for shape in ((examples, inputs), (outputs, inputs), (outputs,))
        ]
        above = torch.randn(examples, outputs)
        ways = {"torch": F.linear, "oneDNN": ours.linear(F.linear)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(given.repeats):
            for way, linear in ways.items():
                times[way].append(seconds(linear, tensors, above))
        torchs, onednns = (statistics.median(each[3:]) for each in times.values())
        flops = 6 * examples * inputs * outputs
        print(
            f"{examples:5} × {inputs:4} → {outputs:4} ({examples * inputs * outputs:13,}): torch "
            f"{torchs * 1e6:8.0f} µs, {flops / torchs / 1e9:4.0f} GFLOP/s; oneDNN "
            f"{onednns * 1e6:8.0f} µs, {flops / onednns / 1e9:4.0f} GFLOP/s; ratio "
            f"{torchs / onednns:.2f}"
        )


if __name__ == "__main__":
    main()
