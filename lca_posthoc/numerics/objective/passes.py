"""One pass over the batches of a split: compute the values of losses batch by batch, and hand them
to accumulators.

What is kept of a batch is an accumulator's business: `Sums` keeps the loss and its gradient. Which
groups the examples of a batch belong to is that of a `Membership`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .batches import Groups, Order, Split
from .data import ValueSource
from .element_groups import ElementOrder, element_codes
from .taps import Taps
from .values import LossValues, Values


@dataclass(frozen=True)
class GroupValues:
    """The values of a loss for the elements of one group in a batch.

    Attributes:
        group: its position in the order of groups; 0 where there are none.
        values: one per element, multiplied by its weight; autograd knows what they are made of,
            where the accumulator needs that.
        weights: of the elements, float64; None where all are 1.
        more_to_come: whether the same graph is needed again, for another group or loss.
        codes: where examples are told apart, the position of its group, or its own, for each of
            them, (examples,) int64; the first axis of the values runs over them.
    """

    group: int
    values: Tensor
    weights: Tensor | None
    more_to_come: bool = False
    codes: Tensor | None = None


class Accumulator(Protocol):
    """Takes in the values of one source over the batches of a pass."""

    @property
    def needs_graph(self) -> bool:
        """Tell whether values come with the graph a backward pass needs."""

    def take(self, part: GroupValues) -> None:
        """Take in the values of one group in a batch; run a backward pass, if any, now."""


class Membership(Protocol):
    """Tells which groups the examples of a batch belong to."""

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield values of the batch group by group, the graph of all of them used in turn."""


@dataclass(frozen=True)
class OneGroup:
    """The examples of a batch belong to one group, or there are no groups."""

    group: int

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values as they are."""
        yield GroupValues(self.group, *values, more_to_come)


@dataclass(frozen=True)
class SeveralGroups:
    """The examples of a batch belong to several groups; its statistics are those of the whole
    batch.

    Attributes:
        codes: the position of its group for each example, (examples,) int64.
        groups: those that are asked for.
    """

    codes: Tensor
    groups: range

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values of each group that is asked for; their first axis runs over the
        examples.
        """
        results, weights = values
        present = [code for code in torch.unique(self.codes).tolist() if code in self.groups]
        for code in present:
            members = (self.codes == code).to(results.device)
            yield GroupValues(
                code,
                results[members],
                None if weights is None else weights[members],
                more_to_come or code != present[-1],
            )


@dataclass(frozen=True)
class GroupsOfElements:
    """The elements of the examples of a batch belong to several groups.

    Attributes:
        codes: the position of its group for each element, (examples, *elements of an example).
        groups: those that are asked for.
    """

    codes: Tensor
    groups: range

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values of each group that is asked for, (elements of the group,)."""
        results, weights = values
        codes = element_codes(self.codes, results)
        present = [code for code in torch.unique(codes).tolist() if code in self.groups]
        for code in present:
            members = codes == code
            yield GroupValues(
                code,
                results[members],
                None if weights is None else weights[members],
                more_to_come or code != present[-1],
            )


@dataclass(frozen=True)
class OfExamples:
    """Every example of the batch is told apart.

    Attributes:
        codes: the position of its group, or its own, for each example, (examples,) int64.
    """

    codes: Tensor

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values as they are."""
        yield GroupValues(0, *values, more_to_come, self.codes)


Batches = Generator[tuple[Membership, Any], None, None]


def batches_by_group(
    split: Split,
    batch_size: int,
    order: Order | None,
    only: range | None,
    part: range | None = None,
) -> Batches:
    """Yield batches of one group each, the groups in turn.

    Args:
        split: the examples.
        batch_size: the most examples of a batch.
        order: the groups; None for batches in the order of the data.
        only: some of the groups; None for all.
        part: some of the examples, without groups; None for all.
    """
    with contextlib.closing(split.batches(batch_size, order, only, part)) as batches:
        for group, batch in batches:
            yield OneGroup(group), batch


def batches_across_groups(
    split: Split, batch_size: int, order: Groups, only: range | None
) -> Batches:
    """Yield batches in the order of the data, which may hold examples of several groups, or
    elements.

    Args:
        split: the examples.
        batch_size: examples of a batch.
        order: the groups.
        only: those that are asked for; None for all.
    """
    groups = range(len(order.labels)) if only is None else only
    members: list[Membership]
    if isinstance(order, ElementOrder):
        members = [GroupsOfElements(codes, groups) for codes in order.batches(batch_size)]
    else:
        members = [SeveralGroups(codes, groups) for codes in torch.split(order.codes, batch_size)]
    with contextlib.closing(split.batches(batch_size, None, None)) as batches:
        for index, (_, batch) in enumerate(batches):
            yield members[index], batch


def batches_of_examples(split: Split, batch_size: int, order: Order | None) -> Batches:
    """Yield batches in the order of the data, whose examples are told apart.

    Args:
        split: the examples.
        batch_size: examples of a batch.
        order: the groups; None where every example is one.
    """
    own = torch.arange(split.examples, device="cpu") if order is None else order.codes
    codes = torch.split(own, batch_size)
    with contextlib.closing(split.batches(batch_size, None, None)) as batches:
        for index, (_, batch) in enumerate(batches):
            yield OfExamples(codes[index]), batch


def one_batch(batch: object, examples: int) -> Batches:
    """Yield one batch, whose examples are told apart.

    Args:
        batch: the data.
        examples: their number.
    """
    yield OfExamples(torch.arange(examples, device="cpu")), batch


def run_pass(
    loss_values: LossValues,
    batches: Batches,
    names: Mapping[ValueSource, str],
    accumulators: Mapping[ValueSource, Accumulator],
    taps: Taps | None = None,
) -> None:
    """Compute the values of some sources on every batch, and hand them to the accumulator of each.

    Args:
        loss_values: computes them, at the point the model holds.
        batches: closed at the end.
        names: a loss of each source; sources of one dict follow each other.
        accumulators: by source.
        taps: watch the pass, which is over one source then; None for none.
    """
    last = list(names)[-1]
    watching: contextlib.AbstractContextManager[object] = taps or contextlib.nullcontext()
    with loss_values.mode(), watching, contextlib.closing(batches):
        for membership, batch in batches:
            if taps is not None:
                taps.begin(batch)
            for source, (values, weights) in loss_values.values_of_sources(names, batch):
                accumulator = accumulators[source]
                values = values if accumulator.needs_graph else values.detach()
                for part in membership.divide((values, weights), source != last):
                    accumulator.take(part)
