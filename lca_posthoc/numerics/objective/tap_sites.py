"""Places where parameters meet data, and directions of the tensors that meet it there: parameters,
and what is made of parameters alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .device_errors import is_out_of_memory
from .directions import Motion
from .example_axis import Signature
from .tangents import (
    LAYERS,
    RESHAPING,
    ByChannel,
    Call,
    Layer,
    Place,
    Rule,
    jvp,
    multilinear,
    rule_of,
)
from .tap_products import ChannelProducts, Channels, EntryProducts, Products


class Untold(Exception):
    """The shares of some tensors cannot be told by example; says why."""


# --- directions of tensors made of parameters -----------------------------------------------------


class Parameter:
    """A parameter, or a buffer that moves.

    Args:
        tensor: the parameter.
        name: its name.
        motions: the directions of all tensors.
        keeps: whether its own are kept from batch to batch, rather than computed again.
    """

    def __init__(self, tensor: Tensor, name: str, motions: Sequence[Motion], keeps: bool) -> None:
        self.tensor, self.sources = tensor, (name,)
        self._motions, self._keeps = motions, keeps
        self._kept: dict[int, Tensor] = {}

    def direction(self, source: str, index: int) -> Tensor:
        """Return the difference of the points of a motion."""
        if index in self._kept:
            return self._kept[index]
        motion = self._motions[index]
        difference = torch.sub(motion.end[source], motion.start[source]).to(self.tensor.dtype)
        if self._keeps:
            self._kept[index] = difference
        return difference


class Derived:
    """A result of an operation on parameters alone.

    Args:
        tensor: the result.
        call: what made it, with parameters detached.
        operands: those of the call that have directions.
        output: its position, where the call returns several.
    """

    def __init__(self, tensor: Tensor, call: Call, operands: Operands, output: int | None) -> None:
        self.tensor, self._call, self._operands, self._output = tensor, call, operands, output
        self.sources = sources_of(operands)
        self._versions = Versions(call)
        self._known: dict[tuple[str, int], Tensor] = {}

    def direction(self, source: str, index: int) -> Tensor:
        """Return its derivative along one of the motions of a parameter it is made of."""
        if (source, index) in self._known:
            return self._known[source, index]
        self._versions.check()
        parts = [
            self._part(place, made.direction(source, index))
            for place, made in self._operands.items()
            if source in made.sources
        ]
        total = sum(parts[1:], parts[0])
        if self._call.function not in RESHAPING:
            self._known[source, index] = total
        return total

    def _part(self, place: Place, direction: Tensor) -> Tensor:
        if self._call.function in RESHAPING:
            operand = self._operands[place].tensor
            if direction.stride() != operand.stride():  # on which a view depends
                direction = torch.empty_like(operand).copy_(direction)
            tangent = self._of(multilinear(self._call, place, direction))
        elif self._output is None and (rule := rule_of(self._call)) is not None:
            tangent = rule(self._call, place, direction)
        else:
            again, derivatives = jvp(self._call, place, direction)
            tangent = self._of(derivatives)
            if not torch.equal(self._of(again), self.tensor):
                raise Untold("it does not compute the same twice")
        return tangent.expand(self.tensor.shape)

    def _of(self, result: Any) -> Tensor:
        tensor: Tensor = result if self._output is None else result[self._output]
        return tensor


Made = Parameter | Derived  # a tensor made of parameters alone
Operands = Mapping[Place, Made]


def sources_of(operands: Operands) -> tuple[str, ...]:
    """Return the names of the parameters that operands are made of, in ascending order."""
    return tuple(sorted({source for made in operands.values() for source in made.sources}))


class Versions:
    """Notices when operands of a call are written to after it."""

    def __init__(self, call: Call) -> None:
        self._versions = [
            (tensor, tensor._version)
            for tensor in call.operands.values()
            if not tensor.is_inference()
        ]

    def check(self) -> None:
        """Raise where one was."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise Untold("an operand is written to later")


# --- places where parameters meet data ------------------------------------------------------------


class Recorder(Protocol):
    """Takes in what each site of a batch comes to."""

    untold: dict[str, str]

    def take(self, site: Site, source: str, index: int, products: Products) -> None:
        """Take in the products of the output's gradient and its derivative along a motion of a
        tensor.
        """


@dataclass
class Site:
    """A call in which parameters meet data.

    Attributes:
        position: in the order of the calls of a batch.
        call: with parameters detached.
        operands: those that have directions.
        rule: the derivative of the call.
        casts: whether the call casts its operands, by autocast.
    """

    position: int
    call: Call
    operands: Operands
    rule: Rule
    casts: bool
    versions: Versions = field(init=False)

    def __post_init__(self) -> None:
        self.versions = Versions(self.call)

    def release(self) -> None:
        """Free the operands, as autograd frees what it saved."""
        self.call = Call(self.call.function, (), {})
        self.operands, self.versions = {}, Versions(self.call)

    @property
    def signature(self) -> Signature:
        """Return what tells it from others: the function, and the tensors."""
        return self.call.function.__name__, sources_of(self.operands)

    def record(self, above: Tensor, recorder: Recorder, directions: int) -> None:
        """Hand the products of the output's gradient to a recorder."""
        products = _ProductsOf(self._as_computed(), self.rule, above)
        for place, made in self.operands.items():
            for source in made.sources:
                try:
                    self.versions.check()
                    for index in range(directions):
                        direction = made.direction(source, index)
                        recorder.take(self, source, index, products.along(place, direction))
                except (Untold, RuntimeError) as error:
                    if is_out_of_memory(error):
                        raise
                    recorder.untold[source] = f"{self.call.function.__name__}: {error}"

    def _as_computed(self) -> Call:
        """Return the call with operands of the type of its parameters."""
        if not self.casts:
            return self.call
        wide = next(iter(self.operands.values())).tensor.dtype
        return self.call.with_operands(
            {
                place: tensor.to(wide)
                for place, tensor in self.call.operands.items()
                if tensor.is_floating_point()
            }
        )


class _ProductsOf:
    """Products of the gradient of a call's output and its derivatives.

    Args:
        call: with operands of the type they are computed in.
        rule: the derivative of the call.
        above: the gradient of its output.
    """

    def __init__(self, call: Call, rule: Rule, above: Tensor) -> None:
        self._call, self._rule, self._above = call, rule, above
        self._layer = LAYERS.get(call.function)
        self._by_channel: dict[Place, ByChannel | None] = {}
        self._channels: dict[bool, Channels] = {}  # by whether they are what the weight scales

    def along(self, place: Place, direction: Tensor) -> Products:
        """Return those along a direction of an operand."""
        if self._layer is not None:
            if place not in self._by_channel:
                self._by_channel[place] = self._layer.by_channel(self._call, place)
            by_channel = self._by_channel[place]
            if by_channel is not None:
                if by_channel.factor is not None:
                    direction = direction * by_channel.factor
                return ChannelProducts(self._shared(self._layer, by_channel.is_scale), direction)
        tangent = self._rule(self._call, place, direction)
        is_own = tangent.untyped_storage().data_ptr() != direction.untyped_storage().data_ptr()
        return EntryProducts(self._above, tangent, is_own)

    def _shared(self, layer: Layer, is_scale: bool) -> Channels:
        """Return what all directions of some operands share."""
        if is_scale not in self._channels:
            scaled = layer.scaled(self._call) if is_scale else None
            self._channels[is_scale] = Channels(self._above, scaled, layer.behind(self._call))
        return self._channels[is_scale]
