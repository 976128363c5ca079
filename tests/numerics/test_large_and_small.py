"""Small tensors are summed together and large ones alone; wherever a large tensor stands among small
ones, every option gives each tensor the numbers of a run that keeps every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lca_posthoc import Loss, Run, Task, run
from lca_posthoc.numerics.objective.rows import is_small
from lca_posthoc.replay.events import silent
from tests.helpers.short_training import record_training, value

EXAMPLES, STEPS = 24, 6
OPTIONS: Mapping[str, dict[str, Any]] = {
    "nothing else": {},
    "causes": {"causes": True},
    "directions": {"along": "directions.safetensors"},
    "shards": {"shards": 3, "losses": ["plain"]},
    "causes and directions of two losses": {
        "causes": True,
        "signal": "each",
        "losses": ["plain", "each"],
        "along": "directions.safetensors",
    },
    "long segments": {"steps": "0,2,4,6", "path_band": "on"},
    "a random part": {"subset": ["train=0.5@1"]},
}


def network() -> nn.Module:
    """Return a model whose second kernel is large and has small tensors before and after it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 900), nn.BatchNorm1d(900), nn.Linear(900, 3)
    )


def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(EXAMPLES, 6, generator=generator), torch.arange(EXAMPLES) % 3
    losses = {
        "plain": Loss(value, on="train"),
        "each": Loss(value, on="train", per="example"),
        "classes": Loss(value, on="train", group_by=data[1]),
    }
    return Task(network, {"train": data}, losses)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iterates of a training with a recorded optimiser, and a file of directions."""
    place = tmp_path_factory.mktemp("large-and-small")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    record_training(
        place / "iterates", model, task().data["train"], optimizer, steps=STEPS, batch=8
    )
    ends = [load_file(place / "iterates" / f"step_{step:08d}.safetensors") for step in (0, STEPS)]
    moved = {
        name: torch.stack([ends[1][name] - ends[0][name], torch.randn_like(ends[0][name])])
        for name, _ in model.named_parameters()
    }
    save_file(moved, place / "directions.safetensors")
    return place


def replayed(folder: Path, name: str, keep: str, **options: Any) -> Run:
    options = dict(options)
    if "along" in options:
        options["along"] = folder / options["along"]
    return run(
        folder / "iterates",
        task(),
        out=folder / f"{name}.lca",
        keep=keep,
        cluster="inline",
        progress=silent,
        **({"losses": ["all"]} | options),
    )


def test_the_model_has_a_large_tensor_between_small_ones() -> None:
    small = [is_small(parameter.shape) for parameter in network().parameters()]
    assert small == [True, True, False, True, True, True, True, True]


@pytest.mark.parametrize("keep", ["tensors", "units"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_tensor_has_its_own_numbers(folder: Path, option: str, keep: str) -> None:
    options = OPTIONS[option]
    whole_options = {name: value for name, value in options.items() if name != "shards"}
    sums = replayed(folder, f"{option} {keep}", keep, **options)
    whole = replayed(folder, f"{option} {keep} whole", "parameters", **whole_options)
    for loss in sums:
        names = [str(name) for name in whole[loss].tensors["tensor"].values]
        assert [str(name) for name in sums[loss].tensors["tensor"].values] == names
        kept = whole[loss].tensors["allocated"].values
        size = np.abs(kept).sum(-1, keepdims=True)
        off = np.abs(sums[loss].tensors["allocated"].values - kept) / size
        assert off.max() < 1e-5, (loss, names[int(off.max(tuple(range(off.ndim - 1))).argmax())])
        if "causes" in options:
            _agree(sums[loss].causes["allocated"].values, whole[loss].causes["allocated"].values)
        if "along" in options:
            _agree(sums[loss].along["allocated"].values, whole[loss].along["allocated"].values)
        if "path_band" in options:
            for name in ("shift", "doubled"):
                _agree(sums[loss].other_path[name].values, whole[loss].other_path[name].values)


def _agree(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> None:
    assert np.abs(other).max() > 0
    assert np.abs(one - other).max() < 1e-5 * np.abs(other).sum() / len(other)


@pytest.mark.parametrize("option", ["causes", "directions", "shards"])
def test_what_does_not_move_is_allocated_nothing(folder: Path, option: str) -> None:
    """The first kernel, as if it had been frozen: what it is allocated is exactly 0."""
    frozen = folder / f"frozen for {option}"
    frozen.mkdir()
    first = load_file(folder / "iterates" / "step_00000000.safetensors")["0.weight"]
    for file in (folder / "iterates").glob("step_*.safetensors"):
        save_file(load_file(file) | {"0.weight": first}, frozen / file.name, _about(file))
    results = run(
        frozen,
        task(),
        out=folder / f"{option} frozen.lca",
        keep="tensors",
        cluster="inline",
        progress=silent,
        **({"losses": ["plain"]} | ({} if option == "directions" else OPTIONS[option])),
    )["plain"]
    still = results.tensors.sel(tensor="0.weight")
    assert (still["motion"].values == 0).all()
    assert (still["allocated"].values == 0).all()


def _about(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())
