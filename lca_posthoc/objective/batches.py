"""A split as batches, whole or group by group: resident on the device when they fit, streamed ahead of use when they do not."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from ..errors import InputError

_CPU_SAVED_BYTES = 32 * 2**20
_CUDA_SAVED_BYTES = 2 * 2**30
_RESIDENT_SHARE = 0.25
_AHEAD = 2
_DIGESTED = 256
_GROUPED_AT_ONCE = 1024
_END = object()
_CPU = torch.device("cpu")

Positions = range | Tensor
Collate = Callable[[list[Any]], Any]


def _each(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """A batch with every tensor in it changed, all else as it is."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _each(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_each(value, change) for value in batch)
    return batch


def move(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A batch on the device; floating tensors in the dtype of the computation, all others as they are."""
    return _each(batch, lambda each: each.detach().to(device, dtype if each.is_floating_point() else each.dtype))


def _bytes(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return sum(_bytes(value) for value in batch.values())
    if isinstance(batch, tuple | list):
        return sum(_bytes(value) for value in batch)
    return int(getattr(batch, "nbytes", 0) or sys.getsizeof(batch))


def _room(device: torch.device) -> float:
    """Bytes a split may occupy: a share of what is free now; it decides speed, never a result."""
    if device.type == "cuda":
        return _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return _RESIDENT_SHARE * float(psutil.virtual_memory().available)


def _feed(digest: hashlib.blake2b, batch: Any) -> None:
    """Names, shapes, dtypes and bytes of a batch into a hash; an object that is none of these counts by its type."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            digest.update(f"{key!r}:".encode())
            _feed(digest, value)
    elif isinstance(batch, tuple | list):
        digest.update(f"{len(batch)} of:".encode())
        for value in batch:
            _feed(digest, value)
    elif isinstance(batch, Tensor):
        digest.update(f"{batch.dtype}{list(batch.shape)}".encode())
        digest.update(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(batch, np.ndarray | str | bytes | int | float | None):
        digest.update(f"{batch.tolist() if isinstance(batch, np.ndarray) else batch!r};".encode())
    else:
        digest.update(type(batch).__qualname__.encode())


def _digest(*batches: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, batches)
    return digest.hexdigest()


@contextlib.contextmanager
def _user_code(doing: str, advice: str = "") -> Iterator[None]:
    """Errors of the user's data become ours, with the split they happened on."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{doing}: {type(error).__name__}: {error}{advice}") from error


def _at(tensor: Tensor, positions: Positions) -> Tensor:
    return tensor[positions.start : positions.stop] if isinstance(positions, range) else tensor[positions]


@dataclass(frozen=True)
class _Indexed:
    """Examples that are had by position."""

    name: str
    total: int
    read: Callable[[Positions], Any]

    def batches(self, cuts: Iterable[Positions], subset: Tensor | None) -> Iterator[Any]:
        for cut in cuts:
            positions = cut if subset is None else _at(subset, cut)
            with _user_code(
                f"{len(positions)} examples of split {self.name!r}, from {int(positions[0])} to {int(positions[-1])}, cannot be "
                "made into a batch",
                ". Give a map-style Dataset of tensors, numbers, or tuples and dicts of them.",
            ):
                batch = self.read(positions)
            yield batch


@dataclass(frozen=True)
class _Stream:
    """Examples that are had in order only, and read anew at every pass."""

    name: str
    total: int
    data: Iterable[Any]
    collate: Collate
    passes: dict[int, list[bytes]] = field(default_factory=dict)

    def batches(self, cuts: Iterable[Positions], subset: Tensor | None) -> Iterator[Any]:
        """One batch for each range of positions, ascending; a subset is read in the order of the data."""
        with _user_code(f"split {self.name!r} cannot be read"):
            items = iter(self.data)
        if subset is not None:
            wanted = torch.zeros(int(subset.max()) + 1, dtype=torch.bool)
            wanted[subset] = True
            items = itertools.compress(items, wanted.tolist())
        at, size, digest = 0, 0, hashlib.blake2b(digest_size=16)
        for cut in cuts:
            assert isinstance(cut, range)
            size = size or len(cut)
            with _user_code(f"split {self.name!r} cannot be read"):
                examples = list(itertools.islice(items, cut.start - at, cut.stop - at))
                if len(examples) < len(cut):
                    raise self._changed("fewer examples")
                batch, at = self.collate(examples), cut.stop
            passes = self.passes.setdefault(size, [])
            if len(passes) < 2:
                _feed(digest, batch)
            yield batch
        with _user_code(f"split {self.name!r} cannot be read"):
            if next(items, _END) is not _END:
                raise self._changed("more examples")
        if len(passes) < 2:
            passes.append(digest.digest())
        if passes[0] != passes[-1]:
            raise self._changed("other examples")

    def _changed(self, what: str) -> InputError:
        return _unsteady(self.name, f"{what} than the {self.total} of its first pass")


def _unsteady(name: str, what: str) -> InputError:
    return InputError(
        f"split {name!r} gives {what} when it is read again. Seed the generator in __iter__, so that every pass gives the same "
        "examples in the same order, and leave random augmentation out."
    )


def _source(name: str, data: Any) -> _Indexed | _Stream:
    """How the examples are had, by what the data is; containers that are more likely columns are not guessed at."""
    if isinstance(data, DataLoader):
        _check_loader(name, data)
        served = _iterated if isinstance(data.dataset, IterableDataset) else _items
        return served(name, data.dataset, data.collate_fn)
    inside = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, tuple | list) else []
    columns = isinstance(data, Mapping | tuple) or any(isinstance(each, Tensor) for each in inside)
    if (
        columns
        and inside
        and not isinstance(data, list)
        and all(isinstance(each, Tensor) and each.dim() for each in inside)
    ):
        return _columns(name, data, sorted({len(each) for each in inside}))
    hugging_face = type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "with_format")
    once = isinstance(data, Iterator)
    if not (columns or once or isinstance(data, str | Set | type)):
        if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
            return _table(name, data) if hugging_face else _items(name, data, default_collate)
        if hasattr(data, "__iter__"):
            return _iterated(name, data.with_format("torch") if hugging_face else data, default_collate)
    kinds = f" of {', '.join(sorted({type(each).__name__ for each in inside}))}" if inside else ""
    raise InputError(
        f"split {name!r} is a {type(data).__name__}{kinds}{', which can be read only once' if once else ''}. Give (inputs, "
        "targets) tensors, a dict of tensors, a map-style Dataset with __len__ and __getitem__, a DataLoader, or an iterable "
        "that can be read again."
    )


def _columns(name: str, data: Any, lengths: list[int]) -> _Indexed:
    if len(lengths) != 1:
        raise InputError(
            f"split {name!r} has tensors of different lengths: {lengths}. Give one entry per example: one target per input."
        )
    plain = dict(data) if isinstance(data, Mapping) else data
    return _Indexed(name, lengths[0], lambda positions: _each(plain, lambda column: _at(column, positions)))


def _items(name: str, data: Any, collate: Collate) -> _Indexed:
    """A map-style data set, read as a DataLoader reads it: at once where it has `__getitems__`, else one by one."""

    def read(positions: Positions) -> Any:
        indices = list(positions) if isinstance(positions, range) else positions.tolist()
        at_once = getattr(data, "__getitems__", None)
        return collate(at_once(indices) if at_once else [data[index] for index in indices])

    return _Indexed(name, len(data), read)


def _table(name: str, data: Any) -> _Indexed:
    """A Hugging Face data set, read as columns; its own format is kept where it gives arrays."""
    table = data if data.format["type"] in ("torch", "numpy", "custom") else data.with_format("torch")

    def read(positions: Positions) -> Any:
        inside = slice(positions.start, positions.stop) if isinstance(positions, range) else positions.tolist()
        batch = default_convert(table[inside])  # type: ignore[no-untyped-call]
        for column, values in batch.items():
            if any(isinstance(each, Tensor | np.ndarray) for each in values) and not isinstance(values, Tensor):
                raise InputError(
                    f"column {column!r} of split {name!r} has examples of different shapes. Pad them, or give "
                    "DataLoader(dataset, collate_fn=...) with the collate_fn of your training."
                )
        return batch

    return _Indexed(name, len(data), read)


def _check_loader(name: str, loader: DataLoader[Any]) -> None:
    """Refuse a loader that gives something else than every example once."""
    batching = loader.batch_sampler
    if batching is None:
        raise InputError(
            f"split {name!r} is a DataLoader with batch_size=None, whose examples may be batches already. Give one with a batch "
            "size (any), over single examples."
        )
    sampler: Any = batching.sampler if type(batching) is BatchSampler else batching
    if isinstance(loader.dataset, IterableDataset):
        return
    every = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    if not every or len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
        raise InputError(
            f"split {name!r} is a DataLoader whose {type(sampler).__name__} selects or weighs examples; a loss is a mean over "
            "every example once. Give DataLoader(dataset, collate_fn=...) without a sampler; where some examples are meant, over "
            "torch.utils.data.Subset(dataset, indices)."
        )


def _iterated(name: str, data: Any, collate: Collate) -> _Indexed | _Stream:
    """Iterable data, read through once: kept in host memory where it fits, else read anew at every pass."""
    head, kept, room, total = list[Any](), list[Any](), _room(_CPU), 0
    with _user_code(f"split {name!r} cannot be read"):
        for item in data:
            total += 1
            if total <= _DIGESTED:
                head.append(item)
            room -= _bytes(item)
            if room >= 0:
                kept.append(item)
            else:
                kept.clear()
        again = list(itertools.islice(data, len(head)))
        if len(again) < len(head) or (head and _digest(collate(head)) != _digest(collate(again))):
            raise _unsteady(name, "other examples")
    return _items(name, kept, collate) if len(kept) == total else _Stream(name, total, data, collate)


def chosen(subset: str | None, total: int) -> Tensor | None:
    """The positions a subset stands for, in their order; None for every one.

    Args:
        subset: `"A:B"` (either may be left out), `"I,J,K"`, or `"FRACTION@SEED"`, a random sample in the order it is drawn.
        total: examples there are.

    Raises:
        InputError: where it is malformed, repeats a position, or is out of range.

    >>> chosen("2:5", 10)
    tensor([2, 3, 4])
    >>> chosen("7,0", 10)
    tensor([7, 0])
    >>> len(chosen("0.25@7", 12))
    3
    """
    if subset is None:
        return None
    problem = "is not understood"
    if match := re.fullmatch(r"(\d*):(\d*)", subset):
        start, stop = int(match[1] or 0), int(match[2] or total)
        if start < stop <= total:
            return torch.arange(start, stop)
        problem = f"is empty or goes beyond the {total} examples"
    elif re.fullmatch(r"\d+(,\d+)*", subset):
        positions = [int(each) for each in subset.split(",")]
        if len(set(positions)) == len(positions) and max(positions) < total:
            return torch.tensor(positions)
        problem = f"repeats a position or goes beyond the {total} examples"
    elif match := re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)@(\d{1,18})", subset):
        count = round(float(match[1]) * total)
        if 0 < float(match[1]) < 1 and count:
            return torch.randperm(total, generator=torch.Generator().manual_seed(int(match[2])))[:count]
        problem = f"is not a fraction between 0 and 1 that gives at least one of {total} examples"
    raise InputError(
        f"--subset {subset!r} {problem}. Give positions A:B (from A up to, not including, B; either may be left out), a list "
        "I,J,K of positions, or FRACTION@SEED, such as 0.1@7, for a random sample."
    )


@dataclass(frozen=True, eq=False)
class Order:
    """The examples of a split by group.

    Attributes:
        labels: ascending.
        members: positions of each label's examples, ascending; int64.
    """

    labels: list[int] | list[str]
    members: list[Tensor]

    @property
    def counts(self) -> list[int]:
        """Examples of each group."""
        return [len(each) for each in self.members]


def _labels(name: str, given: Any, count: int) -> list[Any]:
    """What stands for `count` labels, as a list of plain objects."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise _no_labels(name, f"a {type(given).__name__}, not a list of labels")
    if len(values) != count:
        raise _no_labels(name, f"{len(values)} labels for {count} examples")
    return [each.item() if getattr(each, "ndim", None) == 0 else each for each in values]


def _no_labels(name: str, what: str) -> InputError:
    return InputError(
        f"group_by on split {name!r} gave {what}. Give one integer or string for every example: a 1-d tensor, array or list of "
        "the whole split, or a function of a batch that returns one for the batch."
    )


@dataclass
class _Resident:
    """The batches that stay on the device, by group; none for a group that does not fit."""

    cut_by: tuple[int, Order | None]
    room: float = 0
    groups: dict[int, list[Any]] = field(default_factory=dict)

    def keeping(self, group: int, batches: Iterable[Any]) -> Iterator[Any]:
        kept, room, fits = list[Any](), self.room, group not in self.groups
        for batch in batches:
            if fits:
                kept.append(batch)
                room -= _bytes(batch)
                fits = room >= 0
            if not fits:
                kept.clear()
            yield batch
        self.groups[group] = kept
        self.room = room if fits else self.room


class Split:
    """The examples of one split, as batches.

    Args:
        name: for messages.
        data: tensors with the same first extent, as a tuple `(inputs, targets)` or a dict; a map-style Dataset; a Hugging Face
            `Dataset`; a DataLoader, of which the data set and the `collate_fn` are used, while order, batch size and workers
            are ours; or an iterable that gives the same examples whenever it is read: kept in memory if it fits, else read
            anew at every pass.
        device: where batches are wanted.
        dtype: of floating tensors.
        subset: which examples, see `chosen`; an iterable that is read anew gives them in its own order.

    Raises:
        InputError: where the data is none of these, is empty, selects examples, or is different when it is read again.
    """

    def __init__(
        self, name: str, data: Any, device: torch.device, dtype: torch.dtype, subset: str | None = None
    ) -> None:
        self.name = name
        self._device, self._dtype = device, dtype
        with torch.no_grad():
            self._source = _source(name, data)
        self.total = self._source.total
        if self.total == 0:
            raise InputError(f"split {name!r} is empty. A loss needs at least one example.")
        self._subset = chosen(subset, self.total)
        self.examples = self.total if self._subset is None else len(self._subset)
        self.random = subset is not None and "@" in subset and isinstance(self._source, _Indexed)
        self._resident = _Resident((0, None))

    @torch.no_grad()
    def _read(self, cuts: Iterable[Positions]) -> Iterator[Any]:
        """Batches as the data gives them."""
        yield from self._source.batches(cuts, self._subset)

    def sample(self, start: int, stop: int) -> Any:
        """Examples `start` to `stop` as one batch on the device."""
        return move(next(self._read([range(start, min(stop, self.examples))])), self._device, self._dtype)

    @property
    def digest(self) -> str:
        """A hash of the first 256 examples and of how many there are."""
        return _digest(next(self._read([range(min(_DIGESTED, self.examples))])), self.examples)

    def batches(
        self, batch_size: int, order: Order | None = None, only: range | None = None
    ) -> Generator[tuple[int, Any], None, None]:
        """Every example once, as `(group, batch)`: groups ascending, each in data-set order and cut into its own batches.

        Batches that do not stay on the device are made by a thread, ahead of use; iterate under one default dtype, which it sees.

        Args:
            batch_size: examples of a batch; the last of a group may be smaller.
            order: the groups; None for one, 0, of every example.
            only: the groups wanted.
        """
        if self._resident.cut_by != (batch_size, order):
            self._resident = _Resident((batch_size, order))  # what was there is gone before room is measured
            self._resident.room = _room(self._device)
        resident = self._resident
        groups = range(len(order.members) if order else 1) if only is None else only
        ready = {group: resident.groups.get(group) for group in groups}
        cuts = {group: self._cut(batch_size, order, group) for group in groups if not ready[group]}
        with contextlib.closing(_ahead(map(self._carried, self._read(itertools.chain(*cuts.values()))))) as coming:
            for group in groups:
                found = ready[group] or resident.keeping(group, itertools.islice(coming, len(cuts[group])))
                for batch in found:
                    yield group, batch
            if cuts:
                next(coming, None)  # iterable data says at its end whether it was the same again

    def _cut(self, batch_size: int, order: Order | None, group: int) -> list[Positions]:
        if order is not None:
            return list(torch.split(order.members[group], batch_size))
        return [range(start, min(start + batch_size, self.examples)) for start in range(0, self.examples, batch_size)]

    def _carried(self, batch: Any) -> Any:
        """A batch on the device; to a GPU it goes from pinned memory, so that nobody waits for it."""
        if self._device.type != "cuda":
            return move(batch, self._device, self._dtype)

        def carried(each: Tensor) -> Tensor:
            each = move(each, each.device, self._dtype)
            return each.to(self._device) if each.is_cuda else each.pin_memory().to(self._device, non_blocking=True)

        with torch.cuda.device(self._device):
            return _each(batch, carried)

    def order(self, group_by: Callable[..., Any] | Tensor | np.ndarray | Sequence[Any]) -> Order:
        """The examples by group.

        Args:
            group_by: one integer or string for every example of the whole split, before the subset; or a function that gives
                one for every example of a batch on the CPU, called as `group_by(*batch)` where the batch is a tuple or list.

        Raises:
            InputError: where it gives something else, or the data cannot be read by position.
        """
        if isinstance(self._source, _Stream):
            raise InputError(
                f"split {self.name!r} is an iterable too large to keep in memory, so its examples cannot be had by group. Give "
                "a map-style Dataset, or a machine with more memory."
            )
        if callable(group_by):
            labels = list(itertools.chain.from_iterable(self._called(group_by)))
        else:
            labels = _labels(self.name, group_by, self.total)
            labels = labels if self._subset is None else [labels[index] for index in self._subset.tolist()]
        kinds = {int if isinstance(label, bool) else type(label) for label in labels}
        if kinds not in ({int}, {str}):
            raise _no_labels(self.name, f"labels of type {' and '.join(sorted(kind.__name__ for kind in kinds))}")
        members: dict[Any, list[int]] = {}
        for position, label in enumerate(labels):
            members.setdefault(label if isinstance(label, str) else int(label), []).append(position)
        return Order(sorted(members), [torch.tensor(members[label]) for label in sorted(members)])

    def _called(self, group_by: Callable[..., Any]) -> Iterator[list[Any]]:
        cuts = self._cut(_GROUPED_AT_ONCE, None, 0)
        for cut, batch in zip(cuts, self._read(cuts), strict=True):
            batch = _each(batch, Tensor.cpu)
            with _user_code(f"group_by on split {self.name!r} failed"):
                given = group_by(*batch) if isinstance(batch, tuple | list) else group_by(batch)
            yield _labels(self.name, given, len(cut))


def _ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The items of an iterator, made by a thread up to two ahead of use; it ends with this, and its errors are raised here."""
    pool = ThreadPoolExecutor(1)
    try:
        pending = collections.deque(pool.submit(next, items, _END) for _ in range(_AHEAD))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def automatic_batch_size(split: Split, forward: Callable[[Any], Any], device: torch.device) -> int:
    """A power of two chosen from shapes alone, so that the same model and data always get the same batches.

    The bytes autograd saves for one example are counted on one forward pass of two; a batch saves at most 32 MiB on a CPU
    (what stays near the cache) and 2 GiB on a GPU.
    """
    count = min(2, split.examples)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):  # a weight is saved once, whatever the batch
            saved[tensor.data_ptr()] = max(saved.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward(split.sample(0, count))
    del kept
    budget, most = (_CUDA_SAVED_BYTES, 2**16) if device.type == "cuda" else (_CPU_SAVED_BYTES, 2**11)
    fits = max(1, budget * count // max(1, sum(saved.values())))
    return int(min(most, 2 ** (fits.bit_length() - 1)))
