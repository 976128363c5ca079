"""The errors of sums over training, each apart, and what is held back on long segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lca_posthoc import Loss, Task, findings, open_run, plots, run
from lca_posthoc.errors import LCAError
from lca_posthoc.export import export
from lca_posthoc.findings.bands import path_bands
from lca_posthoc.replay.events import silent
from lca_posthoc.results import LossResults
from tests.helpers.cli import lca, says
from tests.helpers.short_training import record_training, value

STEPS, SPARSE = 12, [0, 1, 2, 4, 6, 9, 12]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    losses = {
        "train": Loss(value, on="train"),
        "classes": Loss(value, on="train", group_by=data[1]),
    }
    return Task(network, {"train": data}, losses)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one training: dense, sparse, of long segments alone, and without path bands."""
    place = tmp_path_factory.mktemp("bands")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.4, momentum=0.9)
    record_training(place / "dense", model, task().data["train"], optimizer, steps=STEPS, batch=8)
    for name, steps in (("sparse", SPARSE), ("long", SPARSE[2:])):
        (place / name).mkdir()
        for step in steps:
            file = f"step_{step:08d}.safetensors"
            (place / name / file).write_bytes((place / "dense" / file).read_bytes())
    for name, series, band in (
        ("dense", "dense", None),
        ("sparse", "sparse", None),
        ("long", "long", None),
        ("off", "sparse", "off"),
    ):
        run(
            place / series,
            task(),
            losses=["all"],
            out=place / f"{name}.lca",
            keep="parameters",
            path_band=band,
            subset=["train=0.5@1"] if name == "sparse" else [],
            cluster="inline",
            progress=silent,
        )
    return place


def loss_of(folder: Path, name: str, loss: str = "train") -> LossResults:
    return open_run(folder / f"{name}.lca")[loss]


def test_the_band_is_that_of_a_plain_loop(folder: Path) -> None:
    results = loss_of(folder, "sparse")
    names = [str(name) for name in results.tensors["tensor"].values]
    path, allocated = results.other_path, results.tensors["allocated"]
    for layer, band in zip(*_layers_and(results, "path"), strict=True):
        own = [position for position, name in enumerate(names) if name.startswith(f"{layer}.")]
        shift = [float(row[own].sum()) for row in path["shift"].values]
        halves = [
            float(path["doubled"].values[row : row + 2, own].sum())
            - float(allocated.values[row : row + 2, own].sum())
            for row in (2, 4)  # steps 2 to 4 to 6, and 6 to 9 to 12
        ]
        squares = [sum(one**2 for one in of_path) for of_path in (shift, halves)]
        by_hand = abs(sum(shift)) + abs(sum(halves)) + 2 * max(squares) ** 0.5
        assert band == pytest.approx(by_hand, rel=1e-9)
        layers = findings.layers(results).sel(layer=layer)
        assert float(layers["curve"]) == pytest.approx(sum(shift))
        assert float(layers["doubling"]) == pytest.approx(sum(halves))
        assert band > 0


def _layers_and(results: LossResults, name: str) -> tuple[list[str], list[float]]:
    finding = findings.layers(results)
    return [str(layer) for layer in finding["layer"].values], finding[name].values.tolist()


def test_layers_carry_each_error_apart(folder: Path) -> None:
    sparse = findings.layers(loss_of(folder, "sparse"))
    assert {"path", "quadrature", "examples"} <= set(sparse)
    assert sparse["quadrature"].sum() == pytest.approx(
        float(loss_of(folder, "sparse").steps["error_bound"].sum())
    )
    dense = findings.layers(loss_of(folder, "dense"))
    assert "quadrature" in dense
    assert not {"path", "examples"} & set(dense)
    assert "path" not in findings.layers(loss_of(folder, "off"))
    grouped = findings.layers(loss_of(folder, "long", "classes"))
    assert grouped["path"].dims == grouped["total"].dims


