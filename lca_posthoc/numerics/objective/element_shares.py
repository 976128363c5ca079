"""Compute derivatives of every element of a loss along the motion of every tensor by forward
passes.

The elements of a loss are its values on a batch: target tokens, pixels, labels. While one tensor
carries its motion as a tangent, a forward pass returns the derivative of all elements along it: one
pass for each tensor and direction, without storing a graph.

The tangent is set on the module's own tensor in place, so that it is present wherever the tensor is
used: under every name of a tied one, in lists that modules hold, and in recomputation under
activation checkpointing. It is removed after the pass.

Not every operation has a forward-mode derivative. Most of the others raise an error; some silently
drop the tangent. `ElementDerivatives.check` compares with backward passes from single elements.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import InputError, few
from .device_errors import is_out_of_memory
from .directions import Along, Motion, SumsAlong
from .recurrent import operation_by_operation
from .tap_check import LEAST, Drawn, tolerance_of
from .values import Values

_COMPARED = 4  # elements compared by separate backward passes
_WAY_OUT = (
    'Use per="example", which needs only backward passes; a custom function can define its '
    "forward-mode derivative in a static method jvp."
)


@dataclass(frozen=True)
class ElementShares:
    """Hold the elements of a loss on one batch and their directional derivatives.

    Attributes:
        values: one value per element, multiplied by its weight, in the shape of the loss.
        weights: weights of the elements, float64; None if all are 1.
        shares: by tensor, the derivative of every element's weighted value along the tensor's
            motions, (directions, elements) float64, in the order of `values`.
    """

    values: Tensor
    weights: Tensor | None
    shares: dict[str, Tensor]


def passes(tensors: int, directions: int) -> int:
    """Return the maximum number of forward passes over a batch: one for each tensor and direction,
    and one for the values.

    Args:
        tensors: number of tensors.
        directions: number of directions.
    """
    return tensors * directions + 1


class ElementDerivatives:
    """Compute the derivatives of every element of a loss at the point in a module.

    The caller must have entered `LossValues.mode`.

    Args:
        tensors: the module's own tensors, leaves of autograd, by name.
        values: returns the loss's weighted values and weights on a batch, like `LossValues.values`.
            It is called several times with one batch, which it must not change.
        dtype: type of the computation; bfloat16 under autocast.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        values: Callable[[object], Values],
        dtype: torch.dtype,
    ) -> None:
        self._tensors, self._values = tensors, values
        self._tolerance = tolerance_of(dtype)

    def shares(self, motions: Sequence[Motion], batch: object) -> ElementShares:
        """Return the elements of a batch and their derivatives.

        Derivatives along the motion of a tensor that does not move are exactly 0.

        Args:
            motions: the directions.
            batch: the data.

        Raises:
            InputError: if an operation has no forward-mode derivative, or values differ in the next
                pass.
        """
        values, weights = self._plain(batch)
        if not motions:
            return ElementShares(values, weights, {})
        shares = {
            name: torch.stack([self._along(name, motion, batch, values) for motion in motions])
            for name in self._tensors
        }
        return ElementShares(values, weights, shares)

    def check(self, batch: object) -> None:
        """Compare derivatives of the elements of a few examples with backward passes.

        Use random motions, for single elements and for the sum of all with random signs.

        Raises:
            InputError: if they differ, or as for `shares`.
        """
        motions = [Motion(self._tensors, Drawn(self._tensors))]
        shares = self.shares(motions, batch)
        gradients = SumsAlong(self._tensors, Along(dict.fromkeys(self._tensors), motions))
        factors = [*_single_elements(shares), _signs(shares.values)]
        compared = [
            (factor, self._by_backward_pass(gradients, batch, factor)) for factor in factors
        ]
        self._refuse_differing(shares.shares, compared, batch)

    def _by_backward_pass(
        self, gradients: SumsAlong, batch: object, factors: Tensor
    ) -> dict[str, float]:
        """Return the derivative of the sum of the elements times some factors, by tensor."""
        # run a separate forward pass: not every function can run backward twice
        total = (self._values(batch)[0].double().reshape(-1) * factors).sum()
        sums = {name: float(of_tensor) for name, of_tensor in gradients.sums(total).items()}
        return dict.fromkeys(self._tensors, 0.0) | sums

    def _refuse_differing(
        self,
        told: Mapping[str, Tensor],
        compared: Sequence[tuple[Tensor, Mapping[str, float]]],
        batch: object,
    ) -> None:
        """Check that shares equal those of backward passes.

        Args:
            told: shares by tensor, (1, elements).
            compared: factors of the elements, and the result of the backward pass from their sum.
            batch: the data.

        Raises:
            InputError: if a share differs.
        """
        sizes = [
            sum(
                max(float((told[name][0] * factors).abs().sum()), abs(sums))
                for name, sums in truth.items()
            )
            for factors, truth in compared
        ]
        least = LEAST * max(sizes)
        differing = {
            name
            for (factors, truth), size in zip(compared, sizes, strict=True)
            for name, sums in truth.items()
            if not abs(float(told[name][0] @ factors) - sums) <= self._tolerance * max(size, least)
        }
        if not differing:
            return
        names = [name for name in self._tensors if name in differing]
        functions = _custom_functions(self._values(batch)[0])
        through = f" The loss goes through {few([*functions])}." if functions else ""
        if "CheckpointFunction" in functions:
            through += " torch.utils.checkpoint.checkpoint keeps it with use_reentrant=False."
        raise InputError(
            "derivatives of single elements of the loss differ between forward and backward mode "
            f"along {'tensors' if len(names) > 1 else 'tensor'} "
            f"{few([*map(repr, names)])}: an operation that uses them drops the forward-mode "
            f"derivative.{through} {_WAY_OUT}"
        )

    def _plain(self, batch: object) -> Values:
        """Return the values of a batch without their graph, and the weights."""
        values, weights = self._values(batch)
        return values.detach(), weights

    def _along(self, name: str, motion: Motion, batch: object, values: Tensor) -> Tensor:
        """Return the derivative of every element along the motion of one tensor, (elements,)
        float64.

        Raises:
            InputError: if an operation has no forward-mode derivative, or values differ.
            RuntimeError: if memory runs out.
        """
        zero = torch.zeros(values.numel(), dtype=torch.float64, device=values.device)
        start, end = motion.start[name], motion.end[name]
        if torch.equal(start, end):
            return zero
        with _forward_derivatives(), _without_graph(self._tensors.values()):
            own = self._tensors[name]
            tangent = torch.sub(end, start).to(own)
            own.copy_(forward_ad.make_dual(own.detach(), tangent))  # type: ignore[no-untyped-call]
            try:
                moving, _ = self._values(batch)
            except (InputError, RuntimeError) as error:  # the same call succeeded without a tangent
                if is_out_of_memory(error):
                    raise
                raise InputError(
                    "the derivatives of the elements of the loss cannot be computed in forward mode "
                    f"along tensor {name!r}: {_reason(error)}. {_WAY_OUT}"
                ) from error
            same, derivative = forward_ad.unpack_dual(moving)  # type: ignore[no-untyped-call]
            self._refuse_other_values(name, values, same.detach())
            return zero if derivative is None else derivative.detach().reshape(-1).double()

    def _refuse_other_values(self, name: str, values: Tensor, others: Tensor) -> None:
        """Check that the values with a tangent equal those without; ignore values that are not
        finite, which are reported elsewhere.

        Raises:
            InputError: if they differ.
        """
        if values.shape == others.shape:
            pair = values.double(), others.double()
            finite = pair[0].isfinite() & pair[1].isfinite()
            one, other = (part[finite] for part in pair)
            size = one.abs().mean() if one.numel() else 0.0
            if bool(((one - other).abs() <= self._tolerance * (one.abs() + size)).all()):
                return
        raise InputError(
            "the values of the loss change when its derivatives along tensor "
            f"{name!r} are computed, on the same batch. Seed its random numbers; if it has none, "
            'use per="example".'
        )


