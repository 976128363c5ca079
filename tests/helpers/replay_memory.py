"""What a replay takes beside model and data, in a process of its own; prints JSON. See
`test_memory.py`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task
from lca_posthoc.replay.events import Planned
from lca_posthoc.replay.worker import checks

ROWS, WIDTH = 2000, 1000


class Net(nn.Module):
    """Two million parameters, hardly any activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias = (
            nn.Parameter(torch.zeros(ROWS, WIDTH)),
            nn.Parameter(torch.zeros(WIDTH)),
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows].sum(1) + self.bias


def main(place: Path, losses: int, span: int, options: dict[str, float | str]) -> None:
    """Replay, and print the highest use above that before the first span, and what was foretold."""
    torch.manual_seed(0)
    net, trained = Net(), place / "checkpoints"
    with Recorder(trained, net) as recorder:
        for step in range(span + 1):
            recorder.save(step)
            with torch.no_grad():
                net.table += 0.01 * torch.randn_like(net.table)
    examples = torch.randint(ROWS, (8, 2)), torch.randint(WIDTH, (8,))
    task = Task(
        Net,
        {f"split {at}": examples for at in range(losses)},
        {f"loss {at}": Loss(F.cross_entropy, on=f"split {at}") for at in range(losses)},
    )
    process, over = psutil.Process(), threading.Event()
    seen: list[int] = []
    foretold: dict[str, float] = {}
    needed = checks.bytes_needed

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)

    def noted(*arguments: Any) -> float:
        foretold[arguments[-1]] = needed(*arguments)
        return foretold[arguments[-1]]

    checks.bytes_needed = noted

    def listen(event: object) -> None:
        if isinstance(event, Planned):
            seen.append(process.memory_info().rss)
            watcher.start()

    run = lca_posthoc.run(
        trained,
        task,
        losses=["all"],
        out=place / "run.lca",
        cluster="inline",
        span=span,
        progress=listen,
        **options,  # type: ignore[arg-type]
    )
    over.set()
    watcher.join()
    print(
        json.dumps({"taken": max(seen) - seen[0], "foretold": foretold[run.manifest.keep]}),
        flush=True,
    )
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
