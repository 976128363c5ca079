"""Recurrent layers that run as in training without dropout, as they must on a GPU: the same values,
the same gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lca_posthoc.numerics.objective.recurrent import going_backward, recurring


class Own(nn.LSTM):
    """A user's own kind of layer."""


LAYERS = {
    "LSTM": lambda: nn.LSTM(4, 5),
    "deep, both ways, dropout": lambda: nn.LSTM(
        4, 5, num_layers=3, dropout=0.5, bidirectional=True
    ),
    "projected": lambda: nn.LSTM(4, 5, proj_size=2, batch_first=True),
    "no bias": lambda: nn.GRU(4, 5, bias=False),
    "GRU, dropout": lambda: nn.GRU(4, 5, num_layers=2, dropout=0.3, batch_first=True),
    "tanh": lambda: nn.RNN(4, 5, num_layers=2, dropout=0.9),
    "relu": lambda: nn.RNN(4, 5, nonlinearity="relu", bidirectional=True),
    "subclass": lambda: Own(4, 5, num_layers=2, dropout=0.5),
}
X = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


def padded(module: Any) -> Tensor:
    return module(X)[0]


def packed(module: Any) -> Tensor:
    packed = pack_padded_sequence(
        X[:3], torch.tensor([3, 1, 2]), batch_first=True, enforce_sorted=False
    )
    out = module(packed)[0]
    assert isinstance(out, PackedSequence)
    return out.data


def called(module: Any) -> Tensor:
    """The function itself, its last arguments by name where torch takes them so."""
    state = torch.zeros(1, 3, 5)
    return torch.gru(X, state, module._flat_weights, module.bias, 1, 0.0, False, False, False)[0]


@pytest.mark.parametrize("use", [padded, packed])
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_gradients_are_those_of_eval_mode(layer: str, use: Any) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]().eval()
    found = []
    for _ in range(2):
        out = use(module)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
        if len(found) == 1:
            context = going_backward()
            context.__enter__()
    context.__exit__(None, None, None)
    assert all(map(torch.equal, *found))


class Spy:
    """Stands for a native function; keeps what it was called with."""

    def __init__(self, native: Any) -> None:
        self.native, self.calls = native, list[Any]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.native(*args, **kwargs)


@pytest.mark.parametrize(
    ("training", "use", "wanted"),
    [(False, padded, (0.0, True)), (False, packed, (0.0, True)), (True, padded, (0.5, True))],
)
def test_what_torch_is_asked_for(
    training: bool, use: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.GRU(4, 5, num_layers=2, dropout=0.5, batch_first=True).train(training)
    spy = Spy(torch._VF.gru)
    monkeypatch.setattr(torch._VF, "gru", spy)
    with going_backward():
        use(module)
    ((args, _),) = spy.calls
    at = 6 if use is packed else 5
    assert args[at : at + 2] == wanted
    assert module.training == training


def test_functions_called_by_themselves_are_reached_and_all_is_put_back() -> None:
    module = nn.GRU(4, 5).eval()
    before = [
        getattr(place, name)
        for place in (torch, torch._VF)
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    ]
    wanted = called(module)
    with going_backward():
        assert torch.gru is not before[1]
        assert torch.equal(called(module), wanted)
    after = [
        getattr(place, name)
        for place in (torch, torch._VF)
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    ]
    assert after == before


def test_on_a_cpu_the_functions_stay() -> None:
    before = torch._VF.lstm
    with recurring(torch.device("cpu")):
        assert torch._VF.lstm is before
    with recurring(torch.device("cuda")):
        assert torch._VF.lstm is not before
    assert torch._VF.lstm is before
