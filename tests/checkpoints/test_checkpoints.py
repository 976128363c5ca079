"""Checkpoints people have, read as they are: what transformers writes, adapters over a frozen base,
series spaced by powers of two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lca_posthoc import Loss, Run, Task, open_run, open_trajectory, run
from lca_posthoc.errors import InputError
from lca_posthoc.replay.events import Note
from tests.helpers.cli import last_line, run_lca, says, task_namespace, write_step, write_task
from tests.helpers.oracle import RULES, Oracle
from tests.helpers.replayed_cases import arrays

SETTINGS: dict[str, Any] = {"cluster": "inline", "device": "cpu", "tolerance": math.inf}


def replayed(checkpoints: Path, task: Task, out: Path, **settings: Any) -> tuple[Run, list[str]]:
    """A run, and what it says."""
    heard: list[Any] = []
    made = run(checkpoints, task, out=out, progress=heard.append, **{**SETTINGS, **settings})
    return made, [event.text for event in heard if isinstance(event, Note)]


def same_numbers(one: Run, other: Run) -> None:
    for part in ("allocation", "steps", "tensors", "totals"):
        found, wanted = (arrays(getattr(each["train"], part)) for each in (one, other))
        assert {name: each.tobytes() for name, each in found.items()} == {
            name: each.tobytes() for name, each in wanted.items()
        }


def near_the_oracle(
    made: Run,
    judge: Oracle,
    points: list[Mapping[str, Tensor]],
    bound: float = 1e-5,
    rule: str = "simpson",
) -> None:
    """Losses, and Σ|A − A*| of every tensor that has a variable; the others are constants of the
    definition too.
    """
    truth = judge.allocate(points, *RULES[rule])
    steps, found = made["train"].steps, arrays(made["train"].allocation)
    np.testing.assert_allclose(steps.loss_start, truth.losses[:-1], rtol=1e-5)
    np.testing.assert_allclose(steps.loss_end, truth.losses[1:], rtol=1e-5)
    whole = sum(float(each.abs().sum()) for each in truth.stacked().values())
    for name, exact in truth.stacked().items():
        if name not in found:
            assert float(exact.abs().sum()) == 0, name
            continue
        error = float((torch.from_numpy(found[name]).double() - exact).abs().sum())
        assert error <= bound * max(float(exact.abs().sum()), 1e-5 * whole), name


# --- what transformers writes ---------------------------------------------------------------------

TOKENS = torch.randint(0, 31, (12, 8), generator=torch.Generator().manual_seed(0))


def gpt2() -> GPT2LMHeadModel:
    """Its head is tied to its embedding."""
    config = GPT2Config(
        vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def language(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none")


def trained(save: Callable[[GPT2LMHeadModel, int], object]) -> None:
    torch.manual_seed(0)
    model = gpt2().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in (0, 1, 2):
        save(model, step)
        optimizer.zero_grad()
        language(model, (TOKENS,)).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shard", ["5GB", "2KB"], ids=["one file", "shards"])
def test_a_tied_model_as_transformers_saves_it_gives_the_bits_of_recorded_iterates(
    tmp_path: Path, shard: str
) -> None:
    points: list[dict[str, Tensor]] = []

    def save(model: GPT2LMHeadModel, step: int) -> None:
        model.save_pretrained(tmp_path / "trainer" / f"checkpoint-{step}", max_shard_size=shard)
        points.append({name: each.detach().clone() for name, each in model.named_parameters()})
        write_step(tmp_path / "recorded", step, points[-1])

    trained(save)
    files = [path.name for path in (tmp_path / "trainer" / "checkpoint-1").glob("*.safetensors*")]
    assert ("model.safetensors.index.json" in files) == (shard == "2KB")
    assert "lm_head.weight" not in open_trajectory(tmp_path / "trainer").tensors
    task = Task(gpt2, {"train": (TOKENS,)}, {"train": Loss(call=language)})
    made, notes = replayed(tmp_path / "trainer", task, tmp_path / "one")
    assert notes == []
    same_numbers(made, replayed(tmp_path / "recorded", task, tmp_path / "two")[0])
    near_the_oracle(made, Oracle(gpt2, (TOKENS,), language), points)


def test_the_command_line_replays_a_trainers_directory(tmp_path: Path) -> None:
    trained(
        lambda model, step: model.save_pretrained(
            tmp_path / "trainer" / f"checkpoint-{step}", max_shard_size="2KB"
        )
    )
    task = tmp_path / "task.py"
    task.write_text(
        "from lca_posthoc import Loss, Task\nfrom tests.checkpoints.test_checkpoints import TOKENS, gpt2, "
        "language\n\n\n"
        "def task():\n    return Task(gpt2, {'train': (TOKENS,)}, {'train': Loss(call=language)})\n"
    )
    result = run_lca(tmp_path / "trainer", task, tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    says(result.stdout, "transformer.wte")


# --- adapters -------------------------------------------------------------------------------------

INPUTS, TARGETS = task_namespace()["train"]


class Low(nn.Module):
    """A linear layer that stays as it is, and a product of low rank beside it, named as peft names
    them.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + 4 * self.lora_B["default"](self.lora_A["default"](inputs))


