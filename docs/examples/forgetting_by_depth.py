r"""Redo a published claim at the size of a small transformer: do the deeper layers do the forgetting?

```sh
LCA_DATA=DIR python docs/examples/forgetting_by_depth.py OUT --seeds 0:5
```

Ramasesh, Dyer and Raghu (ICLR 2021, "Anatomy of Catastrophic Forgetting") find that "deeper layers
are disproportionately the source of forgetting". A transformer of four equal blocks learns one text
of Shakespeare, then a second one. Every iterate of the second training is recorded and replayed,
and the rise of the loss on the first text is allocated to the depths of the network: embedding,
four blocks, readout. Beside it, each depth is put back to where it was before the second text, and
each depth is moved alone.

There are four settings. The second text is "reversed", the passages of the first text back to
front: the same characters in other sequences. Or it is "later", passages of other plays: a mild
shift. The second training goes by AdamW, whose steps are of about the same size everywhere, or by
SGD with momentum, whose steps are as large as the gradient.

Stated before the first run:

- What is compared are the upper two blocks with the lower two, which have as many parameters. The
  embedding and the readout stand beside them: the claim is about hidden layers.
- A setting *confirms* the claim where the upper two caused surely more of the forgetting than the
  lower two, by their allocation and by putting them back. It *refutes* the claim where they caused
  surely less by both. Otherwise it leaves the claim *open*. "Surely": the interval of 95 % over
  seeds does not hold 0.
- The claim is confirmed here if all four settings confirm it, and refuted if all refute it.

What is finished lies in `OUT/SETTING/seedK.json`, beside its run, and is not done again. Writes
`OUT/tables.md` and `OUT/forgetting_by_depth.png`. DIR holds `tinyshakespeare.txt` of
karpathy/char-rnn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from math import isnan
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lca_posthoc as lca
from shakespeare_tokens import WIDTH, Block, next_character, text
from validation.agreement import Estimate, mean_over_seeds, rank_correlation

Weights = dict[str, Tensor]
Stored = dict[str, Any]  # one result file
Batch = tuple[Tensor, Tensor]

LENGTH = 32  # characters of a passage
BLOCKS = 4
DEPTHS = ("embedding", *(f"block {number}" for number in range(1, BLOCKS + 1)), "readout")
HALVES = {
    "blocks": {"lower": (1, 2), "upper": (3, 4)},
    "all depths": {"lower": (0, 1, 2), "upper": (3, 4, 5)},
}
CHARACTERS = 400_000  # at the beginning and at the end of the text: other plays
EVERY = 10  # one passage of the first text in so many is held out
TEXTS = ("reversed", "later")
FIRST_RATE = 2e-3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
SETTINGS = {f"{text}-{name}": (text, name) for text in TEXTS for name in OPTIMIZERS}
WAYS = {
    "allocated": "its allocation",
    "put_back": "putting it back",
    "alone": "moving it alone",
    "both": "mean of both",
}
CAUSES = ("signal", "noise", "momentum", "decay", "rest")


@dataclass(frozen=True)
class Size:
    """How many steps are made on the first and on the second text, with how many passages a batch,
    on how many passages of the second text, and on how many of the first one its loss is measured.
    """

    first: int = 600
    second: int = 60
    batch: int = 32
    passages: int = 256
    measured: int = 64


# --- the network and its texts --------------------------------------------------------------------


class Embedding(nn.Module):
    """Adds the vectors of characters and of their places."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(65, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.characters(ids) + self.places.weight


class Readout(nn.Module):
    """Scores the next of 65 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 65)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def build() -> nn.Sequential:
    """Return the network: the first part of a parameter's name is its depth."""
    return nn.Sequential(Embedding(), *(Block() for _ in range(BLOCKS)), Readout())


@cache
def passages() -> tuple[Tensor, Tensor]:
    """Return passages of the first plays and of the last ones, (N, LENGTH + 1)."""
    whole = text()
    code = {character: number for number, character in enumerate(sorted(set(whole)))}
    return tuple(
        torch.tensor([code[character] for character in part])
        .unfold(0, LENGTH + 1, LENGTH + 1)
        .clone()
        for part in (whole[:CHARACTERS], whole[-CHARACTERS:])
    )


@dataclass(frozen=True)
class Texts:
    """Passages to learn first, held-out passages of the same plays, and passages to learn second."""

    first: Tensor
    held_out: Tensor
    second: Mapping[str, Tensor]


