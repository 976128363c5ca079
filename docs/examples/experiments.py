r"""The paper's experiments, run against run, at CPU size: what a layer does when one thing about
training is changed.

```sh
LCA_DATA=DIR python docs/examples/experiments.py experiments freeze --seeds 10
LCA_DATA=DIR python docs/examples/experiments.py resnet freeze --seeds 3 --causes \
    --model resnet20 --images 10000 --iterates 1000 --segments 0.05@7 --subset 0.25@1
```

Every setting is trained from the same seeds, replayed, and written to `OUT/NAME/SETTING/seedK.lca`;
its checkpoints are deleted then. What is finished is not done again, so a seed more is the same
command with a larger number. The second line is nearer to the paper's size: it replays a random
twentieth of the segments on a random quarter of the images, whose errors the table has, and says which
cause moved the first and the last layer. DIR holds `mnist.safetensors` and, for ResNets,
`cifar10.safetensors`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from scipy import stats
from torch import Tensor, nn

import cifar10_resnet20
import lca_posthoc as lca
import mnist_fc
import mnist_lenet

MOMENTUM = 0.9
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=MOMENTUM),
    "Adam": torch.optim.Adam,
    "RMSProp": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class Model:
    """What is trained, on which examples, and how its replay is to treat normalisations."""

    net: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    rate: float = 0.05
    replay: Mapping[str, Any] = field(default_factory=dict)


BATCH_STATISTICS = {"norm_stats": "batch", "batch_size": 500}
MODELS = {
    "fc": Model(mnist_fc.Net, mnist_fc.data),
    "lenet": Model(mnist_lenet.Net, mnist_fc.data),
    "resnet8": Model(
        partial(cifar10_resnet20.Net, (8, 16, 32), 1), cifar10_resnet20.data, 0.1, BATCH_STATISTICS
    ),
    "resnet20": Model(
        cifar10_resnet20.Net,
        cifar10_resnet20.data,
        0.1,
        # batches of training's own size
        BATCH_STATISTICS | {"batch_size": 250, "tolerance": 0.01},
    ),
}


@dataclass(frozen=True)
class Setting:
    """How one network is trained.

    `rate` is the learning rate, where it is not the model's own. `frozen` is the layer that stays as
    it was initialised, "first" or "last". `delay` gives the last layer a momentum m of its own,
    m/(1 − m) = delay iterations; its learning rate is scaled to keep rate/(1 − m), so that its steps
    come later, not smaller.
    """

    optimizer: str = "momentum"
    rate: float | None = None
    batch: int = 250
    frozen: str | None = None
    delay: int | None = None


EXPERIMENTS: dict[str, dict[str, Setting]] = {
    "freeze": {"none": Setting(), "first": Setting(frozen="first"), "last": Setting(frozen="last")},
    "momentum": {f"delay-{delay}": Setting(delay=delay) for delay in range(9, -1, -1)},
    "learning-rate": {f"rate-{rate}": Setting(rate=rate) for rate in (0.01, 0.02, 0.05, 0.1)},
    "batch-size": {f"batch-{batch}": Setting(batch=batch) for batch in (50, 100, 250, 1000)},
    "optimiser": {
        "SGD": Setting("SGD", rate=0.1),
        "momentum": Setting(),
        "Adam": Setting("Adam", rate=0.001),
        "RMSProp": Setting("RMSProp", rate=0.001),
    },
}


@dataclass(frozen=True)
class Size:
    """How much is trained and measured: the same for every run of an experiment.

    `segments` and `subset` are random parts, as of `lca run`; `causes` tells what moved the weights.
    """

    model: str = "fc"
    images: int = 2500
    iterates: int = 110
    segments: str | None = None
    subset: str | None = None
    causes: bool = False


def optimizer(net: nn.Module, setting: Setting, rate: float) -> torch.optim.Optimizer:
    """Return the optimiser of a setting, with the learning rate `rate` where it has none."""
    rate = rate if setting.rate is None else setting.rate
    layers = [each for each in net.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    first, last = layers[0], layers[-1]
    if setting.frozen:
        {"first": first, "last": last}[setting.frozen].requires_grad_(False)
    make = OPTIMIZERS[setting.optimizer]
    if setting.delay is None:
        return make([each for each in net.parameters() if each.requires_grad], lr=rate)
    own = list(last.parameters())
    others = [each for each in net.parameters() if all(each is not mine for mine in own)]
    momentum = setting.delay / (1 + setting.delay)
    own_rate = rate * (1 - momentum) / (1 - MOMENTUM)
    return make(
        [{"params": others}, {"params": own, "momentum": momentum, "lr": own_rate}], lr=rate
    )


def one(
    place: Path, setting: Setting, seed: int, size: Size, examples: tuple[Tensor, Tensor]
) -> lca.Run:
    """Train and replay one network, or open it where it is finished."""
    out, checkpoints, half = (place / f"seed{seed}{end}" for end in (".lca", "", ".partial"))
    if out.exists() and not checkpoints.exists():
        return lca.open_run(out)
    model = MODELS[size.model]
    if not checkpoints.exists():
        shutil.rmtree(half, ignore_errors=True)
        torch.manual_seed(seed)
        net = model.net()
        with contextlib.redirect_stdout(io.StringIO()):
            mnist_fc.record(
                half,
                net,
                optimizer(net, setting, model.rate),
                examples,
                size.iterates,
                setting.batch,
            )
        half.rename(checkpoints)
    task = lca.Task(
        model.net, {"train": examples}, {"train": lca.Loss(F.cross_entropy, on="train")}
    )
    # a power cut costs one short run
    where = {"out": out, "cluster": "inline", "durability": "none"}
    run = lca.run(
        checkpoints,
        task,
        keep="statistics" if size.segments is None else "tensors",
        segments=size.segments,
        subset=[] if size.subset is None else [f"train={size.subset}"],
        causes=size.causes,
        **where,
        **model.replay,
    )
    shutil.rmtree(checkpoints)
    return run


def experiment(
    out: Path, name: str, size: Size, seeds: int, settings: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """The training loss of every setting, or of some, a run per seed.

    Raises:
        RuntimeError: where `out` holds runs of another size.
    """
    place = out / name
    place.mkdir(parents=True, exist_ok=True)
    recorded = place / "size.json"
    if not recorded.exists():
        recorded.write_text(json.dumps(vars(size)))
    if json.loads(recorded.read_text()) != vars(size):
        raise RuntimeError(
            f"{place} holds runs of {recorded.read_text()}, not {json.dumps(vars(size))}. Name "
            "another OUT."
        )
    images, labels = MODELS[size.model].data()
    # a view would take all images along
    examples = images[: size.images].clone(), labels[: size.images].clone()
    found: dict[str, list[Any]] = {label: [] for label in settings or EXPERIMENTS[name]}
    for seed in range(seeds):
        for label in found:
            setting = EXPERIMENTS[name][label]
            found[label].append(one(place / label, setting, seed, size, examples)["train"])
            print(
                f"{name}, {label}, seed {seed}: loss "
                f"{float(found[label][-1].steps.loss_end[-1]):.4f}",
                flush=True,
            )
    return found


def table(found: xr.Dataset) -> str:
    """A line for each setting, then for each layer and setting; p-values of layers after Holm,
    others as they are.
    """
    first = found.label.values[0]
    rows = [f"{'':14}runs   {'helping':>7}   {'final loss':28}   p against {first}"]
    for label in found.label.values:
        each = found.sel(label=label)
        helping = f"{float(each.helping):7.2%}" if "helping" in each else "–"
        row = f"{label:14}{int(each.runs):4}   {helping:>7}   {interval(each, 'loss_end')}"
        rows.append(f"{row}   {probability(each.p_loss_end)}")
    rows += ["", f"{'layer':14}{'':14}{'allocated':28}   p against 0   p against {first}"]
    for layer in found.layer.values:
        for label in found.label.values:
            each = found.sel(label=label, layer=layer)
            tests = f"{probability(each.p_holm):11}   {probability(each.p_difference_holm)}"
            rows.append(f"{layer:14}{label:14}{interval(each, 'mean')}   {tests}")
    return "\n".join(rows)


def table_of_causes(runs: Mapping[str, list[Any]]) -> str:
    """A line for each setting, of the first and of the last layer, and each cause: the mean over
    seeds with its interval, and in brackets each seed's own error.
    """
    rows = [f"{'layer':14}{'':14}{'cause':10}{'mean ± interval':18} (errors)"]
    for label, results in runs.items():
        found = [lca.findings.causes(each) for each in results]
        trained = found[0].layer.values[found[0].kind.values == "parameter"]
        for layer in (trained[0], trained[-1]):
            of_layer = [each.sel(layer=layer) for each in found]
            numbers = {
                str(cause): [
                    (one.total.sel(cause=cause), one.error.sel(cause=cause)) for one in of_layer
                ]
                for cause in found[0].cause.values
            }
            numbers["all"] = [(one.layer_total, one.layer_error) for one in of_layer]
            for cause, of_seeds in numbers.items():
                own = ", ".join(f"{float(error):.3f}" for _, error in of_seeds)
                mean = shown([float(total) for total, _ in of_seeds], 4)
                rows.append(f"{layer:14}{label:14}{cause:10}{mean:18} ({own})")
    return "\n".join(rows)


def shown(values: Sequence[float], digits: int = 3, unit: str = "") -> str:
    """Return a mean and its interval of 95 % over seeds, where there are several."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.{digits}f}{unit}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:+.{digits}f}{unit} ± {half:.{digits}f}"


