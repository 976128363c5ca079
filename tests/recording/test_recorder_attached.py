"""A recorder that is attached to optimisers saves the start and every step by itself."""

from __future__ import annotations

import copy
import gc
import linecache
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import optimizer as optimizer_module

from lca_posthoc import Recorder
from lca_posthoc.errors import InputError
from lca_posthoc.recording import optimizer_guard, writer

from ..helpers.recorded_series import interrupt_now, names, steps_in

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, accumulate: int = 1
) -> list[list[float]]:
    """Train on noise; the first row of the model's first parameter after each optimiser step."""
    first, found = next(model.parameters()), []
    for _ in range(steps):
        for _ in range(accumulate):
            model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(first[0].tolist())
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_attached_recorder_saves_the_start_and_every_optimiser_step(
    tmp_path: Path, linear: nn.Module, kind: Callable[..., torch.optim.Optimizer], accumulate: int
) -> None:
    optimizer = kind(linear.parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(optimizer):
        start = linear.weight[0].tolist()  # type: ignore[operator, index, union-attr]
        expected = [start, *trained(linear, optimizer, 5, accumulate)]
    assert [load_file(path)["weight"][0].tolist() for path in names(tmp_path)] == expected
    trained(linear, optimizer, 1)  # detached
    assert steps_in(tmp_path) == list(range(6))


def test_a_recorder_that_only_the_optimiser_knows_records(
    tmp_path: Path, linear: nn.Module
) -> None:
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
    Recorder(tmp_path, linear).attach(optimizer, step=40)
    trained(linear, optimizer, 3)
    del optimizer
    assert steps_in(tmp_path) == [40, 41, 42, 43]


def test_steps_of_several_optimisers_are_counted_together(
    tmp_path: Path, linear: nn.Module
) -> None:
    both = [torch.optim.SGD([each], lr=0.01) for each in linear.parameters()]
    with Recorder(tmp_path, linear).attach(*both):
        for _ in range(3):
            linear(torch.randn(4, 3)).sum().backward()
            for optimizer in both:
                optimizer.step()
    assert steps_in(tmp_path) == list(range(7))


def stepped(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[str]:
    """Steps of optimisers in turn; what is warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for optimizer in optimizers:
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
    return [str(each.message) for each in said]


def test_an_optimiser_that_takes_the_place_of_an_attached_one_is_noticed_once(
    tmp_path: Path, linear: nn.Module
) -> None:
    before, after = (torch.optim.SGD(linear.parameters(), lr=0.01) for _ in range(2))
    with Recorder(tmp_path, linear).attach(before):
        (said,) = stepped(linear, before, after, after, after)
        assert "not recorded" in said
        assert "attach(optimizer, step=…)" in said
    assert steps_in(tmp_path) == [0, 1]
    assert stepped(linear, after, after, after) == []  # closed


def test_nothing_is_said_of_a_partner_or_of_another_models_optimiser(
    tmp_path: Path, linear: nn.Module
) -> None:
    first, second = (torch.optim.SGD([each], lr=0.01) for each in linear.parameters())
    critic = nn.Linear(3, 1)
    other = torch.optim.SGD(critic.parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(second):
        assert stepped(linear, *[first, other, other, other, second] * 3) == []
    assert steps_in(tmp_path) == [0, 1, 2, 3]


class Several(torch.optim.Optimizer):
    """Made of one optimiser for each parameter, as torchtitan's container and Muon with its
    auxiliary Adam are.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})
        self.inner = [torch.optim.SGD([each], lr=0.01) for each in parameters]

    def step(self, closure: Any = None) -> None:
        for each in self.inner:
            each.step()


