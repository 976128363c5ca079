"""Represent the places where parameters meet data, and directions of the tensors that meet it
there: parameters, and tensors computed from parameters only.
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
    """Give the reason why the shares of some tensors cannot be separated by example."""


# --- directions of tensors made of parameters -----------------------------------------------------


class Parameter:
    """Represent a parameter, or a buffer that moves.

    Args:
        tensor: the parameter.
        name: its name.
        motions: directions of all tensors.
        keeps: whether to keep its directions from batch to batch, instead of recomputing them.
    """

    def __init__(self, tensor: Tensor, name: str, motions: Sequence[Motion], keeps: bool) -> None:
        self.tensor, self.sources = tensor, (name,)
        self._motions, self._keeps = motions, keeps
        self._kept: dict[int, Tensor] = {}

    def direction(self, source: str, index: int) -> Tensor:
        """Return the difference between the points of a motion.

        Args:
            source: name of the parameter.
            index: index of the motion.
        """
        if index in self._kept:
            return self._kept[index]
        motion = self._motions[index]
        difference = torch.sub(motion.end[source], motion.start[source]).to(self.tensor.dtype)
        if self._keeps:
            self._kept[index] = difference
        return difference


class Derived:
    """Represent a result of an operation on parameters only.

    Args:
        tensor: the result.
        call: the call that computed it, with parameters detached.
        operands: operands of the call that have directions.
        output: its position, if the call returns several tensors.
    """

    def __init__(self, tensor: Tensor, call: Call, operands: Operands, output: int | None) -> None:
        self.tensor, self._call, self._operands, self._output = tensor, call, operands, output
        self.sources = sources_of(operands)
        self._versions = Versions(call)
        self._known: dict[tuple[str, int], Tensor] = {}

    def direction(self, source: str, index: int) -> Tensor:
        """Return its derivative along one of the motions of a parameter it was computed from.

        Args:
            source: name of the parameter.
            index: index of the motion.
        """
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
            if direction.stride() != operand.stride():  # a view depends on strides
                direction = torch.empty_like(operand).copy_(direction)
            tangent = self._of(multilinear(self._call, place, direction))
        elif self._output is None and (rule := rule_of(self._call)) is not None:
            tangent = rule(self._call, place, direction)
        else:
            again, derivatives = jvp(self._call, place, direction)
            tangent = self._of(derivatives)
            if not torch.equal(self._of(again), self.tensor):
                raise Untold("it does not repeat its result")
        return tangent.expand(self.tensor.shape)

    def _of(self, result: Any) -> Tensor:
        tensor: Tensor = result if self._output is None else result[self._output]
        return tensor


Made = Parameter | Derived  # a tensor computed from parameters only
Operands = Mapping[Place, Made]


def sources_of(operands: Operands) -> tuple[str, ...]:
    """Return the names of the parameters that operands were computed from, in ascending order."""
    return tuple(sorted({source for made in operands.values() for source in made.sources}))


class Versions:
    """Detect writes to the operands of a call after it."""

    def __init__(self, call: Call) -> None:
        self._versions = [
            (tensor, tensor._version)
            for tensor in call.operands.values()
            if not tensor.is_inference()
        ]

    def check(self) -> None:
        """Check that there was no write.

        Raises:
            Untold: if there was one.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise Untold("an operand is written to later")


# --- places where parameters meet data ------------------------------------------------------------


class Recorder(Protocol):
    """Record the results at each site of a batch."""

    untold: dict[str, str]

    def take(self, site: Site, source: str, index: int, products: Products) -> None:
        """Record the products of the output's gradient and its derivative along a motion of a
        tensor.

        Args:
            site: the site.
            source: name of the tensor.
            index: index of the motion.
            products: the products.
        """


@dataclass
class Site:
    """Represent a call in which parameters meet data.

    Attributes:
        position: index among the calls of a batch.
        call: the call, with parameters detached.
        operands: operands that have directions.
        rule: derivative of the call.
        casts: whether autocast casts the operands of the call.
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
        """Return what identifies it: the function, and the tensors."""
        return self.call.function.__name__, sources_of(self.operands)

    def record(self, above: Tensor, recorder: Recorder, directions: int) -> None:
        """Pass the products of the output's gradient to a recorder.

        Args:
            above: gradient of the output.
            recorder: the recorder.
            directions: number of directions.

        Raises:
            RuntimeError: if memory runs out.
        """
        products = _ProductsOf(self._as_computed(), self.rule, above)
        for place, made in self.operands.items():
            for source in made.sources:
                try:
                    self.versions.check()
                    for index in range(directions):
                        direction = made.direction(source, index)
                        recorder.take(self, source, index, products.along(place, direction))
                except (Untold, RuntimeError) as error:
                    recorder.untold[source] = self._reason(error)

    def _reason(self, error: Exception) -> str:
        if is_out_of_memory(error):
            raise error
        return f"{self.call.function.__name__}: {error}"

    def _as_computed(self) -> Call:
        """Return the call with operands in the type of its parameters."""
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
    """Compute products of the gradient of a call's output and its derivatives.

    Args:
        call: the call, with operands in the type of the computation.
        rule: derivative of the call.
        above: gradient of its output.
    """

    def __init__(self, call: Call, rule: Rule, above: Tensor) -> None:
        self._call, self._rule, self._above = call, rule, above
        self._layer = LAYERS.get(call.function)
        self._by_channel: dict[Place, ByChannel | None] = {}
        self._channels: dict[
            bool, Channels
        ] = {}  # key: whether they include what the weight scales

    def along(self, place: Place, direction: Tensor) -> Products:
        """Return the products along a direction of an operand.

        Args:
            place: place of the operand.
            direction: the direction.
        """
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