def texts(size: Size, seed: int) -> Texts:
    """Return the passages of a seed; it draws those that are measured and those that come second."""
    plays, later = passages()
    draw = torch.Generator().manual_seed(seed)

    def drawn(among: Tensor, count: int) -> Tensor:
        return among[torch.randperm(len(among), generator=draw)[:count]]

    learned = torch.arange(len(plays)) % EVERY != 0
    first = plays[learned]
    return Texts(
        first,
        drawn(plays[~learned], size.measured),
        {"reversed": drawn(first, size.passages).flip(1), "later": drawn(later, size.passages)},
    )


def as_batch(rows: Tensor) -> Batch:
    """Return characters and the character after each."""
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return next_character(model, as_batch(rows)).mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, steps: int, batch: int
) -> None:
    for _ in range(steps):
        chosen = rows[torch.randint(len(rows), (batch,))]
        optimizer.zero_grad()
        loss_of(model, chosen).backward()
        optimizer.step()


# --- one seed of one setting ----------------------------------------------------------------------


def first_training(place: Path, size: Size, seed: int) -> Weights:
    """Return the weights after the first text; all settings of a seed begin with them."""
    file = place / "first" / f"seed{seed}.safetensors"
    if not file.exists():
        torch.manual_seed(seed)
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=FIRST_RATE)
        train(model, optimizer, texts(size, seed).first, size.first, size.batch)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".partial")
        save_file(model.state_dict(), unfinished)
        unfinished.replace(file)
    return load_file(file)


def second_training(
    place: Path, start: Weights, rows: Tensor, optimizer: str, size: Size, seed: int
) -> Path:
    """Train on the second text and record every iterate, unless that is done."""
    unfinished = place.with_name(f"{place.name}.partial")
    if not place.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        torch.manual_seed(seed)
        model = build()
        model.load_state_dict(start)
        going_down = OPTIMIZERS[optimizer](model.parameters())
        with lca.Recorder(unfinished, model) as recorder:
            recorder.attach(going_down, save="moments")
            train(model, going_down, rows, size.second, size.batch)
        unfinished.rename(place)
    return place


def replayed(checkpoints: Path, held_out: Tensor, second: Tensor) -> lca.Run:
    """Replay the second training: the loss of each held-out passage of the first text, and the loss
    that was trained, whose gradient is the signal.
    """
    task = lca.Task(
        build,
        {"first": as_batch(held_out), "second": as_batch(second)},
        {
            "first": lca.Loss(call=next_character, on="first", per="example"),
            "second": lca.Loss(call=next_character, on="second"),
        },
    )
    return lca.run(
        checkpoints,
        task,
        losses=["first", "second"],
        out=checkpoints.with_name(f"{checkpoints.name}.lca"),
        causes=True,
        signal="second",
        keep="tensors",
        rule="trapezoid",
        tolerance=float("inf"),
        cluster="inline",
        device="cpu",
        durability="none",  # a power cut costs one short run
        progress=lambda event: None,
    )


def mixed(weights: Weights, others: Weights, depths: Iterable[int]) -> Weights:
    """Return weights whose parameters at some depths are from elsewhere."""
    chosen = tuple(f"{depth}." for depth in depths)
    return {
        name: others[name] if name.startswith(chosen) else value for name, value in weights.items()
    }


def interventions(
    value: Callable[[Weights], float], before: Weights, after: Weights, depths: Sequence[int]
) -> dict[str, float]:
    """Return by how much a loss falls where some depths are put back from `after` to `before`, and
    by how much it rises where they alone are moved from `before` to `after`.
    """
    return {
        "put_back": value(after) - value(mixed(after, before, depths)),
        "alone": value(mixed(before, after, depths)) - value(before),
    }


def measured(run: lca.Run, before: Weights, after: Weights, held_out: Tensor) -> Stored:
    """Return what every depth did to the loss of the first text, by allocation and by doing."""
    first = run["first"]
    layers = lca.findings.layers(first, by=1)
    causes = lca.findings.causes(first, by=1)
    examples = lca.findings.examples(first, by=1)
    worse = (examples["allocated"] > 0).mean("example")
    model = build()

    def value(weights: Weights) -> float:
        model.load_state_dict(weights)
        with torch.no_grad():
            return float(loss_of(model, held_out))

    depths = {}
    for depth, name in enumerate(DEPTHS):
        layer, by_cause = (source.sel(layer=str(depth)) for source in (layers, causes))
        moved = [after[each] - before[each] for each in before if each.startswith(f"{depth}.")]
        depths[name] = {
            "parameters": int(layer["elements"]),
            "motion": float(sum(tensor.abs().sum() for tensor in moved)),
            "allocated": float(layer["total"]),
            "error": float(layer["error"]),
            "verdict": str(layer["verdict"].values),
            "worse": float(worse.sel(layer=str(depth))),
            "causes": {cause: float(by_cause["total"].sel(cause=cause)) for cause in CAUSES},
            **interventions(value, before, after, [depth]),
        }
    losses = {name: run[name].steps for name in ("first", "second")}
    return {
        "loss": {
            name: [float(steps["loss_start"][0]), float(steps["loss_end"][-1])]
            for name, steps in losses.items()
        },
        "residual": float(losses["first"]["residual"].sum()),
        "rest": float(causes["rest_overall"]),
        "depths": depths,
        "halves": {
            of: {
                half: interventions(value, before, after, chosen) for half, chosen in halves.items()
            }
            for of, halves in HALVES.items()
        },
    }