@contextlib.contextmanager
def _forward_derivatives() -> Iterator[None]:
    """Let tensors carry tangents, and make torch choose operations that have a forward-mode
    derivative.
    """
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled; importing it is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(operation_by_operation())
        stack.enter_context(_unfused_weight_norm())
        stack.enter_context(_padding_without_tangent())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # attention layers in eval mode use it if no parameter requires a gradient
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(forward_ad.dual_level())
        yield


@contextlib.contextmanager
def _padding_without_tangent() -> Iterator[None]:
    """Ignore the tangent of an embedding's padding row, as a backward pass ignores its gradient."""
    functional: Any = torch.nn.functional
    native = functional.embedding

    def embedding(
        input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows: Tensor = native(input, weight, padding_idx, *args, **kwargs)
        if padding_idx is None:
            return rows
        is_padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
        return torch.where(is_padding, rows.detach(), rows)

    functional.embedding = embedding
    try:
        yield
    finally:
        functional.embedding = native


@contextlib.contextmanager
def _unfused_weight_norm() -> Iterator[None]:
    """Compute normalised weights by operations with a forward-mode derivative, in both places of
    torch that call the fused one.
    """
    modules: list[Any] = [torch, sys.modules["torch.nn.utils.weight_norm"]]
    native = torch._weight_norm

    def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, dim))

    for module in modules:
        module._weight_norm = weight_norm
    try:
        yield
    finally:
        for module in modules:
            module._weight_norm = native


