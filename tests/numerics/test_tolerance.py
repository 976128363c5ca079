"""The tolerance and the scale of a loss: shares of it, what is recorded of them, and what is said
where a number cannot mean anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lca_posthoc
from lca_posthoc import Loss, Task
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.schema import in_units_of_loss
from lca_posthoc.numerics.settings import DEFAULTS, resolve
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.plan import plan

from ..helpers.cli import lca, refused, run_lca, write_step, write_task

STEPS = 5
GENERATOR = torch.Generator().manual_seed(7)
INPUTS = torch.randn(40, 4, generator=GENERATOR)
TARGETS = torch.sin(2 * INPUTS.sum(1, keepdim=True))
Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def squares(model: nn.Module, batch: Batch, scale: float, shift: float = 0.0) -> Tensor:
    return scale * (model(batch[0]) - batch[1])[:, 0] ** 2 + shift


def signs(inputs: Tensor, targets: Tensor) -> Tensor:
    return (inputs[:, 0] > 0).long()


def scaled(scale: float, shift: float = 0.0, **more: Any) -> Loss:
    return Loss(call=partial(squares, scale=scale, shift=shift), **more)


@pytest.fixture(scope="module")
def iterates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradient descent with momentum, in steps so large that Simpson's rule on a whole one leaves
    something.
    """
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    directory = tmp_path_factory.mktemp("tolerance") / "iterates"
    for step in range(STEPS + 1):
        write_step(directory, step, model.state_dict())
        optimizer.zero_grad()
        squares(model, (INPUTS, TARGETS), 1.0).mean().backward()
        optimizer.step()
    return directory


