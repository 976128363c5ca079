"""A training whose iterates say what they are: in the file of step n every number is n. Run as a
script, to be killed.

```sh
# trains on and on from a step; each line it prints is a training that began
python -m tests.helpers.numbered_training DIRECTORY [moments]
```

Every line it reads makes it fork a training that goes on until it is killed: torch is imported
once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from lca_posthoc import Recorder


def network(size: int = 64) -> nn.Module:
    """A layer with a buffer, a count and a scalar."""
    model = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size))
    model.register_parameter("scale", nn.Parameter(torch.zeros(())))
    return model


@torch.no_grad()
def become(model: nn.Module, step: int) -> None:
    """Make every number of the model that of the step."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.fill_(step)


def moments_of(model: nn.Module) -> torch.optim.Optimizer:
    """Make an optimiser whose moments are as many as the model's weights."""
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
        }
    return optimizer


def train(directory: Path, first: int, with_moments: bool) -> None:
    """Save iterates until killed."""
    model = network(256)
    recorder = Recorder(directory, model)
    moments: list[torch.Tensor] = []
    if with_moments:
        optimizer = moments_of(model)
        recorder.follow(optimizer, save="moments")
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
    step = first
    while True:
        become(model, step)
        for moment in moments:
            moment.fill_(step)
        recorder.save(step)
        step += 1


def main() -> None:
    """Fork a training for each line `FIRST`, say its process, and wait for its end."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            train(Path(sys.argv[1]), int(line), "moments" in sys.argv[2:])
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
