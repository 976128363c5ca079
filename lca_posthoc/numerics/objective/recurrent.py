"""Recurrent layers whose kernels have no derivative of the kind that is asked for.

On a GPU, cuDNN refuses the backward pass of a forward pass in eval mode. In training mode with no
dropout the same kernels compute the same function, and can go backward; on a CPU the functions stay
as they are. Fused kernels have no derivative in the forward pass either: there, layers are computed
operation by operation.

As in `normalisation` the functions are replaced, not the modules: `torch.nn.LSTM`, its relatives and
their subclasses call them, and so do functional calls.
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


def _without_fused_kernels(native: Callable[..., object]) -> Callable[..., object]:
    """Return a recurrent function that uses the kernels of neither oneDNN nor cuDNN."""

    @functools.wraps(native)
    def recurrent(*args: object, **kwargs: object) -> object:
        # not `torch.backends.mkldnn.flags`, which sets how products are rounded as well
        earlier = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        try:
            return native(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(earlier[0])
            torch._C._set_cudnn_enabled(earlier[1])

    return recurrent


@contextlib.contextmanager
def _replaced(change: Callable[[Callable[..., object]], Callable[..., object]]) -> Iterator[None]:
    """Put a changed function in the place of every recurrent function of torch."""
    functions: Any = torch._VF
    native = {name: getattr(functions, name) for name in _NAMES}
    of_torch = {name: getattr(torch, name) for name in _NAMES}
    for name in _NAMES:
        setattr(functions, name, change(native[name]))
        setattr(torch, name, change(of_torch[name]))
    try:
        yield
    finally:
        for name in _NAMES:
            setattr(functions, name, native[name])
            setattr(torch, name, of_torch[name])


def going_backward() -> contextlib.AbstractContextManager[None]:
    """Let the recurrent functions of torch go backward in eval mode, around forward passes."""
    return _replaced(_without_dropout)


def operation_by_operation() -> contextlib.AbstractContextManager[None]:
    """Let derivatives be taken in forward passes through the recurrent functions of torch."""
    return _replaced(_without_fused_kernels)


@contextlib.contextmanager
def recurring(device: torch.device) -> Iterator[None]:
    """Run recurrent layers on a GPU in a mode that goes backward; do nothing on a CPU."""
    with going_backward() if device.type == "cuda" else contextlib.nullcontext():
        yield
