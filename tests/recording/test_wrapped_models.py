"""A model that is compiled or in parallel gives the numbers of the plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lca_posthoc import Run

from ..helpers.replayed_cases import arrays
from ..helpers.user_models import Met, assert_the_oracle_agrees, eager_backend, replay


def failing_backend(graph: Any, inputs: Any) -> Any:
    raise AssertionError("compiled")


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 4)
    )


def compiled() -> nn.Module:
    return torch.compile(with_batch_norm(), backend=failing_backend)


def parallel() -> nn.Module:
    return nn.DataParallel(with_batch_norm())


def compiled_in_place() -> nn.Module:
    model = with_batch_norm()
    model.compile(backend=eager_backend)
    return model


def compiled_in_parts() -> nn.Module:
    model = with_batch_norm()
    model[1] = torch.compile(model[1], backend=eager_backend)
    return model


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Iterates of a model that is wrapped in nothing, and their replay."""
    root, met = tmp_path_factory.mktemp("normal"), Met(with_batch_norm)
    iterates = met.record(root / "iterates")
    replayed = replay(met, iterates, root / "run")
    assert_the_oracle_agrees(met, replayed, iterates)
    return iterates, replayed


def same_bits(one: Run, other: Run) -> bool:
    found, wanted = (arrays(each["train"].allocation) for each in (one, other))
    return [each.tobytes() for each in found.values()] == [
        each.tobytes() for each in wanted.values()
    ]


@pytest.mark.parametrize("build", [compiled, parallel])
def test_a_wrapped_model_gives_the_numbers_of_the_plain_one_and_compiles_nothing(
    normal: tuple[Path, Run], tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    assert same_bits(replay(Met(build), normal[0], tmp_path / "run"), normal[1])


@pytest.mark.parametrize("build", [compiled_in_place, compiled_in_parts])
def test_code_compiled_inside_a_model_sees_the_normalisation_that_is_held(
    normal: tuple[Path, Run], tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    assert same_bits(replay(Met(build), normal[0], tmp_path / "run"), normal[1])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_a_wrapper_left_in_checkpoints_are_understood(
    normal: tuple[Path, Run], tmp_path: Path, prefix: str
) -> None:
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    for path in normal[0].glob("*.safetensors"):
        save_file(
            {prefix + name: each for name, each in load_file(path).items()}, wrapped / path.name
        )
    found = replay(Met(with_batch_norm), wrapped, tmp_path / "run")
    assert set(found["train"].allocation) == {"0.weight", "0.bias", "4.weight", "4.bias"} | {
        f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert same_bits(found, normal[1])
