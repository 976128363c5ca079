"""The errors of sums over training: each kind, all together, and what they leave to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import nn

from lca_posthoc import Loss, Task, findings, open_run, plots, run
from lca_posthoc.findings.errors import (
    KINDS,
    described_errors,
    over_groups,
    untold_sentence,
    verdicts,
)
from lca_posthoc.replay.events import silent
from lca_posthoc.results import LossResults
from tests.helpers.short_training import record_training, value

STEPS, EXAMPLES = 16, 60
RUNS: dict[str, dict[str, Any]] = {
    "coarse": {"rule": "trapezoid", "tolerance": "inf"},
    "exact": {"rule": "simpson", "tolerance": 1e-9, "precision": "float64"},
    "fixed": {"rule": "left", "tolerance": "inf"},
    "drawn": {"subset": ["train=0.5@1"], "losses": ["each"]},
    "sampled": {"segments": "0.5@3", "keep": "tensors", "losses": ["each"]},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(EXAMPLES, 4, generator=generator), torch.arange(EXAMPLES) % 3
    losses = {
        "each": Loss(value, on="train", per="example"),
        "classes": Loss(value, on="train", group_by=data[1] * data[1]),
    }
    return Task(network, {"train": data}, losses)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training with large steps, replayed in several ways."""
    place = tmp_path_factory.mktemp("errors")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.8, momentum=0.9)
    record_training(
        place / "iterates", model, task().data["train"], optimizer, steps=STEPS, batch=10
    )
    for name, settings in RUNS.items():
        chosen = {
            "losses": ["all"],
            "keep": "parameters",
            "causes": name in ("coarse", "drawn"),
            "cluster": "inline",
            "progress": silent,
        }
        run(place / "iterates", task(), out=place / f"{name}.lca", **(chosen | settings))
    return place


def loss_of(folder: Path, name: str, loss: str = "each") -> LossResults:
    return open_run(folder / f"{name}.lca")[loss]


def test_quadrature_and_precision_are_those_of_a_plain_loop(folder: Path) -> None:
    results = loss_of(folder, "coarse")
    table, steps = results.tensors, results.steps
    measured = steps["precision_error"].values
    relative = np.mean([each for each in measured if not np.isnan(each)])
    by_layer = findings.layers(results, by="tensor")
    for position, name in enumerate(table["tensor"].values):
        quadrature = precision = 0.0
        for row in range(STEPS):
            sizes = np.abs(table["allocated"].values[row])
            quadrature += steps["error_bound"].values[row] * sizes[position] / sizes.sum()
            precision += relative * sizes[position]
        one = by_layer.sel(layer=name)
        assert float(one["quadrature"]) == pytest.approx(quadrature)
        assert float(one["precision"]) == pytest.approx(precision)
        assert float(one["error"]) == pytest.approx(quadrature + precision)


@pytest.mark.parametrize("name", ["coarse", "drawn", "sampled"])
def test_errors_cover_what_exact_sums_are_off_by(folder: Path, name: str) -> None:
    """Quadrature is an upper bound; two standard errors of the examples and segments drawn cover
    most sums, and here all but one.
    """
    by_layer = findings.layers(loss_of(folder, name), by="tensor")
    exact = findings.layers(loss_of(folder, "exact"), by="tensor")["total"]
    off = np.abs(by_layer["total"].values - exact.values)
    assert (off > 0).any()
    outside = int((off > by_layer["error"].values).sum())
    assert outside <= (0 if name == "coarse" else 1)


@pytest.mark.parametrize("name", [*RUNS])
def test_a_verdict_is_what_the_error_leaves_to_say(folder: Path, name: str) -> None:
    by_layer = findings.layers(loss_of(folder, name), by="tensor")
    clearly = "" if name == "fixed" else ", clearly"
    for total, error, verdict in zip(
        by_layer["total"].values, by_layer["error"].values, by_layer["verdict"].values, strict=True
    ):
        if abs(total) <= error:
            assert verdict == "cannot be told from zero"
        else:
            assert verdict == ("helps" if total < 0 else "hurts") + clearly
    unknown = "Unknown errors of the sums: quadrature (the rule left has no bound)."
    assert (unknown in by_layer.attrs["left_out"]) == (name == "fixed")