def one(place: Path, setting: str, seed: int, size: Size) -> Stored:
    """Do one seed of one setting, or read what is there of it.

    Raises:
        RuntimeError: where `place` holds a result of another size.
    """
    file = place / setting / f"seed{seed}.json"
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["size"] != asdict(size):
            raise RuntimeError(
                f"{file} is of {stored['size']}, not {asdict(size)}. Name another OUT."
            )
        return stored
    begun = time.process_time()
    which, optimizer = SETTINGS[setting]
    passages_of_seed = texts(size, seed)
    second = passages_of_seed.second[which]
    before = first_training(place, size, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = second_training(file.with_suffix(""), before, second, optimizer, size, seed)
    run = replayed(checkpoints, passages_of_seed.held_out, second)
    after = load_file(lca.open_trajectory(checkpoints).checkpoints[-1].files[0])
    stored = {
        "size": asdict(size),
        **measured(run, before, after, passages_of_seed.held_out),
        "processor_seconds": round(time.process_time() - begun, 1),
    }
    unfinished = file.with_suffix(".partial.json")
    unfinished.write_text(json.dumps(stored, indent=1))
    unfinished.replace(file)
    shutil.rmtree(checkpoints)
    return stored


# --- over seeds -----------------------------------------------------------------------------------


def forgotten(stored: Stored) -> float:
    start, end = stored["loss"]["first"]
    return end - start


def caused(stored: Stored, depth: str, way: str) -> float:
    """Return what one depth did to the loss of the first text, as one of `WAYS` tells it."""
    of_depth = stored["depths"][depth]
    if way == "both":
        return (of_depth["put_back"] + of_depth["alone"]) / 2
    return of_depth[way]


def of_half(stored: Stored, of: str, half: str, way: str) -> float:
    """Return what several depths together did to the loss of the first text.

    Args:
        stored: one seed.
        of: a key of `HALVES`.
        half: "lower" or "upper".
        way: a key of `WAYS`.
    """
    if way == "allocated":
        return sum(caused(stored, DEPTHS[depth], way) for depth in HALVES[of][half])
    done = stored["halves"][of][half]
    return (done["put_back"] + done["alone"]) / 2 if way == "both" else done[way]


def share(seeds: Sequence[Stored], number: Callable[[Stored], float]) -> Estimate:
    """Return a number in per cent of what was forgotten, over seeds."""
    return mean_over_seeds([100 * number(stored) / forgotten(stored) for stored in seeds])


def advantage_of_upper(seeds: Sequence[Stored], way: str, of: str = "blocks") -> Estimate:
    """Return by how much more the upper half caused than the lower one, in per cent of what was
    forgotten.
    """
    return share(
        seeds, lambda stored: of_half(stored, of, "upper", way) - of_half(stored, of, "lower", way)
    )


def verdict(seeds: Sequence[Stored]) -> str:
    """Return what a setting says of the claim."""
    both = [advantage_of_upper(seeds, way) for way in ("allocated", "put_back")]
    if all(estimate.low > 0 for estimate in both):
        return "confirms"
    return "refutes" if all(estimate.high < 0 for estimate in both) else "open"


def agreement(seeds: Sequence[Stored], one_of: str, other: str) -> Estimate:
    """Return the rank correlation of two columns over the six depths, over seeds."""
    return mean_over_seeds(
        [
            rank_correlation(
                [column(stored, depth, one_of) for depth in DEPTHS],
                [column(stored, depth, other) for depth in DEPTHS],
            )
            for stored in seeds
        ]
    )


def column(stored: Stored, depth: str, name: str) -> float:
    """Return what one of `WAYS` tells of a depth, or its motion, whole or per parameter."""
    of_depth = stored["depths"][depth]
    if name == "motion per parameter":
        return of_depth["motion"] / of_depth["parameters"]
    return of_depth["motion"] if name == "motion" else caused(stored, depth, name)


def with_depth(seeds: Sequence[Stored], way: str) -> Estimate:
    """Return the rank correlation of the four blocks' numbers with their depth, over seeds."""
    numbers = range(1, BLOCKS + 1)
    return mean_over_seeds(
        [
            rank_correlation(numbers, [caused(stored, DEPTHS[depth], way) for depth in numbers])
            for stored in seeds
        ]
    )


# --- tables ---------------------------------------------------------------------------------------


def cell(estimate: Estimate, digits: int) -> str:
    """Return a mean and half its interval.

    >>> cell(Estimate(-1.25, -1.5, -1.0), 2)
    '−1.25 ± 0.25'
    """
    number = f"{estimate.value:.{digits}f}".replace("-", "−")
    if isnan(estimate.low):
        return number
    return f"{number} ± {estimate.high - estimate.value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def losses_table(results: Mapping[str, Sequence[Stored]]) -> str:
    """A row for every setting: losses of both texts before and after the second, and what is left."""
    rows = []
    for setting, seeds in results.items():
        first, second = (
            " → ".join(
                cell(mean_over_seeds([stored["loss"][name][end] for stored in seeds]), 2)
                for end in (0, 1)
            )
            for name in ("first", "second")
        )
        residual = max(abs(stored["residual"]) / forgotten(stored) for stored in seeds)
        rest = max(stored["rest"] for stored in seeds)
        rows.append(
            (
                setting,
                first,
                second,
                cell(mean_over_seeds([forgotten(stored) for stored in seeds]), 3),
                f"{residual:.1%}",
                f"{rest:.1%}",
                f"{np.mean([stored['processor_seconds'] for stored in seeds]):.0f} s",
            )
        )
    head = ("setting", "loss on the first text", "loss on the second text", "forgotten")
    return table(
        (*head, "largest residual", "largest rest of the causes", "processor time of a seed"), rows
    )


def claim_table(results: Mapping[str, Sequence[Stored]]) -> str:
    """A row for every setting: what the upper two blocks caused more than the lower two."""
    return table(
        ("setting", *(f"by {name}" for name in WAYS.values()), "the claim"),
        [
            (
                setting,
                *(cell(advantage_of_upper(seeds, way), 1) for way in WAYS),
                verdict(seeds),
            )
            for setting, seeds in results.items()
        ],
    )


def depth_table(seeds: Sequence[Stored]) -> str:
    """A row for every depth of one setting."""
    rows = []
    for depth in DEPTHS:
        of_depth = [stored["depths"][depth] for stored in seeds]
        parameters = of_depth[0]["parameters"]
        errors = max(
            100 * own["error"] / forgotten(stored)
            for own, stored in zip(of_depth, seeds, strict=True)
        )
        hurts = sum(own["verdict"] == "hurts, clearly" for own in of_depth)
        rows.append(
            (
                depth,
                f"{parameters:,}",
                cell(share(seeds, partial(caused, depth=depth, way="allocated")), 1),
                f"{errors:.1f}",
                f"{hurts} of {len(seeds)}",
                cell(
                    share(
                        seeds,
                        lambda stored, depth=depth, parameters=parameters: (
                            caused(stored, depth, "allocated") * 10_000 / parameters
                        ),
                    ),
                    1,
                ),
                cell(mean_over_seeds([100 * own["worse"] for own in of_depth]), 0),
                *(
                    cell(share(seeds, partial(caused, depth=depth, way=way)), 1)
                    for way in ("put_back", "alone", "both")
                ),
                cell(mean_over_seeds([own["motion"] for own in of_depth]), 0),
                cell(
                    mean_over_seeds([1000 * own["motion"] / parameters for own in of_depth]),
                    2,
                ),
            )
        )
    head = ("depth", "parameters", "share of what was forgotten, %", "largest error of a seed, %")
    head += ("hurts, clearly", "share per 10,000 parameters, %", "passages made worse, %")
    head += ("put back, %", "moved alone, %", "mean of both, %")
    return table((*head, "Σ\\|Δθ\\|", "Σ\\|Δθ\\| per 1,000 parameters"), rows)


def causes_table(seeds: Sequence[Stored]) -> str:
    """A row for every depth of one setting: its share by what moved it."""
    return table(
        ("share of what was forgotten, %", *CAUSES),
        [
            (
                depth,
                *(
                    cell(
                        share(
                            seeds,
                            lambda stored, depth=depth, cause=cause: stored["depths"][depth][
                                "causes"
                            ][cause],
                        ),
                        1,
                    )
                    for cause in CAUSES
                ),
            )
            for depth in DEPTHS
        ],
    )


def agreement_table(results: Mapping[str, Sequence[Stored]]) -> str:
    """A row for every pair of columns: their rank correlation over depths, by setting."""
    pairs = [("allocated", way) for way in ("put_back", "alone", "both")]
    pairs += [
        (name, way)
        for name in ("motion", "motion per parameter")
        for way in ("allocated", "put_back", "both")
    ]
    rows = [
        (
            f"{WAYS.get(name, name)} and {WAYS[way]}",
            *(cell(agreement(seeds, name, way), 2) for seeds in results.values()),
        )
        for name, way in pairs
    ]
    rows += [
        (
            f"depth and {name}, four blocks",
            *(cell(with_depth(seeds, way), 2) for seeds in results.values()),
        )
        for way, name in WAYS.items()
    ]
    return table(("rank correlation", *results), rows)


def tables(results: Mapping[str, Sequence[Stored]]) -> str:
    """Return all tables."""
    parts = [
        losses_table(results),
        "Upper two blocks minus lower two, in % of what was forgotten:",
        claim_table(results),
        agreement_table(results),
    ]
    for setting, seeds in results.items():
        parts += [f"## {setting}", depth_table(seeds), causes_table(seeds)]
    return "\n\n".join(parts) + "\n"


# --- the figure -----------------------------------------------------------------------------------


def draw(results: Mapping[str, Sequence[Stored]], path: Path) -> None:
    """Draw a column for each setting: shares of each depth by allocation and by doing, and below the
    allocation by cause.
    """
    figure, axes = plt.subplots(
        2, len(results), figsize=(11, 5.4), sharex=True, sharey="row", layout="constrained"
    )
    across = np.arange(len(DEPTHS))
    ways = {"allocated": "#222222", "put_back": "#d9572b", "alone": "#56b4e9"}
    causes = dict(zip(CAUSES, ("#0f8b8d", "#ddaa33", "#8c2f5f", "#5f4418", "#9e9e9e"), strict=True))
    for (above, below), (setting, seeds) in zip(axes.T, results.items(), strict=True):
        for order, (way, colour) in enumerate(ways.items()):
            shares = [share(seeds, partial(caused, depth=depth, way=way)) for depth in DEPTHS]
            places = across + 0.2 * (order - 1)
            above.vlines(
                places,
                [estimate.low for estimate in shares],
                [estimate.high for estimate in shares],
                color=colour,
            )
            values = [estimate.value for estimate in shares]
            above.plot(places, values, "o", markersize=4, color=colour, label=WAYS[way])
        above.set_title(setting.replace("-", ", "), fontsize=9)
        for order, (cause, colour) in enumerate(causes.items()):
            values = [
                share(
                    seeds,
                    lambda stored, depth=depth, cause=cause: stored["depths"][depth]["causes"][
                        cause
                    ],
                ).value
                for depth in DEPTHS
            ]
            below.bar(across + 0.16 * (order - 2), values, 0.16, color=colour, label=cause)
        below.set_xticks(across, DEPTHS, rotation=45, ha="right")
        for axis in (above, below):
            axis.axhline(0, color="black", linewidth=0.5)
            axis.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("share of what was forgotten, %", fontsize=8)
    axes[1, 0].set_ylabel("the same by cause, %", fontsize=8)
    for axis in axes[:, -1]:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def seeds_of(given: str) -> range:
    """Read "A:B", from A up to but without B."""
    first, _, last = given.partition(":")
    return range(int(first), int(last))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=seeds_of, default="0:5", metavar="A:B")
    for name, count in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = replace(Size(), **{name: getattr(options, name) for name in asdict(Size())})
    results: dict[str, list[Stored]] = {setting: [] for setting in SETTINGS}
    for seed in options.seeds:
        for setting, seeds in results.items():
            seeds.append(one(options.out, setting, seed, size))
            print(
                f"{setting}, seed {seed}: forgotten {forgotten(seeds[-1]):.3f}, "
                f"{seeds[-1]['processor_seconds']:.0f} s of processor time",
                flush=True,
            )
    (options.out / "tables.md").write_text(tables(results))
    draw(results, options.out / "forgetting_by_depth.png")


if __name__ == "__main__":
    main()
