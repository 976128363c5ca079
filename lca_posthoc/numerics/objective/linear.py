"""Speed up linear layers on CPUs whose widest vectors torch's own float32 matrix product does not
use.

If torch multiplies with Intel's MKL, a CPU of another maker gets its AVX2 kernels even if it has
AVX-512. oneDNN, which torch includes for convolutions, uses what is available. Both compute in
float32. The function is replaced, not the modules, and the context must be open around forward and
backward passes, as in `normalisation`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

_LEAST = 2**21  # multiplications; with fewer, the call costs more than it saves


def _product(first: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return first · secondᵀ + bias, computed by oneDNN."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(first, second, bias, "none", [], "")
    return result


def _differentiable(first: Tensor, second: Tensor) -> Tensor:
    """Return first · secondᵀ, computed by torch's own product."""
    return first @ second.t()


class _Linear(torch.autograd.Function):
    """Compute x · Wᵀ + b; second derivatives use torch's own product."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_inputs, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if for_weight else None, weight if for_inputs else None)
        return _product(inputs.contiguous(), weight, bias)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias = ctx.needs_input_grad
        product = _differentiable if torch.is_grad_enabled() else _product
        above = above.contiguous()
        rows = above.reshape(-1, above.shape[-1])
        return (
            product(above, weight.t()) if for_inputs else None,
            product(rows.t(), inputs.contiguous().reshape(-1, inputs.shape[-1]).t())
            if for_weight
            else None,
            rows.sum(0) if for_bias else None,
        )


def _suits(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _plain() -> bool:
    """Return whether calls are neither traced, transformed nor cast by compiler, functorch, forward
    mode or autocast.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the product is large enough to benefit, with shapes and strides that oneDNN
    accepts.
    """
    return (
        input.dim() > 1
        and weight.dim() == 2
        and input.numel() * weight.shape[0] >= _LEAST
        and input.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


def linear(native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a version of `F.linear` that uses oneDNN; unsuitable or small calls use `native`."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        tensors = (input, weight) if bias is None else (input, weight, bias)
        suits = (
            _plain()
            and not has_torch_function(tensors)  # an active mode would not see the call
            and all(map(_suits, tensors))
            and _fits(input, weight, bias)
        )
        result: Tensor = (_Linear.apply if suits else native)(input, weight, bias)
        return result

    return linear


@functools.cache
def preferred() -> bool:
    """Return whether this CPU has AVX-512 and is not from Intel, and this torch has oneDNN's
    product.
    """
    try:
        vendors = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return (
        "GenuineIntel" not in vendors
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextlib.contextmanager
def multiplying(device: torch.device) -> Iterator[None]:
    """Make linear layers on a CPU use the faster product inside the context."""
    if device.type != "cpu" or not preferred():
        yield
        return
    native: Any = F.linear
    F.linear = linear(native)
    try:
        yield
    finally:
        F.linear = native
