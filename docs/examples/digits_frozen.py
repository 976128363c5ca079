"""What the other layers do when the first one is frozen at its initial weights.

```sh
python docs/examples/digits_frozen.py OUT
```

Trains the same network twice from the same seed, replays both, sets them beside each other, and
draws `OUT/frozen.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import lca_posthoc as lca
from lca_posthoc import Recorder
from lca_posthoc.demo import Net, digits


def record(checkpoints: Path, frozen: bool, iterates: int = 150) -> None:
    """SGD with momentum on batches of 50; with `frozen`, the first layer does not learn."""
    (images, labels), _ = digits()
    torch.manual_seed(0)
    model = Net()
    model.fc1.requires_grad_(not frozen)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.05, momentum=0.9)
    with Recorder(checkpoints, model) as recorder:
        recorder.attach(optimizer)
        for _ in range(iterates):
            batch = torch.randint(len(images), (50,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def main(out: Path) -> None:
    runs = {}
    for name in ("free", "frozen"):
        record(out / name, frozen=name == "frozen")
        done = lca.run(
            out / name,
            "lca_posthoc.demo:task",
            out=out / f"{name}.lca",
            cluster="inline",
            keep="tensors",
        )
        runs[name] = done["train"]
    found = lca.findings.compare(runs)
    print(found["mean"].to_pandas().round(4))

    totals = found["mean"].sel(label="frozen")
    assert float(totals.sel(layer="fc1")) == 0  # exactly: what does not move is allocated nothing
    assert float(found["mean"].sel(label="free", layer="fc1")) < 0
    # the others carry all of it
    assert abs(float(totals.sum() - found["loss_change"].sel(label="frozen"))) < 0.01

    lca.plots.compare(found).figure.savefig(out / "frozen.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
