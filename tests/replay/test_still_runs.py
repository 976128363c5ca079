"""Runs in which nothing moves, or as little as there can be: every finding, figure, section and
export is finite or says why not.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn

import lca_posthoc
from lca_posthoc import Loss, Task, findings
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.errors import LCAError, LCAWarning
from lca_posthoc.export import export
from lca_posthoc.export.write import FORMATS
from lca_posthoc.findings import summary
from lca_posthoc.report import write_report

from ..helpers.cli import document, last_line, lca, write_step

GENERATOR = torch.Generator().manual_seed(5)
INPUTS = torch.randn(24, 5, generator=GENERATOR)
LABELS = torch.arange(24) % 3


class Scalar(nn.Module):
    """A model of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * inputs[:, :3]


class OneWeight(nn.Module):
    """A linear map of one input to one output, without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(1, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.map(inputs[:, :1]).expand(-1, 3) * torch.tensor([1.0, 2.0, 3.0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@dataclass(frozen=True)
class Still:
    """A model and the learning rate of each of its steps; `only` names the tensors that are trained
    at all.
    """

    build: Callable[[], nn.Module]
    rates: tuple[float, ...]
    only: tuple[str, ...] | None = None
    keep: str = "parameters"


RUNS = {
    "zeros": Still(mlp, (0.0, 0.0, 0.0)),
    "zeros, units kept": Still(mlp, (0.0, 0.0, 0.0), keep="units"),
    "zeros, tensors kept": Still(mlp, (0.0, 0.0, 0.0), keep="tensors"),
    "one segment": Still(mlp, (0.1,)),
    "one dead segment": Still(mlp, (0.0,)),
    "one scalar": Still(Scalar, (0.1, 0.1, 0.1)),
    "one dead scalar": Still(Scalar, (0.0, 0.0)),
    "one weight": Still(OneWeight, (0.1, 0.1, 0.1)),
    "warm-up": Still(mlp, (0.0, 0.1, 0.2, 0.3)),
    "stops": Still(mlp, (0.1, 0.0, 0.0)),
    "one tensor moves": Still(mlp, (0.1, 0.1, 0.1), only=("2.bias",)),
}
# figures, pages and exports take long
DRAWN = ("zeros", "one dead segment", "one scalar", "one tensor moves")
# of one loss, whose examples need not be told apart
FINDINGS = [
    name
    for name, finding in declared_findings().items()
    if finding.runs != "compared" and finding.losses == 1 and not finding.examples
]


Made = Callable[[str], lca_posthoc.Run]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def labels(inputs: Tensor, targets: Tensor) -> Tensor:
    return targets


def record(directory: Path, still: Still) -> Path:
    """Iterates of gradient descent."""
    torch.manual_seed(0)
    model = still.build()
    write_step(directory, 0, model.state_dict())
    for step, rate in enumerate(still.rates, 1):
        model.zero_grad()
        cross_entropy(model(INPUTS), LABELS).mean().backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if still.only is None or name in still.only:
                    parameter -= rate * parameter.grad
        write_step(directory, step, model.state_dict())
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    @cache
    def run(name: str) -> lca_posthoc.Run:
        place = tmp_path_factory.mktemp("still")
        losses = {
            "train": Loss(cross_entropy),
            "validation": Loss(cross_entropy, on="validation"),
            "per_class": Loss(cross_entropy, group_by=labels),
        }
        still = RUNS[name]
        data = {"train": (INPUTS, LABELS), "validation": (INPUTS[:12] + 0.1, LABELS[:12])}
        task = Task(still.build, data, losses)
        iterates = record(place / "iterates", still)
        options: dict[str, Any] = {"cluster": "inline", "losses": ["all"], "keep": still.keep}
        return lca_posthoc.run(iterates, task, out=place / "run.lca", **options)

    return run


@pytest.fixture(autouse=True)
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LCAWarning)  # notes of a run: that nothing moves is one
        yield


def undefined(found: xr.Dataset) -> set[str]:
    """The variables that hold NaN or infinity."""
    return {
        str(name)
        for name, each in found.variables.items()
        if each.dtype.kind == "f" and not np.isfinite(each).all()
    }


# NaN of what never moved or turned, and of components that a block does not have
DOCUMENTED = {
    "blocks": {"total", "mean"},
    "oscillation": {"turns", "interval", "overall_interval", "gradient"},
}
BY_GROUP = ("curve", "distribution", "helping", "layers", "microscope", "oscillation")


@pytest.mark.parametrize("loss", ["train", "per_class"])
@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("name", RUNS)
def test_every_finding_is_finite_or_says_why_not(
    made: Made, name: str, finding: str, loss: str
) -> None:
    try:
        found = getattr(findings, finding)(made(name)[loss])
    except LCAError as refusal:
        if not any(word in str(refusal) for word in ("--keep", "peak", "--causes", "--along")):
            raise
        return
    assert undefined(found) <= DOCUMENTED.get(finding, set()) or found.attrs["left_out"]


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_drawn_or_refused_in_words(
    made: Made, name: str, finding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[str] = []
    save = Figure.savefig

    def read(figure: Figure, *given: Any, **options: Any) -> None:
        save(figure, *given, **options)
        words.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", read)
    run = made(name)
    for loss in ("train", "per_class") if name == "zeros" else ("train",):
        group = ["--group", 1] if loss == "per_class" and finding in BY_GROUP else []
        result = lca(
            "plot", run.path, finding, "--loss", loss, *group, "-o", tmp_path / f"{loss}.png"
        )
        assert result.exit_code == 0 or last_line(result)
        assert (tmp_path / f"{loss}.png").exists() is (result.exit_code == 0)
    assert [text for text in words if re.search(r"\b(nan|inf)\b", text)] == []


@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_two_losses_or_runs_and_films_are_drawn(
    made: Made, name: str, tmp_path: Path
) -> None:
    run = made(name)
    assert lca("plot", run.path, "generalisation", "-o", tmp_path / "two.png").exit_code == 0
    assert (
        lca(
            "plot", f"a={run.path}", f"b={run.path}", "compare", "-o", tmp_path / "runs.png"
        ).exit_code
        == 0
    )
    assert lca("compare", f"a={run.path}", f"b={run.path}").exit_code == 0
    if RUNS[name].keep == "parameters":
        assert lca("plot", run.path, "microscope", "-o", tmp_path / "film.gif").exit_code == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", DRAWN)
def test_every_format_of_export_is_written(
    made: Made, name: str, format: str, tmp_path: Path
) -> None:
    said: list[str] = []
    written = export(made(name), tmp_path / "out", format=format, losses=["train"], say=said.append)
    assert written
    if format != "tensorboard":
        assert {path.stem.split("_")[0] for path in written} >= {
            "curve",
            "layers",
            "distribution",
            "helping",
        }
    for path in written:
        if path.suffix == ".nc":
            xr.load_dataset(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", DRAWN)
def test_the_report_and_the_summaries_are_written_without_nan(
    made: Made, name: str, tmp_path: Path
) -> None:
    run = made(name)
    page = write_report([run], tmp_path / "page.html", losses=["train"]).read_text()
    shown = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    assert re.search(r"\b(nan|NaN|Infinity)\b", re.sub(r"<[^>]*>", " ", shown)) is None
    for loss, found in document(lca("summary", run.path, "--json"))["losses"].items():
        json.dumps(found, allow_nan=False)
        assert np.asarray(found["helping"]) + found["hurting"] + found["zero"] == pytest.approx(1)
        assert found["segments"] == len(RUNS[name].rates)
        assert found == json.loads(json.dumps(summary(run[loss])))
    assert re.search(r"\b(nan|inf)\b", lca("summary", run.path).stdout) is None
    assert re.search(r"\b(nan|inf)\b", run._repr_html_() + run["per_class"]._repr_html_()) is None
    assert lca("verify", run.path).exit_code == lca("status", run.path).exit_code == 0


@pytest.mark.parametrize("name", [name for name, still in RUNS.items() if not any(still.rates)])
def test_what_does_not_move_is_allocated_exactly_nothing(made: Made, name: str) -> None:
    for results in made(name).values():
        assert (results.tensors["allocated"].values == 0).all()
        assert (results.steps["residual"].values == 0).all()
        if results.holds("statistics"):
            assert int(findings.distribution(results)["zero"].sum()) > 0
            assert findings.distribution(results).sizes["bin"] == 0
