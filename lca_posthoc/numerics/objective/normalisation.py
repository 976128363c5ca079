r"""Control normalisation layers during a replay with a named mode.

`running`: the loss depends on the running statistics stored in the checkpoints, which move too.
torch computes no gradient for them, so the native kernel is kept and the gradient passes through an
equivalent affine pair: with $m_0, v_0$ the detached statistics, it is called with weight
$w\sqrt{(v_0+\varepsilon)/(v+\varepsilon)}$ and bias $b-(m-m_0)\,w/\sqrt{v+\varepsilon}$. Values
equal those of the plain call; autograd sees $m$ and $v$, in derivatives of any order, in backward
and forward mode.

`batch`: statistics of each batch of a fixed partition, as in the paper; running statistics are
neither read nor written. A network beside the model, such as a teacher in eval mode, keeps its own:
a call belongs to the model if its statistics are the model's buffers.

`recalibrated`: like `running`, with statistics recomputed from the data at every checkpoint instead
of the stored ones (`recalibration.py`).

The functions are replaced, not the modules, so that functional calls and activation checkpointing
(which runs the forward pass again during the backward pass) are covered: the context must be open
around both passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ...errors import InputError

Native = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class NormalisationCall:
    """Describe one call of `F.batch_norm` or `F.instance_norm`.

    Attributes:
        native: torch's own function.
        over_batch: whether it is `F.batch_norm`, which normalises over the batch.
        from_input: whether the caller requested statistics of the input (`training`,
            `use_input_stats`).
        input: input, (examples, channels, ...).
        mean: running mean, (channels,); None if the layer has none.
        variance: running variance, (channels,); None if the layer has none.
        weight: weight, (channels,), or None.
        bias: bias, (channels,), or None.
        eps: number added to the variance.
    """

    native: Native
    over_batch: bool
    from_input: bool
    input: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def with_input_statistics(
        self, mean: Tensor | None = None, variance: Tensor | None = None
    ) -> Tensor:
        """Return the layer's output with statistics of the input.

        Args:
            mean: tensor to write the mean to, if given.
            variance: tensor to write the variance to, if given.
        """
        return self.native(self.input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    def with_running_statistics(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the layer's output with given running statistics, which have a gradient.

        Args:
            mean: running mean, (channels,).
            variance: running variance, (channels,).
        """
        return normalised(self.input, mean, variance, self.weight, self.bias, self.eps, self.native)


def normalised(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    native: Native,
) -> Tensor:
    """Return the output of a layer with running statistics, which have a gradient.

    Torch function modes see a single call of this function.

    Args:
        input: input, (examples, channels, ...).
        mean: running mean, (channels,).
        variance: running variance, (channels,).
        weight: weight, (channels,), or None.
        bias: bias, (channels,), or None.
        eps: number added to the variance.
        native: `F.batch_norm` or `F.instance_norm`.
    """
    tensors = (input, mean, variance, weight, bias)
    if has_torch_function(tensors):
        output: Tensor = handle_torch_function(normalised, tensors, *tensors, eps, native)
        return output
    weight, bias = _affine(mean, variance, weight, bias, eps)
    return native(input, mean.detach(), variance.detach(), weight, bias, False, 0.0, eps)


Behaviour = Callable[[NormalisationCall], Tensor]


def _is_differentiated(statistic: Tensor) -> bool:
    """Return whether a statistic has a gradient or a tangent."""
    tangent = forward_ad.unpack_dual(statistic).tangent  # type: ignore[no-untyped-call]
    return statistic.requires_grad or tangent is not None


def _affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias with which the detached statistics give the same output, and which
    carry the gradient of the statistics, if any.
    """
    if not (_is_differentiated(mean) or _is_differentiated(var)):
        return weight, bias
    mean0, var0 = mean.detach(), var.detach()
    scale = torch.ones_like(mean0) if weight is None else weight
    shift = torch.zeros_like(mean0) if bias is None else bias
    return (
        scale * torch.sqrt((var0 + eps) / (var + eps)),
        shift - (mean - mean0) * (scale / torch.sqrt(var + eps)),
    )


def running(call: NormalisationCall) -> Tensor:
    """Use the running statistics, with their gradient.

    Raises:
        InputError: if a batch-norm layer requests statistics of the batch.
    """
    if call.from_input or call.mean is None or call.variance is None:
        if call.over_batch:
            raise InputError(
                "a batch-norm layer uses batch statistics although the model is in eval mode "
                "(track_running_stats=False, or training=True in a functional call), so the loss "
                "depends on the batches. Use --norm-stats batch --batch-size N."
            )
        return call.with_input_statistics()
    return call.with_running_statistics(call.mean, call.variance)


def _of_batch(own: Mapping[int, Tensor]) -> Behaviour:
    """Return a behaviour that uses statistics of the input in every layer whose running mean is one
    of the model's `own` buffers.
    """

    def of_batch(call: NormalisationCall) -> Tensor:
        if not call.from_input and call.mean is not None and id(call.mean) not in own:
            return running(call)
        return call.with_input_statistics()

    return of_batch


@contextlib.contextmanager
def normalising(mode: str, own: Iterable[Tensor] = ()) -> Iterator[None]:
    """Apply `mode` to normalisation layers around forward and backward passes, in modules and
    functional calls.

    Args:
        mode: "running", "recalibrated" or "batch".
        own: buffers of the model, whose running statistics `batch` ignores.
    """
    with replacing(
        _of_batch({id(buffer): buffer for buffer in own}) if mode == "batch" else running
    ):
        yield


@contextlib.contextmanager
def replacing(behaviour: Behaviour) -> Iterator[None]:
    """Let `behaviour` handle every call of `F.batch_norm` and `F.instance_norm`."""
    native: Any = (F.batch_norm, F.instance_norm)

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
        return behaviour(
            NormalisationCall(
                native=native[0],
                over_batch=True,
                from_input=training,
                input=input,
                mean=running_mean,
                variance=running_var,
                weight=weight,
                bias=bias,
                eps=eps,
            )
        )

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
        return behaviour(
            NormalisationCall(
                native=native[1],
                over_batch=False,
                from_input=use_input_stats,
                input=input,
                mean=running_mean,
                variance=running_var,
                weight=weight,
                bias=bias,
                eps=eps,
            )
        )

    F.batch_norm, F.instance_norm = batch_norm, instance_norm
    try:
        yield
    finally:
        F.batch_norm, F.instance_norm = native
