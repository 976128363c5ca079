"""What cuDNN refuses on a GPU, injected on a CPU: a recurrent layer that does not go backward from
eval mode, and an operation it does not support.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lca_posthoc import Loss, Recorder, Task, run
from lca_posthoc.errors import LCAError
from lca_posthoc.numerics.objective import values
from lca_posthoc.numerics.objective.recurrent import going_backward
from lca_posthoc.replay.events import Event, SpanFailed, silent
from lca_posthoc.results import Run

from ..helpers.replayed_cases import assert_same_bits

EVAL_MODE = "cudnn RNN backward can only be called in training mode"
UNSUPPORTED = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."
WAY_OUT = "torch.backends.cudnn.enabled = False in the task file"
STEPS, REFUSED = 6, 4  # segments, and the checkpoint at which an operation is not supported
NATIVE = torch._VF.lstm


class Refusing(torch.autograd.Function):
    """Returns what it is given, and refuses to go backward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        raise RuntimeError(EVAL_MODE)


def refusing_lstm(*args: Any) -> tuple[Tensor, ...]:
    """An LSTM that goes backward in training mode alone."""
    output, *states = NATIVE(*args)
    training = args[6] if isinstance(args[3], bool) else args[7]
    return (output if training else Refusing.apply(output), *states)


class Sequences(nn.Module):
    """Two recurrent layers, with dropout between them, over padded or packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        lengths = 3 + 2 * (inputs[:, 0, 0] > 0)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        (padded, _), (_, (last, _)) = self.rnn(inputs), self.rnn(packed)
        result: Tensor = self.out(padded[:, -1] + last[-1])
        return result


class Unsupported(nn.Linear):
    """A layer of which cuDNN supports nothing at one point, in the forward or in the backward
    pass.
    """

    bias_refused: float | None = None
    backward = False

    def forward(self, inputs: Tensor) -> Tensor:
        output = super().forward(inputs)
        refuses = float(self.bias[0].detach()) == self.bias_refused
        if not refuses or not torch.backends.cudnn.enabled:
            return output
        if not self.backward:
            raise RuntimeError(UNSUPPORTED)
        output.register_hook(_refuse)
        return output


def _refuse(above: Tensor) -> None:
    raise RuntimeError(UNSUPPORTED)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Unsupported(15, 4), nn.Tanh(), nn.Linear(4, 2))


DRAW = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(12, 5, 3, generator=DRAW), torch.arange(12) % 2


def train(place: Path, model: nn.Module) -> list[dict[str, Tensor]]:
    """Record a few steps; return the iterates."""
    optimizer, iterates = torch.optim.SGD(model.parameters(), lr=0.3), list[dict[str, Tensor]]()
    with Recorder(place, model) as recorder:
        for step in range(STEPS + 1):
            iterates.append({name: of.clone() for name, of in model.state_dict().items()})
            recorder.save(step)
            optimizer.zero_grad()
            F.cross_entropy(model(INPUTS), LABELS).backward()
            optimizer.step()
    return iterates


def replay(place: Path, model: Any, out: str, **options: Any) -> Run:
    losses = {
        "train": Loss(F.cross_entropy, on="train"),
        "examples": Loss(F.cross_entropy, on="train", per="example"),
    }
    task = Task(model, {"train": (INPUTS, LABELS)}, losses)
    chosen = {"cluster": "inline", "progress": silent, "batch_size": 5, "span": 1, **options}
    return run(place / "ck", task, out=place / out, losses=["all"], **chosen)


@pytest.fixture
def cudnn() -> Iterator[None]:
    """Put back whether cuDNN is used."""
    before = torch.backends.cudnn.enabled
    yield
    torch.backends.cudnn.enabled = before


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_recurrent_layers_that_go_backward_in_training_mode_alone_give_the_bits_of_eval_mode(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "ck", Sequences())
    wanted = replay(tmp_path, Sequences, "wanted", keep=keep)
    monkeypatch.setattr(torch._VF, "lstm", refusing_lstm)
    monkeypatch.setattr(values, "recurring", lambda device: going_backward())  # as on a GPU
    run = replay(tmp_path, Sequences, "run", keep=keep)
    for loss in ("train", "examples"):
        assert_same_bits(run[loss], wanted[loss])
    of_examples = [opened["examples"].examples["allocated"].values for opened in (run, wanted)]
    assert (of_examples[0] == of_examples[1]).all()


def test_a_layer_that_refuses_all_the_same_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is scripted, whose functions are not reached."""
    train(tmp_path / "ck", Sequences())
    monkeypatch.setattr(torch._VF, "lstm", refusing_lstm)
    with pytest.raises(LCAError) as caught:
        replay(tmp_path, Sequences, "run")
    assert [words for words in (EVAL_MODE, WAY_OUT) if words not in str(caught.value)] == []
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_not_supported_at_one_point_fails_the_spans_that_meet_it(
    backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cudnn: None
) -> None:
    """And the others are complete; without cuDNN these follow."""
    iterates = train(tmp_path / "ck", classifier())
    wanted = replay(tmp_path, classifier, "wanted", tolerance="inf")
    refused = float(iterates[REFUSED]["1.bias"][0])
    monkeypatch.setattr(Unsupported, "bias_refused", refused)
    monkeypatch.setattr(Unsupported, "backward", backward)
    events: list[Event] = []
    with pytest.raises(LCAError) as caught:
        replay(tmp_path, classifier, "run", tolerance="inf", progress=events.append)
    assert caught.value.exit_code == 3
    failed = [event for event in events if isinstance(event, SpanFailed)]
    assert [event.first_step for event in failed] == [REFUSED - 1, REFUSED]
    for said in (str(caught.value), *(event.message for event in failed)):
        assert f"{UNSUPPORTED} To evaluate losses without cuDNN" in said
        assert WAY_OUT in said
    torch.backends.cudnn.enabled = False
    run = replay(tmp_path, classifier, "run", tolerance="inf")
    for loss in ("train", "examples"):
        assert_same_bits(run[loss], wanted[loss])