@pytest.fixture
def replay(iterates: Path, tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    def replayed(
        given: dict[str, Loss], out: str = "run", checkpoints: Path = iterates, **options: Any
    ) -> tuple[lca_posthoc.Run, list[str]]:
        heard: list[Any] = []
        fixed = {"cluster": "inline", "device": "cpu", "losses": ["all"], "progress": heard.append}
        task = Task(net, {"train": (INPUTS, TARGETS)}, given)
        run = lca_posthoc.run(checkpoints, task, out=tmp_path / out, **{**fixed, **options})
        return run, [event.text for event in heard if isinstance(event, Note)]

    return replayed


Replay = Callable[..., tuple[Any, list[str]]]

SCALES = {"dollars": 4e10, "unit": 1.0, "small": 1e-6, "smallest": 1e-30}


# --- a share of the loss --------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["0.1%", "0.0001%"])
def test_a_share_means_the_same_in_every_unit(replay: Replay, share: str) -> None:
    run, said = replay({name: scaled(scale) for name, scale in SCALES.items()}, tolerance=share)
    levels = run["unit"].steps["level"].values
    assert bool(levels.max() > 1) is (share == "0.0001%")
    for name, scale in SCALES.items():
        steps = run[name].steps
        assert steps["level"].values.tolist() == levels.tolist()
        assert (steps["loss_start"].values[0] / scale) == pytest.approx(
            run["unit"].steps["loss_start"].values[0], rel=1e-5
        )
        assert run[name].record.scale == pytest.approx(abs(steps["loss_start"].values[0]), rel=1e-5)
        bound = in_units_of_loss(share, run[name].record.scale)
        assert ((abs(steps["residual"].values) <= bound) == steps["converged"].values).all()
    assert not [note for note in said if "tolerance" in note]


CASES = {
    "negative": scaled(1.0, -30.0),
    "crosses 0": scaled(1.0, -0.7),
    "groups of different scale": Loss(
        call=lambda model, batch: squares(model, batch, 1.0) * (1 + 999 * (batch[0][:, 0] > 0)),
        group_by=signs,
    ),
    "weighted groups": Loss(
        call=lambda model, batch: (squares(model, batch, 1.0), batch[0][:, 0].abs()), group_by=signs
    ),
}


@pytest.mark.parametrize("loss", CASES.values(), ids=CASES)
def test_the_share_is_of_the_mean_over_the_split_at_the_first_checkpoint(
    replay: Replay, loss: Loss
) -> None:
    run, _ = replay({"one": loss}, tolerance="0.01%")
    first = run["one"].steps.isel(step=0)
    mean = float((first["loss_start"] * first["weight"]).sum() / first["weight"].sum())
    assert run["one"].record.scale == pytest.approx(abs(mean), rel=1e-5)
    worst = abs(run["one"].steps["residual"])
    worst = worst.max("group") if "group" in worst.dims else worst
    assert (
        (worst.values <= 1e-4 * run["one"].record.scale) == run["one"].steps["converged"].values
    ).all()


def test_a_share_of_the_allocation_refines_like_the_number_it_stands_for(replay: Replay) -> None:
    losses = {"one": scaled(4e10)}
    run, _ = replay(losses, tolerance="inf", allocation_tolerance="0.001%")
    same, _ = replay(
        losses,
        "same",
        tolerance="inf",
        allocation_tolerance=in_units_of_loss("0.001%", run["one"].record.scale),
    )
    assert run["one"].steps["level"].values.max() > 1
    assert run["one"].steps["level"].equals(same["one"].steps["level"])


def test_a_share_is_recorded_and_the_same_for_a_loss_added_later_and_a_run_that_grew(
    replay: Replay, iterates: Path, tmp_path: Path
) -> None:
    losses = {"one": scaled(1.0), "two": scaled(1e4), "three": scaled(1e-3)}
    once, _ = replay(losses, tolerance="0.0001%")
    growing = tmp_path / "growing"
    growing.mkdir()
    for last, names in ((2, ["one"]), (3, ["one", "two"]), (STEPS, ["all"])):
        for step in range(last + 1):
            shutil.copy(iterates / f"step_{step:08d}.safetensors", growing)
        grown, _ = replay(losses, "grown", growing, tolerance="0.0001%", losses=names)
    assert json.loads((grown.path / "run.json").read_text())["settings"]["tolerance"] == "0.0001%"
    for name in losses:
        assert grown[name].record.scale == once[name].record.scale
        for field in ("level", "converged"):
            assert np.array_equal(grown[name].steps[field].values, once[name].steps[field].values)
        assert np.array_equal(
            grown[name].steps["residual"].values, once[name].steps["residual"].values
        )
    with pytest.raises(InputError, match=r"made with --tolerance 0.0001%, not --tolerance 0.1%"):
        replay(losses, "grown", growing, tolerance="0.1%")


def test_a_loss_of_0_has_no_share(replay: Replay) -> None:
    zero = {"zero": scaled(0.0)}
    with pytest.raises(
        InputError,
        match=r"loss 'zero' is 0 at the first checkpoint.*Give --tolerance in units of "
        r"loss",
    ):
        replay(zero, tolerance="0.1%")
    run, said = replay(zero)
    assert run["zero"].record.scale is None
    assert not [note for note in said if "tolerance" in note]


def test_a_run_without_shares_can_be_read_without_a_scale(replay: Replay) -> None:
    run, _ = replay({"one": scaled(1.0)})
    document = json.loads((run.path / "run.json").read_text())
    assert document["losses"]["one"].pop("scale") is None
    assert lca_posthoc.results.runfile.parse(
        {key: value for key, value in document.items() if key != "crc32"}
    )


# --- what may be given ----------------------------------------------------------------------------

GIVEN = {
    "0.1%": "0.1%",
    "0.10 %": "0.1%",
    "1e-3 %": "0.001%",
    " 5% ": "5%",
    "1e-3": 1e-3,
    0.5: 0.5,
    "inf": "inf",
    float("inf"): "inf",
}


@pytest.mark.parametrize(("given", "wanted"), GIVEN.items(), ids=map(str, GIVEN))
def test_tolerances_are_recorded_in_one_way(given: Any, wanted: Any) -> None:
    for name in ("tolerance", "allocation_tolerance"):
        assert resolve({name: given}, None)[name] == wanted
        assert resolve({name: given}, {**DEFAULTS, name: wanted})[name] == wanted


@pytest.mark.parametrize(
    "given",
    ["0", "-1", "nan", "", "0%", "-1%", "100%", "200%", "nan%", "inf%", "%", "a%", "1%%", "much"],
)
def test_other_tolerances_are_refused(given: str, tmp_path: Path) -> None:
    result = run_lca(
        tmp_path, write_task(tmp_path / "task.py"), tmp_path / "run", "--tolerance", given
    )
    refused(result, "--tolerance must be a positive number", "0.1%", f"got {given}")
    with pytest.raises(InputError, match="--allocation-tolerance must be a positive number"):
        resolve({"allocation_tolerance": given}, None)


# --- what is said ---------------------------------------------------------------------------------

ADVICE = {  # of a loss, under settings: words of the note; none where a tolerance means something
    "too small for the loss": (
        scaled(4e10),
        {},
        "below the rounding of a loss of 1.8e+10 in float32",
        "--tolerance 0.1%",
    ),
    "too large for the loss": (
        scaled(1e-6),
        {},
        "more than a tenth of its total change",
        "--tolerance 0.1%",
    ),
    "far too large": (
        scaled(1e-30),
        {},
        "more than a tenth of its total change",
        "--tolerance 0.1%",
    ),
    "a large negative one": (
        scaled(4e10, -1e12),
        {},
        "below the rounding of a loss of",
        "--tolerance ",
    ),
    "a change far below the value": (
        scaled(1.0, 1e3),
        {"tolerance": 1.0},
        "more than a tenth",
        "a hundredth of the change",
    ),
    "a change in the rounding": (scaled(1e-3, 1e3), {}, "more than a tenth", "--precision float64"),
    "a share too large": (
        scaled(1.0),
        {"tolerance": "50%"},
        "--tolerance 50% (here 0.2",
        "a hundredth of the change",
    ),
    "a share too small": (
        scaled(1.0),
        {"tolerance": "0.000001%"},
        "--tolerance 1e-06% (here",
        "below the rounding",
    ),
    "one of float64": (scaled(4e10), {"precision": "float64"}),
    "one that fits": (scaled(1.0), {"tolerance": 1e-4}),
    "not refined": (scaled(1e-6), {"tolerance": "inf"}),
    "a fixed rule": (scaled(4e10), {"rule": "midpoint"}),
    "a term of the parameters": (Loss(l2=1e-8), {}),
}


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [(each[0], each[1], each[2:]) for each in ADVICE.values()],
    ids=ADVICE,
)
def test_a_tolerance_that_means_nothing_is_said_by_plan_and_run(
    iterates: Path, replay: Replay, loss: Loss, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    _, said = replay({"one": loss}, keep="tensors", **options)
    notes = [note for note in said if "tolerance" in note]
    assert len(notes) == bool(words)
    assert all(word in notes[0] for word in (*words, "--out")[: 9 * bool(words)]), notes
    planned = plan(
        iterates, Task(net, {"train": (INPUTS, TARGETS)}, {"one": loss}), device="cpu", **options
    )
    assert [note for note in planned.notes if "tolerance" in note] == notes
    assert [
        note for note in replay({"one": loss}, keep="tensors", **options)[1] if "tolerance" in note
    ] == []


def test_the_advice_is_one_that_is_followed(replay: Replay) -> None:
    for name, scale in SCALES.items():
        _, said = replay({"one": scaled(scale)}, name, tolerance="0.1%")
        assert not [note for note in said if "tolerance" in note]


def test_the_command_takes_a_share(iterates: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import torch\nfrom torch import nn\nfrom lca_posthoc import Loss, Task\n"
        "x = torch.linspace(-1, 1, 80).view(20, 4)\n"
        "def call(model, batch):\n    return 1e10 * model(batch[0])[:, 0] ** 2\n"
        "def task():\n    net = lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, "
        "1))\n"
        "    return Task(net, {'train': (x, x)}, {'one': Loss(call=call)})\n"
    )
    result = run_lca(
        iterates, task, tmp_path / "run", "--tolerance", "0.1%", "--allocation-tolerance", "5%"
    )
    assert result.exit_code == 0
    assert "tolerance" not in result.stderr
    assert lca("plan", iterates, "--task", task, "--tolerance", "0.1%").exit_code == 0