@contextlib.contextmanager
def _without_graph(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Store nothing for backward passes: let none of the tensors require a gradient inside the
    context.
    """
    requiring = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor in requiring:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in requiring:
            tensor.requires_grad_(True)


def _single_elements(shares: ElementShares) -> Iterator[Tensor]:
    """Yield factors, (elements,), each of which selects one of some evenly spaced elements with
    weight.
    """
    flat = shares.values.double().reshape(-1)
    weights = torch.ones_like(flat) if shares.weights is None else shares.weights.reshape(-1)
    positions = torch.nonzero(weights > 0).reshape(-1).tolist()
    chosen = {index * (len(positions) - 1) // (_COMPARED - 1) for index in range(_COMPARED)}
    for index in sorted(chosen) if positions else []:
        factors = torch.zeros_like(flat)
        factors[positions[index]] = 1.0
        yield factors


def _signs(values: Tensor) -> Tensor:
    """Return a random sign for every element, (elements,), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (values.numel(),), generator=generator, device="cpu") * 2 - 1
    return signs.to(values.device, torch.float64)


def _reason(error: BaseException) -> str:
    """Return what an error says about the operation without a forward-mode derivative."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = str(chain[-1])
    if operation := re.search(r"forward AD with (\S+)", text):
        return f"operation {operation[1]} has no rule for it"
    if "implement the jvp function" in text:
        return f"{_applied(chain[-1])}, a custom function, has no jvp"
    return f"{type(chain[-1]).__name__}: {text}"


def _applied(error: BaseException) -> str:
    """Return the name of the custom function whose call raised an error."""
    name, trace = "a torch.autograd.Function", error.__traceback__
    while trace is not None:
        applied = trace.tb_frame.f_locals.get("cls")
        if isinstance(applied, type) and issubclass(applied, torch.autograd.Function):
            name = applied.__name__
        trace = trace.tb_next
    return name


def _custom_functions(values: Tensor) -> list[str]:
    """Return the names of the custom functions in the graph of values, without those of this
    package.
    """
    names: dict[str, None] = {}
    nodes, seen = [values.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        applied = getattr(node, "_forward_cls", None)
        if applied is not None and not applied.__module__.startswith(__name__.split(".")[0]):
            names[applied.__name__] = None
        nodes += [function for function, _ in node.next_functions]
    return list(names)
