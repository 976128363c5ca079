"""Compute derivatives of single operations along directions of their operands.

If an operation is linear in an operand, its derivative along a direction is the operation itself
with the direction in place of the operand, without a bias. Other operations are differentiated in
forward mode, unless they draw random numbers or write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .normalisation import normalised

Place = tuple[int | str, int | None]  # position or keyword, and index in a list given there
Function = Callable[..., Any]


@dataclass(slots=True)
class Call:
    """Represent one call of a torch function."""

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    _operands: dict[Place, Tensor] | None = field(default=None, init=False)

    @property
    def operands(self) -> dict[Place, Tensor]:
        """Return the tensors among its arguments, including those in lists."""
        if self._operands is None:
            operands: dict[Place, Tensor] = {}
            arguments: Iterable[tuple[int | str, Any]] = enumerate(self.args)
            if self.kwargs:
                arguments = (*arguments, *self.kwargs.items())
            for key, value in arguments:
                if isinstance(value, Tensor):
                    operands[key, None] = value
                elif isinstance(value, (list, tuple)):
                    for index, entry in enumerate(value):
                        if isinstance(entry, Tensor):
                            operands[key, index] = entry
            self._operands = operands
        return self._operands

    def with_operands(self, tensors: Mapping[Place, Tensor | None]) -> Call:
        """Return the call with other tensors in some places."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (key, index), tensor in tensors.items():
            values: Any = args if isinstance(key, int) else kwargs
            if index is None:
                values[key] = tensor
            else:
                values[key] = [*values[key]]
                values[key][index] = tensor
        return Call(self.function, tuple(args), kwargs)

    def by_position(self, names: tuple[str, ...]) -> Call:
        """Return the call with the named arguments passed by position, as far as all before them
        are given.
        """
        args, kwargs = list(self.args), dict(self.kwargs)
        for name in names[len(args) :]:
            if name not in kwargs:
                break
            args.append(kwargs.pop(name))
        return Call(self.function, tuple(args), kwargs)

    def argument(self, position: int, name: str, default: object) -> Any:
        """Return an argument given by position or by name.

        Args:
            position: its position.
            name: its name.
            default: value if it is not given.
        """
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def run(self) -> Any:
        """Execute the call; a linear layer uses the function that `multiplying` installed."""
        function = F.linear if self.function is torch._C._nn.linear else self.function
        return function(*self.args, **self.kwargs)


# (call, place of an operand, direction) → derivative, which broadcasts to the shape of the output
Rule = Callable[[Call, Place, Tensor], Tensor]


def in_forward_mode(call: Call, place: Place, direction: Tensor) -> Tensor:
    """Return the derivative computed by forward-mode differentiation.

    Args:
        call: the call.
        place: place of the operand.
        direction: direction of the operand.

    Raises:
        RuntimeError: if torch has no forward mode for the operation.
    """
    tangent: Tensor = jvp(call, place, direction)[1]
    return tangent


def jvp(call: Call, place: Place, direction: Tensor) -> tuple[Any, Any]:
    """Return the result of a call, and its derivative in forward mode.

    Args:
        call: the call.
        place: place of the operand.
        direction: direction of the operand.
    """
    primal = call.operands[place]
    again, derivative, *_ = torch.func.jvp(
        lambda tensor: call.with_operands({place: tensor}).run(), (primal,), (direction,)
    )
    return again, derivative


def multilinear(call: Call, place: Place, direction: Tensor) -> Tensor:
    """Return the derivative of an operation that is linear in the operand.

    Args:
        call: the call.
        place: place of the operand.
        direction: direction of the operand.
    """
    result: Tensor = call.with_operands({place: direction}).run()
    return result


