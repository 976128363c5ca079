"""What recording every step costs training, and whether training that is killed leaves whole files.

```sh
LCA_DATA=DIR python tests/benchmarks/recorder.py [--rounds 5] [--device cpu] [--json FILE]
python tests/benchmarks/recorder.py --kills 50
```

Three networks with SGD and momentum: the demo's 64-50-20-10 on digits (batches of 50, 300 steps),
LeNet on MNIST (batches of 250), ResNet-20 on CIFAR-10 (batches of 128). For each: no recording;
`Recorder.attach`; and the loop people write, `save_file` of a copied `state_dict` after every step.
They alternate, in another order each round; a time is that of all steps and of closing; shown are
medians, of ratios too. Torch has its default number of threads.

`writer` is the CPU time of the recorder's thread and `copy` the time to copy the weights into
memory, both for each step; `stall` is what `save` took beyond the copy (median and 99th of 100 of
all saves), waiting for a slow disk included.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lca_posthoc import Recorder, demo
from lca_posthoc.recording import recorder as recording

sys.path[:0] = [
    str(Path(__file__).parents[2]),
    str(Path(__file__).parents[2] / "docs" / "examples"),
]

NAME = "lca-recorder"


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
    training: Training, data: tuple[Tensor, Tensor], device: str, how: str, place: Path
) -> dict[str, float]:
    """Seconds a step of one training; where it is recorded also what the writer took."""
    torch.manual_seed(0)
    model, steps = training.model().to(device), training.steps[device]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
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
    if how == "recorder":
        with Recorder(place, model).attach(optimizer) as recorder:
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
    size = sum(file.stat().st_size for file in place.iterdir())
    return {
        "step": seconds / steps,
        "writer": written / steps,
        "bytes": size / max(1, len(list(place.iterdir()))),
    }


def stalls(
    training: Training, data: tuple[Tensor, Tensor], device: str, place: Path
) -> tuple[list[float], list[float]]:
    """Seconds to copy, and seconds `save` took beyond the copy, of every save but the first."""
    copies, saves = [], []
    stage, save = recording.Stager.stage, Recorder.save

    def staged(*given: Any) -> None:
        began = time.perf_counter()
        stage(*given)
        copies.append(time.perf_counter() - began)

    def saved(*given: Any) -> None:
        began = time.perf_counter()
        save(*given)
        saves.append(time.perf_counter() - began)

    with (
        mock.patch.object(recording.Stager, "stage", staged),
        mock.patch.object(Recorder, "save", saved),
    ):
        train(training, data, device, "recorder", place)
    return copies[1:], [whole - copy for whole, copy in zip(saves[1:], copies[1:], strict=True)]


def measure(training: Training, device: str, rounds: int, work: Path) -> dict[str, Any]:
    """Medians over the rounds."""
    inputs, targets = training.data()
    data = inputs.to(device), targets.to(device)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    contestants = ["plain", "recorder", "save_file"]
    for number in range(rounds):
        for how in contestants[number % 3 :] + contestants[: number % 3]:
            found[how].append(train(training, data, device, how, work / how))
            shutil.rmtree(work / how)
    copies, beyond = stalls(training, data, device, work / "stalls")
    shutil.rmtree(work / "stalls")
    times = {how: [each["step"] for each in rows] for how, rows in found.items()}
    ratios = {
        how: [a / b for a, b in zip(times[how], times["plain"], strict=True)] for how in times
    }
    beyond.sort()
    return {
        "bytes": found["recorder"][0]["bytes"],
        "steps": training.steps[device],
        "seconds a step": {how: statistics.median(each) for how, each in times.items()},
        "ratio": {
            how: [statistics.median(each), min(each), max(each)] for how, each in ratios.items()
        },
        "writer": statistics.median(each["writer"] for each in found["recorder"]),
        "copy": statistics.median(copies),
        "stall": [statistics.median(beyond), beyond[int(len(beyond) * 0.99)]],
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
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
        print(f"{os.cpu_count()} cores, torch {torch.__version__}, {given.device}")
        print(
            "| network | file | ms a step | recorded | save_file in the loop | writer's CPU | copy "
            "| stall, 99th of 100 |"
        )
        print("|---|---|---|---|---|---|---|---|")
        found = {}
        for name, training in TRAININGS.items():
            each = found[name] = measure(training, given.device, given.rounds, Path(made))
            ratios = [
                "{:.3f} ({:.3f} to {:.3f})".format(*each["ratio"][how])
                for how in ("recorder", "save_file")
            ]
            milliseconds = [1000 * part for part in (each["writer"], each["copy"], *each["stall"])]
            shown = "{:.2f} ms | {:.2f} ms | {:.2f}, {:.2f} ms".format(*milliseconds)
            plain = 1000 * each["seconds a step"]["plain"]
            print(
                f"| {name} | {each['bytes'] / 1e6:.2f} MB | {plain:.2f} | {' | '.join(ratios)} | "
                f"{shown} |",
                flush=True,
            )
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
