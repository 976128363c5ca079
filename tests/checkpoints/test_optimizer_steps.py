"""Records of an optimiser's steps: written and read to the same numbers, and hostile ones refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from safetensors.torch import save_file

from lca_posthoc import open_trajectory
from lca_posthoc.checkpoints import optimizer_steps
from lca_posthoc.checkpoints.optimizer_steps import (
    METADATA_KEY,
    GroupStep,
    MomentsRecord,
    OptimizerStep,
    from_metadata,
    moments_path,
    read_optimizer_step,
    to_metadata,
)
from lca_posthoc.errors import InputError

GROUP = GroupStep(
    optimizer="AdamW",
    tensors=("fc.weight", "größe\u2028"),
    gradient_norms=(0.1 + 0.2, 5e-324),
    lr=1e-3,
    weight_decay=0.01,
    decoupled=True,
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    maximize=False,
    betas=(0.9, 0.999),
    eps=1e-8,
    amsgrad=False,
    centered=False,
    alpha=None,
    lr_decay=None,
    steps=7,
    has_memory=True,
)
STEP = OptimizerStep(since=6, optimizer_steps=1, clip=0.25, groups=(GROUP,))


@pytest.mark.parametrize(
    "step",
    [
        STEP,
        dataclasses.replace(STEP, clip=None, groups=()),
        dataclasses.replace(
            STEP, groups=(dataclasses.replace(GROUP, betas=None, gradient_norms=(0.0, math.inf)),)
        ),
    ],
)
def test_a_record_is_read_as_it_was_written(step: OptimizerStep) -> None:
    assert from_metadata(to_metadata(step)) == step
    json.loads(to_metadata(step), parse_constant=pytest.fail)  # no word that other readers lack


def test_a_norm_that_is_not_known_stays_so() -> None:
    group = dataclasses.replace(GROUP, gradient_norms=(math.nan, 1.0))
    read = from_metadata(to_metadata(dataclasses.replace(STEP, groups=(group,))))
    first, second = read.groups[0].gradient_norms
    assert math.isnan(first)
    assert second == 1


def damaged(entry: str, value: Any, *, in_group: bool = True) -> str:
    record = json.loads(to_metadata(STEP))
    (record["groups"][0] if in_group else record)[entry] = value
    return json.dumps(record)


HOSTILE = {
    "no JSON": "{",
    "nested": "[" * 100_000,
    "a list": "[]",
    "nothing": "{}",
    "a name twice": '{"since": 1, ' + to_metadata(STEP)[1:],
    "a constant": damaged("lr", math.nan),
    "a number too large": damaged("lr", 1).replace('"lr": 1', '"lr": 1e999'),
    "digits": damaged("lr", 1).replace('"lr": 1', '"lr": ' + "9" * 5000),
    "an unknown entry": damaged("more", 1),
    "since": damaged("since", -1, in_group=False),
    "since a float": damaged("since", 1.0, in_group=False),
    "since a truth": damaged("since", True, in_group=False),
    "clip": damaged("clip", "half", in_group=False),
    "clip below 0": damaged("clip", -0.5, in_group=False),
    "groups a table": damaged("groups", {}, in_group=False),
    "groups of numbers": damaged("groups", [1], in_group=False),
    "a tensor in two groups": damaged("groups", [vars(GROUP)] * 2, in_group=False),
    "no tensors": damaged("tensors", []),
    "tensors a word": damaged("tensors", "ab"),
    "tensors numbers": damaged("tensors", [1, 2]),
    "half a pair": damaged("tensors", ["\ud800", "b"]),
    "too few norms": damaged("gradient_norms", [1.0]),
    "a norm below 0": damaged("gradient_norms", [1.0, -1.0]),
    "a norm of words": damaged("gradient_norms", [1.0, "nan"]),
    "the class": damaged("optimizer", 3),
    "the class with controls": damaged("optimizer", "\x1b[2J"),
    "the class long": damaged("optimizer", "A" * 10_000),
    "a flag": damaged("nesterov", 0),
    "lr": damaged("lr", None),
    "lr a truth": damaged("lr", True),
    "betas": damaged("betas", [0.9]),
    "betas of 1": damaged("betas", [0.9, 1.0]),
    "eps": damaged("eps", "small"),
    "steps": damaged("steps", 0),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_record_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(
        InputError, match=r"the record of the optimiser's step is damaged: .*causes"
    ):
        from_metadata(text)


def test_long_texts_and_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_steps, "MAX_TENSORS", 1)
    with pytest.raises(InputError, match="too many"):
        from_metadata(to_metadata(STEP))
    monkeypatch.setattr(optimizer_steps, "_MAX_BYTES", 10)
    with pytest.raises(InputError, match="longer than 10"):
        from_metadata(to_metadata(STEP))


def test_records_and_moments_are_read_beside_their_checkpoints(tmp_path: Path) -> None:
    for step in range(3):
        record = {METADATA_KEY: to_metadata(STEP)} if step == 1 else {}
        record |= {METADATA_KEY: "{"} if step == 2 else {}
        save_file(
            {"w": torch.full((2,), float(step))}, tmp_path / f"step_{step}.safetensors", record
        )
    moments = moments_path(tmp_path, 1)
    moments.parent.mkdir()
    save_file({"exp_avg/w": torch.zeros(2)}, moments)
    trajectory = open_trajectory(tmp_path, moments=True)
    assert trajectory.steps == [0, 1, 2]
    assert trajectory.tensors.keys() == {"w"}
    first, second, third = trajectory.checkpoints
    assert read_optimizer_step(first) is None
    assert read_optimizer_step(second) == STEP
    with pytest.raises(InputError, match=r"step_2\.safetensors: the record"):
        read_optimizer_step(third)
    assert second.moments_file == moments
    data = moments.read_bytes()  # less than a sample, so that all of it is one
    assert second.moments == MomentsRecord(len(data), google_crc32c.value(data))
    assert (first.moments, third.moments) == (None, None)
    plain = open_trajectory(tmp_path).checkpoints
    assert plain == tuple(dataclasses.replace(one, moments=None) for one in trajectory.checkpoints)