@dataclass(frozen=True)
class ByChannel:
    """Describe a derivative along an operand with one number per channel: the direction, times a
    factor per channel, and possibly times what the layer's weight scales.

    Attributes:
        is_scale: whether to multiply by what the weight scales.
        factor: factor per channel, (channels,); None for 1.
    """

    is_scale: bool
    factor: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """Describe a layer with a weight and a bias.

    Attributes:
        names: names of its arguments, in order.
        linear_in: arguments in which the layer, without bias, is linear.
        axes_behind: number of the output's axes after the bias axis; None if the bias axis is the
            second.
        scales: whether the weight is a factor per channel, as in normalisation layers.
    """

    names: tuple[str, ...]
    linear_in: tuple[str, ...]
    axes_behind: int | None = 0
    scales: bool = False

    def derivative(self, call: Call, place: Place, direction: Tensor) -> Tensor:
        """Return the derivative, see `Rule`.

        Args:
            call: the call.
            place: place of the operand.
            direction: direction of the operand.
        """
        name = self._name(place)
        if name == "bias":
            return direction.reshape(*direction.shape, *(1,) * self.behind(call))
        if name not in self.linear_in:
            return in_forward_mode(call, place, direction)
        result: Tensor = self._without(call, "bias").with_operands({place: direction}).run()
        return result

    def by_channel(self, call: Call, place: Place) -> ByChannel | None:
        """Return how an operand with one number per channel enters the output; None for other
        operands.

        Args:
            call: the call.
            place: place of the operand.
        """
        if call.operands[place].dim() != 1:
            return None
        name = self._name(place)
        if name == "bias":
            return ByChannel(is_scale=False)
        if name == "weight" and self.scales:
            return ByChannel(is_scale=True)
        if name in ("mean", "variance"):
            weight, precision = self._argument(call, "weight"), 1 / (call.args[2] + call.args[5])
            if name == "mean":
                factor = -precision.sqrt() if weight is None else -weight * precision.sqrt()
                return ByChannel(is_scale=False, factor=factor)
            factor = -0.5 * precision if weight is None else -0.5 * weight * precision
            return ByChannel(is_scale=True, factor=factor)
        return None

    def scaled(self, call: Call) -> Tensor:
        """Return what the weight scales, in the shape of the output."""
        factor: Tensor = self._without(call, "weight", "bias").run()
        return factor

    def behind(self, call: Call) -> int:
        """Return the number of the output's axes after that of the channels."""
        return call.args[0].dim() - 2 if self.axes_behind is None else self.axes_behind

    def _name(self, place: Place) -> str:
        return self.names[place[0]] if isinstance(place[0], int) else place[0]

    def _argument(self, call: Call, name: str) -> Any:
        return call.argument(self.names.index(name), name, None)

    def _without(self, call: Call, *names: str) -> Call:
        """Return the call with None for some of its arguments."""
        places: dict[Place, Tensor | None] = {}
        for name in names:
            position = self.names.index(name) if name in self.names else len(call.args)
            if position < len(call.args):
                places[position, None] = None
            elif name in call.kwargs:
                places[name, None] = None
        return call.with_operands(places) if places else call


def _sum(first: float, second: float, scaled: int = 1) -> Rule:
    """Return the rule of an addition or subtraction.

    Args:
        first: factor of the first term.
        second: factor of the second term.
        scaled: index of the term that `alpha` multiplies.
    """

    def rule(call: Call, place: Place, direction: Tensor) -> Tensor:
        term = 0 if place[0] in (0, "input", "self") else 1
        factor = (first, second)[term] * (call.kwargs.get("alpha", 1) if term == scaled else 1)
        return direction if factor == 1 else direction.mul(factor)

    return rule


def _sum_of_product(product: Function) -> Rule:
    """Return the rule of beta · input + alpha · product(first, second)."""

    def rule(call: Call, place: Place, direction: Tensor) -> Tensor:
        beta = call.kwargs.get("beta", 1)
        if place[0] == 0:
            return direction if beta == 1 else direction.mul(beta)
        first, second = call.args[1:3]
        factors = (direction, second) if place[0] == 1 else (first, direction)
        result: Tensor = product(*factors)
        alpha = call.kwargs.get("alpha", 1)
        return result if alpha == 1 else result.mul_(alpha)

    return rule


def _quotient(call: Call, place: Place, direction: Tensor) -> Tensor:
    if len(call.args) != 2 or call.kwargs:
        return in_forward_mode(call, place, direction)
    first, second = call.args
    factor: Tensor = 1 / second if place[0] == 0 else -first / second**2
    return direction * factor


