"""What differs between two processes or two passes is refused, and what does not is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lca_posthoc import Loss, Task, run
from lca_posthoc.errors import InputError, LCAError

from ..helpers.cli import says
from ..helpers.user_models import ADAPTED, Met, answers, replay

# --- what differs between processes ---------------------------------------------------------------


class Features(nn.Module):
    """Random features in a buffer that no checkpoint holds."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
        if seed is None:
            generator.seed()
        features = torch.randn(12, 9, generator=generator, dtype=torch.float32)
        self.register_buffer("features", features, persistent=False)
        self.linear = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cos(x @ self.features))


SAME = {
    "a base from a file": ADAPTED["from a file"].task(fixed=["base.*"]),
    "a seeded base": ADAPTED["seeded"].task(fixed=["base.*"]),
    "seeded features": Met(partial(Features, 1)).task(),
}
OTHER = {
    "a base at random": (ADAPTED["at random"].task(fixed=["base.*"]), "Task.fixed"),
    "features at random": (Met(partial(Features, None)).task(), "features"),
}


def test_a_frozen_base_no_checkpoint_holds_that_is_another_one_in_every_process_is_refused() -> (
    None
):
    held = ["adapter.0.weight", "adapter.1.weight", "head.weight", "head.bias"]
    first, second = answers(ADAPTED["at random"].task(), held=held)
    assert first["frozen"] == ["base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias"]
    says(
        second["error"]["message"],
        "frozen ones",
        "is not the same in this worker process",
        "at random",
    )
    assert [each.get("error") for each in answers(ADAPTED["seeded"].task(), held=held)] == [
        None,
        None,
    ]


@pytest.mark.parametrize("name", SAME)
def test_a_model_that_is_the_same_in_two_processes_is_taken(name: str) -> None:
    assert [answer.get("error") for answer in answers(SAME[name])] == [None, None]


@pytest.mark.parametrize("name", OTHER)
def test_a_model_that_is_another_one_in_every_process_is_refused(name: str) -> None:
    task, what = OTHER[name]
    first, second = answers(task)
    assert "error" not in first
    assert "error" in second
    says(second["error"]["message"], what, "is not the same in this worker process", "at random")


SPLIT = """\
import torch
import torch.nn.functional as F
from lca_posthoc import Loss, Task

generator = torch.Generator().manual_seed(1)
inputs, targets = torch.randn(200, 12, generator=generator), torch.randint(0, 4, (200,), generator=generator)


def task():
    whole = torch.utils.data.TensorDataset(inputs, targets)
    _, held_out = torch.utils.data.random_split(whole, [160, 40]SEED)
    return Task(lambda: torch.nn.Linear(12, 4), {"held_out": held_out}, {"loss": Loss(F.cross_entropy, on="held_out")})
"""

AUGMENTED = """\
import torch
import torch.nn.functional as F
from lca_posthoc import Loss, Task


def task():
    inputs = torch.cat([torch.ones(300, 12), torch.randn(300, 12)])
    data = {"all": (inputs, torch.arange(600) % 4)}
    return Task(lambda: torch.nn.Linear(12, 4), data, {"loss": Loss(F.cross_entropy, on="all")})
"""


@pytest.fixture(scope="module")
def linear_iterates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linear")
    generator = torch.Generator().manual_seed(2)
    for step in range(9):
        tensors = {
            "weight": torch.randn(4, 12, generator=generator),
            "bias": torch.randn(4, generator=generator),
        }
        save_file(tensors, root / f"step_{step}.safetensors")
    return root


def split_file(directory: Path, seed: str) -> Path:
    file = directory / "task.py"
    file.write_text(SPLIT.replace("SEED", seed))
    return file


def test_a_split_that_is_drawn_with_a_seed_is_the_same_in_every_process(tmp_path: Path) -> None:
    file = split_file(tmp_path, ", torch.Generator().manual_seed(0)")
    assert [answer.get("error") for answer in answers(file)] == [None, None]


def test_a_split_that_is_drawn_anew_in_every_process_is_refused_by_name(
    linear_iterates: Path, tmp_path: Path
) -> None:
    settings = {
        "out": tmp_path / "run",
        "cluster": "local",
        "workers": 2,
        "device": "cpu",
        "span": 1,
    }
    with pytest.raises(LCAError) as caught:
        run(linear_iterates, split_file(tmp_path, ""), tolerance=math.inf, **settings)
    says(
        str(caught.value),
        "split 'held_out' is not the same in this worker process",
        "random_split without a seed",
    )


def test_data_that_is_drawn_anew_behind_examples_that_are_not_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(AUGMENTED)
    first, second = answers(file)
    assert "error" not in first
    says(second["error"]["message"], "split 'all' is not the same in this worker process")


def test_a_digest_is_had_of_examples_that_do_not_stack(tmp_path: Path) -> None:
    """Two resolutions, one after the other: batches of 100 stack, examples from all over do not."""
    images = [
        (torch.full((3, 8 + 8 * (at >= 300), 8 + 8 * (at >= 300)), at / 600.0), at % 4)
        for at in range(600)
    ]
    model = partial(nn.Sequential, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    task = Task(model, {"all": images}, {"loss": Loss(F.cross_entropy, on="all")})
    assert [answer.get("error") for answer in answers(task)] == [None, None]


# --- what is random in every pass -----------------------------------------------------------------


class AlwaysDropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class MonteCarlo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
        self.body.add_module("uncertain", AlwaysDropped())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class OwnNoise(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (MonteCarlo, "'body.uncertain' (AlwaysDropped)"),
        (lambda: nn.Sequential(nn.Linear(12, 8), OwnNoise(8, 4)), "'1' (OwnNoise)"),
        (partial(OwnNoise, 12, 4), "the model's own forward"),
    ],
    ids=["dropout", "noise", "noise in the model itself"],
)
def test_randomness_that_survives_eval_is_refused_and_its_module_named(
    tmp_path: Path, build: Callable[[], nn.Module], culprit: str
) -> None:
    met = Met(build)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run")
    says(
        str(caught.value),
        "not deterministic",
        f"the first module to differ is {culprit}.",
        "training=True",
    )
    assert not (tmp_path / "run").exists()
