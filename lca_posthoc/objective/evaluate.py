r"""Loss and gradient of a whole split at one point.

$L(\theta) = \sum_e w_e\,\ell_e(\theta) \big/ \sum_e w_e$ over every element $e$ of the split, or of
each of its groups; one value per element, $w_e = 1$ unless the loss gives weights. Sums over
elements and batches accumulate in float64.

Losses over the same batches are evaluated in one pass over them: the forward pass is shared by
losses that are functions of the model's outputs, the backward pass by losses that have the same
values. What a loss comes to, bit for bit, depends on the order of its own batches alone, never on
which others are evaluated beside it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property, partial
from numbers import Number
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import InputError, SpanError, few
from ..precisions import PRECISIONS
from ..task import Loss, Task, convert, every_name
from ..trajectory import TensorSpec
from .autocast import Watch
from .batches import Order, Split, automatic_batch_size, saved_bytes
from .containers import copied, dense_parts, digest_of, fresh
from .copies import copy_in
from .linear import multiplying
from .normalisation import normalising
from .precision import default_dtype, dtype_of, tf32
from .reader import Reader
from .recurrent import recurring
from .sharing import Returned, SharedOutputs
from .sources import is_out_of_memory
from .statistics import Recalibration
from .sums import Evaluation, Sums
from .tensors import added_entries, is_fixed, tensor_table, unstored

_BUILT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by the factories of tasks in this process
REPLICATES = 10
Values = Callable[[Any], tuple[Tensor, Tensor | None]]
# of a loss's values: which function's, and which entry of what it returns
Source = tuple[int, str | None]


class _Settings(TypedDict):
    """The arguments of an objective that another one in another precision shares, see
    `Objective`.
    """

    device: torch.device
    norm_stats: str
    batch_size: int | None
    subset: Mapping[str, str] | None
    held: Collection[str] | None
    reader: Reader


class Objective:
    """Evaluates the losses of a task at any point in the space of its model's tensors.

    Args:
        build: gives the task, called under the default dtype of the precision.
        losses: names of the losses, None for the first of the task, `["all"]` for every one.
        device: where the model and the data live.
        precision: "float32", "float64", and on devices that have them "tf32" and "bfloat16"
            (autocast), whose tensors and sums are those of float32.
        norm_stats: "running", "recalibrated" or "batch".
        batch_size: None for a deterministic choice from shapes, one for each split.
        subset: split → the choice of its examples, see `batches.chosen`; `""` stands for every
            split.
        held: normalised names of the tensors in the checkpoints; frozen parameters whose names are
            not among them stay as the task's model builds them. None where the checkpoints hold
            every tensor.
        model: instead of a new one of the task's factory.
        reader: the one whose thread builds the task and reads its data; None for a new one.
    """

    def __init__(
        self,
        build: Callable[[], Task],
        losses: list[str] | None,
        *,
        device: torch.device,
        precision: str,
        norm_stats: str,
        batch_size: int | None,
        subset: Mapping[str, str] | None = None,
        held: Collection[str] | None = None,
        model: nn.Module | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.device, self.dtype, self.norm_stats = device, dtype_of(precision), norm_stats
        self.precision = precision
        if norm_stats == "batch" and batch_size is None:
            raise InputError(
                "--norm-stats batch needs --batch-size N: the partition into batches "
                "is part of the loss."
            )
        self.reader = reader or Reader()
        with default_dtype(self.dtype):
            self.task = self.reader.build(build)
            self.losses = {name: self._stated(name)[0] for name in self.task.choose(losses)}
            self.model = new_model(self.task) if model is None else model
            convert(self.model, device, self.dtype)
            self.model.eval()  # a statement: a model's own train() or eval() may return nothing
        self._subset = subset or {}
        self.splits = {
            name: self.open_split(name)
            for name in dict.fromkeys(loss.split for loss in self.losses.values())
            if name is not None
        }
        self._settings: _Settings = {
            "device": device,
            "norm_stats": norm_stats,
            "batch_size": batch_size,
            "subset": subset,
            "held": held,
            "reader": self.reader,
        }
        self._batch_size = batch_size
        self._sources = {name: loss.source for name, loss in self.losses.items()}
        # by the name under which a loss that returns a dict is stated: the entries of its first
        # batch
        self._entries_of: dict[str, tuple[str, ...]] = {}
        self.functions = {
            name: loss.on_device(device, self.dtype) for name, loss in self.losses.items()
        }
        self._functions_per_element: dict[str, Callable[[Any, Any], Any]] = {}
        self._bound: list[tuple[Tensor, bool]] = []
        self._autocast_of: dict[str, str | None] = {}
        self.starts: dict[str, int] = {}
        # of each loss evaluated yet, whether its function ever gave weights itself
        self.gave_weights: dict[str, bool] = {}
        self._complete()
        self.recalibration = Recalibration(self) if norm_stats == "recalibrated" else None
        self.table = tensor_table(self.model, norm_stats, self.task.fixed, held)
        stored = {spec.name for spec in self.table}
        whole = tensor_table(self.model, norm_stats, self.task.fixed)
        self.frozen = [spec.name for spec in whole if spec.name not in stored]
        self._tensors = self._bind()
        fixed = [
            name for name in self._own() if name in self.frozen or is_fixed(name, self.task.fixed)
        ]
        drawn = [name for name in fixed if not _is_narrow(self._own()[name])]
        if drawn and self.dtype == torch.float64 and model is None:
            # the ones that were trained with: a seed gives others in float64
            with default_dtype(torch.float32):
                self._copy_own(new_model(self.task), fixed)
        self._orders: list[Order] = []
        self._order_of: dict[str, Order] = {}
        self.joined: dict[str, str | None] = {}
        self.replicated = {
            replicates_of(name): name
            for name, loss in self.losses.items()
            if loss.split is not None and loss.group_by is None and self.splits[loss.split].random
        }
        self.batch_sizes: dict[str, int] = {}
        self.evaluations = dict.fromkeys([*self.losses, *self.replicated], 0)
        self.forward_passes = dict(self.evaluations)

    @cached_property
    def higher(self) -> Objective:
        """Return the same task, one precision higher, over the same data and batches.

        Its model is a copy of this one's, so that the task's factory is called once; where no copy
        agrees, the factory builds another.
        """
        reference = PRECISIONS[self.precision].reference
        assert reference is not None, f"{self.precision} is the highest precision"
        other = self.in_precision(reference.precision)
        other.joined = self.joined
        other._orders, other._order_of = self._orders, self._order_of
        return other

    def in_precision(self, precision: str) -> Objective:
        """Return the same task in another precision, with batches of the same size and the tensors
        that checkpoints do not hold.
        """
        copied = copy_in(self.model, self.device, dtype_of(precision))
        if copied is not None:
            other = self._beside(precision, copied)
            if self._agrees(other):
                return other
        return self._beside(precision, None)

    def _beside(self, precision: str, model: nn.Module | None) -> Objective:
        other = Objective(
            lambda: self.task, list(self.losses), precision=precision, model=model, **self._settings
        )
        other.batch_sizes = self.batch_sizes
        if self.recalibration is not None and other.recalibration is not None:
            other.recalibration.recall(self.recalibration.recorded)
        other._copy_own(self.model, self._own())
        return other

    def precision_of(self, name: str) -> str:
        """Return the precision a loss is computed in: that of the run, or the coarser one of an
        autocast it turns on itself.
        """
        return "bfloat16" if self.autocast(name) else self.precision

    def autocast(self, name: str) -> str | None:
        """Return the type to which a loss, or the model in it, casts by an autocast of its own;
        None where it turns none on.

        Autocast leaves float64 alone, and in bfloat16 the run's own is on already.
        """
        if self.precision == "float64":
            return None
        if name not in self._autocast_of:
            split, watch = self.losses[name].split, Watch(self.device)
            batch = None if split is None else self.splits[split].sample(0, 2)
            with self.mode(), watch:
                self.values(name, fresh(batch))
            own = {"bfloat16"} if self.precision == "bfloat16" else set()
            self._autocast_of[name] = min(watch.dtypes - own, default=None)
        return self._autocast_of[name]

    def _agrees(self, other: Objective) -> bool:
        """Tell whether another precision gives the values of every loss on a few examples, at the
        point this one holds.

        They agree within ten times what two precisions may differ by on a larger sample: single
        values may be small.
        """
        other.place(self.point)
        for name, loss in self.losses.items():
            pairs, few_examples = [], min(32, self.batch_sizes.get(loss.on, 2))
            try:
                for objective in (self, other):
                    batch = (
                        None
                        if loss.split is None
                        else objective.splits[loss.split].sample(0, few_examples)
                    )
                    with objective.mode():
                        pairs.append(objective.values(name, fresh(batch))[0].detach().double())
            except InputError:
                return False
            own, others = pairs
            if own.shape != others.shape:
                return False
            tolerance = 10 * max(
                PRECISIONS[objective.precision_of(name)].same_loss for objective in (self, other)
            )
            if not (own - others).abs().sum() <= tolerance * own.abs().sum():
                return False
        return True

    def divided(self) -> Objective:
        """Return the same with a loss for every entry of a loss that returns a dict, as its call on
        two examples tells.

        Raises:
            InputError: where an entry has no name of its own, or one was asked for that is not
                returned.
        """
        names: list[str] = []
        known: dict[str, tuple[str, ...]] = {}
        for name in self.losses:
            stated, entry = self._origin(name)
            entries = known[stated] if stated in known else self._first_entries(name)
            if entries is not None:
                known[stated] = entries
            if entry is None:
                names += [name] if entries is None else [f"{name}/{key}" for key in entries]
            else:
                names.append(name)
        if names == list(self.losses):
            self._entries_of.update(known)
            return self
        other = Objective(
            lambda: self.task, names, precision=self.precision, model=self.model, **self._settings
        )
        other._entries_of = known
        return other

    def _first_entries(self, name: str) -> tuple[str, ...] | None:
        """Return the names of the entries a loss returns; None where it returns none, or cannot be
        called before weights are placed.
        """
        loss = self.losses[name]
        if loss.split is None or loss.is_of_torch:
            return None
        try:
            batch = copied(self.splits[loss.split].sample(0, 2))
            with self.mode():
                returned = self._returned(name, batch).result
        except InputError:  # the probe says what is wrong, with the weights of a checkpoint
            return None
        stated, entry = self._origin(name)
        if entry is None and not isinstance(returned, Mapping):
            return None
        entries = _entries(stated, returned, entry)
        for key in entries:
            if self.task.stated(f"{stated}/{key}") != (stated, key):
                raise InputError(
                    f"loss {stated!r} returns an entry {key!r}, and another loss of the task is "
                    f"called {stated + '/' + key!r}. Give one "
                    "of them another name."
                )
        return entries

    def release_higher(self) -> None:
        """Give up the objective one precision higher, with its model and its copy of the data."""
        self.__dict__.pop("higher", None)

    def replicates_of(self, name: str) -> str | None:
        """Return the name under which a loss on a random subset is evaluated on parts of it; None
        for other losses.
        """
        return next((hidden for hidden, loss in self.replicated.items() if loss == name), None)

    def _complete(self) -> None:
        """Let lazily built modules infer their shapes from a batch."""
        if any(map(is_lazy, [*self.model.parameters(), *self.model.buffers()])):
            known = self.task.losses
            name = next((name for name, loss in known.items() if loss.split is not None), None)
            if name is None:
                raise InputError(
                    "the model is lazily built, and no loss of the task calls it. "
                    "Build it in Task.model."
                )
            self.functions.setdefault(name, known[name].on_device(self.device, self.dtype))
            split = Split(
                known[name].on,
                self.task.data[known[name].on],
                self.device,
                self.dtype,
                reader=self.reader,
            )
            with self.mode():
                self._returned(name, split.sample(0, 2))

    def _bind(self) -> dict[str, Tensor]:
        """Return the module's own tensors of the table; let gradients flow to those that are
        allocated and to no other.
        """
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        bound = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for spec in self.table:
            bound[spec.name].requires_grad_(spec.kind != "state")
        self._bound = [(tensor, tensor.requires_grad) for tensor in bound.values()]
        for pattern in self.task.fixed:
            if not any(
                is_fixed(name, [pattern]) for name in [*bound, *(self._settings["held"] or ())]
            ):
                raise InputError(
                    f"Task.fixed names {pattern!r}, which no tensor of the model matches. Its "
                    f"tensors: {few([*map(repr, bound)], 5)}."
                )
        return {spec.name: bound[spec.name] for spec in self.table}

    def open_split(self, name: str) -> Split:
        """Return a split of the task, reduced to the subset the user chose."""
        subset = self._subset.get(name, self._subset.get(""))
        return Split(name, self.task.data[name], self.device, self.dtype, subset, self.reader)

    def add_function(self, name: str) -> None:
        """Make a loss of the task known to `values` though it is not one of those evaluated."""
        if name not in self.functions:
            self.functions[name] = self._stated(name)[0].on_device(self.device, self.dtype)

    def _origin(self, name: str) -> tuple[str, str | None]:
        """Return the name under which the task states a loss, and the entry it is of what that
        returns, if any.
        """
        return self.task.stated(name) or (name, None)

    def _stated(self, name: str) -> tuple[Loss, str | None]:
        """Return the loss of the task that a name belongs to, and the entry of its dict that the
        name stands for, if any.
        """
        stated, entry = self._origin(name)
        return self.task.losses[stated], entry

    @property
    def point(self) -> dict[str, Tensor]:
        """Return the tensors of the table, as the module holds them."""
        return dict(self._tensors)

    @property
    def allocated(self) -> list[TensorSpec]:
        """Return the tensors that take part in the allocation."""
        return [spec for spec in self.table if spec.kind != "state"]

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Return the tensors `Task.fixed` keeps as the model builds them, under every name they
        have.
        """
        identities = {
            id(tensor) for name, tensor in self._own().items() if is_fixed(name, self.task.fixed)
        }
        return {
            name: tensor
            for name, tensor in every_name(self.model).items()
            if id(tensor) in identities
        }

    @property
    def added(self) -> list[str]:
        """Return the entries of the model's state dict that are neither parameters nor buffers, and
        stay as the model builds them.
        """
        return added_entries(self.model)

    @property
    def unstored(self) -> dict[str, Tensor]:
        """Return the buffers the model builds and does not save, by name."""
        return unstored(self.model)

    def fixed_of(self, names: Iterable[str]) -> list[str]:
        """Return those of some names that `Task.fixed` names."""
        return [name for name in names if is_fixed(name, self.task.fixed)]

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes of the data and of the tensors that checkpoints do not hold, which must be
        equal in every process.
        """
        return {
            **{f"split {name!r}": split.digest for name, split in self._every_split().items()},
            **{
                f"tensor {name!r}": digest_of(_some(tensor)) for name, tensor in self._own().items()
            },
            **{
                f"group_by of loss {stated!r}": digest_of(*groups)
                for stated, groups in self._groupings()
            },
        }

    def _every_split(self) -> dict[str, Split]:
        if self.recalibration is None:
            return self.splits
        return {**self.splits, self.recalibration.split.name: self.recalibration.split}

    def _groupings(self) -> Iterator[tuple[str, list[Any]]]:
        for name, loss in self.losses.items():
            if loss.group_by is not None and (order := self.order(name)) is not None:
                stated, _ = self._origin(name)
                yield stated, [order.labels, order.members]

    def _own(self) -> dict[str, Tensor]:
        """Return the tensors that stay as the task's model builds them: fixed ones, and buffers
        that are not stored.
        """
        bound = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: tensor for name, tensor in bound.items() if name not in self._tensors}

    def _copy_own(self, other: nn.Module, names: Iterable[str]) -> None:
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        with torch.no_grad():
            for name in names:
                self._own()[name].copy_(tensors[name])

    # --- batches and their order
    # ------------------------------------------------------------------------------------

    def settle_batch_sizes(
        self, point: Mapping[str, Tensor], recorded: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Fix the batch size of every split: the one recorded, the one given, or a deterministic
        choice at `point`.
        """
        self.place(point)
        for name, split in self.splits.items():
            chosen = (recorded or {}).get(name) or self._batch_size or min(self._automatic(split))
            self.batch_sizes[name] = min(chosen, split.examples)
        return dict(self.batch_sizes)

    def _automatic(self, split: Split) -> Iterator[int]:
        for name, loss in self.losses.items():
            if loss.split == split.name:
                yield automatic_batch_size(self.saved_bytes(name), self.device)

    def saved_bytes(self, name: str) -> float:
        """Return the bytes autograd saves of a loss for one example."""
        split = self._stated(name)[0].split
        assert split is not None
        with self.mode():
            return saved_bytes(
                self._every_split()[split], lambda batch: self.values(name, fresh(batch))
            )

    def order(self, name: str) -> Order | None:
        """Return the groups of a loss, in the order of its batches; None for a loss without
        groups.
        """
        if name in self._order_of:
            return self._order_of[name]
        whole = self.replicated.get(name, name)
        if self.task.stated(whole) is None:
            raise InputError(
                f"the batches of this run are in the order of the groups of loss {name!r}, which "
                f"the task no longer has."
            )
        loss, _ = self._stated(whole)
        if loss.split is None or (loss.group_by is None and name not in self.replicated):
            return None
        split = self.splits[loss.split]
        if name in self.replicated:
            parts = torch.arange(split.examples).tensor_split(min(REPLICATES, split.examples))
            order = Order(list(range(len(parts))), list(parts))
        else:
            order = split.order(loss.group_by)
        same = [known for known in self._orders if _same_order(known, order)]
        self._orders += [] if same else [order]
        self._order_of[name] = same[0] if same else order
        return self._order_of[name]

    def join(self, blocked: Iterable[str] = ()) -> dict[str, str | None]:
        """Let every loss without groups share the batches of a grouped loss on its split, so that
        it costs no further pass.

        No loss does so in `batch` mode, whose partition is part of the loss, nor with a grouped
        loss whose groups are taken in blocks.
        """
        for name, loss in self.losses.items():
            grouped = [
                other
                for other, its_loss in self.losses.items()
                if its_loss.group_by is not None
                and its_loss.split == loss.split
                and other not in blocked
            ]
            replicates = replicates_of(name)
            if loss.group_by is not None or loss.split is None:
                self.follow(name, None)
            elif replicates in self.replicated:
                self.follow(name, replicates)
            else:
                self.follow(name, grouped[0] if grouped else None)
        return dict(self.joined)

    def follow(self, name: str, along: str | None) -> None:
        """Take the batches of a loss in the order of another one's groups; never in `batch`
        mode.
        """
        self.joined[name] = None if self.norm_stats == "batch" else along

    def passes(
        self, losses: Iterable[str]
    ) -> dict[tuple[str | None, int | None], dict[Source, list[str]]]:
        """Return losses by the batches they are over, then by the source of their values: each
        inner list is evaluated at once.
        """
        passes: dict[tuple[str | None, int | None], dict[Source, list[str]]] = {}
        # entries of one dict follow each other, so that nothing is called between them
        first: dict[int, int] = {}
        for name in sorted(
            losses, key=lambda name: first.setdefault(self._source(name)[0], len(first))
        ):
            passes.setdefault(self._walk(name), {}).setdefault(self._source(name), []).append(name)
        return passes

    def _source(self, name: str) -> Source:
        whole = self.replicated.get(name, name)
        return id(self._sources[whole]), self._stated(whole)[1]

    def _walk(self, name: str) -> tuple[str | None, int | None]:
        along = self.joined.get(name)
        order = self.order(name) or (self.order(along) if along else None)
        position = next((index for index, known in enumerate(self._orders) if known is order), None)
        return self.losses[self.replicated.get(name, name)].split, position

    # --- evaluation
    # -------------------------------------------------------------------------------------------------

    def place(self, point: Mapping[str, Tensor]) -> None:
        """Copy values into the module's own tensors, in place: recomputation under checkpointing
        sees them too.
        """
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(point[name])

    def renew(self, point: Mapping[str, Tensor]) -> None:
        """Copy values in and set the model to eval anew: what modules derive from their weights
        there is derived from these.
        """
        self.model.train(True)
        self.place(point)
        self.model.eval()

    def evaluate(
        self,
        point: Mapping[str, Tensor],
        losses: list[str],
        *,
        gradient: bool = True,
        only: range | None = None,
    ) -> dict[str, Evaluation]:
        """Return each loss over its whole split at `point`, with its gradient unless only the value
        is asked for.

        Args:
            point: every tensor of the table, on the device.
            losses: names.
            gradient: False for a forward pass alone.
            only: some of the groups, where the losses have the same ones.
        """
        self.place(point)
        counts = self.evaluations if gradient else self.forward_passes
        for name in losses:
            counts[name] += only is None or only.start == 0
        evaluations: dict[str, Evaluation] = {}
        for (split, order), sources in self.passes(losses).items():
            if split is None:
                for name in (name for names in sources.values() for name in names):
                    evaluations[name] = self.over(
                        partial(self.values, name), [None], gradient=gradient
                    )
            else:
                evaluations |= self._one_pass(
                    self.splits[split],
                    None if order is None else self._orders[order],
                    sources,
                    only,
                    gradient,
                )
        return {name: evaluations[name] for name in losses}

    def _one_pass(
        self,
        split: Split,
        order: Order | None,
        sources: dict[Source, list[str]],
        only: range | None,
        gradient: bool,
    ) -> dict[str, Evaluation]:
        """Return losses, given by the source of their values, from one walk through a split."""
        grouped = {
            name: self.order(name) is not None for names in sources.values() for name in names
        }
        groups = range(len(order.labels)) if order and only is None else only
        sums = {
            source: Sums(
                {spec.name: spec.shape for spec in self.allocated if gradient},
                self.device,
                groups if any(grouped[name] for name in names) else None,
                not all(grouped[name] for name in names),
            )
            for source, names in sources.items()
        }
        mixed = order is not None and self.norm_stats == "batch"
        walk = split.batches(
            self.batch_sizes[split.name], None if mixed else order, None if mixed else only
        )
        codes = (
            torch.split(_codes(split.examples, order), self.batch_sizes[split.name])
            if order and mixed
            else ()
        )
        with self.mode(), contextlib.closing(walk):
            for index, (group, batch) in enumerate(walk):
                shared, common = SharedOutputs(), fresh(batch)
                for source, names in sources.items():
                    name = self.replicated.get(names[0], names[0])
                    mine = common if self.functions[name].call is None else fresh(batch)
                    values, weights = self.values(name, mine, shared)
                    values = values if gradient else values.detach()
                    keep = source != next(reversed(sources))
                    if mixed:
                        self._back_by_group(sums[source], values, weights, codes[index], keep)
                    else:
                        self._back(sums[source], group, values, weights, keep)
        return {
            name: sums[source].evaluation(
                grouped[name], f"loss {name!r} on split {split.name!r}", order
            )
            for source, names in sources.items()
            for name in names
        }

    def _back(
        self, sums: Sums, group: int, values: Tensor, weights: Tensor | None, keep: bool
    ) -> None:
        """Take in values of one group; `keep` the graph for those that share it."""
        sums.begin(group)
        total = values.double().sum()
        if sums.shapes and total.requires_grad:
            total.backward(retain_graph=keep)  # type: ignore[no-untyped-call]
            sums.collect(self._tensors)
        sums.add(total.detach(), values.numel() if weights is None else weights.sum())

    def _back_by_group(
        self, sums: Sums, values: Tensor, weights: Tensor | None, codes: Tensor, keep: bool
    ) -> None:
        """Take in a batch that holds several groups and whose statistics are those of the whole
        batch.
        """
        assert sums.groups is not None
        present = [code for code in torch.unique(codes).tolist() if code in sums.groups]
        for code in present:
            mine = (codes == code).to(values.device)
            self._back(
                sums,
                code,
                values[mine],
                None if weights is None else weights[mine],
                keep or code != present[-1],
            )

    def over(self, values: Values, batches: Iterable[Any], *, gradient: bool = True) -> Evaluation:
        """Return a loss over some batches, at the point the module holds; `values` gives a batch's
        values and weights.
        """
        shapes = {spec.name: spec.shape for spec in self.allocated if gradient}
        sums = Sums(shapes, self.device, None, True)
        with self.mode():
            for batch in batches:
                results, weights = values(fresh(batch))
                self._back(sums, 0, results if gradient else results.detach(), weights, False)
        return sums.evaluation(False, "a loss", None)

    def values(
        self, name: str, batch: object, shared: SharedOutputs | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return one value per element of a batch, multiplied by the element's weight, and the
        weights (float64) unless all are 1.
        """
        loss = self.functions[name]
        if loss.split is None:
            with self._user_code(loss, {}), self._autocasting():
                return self._term(name, loss), None
        returned = self._returned(name, batch, shared)
        outputs, targets, result = (
            returned.outputs,
            returned.targets,
            self.entry(name, returned.result),
        )
        values, weights = (
            result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        )
        self.gave_weights[name] = self.gave_weights.get(name, False) or weights is not None
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise InputError(
                f"loss {name!r} on split {loss.on!r} returned {shown(values)}, not a tensor of "
                f"floating-point values." + _as_a_tensor(values)
            )
        if values.dim() == 0:
            raise InputError(
                f"loss {name!r} on split {loss.on!r} returned a scalar; one value per element is "
                f"needed, so that every example counts "
                "once. Leave the mean out (reduction='none'), or use Loss(call=fn) and return "
                "(values, weights)."
            )
        if loss.call is None and isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            _not_broadcast(name, values, outputs, targets)
        if weights is None:
            own = None if loss.call is not None else loss.element_weights(targets)
            return values, own if own is None or own.shape == values.shape else None
        if not isinstance(weights, Tensor) or weights.shape != values.shape:
            shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise InputError(
                f"loss {name!r} on split {loss.on!r} returned values of shape {list(values.shape)} "
                f"and weights {shape}; they must agree."
            )
        if weights.requires_grad:
            raise InputError(
                f"loss {name!r} on split {loss.on!r} returned weights that depend on the model, "
                f"through which no gradient is taken. "
                "Compute them from the batch alone, or return values that are multiplied by them."
            )
        weights = weights.to(values.device, torch.float64)
        return values.double() * weights, weights

    def _returned(self, name: str, batch: object, shared: SharedOutputs | None = None) -> Returned:
        """Return what a loss's function returns for a batch; the entries of one dict share it."""
        loss, source = self.functions[name], id(self._sources.get(name))
        if shared is not None and source in shared.returned:
            return shared.returned[source]
        called: dict[str, object] = {}
        with self._user_code(loss, called), self._autocasting():
            if loss.call is not None:
                returned = Returned(loss.call(self.model, batch))
            else:
                inputs, targets = unpack(batch)
                called["inputs"] = inputs
                outputs = self.model(inputs) if shared is None else shared.of(self.model, inputs)
                called.update(outputs=outputs, targets=targets)
                returned = Returned(
                    self._per_element(name, loss)(outputs, targets), outputs, targets
                )
        if shared is not None and isinstance(returned.result, Mapping):
            shared.returned[source] = returned
        return returned

    def entry(self, name: str, returned: Any) -> Any:
        """Return the part of a function's result that is the loss of this name: all of it, or an
        entry of a dict.

        Raises:
            InputError: where it returned a dict and the name stands for no entry, or there is no
                such entry; where its entries changed from one batch to the next.
        """
        stated, entry = self._origin(name)
        if entry is None and not isinstance(returned, Mapping):
            return returned
        entries = _entries(stated, returned, entry)
        first = self._entries_of.setdefault(stated, entries)
        if set(first) != set(entries):
            other = min(set(first) ^ set(entries))
            raise InputError(
                f"loss {stated!r} returned an entry {other!r} for one batch and not for another. "
                f"Return every entry for every batch; where "
                "one says nothing of an element, give the element a weight of 0: (values, weights)."
            )
        # it is only called to see what the model does
        if entry is None and name not in self.losses:
            entry = entries[0]
        if entry is None:
            raise InputError(
                f"loss {name!r} returned a dict. Each entry is a loss of its own: ask for --loss "
                f"{' --loss '.join(f'{name}/{key}' for key in entries)}."
            )
        return returned[entry]

    def _per_element(self, name: str, loss: Loss) -> Callable[[Any, Any], Any]:
        if name not in self._functions_per_element:
            self._functions_per_element[name] = loss.per_element()
        return self._functions_per_element[name]

    def first_axis(self, name: str, batch: object, examples: int) -> None:
        """Refuse a grouped loss whose values do not run over the examples, where a batch holds
        several groups.
        """
        if self.order(name) is None:
            return
        with self.mode():
            values = self.values(name, fresh(batch))[0]
        if values.shape[0] != examples:
            raise InputError(
                f"loss {name!r} gives values of shape {list(values.shape)} for a batch of "
                f"{examples} examples; with --norm-stats batch the "
                "first axis must run over the examples, so that their groups can be told apart."
            )

    def weighs(self, name: str, batch: object) -> bool:
        """Tell whether any element of a batch has a weight above 0."""
        weights = self.weights(name, batch)
        return weights is None or bool(weights.sum() > 0)

    def lowest_weight(self, name: str, batch: object) -> float | None:
        """Return the smallest weight of an element of a batch; None where the loss gives no
        weights.
        """
        weights = self.weights(name, batch)
        return None if weights is None else float(weights.min())

    def weights(self, name: str, batch: object) -> Tensor | None:
        """Return the weights of the elements of a batch, float64; None where all weigh the same."""
        with self.mode():
            return self.values(name, fresh(batch))[1]

    def _term(self, name: str, loss: Loss) -> Tensor:
        if loss.l2 is not None:
            return (
                0.5
                * loss.l2
                * torch.stack(
                    [parameter.double().square().sum() for parameter in self.model.parameters()]
                )
                .sum()
                .reshape(1)
            )
        assert loss.term is not None
        value = loss.term(self.model)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1:
            kind = (
                f"a tensor of shape {list(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise InputError(
                f"the term of loss {name!r} returned {kind}, not a tensor of one "
                f"floating-point number."
            )
        return value.reshape(1)

    @contextlib.contextmanager
    def mode(self, layers: contextlib.AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Compute as the run does, around forward and backward passes, with autograd recording.

        Args:
            layers: a context that gives normalisation layers another behaviour than the run's mode.
        """
        with (
            layers or normalising(self.norm_stats, self.model.buffers()),
            multiplying(self.device),
            recurring(self.device),
            default_dtype(self.dtype),
            # also where no gradient is wanted of a loss: it may take derivatives itself
            torch.enable_grad(),
            tf32(self.precision == "tf32"),
        ):
            yield

    def _autocasting(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextlib.contextmanager
    def _user_code(self, loss: Loss, called: Mapping[str, object]) -> Iterator[None]:
        """Raise errors of the model or the loss function as ours, naming the split they happened
        on.

        Args:
            loss: whose function is called.
            called: what was handed over so far: the inputs to the model, then outputs and targets
                to the function.
        """
        try:
            yield
        except (InputError, SpanError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            place = (
                "in a term of the parameters" if loss.split is None else f"on split {loss.split!r}"
            )
            raise InputError(
                f"the model or the loss function failed {place}: {type(error).__name__}: "
                f"{error}{_way_out(loss, error, called)}"
            ) from error
        finally:
            self._restore()

    def _restore(self) -> None:
        """Undo what a loss that takes derivatives itself changes on the model's tensors: their
        gradients, and which of them require any.
        """
        for tensor, has_gradient in self._bound:
            tensor.grad = None
            if tensor.requires_grad != has_gradient and tensor.is_leaf:
                tensor.requires_grad_(has_gradient)


def _entries(stated: str, returned: object, entry: str | None) -> tuple[str, ...]:
    """Return the names of the entries of a dict of losses, and refuse a dict without `entry`, where
    that is not None.
    """
    if not isinstance(returned, Mapping):
        raise InputError(
            f"there is no loss {f'{stated}/{entry}'!r}: loss {stated!r} returned "
            f"{shown(returned)}, and no dict with an entry {entry!r}."
        )
    wrong = [key for key in returned if not isinstance(key, str) or not key]
    if wrong or not returned:
        what = f"a dict with the key {wrong[0]!r}" if wrong else "an empty dict"
        raise InputError(
            f"loss {stated!r} returned {what}. Give every loss in it a name: {{'boxes': …, "
            f"'classes': …}}."
        )
    if entry is not None and entry not in returned:
        raise InputError(
            f"loss {stated!r} returned no entry {entry!r}; it has "
            f"{few([*map(repr, sorted(returned))])}."
        )
    return tuple(returned)


def shown(value: object) -> str:
    """Return a few words on a value: of a tensor its type and shape, of a dict its keys.

    >>> shown(torch.zeros(2, 3)), shown({"logits": 0}), shown(0.5)
    ('a float32 tensor of shape [2, 3]', "a dict with 'logits'", 'a float')
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return (
            f"{'an' if dtype[0] in 'aiou' and dtype != 'uint8' else 'a'} {dtype} tensor of shape "
            f"{list(value.shape)}"
        )
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {few([*map(repr, value)])}"
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _as_a_tensor(values: object) -> str:
    """Return how to mend a loss that gives a plain number or a list of them."""
    if isinstance(values, Number) and not isinstance(values, bool):
        return (
            " A number has lost its gradient: return the tensor itself, without .item() or "
            "float(), one value per element."
        )
    return ""


def _way_out(loss: Loss, error: Exception, called: Mapping[str, object]) -> str:
    if "outputs" in called:
        name = getattr(loss.fn, "__name__", type(loss.fn).__name__)
        name = "fn" if name in ("partial", "<lambda>") else name
        return (
            f". It was called as {name}(outputs, targets), where outputs, what the model returned, "
            f"is {shown(called['outputs'])}, and "
            f"targets, the second part of a batch, is {shown(called['targets'])}. A function that "
            f"takes them in another order or form is "
            f"stated as Loss(lambda outputs, targets: {name}(targets, outputs)), one that takes "
            f"other arguments as Loss(call=fn), called "
            "as fn(model, batch)."
        )
    if "inputs" in called:
        return (
            f". The model was called as model(inputs), where inputs, the first part of a batch, is "
            f"{shown(called['inputs'])}. A model that "
            "takes other arguments is called in Loss(call=fn), fn(model, batch)."
        )
    if loss.fn is not None and isinstance(error, TypeError):
        return (
            ". A loss or a model that takes other arguments is stated as Loss(call=fn), called as "
            "fn(model, batch)."
        )
    if loss.call is not None and isinstance(error, TypeError | AttributeError):
        return (
            ". Loss(call=fn) is called as fn(model, batch); a function of outputs and targets is "
            "stated as Loss(fn)."
        )
    return ""


def _is_narrow(tensor: Tensor) -> bool:
    """Tell whether float32 holds the values of a tensor exactly."""
    return not tensor.is_floating_point() or torch.equal(tensor, tensor.float().to(tensor.dtype))


def _not_broadcast(name: str, values: Tensor, outputs: Tensor, targets: Tensor) -> None:
    if values.numel() > max(outputs.numel(), targets.numel()):
        raise InputError(
            f"loss {name!r} gives values of shape {list(values.shape)} for outputs "
            f"{list(outputs.shape)} and targets "
            f"{list(targets.shape)}: they were broadcast against each other. Make their shapes "
            f"agree."
        )


def _some(tensor: Tensor) -> tuple[str, list[Tensor]]:
    """Return a tensor's layout, and a few thousand of its numbers from all over it: of a sparse
    one, of its indices and values.
    """
    flat = [part.reshape(-1) for part in dense_parts(tensor)]
    return f"{tensor.dtype}{tensor.layout}", [
        part[:: max(1, len(part) // 4096)].clone() for part in flat
    ]


def replicates_of(name: str) -> str:
    """Return the name under which a loss on a random subset is evaluated on parts of it, for its
    standard errors.
    """
    return f"{name}\0replicates"


def _same_order(one: Order, other: Order) -> bool:
    return one.labels == other.labels and all(map(torch.equal, one.members, other.members))


def _codes(examples: int, order: Order) -> Tensor:
    """Return the position of its group for each example of a split, (examples,) int64."""
    codes = torch.zeros(examples, dtype=torch.int64)
    for code, members in enumerate(order.members):
        codes[members] = code
    return codes


def unpack(batch: object) -> tuple[Any, Any]:
    """Return the inputs and targets of a batch, for losses that are plain functions."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    kind = (
        f"{type(batch).__name__} of {len(batch)}"
        if hasattr(batch, "__len__")
        else type(batch).__name__
    )
    raise InputError(
        f"a batch is a {kind}, not (inputs, targets). Use Loss(call=fn), called as "
        f"fn(model, batch)."
    )


def new_model(task: Task) -> nn.Module:
    """Return a new model of the task.

    Raises:
        InputError: where the factory raises, returns something else, or returns one it returned
            before.
    """
    try:
        model = task.model()
    except Exception as error:
        raise InputError(f"Task.model() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"Task.model() returned {type(model).__name__}, not an nn.Module.")
    if model in _BUILT:
        raise InputError(
            "Task.model() returned the module it had returned before. Build a new one at every "
            "call: model=lambda: Net()."
        )
    _BUILT.add(model)
    # inside torch.compile's wrapper, for compiled code calls F.batch_norm past the one
    # `normalising` puts in its place
    return getattr(model, "_orig_mod", model)
