r"""Tables and figures of all results that are there.

```sh
python docs/examples/validation/report.py PLACE docs
```

Reads `PLACE/EXPERIMENT/NETWORK/seedK.json` and writes `docs/measurements/validation-tables.md` and
three figures in `docs/images`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from agreement import Estimate, mean_over_seeds, rank_correlation, ratio_over_seeds
from measures import IN_LOSS, LCA
from networks import NETWORKS

PANELS = 3  # beside each other
EXPERIMENTS = ("undo", "freeze", "prune", "batches")
TITLES = {
    "mnist_fc": "MNIST-FC",
    "lenet": "LeNet",
    "resnet8": "ResNet-8",
    "transformer": "transformer",
}
COLOURS = (
    *("#222222", "#56b4e9", "#9e9e9e", "#ddaa33", "#8c2f5f"),
    *("#0072b2", "#7fb77e", "#5f4418", "#3b2c85", "#d9572b"),
)

ABOUT = """# All tables of the validation

The script `docs/examples/validation/report.py` writes this page. [Validation](../validation.md) says
what was done and what follows from it. There are four experiments: *undo* puts a part of a network
back to where it was; *freeze* freezes layers and units, or doubles the learning rate of a layer;
*prune* removes parameters; *batches* leaves out training steps.

* A *comparison* is a set of layers, units or steps of one training. Each has a prediction of how much
  the loss rises, and an outcome.
* A *rank correlation* is Spearman's, between the predictions and the outcomes of a comparison. The
  tables have means over comparisons and seeds.
* A *slope* is that of the outcomes against the predictions, through the origin.
* Intervals in brackets are of 95 %, by bootstrap over seeds.
* Beside a rank correlation, ▲ means that it is above that of LCA, beyond chance, and ▼ that it is
  below: the interval of the difference, taken seed by seed, does not hold 0.

Tables whose title begins with *Chosen* compare ways to choose what is changed. Their numbers are the
rise of the loss: the lower, the better. ± is half an interval of 95 % by Student's t. ▲ marks a rise
above that of random choices, beyond chance and seed by seed, and ▼ one below. Brackets say with how
many of the seeds the rise is below."""

Stored = dict[str, Any]  # one result file
Seeds = list[list[Stored]]  # of every seed, its comparisons


@dataclass(frozen=True)
class Results:
    """All result files of one experiment, by network, in the order of their seeds."""

    experiment: str
    files: dict[str, list[Stored]]

    def questions(self, entry: str) -> list[str]:
        """Return the questions of "comparisons" or "choices", in the order they were asked."""
        return unique(
            row["question"]
            for files in self.files.values()
            for file in files
            for row in file[entry]
        )

    def comparisons(self, network: str, question: str) -> Seeds:
        return [
            [row for row in file["comparisons"] if row["question"] == question]
            for file in self.files[network]
        ]

    def rises(self, network: str, question: str, chosen_by: str) -> list[float]:
        """Return what came of a way to choose, for every seed."""
        return [
            row["rise"]
            for file in self.files[network]
            for row in file["choices"]
            if (row["question"], row["chosen_by"]) == (question, chosen_by)
        ]

    def ways(self, question: str) -> list[str]:
        return unique(
            row["chosen_by"]
            for files in self.files.values()
            for file in files
            for row in file["choices"]
            if row["question"] == question
        )


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def read(place: Path, experiment: str) -> Results:
    """Read what there is of an experiment."""
    files = {}
    for network in NETWORKS:
        paths = sorted(
            (place / experiment / network).glob("seed*.json"), key=lambda path: int(path.stem[4:])
        )
        if paths:
            files[network] = [json.loads(path.read_text()) for path in paths]
    return Results(experiment, files)


# --- estimates ------------------------------------------------------------------------------------


def correlations(seeds: Seeds, predictor: str) -> list[list[float]]:
    """Return the rank correlation within every comparison, by seed; those are left out in which
    nothing differs.
    """
    found = [
        [rank_correlation(row["predicted"][predictor], row["actual"]) for row in comparisons]
        for comparisons in seeds
    ]
    return [[value for value in values if not isnan(value)] for values in found]


def mean_correlation(seeds: Seeds, predictor: str) -> Estimate:
    by_seed = correlations(seeds, predictor)
    return ratio_over_seeds(
        [sum(values) for values in by_seed], [len(values) for values in by_seed]
    )


def advantage(seeds: Seeds, predictor: str) -> Estimate:
    """Return by how much a predictor's rank correlation is above that of the allocation, in pairs."""
    own, of_lca = correlations(seeds, predictor), correlations(seeds, LCA)
    return ratio_over_seeds(
        [sum(values) - sum(others) for values, others in zip(own, of_lca, strict=True)],
        [len(values) for values in own],
    )


