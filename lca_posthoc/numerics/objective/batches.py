"""Cut a split into batches, whole or group by group: keep them on the device if they fit, else
stream them ahead of use.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...errors import InputError
from .containers import change_tensors, dense_parts, digest_of, size_of
from .element_groups import (
    ElementOrder,
    element_labels,
    element_order,
    is_of_elements,
    no_labels,
)
from .precision import default_dtype
from .reader import Reader
from .sources import (
    DIGESTED,
    END,
    Indexed,
    Positions,
    Stream,
    move,
    move_ahead,
    open_source,
    room_on,
    user_code,
)
from .transfers import Arriving

_CPU_SAVED_BYTES = 64 * 2**20
_CUDA_SAVED_BYTES = 2 * 2**30
# Saved bytes of a batch per byte of the parameters. Estimates of memory count twice as much, which
# equals the memory of points and gradients if only sums are kept.
_SAVED_PER_PARAMETER = 2
_AHEAD = 2
_GROUPED_AT_ONCE = 1024
_ALONE = 32

_Labels = TypeVar("_Labels", list[Any], np.ndarray)


def positions_of_subset(subset: str | None, total: int) -> Tensor | None:
    """Parse a subset into positions, in order; None for all positions.

    >>> positions_of_subset("2:5", 10)
    tensor([2, 3, 4])
    >>> positions_of_subset("7,0", 10)
    tensor([7, 0])
    >>> len(positions_of_subset("0.25@7", 12))
    3

    Args:
        subset: `"A:B"` (either may be left out), `"I,J,K"` (two or more), or `"FRACTION@SEED"`, a
            random sample in the order it is drawn.
        total: number of examples of the split.

    Raises:
        InputError: if the subset is malformed, is a single number, repeats a position, or is out of
            range.
    """
    if subset is None:
        return None
    problem = "is not in a known form"
    if match := re.fullmatch(r"(\d*):(\d*)", subset):
        start, stop = int(match[1] or 0), int(match[2] or total)
        if start < stop <= total:
            return torch.arange(start, stop, device="cpu")
        problem = f"is empty or goes beyond the {total} examples"
    elif re.fullmatch(r"\d+(,\d+)+", subset):
        positions = [int(part) for part in subset.split(",")]
        if len(set(positions)) == len(positions) and max(positions) < total:
            return torch.tensor(positions, device="cpu")
        problem = f"repeats a position or goes beyond the {total} examples"
    elif match := re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)@(\d{1,18})", subset):
        count = round(float(match[1]) * total)
        if 0 < float(match[1]) < 1 and count:
            drawn = torch.Generator().manual_seed(int(match[2]))
            return torch.randperm(total, generator=drawn, device="cpu")[:count]
        problem = f"is not a fraction between 0 and 1 that selects at least one of {total} examples"
    raise InputError(
        f"--subset {subset!r} {problem}. Give positions A:B (from A up to, not including, B; "
        "either may be left out), a list I,J,K of positions, or FRACTION@SEED, such as 0.1@7, for "
        "a random sample."
    )


@dataclass(frozen=True, eq=False)
class Order:
    """Sort the examples of a split by group.

    Attributes:
        labels: labels of the groups, ascending.
        members: positions of each group's examples, ascending; int64.
    """

    labels: list[int] | list[str]
    members: list[Tensor]

    @property
    def counts(self) -> list[int]:
        """Return the number of examples of each group."""
        return [len(positions) for positions in self.members]

    @property
    def codes(self) -> Tensor:
        """Return the index of its group for each example, (examples,) int64."""
        codes = torch.zeros(sum(self.counts), dtype=torch.int64, device="cpu")
        for code, positions in enumerate(self.members):
            codes[positions] = code
        return codes


Groups = Order | ElementOrder  # groups of examples, or of the elements of examples


def _labels(name: str, answer: Any, count: int) -> list[Any]:
    """Convert `count` labels, a list, array or tensor, to a list of plain objects.

    Raises:
        InputError: if it is none of these, or has another length.
    """
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InputError(no_labels(name, f"a {type(answer).__name__}, not a list of labels"))
    if len(values) != count:
        raise InputError(no_labels(name, f"{len(values)} labels for {count} examples"))
    return [label.item() if getattr(label, "ndim", None) == 0 else label for label in values]


@dataclass
class _Resident:
    """Keep the batches of one order on the device, by group; a group that does not fit has none."""

    room: float
    groups: dict[int, list[Any]] = field(default_factory=dict)

    def keeping(self, group: int, batches: Iterable[Any]) -> Iterator[Any]:
        stored, room, fits = list[Any](), self.room, group not in self.groups
        for batch in batches:
            if fits:
                stored.append(batch)
                room -= size_of(batch)
                fits = room >= 0
            if not fits:
                stored.clear()
            yield batch
        self.groups[group] = stored
        self.room = room if fits else self.room


class Split:
    """Read the examples of one split as batches.

    Args:
        name: name for messages.
        data: tensors with the same first extent, as a tuple `(inputs, targets)` or a dict; a
            map-style Dataset; a Hugging Face `Dataset`; a DataLoader, of which only the data set
            and the `collate_fn` are used; or an iterable that yields the same examples whenever it
            is read. An iterable stays in memory if it fits, else every pass reads it again.
        device: device of the returned batches.
        dtype: type of floating tensors.
        subset: examples to use, see `positions_of_subset`; an iterable that is read again yields
            them in its own order.
        reader: reads the data in its thread and context, which should be those where the task was
            built; None for a new one.

    Raises:
        InputError: if the data is none of these, is empty, samples examples, or differs when it is
            read again.
    """

    def __init__(
        self,
        name: str,
        data: object,
        device: torch.device,
        dtype: torch.dtype,
        subset: str | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.name = name
        self._device, self._dtype = device, dtype
        self._reader = reader or Reader()
        # the default dtype for reading data, whatever the precision of the loss
        self._default = torch.get_default_dtype()
        self._source = self._reader.call(torch.no_grad()(open_source), name, data)
        self.total = self._source.total
        draws = self._source.draws if isinstance(self._source, Indexed) else None
        self._draws, self._seeded = draws or 1, draws is not None
        if self.total == 0:
            raise InputError(f"split {name!r} is empty. A loss needs at least one example.")
        self._subset = positions_of_subset(subset, self.total)
        self.examples = self.total if self._subset is None else len(self._subset)
        self.random = subset is not None and "@" in subset and isinstance(self._source, Indexed)
        self._resident: dict[tuple[Order | None, range | None], _Resident] = {}
        self._resident_batch_size = 0

    @torch.no_grad()
    def _read(self, cuts: Iterable[Positions]) -> Generator[Any, None, None]:
        """Yield batches as the data returns them."""
        yield from self._source.batches(cuts, self._subset)

    def sample(self, start: int, stop: int) -> object:
        """Return examples `start` to `stop` as one batch on the device.

        Args:
            start: first position.
            stop: position after the last.
        """
        return self.at(range(start, min(stop, self.examples)))

    def spread(self, count: int) -> Tensor | None:
        """Return evenly spaced positions of some examples; None if examples can only be read in
        order.
        """
        if isinstance(self._source, Stream):
            return None
        count = min(count, self.examples)
        return torch.arange(count, device="cpu") * (self.examples - 1) // max(1, count - 1)

    def at(self, positions: Positions) -> object:
        """Return the examples at some positions as one batch on the device.

        Raises:
            InputError: if they do not form a batch.
        """
        return move(
            self._reader.call(lambda: next(self._read([positions]))), self._device, self._dtype
        )

    def samples(self, cuts: Sequence[range]) -> Iterator[Any]:
        """Yield the examples at ascending ranges of positions, each range as one batch on the
        device.
        """
        items = self._read(cuts)
        try:
            for _ in cuts:  # do not read a stream to its end, where it would be compared
                yield move(self._reader.call(next, items), self._device, self._dtype)
        finally:
            self._reader.close(items)

    @property
    def digest(self) -> str:
        """Return a hash of 256 examples, spaced evenly or the first of a stream, and of the number
        of examples.
        """
        spread, head = self.spread(DIGESTED), range(min(DIGESTED, self.examples))
        # single examples, because several may not stack
        cuts: list[Positions] = [head] if spread is None else list(torch.split(spread, 1))
        return self._reader.call(
            lambda: digest_of(*itertools.islice(self._read(cuts), len(cuts)), self.examples)
        )

    @property
    def in_order_only(self) -> bool:
        """Return whether examples can only be read in order, anew in every pass."""
        return isinstance(self._source, Stream)

    def batches(
        self,
        batch_size: int,
        order: Order | None = None,
        only: range | None = None,
        part: range | None = None,
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield every example once, as `(group, batch)`: groups ascending, each in data-set order
        and cut into its own batches.

        A thread prepares batches that do not stay on the device ahead of use. It reads torch's
        default dtype: do not change that between two batches.

        Args:
            batch_size: examples per batch; the last batch of a group may be smaller.
            order: groups; None for a single group, 0, of all examples.
            only: range of groups to yield; None for all.
            part: range of examples to yield, for a split without groups; None for all.
        """
        assert order is None or part is None, "a part of the data is of those without groups"
        if batch_size != self._resident_batch_size:
            self._resident, self._resident_batch_size = {}, batch_size
        if (order, part) not in self._resident:
            self._resident[order, part] = _Resident(room_on(self._device))
        resident = self._resident[order, part]
        groups = range(len(order.members) if order else 1) if only is None else only
        ready = {group: resident.groups.get(group) for group in groups}
        cuts = {
            group: self._cut(batch_size, order, group, part) for group in groups if not ready[group]
        }
        with contextlib.closing(self._ahead(list(itertools.chain(*cuts.values())))) as coming:
            for group in groups:
                items = ready[group] or resident.keeping(
                    group, itertools.islice(coming, len(cuts[group]))
                )
                for batch in items:
                    yield group, batch
            if cuts and (part is None or part.stop == self.examples):
                next(coming, None)  # at its end, iterable data checks that it did not change

    def _cut(
        self, batch_size: int, order: Order | None, group: int, part: range | None = None
    ) -> list[Positions]:
        if order is not None:
            return list(torch.split(order.members[group], batch_size))
        examples = range(self.examples) if part is None else part
        return [
            examples[start : start + batch_size] for start in range(0, len(examples), batch_size)
        ]

    def _ahead(self, cuts: Sequence[Positions]) -> Generator[Any, None, None]:
        """Yield batches on the device, which the reader prepares up to two ahead of use; raise the
        reader's errors here.

        Reading ends when this generator is closed.
        """
        if not cuts:
            return
        items = self._carried(cuts)
        if torch.get_default_dtype() != self._default or self._seeded:
            yield from self._in_turn(items)
            return
        pending = collections.deque(self._reader.submit(next, items, END) for _ in range(_AHEAD))
        try:
            while (item := self._reader.result(pending.popleft())) is not END:
                pending.append(self._reader.submit(next, items, END))
                yield _here(item)
        finally:
            for waiting in pending:
                waiting.cancel()
            self._reader.close(items)

    def _in_turn(self, items: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Yield items that are read only on request, under the default dtype for reading data.

        All threads share one default dtype and the generators that `Draws` seeds, which a loss may
        use as well.
        """
        try:
            while True:
                with default_dtype(self._default):
                    item = self._reader.call(next, items, END)
                if item is END:
                    return
                yield _here(item)
        finally:
            self._reader.close(items)

    def _carried(self, cuts: Iterable[Positions]) -> Generator[Any, None, None]:
        """Yield batches on the device, or on their way to a GPU."""
        carry = move_ahead if self._device.type == "cuda" else move
        yield from map(
            functools.partial(carry, device=self._device, dtype=self._dtype), self._read(cuts)
        )

    def order(self, group_by: Callable[..., Any] | Tensor | np.ndarray | Sequence[Any]) -> Groups:
        """Return the examples, or their elements, by group.

        Args:
            group_by: one integer or string for every example of the whole split, before the subset;
                or a tensor or array with one for every element of every example; or a function that
                returns these for a batch on the CPU, called as `group_by(*batch)` if the batch is a
                tuple or list.

        Raises:
            InputError: if `group_by` returns something else, or the data cannot be read by
                position.
        """
        return self._reader.call(self._order, group_by)

    def _order(self, group_by: Callable[..., Any] | Tensor | np.ndarray | Sequence[Any]) -> Groups:
        if isinstance(self._source, Stream):
            raise InputError(
                f"split {self.name!r} is an iterable too large to keep in memory, so its examples "
                "cannot be read by group. Give a map-style Dataset, or a machine with more memory."
            )
        parts = self._called(group_by) if callable(group_by) else iter([self._chosen(group_by)])
        first = next(parts)
        if isinstance(first, np.ndarray):
            return element_order(
                self.name, self._all_of(np.ndarray, itertools.chain([first], parts))
            )
        lists = self._all_of(list, itertools.chain([first], parts))
        labels = list(itertools.chain.from_iterable(lists))
        kinds = {int if isinstance(label, bool) else type(label) for label in labels}
        if kinds not in ({int}, {str}):
            raise InputError(
                no_labels(
                    self.name,
                    f"labels of type {' and '.join(sorted(kind.__name__ for kind in kinds))}",
                )
            )
        members: dict[Any, list[int]] = {}
        for position, label in enumerate(labels):
            members.setdefault(label if isinstance(label, str) else int(label), []).append(position)
        ascending = sorted(members)
        return Order(ascending, [torch.tensor(members[label], device="cpu") for label in ascending])

    def _all_of(
        self, kind: type[_Labels], parts: Iterable[list[Any] | np.ndarray]
    ) -> Iterator[_Labels]:
        """Yield labels of batches; all must belong to examples, or all to elements.

        Raises:
            InputError: if the two are mixed.
        """
        for part in parts:
            if not isinstance(part, kind):
                raise InputError(
                    no_labels(
                        self.name, "labels of examples for some batches and of elements for others"
                    )
                )
            yield part

    def _chosen(self, group_by: Any) -> list[Any] | np.ndarray:
        """Return the labels of the subset, from those of the whole split."""
        if is_of_elements(group_by):
            given = element_labels(self.name, group_by, self.total)
            given = given if self._subset is None else given[self._subset.numpy()]
            return np.repeat(given[:, None], self._draws, axis=1)
        labels = _labels(self.name, group_by, self.total)
        return (
            labels if self._subset is None else [labels[index] for index in self._subset.tolist()]
        )

    def _called(self, group_by: Callable[..., Any]) -> Iterator[list[Any] | np.ndarray]:
        cuts = self._cut(_GROUPED_AT_ONCE, None, 0)
        for cut, batch in zip(cuts, self._read(cuts), strict=True):
            answers = [self._labelled(group_by, batch, len(cut)) for _ in range(2)]
            if not _same_labels(*answers):
                raise InputError(
                    f"group_by on split {self.name!r} gave other labels for the same examples. "
                    "Seed its random numbers."
                )
            if cut is cuts[0]:
                self._same_alone(group_by, answers[0])
            yield answers[0]

    def _labelled(
        self, group_by: Callable[..., Any], batch: object, count: int
    ) -> list[Any] | np.ndarray:
        """Return the labels of a batch: one for each example, or an array of labels of elements,
        (examples, draws, *elements of an example).

        Raises:
            InputError: if the draws of an example have different labels.
        """
        batch = change_tensors(batch, Tensor.cpu)
        with user_code(f"group_by on split {self.name!r} failed"):
            answer = group_by(*batch) if isinstance(batch, tuple | list) else group_by(batch)
            if is_of_elements(answer):
                of_draws = element_labels(self.name, answer, count * self._draws)
                return of_draws.reshape(count, self._draws, *of_draws.shape[1:])
            labels = _labels(self.name, answer, count * self._draws)
        of_examples = labels[:: self._draws]
        for draw in range(1, self._draws):
            differs = next(
                (
                    index
                    for index, label in enumerate(labels[draw :: self._draws])
                    if label != of_examples[index]
                ),
                None,
            )
            if differs is not None:
                raise InputError(
                    no_labels(
                        self.name,
                        f"{of_examples[differs]!r} and {labels[differs * self._draws + draw]!r} for "
                        "two draws of one example, which must have the same label",
                    )
                )
        return of_examples

    def _same_alone(self, group_by: Callable[..., Any], labels: list[Any] | np.ndarray) -> None:
        """Check that the labels in the first batch equal those of its examples alone.

        Try examples of the rarest labels, or some evenly spaced ones.

        Raises:
            InputError: if a label differs.
        """
        if isinstance(labels, np.ndarray):
            tried = np.linspace(0, len(labels) - 1, min(_ALONE, len(labels)), dtype=int).tolist()
        else:
            counts = collections.Counter(labels)
            tried = sorted(range(len(labels)), key=lambda index: counts[labels[index]])[:_ALONE]
        for index in tried:
            try:
                alone = self._labelled(group_by, next(self._read([range(index, index + 1)])), 1)
            except InputError:
                return  # it does not accept a single example, which does not make its order wrong
            if not _same_labels(alone, labels[index : index + 1]):
                shown = (
                    f"for example {index}"
                    if isinstance(labels, np.ndarray)
                    else f"{labels[index]!r} for example {index}, {alone[0]!r} for it alone"
                )
                raise InputError(
                    f"group_by on split {self.name!r} gives labels in another order than the "
                    f"examples ({shown}): the collate_fn reorders a batch, or a label depends on "
                    "other examples of the batch. Give the labels of the whole split as a list instead."
                )


def _here(batch: object) -> object:
    """Return a batch for use on the current stream, waiting for its transfer if needed."""
    return batch.here() if isinstance(batch, Arriving) else batch


def _same_labels(one: list[Any] | np.ndarray, other: list[Any] | np.ndarray) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return type(one) is type(other) and np.array_equal(one, other)
    return one == other


def saved_bytes(split: Split, forward: Callable[[Any], Any]) -> float:
    """Return the bytes that autograd saves per example, measured in one forward pass over two
    examples.

    Args:
        split: the split.
        forward: computes the loss of a batch.
    """
    count = min(2, split.examples)
    saved: dict[int, int] = {}
    packed: list[torch.Tensor] = []

    def add_up(tensor: torch.Tensor) -> int:
        # return an index into a list: a graph that refers to its own results is never freed
        packed.append(tensor)
        own = tensor if tensor._base is None else tensor._base
        # a weight or its transpose does not depend on the batch
        if own.is_leaf and own.requires_grad:
            return len(packed) - 1
        for part in dense_parts(tensor):
            saved[part.data_ptr()] = max(
                saved.get(part.data_ptr(), 0), part.numel() * part.element_size()
            )
        return len(packed) - 1

    try:
        with torch.autograd.graph.saved_tensors_hooks(add_up, packed.__getitem__):
            forward(split.sample(0, count))
    except InputError:
        # torch.func transforms reject such hooks; any other error will occur again
        written = _Written()
        with written:
            forward(split.sample(0, count))
        return max(1, written.bytes) / count
    finally:
        packed.clear()
    return max(1, sum(saved.values())) / count


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of every result that operations write into new memory, which include those
    saved for the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        results = function(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if _is_dense(tensor)
        }
        for tensor in tree_leaves(results):
            if _is_dense(tensor) and tensor.untyped_storage()._cdata not in known:
                self.bytes += tensor.numel() * tensor.element_size()
        return results


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def automatic_batch_size(saved: float, parameters: int, device: torch.device) -> int:
    """Choose a batch size from shapes alone, a power of two, so that the same model and data always
    get the same batches.

    A batch saves at most 64 MiB on a CPU (for MNIST-FC, MNIST-LeNet and ResNet-20 within 8 % of the
    fastest size tried) and 2 GiB on a GPU, or twice the bytes of the parameters if that is more:
    every batch reads all parameters and writes all their gradients, which takes most of the time
    with small batches of a large model.

    Args:
        saved: bytes that autograd saves per example.
        parameters: size of the model's parameters in bytes.
        device: device of the computation.
    """
    budget, most = (
        (_CUDA_SAVED_BYTES, 2**16) if device.type == "cuda" else (_CPU_SAVED_BYTES, 2**11)
    )
    return power_of_two(min(most, max(budget, _SAVED_PER_PARAMETER * parameters) / saved))


def power_of_two(most: float) -> int:
    """Return the largest power of two up to `most`, and at least 1.

    >>> [power_of_two(most) for most in (0.3, 1, 7, 8)]
    [1, 1, 4, 8]
    """
    return int(2 ** (max(1, int(most)).bit_length() - 1))
