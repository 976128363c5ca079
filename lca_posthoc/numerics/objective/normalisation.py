r"""The behaviour of normalisation layers in a replay: a named choice, made in one place.

`running`: the loss depends on the running statistics stored in the checkpoints, which move as well.
torch gives no gradient for them, so the native kernel is kept and the gradient routed through an
equivalent affine pair: with $m_0, v_0$ the detached statistics, it is called with weight
$w\sqrt{(v_0+\varepsilon)/(v+\varepsilon)}$ and bias $b-(m-m_0)\,w/\sqrt{v+\varepsilon}$. Values are
those of the plain call; autograd sees $m$ and $v$, in derivatives of any order, of the backward and
of the forward pass.

`batch`: statistics of each batch of a fixed partition, as in the paper; running statistics are
neither read nor written. A network beside the model, such as a teacher in eval mode, keeps its own:
a call is the model's where its statistics are the model's buffers.

`recalibrated`: as `running`, with statistics recomputed from the data at every checkpoint in place
of the stored ones (`statistics.py`).

The functions are replaced, not the modules, so that functional calls and activation checkpointing
(which runs the forward again during the backward pass) are served alike: the context must be open
around both.
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
    """One call of `F.batch_norm` or `F.instance_norm`.

    Attributes:
        native: torch's own function.
        over_batch: whether it is `F.batch_norm`, whose statistics of the input are those of the
            batch.
        from_input: whether the caller asked for statistics of the input (`training`,
            `use_input_stats`).
        input: (examples, channels, ...).
        mean, variance: the running statistics, (channels,); None for a layer that has none.
        weight, bias: (channels,), or None.
        eps: added to the variance.
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
        """Return the layer's output with statistics of the input, which are written to `mean` and
        `variance` where these are given.
        """
        return self.native(self.input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    def with_running_statistics(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the layer's output with these running statistics, which have a gradient."""
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
    """Return the output of a layer with running statistics, which have a gradient; a function of
    torch's to modes, which see one call.

    Args:
        input: (examples, channels, ...).
        mean: (channels,).
        variance: (channels,).
        weight: (channels,), or None.
        bias: (channels,), or None.
        eps: added to the variance.
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
    """Tell whether a statistic has a gradient, or moves in a forward pass."""
    tangent = forward_ad.unpack_dual(statistic).tangent  # type: ignore[no-untyped-call]
    return statistic.requires_grad or tangent is not None


def _affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and bias that make the detached statistics stand for the ones with a
    gradient, if they have one.
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
        InputError: where a batch-norm layer asks for those of the batch.
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
    """Hold normalisation layers to `mode` around forward and backward passes, modules and
    functional calls alike.

    Args:
        mode: "running", "recalibrated" or "batch".
        own: the buffers of the model, whose running statistics `batch` does without.
    """
    with replacing(
        _of_batch({id(buffer): buffer for buffer in own}) if mode == "batch" else running
    ):
        yield


@contextlib.contextmanager
def replacing(behaviour: Behaviour) -> Iterator[None]:
    """Let `behaviour` answer every call of `F.batch_norm` and `F.instance_norm`."""
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
