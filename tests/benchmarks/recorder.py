"""What recording every step costs training, and whether training that is killed leaves whole files.

```sh
LCA_DATA=DIR python tests/benchmarks/recorder.py [--rounds 5] [--device cpu] [--optimizer sgd] [--network NAME] [--json FILE]
python tests/benchmarks/recorder.py --kills 50
```

Three networks: the demo's 64-50-20-10 on digits (batches of 50), LeNet on MNIST (batches of 250),
ResNet-20 on CIFAR-10 (batches of 128); with SGD and momentum, or AdamW. For each: no recording;
iterates alone; `Recorder.attach` with scalars; with moments; and the loop people write, `save_file`
of a copied `state_dict` after every step. They alternate, in another order each round; a time is
that of all steps and of closing; shown are medians, of ratios too. Torch has its default number of
threads.

`writer` is the CPU time of the recorder's thread, `copy` the time to copy weights (and moments) into
memory and `numbers` that to take down the optimiser's, each for one step; `stall` is what a save
took beyond the copy and the numbers (median and 99th of 100), waiting for a slow disk included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lca_posthoc import Recorder, demo
from lca_posthoc.recording.optimizer_numbers import StepNumbers
from lca_posthoc.recording.staging import Stager

sys.path[:0] = [
    str(Path(__file__).parents[2]),
    str(Path(__file__).parents[2] / "docs" / "examples"),
]

NAME = "lca-recorder"
CONTESTANTS = ("plain", "iterates", "scalars", "moments", "save_file")
RECORDED = ("iterates", "scalars", "moments")
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.001),
}


@dataclass(frozen=True)
class Training:
    """A network, its data, and how many steps are timed."""

    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    steps: dict[str, int]


def lenet() -> nn.Module:
    import mnist_lenet

    return mnist_lenet.Net()


def mnist() -> tuple[Tensor, Tensor]:
    import mnist_fc

    return mnist_fc.data()


def resnet20() -> nn.Module:
    import cifar10_resnet20

    return cifar10_resnet20.Net()


def cifar10() -> tuple[Tensor, Tensor]:
    import cifar10_resnet20

    return cifar10_resnet20.data()


TRAININGS = {
    "digits, 64-50-20-10": Training(
        demo.Net, lambda: demo.digits()[0], 50, {"cpu": 2000, "cuda": 2000}
    ),
    "MNIST-LeNet": Training(lenet, mnist, 250, {"cpu": 60, "cuda": 2000}),
    "ResNet-20": Training(resnet20, cifar10, 128, {"cpu": 12, "cuda": 500}),
}


def thread_seconds() -> float:
    """CPU time of the recorder's thread so far."""
    for thread in threading.enumerate():
        if thread.name == NAME and thread.native_id is not None:
            fields = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()
            return int(fields[0]) / 1e9
    return 0.0


def train(
    training: Training,
    data: tuple[Tensor, Tensor],
    device: str,
    optimizer_name: str,
    how: str,
    place: Path,
) -> dict[str, float]:
    """Seconds a step of one training; where it is recorded also what the writer took."""
    torch.manual_seed(0)
    model, steps = training.model().to(device), training.steps[device]
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    inputs, targets = data
    written = 0.0

    def step(number: int) -> None:
        at = number * training.batch % (len(inputs) - training.batch)
        optimizer.zero_grad()
        F.cross_entropy(
            model(inputs[at : at + training.batch]), targets[at : at + training.batch]
        ).backward()
        optimizer.step()

    for number in range(3):
        step(number)
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    if how in RECORDED:
        with Recorder(place, model) as recorder:
            recorder.attach(optimizer, save="moments" if how == "moments" else "scalars")
            if how == "iterates":
                recorder._end_following()
            for number in range(steps):
                step(number)
            recorder.flush()
            written = thread_seconds()
    else:
        place.mkdir()
        for number in range(steps):
            step(number)
            if how == "save_file":
                tensors = {
                    name: each.detach().cpu().clone() for name, each in model.state_dict().items()
                }
                save_file(tensors, place / f"step_{number:08d}.safetensors")
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    files = [file for file in place.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return {
        "step": seconds / steps,
        "writer": written / steps,
        "bytes": size / max(1, sum(file.parent == place for file in files)),
    }


def stalls(
    training: Training,
    data: tuple[Tensor, Tensor],
    device: str,
    optimizer_name: str,
    how: str,
    place: Path,
) -> dict[str, Any]:
    """Seconds of every save but the first to copy, to take down numbers, and beyond these."""
    spent: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object, **options: object) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            parts[name] += time.perf_counter() - began
            return result

        return call

    save = Recorder._save

    def saved(*arguments: Any) -> None:
        before = dict(parts)  # of the numbers that were taken down when the step began
        began = time.perf_counter()
        save(*arguments)
        whole = time.perf_counter() - began
        inside = sum(parts.values()) - sum(before.values())
        spent["beyond"].append(whole - inside)
        for name in ("copy", "numbers"):
            spent[name].append(parts[name])
        parts.clear()

    with (
        mock.patch.object(Stager, "stage", timed("copy", Stager.stage)),
        mock.patch.object(StepNumbers, "begin", timed("numbers", StepNumbers.begin)),
        mock.patch.object(StepNumbers, "take", timed("numbers", StepNumbers.take)),
        mock.patch.object(StepNumbers, "moments", timed("numbers", StepNumbers.moments)),
        mock.patch.object(StepNumbers, "forget", timed("numbers", StepNumbers.forget)),
        mock.patch.object(Recorder, "_save", saved),
    ):
        train(training, data, device, optimizer_name, how, place)
    beyond = sorted(spent["beyond"][1:])
    return {
        "copy": statistics.median(spent["copy"][1:]),
        "numbers": statistics.median(spent["numbers"][1:]),
        "stall": [statistics.median(beyond), beyond[int(len(beyond) * 0.99)]],
    }