def _root(call: Call, place: Place, direction: Tensor) -> Tensor:
    root: Tensor = torch.sqrt(call.args[0])
    return direction / (2 * root)


def _embedding(call: Call, place: Place, direction: Tensor) -> Tensor:
    """Return the rows of the direction, with 0 for the padding index."""
    rows: Tensor = call.with_operands({place: direction}).run()
    indices, padding = call.args[1], call.argument(2, "padding_idx", -1)
    if padding is not None and padding >= 0:
        rows.masked_fill_((indices == padding).unsqueeze(-1), 0)
    return rows


def _bag(call: Call, place: Place, direction: Tensor) -> Tensor:
    result: Tensor = call.with_operands({place: direction}).run()[0]
    return result


def _normalised(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Compute torch's weight normalisation by operations that have a forward mode."""
    axes = [other for other in range(v.dim()) if other != dim]
    scale: Tensor = g / torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * scale


def _weight_norm(call: Call, place: Place, direction: Tensor) -> Tensor:
    return in_forward_mode(replace(call, function=_normalised), place, direction)


def _attention(call: Call, place: Place, direction: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the only kernel with a forward mode
        return in_forward_mode(call, place, direction)


_WEIGHTED = ("input", "weight", "bias")
_NORM = ("input", "normalized_shape", "weight", "bias")
_STATISTICS = ("input", "weight", "bias", "running_mean", "running_var")
_NORMALISED = ("input", "mean", "variance", "weight", "bias")
_T: Any = torch.Tensor
_V: Any = torch._C._VariableFunctions

# names of leading arguments that may be passed by keyword
NAMES: dict[Function, tuple[str, ...]] = {
    torch._weight_norm: ("v", "g", "dim"),
    torch.embedding: ("weight", "indices"),
    torch.embedding_bag: ("weight", "indices"),
    **dict.fromkeys((torch.addmm, _T.addmm), ("input", "mat1", "mat2")),
    **dict.fromkeys((torch.baddbmm, _T.baddbmm), ("input", "batch1", "batch2")),
    **dict.fromkeys((torch.addmv, _T.addmv), ("input", "mat", "vec")),
}
_CONVOLUTIONS: dict[Function, int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}
LAYERS: dict[Function, Layer] = {
    torch._C._nn.linear: Layer(_WEIGHTED, ("input", "weight")),
    torch.bilinear: Layer(("input1", "input2", "weight", "bias"), ("input1", "input2", "weight")),
    **{
        function: Layer(_WEIGHTED, ("input", "weight"), axes)
        for function, axes in _CONVOLUTIONS.items()
    },
    torch.layer_norm: Layer(_NORM, ("weight",), scales=True),
    torch.rms_norm: Layer(_NORM[:3], ("weight",), scales=True),
    torch.group_norm: Layer(
        ("input", "num_groups", "weight", "bias"), ("weight",), None, scales=True
    ),
    torch.batch_norm: Layer(_STATISTICS, ("weight",), None, scales=True),
    torch.instance_norm: Layer(_STATISTICS, ("weight",), None, scales=True),
    normalised: Layer(_NORMALISED, ("weight",), None, scales=True),
}
NAMES |= {function: layer.names for function, layer in LAYERS.items()}

RULES: dict[Function, Rule] = {
    **{function: layer.derivative for function, layer in LAYERS.items()},
    torch.embedding: _embedding,
    torch.embedding_bag: _bag,
    **dict.fromkeys(
        (
            *(torch.div, torch.divide, torch.true_divide, _T.div, _T.divide, _T.true_divide),
            *(_T.__div__, _T.__truediv__),
        ),
        _quotient,
    ),
    **dict.fromkeys((torch.sqrt, _T.sqrt), _root),
    torch._weight_norm: _weight_norm,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), _sum(1, 1)),
    **dict.fromkeys((_T.add_, _T.__iadd__), _sum(1, 1)),
    **dict.fromkeys((torch.sub, torch.subtract, _T.sub, _T.subtract, _T.__sub__), _sum(1, -1)),
    **dict.fromkeys((_T.sub_, _T.__isub__), _sum(1, -1)),
    torch.rsub: _sum(-1, 1, 0),
    **dict.fromkeys((torch.addmm, _T.addmm), _sum_of_product(torch.mm)),
    **dict.fromkeys((torch.baddbmm, _T.baddbmm), _sum_of_product(torch.bmm)),
    **dict.fromkeys((torch.addmv, _T.addmv), _sum_of_product(torch.mv)),
    **dict.fromkeys(
        (
            *(torch.mul, torch.multiply, _T.mul, _T.multiply, _T.__mul__, _T.__rmul__),
            *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.inner, torch.outer),
            *(_T.matmul, _T.mm, _T.bmm, _T.mv, _T.dot, _T.inner, _T.outer),
            *(_T.__matmul__, _T.__rmatmul__, _V.einsum, _V.tensordot),
            *(torch.index_select, _T.index_select, _T.__getitem__, torch.take, _T.take),
            *(torch.gather, _T.gather),
        ),
        multilinear,
    ),
    **dict.fromkeys(
        (
            *(torch.pow, _T.pow, _T.__pow__, torch.prelu, _T.prelu),
            *(torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack),
            *(torch.where, _T.where, torch.maximum, _T.maximum, torch.minimum, _T.minimum),
            *(torch.clamp, _T.clamp, torch.lerp, _T.lerp, torch.masked_fill, _T.masked_fill),
            *(torch.addcmul, _T.addcmul, torch.addcdiv, _T.addcdiv),
            *(torch.logaddexp, _T.logaddexp, torch.cdist, torch.cosine_similarity),
        ),
        in_forward_mode,
    ),
}