def test_a_band_of_all_tensors_is_what_is_left_of_the_parts(folder: Path) -> None:
    results = loss_of(folder, "long")
    count = results.tensors.sizes["tensor"]
    together = path_bands(results, [range(count)])
    apart = path_bands(results, [[position] for position in range(count)])
    assert together is not None
    assert apart is not None
    assert together.sum() < apart.sum()  # what moves between tensors cancels


def test_shares_are_of_segments_of_one_step(folder: Path) -> None:
    sparse = loss_of(folder, "sparse")
    helping, dense = findings.helping(sparse), sparse.tensors.isel(step=[0, 1])
    assert np.isnan(helping["helping"].values).tolist() == [False] * 2 + [True] * 4
    assert "hero_share" not in helping
    assert "withheld" in helping.attrs["left_out"]
    counted = float(dense["helping"].sum() / (2 * dense["elements"].sum()))
    figures = findings.summary(sparse)
    assert figures["helping"] == pytest.approx(counted)
    assert figures["long_segments"] == 4
    layers = findings.layers(sparse)
    moved = float(abs(layers["doubling"]).sum() / abs(layers["total"]).sum())
    assert figures["doubling"] == pytest.approx(moved)


@pytest.mark.parametrize("name", ["helping", "oscillation", "distribution"])
def test_what_counts_parameters_is_held_back_where_all_segments_are_long(
    name: str, folder: Path
) -> None:
    with pytest.raises(LCAError, match=r"straight line.*withheld"):
        getattr(findings, name)(loss_of(folder, "long"))
    figures = findings.summary(loss_of(folder, "long"))
    assert not {"helping", "hurting", "zero"} & set(figures)
    assert "helping" not in findings.layers(loss_of(folder, "long"))


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("dense", set()),
        ("sparse", {"distribution", "oscillation"}),
        ("long", {"distribution", "oscillation", "helping"}),
    ],
)
def test_an_export_goes_on_without_what_is_held_back(
    folder: Path, tmp_path: Path, name: str, left_out: set[str]
) -> None:
    said: list[str] = []
    export(open_run(folder / f"{name}.lca"), tmp_path / "x", losses=["train"], say=said.append)
    lines = [text for text in said if "is skipped" in text and "one training step" in text]
    assert {text.partition(" ")[0] for text in lines} == left_out


def test_named_parameters_are_still_traced(folder: Path) -> None:
    finding = findings.oscillation(loss_of(folder, "long"), parameters=["0.weight[0, 0]"])
    assert "allocation" in finding
    assert "turns" not in finding


def test_compare_shows_bands_and_counts_differences_within_them(folder: Path) -> None:
    finding = findings.compare({"sparse": loss_of(folder, "off"), "long": loss_of(folder, "long")})
    assert np.isnan(finding["path_band"].sel(label="sparse")).all()
    assert (finding["path_band"].sel(label="long") > 0).all()
    by_hand = findings.layers(loss_of(folder, "long"))["path"].values
    assert finding["path_band"].sel(label="long").values == pytest.approx(by_hand)


def test_bars_are_drawn_with_their_errors(folder: Path) -> None:
    finding = findings.layers(loss_of(folder, "long"))
    ax = plots.layers(finding, quantity="total")
    low, high = ax.collections[0].get_segments()[0][:, 0]
    total, band = float(finding["total"][0]), float(finding["path"][0])
    assert (low, high) == pytest.approx((total - band, total + band))
    lines = plots.layers(finding)  # over training, by default
    low, high = lines.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((total - band, total + band))
    assert "change by other paths through" in " ".join(lines.figure.get_supxlabel().split())


def test_summary_words_what_paths_move_and_which_segments_shares_are_of(folder: Path) -> None:
    said = " ".join(lca("summary", folder / "sparse.lca", "--loss", "train").stdout.split())
    says(said, "moved between modules by other paths", "segments of one step, 2 of 6)")
    assert "± path, Σ" not in said
