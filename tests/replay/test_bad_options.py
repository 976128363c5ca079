"""Options that make no sense, and settings other than those a run was begun with, are refused by
name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lca_posthoc.replay.worker import state
from tests.helpers.cli import (
    STEPS,
    contents,
    iterates,
    lca,
    marker,
    refused,
    run_lca,
    says,
    step_file,
    write_step,
    write_task,
)

from ..helpers.wrong_input import MIDDLE, TRAIN_DATA, TRAIN_LOSS, Place

# --- options --------------------------------------------------------------------------------------


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown loss": (
        ("--loss", "nope"),
        ("no loss 'nope'", "'train', 'validation'", "--loss NAME or --loss all"),
    ),
    "tolerance 0": (
        ("--tolerance", "0"),
        ("--tolerance must be a positive number in units of loss", "got 0"),
    ),
    "negative tolerance": (
        ("--tolerance", "-1"),
        ("--tolerance must be a positive number in units of loss", "got -1"),
    ),
    "tolerance nan": (
        ("--tolerance", "nan"),
        ("--tolerance must be a positive number in units of loss", "got nan"),
    ),
    "allocation tolerance 0": (
        ("--allocation-tolerance", "0"),
        ("--allocation-tolerance must be a positive number in units of loss",),
    ),
    "batch size 0": (("--batch-size", "0"), ("--batch-size must be 1 or more, got 0",)),
    "negative batch size": (("--batch-size", "-3"), ("--batch-size must be 1 or more, got -3",)),
    "batch statistics of no batch": (
        ("--norm-stats", "batch"),
        ("--norm-stats batch needs --batch-size N",),
    ),
    "workers 0": (("--workers", "0"), ("--workers must be 1 or more, got 0",)),
    "negative workers": (("--workers", "-1"), ("--workers must be 1 or more, got -1",)),
    "unknown cluster": (
        ("--cluster", "nonsense"),
        ("--cluster 'nonsense' is unknown", "local, inline, tcp://"),
    ),
    "steps that are a word": (("--steps", "many"), ("--steps 'many' is not A:B or A:B:K", "0:500")),
    "steps that are one number": (
        ("--steps", "30"),
        ("holds only one checkpoint (step 30) among steps 30; at least two are needed",),
    ),
    "a step that is not there": (
        ("--steps", "0,10,31"),
        (
            "--steps 0,10,31 names step 31 without a checkpoint",
            "steps 0, 10, 20",
        ),
    ),
    "steps that descend": (("--steps", "3,1"), ("--steps 3,1: 1 does not come after 3",)),
    "a step twice": (("--steps", "0:3,3"), ("--steps 0:3,3: 3 does not come after 0:3",)),
    "steps after an open range": (("--steps", "0:,3"), ("3 does not come after 0:",)),
    "an empty part of steps": (("--steps", "0:3,"), ("--steps '0:3,' is not A:B or A:B:K",)),
    "steps with a minus": (("--steps", "-10:30"), ("--steps '-10:30' is not A:B or A:B:K",)),
    "steps with four parts": (("--steps", "0:30:2:1"), ("--steps '0:30:2:1' is not A:B or A:B:K",)),
    "every 0-th step": (("--steps", "0:30:0"), ("--steps '0:30:0' is not A:B or A:B:K",)),
    "steps of nothing": (("--steps", ""), ("--steps '' is not A:B or A:B:K",)),
    "steps backwards": (("--steps", "40:10"), ("the range 40:10 ends before it begins",)),
    "steps that leave one": (
        ("--steps", "55:"),
        ("only one checkpoint (step 60) among steps 55:", "at least two"),
    ),
    "pattern that is no pattern": (
        ("--pattern", "(?P<step>"),
        ("--pattern", "(?P<step>", "regular expression"),
    ),
    "pattern without a step": (("--pattern", r"(\d+)"), ("--pattern", "(?P<step>")),
    "pattern that finds nothing": (
        ("--pattern", r"run_(?P<step>\d+)"),
        ("no checkpoint", "--pattern"),
    ),
    "rename without =": (("--rename", "out"), ("--rename 'out' is not OLD=NEW",)),
    "rename of nothing": (("--rename", "=out"), ("--rename '=out' is not OLD=NEW",)),
    "rename that is no pattern": (
        ("--rename", "(out=x"),
        ("--rename '(out=x'", "regular expression"),
    ),
    "rename to a group that is not there": (("--rename", r"out=\2"), (r"--rename 'out=\\2'",)),
    "rename that joins two": (
        ("--rename", ".*bias=bias"),
        ("'hidden.bias'", "'out.bias'", "both become 'bias'", "--rename"),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_makes_no_sense_is_refused_by_name(place: Place, case: str) -> None:
    options, words = OPTIONS[case]
    place.refuses(*words, options=options)


@pytest.mark.parametrize("case", [case for case in OPTIONS if "cluster" not in case])
def test_a_plan_refuses_the_options_a_run_refuses(place: Place, case: str) -> None:
    options, words = OPTIONS[case]
    refused(lca("plan", place.checkpoints, "--task", place.task, *options), *words)


@NO_GPU
@pytest.mark.parametrize("cluster", ["inline", "local"])
def test_a_gpu_that_is_not_there_is_a_failure_of_the_environment(
    place: Place, cluster: str
) -> None:
    options = ("--device", "cuda", "--cluster", cluster)
    place.refuses(
        "no GPU is visible", "--device cpu", "CUDA_VISIBLE_DEVICES", options=options, code=5
    )


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown rule": (("--rule", "euler"), ("--rule", "'euler'", "'simpson'", "'gauss-3'")),
    "unknown keep": (("--keep", "everything"), ("--keep", "'everything'", "'parameters'")),
    "unknown precision": (("--precision", "float8"), ("--precision", "'float8'", "'float32'")),
    "tolerance that is a word": (("--tolerance", "low"), ("--tolerance", "got low")),
    "batch size that is a word": (("--batch-size", "big"), ("--batch-size", "'big'")),
    "unknown option": (("--tolerence", "1"), ("--tolerence", "--tolerance")),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_refused_by_name(place: Place, case: str) -> None:
    options, words = USAGE[case]
    before = contents(place.data)
    result = place.run(*options)
    assert (result.exit_code, result.stdout) == (2, "")
    says(result.stderr, *words)
    assert contents(place.data) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", ".", "--task", "x.py", "--rule", "euler"),
        ("run", "."),
        ("run",),
        ("summary",),
        ("nosuch",),
        ("--nosuch",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_like_every_other_refusal(arguments: tuple[str, ...]) -> None:
    refused(lca(*arguments))


# --- resuming with something else than recorded ---------------------------------------------------


SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rule": (("--rule", "left"), ("--rule simpson", "left")),
    "tolerance": (("--tolerance", "1e-4"), ("--tolerance 0.001", "0.0001")),
    "tolerance inf": (("--tolerance", "inf"), ("--tolerance 0.001", "inf")),
    "allocation tolerance": (("--allocation-tolerance", "1"), ("--allocation-tolerance inf", "1")),
    "keep": (("--keep", "tensors"), ("--keep parameters", "tensors")),
    "precision": (("--precision", "float64"), ("--precision float32", "float64")),
    "norm stats": (("--norm-stats", "batch"), ("--norm-stats running", "batch")),
    "batch size": (("--batch-size", "7"), ("--batch-size", "7")),
    "steps": (("--steps", "10:"), ("--steps", "10:")),
    "pattern": (("--pattern", r"step_(?P<step>\d+)"), ("--pattern",)),
    "rename": (("--rename", "a=b"), ("--rename", "a=b")),
}


@pytest.fixture(params=["finished", "unfinished"])
def recorded(finished: Place, request: pytest.FixtureRequest) -> Place:
    """A run that is complete, and one whose second span has yet to be replayed."""
    if request.param == "unfinished":
        marker(finished.out, "train", 1).unlink()
    return finished


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_other_than_recorded_is_refused_by_name(recorded: Place, case: str) -> None:
    options, words = SETTINGS[case]
    line = recorded.refuses("this run was made with", *words, "--out", options=options)
    assert "None" not in line
    assert "[]" not in line


def test_a_setting_as_recorded_is_no_other_setting(recorded: Place) -> None:
    assert (
        recorded.run("--rule", "simpson", "--tolerance", "0.001", "--keep", "parameters").exit_code
        == 0
    )


OTHER_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "content of a step between spans": (
        lambda ck: write_step(ck, STEPS[2], iterates()[0]),
        ("the content of step 20 differs",),
    ),
    "content of the last step": (
        lambda ck: write_step(ck, STEPS[-1], iterates()[0]),
        ("the content of step 60 differs",),
    ),
    "a middle step missing": (lambda ck: step_file(ck, MIDDLE).unlink(), ("step 30 is missing",)),
    "the first step missing": (lambda ck: step_file(ck, STEPS[0]).unlink(), ("step 0 is missing",)),
    "the last step missing": (
        lambda ck: step_file(ck, STEPS[-1]).unlink(),
        ("step 60 is missing",),
    ),
    "a step inserted in the middle": (
        lambda ck: write_step(ck, 35, iterates()[0]),
        ("step 35 is new", "before step 40"),
    ),
}


@pytest.mark.parametrize("case", OTHER_CHECKPOINTS)
def test_other_checkpoints_than_recorded_are_refused(recorded: Place, case: str) -> None:
    change, words = OTHER_CHECKPOINTS[case]
    change(recorded.checkpoints)
    recorded.refuses("other checkpoints than", str(recorded.out), *words, "Restore them", "--out")


OTHER_LOSSES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "another function": (
        TRAIN_LOSS,
        '"train": Loss(F.multi_margin_loss, on="train")',
        ("value and gradient norm at the first checkpoint",),
    ),
    "another split": (
        TRAIN_LOSS,
        '"train": Loss(F.cross_entropy, on="validation")',
        ("its on was train, now validation",),
    ),
    "another kind": (
        TRAIN_LOSS,
        '"train": Loss(call=cross_entropy)',
        ("its kind was function, now call",),
    ),
    "fewer data": (
        TRAIN_DATA,
        "train = (inputs[:29], targets[:29])",
        ("its examples was 30, now 29",),
    ),
    "other data": (
        TRAIN_DATA,
        "train = (inputs[10:], targets[10:])",
        ("value and gradient norm at the first checkpoint",),
    ),
}


@pytest.mark.parametrize("case", OTHER_LOSSES)
def test_another_loss_under_a_recorded_name_is_refused(recorded: Place, case: str) -> None:
    old, new, words = OTHER_LOSSES[case]
    write_task(recorded.task, old, new)
    recorded.refuses("loss 'train' is not the one recorded", *words, "another name", "--out")


OTHER_TASK = (
    "def task():",
    "def other():\n"
    "    return Task(model=Net, data={'train': train}, losses={'train': "
    "Loss(F.multi_margin_loss)})\n\n\ndef task():",
)


def test_another_function_of_the_same_file_is_another_task(place: Place) -> None:
    write_task(place.task, *OTHER_TASK)
    assert place.run().exit_code == 0
    result = run_lca(place.checkpoints, f"{place.task}:other", place.out)
    refused(
        result,
        "loss 'train' is not the one recorded",
        "value and gradient norm at the first checkpoint",
    )


def test_a_module_that_was_edited_is_looked_at_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place.task.parent)
    module = write_task(place.task.parent / "edited_task_module.py")
    assert run_lca(place.checkpoints, "edited_task_module:task", place.out).exit_code == 0
    write_task(module, TRAIN_LOSS, '"train": Loss(F.multi_margin_loss, on="train")')
    sys.modules.pop(module.stem)  # as in a new process
    state._STATES.clear()
    result = run_lca(place.checkpoints, "edited_task_module:task", place.out)
    refused(
        result,
        "loss 'train' is not the one recorded",
        "value and gradient norm at the first checkpoint",
    )


def test_a_comment_in_the_task_file_disturbs_nothing(recorded: Place) -> None:
    write_task(recorded.task, "def task():", "# a comment\ndef task():")
    assert recorded.run().exit_code == 0


def test_another_model_than_recorded_is_refused(recorded: Place) -> None:
    write_task(recorded.task, "Linear(64, 8)", "Linear(64, 8, bias=False)")
    recorded.refuses("'hidden.bias'", "not in the task's model")
