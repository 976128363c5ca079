r"""What moved the weights of small networks: how much of what a layer did is signal, how much noise,
how much momentum.

```sh
export LCA_DATA=DIR
python docs/examples/causes.py causes momentum --seeds 5
python docs/examples/causes.py causes hurting --seeds 5
python docs/examples/causes.py causes directions --seeds 5
```

- `momentum`: ResNet-8 on 1,000 images of CIFAR-10, SGD with momentum 0.9, the statistics of each
  batch; the last layer's own momentum m so that m/(1 − m) is 9, 4, 1 and 0 iterations, its step as
  large in the long run. Of its sum over training, how much is of which cause?
- `hurting`: MNIST-FC on 5,000 images. Of the parameters that hurt on an iteration, how many would
  help without the noise of the batch, how many without momentum?
- `directions`: MNIST-FC again. How much of the loss falls along the ten directions in which the
  weights moved most, and how much along ten at random?

Every network is trained, replayed and written to `OUT/NAME/…/seedK.lca`; what is finished is not
done again. Shown are means over seeds and their intervals of 95 % (Student's t). DIR holds
`mnist.safetensors` and `cifar10.safetensors`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lca_posthoc as lca
import mnist_fc
from experiments import MODELS, Model, Setting, optimizer, shown
from lca_posthoc.checkpoints.basis import write_basis

DELAYS = (9, 4, 1, 0)
DIRECTIONS = 10
EVERY = 10  # segments from one that is looked at, parameter by parameter, to the next


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    images: int
    iterates: int
    batch: int


SIZES = {
    "momentum": Size(1000, 60, 100),
    "hurting": Size(5000, 110, 250),
    "directions": Size(5000, 110, 250),
}


# --- training and replaying -----------------------------------------------------------------------


def examples(model: Model, size: Size) -> tuple[Tensor, Tensor]:
    """Return the images and labels a network is trained and measured on."""
    images, labels = model.data()
    return images[: size.images].clone(), labels[: size.images].clone()


def train(place: Path, model: Model, setting: Setting, size: Size, seed: int) -> Path:
    """Train a network and record every iterate, unless that is done."""
    half = place.with_suffix(".partial")
    if not place.exists():
        shutil.rmtree(half, ignore_errors=True)
        torch.manual_seed(seed)
        net = model.net()
        with contextlib.redirect_stdout(io.StringIO()):
            mnist_fc.record(
                half,
                net,
                optimizer(net, setting, model.rate),
                examples(model, size),
                size.iterates,
                size.batch,
            )
        half.rename(place)
    return place


def replay(
    checkpoints: Path, model: Model, size: Size, out: Path, along: Path | None = None
) -> lca.Run:
    """Replay a training with the causes of its motion, or along directions; resume where that was
    begun.
    """
    task = lca.Task(
        model.net,
        {"train": examples(model, size)},
        {"train": lca.Loss(F.cross_entropy, on="train")},
    )
    return lca.run(
        checkpoints,
        task,
        out=out,
        causes=along is None,
        along=along,
        keep="tensors",
        cluster="inline",
        durability="none",  # a power cut costs one short run
        **model.replay,
    )


# --- the experiments ------------------------------------------------------------------------------


def momentum(out: Path, seeds: int, size: Size) -> Iterator[str]:
    """Yield what each cause did to the last layer, for every delay of its momentum."""
    model = MODELS["resnet8"]
    yield f"{'delay':8}{'loss':>22}   last layer: sum and causes"
    for delay in DELAYS:
        causes, losses = [], []
        for seed in range(seeds):
            place = out / f"delay-{delay}" / f"seed{seed}"
            setting = Setting(rate=0.1, batch=size.batch, delay=delay)
            checkpoints = train(place, model, setting, size, seed)
            results = replay(checkpoints, model, size, place.with_suffix(".lca"))["train"]
            allocated = results.causes.allocated.sum("step")
            layers = [str(name).rpartition(".")[0] for name in allocated.tensor.values]
            of_last = allocated.isel(tensor=[layer == "fc" for layer in layers]).sum("tensor")
            causes.append([float(of_last.sum()), *of_last.to_numpy()])
            losses.append(float(results.steps.loss_end[-1]))
        names = ("sum", *of_last.cause.values)
        columns = zip(names, zip(*causes, strict=True), strict=True)
        yield f"{delay:<8}{shown(losses):>22}   " + "  ".join(
            f"{name} {shown(values)}" for name, values in columns
        )


def hurting(out: Path, seeds: int, size: Size) -> Iterator[str]:
    """Yield the shares of parameters that hurt, whole and by the parts of the motion."""
    model, setting = MODELS["fc"], Setting(batch=size.batch)
    of_seeds = []
    for seed in range(seeds):
        checkpoints = train(out / f"seed{seed}", model, setting, size, seed)
        of_seeds.append(shares_hurting(checkpoints, model, size))
    yield "of all parameters that are not exactly 0, every tenth iteration, these hurt:"
    for name in of_seeds[0]:
        yield f"{name:40}{shown([shares[name] for shares in of_seeds], 1, '%')}"


def shares_hurting(checkpoints: Path, model: Model, size: Size) -> dict[str, float]:
    """Return the shares of parameters that hurt with the whole motion and with parts of it, in per
    cent; float64.

    The parts are those of SGD with momentum and no decay: the momentum is 0.9 times the motion
    before, the signal the rate times the gradient over all images, the noise what is left.
    """
    gradient = gradients(model, examples(model, size))
    files = sorted(checkpoints.glob("*.safetensors"))
    counts: dict[str, list[float]] = {}
    for index in range(1, len(files) - 1, EVERY):
        before, start, end = (flat(load_file(file)) for file in files[index - 1 : index + 2])
        signal = -model.rate * gradient(start)
        middle, last = (gradient(start + x * (end - start)) for x in (0.5, 1.0))
        mean = (signal / -model.rate + 4 * middle + last) / 6
        memory = 0.9 * (start - before)
        noise = end - start - memory - signal
        parts = {
            "with the whole motion": end - start,
            "without the noise": signal + memory,
            "without momentum": signal + noise,
            "with the signal alone": signal,
            "with the noise alone": noise,
            "with momentum alone": memory,
        }
        hurts = mean * (end - start) > 0
        for name, part in parts.items():
            helped = mean * part
            counts.setdefault(name, []).append(share(helped > 0, helped != 0))
        for name in ("without the noise", "without momentum"):
            repaired = hurts & (mean * parts[name] < 0)
            counts.setdefault(f"of those that hurt, help {name}", []).append(share(repaired, hurts))
    return {name: float(np.mean(values)) for name, values in counts.items()}


def share(chosen: Tensor, of: Tensor) -> float:
    """Return how many of some parameters are chosen, in per cent."""
    return 100 * float((chosen & of).sum()) / max(1, int(of.sum()))


def gradients(model: Model, data: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function from all weights in a row to the gradient of the loss there, float64."""
    net, images, labels = model.net().double(), data[0].double(), data[1]

    def gradient(weights: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(weights, net.parameters())
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    return gradient


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Return the parameters of MNIST-FC in a row, float64."""
    return torch.cat(
        [tensors[name].flatten() for name, _ in mnist_fc.Net().named_parameters()]
    ).double()


def directions(out: Path, seeds: int, size: Size) -> Iterator[str]:
    """Yield how much of loss and motion lies along the leading directions, and along random ones."""
    model, setting = MODELS["fc"], Setting(batch=size.batch)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        checkpoints = train(out / f"seed{seed}", model, setting, size, seed)
        for name in ("displacements", "random"):
            basis = out / f"seed{seed}-{name}.safetensors"
            if not basis.exists():
                random = DIRECTIONS if name == "random" else None
                count = DIRECTIONS if name == "displacements" else None
                write_basis(
                    checkpoints, basis, directions=count, random=random, say=lambda note: None
                )
            run = replay(checkpoints, model, size, out / f"seed{seed}-{name}.lca", basis)
            along = run["train"].along
            inside, outside = float(along.allocated.sum()), float(along.remainder.sum())
            captured = float((along.motion**2).sum() / (along.distance**2).sum())
            found.setdefault(name, []).append((100 * inside / (inside + outside), 100 * captured))
    for name, shares in found.items():
        of_loss, of_motion = zip(*shares, strict=True)
        yield (
            f"{DIRECTIONS} {name}: {shown(of_motion, 2, '%')} of the squared motion, "
            f"{shown(of_loss, 2, '%')} of what the loss fell by"
        )


EXPERIMENTS = {"momentum": momentum, "hurting": hurting, "directions": directions}


def main(arguments: Iterable[str] | None = None) -> None:
    """Do one of the experiments, and print what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(None if arguments is None else list(arguments))
    place = options.out / options.name
    place.mkdir(parents=True, exist_ok=True)
    for line in EXPERIMENTS[options.name](place, options.seeds, SIZES[options.name]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