class Tuned(nn.Module):
    """A base from a seed, which gives other numbers where float64 is the default; under
    `base_model.model`, as in peft.
    """

    def __init__(self, train_all: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        layers = nn.Linear(64, 8), nn.Linear(8, 4)
        with torch.no_grad():
            for each in [tensor for layer in layers for tensor in layer.parameters()]:
                each.copy_(0.3 * torch.randn(each.shape, generator=generator))
        inner = nn.Module()
        inner.hidden, inner.out = Low(layers[0]), Low(layers[1])
        self.base_model = nn.ModuleDict({"model": inner})
        if train_all:
            self.requires_grad_(True)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = self.base_model["model"]
        return inner.out(torch.tanh(inner.hidden(inputs)))


BASE = [
    f"base_model.model.{layer}.base_layer.{part}"
    for layer in ("hidden", "out")
    for part in ("weight", "bias")
]
ADAPTERS = {
    f"base_model.model.{layer}.lora_{side}.default.weight"
    for layer in ("hidden", "out")
    for side in "AB"
}
RENAME = [r"\.lora_([AB])\.=.lora_\1.default."]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def tuned_task(build: Callable[[], nn.Module] = Tuned, **more: Any) -> Task:
    return Task(build, {"train": (INPUTS, TARGETS)}, {"train": Loss(F.cross_entropy)}, **more)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of tuning, each as peft saves it: the adapter's tensors alone, without the
    adapter's name.
    """
    root = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(1)
    model = Tuned()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
    for step in range(0, 40, 10):
        held = {name: each for name, each in model.state_dict().items() if "lora_" in name}
        named = {name.replace(".default", ""): each for name, each in held.items()}
        write_step(root / "peft" / f"checkpoint-{step}", step, named, "adapter_model.safetensors")
        write_step(root / "plain", step, held)
        optimizer.zero_grad()
        cross_entropy(model, (INPUTS, TARGETS)).mean().backward()
        optimizer.step()
    return root


def whole(directory: Path) -> list[Mapping[str, Tensor]]:
    built = {name: each.detach() for name, each in Tuned().named_parameters()}
    return [{**built, **load_file(path)} for path in sorted(directory.glob("*.safetensors"))]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_adapters_alone_are_replayed_over_the_frozen_base_the_task_builds(
    tmp_path: Path, tuned: Path, precision: str
) -> None:
    made, notes = replayed(
        tuned / "peft", tuned_task(), tmp_path / "run", rename=RENAME, precision=precision
    )
    assert set(arrays(made["train"].allocation)) == ADAPTERS
    (note,) = notes
    says(
        note,
        "no checkpoint holds",
        repr(BASE[0]),
        "and 1 more",
        "frozen in the task's model",
        "as it builds them",
    )
    judge = Oracle(Tuned, (INPUTS, TARGETS), cross_entropy)
    near_the_oracle(made, judge, whole(tuned / "plain"), 1e-5 if precision == "float32" else 1e-6)
    same_numbers(
        made, replayed(tuned / "plain", tuned_task(), tmp_path / "plain", precision=precision)[0]
    )


def test_a_frozen_base_gives_the_bits_of_one_the_task_fixes(tmp_path: Path, tuned: Path) -> None:
    made, _ = replayed(tuned / "plain", tuned_task(), tmp_path / "frozen")
    fixed, notes = replayed(
        tuned / "plain", tuned_task(fixed=["*.base_layer.*"]), tmp_path / "fixed"
    )
    assert notes == []
    same_numbers(made, fixed)


def test_a_frozen_base_gives_the_bits_of_one_every_checkpoint_holds(
    tmp_path: Path, tuned: Path
) -> None:
    for step, point in enumerate(whole(tuned / "plain")):
        write_step(tmp_path / "whole", 10 * step, point)
    made, notes = replayed(tmp_path / "whole", tuned_task(), tmp_path / "run")
    assert notes == []
    found, wanted = (
        arrays(each["train"].allocation)
        for each in (made, replayed(tuned / "plain", tuned_task(), tmp_path / "part")[0])
    )
    assert found.keys() == {*ADAPTERS, *BASE}
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in ADAPTERS)
    assert not any(found[name].any() for name in BASE)


def test_what_is_trained_must_be_in_the_checkpoints(tmp_path: Path, tuned: Path) -> None:
    with pytest.raises(
        InputError,
        match=re.escape(repr(BASE[0])) + r".* is missing in "
        r".*Task\(fixed=\[…\]\)",
    ):
        replayed(tuned / "plain", tuned_task(lambda: Tuned(train_all=True)), tmp_path / "run")
    with pytest.raises(InputError, match=r"lora_A\.default\.weight' .* is missing in"):
        replayed(tuned / "peft", tuned_task(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Counting(Tuned):
    """Its frozen base has a buffer that is stored, and moves whether or not anything is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))