def slope(seeds: Seeds, predictor: str) -> Estimate:
    """Return the slope through the origin of what came of it against what was said."""
    above, below = [], []
    for comparisons in seeds:
        said = np.concatenate([row["predicted"][predictor] for row in comparisons])
        came = np.concatenate([row["actual"] for row in comparisons])
        above.append(float(said @ came))
        below.append(float(said @ said))
    return ratio_over_seeds(above, below)


# --- tables ---------------------------------------------------------------------------------------


def shown(estimate: Estimate) -> str:
    """Return a number with its interval, as in "0.93 (0.90 to 0.95)"."""
    number, low, high = map(rounded, (estimate.value, estimate.low, estimate.high))
    return number if isnan(estimate.low) else f"{number} ({low} to {high})"


def rounded(value: float) -> str:
    """Return a number to two digits behind the point, none where it is large.

    >>> rounded(-0.001), rounded(-1234.5), rounded(0.126)
    ('0.00', '−1,234', '0.13')
    """
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{round(value, 2) + 0.0:.2f}"
    return text.replace("-", "−")


def significant(estimate: Estimate) -> str:
    """Return a number and half of its interval, in three significant digits of the number."""
    if isnan(estimate.low):
        return f"{estimate.value:+.2g}".replace("-", "−")
    return f"{estimate.value:+.2g} ± {estimate.high - estimate.value:.1g}".replace("-", "−")


def sign(estimate: Estimate) -> str:
    """Return " ▲" where a difference is surely above zero, " ▼" where it is surely below."""
    return " ▲" if estimate.low > 0 else " ▼" if estimate.high < 0 else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def predictors(results: Results, question: str) -> list[str]:
    return unique(
        name
        for network in results.files
        for comparisons in results.comparisons(network, question)
        for row in comparisons
        for name in row["predicted"]
    )


def correlation_table(results: Results, question: str) -> str:
    """Return the rank correlation of each predictor with what came of it, by network."""

    def cell(network: str, name: str) -> str:
        seeds = results.comparisons(network, question)
        better = "" if name == LCA else sign(advantage(seeds, name))
        return shown(mean_correlation(seeds, name)) + better

    return table(
        ["rank correlation", *(TITLES[network] for network in results.files)],
        [
            [name, *(cell(network, name) for network in results.files)]
            for name in predictors(results, question)
        ],
    )


def slope_table(results: Results, question: str) -> str:
    """Return the slope of what came of it against each predictor in units of the loss."""
    names = [name for name in predictors(results, question) if name in IN_LOSS]
    return table(
        ["slope", *(TITLES[network] for network in results.files)],
        [
            [
                name,
                *(
                    shown(slope(results.comparisons(network, question), name))
                    for network in results.files
                ),
            ]
            for name in names
        ],
    )


def choice_table(results: Results, question: str) -> str:
    """Return by how much the loss rose with each way to choose, by network."""

    def cell(network: str, way: str) -> str:
        rises = results.rises(network, question, way)
        at_random = results.rises(network, question, "random")
        beyond = [rise - other for rise, other in zip(rises, at_random, strict=True)]
        told = significant(mean_over_seeds(rises))
        if way == "random":
            return told
        below = sum(difference < 0 for difference in beyond)
        return f"{told}{sign(mean_over_seeds(beyond))} ({below}/{len(beyond)})"

    return table(
        ["rise of the loss", *(TITLES[network] for network in results.files)],
        [
            [way, *(cell(network, way) for network in results.files)]
            for way in results.ways(question)
        ],
    )


def summary_table(every: Sequence[Results]) -> str:
    """Return sizes, losses, seeds and times of all that was done."""

    def cells(results: Results, network: str) -> list[str]:
        files = results.files[network]
        size = files[0]["size"]
        return [
            results.experiment,
            TITLES[network],
            str(len(files)),
            f"{size['steps']}, {size['batch']} of {size['examples']:,}; {size['measured']:,}",
            f"{mean_over_seeds([file['loss_start'] for file in files]).value:.2f} → "
            f"{mean_over_seeds([file['loss_end'] for file in files]).value:.2f}",
            f"{median(file['processor_seconds'] for file in files):.0f} s",
            f"{median(file['seconds'] for file in files):.0f} s",
        ]

    return table(
        [
            "experiment",
            "network",
            "seeds",
            "steps, batch size of training examples; measured examples",
            "loss, start → end",
            "processor time of a seed",
            "elapsed time of a seed",
        ],
        [cells(results, network) for results in every for network in results.files],
    )


def tables(every: Sequence[Results]) -> str:
    """Return the page of all tables."""
    parts = [ABOUT, "## What was run", summary_table(every)]
    for results in every:
        parts.append(f"## {results.experiment}")
        for question in results.questions("comparisons"):
            parts += [
                f"### {question[0].upper()}{question[1:]}",
                correlation_table(results, question),
                slope_table(results, question),
            ]
        for question in results.questions("choices"):
            parts += [f"### Chosen: {question}", choice_table(results, question)]
    return "\n\n".join(parts) + "\n"


