"""The published claim that is redone: its script on numbers of which everything is known, and at a
tiny size on the network itself.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import lca_posthoc as lca
from tests.test_examples import EXAMPLES, command, needs

SCRIPT = EXAMPLES / "forgetting_by_depth.py"
SETTINGS = ("reversed-AdamW", "reversed-SGD", "later-AdamW", "later-SGD")
BLOCK = 12 * 64 * 64 + 13 * 64  # kernels; biases, and two norms
PARAMETERS = (65 * 64 + 32 * 64, *[BLOCK] * 4, 2 * 64 + 65 * 65)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("forgetting_by_depth")


def rows_of(tables: str, title: str) -> list[list[str]]:
    """The rows of one table, without its head, as lists of cells."""
    (part,) = (part for part in tables.split("## ") if part.startswith(f"{title}\n"))
    return [line.strip("| ").split(" | ") for line in part.strip().splitlines()[4:]]


def shown(values: list[float], digits: int) -> str:
    """A mean and half its interval, computed apart from the script."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def test_what_is_put_back_and_what_is_moved_alone_differ_by_what_parts_do_together(
    script: ModuleType,
) -> None:
    """The loss a + 2 b + 3 a·b, a at depth 0 and b at depth 1."""
    before = {"0.a": torch.tensor(1.0), "1.b": torch.tensor(2.0)}
    after = {"0.a": torch.tensor(4.0), "1.b": torch.tensor(7.0)}

    def value(weights: dict[str, torch.Tensor]) -> float:
        a, b = weights["0.a"], weights["1.b"]
        return float(a + 2 * b + 3 * a * b)

    assert script.interventions(value, before, after, [0]) == {
        "put_back": 3 + 3 * 3 * 7,  # 3 (1 + 3 b): b where it is at the end
        "alone": 3 + 3 * 3 * 2,
    }
    assert script.interventions(value, before, after, [1]) == {
        "put_back": 2 * 5 + 3 * 5 * 4,
        "alone": 2 * 5 + 3 * 5 * 1,
    }
    whole = value(after) - value(before)
    assert script.interventions(value, before, after, [0, 1]) == {"put_back": whole, "alone": whole}


def test_a_depth_is_no_other_of_whose_name_it_is_the_beginning(script: ModuleType) -> None:
    weights, others = {"1.x": 1, "10.x": 2}, {"1.x": 3, "10.x": 4}
    assert script.mixed(weights, others, [1]) == {"1.x": 3, "10.x": 2}


def stored(seed: int, towards_upper: float) -> dict[str, Any]:
    """A result: the loss on the first text rose by two, and the upper blocks caused so much more of
    it than the lower ones.
    """
    draw = np.random.default_rng(seed)
    allocated = 0.3 + np.array([0, 0, 0, towards_upper / 2, towards_upper / 2, 0])
    depths = {}
    for position, name in enumerate(["embedding", *(f"block {n}" for n in range(1, 5)), "readout"]):
        causes = draw.normal(size=5)
        depths[name] = {
            "parameters": PARAMETERS[position],
            "motion": float(draw.uniform(1, 2)),
            "allocated": float(allocated[position]),
            "error": 0.01,
            "verdict": "hurts, clearly",
            "worse": float(draw.uniform()),
            "causes": dict(
                zip(("signal", "noise", "momentum", "decay", "rest"), causes.tolist(), strict=True)
            ),
            "put_back": float(draw.normal()),
            "alone": float(draw.normal()),
        }
    halves = {
        "lower": {"put_back": 0.5, "alone": 0.25},
        "upper": {"put_back": 0.5 + towards_upper + 0.01 * seed, "alone": 0.75},
    }
    return {
        "loss": {"first": [2.0, 4.0], "second": [5.0, 2.0 + seed]},
        "residual": 0.004,
        "rest": 0.25,
        "depths": depths,
        "halves": {"blocks": halves, "all depths": halves},
        "processor_seconds": 10.0 + 2 * seed,
    }