class Equal(torch.optim.SGD):
    """Equal to all of its kind, and without a hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = None  # type: ignore[assignment]


def test_steps_inside_an_attached_optimisers_own_are_its_own(
    tmp_path: Path, linear: nn.Module
) -> None:
    whole = Several(list(linear.parameters()))
    with Recorder(tmp_path, linear).attach(whole):
        assert stepped(linear, *[whole] * 4) == []
        assert len(stepped(linear, *whole.inner)) == 1  # by themselves they are not
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


def test_an_optimiser_is_looked_at_once_and_again_when_it_has_more_groups(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[torch.optim.Optimizer] = []
    trains = optimizer_guard.trains
    monkeypatch.setattr(
        optimizer_guard, "trains", lambda each, model: looked.append(each) or trains(each, model)
    )
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    other = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(mine):
        assert stepped(linear, other, other, mine, other) == []
        assert looked == [other]
        other.add_param_group({"params": list(linear.parameters())})
        assert len(stepped(linear, other, other, other)) == 1
        assert looked == [other, other]


def test_optimisers_are_told_apart_by_identity(tmp_path: Path, linear: nn.Module) -> None:
    before, after = (Equal(linear.parameters(), lr=0.01) for _ in range(2))
    with Recorder(tmp_path, linear).attach(before):
        assert len(stepped(linear, before, after, after)) == 1
    assert steps_in(tmp_path) == [0, 1]


def test_copies_of_an_attached_optimiser_are_strangers(tmp_path: Path, linear: nn.Module) -> None:
    mine = torch.optim.Adam(linear.parameters())
    with Recorder(tmp_path, linear).attach(mine):
        model, copied = copy.deepcopy((linear, mine))
        assert stepped(model, copied, copied, pickle.loads(pickle.dumps(mine)), mine) == []
    assert steps_in(tmp_path) == [0, 1]


def test_a_partner_that_steps_more_often_is_mentioned_once(
    tmp_path: Path, linear: nn.Module
) -> None:
    generator, critic = (torch.optim.SGD([each], lr=0.01) for each in linear.parameters())
    with Recorder(tmp_path, linear).attach(generator):
        assert len(stepped(linear, *[*[critic] * 5, generator] * 3)) == 1
    assert steps_in(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["by itself", "scheduled", "scaled"])
def test_the_line_that_makes_the_step_is_shown(tmp_path: Path, linear: nn.Module, way: str) -> None:
    before, after = (torch.optim.SGD(linear.parameters(), lr=0.01) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu")
    with Recorder(tmp_path, linear).attach(before):
        if way == "scheduled":
            torch.optim.lr_scheduler.ConstantLR(after)
        scaler.scale(linear(torch.randn(4, 3)).sum()).backward()
        after.step()
        with pytest.warns(UserWarning, match="not attached") as said:
            scaler.step(after) if way == "scaled" else after.step()  # the second
    assert said[0].filename == __file__
    assert "# the second" in linecache.getline(__file__, said[0].lineno)


def test_nothing_is_left_of_a_recorder_that_is_gone(tmp_path: Path, linear: nn.Module) -> None:
    hooks = optimizer_module._global_optimizer_post_hooks
    before = len(hooks)
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    recording = Recorder(tmp_path / "ck", linear).attach(mine)
    gone = weakref.ref(recording)
    assert len(hooks) > before
    del recording, mine
    gc.collect()
    assert gone() is None
    assert len(hooks) == before
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    Recorder(tmp_path / "other", linear).attach(mine).close()
    assert len(hooks) == before
    assert [*mine._optimizer_step_pre_hooks, *mine._optimizer_step_post_hooks] == []


def test_a_step_that_a_gradient_scaler_skips_does_not_count(
    tmp_path: Path, linear: nn.Module
) -> None:
    optimizer, scaler = torch.optim.SGD(linear.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with Recorder(tmp_path, linear).attach(optimizer):
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(linear(torch.randn(4, 3)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert steps_in(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("given", [(), ("optimiser",), ([],)])
def test_what_is_no_optimiser_is_refused(tmp_path: Path, linear: nn.Module, given: Any) -> None:
    with pytest.raises(
        InputError,
        match=r"attach was given (nothing|str|list); it takes the "
        r"optimisers",
    ):
        Recorder(tmp_path / "ck", linear).attach(*given)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_the_next_iterate_its_own_number(
    tmp_path: Path, linear: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.01)
    with Recorder(tmp_path, linear).attach(optimizer):
        trained(linear, optimizer, 1)
        with monkeypatch.context() as patch:
            patch.setattr(writer.Writer, "buffer", interrupt_now)
            with pytest.raises(KeyboardInterrupt):
                trained(linear, optimizer, 1)
        third = trained(linear, optimizer, 1)
    assert steps_in(tmp_path) == [0, 1, 3]
    assert load_file(names(tmp_path)[-1])["weight"][0].tolist() == third[0]


def test_an_optimiser_of_another_model_is_refused(tmp_path: Path, linear: nn.Module) -> None:
    other = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.01)
    with pytest.raises(InputError, match="the optimiser has none of the model's parameters"):
        Recorder(tmp_path / "ck", linear).attach(other)
    assert names(tmp_path) == []
    mine = torch.optim.SGD(linear.parameters(), lr=0.01)
    with (
        Recorder(tmp_path, linear).attach(mine) as recorder,
        pytest.raises(InputError, match="already attached"),
    ):
        recorder.attach(mine)
