"""Whose statistics normalisation layers have: recalibrated ones against an oracle, both modes
compared, the mode said everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lca_posthoc import Loss, Recorder, Run, Task, findings, open_run, plots, run
from lca_posthoc.errors import InputError
from lca_posthoc.findings import summary
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.worker.modes import SHARE
from lca_posthoc.report import write_report

from ..helpers.cli import document, lca, says
from ..helpers.model_cases import CASES, Batch, Case, classes
from ..helpers.oracle import Oracle, simpson

# --- the oracle: a checkpoint with the statistics of the data at its weights ----------------------


class Gathered(nn.Module):
    """A normalisation layer in float64 that takes the statistics of the batch and keeps what it was
    given.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.seen = norm, list[Tensor]()
        self.each_instance = isinstance(norm, nn.modules.instancenorm._InstanceNorm)

    def forward(self, x: Tensor) -> Tensor:
        # channels, examples, places
        self.seen.append(x.transpose(0, 1).flatten(2) if x.dim() > 2 else x.T[..., None])
        axes = [
            axis for axis in range(x.dim()) if axis != 1 and not (axis == 0 and self.each_instance)
        ]
        y = (x - x.mean(axes, keepdim=True)) / (
            x.var(axes, keepdim=True, correction=0) + self.norm.eps
        ).sqrt()
        channels = [1, -1] + [1] * (x.dim() - 2)
        return (
            y
            if self.norm.weight is None
            else y * self.norm.weight.view(channels) + self.norm.bias.view(channels)
        )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of everything seen together; of instances the means over them."""
        every = torch.cat(self.seen, 1)
        if self.each_instance:
            return every.mean(2).mean(1), every.var(2, correction=1).mean(1)
        return every.flatten(1).mean(1), every.flatten(1).var(1, correction=0)


def recalibrated(
    build: Callable[[], nn.Module],
    checkpoint: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    kept: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The checkpoint as an oracle recalibrates it, in float64."""
    model = build().double().eval()
    model.load_state_dict(
        {
            name: each.double() if each.is_floating_point() else each
            for name, each in checkpoint.items()
        }
    )
    layers: dict[str, Gathered] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._NormBase) and name not in kept:
            parent, _, child = name.rpartition(".")
            layers[name] = Gathered(module)
            setattr(model.get_submodule(parent) if parent else model, child, layers[name])
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    found = {
        name: each.double() if each.is_floating_point() else each
        for name, each in checkpoint.items()
    }
    for name, layer in layers.items():
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = layer.statistics()
    return found


# --- networks -------------------------------------------------------------------------------------


def dense(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(12, 9), norm(9), nn.Tanh(), nn.Linear(9, 4))


