"""What moved the weights: signal, noise, momentum and decay, layer by layer.

```sh
python docs/examples/digits_causes.py OUT
```

Trains the network of `lca demo` on the digits that ship with the package, with SGD whose steps the
recorder takes down, replays 150 iterates, and draws `OUT/causes.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import lca_posthoc as lca
from lca_posthoc.demo import Net, digits


def train(checkpoints: Path, steps: int = 150) -> None:
    (inputs, targets), _ = digits()
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    with lca.Recorder(checkpoints, model) as recorder:
        recorder.attach(optimizer)
        for _ in range(steps):
            batch = torch.randint(len(inputs), (50,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()


def main(out: Path) -> None:
    train(out / "checkpoints")
    run = lca.run(
        out / "checkpoints",
        "lca_posthoc.demo:task",
        losses=["train", "validation"],
        causes=True,
        out=out / "run.lca",
        cluster="inline",
        keep="tensors",
    )
    layers = lca.findings.layers(run["validation"])
    found = lca.findings.causes(run["validation"])
    for cause in found["cause"].values:
        print(f"{cause:9}{float(found['total'].sel(cause=cause).sum()):+.4f}")
    share = float(found["rest_overall"])
    print(f"rest is {share:.1e} of what was allocated, in magnitude")
    assert share < 1e-3  # the formula of SGD explains every step
    assert abs(found["layer_total"] - layers["total"]).max() < 1e-9  # causes add up to layers

    lca.plots.causes(found).savefig(out / "causes.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
