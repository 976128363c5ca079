"""The data of a task's losses: their splits, how large batches are, and the order they are taken
in.
"""

from __future__ import annotations

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
# of a loss's values: which function's, and which entry of what it returns
ValueSource = tuple[int, str | None]
# the split a pass is over, and the position of the order of its batches; None for a term of the
# parameters, and for the order of the data
PassKey = tuple[str | None, int | None]


def replicates_of(name: str) -> str:
    """Return the name under which a loss on a random subset is evaluated on parts of it, for its
    standard errors.
    """
    return f"{name}\0replicates"


def origin(task: Task, name: str) -> tuple[str, str | None]:
    """Return the name under which a task states a loss, and the entry it is of what that returns,
    if any.
    """
    return task.stated(name) or (name, None)


def stated_loss(task: Task, name: str) -> Loss:
    """Return the loss of a task that a name belongs to."""
    return task.losses[origin(task, name)[0]]


def open_data(
    task: Task, losses: Mapping[str, Loss], settings: ObjectiveSettings, reader: Reader
) -> LossData:
    """Open the splits of some losses of a task, each reduced to the subset the user chose.

    Raises:
        InputError: where the data of a split cannot be read, see `Split`.
    """
    opener = partial(_open_split, task, settings, reader)
    names = dict.fromkeys(loss.split for loss in losses.values())
    splits = {name: opener(name) for name in names if name is not None}
    return LossData(task, losses, splits, opener, partition_is_given=settings.norm_stats == "batch")


def _open_split(task: Task, settings: ObjectiveSettings, reader: Reader, name: str) -> Split:
    subset = settings.subset.get(name, settings.subset.get(""))
    return Split(name, task.data[name], settings.device, settings.dtype, subset, reader)


class LossData:
    """The splits of some losses, and the partition of each into batches.

    Args:
        task: states the losses.
        losses: those that are evaluated, by name.
        splits: theirs, by name.
        open_split: opens another split of the task.
        partition_is_given: whether the partition into batches is part of the losses, so that none
            takes its batches in the order of another.

    Attributes:
        batch_sizes: examples of a batch, by split.
        batch_order_of: by loss, the grouped one in whose order its batches are taken; None for the
            order of the data.
        replicated: the name of a loss on a random subset, by that of its replicates.
        starts: by loss, the position of its sample: some of those examples weigh something.
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
        """Return the name under which a loss on a random subset is evaluated on parts of it; None
        for other losses.
        """
        return next((hidden for hidden, loss in self.replicated.items() if loss == name), None)

    def digests(self, others: Iterable[Split]) -> dict[str, str]:
        """Return hashes of the splits, and of some others."""
        splits = {**self.splits, **{split.name: split for split in others}}
        return {f"split {name!r}": split.digest for name, split in splits.items()}

    def group_digests(self) -> dict[str, str]:
        """Return hashes of the groups of losses."""
        return {
            f"group_by of loss {origin(self._task, name)[0]!r}": digest_of(
                order.labels, _members(order)
            )
            for name, loss in self._losses.items()
            if loss.group_by is not None and (order := self.order(name)) is not None
        }

    def order(self, name: str) -> Groups | None:
        """Return the groups of a loss, in the order of its batches unless they are of elements; None
        for a loss without groups.
        """
        if name in self._order_of:
            return self._order_of[name]
        whole = self.replicated.get(name, name)
        if self._task.stated(whole) is None:
            raise InputError(
                f"the batches of this run are in the order of the groups of loss {name!r}, which "
                "the task no longer has."
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
        """Let every loss without groups share the batches of a grouped loss on its split, so that
        it costs no further pass; return `batch_order_of`.

        No loss does so in `batch` mode, whose partition is part of the loss, nor with a grouped
        loss whose groups are taken in blocks, or are groups of elements.
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
        """Take the batches of a loss in the order of another one's groups; never in `batch`
        mode.
        """
        self.batch_order_of[name] = None if self.partition_is_given else grouped

    def share_orders(self, other: LossData) -> None:
        """Take the batches of every loss as another objective of the same data takes them, now and
        later.
        """
        self.batch_order_of = other.batch_order_of
        self._orders, self._order_of = other._orders, other._order_of

    def passes(self, losses: Iterable[str]) -> dict[PassKey, dict[ValueSource, list[str]]]:
        """Return losses by the batches they are over, then by the source of their values: each
        inner list is evaluated at once.
        """
        passes: dict[PassKey, dict[ValueSource, list[str]]] = {}
        # entries of one dict follow each other, so that nothing is called between them
        first: dict[int, int] = {}
        for name in sorted(
            losses, key=lambda name: first.setdefault(self._value_source(name)[0], len(first))
        ):
            sources = passes.setdefault(self._pass_key(name), {})
            sources.setdefault(self._value_source(name), []).append(name)
        return passes

    def order_at(self, position: int | None) -> Groups | None:
        """Return the order of batches that the key of a pass stands for."""
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
    """Return the parts of a random subset, of which each is a random subset too."""
    parts = torch.arange(split.examples, device="cpu").tensor_split(min(REPLICATES, split.examples))
    return Order(list(range(len(parts))), list(parts))


def _members(order: Groups) -> list[Tensor]:
    """Return what tells which group examples or elements belong to."""
    return [order.codes] if isinstance(order, ElementOrder) else order.members


def _same_order(one: Groups, other: Groups) -> bool:
    return (
        type(one) is type(other)
        and one.labels == other.labels
        and all(map(torch.equal, _members(one), _members(other)))
    )