def test_tables_say_what_results_hold(script: ModuleType, tmp_path: Path) -> None:
    towards = dict(zip(SETTINGS, (0.2, -0.2, 0.0, 0.1), strict=True))
    results = {
        setting: [stored(seed, upper + 0.01 * seed) for seed in range(3)]
        for setting, upper in towards.items()
    }
    tables = script.tables(results)
    claim = rows_of(tables, "Upper half minus lower half, % of what was forgotten")
    assert [row[0] for row in claim] == list(SETTINGS)
    assert [row[1] for row in claim] == ["confirms", "refutes", "open", "confirms"]
    assert claim[0][2] == shown([100 * (0.2 + 0.01 * seed) / 2 for seed in range(3)], 1)
    assert claim[0][3] == shown([100 * (0.2 + 0.02 * seed) / 2 for seed in range(3)], 1)
    assert claim[0][4] == "25.0 ± 0.0"
    (first, *_) = rows_of(tables, "What was forgotten")
    assert first == [
        *("reversed-AdamW", "2.00 → 4.00", "5.00 → 3.00", "2.000 ± 0.000"),
        *("0.20 %", "0.50 %", "25.00 %", "12 s"),
    ]

    seeds = results["later-SGD"]
    of_block = [one["depths"]["block 3"] for one in seeds]
    per_parameter = [100 * own["allocated"] / 2 * 10_000 / BLOCK for own in of_block]
    assert rows_of(tables, "Allocation per 10,000 parameters, %")[3][4] == shown(per_parameter, 1)
    worse = [100 * own["worse"] for own in of_block]
    assert rows_of(tables, "Passages made worse, %")[3][4] == shown(worse, 0)
    momentum = [100 * own["causes"]["momentum"] / 2 for own in of_block]
    causes = {
        (depth, cause): cells
        for depth, cause, *cells in rows_of(tables, "By cause, % of what was forgotten")
    }
    assert len(causes) == 6 * 5
    assert causes["block 3", "momentum"][3] == shown(momentum, 1)
    ranks = [
        stats.spearmanr(
            [own["motion"] for own in one["depths"].values()],
            [own["put_back"] for own in one["depths"].values()],
        ).statistic
        for one in seeds
    ]
    correlations = {
        name: cells for name, *cells in rows_of(tables, "Rank correlations over the six depths")
    }
    said = f"{np.mean(ranks):.2f} (".replace("-", "−")
    assert correlations["motion, put back"][3].startswith(said)

    script.draw(results, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 20_000


def test_one_setting_that_is_open_or_against_it_is_not_told_by_allocation_alone(
    script: ModuleType,
) -> None:
    """Where putting the blocks back says otherwise, the claim stays open."""
    seeds = [stored(seed, 0.2 + 0.01 * seed) for seed in range(3)]
    for one in seeds:
        one["halves"]["blocks"]["upper"]["put_back"] = -0.5
    assert script.verdict(seeds) == "open"


@needs("tinyshakespeare.txt")
def test_the_command_allocates_what_was_forgotten_once(tmp_path: Path) -> None:
    small = ("--first", 2, "--second", 3, "--passages", 12, "--measured", 6)
    command(SCRIPT, tmp_path, "--seeds", "0:1", *small)
    files = {setting: tmp_path / setting / "seed0.json" for setting in SETTINGS}
    contents = {setting: file.read_bytes() for setting, file in files.items()}
    tables = (tmp_path / "tables.md").read_text()
    for column, (setting, content) in enumerate(contents.items(), 1):
        values = json.loads(content)
        run = lca.open_run(files[setting].with_suffix(".lca"))["first"]
        start, end = values["loss"]["first"]
        depths = values["depths"]
        assert [own["parameters"] for own in depths.values()] == list(PARAMETERS)
        allocated = [own["allocated"] for own in depths.values()]
        assert sum(allocated) + values["residual"] == pytest.approx(end - start, abs=1e-6)
        assert values["rest"] < 1e-4  # AdamW's moments are recorded, SGD needs none
        by_tensor = run.examples["allocated"].sum("step")
        change = run.examples["loss_end"][-1] - run.examples["loss_start"][0]
        apart = by_tensor.sum("tensor") + run.examples["residual"].sum("step") - change
        assert float(abs(apart).max()) < 1e-5
        assert len(change) == 6
        for depth, own in enumerate(depths.values()):
            names = [str(name) for name in by_tensor["tensor"].values]
            chosen = [name.startswith(f"{depth}.") for name in names]
            of_passages = by_tensor.isel(tensor=chosen).sum("tensor")
            assert own["allocated"] == pytest.approx(float(of_passages.mean()), abs=1e-6)
            assert own["worse"] == pytest.approx(float((of_passages > 0).mean()))
            assert sum(own["causes"].values()) == pytest.approx(own["allocated"], abs=1e-9)
            row = rows_of(tables, "Allocation, % of what was forgotten")[depth]
            share = 100 * float(of_passages.mean()) / (end - start)
            assert float(row[column].replace("−", "-")) == pytest.approx(share, abs=0.06)
    assert (tmp_path / "forgetting_by_depth.png").stat().st_size > 20_000

    command(SCRIPT, tmp_path, "--seeds", "0:1", *small)
    assert {setting: file.read_bytes() for setting, file in files.items()} == contents
    with pytest.raises(AssertionError, match="Name another OUT"):
        command(SCRIPT, tmp_path, "--seeds", "0:1", *small[:-1], 7)