# functions whose derivatives do not depend on operands
ADDITIONS: frozenset[Function] = frozenset(
    (
        *(torch.add, _T.add, _T.__add__, _T.__radd__, _T.add_, _T.__iadd__),
        *(torch.sub, torch.subtract, _T.sub, _T.subtract, _T.__sub__, _T.sub_, _T.__isub__),
        torch.rsub,
    )
)
# functions that are linear in their one operand; other tensors only give a shape or type
RESHAPING: frozenset[Function] = frozenset(
    (
        *(_T.t, torch.t, _T.transpose, torch.transpose, _T.permute, torch.permute),
        *(_T.T.__get__, _T.mT.__get__, _T.view, _T.reshape, torch.reshape, _T.flatten),
        *(torch.flatten, _T.squeeze, torch.squeeze, _T.unsqueeze, torch.unsqueeze, _T.expand),
        *(_T.contiguous, _T.clone, torch.clone, _T.to, _T.float, _T.double, _T.half),
        *(_T.bfloat16, _T.repeat, _T.chunk, torch.chunk, _T.unbind, torch.unbind, _T.narrow),
        *(_T.select, torch.narrow, torch.select),
    )
)
LIKE_ANOTHER: frozenset[Function] = frozenset(
    (_T.expand_as, _T.view_as, _T.reshape_as, _T.type_as, _T.to)
)


def rule_of(call: Call) -> Rule | None:
    """Return the rule of a call for separating examples; None if there is none, or if the gradient
    differs from that of the computed function.
    """
    function = call.function
    if function is torch.batch_norm and call.argument(5, "training", True):
        return None  # statistics of the batch
    if (
        function is torch.instance_norm
        and call.argument(3, "running_mean", None) is not None
        and call.argument(5, "use_input_stats", True)
    ):
        return None  # the call writes running statistics
    if function is torch.embedding and call.argument(3, "scale_grad_by_freq", False):
        return None
    if function is torch.embedding_bag and (
        call.argument(3, "scale_grad_by_freq", False) or call.argument(4, "mode", 0) == 2
    ):
        return None  # in mode "max", the weight determines which row is used
    if function is F.scaled_dot_product_attention and call.argument(4, "dropout_p", 0.0):
        return None
    if "out" in call.kwargs:
        return None
    return RULES.get(function)
