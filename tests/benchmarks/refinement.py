"""What each rule and tolerance costs on MNIST-FC, and how far its allocation is from that of a fine
rule.

```sh
LCA_DATA=DIR python tests/benchmarks/refinement.py [--network relu|gelu] [--segments 220]
    [--examples 55000] [--stride 1] [--reference 4] [--json FILE] [--table FILE.md]
```

The example's network (with GELU in place of ReLU where asked) is trained for so many iterates; of
every STRIDE-th segment the loss on the first EXAMPLES training images is allocated by each choice,
in float64 and on one thread. What to refine is decided by the package's own `allocate`, with its
own calibration on its own three segments. A* is the allocation with 2 ** REFERENCE intervals, or
with as many as any choice went to on that segment. A node is evaluated once, however many choices
ask for it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lca_posthoc import Loss, Task
from lca_posthoc.numerics.allocation import Method, allocate, calibrate
from lca_posthoc.numerics.objective import Evaluation, Objective, ObjectiveSettings, build_objective
from lca_posthoc.numerics.parts import Point
from lca_posthoc.numerics.quadrature import COMPOSITE, RULES
from lca_posthoc.replay.worker.checks import sampled

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import mnist_fc

LOSS = ["train"]
GUARANTEE = 1e-3  # the paper's, and the default tolerance
RULED = {
    "left": RULES["left"],
    "midpoint": RULES["midpoint"],
    "trapezoid": COMPOSITE.rules[0],
    "gauss-2": RULES["gauss-2"],
    "simpson": COMPOSITE.rules[1],
    "4 intervals": COMPOSITE.rules[2],
    "8 intervals": COMPOSITE.rules[3],
}
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


class Gelu(mnist_fc.Net):
    """784-100-50-10 with GELU, initialised alike."""

    def __init__(self) -> None:
        super().__init__()
        self.relu1, self.relu2 = nn.GELU(), nn.GELU()


NETWORKS = {"relu": mnist_fc.Net, "gelu": Gelu}


@dataclass(frozen=True)
class Choice:
    """A rule and what it is refined on: the residual, or `both` that and the estimated error of the
    allocation.
    """

    rule: str
    tolerance: float = math.inf
    both: bool = False

    @property
    def name(self) -> str:
        """Of one choice, as the tables call it."""
        return titled(self.rule, [] if math.isinf(self.tolerance) else [self.tolerance], self.both)

    @property
    def limit(self) -> float:
        """What residuals are held against: the tolerance, or the guarantee where nothing is
        refined.
        """
        return GUARANTEE if math.isinf(self.tolerance) else self.tolerance

    def method(self, calibration: dict[str, float]) -> Method:
        return Method(
            RULED[self.rule], self.tolerance, self.tolerance if self.both else math.inf, calibration
        )


@dataclass(frozen=True)
class Measured:
    """One choice on one segment; `error` is Σ|A − A*|, `size` Σ|A*|, `layer_…` the same of the sums
    of the tensors.
    """

    evaluations: int
    forward_passes: int
    level: int
    residual: float
    change: float
    error: float
    size: float
    layer_error: float
    layer_size: float
    error_bound: float


class Remembered:
    """An objective that evaluates a point once, until it is told to forget it, and counts what it
    is asked for.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._known: dict[bytes, dict[str, Evaluation]] = {}
        self.gradients = self.passes = 0

    def evaluate(
        self, point: Point, losses: list[str], *, gradient: bool = True
    ) -> dict[str, Evaluation]:
        """The losses with their gradients, also where only the values are asked for."""
        self.gradients += gradient
        self.passes += not gradient
        return self.at(point)

    def at(self, point: Point) -> dict[str, Evaluation]:
        """The same, not counted."""
        key = _key(point)
        if key not in self._known:
            self._known[key] = self._objective.evaluate(point, LOSS)
        return self._known[key]

    def forget_all_but(self, point: Point) -> None:
        key = _key(point)
        self._known = {each: found for each, found in self._known.items() if each == key}


def _key(point: Point) -> bytes:
    digest = hashlib.sha1(usedforsecurity=False)
    for tensor in point.values():
        digest.update(tensor.contiguous().numpy())
    return digest.digest()


def choices() -> list[Choice]:
    """Every rule unrefined; then trapezoid and Simpson, refined on the residual alone and on
    both.
    """
    refined = itertools.product(("trapezoid", "simpson"), (False, True), TOLERANCES)
    return [
        *map(Choice, RULED),
        *(Choice(rule, tolerance, both) for rule, both, tolerance in refined),
    ]


