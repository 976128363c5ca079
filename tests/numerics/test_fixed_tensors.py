"""Tensors no checkpoint holds are constants where the task says so, and missing elsewhere."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lca_posthoc.errors import InputError
from lca_posthoc.replay.events import Note

from ..helpers.cli import says
from ..helpers.replayed_cases import arrays
from ..helpers.user_models import ADAPTED, Met, assert_the_oracle_agrees, from_file, replay


def adapter_of(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"adapter": model.adapter, "head": model.head})


@pytest.mark.parametrize(
    ("base", "fixed"),
    [("from a file", ["base.0.*", "bas?.1.*"]), ("seeded", ["base.*"])],
    ids=["from a file", "seeded"],
)
def test_a_fixed_base_is_a_constant_and_has_no_variable(
    tmp_path: Path, base: str, fixed: list[str]
) -> None:
    met = ADAPTED[base]
    iterates = met.record(tmp_path / "iterates", adapter_of)
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=fixed))
    assert_the_oracle_agrees(met, replayed, iterates)
    held = {"adapter.0.weight", "adapter.1.weight", "head.weight", "head.bias"}
    assert set(arrays(replayed["train"].allocation)) == held
    assert {tensor.spec.name for tensor in replayed.manifest.tensors} == held


@pytest.mark.parametrize("base", ["from a file", "seeded"])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_a_fixed_base_is_the_same_one_in_every_precision(
    tmp_path: Path, base: str, precision: str
) -> None:
    """torch draws other numbers from the same seed where the default dtype is float64."""
    met, heard = ADAPTED[base], list[Any]()
    iterates = met.record(tmp_path / "iterates", adapter_of)
    settings = {"precision": precision, "progress": heard.append}
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*"]), **settings)
    assert [event.text for event in heard if isinstance(event, Note)] == []
    assert np.isfinite(replayed["train"].steps["precision_error"].values[0]) == (
        precision != "float64"
    )
    if precision != "bfloat16":
        assert_the_oracle_agrees(met, replayed, iterates)


def test_a_base_checkpoints_do_not_hold_is_missing_unless_it_is_fixed(tmp_path: Path) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates", adapter_of)
    trainable = Met(lambda: from_file().requires_grad_(True))
    with pytest.raises(InputError, match=r"'base\.0\.weight'.* is missing in .*step_00000000"):
        replay(trainable, iterates, tmp_path / "run")
    with pytest.raises(InputError, match=r"'base\.0\.weight'.* is missing in"):
        replay(trainable, iterates, tmp_path / "run", task=trainable.task(fixed=["base.1.*"]))
    # it is frozen, its statistics are not
    with pytest.raises(InputError, match=r"'base\.1\.running_mean'.* is missing in"):
        replay(met, iterates, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.1.*"]))
    assert_the_oracle_agrees(met, replayed, iterates)


def test_a_pattern_of_fixed_that_matches_nothing_is_refused_with_what_there_is(
    tmp_path: Path,
) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates", adapter_of)
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*", "backbone.*"]))
    says(str(caught.value), "Task.fixed names 'backbone.*'", "'base.0.weight'")


def test_a_fixed_tensor_the_checkpoints_do_hold_is_the_constant_it_is_there(tmp_path: Path) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates")
    replayed = replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*"]))
    assert_the_oracle_agrees(met, replayed, iterates)
    assert not any(name.startswith("base.") for name in arrays(replayed["train"].allocation))


@pytest.mark.parametrize("step", [0, 3])
def test_a_fixed_tensor_that_is_another_one_in_the_checkpoints_is_refused(
    tmp_path: Path, step: int
) -> None:
    met = ADAPTED["from a file"]
    iterates = met.record(tmp_path / "iterates")
    path = iterates / f"step_{step:08}.safetensors"
    held = load_file(path)
    save_file({**held, "base.0.bias": held["base.0.bias"] + 1e-3}, path)
    with pytest.raises(InputError) as caught:
        replay(met, iterates, tmp_path / "run", task=met.task(fixed=["base.*"]))
    says(
        str(caught.value),
        "Task.fixed names 'base.0.bias'",
        f"(step {step})",
        "Leave it out of fixed",
    )
    assert not (tmp_path / "run").exists()


class Masked(nn.Module):
    """Attention over four places, none of which sees a later one; its mask is in the checkpoints,
    or a constant.
    """

    def __init__(self, stored: bool = True) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(3, 3), nn.Linear(12, 4)
        mask = torch.full((4, 4), -math.inf).triu(1)
        if stored:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        places = x.reshape(-1, 4, 3)
        seen = (self.query(places) @ places.transpose(1, 2) + self.mask).softmax(-1)
        return self.out((seen @ places).flatten(1))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_stored_mask_with_infinite_entries_is_taken_where_it_is_fixed(
    tmp_path: Path, precision: str
) -> None:
    met = Met(Masked)
    iterates = met.record(tmp_path / "iterates")
    with pytest.raises(
        InputError,
        match=r"'mask' holds 6 NaN or Inf .*If it is a mask that never moves, name it in "
        r"Task\(fixed=\['mask'\]\)",
    ):
        replay(met, iterates, tmp_path / "run")
    replayed = replay(
        met, iterates, tmp_path / "run", task=met.task(fixed=["mask"]), precision=precision
    )
    assert arrays(replayed["train"].allocation).keys() == {
        "query.weight",
        "query.bias",
        "out.weight",
        "out.bias",
    }
    for path in iterates.glob("*.safetensors"):
        save_file({name: each for name, each in load_file(path).items() if name != "mask"}, path)
    assert_the_oracle_agrees(Met(partial(Masked, False)), replayed, iterates)
