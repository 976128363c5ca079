"""Which layer learned which digit.

```sh
python docs/examples/digits_per_class.py OUT
```

The loss of every class is allocated apart, in one pass over the data, beside the loss of the whole
split; draws `OUT/per_class.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F

import lca_posthoc as lca
from lca_posthoc import Loss, Task
from lca_posthoc.demo import Net, digits, train


def task() -> Task:
    training, _ = digits()
    return Task(
        model=Net,
        data={"train": training},
        losses={
            "whole": Loss(F.cross_entropy, on="train"),
            "per_class": Loss(F.cross_entropy, on="train", group_by=lambda images, labels: labels),
        },
    )


def main(out: Path) -> None:
    train(out / "checkpoints")
    run = lca.run(
        out / "checkpoints",
        task(),
        losses=["all"],
        out=out / "run.lca",
        cluster="inline",
        keep="tensors",
        # nothing is refined, so that both losses are measured at the same nodes
        tolerance=float("inf"),
        steps="0:150",
    )
    whole, per_class = run["whole"].tensors["allocated"], run["per_class"].tensors["allocated"]
    images = run["per_class"].tensors["examples"]

    together = (per_class * images).sum("group") / images.sum("group")
    apart = float(abs(together - whole).sum() / abs(whole).sum())
    print(f"classes weighted by their size against the whole split: {apart:.1e} apart")
    assert apart < 1e-9  # Σ n_g / N · A_g = A, to rounding
    assert np.array_equal(per_class["group"], np.arange(10))

    found = lca.findings.layers(run["per_class"])
    lca.plots.layers(found).figure.savefig(out / "per_class.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
