"""Draws the README's picture from a run directory: the loss, and what each layer did to it, over training.

```sh
python docs/examples/layers_picture.py mnist-checkpoints.lca layers.png
```
"""

from __future__ import annotations

import sys

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import lca_posthoc as lca


def layers(allocated: object) -> dict[str, np.ndarray]:
    """Sums per module: a kernel and its bias together, in the model's order."""
    found: dict[str, np.ndarray] = {}
    for name in allocated.tensor.values:
        module = name.rpartition(".")[0]
        found[module] = found.get(module, 0) + allocated.sel(tensor=name).values
    return found


def draw(run: str, picture: str) -> None:
    results = lca.open_run(run)["train"]
    steps = results.steps
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained")
    sums = layers(results.tensors.allocated)
    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"]
    start = float(steps.loss_start[0])
    curve.plot(steps.step, steps.loss_start, color="black", label="loss")
    for (module, values), colour in zip(sums.items(), colours, strict=False):
        curve.plot(steps.step_end, start + np.cumsum(values), color=colour, label=f"start + Σ {module}")
    curve.set(xlabel="training step", ylabel="cross-entropy (nats)", title="Where the loss went, layer by layer")
    curve.legend(frameon=False)
    bars.barh(list(sums), [values.sum() for values in sums.values()], color=colours[: len(sums)])
    bars.invert_yaxis()
    bars.axvline(0, color="black", linewidth=0.8)
    bars.locator_params(axis="x", nbins=4)
    bars.set(xlabel="allocated (nats)", title="Sum over training")
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(*sys.argv[1:3])