def points(network: str, segments: int) -> list[Point]:
    """Every iterate of a training as the example trains, in float64."""
    torch.manual_seed(0)
    images, labels = mnist_fc.data()
    model = NETWORKS[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with tempfile.TemporaryDirectory() as place:
        mnist_fc.record(
            place, model, optimizer, (images[: mnist_fc.TRAIN], labels[: mnist_fc.TRAIN]), segments
        )
        files = sorted(Path(place).glob("*.safetensors"))
        return [{name: each.double() for name, each in load_file(file).items()} for file in files]


def objective_of(network: str, examples: int, point: Point) -> Objective:
    """The mean cross-entropy of the first training images."""
    images, labels = mnist_fc.data()
    task = Task(
        NETWORKS[network],
        {"train": (images[:examples], labels[:examples])},
        {"train": Loss(F.cross_entropy, on="train")},
    )
    objective = build_objective(
        lambda: task,
        LOSS,
        ObjectiveSettings(
            device=torch.device("cpu"), precision="float64", norm_stats="running", batch_size=None
        ),
    )
    objective.settle_batch_sizes(point)
    return objective


def calibration_of(iterates: list[Point], objective: Remembered) -> dict[str, float]:
    """The largest share on the three segments the package takes."""
    shares = []
    for index in sorted({places[0] for places in sampled(len(iterates) - 1)}):
        shares.append(calibrate(iterates[index], iterates[index + 1], objective, LOSS)["train"])
        objective.forget_all_but(iterates[index + 1])
    return {"train": max(shares)}


def compare(
    start: Point,
    end: Point,
    objective: Remembered,
    tried: list[Choice],
    calibration: dict[str, float],
    reference: int,
) -> list[Measured]:
    """Every choice on one segment."""
    first, done, asked = objective.at(start), [], []
    for choice in tried:
        objective.gradients = objective.passes = 0
        found, _ = allocate(start, end, objective, LOSS, choice.method(calibration), at_start=first)
        done.append(found["train"])
        asked.append((objective.gradients, objective.passes))
    finest = max(reference, *(each.level for each in done))
    exact = allocate(start, end, objective, LOSS, Method(COMPOSITE.rules[finest]), at_start=first)[
        0
    ]["train"].allocation
    return [
        Measured(
            *counts,
            each.level,
            float(each.residual),
            float(each.loss_end - each.loss_start),
            _total(abs(each.allocation[name] - exact[name]).sum() for name in exact),
            _total(abs(exact[name]).sum() for name in exact),
            _total(abs(each.allocation[name].sum() - exact[name].sum()) for name in exact),
            _total(abs(exact[name].sum()) for name in exact),
            float(each.error_bound),
        )
        for counts, each in zip(asked, done, strict=True)
    ]


def _total(parts: Any) -> float:
    return math.fsum(map(float, parts))


def summary(choice: Choice, found: list[Measured]) -> dict[str, Any]:
    """One choice over all segments."""
    of = {
        name: np.array([getattr(each, name) for each in found])
        for name in Measured.__dataclass_fields__
    }
    residual = abs(of["residual"])
    bounded = of["error_bound"] > 0
    ratios = of["error"][bounded] / of["error_bound"][bounded]
    return {
        "rule": choice.rule,
        "tolerance": None if math.isinf(choice.tolerance) else choice.tolerance,
        "both": choice.both,
        "evaluations": float(of["evaluations"].mean()),
        "forward_passes": float(of["forward_passes"].mean()),
        "deepest": int(of["level"].max()),
        "residual": float(residual.sum() / abs(of["change"]).sum()),
        "worst": float(residual.max()),
        "over": int((residual > choice.limit).sum()),
        "parameters": float(of["error"].sum() / of["size"].sum()),
        "layers": float(of["layer_error"].sum() / of["layer_size"].sum()),
        "wrong": None
        if math.isinf(choice.tolerance)
        else int((of["error"] > 2 * choice.tolerance).sum()),
        "error_to_bound": np.quantile(ratios, (0.05, 0.5, 0.95)).tolist() if len(ratios) else None,
        "error_over_bound": float((ratios > 1).mean()) if len(ratios) else None,
    }


def short(value: float, digits: int = 1) -> str:
    """A number as `1.6e-2`.

    >>> short(0.016), short(1e-3, 0), short(1.7)
    ('1.6e-2', '1e-3', '1.7')
    """
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}" if int(exponent) else mantissa