def test_bounds_are_added_and_standard_errors_count_twice_in_quadrature() -> None:
    total = xr.DataArray([-1.0, 4.0, 4.0, 0.0], dims="layer")
    errors = {
        name: xr.DataArray([size, size, size, 0.0], dims="layer")
        for name, size in zip(KINDS, (0.1, 0.2, 0.3, 0.6, 0.8), strict=True)
    }
    variables = described_errors(total, errors, all_known=False)
    by_hand = 0.1 + 0.2 + 0.3 + ((2 * 0.6) ** 2 + (2 * 0.8) ** 2) ** 0.5
    assert variables["error"][1] == pytest.approx([by_hand, by_hand, by_hand, 0.0])
    assert variables["verdict"][1].tolist() == [
        "cannot be told from zero",
        "hurts",
        "hurts",
        "did nothing",
    ]
    assert verdicts(total.values, np.zeros(4), all_known=True)[0] == "helps, clearly"


def test_groups_together_have_the_weighted_mean_of_totals_and_of_bounds(folder: Path) -> None:
    results = loss_of(folder, "coarse", "classes")
    by_layer = findings.layers(results)
    assert by_layer["error"].dims == by_layer["total"].dims == ("layer", "group")
    share = results.steps["weight"].values[0] / results.steps["weight"].values[0].sum()
    together = over_groups(results, by_layer)
    for name in ("total", "quadrature", "precision"):
        by_hand = by_layer[name].values @ share
        assert together[name].values == pytest.approx(by_hand), name
    candidates = findings.candidates(results)
    assert candidates["error"].sel(layer="0") == pytest.approx(
        float(together["error"].sel(layer="0"))
    )


def test_causes_and_examples_have_the_errors_of_layers(folder: Path) -> None:
    results = loss_of(folder, "drawn")
    by_layer, causes = findings.layers(results), findings.causes(results)
    assert causes["layer_error"].values == pytest.approx(by_layer["error"].values)
    assert causes["layer_verdict"].values.tolist() == by_layer["verdict"].values.tolist()
    # of a cause, what using a part of the examples changes is not known
    assert (
        "Unknown errors of the sums: using only a part of the examples." in causes.attrs["left_out"]
    )
    assert not np.char.endswith(causes["verdict"].values.astype(str), "clearly").any()
    examples = findings.examples(results)
    assert examples["error"].values == pytest.approx(by_layer["error"].values)
    # the quadrature of causes is that of the layer's gradients along parts of its motion
    coarse = loss_of(folder, "coarse")
    parts, whole = findings.causes(coarse), findings.layers(coarse)
    assert (parts["quadrature"].sum("cause").values >= 0.999 * whole["quadrature"].values).all()


def test_a_layer_within_its_error_is_no_candidate_and_is_drawn_pale(folder: Path) -> None:
    candidates = findings.candidates(loss_of(folder, "coarse"))
    wide = candidates.assign(
        total=("layer", np.full(candidates.sizes["layer"], 0.5)),
        error=("layer", np.full(candidates.sizes["layer"], 0.6)),
        verdict=("layer", np.full(candidates.sizes["layer"], "cannot be told from zero", object)),
    )
    figure = plots.candidates(wide, figure=Figure(layout="constrained"))
    bars = figure.axes[0].patches
    assert {round(bar.get_facecolor()[3], 2) for bar in bars} == {0.35}
    assert "Within their errors, so not told from zero" in untold_sentence(wide)
    hurt = np.abs(candidates["total"].values) > candidates["error"].values
    assert (
        candidates["freeze"].values.tolist() == ((candidates["total"].values > 0) & hurt).tolist()
    )