def measure(
    training: Training, device: str, optimizer_name: str, rounds: int, work: Path
) -> dict[str, Any]:
    """Medians over the rounds."""
    inputs, targets = training.data()
    data = inputs.to(device), targets.to(device)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds):
        turn = number % len(CONTESTANTS)
        for how in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
            found[how].append(train(training, data, device, optimizer_name, how, work / how))
            shutil.rmtree(work / how)
    parts = {}
    for how in RECORDED:
        parts[how] = stalls(training, data, device, optimizer_name, how, work / "stalls")
        shutil.rmtree(work / "stalls")
    times = {how: [each["step"] for each in rows] for how, rows in found.items()}
    ratios = {
        how: [a / b for a, b in zip(times[how], times["plain"], strict=True)] for how in times
    }
    ratios["scalars over iterates"] = [
        a / b for a, b in zip(times["scalars"], times["iterates"], strict=True)
    ]
    return {
        "steps": training.steps[device],
        "seconds a step": {how: statistics.median(each) for how, each in times.items()},
        "ratio": {
            how: [statistics.median(each), min(each), max(each)] for how, each in ratios.items()
        },
        "bytes": {how: found[how][0]["bytes"] for how in RECORDED},
        "writer": {how: statistics.median(row["writer"] for row in found[how]) for how in RECORDED},
        "parts": parts,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS], default="sgd")
    parser.add_argument("--network", choices=[*TRAININGS], help="this one alone")
    parser.add_argument(
        "--steps", type=int, help="of each training; by default as many as are timed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured")
    parser.add_argument(
        "--kills", type=int, metavar="N", help="instead: kill -9 a training N times"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as made:
        if given.kills:
            from tests.recording.test_recorder_resumed import kill_again_and_again

            whole = kill_again_and_again(Path(made).resolve() / "killed", given.kills)
            print(f"{given.kills} kills: {whole} files, each whole, without a hole")
            return
        print(
            f"{os.cpu_count()} cores, torch {torch.__version__}, {given.device}, {given.optimizer}"
        )
        print(
            "| network, ms a step | kept | bytes an iterate | over no recording | writer's CPU | "
            "copy | numbers | stall, 99th of 100 |"
        )
        print("|---|---|---|---|---|---|---|---|")
        found = {}
        for name, training in TRAININGS.items():
            if given.network not in (None, name):
                continue
            if given.steps is not None:
                training = replace(training, steps={given.device: given.steps})
            each = found[name] = measure(
                training, given.device, given.optimizer, given.rounds, Path(made)
            )
            plain = 1000 * each["seconds a step"]["plain"]
            for how in RECORDED:
                part = each["parts"][how]
                times = (each["writer"][how], part["copy"], part["numbers"], *part["stall"])
                print(
                    f"| {name}, {plain:.2f} | {how} | {each['bytes'][how]:,.0f} | "
                    "{:.3f} ({:.3f} to {:.3f})".format(*each["ratio"][how])
                    + " | {:.3f} ms | {:.3f} ms | {:.3f} ms | {:.3f}, {:.3f} ms |".format(
                        *(1000 * seconds for seconds in times)
                    ),
                    flush=True,
                )
            for how in ("save_file", "scalars over iterates"):
                print(
                    f"| {name} | {how} | | {{:.3f}} ({{:.3f}} to {{:.3f}}) | | | | |".format(
                        *each["ratio"][how]
                    ),
                    flush=True,
                )
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