def titled(rule: str, tolerances: list[float], both: bool) -> str:
    """What a row is called.

    >>> titled("simpson", [1e-2, 3e-3, 1e-3], True)
    'simpson, 1e-2 to 1e-3, both'
    """
    ends = [short(each, 0) for each in (*tolerances[:1], *tolerances[1:][-1:])]
    return ", ".join([rule, *filter(None, [" to ".join(ends), "both" if both else ""])])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, those that differ in nothing but the tolerance as one."""
    lines = [
        "| choice | evaluations | Σ\\|residual\\|/Σ\\|ΔL\\| | worst \\|residual\\| | over | single "
        "parameters | layer sums | L1 over |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (rule, both, *cells), alike in itertools.groupby(
        rows, lambda row: (row["rule"], row["both"], *_cells(row))
    ):
        tolerances = [row["tolerance"] for row in alike if row["tolerance"]]
        lines.append(f"| {' | '.join([titled(rule, tolerances, both), *cells])} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['evaluations']:.2f}"
        + (f" + {row['forward_passes']:.0f}" if row["forward_passes"] else ""),
        *(short(row[name]) for name in ("residual", "worst")),
        str(row["over"]),
        *(short(row[name]) for name in ("parameters", "layers")),
        "–" if row["wrong"] is None else str(row["wrong"]),
    )


def remarks(rows: list[dict[str, Any]], calibration: float) -> str:
    """The paper's guarantee, and how error bounds compare with errors."""
    named = {Choice(row["rule"], row["tolerance"] or math.inf, row["both"]): row for row in rows}
    guarded = named[Choice("trapezoid", GUARANTEE)]
    reached = (
        "every segment"
        if not guarded["over"]
        else f"all but {guarded['over']} segments (worst {short(guarded['worst'])})"
    )
    lines = [
        f"|residual| <= {short(GUARANTEE, 0)}: `trapezoid` refined at it reaches it on {reached} "
        f"with {guarded['evaluations']:.2f} evaluations per segment and {2 ** guarded['deepest']} "
        "intervals at most.",
        f"Calibration of the trapezoid: {calibration:.4f}.",
    ]
    for name in ("trapezoid", "simpson", "4 intervals"):
        low, middle, high = named[Choice(name)]["error_to_bound"]
        lines.append(
            f"Σ|A − A*| / error_bound of `{name}`: {low:.2g} to {high:.2g} (5 to 95 %), median "
            f"{middle:.2g}; over 1 on {named[Choice(name)]['error_over_bound']:.0%} of the "
            "segments."
        )
    return "\n".join(lines)


def main() -> None:
    """Train, try every choice on every segment, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="relu")
    parser.add_argument("--segments", type=int, default=mnist_fc.ITERATES)
    parser.add_argument("--examples", type=int, default=mnist_fc.TRAIN)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument(
        "--reference",
        type=int,
        default=4,
        choices=range(3, len(COMPOSITE.rules)),
        help="level of the nested family",
    )
    parser.add_argument("--json", type=Path, help="the rows, and every choice on every segment")
    parser.add_argument("--table", type=Path, help="the table and the remarks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, tried = time.perf_counter(), choices()
    iterates = points(given.network, given.segments)
    objective = Remembered(objective_of(given.network, given.examples, iterates[0]))
    calibration = calibration_of(iterates, objective)
    found: list[list[Measured]] = []
    for at in range(0, given.segments, given.stride):
        found.append(
            compare(iterates[at], iterates[at + 1], objective, tried, calibration, given.reference)
        )
        objective.forget_all_but(iterates[at + 1])
        if len(found) % 10 == 1:
            print(f"segment {at}: {time.perf_counter() - began:.0f} s", flush=True)
    columns = [list(column) for column in zip(*found, strict=True)]
    rows = [summary(choice, column) for choice, column in zip(tried, columns, strict=True)]
    text = f"{table(rows)}\n\n{remarks(rows, calibration['train'])}\n"
    print(f"{text}\n{len(found)} segments, {time.perf_counter() - began:.0f} s")
    if given.table:
        given.table.write_text(text)
    if given.json:
        each = {
            choice.name: [asdict(one) for one in column]
            for choice, column in zip(tried, columns, strict=True)
        }
        settings = {
            name: value for name, value in vars(given).items() if name not in ("json", "table")
        }
        given.json.write_text(
            json.dumps({"settings": settings, **calibration, "rows": rows, "segments": each})
        )


if __name__ == "__main__":
    main()
