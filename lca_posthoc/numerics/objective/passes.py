"""Run one pass over the batches of a split: compute the values of losses batch by batch, and pass
them to accumulators.

An accumulator decides what to keep of a batch: `Sums` keeps the loss and its gradient. A
`Membership` assigns the examples of a batch to groups.
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
    """Hold the values of a loss for the elements of one group in a batch.

    Attributes:
        group: index of the group; 0 without groups.
        values: one value per element, multiplied by its weight; with a graph if the accumulator
            needs one.
        weights: weights of the elements, float64; None if all are 1.
        more_to_come: whether the same graph is needed again, for another group or loss.
        codes: if examples are kept apart, the index of each example's group, or of the example
            itself, (examples,) int64; the first axis of the values then runs over the examples.
    """

    group: int
    values: Tensor
    weights: Tensor | None
    more_to_come: bool = False
    codes: Tensor | None = None


class Accumulator(Protocol):
    """Accumulate the values of one source over the batches of a pass."""

    @property
    def needs_graph(self) -> bool:
        """Return whether values must come with the graph for a backward pass."""

    def take(self, part: GroupValues) -> None:
        """Add the values of one group in a batch; run the backward pass, if any, immediately."""


class Membership(Protocol):
    """Assign the examples of a batch to groups."""

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values of the batch group by group; the groups use their common graph in turn.

        Args:
            values: values and weights of the batch.
            more_to_come: whether the graph is needed again afterwards.
        """


def _by_code(
    values: Values, codes: Tensor, groups: range, more_to_come: bool
) -> Iterator[GroupValues]:
    """Yield the values of each of some groups.

    Args:
        values: values and weights of a batch.
        codes: index of its group for each value, or each example.
        groups: range of groups to use.
        more_to_come: as for `Membership.divide`.
    """
    results, weights = values
    present = [code for code in torch.unique(codes).tolist() if code in groups]
    for code in present:
        members = (codes == code).to(results.device)
        yield GroupValues(
            code,
            results[members],
            None if weights is None else weights[members],
            more_to_come or code != present[-1],
        )


@dataclass(frozen=True)
class OneGroup:
    """Assign all examples of a batch to one group, also if there are no groups."""

    group: int

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values unchanged; see `Membership.divide`.

        Args:
            values: values and weights of the batch.
            more_to_come: as for `Membership.divide`.
        """
        yield GroupValues(self.group, *values, more_to_come)


@dataclass(frozen=True)
class SeveralGroups:
    """Assign the examples of a batch to several groups; statistics of the batch are those of all
    examples.

    Attributes:
        codes: index of its group for each example, (examples,) int64.
        groups: range of groups to use.
    """

    codes: Tensor
    groups: range

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values of each group; their first axis runs over the examples. See
        `Membership.divide`.

        Args:
            values: values and weights of the batch.
            more_to_come: as for `Membership.divide`.
        """
        yield from _by_code(values, self.codes, self.groups, more_to_come)


@dataclass(frozen=True)
class GroupsOfElements:
    """Assign the elements of a batch's examples to several groups.

    Attributes:
        codes: index of its group for each element, (examples, *elements of an example).
        groups: range of groups to use.
    """

    codes: Tensor
    groups: range

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values of each group, (elements of the group,); see `Membership.divide`.

        Args:
            values: values and weights of the batch.
            more_to_come: as for `Membership.divide`.
        """
        codes = element_codes(self.codes, values[0])
        yield from _by_code(values, codes, self.groups, more_to_come)


@dataclass(frozen=True)
class OfExamples:
    """Keep every example of the batch apart.

    Attributes:
        codes: index of each example's group, or of the example itself, (examples,) int64.
    """

    codes: Tensor

    def divide(self, values: Values, more_to_come: bool) -> Iterator[GroupValues]:
        """Yield the values unchanged; see `Membership.divide`.

        Args:
            values: values and weights of the batch.
            more_to_come: as for `Membership.divide`.
        """
        yield GroupValues(0, *values, more_to_come, self.codes)


Batches = Generator[tuple[Membership, Any], None, None]


def batches_by_group(
    split: Split,
    batch_size: int,
    order: Order | None,
    only: range | None,
    part: range | None = None,
) -> Batches:
    """Yield batches of one group each, group after group.

    Args:
        split: the examples.
        batch_size: maximum number of examples per batch.
        order: the groups; None for batches in the order of the data.
        only: range of groups; None for all.
        part: range of examples, without groups; None for all.
    """
    with contextlib.closing(split.batches(batch_size, order, only, part)) as batches:
        for group, batch in batches:
            yield OneGroup(group), batch


def batches_across_groups(
    split: Split, batch_size: int, order: Groups, only: range | None
) -> Batches:
    """Yield batches in the order of the data, which may mix examples or elements of several groups.

    Args:
        split: the examples.
        batch_size: number of examples per batch.
        order: the groups.
        only: range of groups to use; None for all.
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
    """Yield batches in the order of the data, with examples kept apart.

    Args:
        split: the examples.
        batch_size: number of examples per batch.
        order: the groups; None if every example is its own group.
    """
    own = torch.arange(split.examples, device="cpu") if order is None else order.codes
    codes = torch.split(own, batch_size)
    with contextlib.closing(split.batches(batch_size, None, None)) as batches:
        for index, (_, batch) in enumerate(batches):
            yield OfExamples(codes[index]), batch


def one_batch(batch: object, examples: int) -> Batches:
    """Yield one batch, with examples kept apart.

    Args:
        batch: the data.
        examples: number of examples.
    """
    yield OfExamples(torch.arange(examples, device="cpu")), batch


def run_pass(
    loss_values: LossValues,
    batches: Batches,
    names: Mapping[ValueSource, str],
    accumulators: Mapping[ValueSource, Accumulator],
    taps: Taps | None = None,
) -> None:
    """Compute the values of some sources on every batch, and pass them to the accumulator of each.

    Args:
        loss_values: computes the values at the point in the model.
        batches: the batches; closed at the end.
        names: a loss for each source; sources of one dict must follow each other.
        accumulators: accumulator of each source.
        taps: observe the pass, which must have a single source; None for no taps.
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
