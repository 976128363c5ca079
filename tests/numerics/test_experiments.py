"""The paper's networks and experiments, at a size that takes seconds."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lca_posthoc as lca
from tests.test_examples import EXAMPLES, needs

NETWORKS = {
    "mnist_fc": 84_060,
    "mnist_lenet": 808_970,
    "cifar10_allcnn": 1_371_658,
    "cifar10_resnet20": 273_066,
}
NAMES = ("freeze", "momentum", "learning-rate", "batch-size", "optimiser")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the examples, which import each other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_papers_number_of_parameters(example: Any, name: str) -> None:
    net = example(name).Net()
    assert sum(each.numel() for each in net.parameters()) == NETWORKS[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("mnist_lenet", {}, marks=needs("mnist.safetensors")),
        pytest.param(
            "cifar10_allcnn",
            {"norm_stats": "batch", "batch_size": 10},
            marks=needs("cifar10.safetensors"),
        ),
        pytest.param(
            "cifar10_resnet20",
            {"norm_stats": "batch", "batch_size": 10},
            marks=needs("cifar10.safetensors"),
        ),
    ],
)
def test_networks_train_and_replay(
    tmp_path: Path,
    example: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, Any],
) -> None:
    network = example(name)
    monkeypatch.setattr(network, "IMAGES", 20)
    network.train(str(tmp_path / "ck"), 1)
    once = {"tolerance": float("inf"), "keep": "tensors"}
    run = lca.run(
        tmp_path / "ck",
        network.task(),
        cluster="inline",
        device="cpu",
        durability="none",
        **once,
        **settings,
    )
    found = lca.findings.summary(run["train"])
    assert (found["segments"], found["parameters"], found["evaluations"]) == (1, NETWORKS[name], 3)
    assert all(each["allocated"] for each in found["tensors"] if each["name"].endswith(".weight"))


@pytest.mark.parametrize(
    ("delay", "momentum", "rate"), [(9, 0.9, 0.05), (4, 0.8, 0.1), (0, 0.0, 0.5)]
)
def test_a_delay_moves_the_last_layers_steps_in_time_alone(
    example: Any, delay: int, momentum: float, rate: float
) -> None:
    """Under a constant gradient of 1 the last layer's steps approach rate/(1 − m), the same for
    every delay.
    """
    experiments = example("experiments")
    net = experiments.mnist_fc.Net()
    optimizer = experiments.optimizer(net, experiments.Setting(delay=delay), 0.05)
    others, last = optimizer.param_groups
    assert (others["momentum"], others["lr"]) == (0.9, 0.05)
    assert (last["momentum"], last["lr"]) == (pytest.approx(momentum), pytest.approx(rate))
    assert {id(each) for each in last["params"]} == {id(net.fc3.weight), id(net.fc3.bias)}
    assert len(others["params"]) == 4
    for _ in range(200):
        before = net.fc3.bias.detach().clone()
        for each in net.parameters():
            each.grad = torch.ones_like(each)
        optimizer.step()
    assert torch.allclose(before - net.fc3.bias, torch.tensor(0.5), rtol=1e-3)


@needs("mnist.safetensors")
@pytest.mark.parametrize("name", NAMES)
def test_experiments_run_every_setting_once_and_go_on_where_they_stopped(
    tmp_path: Path, example: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    experiments = example("experiments")
    assert tuple(experiments.EXPERIMENTS) == NAMES
    size = experiments.Size(images=250, iterates=2)
    found = experiments.experiment(tmp_path, name, size, seeds=1)
    assert list(found) == list(experiments.EXPERIMENTS[name])
    for label, (train,) in found.items():
        assert (train.record.examples, train.steps.sizes["step"]) == (250, 2)
        summed = {
            each: float(train.tensors.allocated.sel(tensor=f"{each}.weight").sum())
            for each in ("fc1", "fc3")
        }
        frozen = {"first": "fc1", "last": "fc3"}.get(label) if name == "freeze" else None
        assert {each for each, value in summed.items() if value == 0} == (
            {frozen} if frozen else set()
        )
    runs = sorted(tmp_path.glob("*/*/*"))
    assert [each.name for each in runs] == ["seed0.lca"] * len(found)
    written = {each: each.stat().st_mtime_ns for each in tmp_path.glob("**/commits/*/*")}
    experiments.experiment(tmp_path, name, size, seeds=1)
    assert {each: each.stat().st_mtime_ns for each in tmp_path.glob("**/commits/*/*")} == written
    with pytest.raises(RuntimeError, match=re.escape("Name another OUT")):
        experiments.experiment(tmp_path, name, experiments.Size(images=250, iterates=3), seeds=1)
    assert capsys.readouterr().out.count("seed 0") == 2 * len(found)


@needs("mnist.safetensors")
def test_the_command_prints_a_line_for_each_setting_and_each_of_its_layers(
    tmp_path: Path,
    example: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = ["--seeds", "2", "--images", "250", "--iterates", "2"]
    monkeypatch.setattr("sys.argv", ["experiments.py", str(tmp_path), "freeze", *sizes])
    example("experiments").main()
    settings, layers = (
        part.splitlines()
        for part in capsys.readouterr().out.split("p against none", 1)[1].split("\n\n")
    )
    some = ["experiments.py", str(tmp_path), "freeze", *sizes, "--settings", "none", "last"]
    monkeypatch.setattr("sys.argv", some)
    example("experiments").main()
    shown, _ = capsys.readouterr().out.split("p against none", 1)[1].split("\n\n")
    assert shown.splitlines()[1:] == [settings[1], settings[3]]
    assert [line.split()[:2] for line in settings[1:]] == [
        ["none", "2"],
        ["first", "2"],
        ["last", "2"],
    ]
    assert [line.split()[:2] for line in layers[1:]] == [
        [layer, label] for layer in ("fc1", "fc2", "fc3") for label in ("none", "first", "last")
    ]
    frozen = {("fc1", "first"), ("fc3", "last")}
    assert {
        tuple(line.split()[:2]) for line in layers if "+0.0000 (+0.0000 to +0.0000)" in line
    } == frozen


@needs("mnist.safetensors")
@needs("cifar10.safetensors")
@pytest.mark.parametrize(
    ("name", "images"), [("momentum", 40), ("hurting", 200), ("directions", 200)]
)
def test_what_moved_the_weights_is_told_and_not_computed_twice(
    tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch, name: str, images: int
) -> None:
    causes = example("causes")
    monkeypatch.setattr(causes, "DELAYS", (9, 0))
    monkeypatch.setattr(causes, "DIRECTIONS", 2)
    size = causes.Size(images=images, iterates=4, batch=20)
    lines = list(causes.EXPERIMENTS[name](tmp_path, 2, size))
    assert all("±" in line for line in lines[1:])
    written = {each: each.stat().st_mtime_ns for each in tmp_path.glob("**/commits/*/*")}
    assert list(causes.EXPERIMENTS[name](tmp_path, 2, size)) == lines
    assert {each: each.stat().st_mtime_ns for each in tmp_path.glob("**/commits/*/*")} == written
    if name == "hurting":
        whole = next(line for line in lines if line.startswith("with the whole motion"))
        assert 0 < float(re.findall(r"[+-][\d.]+", whole)[0]) < 100
    if name == "momentum":
        parts = [float(number) for number in re.findall(r"[a-z]+ ([+-][\d.]+) ±", lines[1])]
        total, *of_causes = parts
        assert total == pytest.approx(sum(of_causes), abs=5e-3)
