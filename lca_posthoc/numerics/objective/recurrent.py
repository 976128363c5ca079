"""Recurrent layers on a GPU, where cuDNN refuses the backward pass of a forward pass in eval mode.

In training mode with no dropout the same kernels compute the same function, and can go backward. As
in `normalisation` the functions are replaced, not the modules: `torch.nn.LSTM`, its relatives and
their subclasses call them, and so do functional calls. On a CPU the functions stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _without_dropout(native: Callable[..., object]) -> Callable[..., object]:
    """Return a recurrent function that runs as in training, with no dropout, where it is called as
    in eval mode.
    """

    @functools.wraps(native)
    def recurrent(*args: object, **kwargs: object) -> object:
        if "train" in kwargs:
            training = kwargs["train"]
            changed = args, {**kwargs, "dropout": 0.0, "train": True}
        else:
            # (input, hx, params, has_biases, num_layers, dropout, train, …), of a packed sequence
            # (data, batch_sizes, hx, …)
            index = 5 if isinstance(args[3], bool) else 6
            training = args[index + 1]
            changed = (*args[:index], 0.0, True, *args[index + 2 :]), kwargs
        return native(*args, **kwargs) if training else native(*changed[0], **changed[1])

    return recurrent


@contextlib.contextmanager
def going_backward() -> Iterator[None]:
    """Let the recurrent functions of torch go backward in eval mode, around forward passes."""
    functions: Any = torch._VF
    native = {name: getattr(functions, name) for name in _NAMES}
    of_torch = {name: getattr(torch, name) for name in _NAMES}
    for name in _NAMES:
        setattr(functions, name, _without_dropout(native[name]))
        setattr(torch, name, _without_dropout(of_torch[name]))
    try:
        yield
    finally:
        for name in _NAMES:
            setattr(functions, name, native[name])
            setattr(torch, name, of_torch[name])


@contextlib.contextmanager
def recurring(device: torch.device) -> Iterator[None]:
    """Run recurrent layers on a GPU in a mode that goes backward; do nothing on a CPU."""
    with going_backward() if device.type == "cuda" else contextlib.nullcontext():
        yield
