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
from dataclasses import asdict, dataclass
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
from validation.agreement import Estimate, mean_over_seeds, rank_correlation, ratio_over_seeds

Weights = dict[str, Tensor]
Stored = dict[str, Any]  # one result file
Seeds = Sequence[Stored]  # of one setting
Results = Mapping[str, Seeds]  # by setting
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
SETTINGS = {f"{which}-{name}": (which, name) for which in TEXTS for name in OPTIMIZERS}
WAYS = {
    "allocated": "allocation",
    "put_back": "put back",
    "alone": "moved alone",
    "both": "mean of back and alone",
}
MOTIONS = ("motion", "motion per parameter")
DEPTH_TABLES = {  # columns, with their titles and digits
    "allocated": ("Allocation, % of what was forgotten", 1),
    "put_back": ("Put back, % of what was forgotten", 1),
    "alone": ("Moved alone, % of what was forgotten", 1),
    "both": ("Mean of put back and moved alone, %", 1),
    "per parameter": ("Allocation per 10,000 parameters, %", 1),
    "worse": ("Passages made worse, %", 0),
    "motion": ("Motion, Σ|Δθ|", 0),
    "motion per parameter": ("Motion per 1,000 parameters", 2),
}
COLOURS_OF_WAYS = {"allocated": "#222222", "put_back": "#d9572b", "alone": "#56b4e9"}
CAUSES = {
    "signal": "#0f8b8d",
    "noise": "#ddaa33",
    "momentum": "#8c2f5f",
    "decay": "#5f4418",
    "rest": "#9e9e9e",
}


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
        own = [parameter for parameter in before if parameter.startswith(f"{depth}.")]
        depths[name] = {
            "parameters": int(layer["elements"]),
            "motion": float(
                sum((after[parameter] - before[parameter]).abs().sum() for parameter in own)
            ),
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


def refuse_another_size(place: Path, size: Size) -> None:
    """Record the size of everything below `place`, weights and checkpoints too.

    Raises:
        RuntimeError: if it has another size.
    """
    recorded = place / "size.json"
    if not recorded.exists():
        place.mkdir(parents=True, exist_ok=True)
        recorded.write_text(json.dumps(asdict(size)))
    there = json.loads(recorded.read_text())
    if there != asdict(size):
        raise RuntimeError(f"{place} holds {there}, not {asdict(size)}. Name another OUT.")


def result_of(place: Path, setting: str, seed: int, size: Size) -> Stored:
    """Do one seed of one setting, or read what is there of it.

    Raises:
        RuntimeError: where `place` holds a result of another size.
    """
    refuse_another_size(place, size)
    file = place / setting / f"seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
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
    """Return the rise of the loss on the first text."""
    start, end = stored["loss"]["first"]
    return end - start


def in_per_cent(number: float, stored: Stored) -> float:
    """Return a rise of the loss in per cent of what was forgotten."""
    return 100 * number / forgotten(stored)


def columns(stored: Stored, depth: str) -> dict[str, float]:
    """Return the numbers of one depth; what it caused is in per cent of what was forgotten."""
    own = stored["depths"][depth]
    both = (own["put_back"] + own["alone"]) / 2
    caused = {name: own[name] for name in ("allocated", "error", "put_back", "alone")}
    shares = {
        name: in_per_cent(number, stored)
        for name, number in {**caused, "both": both, **own["causes"]}.items()
    }
    return {
        **shares,
        "per parameter": shares["allocated"] * 10_000 / own["parameters"],
        "worse": 100 * own["worse"],
        "motion": own["motion"],
        "motion per parameter": own["motion"] * 1000 / own["parameters"],
    }


def over_seeds(seeds: Seeds, depth: str, name: str) -> Estimate:
    return mean_over_seeds([columns(stored, depth)[name] for stored in seeds])


def of_half(stored: Stored, of: str, half: str, way: str) -> float:
    """Return what several depths together did, in per cent of what was forgotten.

    Args:
        stored: one seed.
        of: a key of `HALVES`.
        half: "lower" or "upper".
        way: a key of `WAYS`.
    """
    if way == "allocated":
        return sum(columns(stored, DEPTHS[depth])[way] for depth in HALVES[of][half])
    done = stored["halves"][of][half]
    rise = (done["put_back"] + done["alone"]) / 2 if way == "both" else done[way]
    return in_per_cent(rise, stored)


def advantage_of_upper(seeds: Seeds, of: str, way: str) -> Estimate:
    """Return by how much more the upper half caused than the lower one, in per cent of what was
    forgotten.
    """
    return mean_over_seeds(
        [of_half(stored, of, "upper", way) - of_half(stored, of, "lower", way) for stored in seeds]
    )


def verdict(seeds: Seeds) -> str:
    """Return what a setting does to the claim."""
    both = [advantage_of_upper(seeds, "blocks", way) for way in ("allocated", "put_back")]
    if all(estimate.low > 0 for estimate in both):
        return "confirms"
    return "refutes" if all(estimate.high < 0 for estimate in both) else "open"


def correlation(seeds: Seeds, one_of: str, other: str) -> Estimate:
    """Return the rank correlation of two columns over the six depths, over seeds.

    Args:
        seeds: of one setting.
        one_of: a column.
        other: another.
    """
    ranks = []
    for stored in seeds:
        numbers = [columns(stored, depth) for depth in DEPTHS]
        ranks.append(
            rank_correlation(
                [number[one_of] for number in numbers], [number[other] for number in numbers]
            )
        )
    return ratio_over_seeds(ranks, [1.0] * len(ranks))


# --- tables ---------------------------------------------------------------------------------------


def cell(estimate: Estimate, digits: int) -> str:
    """Return a mean and half its interval.

    >>> cell(Estimate(-1.25, -1.5, -1.0), 2)
    '−1.25 ± 0.25'
    """
    half = "" if isnan(estimate.low) else f" ± {estimate.high - estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f}{half}".replace("-", "−")


def ranked(estimate: Estimate) -> str:
    """Return a rank correlation with its interval.

    >>> ranked(Estimate(0.9, 0.83, 1.0))
    '0.90 (0.83 to 1.00)'
    """
    limits = "" if isnan(estimate.low) else f" ({estimate.low:.2f} to {estimate.high:.2f})"
    return f"{estimate.value:.2f}{limits}".replace("-", "−")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def losses_table(results: Results) -> str:
    """Return a table of the losses before and after the second text, and of the errors."""
    rows = []
    for setting, seeds in results.items():
        losses = [
            [mean_over_seeds([stored["loss"][name][end] for stored in seeds]) for end in (0, 1)]
            for name in ("first", "second")
        ]
        depths = [columns(stored, depth) for stored in seeds for depth in DEPTHS]
        residual = max(abs(in_per_cent(stored["residual"], stored)) for stored in seeds)
        rows.append(
            [
                setting,
                *(f"{start.value:.2f} → {end.value:.2f}" for start, end in losses),
                cell(mean_over_seeds([forgotten(stored) for stored in seeds]), 3),
                f"{residual:.2f} %",
                f"{max(depth['error'] for depth in depths):.2f} %",
                f"{100 * max(stored['rest'] for stored in seeds):.2f} %",
                f"{np.mean([stored['processor_seconds'] for stored in seeds]):.0f} s",
            ]
        )
    head = ["setting", "loss on the first text", "on the second", "forgotten"]
    head += ["largest residual", "largest error of a depth", "largest rest"]
    return table([*head, "processor time of a seed"], rows)


def claim_table(results: Results) -> str:
    """Return a table of what the upper half caused more than the lower one: of the blocks, and of
    all depths. Of all depths, to put one half back is to move the other alone.
    """
    asked = [("blocks", way) for way in WAYS]
    asked += [("all depths", way) for way in ("allocated", "put_back")]
    return table(
        ["setting", "the claim", *(f"{of}: {WAYS[way]}" for of, way in asked)],
        [
            [
                setting,
                verdict(seeds),
                *(cell(advantage_of_upper(seeds, of, way), 1) for of, way in asked),
            ]
            for setting, seeds in results.items()
        ],
    )


def depth_table(results: Results, name: str, digits: int) -> str:
    """Return a table of one column: a row for every depth.

    Args:
        results: of all settings.
        name: of the column.
        digits: behind the point.
    """
    return table(
        ["depth", *results],
        [
            [depth, *(cell(over_seeds(seeds, depth, name), digits) for seeds in results.values())]
            for depth in DEPTHS
        ],
    )


def causes_table(results: Results) -> str:
    """Return a table of the causes of every depth, in per cent of what was forgotten."""
    return table(
        ["depth", "cause", *results],
        [
            [
                depth,
                cause,
                *(cell(over_seeds(seeds, depth, cause), 1) for seeds in results.values()),
            ]
            for depth in DEPTHS
            for cause in CAUSES
        ],
    )


def correlations_table(results: Results) -> str:
    """Return a table of rank correlations over depths."""
    pairs = [("allocated", way) for way in ("put_back", "alone", "both")]
    pairs += [
        (motion, way) for motion in MOTIONS for way in ("allocated", "put_back", "alone", "both")
    ]
    return table(
        ["rank correlation", *results],
        [
            [
                f"{WAYS.get(one_of, one_of)}, {WAYS[other]}",
                *(ranked(correlation(seeds, one_of, other)) for seeds in results.values()),
            ]
            for one_of, other in pairs
        ],
    )


def tables(results: Results) -> str:
    """Return all tables, each below its title."""
    titled = {
        "What was forgotten": losses_table(results),
        "Upper half minus lower half, % of what was forgotten": claim_table(results),
        **{
            title: depth_table(results, name, digits)
            for name, (title, digits) in DEPTH_TABLES.items()
        },
        "By cause, % of what was forgotten": causes_table(results),
        "Rank correlations over the six depths": correlations_table(results),
    }
    return "\n\n".join(f"## {title}\n\n{rows}" for title, rows in titled.items()) + "\n"


# --- the figure -----------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """Draw a column for each setting: the shares of the depths in three ways, and below them the
    allocation by cause.
    """
    figure, axes = plt.subplots(
        2, len(results), figsize=(11, 5.4), sharex=True, sharey="row", layout="constrained"
    )
    for (above, below), (setting, seeds) in zip(axes.T, results.items(), strict=True):
        above.set_title(setting.replace("-", ", "), fontsize=9)
        draw_shares(above, seeds)
        draw_causes(below, seeds)
        below.set_xticks(range(len(DEPTHS)), DEPTHS, rotation=45, ha="right")
        for axis in (above, below):
            axis.axhline(0, color="black", linewidth=0.5)
            axis.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("share of what was forgotten, %", fontsize=8)
    axes[1, 0].set_ylabel("allocation by cause, %", fontsize=8)
    for axis in axes[:, -1]:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_shares(axis: plt.Axes, seeds: Seeds) -> None:
    for order, (way, colour) in enumerate(COLOURS_OF_WAYS.items()):
        for place, depth in enumerate(DEPTHS):
            estimate = over_seeds(seeds, depth, way)
            across = place + 0.2 * (order - 1)
            axis.vlines(across, estimate.low, estimate.high, color=colour)
            label = WAYS[way] if place == 0 else None
            axis.plot(across, estimate.value, "o", markersize=4, color=colour, label=label)


def draw_causes(axis: plt.Axes, seeds: Seeds) -> None:
    for order, (cause, colour) in enumerate(CAUSES.items()):
        values = [over_seeds(seeds, depth, cause).value for depth in DEPTHS]
        places = np.arange(len(DEPTHS)) + 0.16 * (order - 2)
        axis.bar(places, values, 0.16, color=colour, label=cause)


# --- the command ----------------------------------------------------------------------------------


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
    size = Size(**{name: getattr(options, name) for name in asdict(Size())})
    results: dict[str, list[Stored]] = {setting: [] for setting in SETTINGS}
    for seed in options.seeds:
        for setting, seeds in results.items():
            seeds.append(result_of(options.out, setting, seed, size))
            print(
                f"{setting}, seed {seed}: forgotten {forgotten(seeds[-1]):.3f}, "
                f"{seeds[-1]['processor_seconds']:.0f} s of processor time",
                flush=True,
            )
    (options.out / "tables.md").write_text(tables(results))
    draw(results, options.out / "forgetting_by_depth.png")


if __name__ == "__main__":
    main()