# --- figures --------------------------------------------------------------------------------------


def draw_correlations(every: Sequence[Results], path: Path) -> None:
    """Draw every rank correlation with its interval: a panel for a question, a group for a network,
    a colour for a predictor.
    """
    asked = [
        (results, question) for results in every for question in results.questions("comparisons")
    ]
    rows = -(-len(asked) // PANELS)
    figure, axes = plt.subplots(
        rows,
        PANELS,
        figsize=(10, 1.7 * rows + 0.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    names = unique(name for results, question in asked for name in predictors(results, question))
    colours = dict(zip(names, COLOURS, strict=False))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (results, question) in zip(axes.flat, asked, strict=False):
        axis.axis("on")
        draw_question(axis, results, question, colours)
    handles = [
        Line2D([], [], marker="o", markersize=4, linewidth=0, color=colour, label=name)
        for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figure.supylabel("rank correlation", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_question(axis: plt.Axes, results: Results, question: str, colours: dict[str, str]) -> None:
    """Draw the rank correlations of one question."""
    names = predictors(results, question)
    for position, network in enumerate(results.files):
        for order, name in enumerate(names):
            estimate = mean_correlation(results.comparisons(network, question), name)
            across = position + 0.8 * (order / len(names) - 0.5)
            axis.vlines(across, estimate.low, estimate.high, color=colours[name])
            axis.plot(across, estimate.value, "o", markersize=3, color=colours[name])
    axis.set_title(question, fontsize=7)
    axis.set_xticks(range(len(results.files)), [TITLES[network] for network in results.files])
    axis.tick_params(labelsize=6)
    axis.axhline(0, color="black", linewidth=0.5)


def draw_pairs(results: Results, questions: Sequence[str], path: Path) -> None:
    """Draw what came of it against what the allocation said, for every item of every seed: a row
    for a question, a panel for a network.
    """
    figure, axes = plt.subplots(
        len(questions),
        len(results.files),
        figsize=(9, 2.2 * len(questions) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row, question in zip(axes, questions, strict=True):
        row[0].set_ylabel(question.rpartition(", ")[2], fontsize=7)
        for axis, network in zip(row, results.files, strict=True):
            for comparisons in results.comparisons(network, question):
                said = np.concatenate([pairs["predicted"][LCA] for pairs in comparisons])
                came = np.concatenate([pairs["actual"] for pairs in comparisons])
                axis.plot(said, came, ".", markersize=3, color="#0f8b8d", alpha=0.6)
            ends = np.array(axis.get_xlim())
            axis.plot(ends, ends, color="black", linewidth=0.5)
            axis.set_title(TITLES[network], fontsize=8)
            axis.tick_params(labelsize=7)
    figure.supxlabel("said by the allocation: rise of the loss", fontsize=8)
    figure.supylabel("came of it", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_choices(results: Results, chosen: Callable[[str], bool], path: Path) -> None:
    """Draw what came of each way to choose, with intervals: a panel for a network, a line for a way
    along the questions that are chosen.
    """
    questions = [question for question in results.questions("choices") if chosen(question)]
    figure, axes = plt.subplots(
        1, len(results.files), figsize=(9, 3), squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes[0], results.files, strict=True):
        for order, way in enumerate(results.ways(questions[0])):
            means = [
                mean_over_seeds(results.rises(network, question, way)) for question in questions
            ]
            across = np.arange(len(questions)) + 0.06 * order
            axis.plot(
                across, [estimate.value for estimate in means], color=COLOURS[order], label=way
            )
            axis.vlines(
                across,
                [estimate.low for estimate in means],
                [estimate.high for estimate in means],
                color=COLOURS[order],
            )
        axis.set_xticks(
            range(len(questions)), [question.partition(" to ")[0] for question in questions]
        )
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title(TITLES[network], fontsize=8)
        axis.tick_params(labelsize=7)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    figure.supylabel("rise of the loss", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(place: Path, out: Path) -> None:
    """Write tables and figures of what there is."""
    every = [results for name in EXPERIMENTS if (results := read(place, name)).files]
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    measurements = out / "measurements"
    measurements.mkdir(exist_ok=True)
    (measurements / "validation-tables.md").write_text(tables(every))
    draw_correlations(every, images / "validation_correlations.png")
    for results in every:
        if results.experiment == "undo":
            of_layers = [
                question
                for question in results.questions("comparisons")
                if question.startswith("a layer over a third")
            ]
            draw_pairs(results, of_layers, images / "validation_undo.png")
        if results.experiment == "prune":
            draw_choices(
                results, lambda question: question.endswith("zero"), images / "validation_prune.png"
            )


if __name__ == "__main__":
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("place", type=Path)
    asked.add_argument("out", type=Path)
    given = asked.parse_args()
    report(given.place, given.out)
