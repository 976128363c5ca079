r"""What normalisation layers do in a replay: a named choice, made in one place.

`running`: the loss depends on the running statistics stored in the checkpoints, which move as well. torch gives no
gradient for them, so the native kernel is kept and the gradient routed through an equivalent affine pair: with
$m_0, v_0$ the detached statistics, it is called with weight $w\sqrt{(v_0+\varepsilon)/(v+\varepsilon)}$ and bias
$b-(m-m_0)\,w/\sqrt{v+\varepsilon}$. Values are those of the plain call; autograd sees $m$ and $v$, in derivatives of any order.

`batch`: statistics of each batch of a fixed partition, as in the paper; running statistics are neither read nor written. A network
beside the model, such as a teacher in eval mode, keeps its own: a call is the model's where its statistics are the model's buffers.

`recalibrated`: as `running`, with statistics recomputed from the data at every checkpoint in place of the stored ones (`statistics.py`).

The functions are replaced, not the modules, so that functional calls and activation checkpointing (which runs the forward
again during the backward pass) are served alike: the context must be open around both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

Native = Callable[..., Tensor]


def _affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """The weight and bias that make the detached statistics stand for the ones with a gradient, if they have one."""
    if not (mean.requires_grad or var.requires_grad):
        return weight, bias
    mean0, var0 = mean.detach(), var.detach()
    scale = torch.ones_like(mean0) if weight is None else weight
    shift = torch.zeros_like(mean0) if bias is None else bias
    return (
        scale * torch.sqrt((var0 + eps) / (var + eps)),
        shift - (mean - mean0) * (scale / torch.sqrt(var + eps)),
    )


def running(native: Native) -> Native:
    """Return `F.batch_norm` with running statistics that have a gradient; it refuses those of a batch."""

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training or running_mean is None or running_var is None:
            raise InputError(
                "a batch-norm layer uses batch statistics although the model is in eval mode (track_running_stats=False, or "
                "training=True in a functional call), so the loss depends on the batches. Use --norm-stats batch --batch-size N."
            )
        weight, bias = _affine(running_mean, running_var, weight, bias, eps)
        return native(input, running_mean.detach(), running_var.detach(), weight, bias, False, momentum, eps)

    return batch_norm


def _instance_norm_running(native: Native) -> Native:
    def instance_norm(
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if use_input_stats or running_mean is None or running_var is None:
            return native(input, None, None, weight, bias, True, momentum, eps)
        weight, bias = _affine(running_mean, running_var, weight, bias, eps)
        return native(input, running_mean.detach(), running_var.detach(), weight, bias, False, momentum, eps)

    return instance_norm


def _batch_norm_batch(native: Native, own: Mapping[int, Tensor]) -> Native:
    as_given = running(native)

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training and running_mean is not None and id(running_mean) not in own:
            return as_given(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return native(input, None, None, weight, bias, True, momentum, eps)

    return batch_norm


def _instance_norm_batch(native: Native, own: Mapping[int, Tensor]) -> Native:
    as_given = _instance_norm_running(native)

    def instance_norm(
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not use_input_stats and running_mean is not None and id(running_mean) not in own:
            return as_given(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return native(input, None, None, weight, bias, True, momentum, eps)

    return instance_norm


@contextlib.contextmanager
def normalising(mode: str, own: Iterable[Tensor] = ()) -> Iterator[None]:
    """Hold normalisation layers to `mode` around forward and backward passes, modules and functional calls alike.

    Args:
        mode: "running", "recalibrated" or "batch".
        own: the buffers of the model, whose running statistics `batch` does without.
    """
    batch_norm: Any = F.batch_norm
    instance_norm: Any = F.instance_norm
    if mode != "batch":
        ours = running(batch_norm), _instance_norm_running(instance_norm)
    else:
        held = {id(each): each for each in own}
        ours = _batch_norm_batch(batch_norm, held), _instance_norm_batch(instance_norm, held)
    with replacing(*ours):
        yield


@contextlib.contextmanager
def replacing(batch_norm: Native, instance_norm: Native) -> Iterator[None]:
    """Put these functions in the place of torch's."""
    before: Any = (F.batch_norm, F.instance_norm)
    F.batch_norm, F.instance_norm = batch_norm, instance_norm
    try:
        yield
    finally:
        F.batch_norm, F.instance_norm = before
