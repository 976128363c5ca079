"""One result file for every network and seed: what is finished is kept and never done again."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from measures import Part
from networks import NETWORKS, Network, Weights


@dataclass(frozen=True)
class Comparison:
    """What was done to some parts of a network, and what each predictor had said of it.

    Comparisons of one `question` are of one kind, such as of layers; `condition` tells them apart
    within a seed. `actual` and the lists of `predicted` have a number for each of `items`: by how
    much the loss rose, or was said to rise.
    """

    question: str
    condition: str
    items: list[str]
    actual: list[float]
    predicted: dict[str, list[float]]


@dataclass(frozen=True)
class Choice:
    """By how much the loss rose where one way to choose was followed."""

    question: str
    chosen_by: str
    rise: float


@dataclass(frozen=True)
class Outcome:
    """What one seed of one network gave in one experiment."""

    loss_start: float
    loss_end: float
    comparisons: list[Comparison] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


Measure = Callable[[Path, str, Network, int], Outcome]


def compared(
    question: str,
    condition: str,
    parts: Iterable[Part],
    act: Callable[[Part], float],
    predicted: dict[str, Weights],
) -> Comparison:
    """Do something to every part, and put what came of it beside what was predicted of it."""
    parts = list(parts)
    return Comparison(
        question,
        condition,
        [part.name for part in parts],
        [act(part) for part in parts],
        {name: [part.sum_of(values) for part in parts] for name, values in predicted.items()},
    )


def result_file(place: Path, experiment: str, network: str, seed: int) -> Path:
    return place / experiment / network / f"seed{seed}.json"


def done(
    place: Path, experiment: str, name: str, network: Network, seed: int, measure: Measure
) -> Path:
    """Do an experiment with one seed, unless its result is there.

    Raises:
        RuntimeError: where `place` holds a result of another size.
    """
    file = result_file(place, experiment, name, seed)
    if file.exists():
        if (size := json.loads(file.read_text())["size"]) != asdict(network.size):
            raise RuntimeError(
                f"{file} is of {size}, not {asdict(network.size)}. Name another PLACE."
            )
        return file
    begun, begun_processor = time.monotonic(), time.process_time()
    outcome = measure(place, name, network, seed)
    spent = {
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(time.process_time() - begun_processor, 1),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".partial")
    result = {"size": asdict(network.size), **spent, **asdict(outcome)}
    unfinished.write_text(json.dumps(result, indent=1))
    unfinished.replace(file)
    return file


def seeds(text: str) -> range:
    """Read "A:B", from A up to but without B."""
    first, _, last = text.partition(":")
    return range(int(first), int(last))


def main(experiment: str, about: str | None, measure: Measure) -> None:
    """Do an experiment with the network and the seeds that the command line names."""
    asked = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("place", type=Path, help="where trainings and results are kept")
    asked.add_argument("--network", choices=NETWORKS, required=True)
    asked.add_argument("--seeds", type=seeds, default="0:5", metavar="A:B")
    asked.add_argument("--steps", type=int, help="train for so many")
    asked.add_argument("--examples", type=int, help="train and measure on so many at most")
    given = asked.parse_args()
    torch.set_num_threads(1)
    network = resized(NETWORKS[given.network], given.steps, given.examples)
    for seed in given.seeds:
        print(done(given.place, experiment, given.network, network, seed, measure), flush=True)


def resized(network: Network, steps: int | None, examples: int | None) -> Network:
    """Return a network that is trained for other steps or on fewer examples."""
    size = network.size
    if steps is not None:
        size = replace(size, steps=steps)
    if examples is not None:
        size = replace(
            size,
            examples=min(size.examples, examples),
            measured=min(size.measured, examples),
            batch=min(size.batch, max(1, examples // 4)),
        )
    return replace(network, size=size)
