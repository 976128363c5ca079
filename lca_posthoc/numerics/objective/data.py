"""Manage the data of a task's losses: splits, batch sizes, and the order of batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ...errors import InputError
from ...tasks.task import Loss, Task
from .batches import Groups, Order, Split
from .containers import digest_of
from .element_groups import ElementOrder
from .reader import Reader
from .settings import ObjectiveSettings

REPLICATES = 10
_FEW_REPLICATES = 1.5  # in a batch, on average
# source of a loss's values: id of the function, and entry of the dict that it returns
ValueSource = tuple[int, str | None]
# split of a pass (None for a term of the parameters), and position of its batch order (None for the
# order of the data)
PassKey = tuple[str | None, int | None]


def replicates_of(name: str) -> str:
    """Return the internal name of a loss on parts of its random subset, which give its standard
    errors.
    """
    return f"{name}\0replicates"


def origin(task: Task, name: str) -> tuple[str, str | None]:
    """Split the name of a result into the task's name of the loss and, if any, the entry of its
    dict.

    Args:
        task: the task.
        name: name of the result.
    """
    return task.stated(name) or (name, None)


def stated_loss(task: Task, name: str) -> Loss:
    """Return the task's loss for the name of a result.

    Args:
        task: the task.
        name: name of the result.
    """
    return task.losses[origin(task, name)[0]]


def open_data(
    task: Task, losses: Mapping[str, Loss], settings: ObjectiveSettings, reader: Reader
) -> LossData:
    """Open the splits of some losses of a task, reduced to the chosen subsets.

    Args:
        task: the task.
        losses: the losses by name.
        settings: device, precision, subsets.
        reader: reads the data.

    Raises:
        InputError: if the data of a split cannot be read, see `Split`.
    """
    opener = partial(_open_split, task, settings, reader)
    names = dict.fromkeys(loss.split for loss in losses.values())
    splits = {name: opener(name) for name in names if name is not None}
    return LossData(task, losses, splits, opener, partition_is_given=settings.norm_stats == "batch")


def _open_split(task: Task, settings: ObjectiveSettings, reader: Reader, name: str) -> Split:
    subset = settings.subset.get(name, settings.subset.get(""))
    return Split(name, task.data[name], settings.device, settings.dtype, subset, reader)


class LossData:
    """Hold the splits of some losses, and partition each into batches.

    Args:
        task: defines the losses.
        losses: the evaluated losses by name.
        splits: their splits by name.
        open_split: opens another split of the task.
        partition_is_given: whether the partition into batches is part of the losses, which then
            keep the order of the data.

    Attributes:
        batch_sizes: examples per batch, by split.
        batch_order_of: by loss, the grouped loss whose batch order it uses; None for the order of
            the data.
        replicated: internal name of replicates → name of the loss on a random subset.
        starts: by loss, the position of its sample, which contains examples with weight.
    """

    def __init__(
        self,
        task: Task,
        losses: Mapping[str, Loss],
        splits: dict[str, Split],
        open_split: Callable[[str], Split],
        *,
        partition_is_given: bool,
    ) -> None:
        self.splits, self.open_split = splits, open_split
        self.batch_sizes: dict[str, int] = {}
        self.batch_order_of: dict[str, str | None] = {}
        self.starts: dict[str, int] = {}
        self.replicated = {
            replicates_of(name): name
            for name, loss in losses.items()
            if loss.split is not None and loss.group_by is None and splits[loss.split].random
        }
        self.partition_is_given = partition_is_given
        self._task, self._losses = task, losses
        self._orders: list[Groups] = []
        self._order_of: dict[str, Groups] = {}

    def replicates_of(self, name: str) -> str | None:
        """Return the internal name of a loss's replicates; None if its subset is not random."""
        return next((hidden for hidden, loss in self.replicated.items() if loss == name), None)

    def digests(self, others: Iterable[Split]) -> dict[str, str]:
        """Return hashes of the splits, and of some others."""
        splits = {**self.splits, **{split.name: split for split in others}}
        return {f"split {name!r}": split.digest for name, split in splits.items()}

    def group_digests(self) -> dict[str, str]:
        """Return hashes of the losses' groups."""
        return {
            f"group_by of loss {origin(self._task, name)[0]!r}": digest_of(
                order.labels, _members(order)
            )
            for name, loss in self._losses.items()
            if loss.group_by is not None and (order := self.order(name)) is not None
        }

    def order(self, name: str) -> Groups | None:
        """Return the groups of a loss, which also order its batches unless they are groups of
        elements; None for a loss without groups.

        Raises:
            InputError: if the task no longer has the loss.
        """
        if name in self._order_of:
            return self._order_of[name]
        whole = self.replicated.get(name, name)
        if self._task.stated(whole) is None:
            raise InputError(
                f"the batches of this run follow the groups of loss {name!r}, which the task no "
                "longer has."
            )
        loss = stated_loss(self._task, whole)
        if loss.split is None or (loss.group_by is None and name not in self.replicated):
            return None
        split = self.splits[loss.split]
        order = _replicates(split) if name in self.replicated else split.order(loss.group_by)
        same = [known for known in self._orders if _same_order(known, order)]
        self._orders += [] if same else [order]
        self._order_of[name] = same[0] if same else order
        return self._order_of[name]

    def share_batches(self, blocked: Iterable[str] = ()) -> dict[str, str | None]:
        """Let every loss without groups share the batches of a grouped loss on its split, which
        saves a pass; return `batch_order_of`.

        No loss does so with a grouped loss whose groups are processed in blocks or are groups of
        elements. In `batch` mode, see `set_batch_order`.
        """
        blocked = set(blocked)
        for name, loss in self._losses.items():
            grouped = [
                other
                for other, candidate in self._losses.items()
                if candidate.group_by is not None
                and candidate.split == loss.split
                and other not in blocked
                and not isinstance(self.order(other), ElementOrder)
            ]
            replicates = replicates_of(name)
            if loss.group_by is not None or loss.split is None:
                self.set_batch_order(name, None)
            elif replicates in self.replicated:
                self.set_batch_order(name, replicates)
            else:
                self.set_batch_order(name, grouped[0] if grouped else None)
        return dict(self.batch_order_of)

    def set_batch_order(self, name: str, grouped: str | None) -> None:
        """Let a loss use the batch order of another loss's groups.

        In `batch` mode the partition into batches is part of the loss, and each group that a batch
        contains needs a backward pass. A loss then shares the batches of its replicates only, and
        only if most batches contain a single one: where it is evaluated without them, it pays for
        those that share a batch.

        Args:
            name: name of the loss.
            grouped: name of the grouped loss; None for the order of the data.
        """
        shares = not self.partition_is_given or (
            grouped in self.replicated and self.replicates_in_a_batch(grouped) <= _FEW_REPLICATES
        )
        self.batch_order_of[name] = grouped if shares else None

    def replicates_in_a_batch(self, hidden: str) -> float:
        """Return the mean number of a loss's replicates in a batch, in the order of the data.

        Args:
            hidden: internal name of the replicates.
        """
        order, split = self.order(hidden), self._losses[self.replicated[hidden]].split
        assert isinstance(order, Order), "replicates consist of examples"
        counts = order.counts
        batches = range(0, sum(counts), self.batch_sizes[str(split)])
        # replicates follow each other, so each begins a piece of a batch
        pieces = {*batches, *itertools.accumulate(counts[:-1])}
        return len(pieces) / len(batches)

    def share_orders(self, other: LossData) -> None:
        """Use the batch orders of another objective on the same data, now and later."""
        self.batch_order_of = other.batch_order_of
        self._orders, self._order_of = other._orders, other._order_of

    def passes(self, losses: Iterable[str]) -> dict[PassKey, dict[ValueSource, list[str]]]:
        """Group losses by their batches, then by the source of their values: each inner list is
        evaluated together.
        """
        passes: dict[PassKey, dict[ValueSource, list[str]]] = {}
        # keep entries of one dict together, so that no other call comes between them
        first: dict[int, int] = {}
        for name in sorted(
            losses, key=lambda name: first.setdefault(self._value_source(name)[0], len(first))
        ):
            sources = passes.setdefault(self._pass_key(name), {})
            sources.setdefault(self._value_source(name), []).append(name)
        return passes

    def order_at(self, position: int | None) -> Groups | None:
        """Return the batch order of a pass from its key."""
        return None if position is None else self._orders[position]

    def _value_source(self, name: str) -> ValueSource:
        whole = self.replicated.get(name, name)
        return id(self._losses[whole].source), origin(self._task, whole)[1]

    def _pass_key(self, name: str) -> PassKey:
        grouped = self.batch_order_of.get(name)
        order = self.order(name) or (self.order(grouped) if grouped else None)
        position = next((index for index, known in enumerate(self._orders) if known is order), None)
        return self._losses[self.replicated.get(name, name)].split, position


def _replicates(split: Split) -> Order:
    """Cut a random subset into parts, each of which is a random subset too."""
    parts = torch.arange(split.examples, device="cpu").tensor_split(min(REPLICATES, split.examples))
    return Order(list(range(len(parts))), list(parts))


def _members(order: Groups) -> list[Tensor]:
    """Return the tensors that assign examples or elements to groups."""
    return [order.codes] if isinstance(order, ElementOrder) else order.members


def _same_order(one: Groups, other: Groups) -> bool:
    return (
        type(one) is type(other)
        and one.labels == other.labels
        and all(map(torch.equal, _members(one), _members(other)))
    )
