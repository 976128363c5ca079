"""Replace recurrent kernels that lack a required derivative.

On a GPU, cuDNN has no backward pass for a forward pass in eval mode. In training mode without
dropout, the same kernels compute the same function and have one; on a CPU, the functions stay
unchanged. Fused kernels have no forward-mode derivative either: there, layers are computed
operation by operation.

As in `normalisation`, the functions are replaced, not the modules: `torch.nn.LSTM`, its relatives,
their subclasses and functional calls all use them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _without_dropout(native: Callable[..., object]) -> Callable[..., object]:
    """Return a recurrent function that runs eval-mode calls in training mode without dropout."""

    @functools.wraps(native)
    def recurrent(*args: object, **kwargs: object) -> object:
        if "train" in kwargs:
            training = kwargs["train"]
            changed = args, {**kwargs, "dropout": 0.0, "train": True}
        else:
            # (input, hx, params, has_biases, num_layers, dropout, train, …), or (data, batch_sizes,
            # hx, …) for a packed sequence
            index = 5 if isinstance(args[3], bool) else 6
            training = args[index + 1]
            changed = (*args[:index], 0.0, True, *args[index + 2 :]), kwargs
        return native(*args, **kwargs) if training else native(*changed[0], **changed[1])

    return recurrent


def _without_fused_kernels(native: Callable[..., object]) -> Callable[..., object]:
    """Return a recurrent function that uses the kernels of neither oneDNN nor cuDNN."""

    @functools.wraps(native)
    def recurrent(*args: object, **kwargs: object) -> object:
        # `torch.backends.mkldnn.flags` would also set how products are rounded
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
    """Replace every recurrent function of torch inside the context."""
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
    """Give torch's recurrent functions a backward pass in eval mode; open the context around
    forward passes.
    """
    return _replaced(_without_dropout)


def operation_by_operation() -> contextlib.AbstractContextManager[None]:
    """Give torch's recurrent functions forward-mode derivatives."""
    return _replaced(_without_fused_kernels)


@contextlib.contextmanager
def recurring(device: torch.device) -> Iterator[None]:
    """Run recurrent layers on a GPU in a mode that has a backward pass; do nothing on a CPU."""
    with going_backward() if device.type == "cuda" else contextlib.nullcontext():
        yield