def interval(each: xr.Dataset, name: str) -> str:
    low, high = ("low", "high") if name == "mean" else (f"{name}_low", f"{name}_high")
    return f"{float(each[name]):+.4f} ({float(each[low]):+.4f} to {float(each[high]):+.4f})"


def probability(p: xr.DataArray) -> str:
    return "–" if p.isnull() else f"{float(p):.2g}"


def main() -> None:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("out", type=Path)
    asked.add_argument("name", choices=EXPERIMENTS)
    asked.add_argument("--seeds", type=int, default=5)
    asked.add_argument("--settings", nargs="+", default=(), help="some of them; by default all")
    asked.add_argument("--model", choices=MODELS, default=Size.model)
    asked.add_argument("--images", type=int, default=Size.images)
    asked.add_argument("--iterates", type=int, default=Size.iterates)
    asked.add_argument("--segments", metavar="SHARE@SEED", help="a random part of the segments")
    asked.add_argument("--subset", metavar="SHARE@SEED", help="a random part of the images")
    asked.add_argument("--causes", action="store_true", help="what moved the weights")
    given = asked.parse_args()
    if unknown := set(given.settings) - EXPERIMENTS[given.name].keys():
        asked.error(f"{given.name} has no setting {', '.join(sorted(unknown))}")
    size = Size(
        given.model, given.images, given.iterates, given.segments, given.subset, given.causes
    )
    runs = experiment(given.out, given.name, size, given.seeds, given.settings)
    print(table(lca.findings.compare(runs)))
    if size.causes:
        print("", table_of_causes(runs), sep="\n")


if __name__ == "__main__":
    main()
