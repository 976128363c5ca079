"""Which images of MNIST were forgotten again while MNIST-FC learned, and which layer did it.

```sh
LCA_DATA=DIR python docs/examples/mnist_forgotten.py OUT [ITERATES]
```

DIR holds `mnist.safetensors`. Trains for 220 iterates by default, as `mnist_fc.py` does, keeps the
loss of each of the first 2,000 training images, and draws `OUT/forgotten.png`: of the images whose
loss had come down, those that ended furthest above their lowest loss, and what each layer added
since then.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

import lca_posthoc as lca
import mnist_fc
from lca_posthoc import Loss, Task

KEPT = 2_000
SHOWN = 8


def said(images: Tensor, labels: Tensor) -> list[str]:
    """What reports show of an image."""
    return [f"a {label}" for label in labels.tolist()]


def task() -> Task:
    """Cross-entropy of the first 2,000 training images, each by itself."""
    images, labels = mnist_fc.data()
    return Task(
        model=mnist_fc.Net,
        data={"train": (images[:KEPT], labels[:KEPT])},
        losses={"probe": Loss(F.cross_entropy, on="train", per="example")},
        show={"train": said},
    )


def draw(found: xr.Dataset, worst: np.ndarray, images: Tensor, path: Path) -> None:
    """Draw the images, and under each what every layer added to its loss since it was lowest."""
    figure, axes = plt.subplots(
        2, len(worst), figsize=(1.3 * len(worst), 3.2), height_ratios=(1, 1.2), layout="constrained"
    )
    layers = [str(layer) for layer in found["layer"].values]
    since = found["since_lowest"].isel(example=worst).values
    bound = 1.05 * np.abs(since).max()
    for column, position in enumerate(worst):
        one = found.isel(example=position)
        axes[0, column].imshow(images[int(one["example"])].reshape(28, 28), cmap="gray_r")
        axes[0, column].set_title(
            f"no. {int(one['example'])}, {one['example_text'].item()}\n"
            f"{float(one['loss_lowest']):.2f} → {float(one['loss_end']):.2f}",
            fontsize=7,
        )
        axes[0, column].axis("off")
        colours = ["#d9572b" if value > 0 else "#0f8b8d" for value in since[column]]
        axes[1, column].barh(layers, since[column], color=colours)
        axes[1, column].set_xlim(-bound, bound)
        axes[1, column].tick_params(labelsize=7, labelleft=column == 0)
        axes[1, column].axvline(0, color="black", linewidth=0.5)
    figure.supxlabel("added to the loss of the image since it was lowest", fontsize=8)
    figure.savefig(path, dpi=150)


def main(out: Path, iterates: int = mnist_fc.ITERATES) -> None:
    """Train, replay, and show which images were forgotten."""
    mnist_fc.train(str(out / "checkpoints"), iterates)
    run = lca.run(
        out / "checkpoints", task(), out=out / "run.lca", cluster="inline", keep="tensors"
    )
    probe = run["probe"]
    found = lca.findings.examples(probe)
    forgotten = found["story_example"].values[found["story_kind"].values == "most forgotten"]
    worst = found.indexes["example"].get_indexer(forgotten[:SHOWN])
    layers = [str(layer) for layer in found["layer"].values]
    print(f"{'image':>7} {'digit':>6} {'lowest':>7} {'end':>7}  since then, by layer")
    for position in worst:
        one = found.isel(example=position)
        by_layer = zip(layers, one["since_lowest"].values, strict=True)
        print(
            f"{int(one['example']):7d} {one['example_text'].item():>6} "
            f"{float(one['loss_lowest']):7.2f} {float(one['loss_end']):7.2f}  "
            + ", ".join(f"{layer} {value:+.2f}" for layer, value in by_layer)
        )
    most = layers[int(np.argmax(found["forgot_most"].values))]
    fates = dict(zip(found["fate_name"].values, found["fates"].values.tolist(), strict=True))
    print(f"of {KEPT:,} images: {fates}; it was {most} that did most of it most often")

    # what is kept of every image closes on its own loss, and on the loss of all of them
    examples = probe.examples
    change = examples["loss_end"] - examples["loss_start"]
    apart = abs(examples["allocated"].sum("tensor") + examples["residual"] - change)
    assert float(apart.max()) < 1e-5
    mean = examples["allocated"].astype("float64").mean("example")
    assert np.allclose(mean, probe.tensors["allocated"], atol=1e-7)
    images, _ = mnist_fc.data()
    draw(found, worst, images, out / "forgotten.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