def images(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3),
        norm(4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


class Frozen(nn.Module):
    """A first normalisation that stays in eval mode while it is trained, as in fine-tuning, and a
    second that does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 9), nn.BatchNorm1d(9)
        self.second, self.last, self.out = nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.last(self.second(torch.tanh(self.norm(self.first(x)))))))


def smooth(case: str, build: Callable[[], nn.Module], **changes: Any) -> Case:
    return replace(CASES[case], build=build, **{"norm_stats": (), "bound": 1e-5, **changes})


NETWORKS = {
    "convolutions, the last batch of two": CASES["conv_bn"],
    "recomputed in the backward pass": CASES["recomputed"],
    "dense": smooth("relu_mlp", dense(nn.BatchNorm1d), batch_size=8),  # of 50 examples
    "cumulative average": smooth(
        "relu_mlp", dense(lambda size: nn.BatchNorm1d(size, momentum=None)), batch_size=12
    ),
    "across processes": smooth("conv_bn", images(nn.SyncBatchNorm)),
    "batches of one": smooth("conv_bn", images(nn.BatchNorm2d), batch_size=1),
    "instances": smooth(
        "conv_bn",
        images(lambda size: nn.InstanceNorm2d(size, affine=True, track_running_stats=True)),
        bound=1e-4,
    ),
    "one stays as it was": smooth("relu_mlp", Frozen, batch_size=25),
}
KEPT = {"one stays as it was": ["norm"]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    places: dict[str, Path] = {}

    def place(name: str) -> Path:
        if name not in places:
            places[name] = NETWORKS[name].record(tmp_path_factory.mktemp("iterates"), steps=3)
        return places[name]

    return place


def replay(
    checkpoints: Path, task: Task, out: Path, heard: list[Any] | None = None, **settings: Any
) -> Run:
    chosen = {
        "cluster": "inline",
        "device": "cpu",
        "tolerance": math.inf,
        "norm_stats": "recalibrated",
        "losses": ["all"],
    }
    chosen |= {
        "progress": (heard if heard is not None else []).append,
        "durability": "none",
        "span": 4,
    }
    return run(checkpoints, task, out=out, **{**chosen, **settings})


def notes(heard: list[Any]) -> list[str]:
    return [event.text for event in heard if isinstance(event, Note)]


def points(checkpoints: Path) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted(checkpoints.glob("*.safetensors"))]


def cut(inputs: Tensor, size: int) -> list[Tensor]:
    return list(torch.split(inputs, size))


def errors(results: Any, wanted: Mapping[str, Tensor]) -> float:
    found = {str(name): each.values for name, each in results.allocation.data_vars.items()}
    assert found.keys() == wanted.keys()
    floor = 1e-5 * sum(float(each.abs().sum()) for each in wanted.values())
    return max(
        float(np.abs(found[name] - each.numpy()).sum()) / max(float(each.abs().sum()), floor)
        for name, each in wanted.items()
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_recalibrated_statistics_are_those_of_the_data_at_every_checkpoint(
    name: str, recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    case, checkpoints = NETWORKS[name], recorded(name)
    settings = {"batch_size": case.batch_size}
    results = replay(checkpoints, case.task(), tmp_path / "run", **settings)["train"]
    inputs = case.data()["train"][0]
    truth_at = [
        recalibrated(case.build, each, cut(inputs, case.batch_size), KEPT.get(name, ()))
        for each in points(checkpoints)
    ]
    judge = Oracle(case.build, case.data()["train"], case.values["train"])
    truth = judge.allocate(truth_at, *simpson(2))
    np.testing.assert_allclose(results.steps["loss_start"], truth.losses[:-1], rtol=1e-5)
    np.testing.assert_allclose(results.steps["loss_end"], truth.losses[1:], rtol=1e-5)
    assert errors(results, truth.stacked()) <= case.bound
    kept = results.manifest.settings["statistics"]
    assert kept == {
        "loss": "train",
        "split": "train",
        "examples": len(inputs),
        "batch_size": case.batch_size,
        "kept": KEPT.get(name, []),
    }
    moved = results.steps["loss_end"] - results.steps["loss_start"]
    closed = results.tensors["allocated"].sum("tensor") + results.steps["residual"]
    np.testing.assert_allclose(closed, moved, atol=1e-9)


def test_recalibrated_in_float64_is_the_oracle_to_its_last_digits(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    case, checkpoints = NETWORKS["dense"], recorded("dense")
    results = replay(
        checkpoints,
        case.task(),
        tmp_path / "run",
        precision="float64",
        batch_size=8,
        losses=["train"],
    )["train"]
    at = [
        recalibrated(case.build, each, cut(case.data()["train"][0], 8))
        for each in points(checkpoints)
    ]
    truth = Oracle(case.build, case.data()["train"], case.values["train"]).allocate(at, *simpson(2))
    np.testing.assert_allclose(results.steps["loss_start"], truth.losses[:-1], rtol=1e-12)
    assert errors(results, truth.stacked()) <= 1e-6  # what is stored is float32


def test_one_batch_of_everything_has_the_losses_of_batch_mode(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    case, checkpoints = (
        NETWORKS["convolutions, the last batch of two"],
        recorded("convolutions, the last batch of two"),
    )
    one, other = (
        replay(checkpoints, case.task(), tmp_path / mode, norm_stats=mode, batch_size=30)[
            "train"
        ].steps
        for mode in ("batch", "recalibrated")
    )
    for name in ("loss_start", "loss_end"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)


class Stream(IterableDataset[Any]):
    """Examples in order."""

    def __init__(self, data: Batch) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*self.data, strict=True)


def called(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_every_loss_sees_the_statistics_of_the_first_loss_s_split(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whichever losses are asked for, first or later, with groups, over a part of the data, or read
    as a stream.
    """
    checkpoints = recorded("dense")
    case = NETWORKS["dense"]
    data = CASES["smooth_mlp"].data()
    losses = {
        "train": Loss(F.cross_entropy, on="train"),
        "validation": Loss(F.cross_entropy, on="validation"),
        "called": Loss(call=called, on="validation", group_by=lambda inputs, targets: targets),
        "penalty": Loss(l2=1e-3),
    }
    task = Task(case.build, data, losses)
    at = [recalibrated(case.build, each, cut(data["train"][0], 8)) for each in points(checkpoints)]
    truth = Oracle(case.build, data["validation"], classes).allocate(at, *simpson(2))
    settings = {"batch_size": 8}
    whole = replay(checkpoints, task, tmp_path / "whole", **settings)
    assert errors(whole["validation"], truth.stacked()) <= 1e-5
    weights = whole["called"].steps["weight"]
    mean = (whole["called"].steps["loss_start"] * weights).sum("group") / weights.sum("group")
    np.testing.assert_allclose(mean, truth.losses[:-1], rtol=1e-5)
    later = replay(
        checkpoints, task, tmp_path / "later", losses=["validation"], **{**settings, "span": 1}
    )
    assert later.manifest.settings["statistics"] == whole.manifest.settings["statistics"]
    later = replay(checkpoints, task, tmp_path / "later", losses=["all"])
    for name in losses:
        for part in ("allocation", "units"):
            one, other = (getattr(each[name], part).load() for each in (whole, later))
            # other batches, beside a loss with groups, round otherwise
            for variable in one.data_vars:
                np.testing.assert_allclose(one[variable], other[variable], rtol=1e-3, atol=1e-6)
    streamed = Task(case.build, {**data, "train": Stream(data["train"])}, losses)
    read = replay(checkpoints, streamed, tmp_path / "stream", losses=["validation"], **settings)[
        "validation"
    ]
    np.testing.assert_allclose(read.steps["loss_start"], truth.losses[:-1], rtol=1e-5)
    some = replay(
        checkpoints,
        task,
        tmp_path / "some",
        losses=["validation"],
        subset=["train=0:16"],
        **settings,
    )["validation"]
    at = [
        recalibrated(case.build, each, cut(data["train"][0][:16], 8))
        for each in points(checkpoints)
    ]
    np.testing.assert_allclose(
        some.steps["loss_start"],
        Oracle(case.build, data["validation"], classes).allocate(at, *simpson(2)).losses[:-1],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "settings", [{"span": 1}, {"span": 2, "cluster": "local", "workers": 1}], ids=str
)
def test_statistics_are_the_same_to_the_bit_however_spans_are_cut(
    recorded: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    case = NETWORKS["dense"]
    whole, other = (
        replay(
            recorded("dense"), case.task(), tmp_path / name, batch_size=8, losses=["train"], **given
        )["train"]
        for name, given in (("whole", {"span": 4}), ("cut", settings))
    )
    for part in ("allocation", "steps", "tensors", "totals"):
        assert getattr(whole, part).load().identical(getattr(other, part).load())


def test_a_batch_of_one_example_has_no_statistics_and_is_refused(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    case = NETWORKS["dense"]
    with pytest.raises(InputError, match=r"one value per channel.*--batch-size"):
        # of 50 examples one is left
        replay(recorded("dense"), case.task(), tmp_path / "run", batch_size=7)
    assert not (tmp_path / "run").exists()


def test_recalibration_needs_data(tmp_path: Path, recorded: Callable[[str], Path]) -> None:
    task = Task(NETWORKS["dense"].build, CASES["smooth_mlp"].data(), {"penalty": Loss(l2=1e-3)})
    with pytest.raises(InputError, match="no loss is over data"):
        replay(recorded("dense"), task, tmp_path / "run")


def test_a_task_without_the_loss_that_recalibrates_is_refused(
    recorded: Callable[[str], Path], tmp_path: Path
) -> None:
    case, data = NETWORKS["dense"], CASES["smooth_mlp"].data()
    losses = {name: Loss(F.cross_entropy, on=name) for name in data}
    replay(
        recorded("dense"),
        Task(case.build, data, losses),
        tmp_path / "run",
        losses=["validation"],
        batch_size=8,
    )
    fewer = Task(case.build, data, {"again": losses["validation"], "more": losses["train"]})
    with pytest.raises(InputError, match="no loss 'train', whose data"):
        replay(recorded("dense"), fewer, tmp_path / "run", losses=["again"])


# --- both modes before the first span -------------------------------------------------------------


def diverging(name: str, directory: Path, **changes: Any) -> Path:
    """Iterates from the first step on, where running statistics lag most."""
    return replace(NETWORKS[name], **{"learning_rate": 0.3, **changes}).record(directory, steps=6)


@pytest.mark.parametrize(
    "name", ["convolutions, the last batch of two", "one stays as it was", "across processes"]
)
def test_where_the_modes_differ_both_figures_and_the_command_are_said(
    name: str, tmp_path: Path
) -> None:
    case, heard = NETWORKS[name], list[Any]()
    checkpoints = diverging(name, tmp_path / "ck")
    replay(
        checkpoints, case.task(), tmp_path / "run", heard, norm_stats="running", losses=["train"]
    )
    (said,) = [note for note in notes(heard) if "running statistics of the checkpoints" in note]
    says(
        said,
        "'train'",
        "--norm-stats batch --batch-size",
        "--norm-stats recalibrated",
        "→",
        "of the loss change apart",
    )
    inputs, targets = case.data()["train"]
    stored = Oracle(case.build, (inputs, targets), case.values["train"])
    own = Oracle(case.build, (inputs, targets), case.values["train"], norm_stats="batch")
    ends = points(checkpoints)[0], points(checkpoints)[-1]
    figures = [
        f"{stored.loss({k: v.double() for k, v in each.items()}).item():.4g}" for each in ends
    ]
    if name != "one stays as it was":
        figures += [
            f"{own.loss({k: v.double() for k, v in each.items()}).item():.4g}" for each in ends
        ]
    says(said, *figures)
    heard.clear()
    replay(
        checkpoints, case.task(), tmp_path / "run", heard, norm_stats="running", losses=["train"]
    )
    assert notes(heard) == []  # before the first span alone


def still(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """All normalisation layers stay in eval mode in training."""

    class Still(nn.Sequential):
        def train(self, mode: bool = True) -> Still:
            return super().train(False)

    return lambda: Still(*model())


def settled(directory: Path) -> Path:
    """Iterates that hardly move, whose statistics had all the time to follow."""
    case = NETWORKS["dense"]
    torch.manual_seed(0)
    model, (inputs, targets) = case.build().train(), case.data()["train"]
    with torch.no_grad():
        for _ in range(200):
            model(inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(directory, model) as recorder:
        for step in range(5):
            recorder.save(step)
            for _ in range(40):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    return directory


AGREE: dict[str, tuple[Callable[[Path], Path], Callable[[], nn.Module], dict[str, Any]]] = {
    "no running statistics": (
        lambda place: CASES["relu_mlp"].record(place, 3),
        CASES["relu_mlp"].build,
        {},
    ),
    "statistics of the batch": (
        lambda place: diverging("dense", place),
        NETWORKS["dense"].build,
        {"norm_stats": "batch", "batch_size": 25},
    ),
    "recalibrated": (
        lambda place: diverging("dense", place),
        NETWORKS["dense"].build,
        {"norm_stats": "recalibrated", "batch_size": 8},
    ),
    "layers that were frozen": (
        lambda place: diverging("dense", place, build=still(NETWORKS["dense"].build)),
        NETWORKS["dense"].build,
        {},
    ),
    "both agree": (settled, NETWORKS["dense"].build, {}),
}


@pytest.mark.parametrize("name", AGREE)
def test_nothing_is_said_where_there_is_nothing_to_choose(name: str, tmp_path: Path) -> None:
    record, build, settings = AGREE[name]
    heard: list[Any] = []
    task = Task(build, CASES["relu_mlp"].data(), {"train": Loss(F.cross_entropy, on="train")})
    replay(
        record(tmp_path / "ck"),
        task,
        tmp_path / "run",
        heard,
        **{"norm_stats": "running", **settings},
    )
    assert [note for note in notes(heard) if "statistics of the checkpoints" in note] == []


def test_the_share_is_the_one_that_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    assert f"more than {SHARE:.0%}" in page.replace(" %", "%")


def test_the_sign_of_a_layer_may_turn_with_the_mode(tmp_path: Path) -> None:
    """Why it is said: sums of recalibrated statistics are those of training, sums of running ones
    are not.
    """
    case = NETWORKS["convolutions, the last batch of two"]
    checkpoints = diverging("convolutions, the last batch of two", tmp_path / "ck")
    change = {}
    for mode in ("running", "batch", "recalibrated"):
        steps = replay(checkpoints, case.task(), tmp_path / mode, norm_stats=mode, batch_size=30)[
            "train"
        ].steps
        change[mode] = float(steps["loss_end"][-1] - steps["loss_start"][0])
    assert change["recalibrated"] == pytest.approx(change["batch"], rel=1e-5)
    assert abs(change["running"] - change["batch"]) > SHARE * abs(change["batch"])


# --- the mode beside headlines and figures, buffers apart from layers -----------------------------


@pytest.fixture(scope="module", params=["running", "batch", "recalibrated"])
def shown(
    request: pytest.FixtureRequest,
    recorded: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    case = NETWORKS["dense"]
    out = tmp_path_factory.mktemp("shown") / "run.lca"
    return replay(
        recorded("dense"),
        case.task(),
        out,
        norm_stats=request.param,
        batch_size=25,
        losses=["train"],
    )


def test_the_mode_stands_beside_every_headline_and_figure(shown: Run) -> None:
    mode, results = str(shown.manifest.settings["norm_stats"]), shown["train"]
    assert results.norm_stats == summary(results)["norm_stats"] == mode
    assert document(lca("summary", shown.path, "--json"))["losses"]["train"]["norm_stats"] == mode
    says(lca("summary", shown.path).stdout, f"{mode} statistics in normalisation layers")
    for name in (
        "curve",
        "distribution",
        "helping",
        "layers",
        "candidates",
        "units",
        "oscillation",
        "peaks",
        "microscope",
    ):
        found = getattr(findings, name)(results)
        assert found.attrs["norm_stats"] == mode, name
        if name != "microscope":
            drawn = getattr(plots, name)(found)
            figure = getattr(drawn, "figure", drawn)
            says(figure._supxlabel.get_text(), f"Normalisation layers: {mode} statistics.")
            plt.close(figure)
    assert findings.compare({"one": results}).attrs["norm_stats"] == mode
    page = write_report([shown], shown.path.parent / "report.html").read_text()
    says(
        page,
        f"float32, {mode} statistics in normalisation layers",
        f"Normalisation layers: {mode} statistics.",
    )
    says(results._repr_html_(), f"{mode} statistics")


def test_a_model_without_normalisation_has_no_mode(tmp_path: Path) -> None:
    case = CASES["relu_mlp"]
    results = replay(
        case.record(tmp_path / "ck", 2), case.task(), tmp_path / "run", norm_stats="running"
    )["train"]
    assert results.norm_stats is None
    assert "norm_stats" not in findings.layers(results).attrs
    assert "statistics" not in lca("summary", tmp_path / "run").stdout
    assert (
        "Normalisation layers"
        not in write_report([open_run(tmp_path / "run")], tmp_path / "page.html").read_text()
    )


def test_buffers_are_in_no_layer_s_sum_and_no_candidates(shown: Run) -> None:
    results, mode = shown["train"], shown.manifest.settings["norm_stats"]
    tensors = results.tensors["allocated"].sum("step")
    found = findings.layers(results)
    sums = dict(zip(found["layer"].values, found["total"].values, strict=True))
    assert list(sums) == (["0", "1", "3"] if mode == "batch" else ["0", "1", "1 buffer", "3"])
    for layer in ("0", "1", "3"):
        own = float(tensors.sel(tensor=[f"{layer}.weight", f"{layer}.bias"]).sum())
        assert sums[layer] == pytest.approx(own, rel=1e-12)
    buffers = (
        None
        if mode == "batch"
        else float(tensors.sel(tensor=["1.running_mean", "1.running_var"]).sum())
    )
    assert summary(results)["buffers"] == (
        None if buffers is None else pytest.approx(buffers, rel=1e-9)
    )
    assert sum(sums.values()) == pytest.approx(float(tensors.sum()), rel=1e-9)
    tried = findings.candidates(results)
    assert sorted(tried["layer"].values) == ["0", "1", "3"]
    assert sorted(findings.candidates(results, by="tensor")["layer"].values) == sorted(
        name for name in tensors["tensor"].values if "running" not in name
    )
    assert list(tried["total"].values) == sorted(tried["total"].values, reverse=True)
    assert ("are excluded" in tried.attrs["left_out"]) == (mode != "batch")
    units = findings.units(results)
    assert ("1 buffer" in units["layer"].values) == (mode != "batch")
    assert set(findings.compare({"one": results})["layer"].values) == set(sums)
    assert ("to buffers" in lca("summary", shown.path).stdout) == (mode != "batch")
    page = write_report([shown], shown.path.parent / "report.html").read_text()
    assert ("to buffers (running statistics)" in page) == (mode != "batch")