def test_buffers_must_be_in_the_checkpoints_unless_the_task_fixes_them(
    tmp_path: Path, tuned: Path
) -> None:
    with pytest.raises(InputError, match=r"'seen' .* is missing in"):
        replayed(tuned / "plain", tuned_task(Counting), tmp_path / "run")
    made, _ = replayed(tuned / "plain", tuned_task(Counting, fixed=["seen"]), tmp_path / "run")
    assert set(arrays(made["train"].allocation)) == ADAPTERS


# --- public series --------------------------------------------------------------------------------

SPACED = (0, *(2**power for power in range(10)), 1000)


def test_a_series_spaced_by_powers_of_two_is_replayed_and_says_what_that_costs(
    tmp_path: Path,
) -> None:
    made = task_namespace()
    torch.manual_seed(2)
    model, (inputs, targets) = made["Net"](), made["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(1001):
        if step in SPACED:
            write_step(
                tmp_path / "series" / f"step{step}",
                step,
                dict(model.state_dict()),
                "model.safetensors",
            )
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    task = write_task(tmp_path / "task.py")
    result = run_lca(
        tmp_path / "series", task, tmp_path / "run", "--rule", "trapezoid", "--tolerance", "inf"
    )
    assert result.exit_code == 0, last_line(result)
    says(
        result.stderr,
        "9 of 11 segments are longer than one step, with 998 steps or 99.8% of training in them, "
        "the longest 512→1000",
    )
    says(
        result.stderr,
        "is not the path that training took",
        "The residual shows what quadrature misses",
    )
    train = open_run(tmp_path / "run")["train"]
    steps, allocated = train.steps, train.tensors.allocated.sum("tensor")
    assert steps.step.values.tolist() == list(SPACED[:-1])
    change = steps.loss_end - steps.loss_start
    assert np.abs(change - allocated - steps.residual).max() < 1e-9
    residual = np.abs(steps.residual.values)
    assert residual[4:8].max() > 100 * residual[0]  # 8→128, where the loss falls
