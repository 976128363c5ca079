"""Derivatives of every element of a loss along the motion of every tensor, from forward passes.

The elements of a loss are its values on a batch: target tokens, pixels, labels. While one tensor
carries its motion as a tangent, a forward pass gives the derivative of all of them along it: one
pass for each tensor and direction, and no graph is kept.

The tangent is put on the module's own tensor in place, so that it is there wherever the tensor is
used: under every name of a tied one, in lists that modules keep, in what is computed anew under
activation checkpointing. It ends with the pass.

Not every operation has a rule for tangents. Most of those without one say so; some lose the tangent
without a word. `ElementDerivatives.check` compares with backward passes from single elements.
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

_COMPARED = 4  # elements of which each has a backward pass of its own
_WAY_OUT = (
    'Take per="example", whose derivatives are taken in the backward pass; a function of your own '
    "can be given one in the forward pass, a static method jvp."
)


@dataclass(frozen=True)
class ElementShares:
    """The elements of a loss on one batch, and their directional derivatives.

    Attributes:
        values: one per element, multiplied by its weight, in the shape of the loss.
        weights: of the elements, float64; None where all are 1.
        shares: by tensor, the derivative of every element's weighted value along the tensor's
            motions, (directions, elements) float64, the elements in the order of `values`.
    """

    values: Tensor
    weights: Tensor | None
    shares: dict[str, Tensor]


def passes(tensors: int, directions: int) -> int:
    """Return the most forward passes over a batch that the shares of its elements take: one for
    each tensor and direction, and one for the values.
    """
    return tensors * directions + 1


class ElementDerivatives:
    """Takes the derivatives of every element of a loss, at the point that a module holds, in the mode
    that the caller is in, see `LossValues.mode`.

    Args:
        tensors: the module's own, leaves of autograd's, by name.
        values: returns the loss's weighted values and weights on a batch, as `LossValues.values`
            does; called several times with one batch, which it must not change.
        dtype: in which values are computed; bfloat16 under autocast.
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
        """Return the elements of a batch and their derivatives; exactly 0 along the motion of a
        tensor that does not move.

        Raises:
            InputError: where an operation has no derivative in the forward pass, or values are
                other ones in the next pass.
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
        """Compare the derivatives of the elements of a few examples with those that backward passes
        give, along motions drawn at random: of single elements, and of the sum of all with random
        signs.

        Raises:
            InputError: where they differ, or as `shares` does.
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
        # of a forward pass of its own: not every function can go backward twice
        total = (self._values(batch)[0].double().reshape(-1) * factors).sum()
        sums = {name: float(of_tensor) for name, of_tensor in gradients.sums(total).items()}
        return dict.fromkeys(self._tensors, 0.0) | sums

    def _refuse_differing(
        self,
        told: Mapping[str, Tensor],
        compared: Sequence[tuple[Tensor, Mapping[str, float]]],
        batch: object,
    ) -> None:
        """Refuse shares that are not those of backward passes.

        Args:
            told: by tensor, (1, elements).
            compared: factors of the elements, and what the backward pass from their sum gave.
            batch: the data.
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
            "single elements of the loss have other derivatives in the forward pass than in the "
            f"backward pass along {'tensors' if len(names) > 1 else 'tensor'} "
            f"{few([*map(repr, names)])}: an operation behind them loses the one of the forward "
            f"pass.{through} {_WAY_OUT}"
        )

    def _plain(self, batch: object) -> Values:
        """Return the values of a batch, without their graph, and the weights."""
        values, weights = self._values(batch)
        return values.detach(), weights

    def _along(self, name: str, motion: Motion, batch: object, values: Tensor) -> Tensor:
        """Return the derivative of every element along the motion of one tensor, (elements,)
        float64.
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
            except (InputError, RuntimeError) as error:  # the same call went well without a tangent
                if is_out_of_memory(error):
                    raise
                raise InputError(
                    "the derivatives of the elements of the loss cannot be taken in the forward "
                    f"pass along tensor {name!r}: {_reason(error)}. {_WAY_OUT}"
                ) from error
            same, derivative = forward_ad.unpack_dual(moving)  # type: ignore[no-untyped-call]
            self._refuse_other_values(name, values, same.detach())
            return zero if derivative is None else derivative.detach().reshape(-1).double()

    def _refuse_other_values(self, name: str, values: Tensor, others: Tensor) -> None:
        """Refuse values of the pass along a tensor that are not those without a tangent; what is
        not finite is said of the loss itself.
        """
        if values.shape == others.shape:
            pair = values.double(), others.double()
            finite = pair[0].isfinite() & pair[1].isfinite()
            one, other = (part[finite] for part in pair)
            size = one.abs().mean() if one.numel() else 0.0
            if bool(((one - other).abs() <= self._tolerance * (one.abs() + size)).all()):
                return
        raise InputError(
            "the loss has other values in the pass in which its derivatives along tensor "
            f"{name!r} are taken than in the pass before, on the same batch. Seed what is random "
            'in it; where nothing is, take per="example".'
        )


@contextlib.contextmanager
def _forward_derivatives() -> Iterator[None]:
    """Let tensors carry tangents, and compute by operations that have a rule for them where torch
    has a choice.
    """
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes long
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(operation_by_operation())
        stack.enter_context(_unfused_weight_norm())
        stack.enter_context(_padding_without_tangent())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # taken by attention layers in eval mode where no parameter requires a gradient
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(forward_ad.dual_level())
        yield


@contextlib.contextmanager
def _padding_without_tangent() -> Iterator[None]:
    """Take no derivative along the row of an embedding that stands for padding, as a backward pass
    takes none.
    """
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
    """Compute normalised weights by operations that have a rule for tangents, in both places of
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
    """Save nothing for backward passes: let none of the tensors require a gradient meanwhile."""
    requiring = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor in requiring:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in requiring:
            tensor.requires_grad_(True)


def _single_elements(shares: ElementShares) -> Iterator[Tensor]:
    """Yield factors, (elements,), that choose one element each, of some from all over a batch that
    weigh something.
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
    """Return a sign for every element, (elements,), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (values.numel(),), generator=generator, device="cpu") * 2 - 1
    return signs.to(values.device, torch.float64)


def _reason(error: BaseException) -> str:
    """Return what an error says of the operation that has no derivative in the forward pass."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = str(chain[-1])
    if operation := re.search(r"forward AD with (\S+)", text):
        return f"operation {operation[1]} has no rule for it"
    if "implement the jvp function" in text:
        return f"{_applied(chain[-1])}, a function of its own, has no jvp"
    return f"{type(chain[-1]).__name__}: {text}"


def _applied(error: BaseException) -> str:
    """Return the name of the custom function in whose call an error was raised."""
    name, trace = "a torch.autograd.Function", error.__traceback__
    while trace is not None:
        applied = trace.tb_frame.f_locals.get("cls")
        if isinstance(applied, type) and issubclass(applied, torch.autograd.Function):
            name = applied.__name__
        trace = trace.tb_next
    return name


def _custom_functions(values: Tensor) -> list[str]:
    """Return the names of the custom functions that values are computed with, other than ours."""
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
