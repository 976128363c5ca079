"""Read the examples of a split, by index or as a stream, depending on the user's data."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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

from ...base.available_memory import free_memory
from ...errors import InputError
from .containers import change_tensors, digest_of, feed, rows, size_of
from .device_errors import is_out_of_memory
from .draws import Draws
from .transfers import Arriving, Copy, to_device

_RESIDENT_SHARE = 0.25
DIGESTED = 256
END = object()
_CPU = torch.device("cpu")

Positions = range | Tensor
Collate = Callable[[list[Any]], Any]


def move(batch: object, device: torch.device, dtype: torch.dtype) -> object:
    """Move a batch to the device, with floating tensors in the dtype of the computation and all
    others unchanged.

    Args:
        batch: the batch.
        device: target device.
        dtype: type of floating tensors.

    Raises:
        InputError: if a tensor, or an object that holds tensors, cannot be moved or converted.
    """

    def moved(tensor: Tensor) -> Tensor:
        return converted(tensor, dtype).to(device)

    with _moving(device, dtype):
        return change_tensors(batch, moved, _to(device))


def move_ahead(batch: object, device: torch.device, dtype: torch.dtype) -> Arriving[object]:
    """Start to move a batch to a GPU as `move` does, without waiting for the copies.

    Args:
        batch: the batch.
        device: target device.
        dtype: type of floating tensors.
    """

    def load(copy: Copy) -> object:
        def moved(tensor: Tensor) -> Tensor:
            tensor = converted(tensor, dtype)
            plain = tensor.layout == torch.strided and not tensor.is_nested
            is_ours = tensor.device.type == "cpu" and plain and type(tensor) is Tensor
            return copy(tensor) if is_ours else tensor.to(device)

        return change_tensors(batch, moved, _to(device))

    with _moving(device, dtype), torch.cuda.device(device):
        return to_device(device, "batches").begin(load)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor without gradient, on its device, and in `dtype` if it is floating; the same
    tensor if nothing changes.

    Args:
        tensor: the tensor.
        dtype: type of floating tensors.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_inference():  # autograd cannot save inference tensors
        tensor = tensor.clone()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _to(device: torch.device) -> Callable[[Any], Any] | None:
    """Return a function that moves an object by its own method `to`, such as a graph's; None if
    batches lie on the CPU anyway.
    """
    if device.type == "cpu":
        return None

    def moved(thing: object) -> object:
        to = getattr(thing, "to", None)
        if not callable(to):
            return thing
        try:
            copy = to(device)
        except Exception:  # this `to` does something else, such as converting units
            return thing
        return copy if type(copy) is type(thing) else thing

    return moved


@contextlib.contextmanager
def _moving(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"a batch cannot be moved to {device} and {str(dtype).removeprefix('torch.')}: "
            f"{type(error).__name__}: {error}. Give tensors of another layout or type from the "
            "data set or its collate_fn."
        ) from error


def room_on(device: torch.device) -> float:
    """Return the bytes a split may occupy, a share of the free memory; this affects speed but never
    a result.
    """
    return _RESIDENT_SHARE * (free_on(device) if device.type == "cuda" else free_memory())


def free_on(device: torch.device) -> float:
    """Return the free bytes on a GPU, including those that torch caches but does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


