"""Places where parameters meet data, and directions of the tensors that meet it there: parameters,
and what is made of parameters alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .directions import Motion
from .out_of_memory import is_out_of_memory
from .tangents import LAYERS, RESHAPING, Call, Place, Rule, jvp, multilinear, rule_of
from .tap_products import ChannelProducts, Channels, EntryProducts, Products


class Untold(Exception):
    """The shares of some tensors cannot be told by example; says why."""


# --- directions of tensors made of parameters -----------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A parameter, or a buffer that moves."""

    tensor: Tensor
    name: str
    motions: Sequence[Motion]

    @property
    def sources(self) -> frozenset[str]:
        """Return the name."""
        return frozenset((self.name,))

    def direction(self, source: str, index: int) -> Tensor:
        """Return the difference of the points of a motion."""
        motion = self.motions[index]
        return torch.sub(motion.end[source], motion.start[source]).to(self.tensor.dtype)


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
        self.sources: frozenset[str] = frozenset[str]().union(
            *(made.sources for made in operands.values())
        )
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
    def signature(self) -> str:
        """Return what tells it from others: the function, and the tensors."""
        names = sorted(set().union(*(made.sources for made in self.operands.values())))
        return f"{self.call.function.__name__} of {', '.join(names)}"

    def record(self, above: Tensor, recorder: Recorder, directions: int) -> None:
        """Hand the products of the output's gradient to a recorder."""
        call = self._as_computed()
        for place, made in self.operands.items():
            layer = LAYERS.get(call.function)
            factor = None if layer is None else layer.factor(call, place)
            channels = None if factor is None else Channels(above, *factor)
            for source in sorted(made.sources):
                try:
                    self.versions.check()
                    for index in range(directions):
                        direction = made.direction(source, index)
                        if channels is None:
                            products: Products = self._products(call, place, direction, above)
                        else:
                            products = ChannelProducts(channels, direction)
                        recorder.take(self, source, index, products)
                except (Untold, RuntimeError) as error:
                    if is_out_of_memory(error):
                        raise
                    recorder.untold[source] = f"{self.call.function.__name__}: {error}"

    def _products(
        self, call: Call, place: Place, direction: Tensor, above: Tensor
    ) -> EntryProducts:
        tangent = self.rule(call, place, direction)
        is_own = tangent.untyped_storage().data_ptr() != direction.untyped_storage().data_ptr()
        return EntryProducts(above, tangent, is_own)

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
