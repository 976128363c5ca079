"""Where the loss of a small network went, layer by layer.

```sh
python docs/examples/digits_layers.py OUT
```

Trains the network of `lca demo` on the digits that ship with the package, replays its first 150
iterates, and draws `OUT/layers.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lca_posthoc as lca
from lca_posthoc.demo import train


def main(out: Path) -> None:
    train(out / "checkpoints")
    run = lca.run(
        out / "checkpoints",
        "lca_posthoc.demo:task",
        out=out / "run.lca",
        cluster="inline",
        keep="tensors",
        steps="0:150",
    )
    steps, found = run["train"].steps, lca.findings.layers(run["train"])

    change = float(steps["loss_end"][-1] - steps["loss_start"][0])
    allocated, residual = float(found["total"].sum()), float(steps["residual"].sum())
    print(
        f"loss change {change:+.4f} = {allocated:+.4f} allocated to layers {residual:+.1e} residual"
    )
    assert abs(allocated + residual - change) < 1e-6  # what the method guarantees
    assert (found["total"] < 0).all()  # every layer helped, over training as a whole

    lca.plots.layers(found).figure.savefig(out / "layers.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