@contextlib.contextmanager
def user_code(doing: str, advice: str = "") -> Iterator[None]:
    """Convert errors in the user's data code to `InputError`.

    Args:
        doing: start of the message.
        advice: end of the message.

    Raises:
        InputError: if the body raises an error other than out of memory.
        Exception: if memory runs out.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{doing}: {type(error).__name__}: {error}{advice}") from error


@dataclass(frozen=True)
class Indexed:
    """Read examples at any position, each with its draws, which follow each other in a batch."""

    name: str
    total: int
    read: Callable[[Positions], Any]
    draws: int | None = None

    def batches(self, cuts: Iterable[Positions], subset: Tensor | None) -> Iterator[Any]:
        """Yield one batch for each set of positions.

        Args:
            cuts: the sets of positions; they count within the subset, if there is one.
            subset: positions of the subset, or None.
        """
        for cut in cuts:
            positions = cut if subset is None else rows(subset, cut)
            with user_code(
                f"{len(positions)} examples of split {self.name!r}, from {int(positions[0])} to "
                f"{int(positions[-1])}, cannot be made into a batch",
                ". Give a map-style Dataset of tensors, numbers, or tuples and dicts of them; for "
                "other examples DataLoader(dataset, collate_fn=...) with the collate_fn of your "
                "training.",
            ):
                batch = self.read(positions)
            yield batch


@dataclass(frozen=True)
class Stream:
    """Read examples that are only available in order, anew in every pass."""

    name: str
    total: int
    data: Iterable[Any]
    collate: Collate
    passes: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)

    def batches(self, cuts: Iterable[Positions], subset: Tensor | None) -> Iterator[Any]:
        """Yield one batch for each ascending range of positions.

        Args:
            cuts: the ranges.
            subset: positions of a subset, read in the order of the data, or None.

        Raises:
            InputError: if the data cannot be read, or changed since the first pass.
        """
        with user_code(f"split {self.name!r} cannot be read"):
            items = iter(self.data)
        if subset is not None:
            chosen = torch.zeros(int(subset.max()) + 1, dtype=torch.bool, device="cpu")
            chosen[subset] = True
            items = itertools.compress(items, chosen.tolist())
        position, first, digest = 0, (0, 0), hashlib.blake2b(digest_size=16)
        for cut in cuts:
            assert isinstance(cut, range)
            first = first if any(first) else (cut.start, len(cut))
            with user_code(f"split {self.name!r} cannot be read"):
                examples = list(itertools.islice(items, cut.start - position, cut.stop - position))
                if len(examples) < len(cut):
                    raise InputError(self._changed("fewer examples"))
                batch, position = self.collate(examples), cut.stop
            passes = self.passes.setdefault(first, [])
            if len(passes) < 2:
                feed(digest, batch)
            yield batch
        with user_code(f"split {self.name!r} cannot be read"):
            if next(items, END) is not END:
                raise InputError(self._changed("more examples"))
        if len(passes) < 2:
            passes.append(digest.digest())
        if passes[0] != passes[-1]:
            raise InputError(self._changed("other examples"))

    def _changed(self, what: str) -> str:
        return _unsteady(self.name, f"{what} than the {self.total} of its first pass")


def _unsteady(name: str, what: str) -> str:
    return (
        f"split {name!r} yields {what} when it is read again. Seed the generator in __iter__, so "
        "that every pass yields the same examples in the same order, and leave out random "
        "augmentation."
    )


def _columns(name: str, data: object) -> Indexed:
    """Read examples whose parts are tensors, one for each part.

    Raises:
        InputError: if the tensors have different lengths.
    """
    lengths = sorted({len(part) for part in _inside(data)})
    if len(lengths) != 1:
        raise InputError(
            f"split {name!r} has tensors of different lengths: {lengths}. Give one entry per "
            "example: one target per input."
        )
    plain = dict(data) if isinstance(data, Mapping) else data
    return Indexed(
        name,
        lengths[0],
        lambda positions: change_tensors(plain, lambda column: rows(column, positions)),
    )


def _items(name: str, data: Any, collate: Collate = default_collate) -> Indexed:
    """Read a map-style data set as a DataLoader does: with `__getitems__` if it exists, else one by
    one.
    """

    def read(positions: Positions) -> object:
        indices = list(positions) if isinstance(positions, range) else positions.tolist()
        at_once = getattr(data, "__getitems__", None)
        return collate(at_once(indices) if at_once else [data[index] for index in indices])

    return Indexed(name, len(data), read)


def _drawn(name: str, data: Draws) -> Indexed:
    """Read examples so that a batch holds all draws of each."""
    collate = default_collate
    if isinstance(data.data, DataLoader):
        _check_loader(name, data.data)
        collate = data.data.collate_fn

    def read(positions: Positions) -> object:
        indices = list(positions) if isinstance(positions, range) else positions.tolist()
        return collate([example for index in indices for example in data[index]])

    return Indexed(name, len(data), read, data.draws)


def _table(name: str, data: Any) -> Indexed:
    """Read a Hugging Face data set as columns, in its own format if that returns arrays."""
    table = (
        data if data.format["type"] in ("torch", "numpy", "custom") else data.with_format("torch")
    )

    def read(positions: Positions) -> object:
        inside = (
            slice(positions.start, positions.stop)
            if isinstance(positions, range)
            else positions.tolist()
        )
        batch = default_convert(table[inside])  # type: ignore[no-untyped-call]
        for column, values in batch.items():
            if any(isinstance(value, Tensor | np.ndarray) for value in values) and not isinstance(
                values, Tensor
            ):
                raise InputError(
                    f"column {column!r} of split {name!r} has examples of different shapes. Pad "
                    "them, or give DataLoader(dataset, collate_fn=...) with the collate_fn of your "
                    "training."
                )
        return batch

    return Indexed(name, len(data), read)


def _streamed_table(name: str, data: Any) -> Indexed | Stream:
    """Read a Hugging Face data set that is only available in order."""
    return _iterated(name, data.with_format("torch"))


def _loaded(name: str, loader: DataLoader[Any]) -> Indexed | Stream:
    """Read the examples of a DataLoader, ignoring its order, batch size and workers."""
    _check_loader(name, loader)
    by_position = not isinstance(loader.dataset, IterableDataset)
    return (_items if by_position else _iterated)(name, loader.dataset, loader.collate_fn)


def _check_loader(name: str, loader: DataLoader[Any]) -> None:
    """Check that a loader returns every example once.

    Raises:
        InputError: if it does not.
    """
    batching = loader.batch_sampler
    if batching is None:
        raise InputError(
            f"split {name!r} is a DataLoader with batch_size=None, whose examples may be batches "
            "already. Give one with a batch size (any), over single examples."
        )
    sampler: Any = batching.sampler if type(batching) is BatchSampler else batching
    if isinstance(loader.dataset, IterableDataset):
        return
    every = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement
    )
    if not every or len(sampler) != len(loader.dataset):  # type: ignore[arg-type]
        raise InputError(
            f"split {name!r} is a DataLoader whose {type(sampler).__name__} selects or weights "
            "examples; a loss is a mean over every example once. Give DataLoader(dataset, "
            "collate_fn=...) without a sampler; to use only some examples, give it "
            "torch.utils.data.Subset(dataset, indices)."
        )


def _iterated(name: str, data: Any, collate: Collate = default_collate) -> Indexed | Stream:
    """Read iterable data once; then return its items from host memory if they fit, else read them
    anew in every pass.

    Raises:
        InputError: if the data cannot be read, or differs when it is read again.
    """
    head, items, room, total = list[Any](), list[Any](), room_on(_CPU), 0
    with user_code(f"split {name!r} cannot be read"):
        for item in data:
            total += 1
            if total <= DIGESTED:
                head.append(item)
            room -= size_of(item)
            if room >= 0:
                items.append(item)
            else:
                items.clear()
        again = list(itertools.islice(data, len(head)))
        if len(again) < len(head) or (
            head and digest_of(collate(head)) != digest_of(collate(again))
        ):
            raise InputError(_unsteady(name, "other examples"))
    return (
        _items(name, items, collate) if len(items) == total else Stream(name, total, data, collate)
    )


@dataclass(frozen=True)
class _Kind:
    """Describe a kind of data that a split may be.

    Attributes:
        recognises: returns whether data are of this kind.
        open: returns a reader of the examples of a split, from its name and data; None if this kind
            is rejected.
    """

    recognises: Callable[[Any], bool]
    open: Callable[[str, Any], Indexed | Stream] | None


def _is_columns(data: object) -> bool:
    """Return whether data are tensors of several columns, each with an entry per example."""
    return (
        isinstance(data, tuple | Mapping)
        and bool(parts := _inside(data))
        and all(isinstance(part, Tensor) and part.dim() for part in parts)
    )


def _may_be_columns(data: object) -> bool:
    """Return whether data could be either columns or examples."""
    return isinstance(data, Mapping | tuple) or any(
        isinstance(part, Tensor) for part in _inside(data)
    )


def _inside(data: object) -> Sequence[Any]:
    """Return the parts of a built-in container; an empty list for other data."""
    if isinstance(data, Mapping):
        return list(data.values())
    return data if isinstance(data, tuple | list) else []


def _is_of_hugging_face(data: object) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "with_format")


def _has_positions(data: object) -> bool:
    """Return whether examples can be read by position."""
    return (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, IterableDataset)
    )


# the first kind that recognises the data reads them
_KINDS = (
    _Kind(lambda data: isinstance(data, Draws), _drawn),
    _Kind(lambda data: isinstance(data, DataLoader), _loaded),
    _Kind(_is_columns, _columns),
    _Kind(_may_be_columns, None),
    _Kind(lambda data: isinstance(data, Iterator | str | Set | type), None),
    _Kind(lambda data: _has_positions(data) and _is_of_hugging_face(data), _table),
    _Kind(_has_positions, _items),
    _Kind(lambda data: hasattr(data, "__iter__") and _is_of_hugging_face(data), _streamed_table),
    _Kind(lambda data: hasattr(data, "__iter__"), _iterated),
)


def open_source(name: str, data: object) -> Indexed | Stream:
    """Return a reader of the examples for the kind of the data.

    Args:
        name: name of the split, for messages.
        data: the data.

    Raises:
        InputError: if the kind is unknown, or a container could hold either columns or examples.
    """
    opener = next((kind.open for kind in _KINDS if kind.recognises(data)), None)
    if opener is None:
        raise InputError(_refused(name, data))
    return opener(name, data)


def _refused(name: str, data: object) -> str:
    parts = _inside(data)
    kinds = f" of {', '.join(sorted({type(part).__name__ for part in parts}))}" if parts else ""
    once = ", which can be read only once" if isinstance(data, Iterator) else ""
    return (
        f"split {name!r} is a {type(data).__name__}{kinds}{once}. Give (inputs, targets) tensors, "
        "a dict of tensors, a map-style Dataset with __len__ and __getitem__, a DataLoader, or an "
        "iterable that can be read again."
    )
