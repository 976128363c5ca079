"""Traverse the contents of batches: tensors of every layout, inside containers and objects of every
kind.

Every operation on a batch (moving, converting, copying, comparing, sizing, hashing) uses this
module.
"""

from __future__ import annotations

import copy
import enum
import functools
import hashlib
import sys
import types
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from ...errors import InputError

_WITHOUT_PARTS = (str, bytes, bytearray, int, float, complex, type(None), np.generic)
_NOT_ENTERED = (
    *_WITHOUT_PARTS,
    *(
        type,
        types.ModuleType,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.MethodType,
        functools.partial,
    ),
    *(enum.Enum, PurePath, nn.Module, Dataset, DataLoader),
)


# --- tensors of every layout ----------------------------------------------------------------------


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that hold the numbers of a tensor of any layout; for a sparse one,
    its indices and values.
    """
    tensor = tensor.detach()
    if tensor.is_nested:
        return [part for row in tensor.unbind() for part in dense_parts(row)]
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps other tensors
        names = tensor.__tensor_flatten__()[0]
        return [part for name in names for part in dense_parts(getattr(tensor, name))]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout != torch.strided:
        return [tensor.to_dense()]
    if not tensor.is_quantized:
        return [tensor]
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [
            tensor.int_repr(),
            torch.tensor(
                [tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64, device="cpu"
            ),
        ]
    return [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def tensor_bytes(tensor: Tensor) -> int:
    """Return the size in bytes of the numbers of a tensor of any layout."""
    if tensor.layout == torch.strided and not tensor.is_nested:
        return tensor.nbytes
    return sum(part.nbytes for part in dense_parts(tensor))


def _raw(tensor: Tensor) -> Tensor:
    """Return the numbers of a dense tensor as bytes, (bytes,) uint8, whatever its strides and
    conjugation.
    """
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    # a tensor of one number may have any stride
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def _kind_of(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.layout, None if tensor.is_nested else tensor.shape


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same layout, shape, type and bits, including NaN and the
    sign of zero.

    Args:
        one: the first tensor.
        other: the second tensor.
    """
    if _kind_of(one) != _kind_of(other):
        return False
    if one.is_meta or other.is_meta:
        return one.is_meta and other.is_meta
    parts = dense_parts(one), dense_parts(other)
    return len(parts[0]) == len(parts[1]) and all(
        part.shape == other_part.shape and torch.equal(_raw(part), _raw(other_part))
        for part, other_part in zip(*parts, strict=True)
    )


def rows(tensor: Tensor, positions: range | Tensor) -> Tensor:
    """Return the entries of a tensor at some positions of its first axis; sparse and nested tensors
    keep their kind.

    Args:
        tensor: the tensor.
        positions: positions, as a range or as (positions,) int64.
    """
    if tensor.is_nested:
        parts = tensor.unbind()
        return torch.nested.as_nested_tensor(
            [parts[position] for position in _listed(positions)], layout=tensor.layout
        )
    if tensor.layout == torch.strided:
        return (
            tensor[positions.start : positions.stop]
            if isinstance(positions, range)
            else tensor[positions]
        )
    index = torch.tensor(_listed(positions), device=tensor.device)
    blocks = (
        tensor.values().shape[1:3]
        if tensor.layout in (torch.sparse_bsr, torch.sparse_bsc)
        else None
    )
    chosen: Tensor = (
        tensor.to_sparse().index_select(0, index).to_sparse(layout=tensor.layout, blocksize=blocks)
    )
    return chosen


def _listed(positions: range | Tensor) -> list[int]:
    return list(positions) if isinstance(positions, range) else positions.tolist()


# --- containers -----------------------------------------------------------------------------------


class Container(NamedTuple):
    """Hold the parts of a container, their places, and a function that builds such a container from
    other parts.
    """

    places: Sequence[object]
    parts: list[Any]
    remake: Callable[[list[Any]], Any]


def opened(thing: Any) -> Container | None:
    """Return the parts of a container; None for anything else, such as an object with attributes.

    Containers are tuples, lists, dicts, sets and their subclasses, other mappings (rebuilt as
    dicts), packed sequences, arrays of objects, and every type registered with
    `torch.utils._pytree`.
    """
    kind = type(thing)
    if kind is tuple or kind is list:
        return Container(range(len(thing)), list(thing), kind)
    if kind is dict:
        return _of_mapping(thing, dict)
    if isinstance(thing, PackedSequence):
        return Container(thing._fields, list(thing), functools.partial(_packed, thing))
    if isinstance(thing, np.ndarray):
        return None if not thing.dtype.hasobject or thing.dtype.fields else _of_array(thing)
    if isinstance(thing, _NOT_ENTERED):
        return None
    if (node := pytree.SUPPORTED_NODES.get(kind)) is not None:
        parts, context = node.flatten_fn(thing)
        return Container(
            range(len(parts)), list(parts), lambda parts: node.unflatten_fn(parts, context)
        )
    if isinstance(thing, dict | list) and getattr(thing, "__dict__", None):
        return None  # an object with attributes besides its items
    if isinstance(thing, UserDict):
        return _of_mapping(thing.data, functools.partial(_user_dict, thing))
    if isinstance(thing, Mapping):
        return _of_mapping(
            thing, functools.partial(_filled, thing) if isinstance(thing, dict) else dict
        )
    if isinstance(thing, list):
        return Container(range(len(thing)), list(thing), functools.partial(_filled, thing))
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return Container(range(len(thing)), list(thing), lambda parts: kind(*parts))
    return (
        Container(range(len(thing)), list(thing), kind)
        if isinstance(thing, tuple | set | frozenset)
        else None
    )


def _of_mapping(thing: Mapping[Any, object], remake: Callable[[dict[Any, Any]], Any]) -> Container:
    keys = list(thing)
    return Container(
        keys,
        [thing[key] for key in keys],
        lambda parts: remake(dict(zip(keys, parts, strict=True))),
    )


def _of_array(thing: np.ndarray) -> Container:
    def remake(parts: list[Any]) -> np.ndarray:
        array = np.empty(len(parts), dtype=object)
        for index, part in enumerate(parts):  # numpy would unpack them if all were assigned at once
            array[index] = part
        return array.reshape(thing.shape)

    return Container(range(thing.size), thing.reshape(-1).tolist(), remake)


def _packed(thing: PackedSequence, parts: list[Any]) -> PackedSequence:
    """Rebuild a packed sequence; `batch_sizes` stay integers on the CPU, as torch requires."""
    data, sizes, *indices = parts
    return type(thing)(data, sizes if sizes.device.type == "cpu" else thing.batch_sizes, *indices)


def _user_dict(thing: UserDict[Any, Any], items: dict[Any, object]) -> UserDict[Any, Any]:
    new = copy.copy(thing)
    new.data = items
    return new


def _filled(thing: Any, parts: Any) -> object:
    """Return a copy of a user's dict or list with other items, or the items themselves if it cannot
    be copied.
    """
    try:
        new = copy.copy(thing)
        new.clear()
        (new.update if isinstance(new, dict) else new.extend)(parts)
    except Exception:  # a user's methods may raise anything
        return parts
    return new


# --- objects with attributes ----------------------------------------------------------------------


def _attributes(thing: object) -> dict[str, object]:
    """Return the attributes of an object, from `__dict__` and slots."""
    if isinstance(thing, _NOT_ENTERED):
        return {}
    slots = [
        name
        for kind in type(thing).__mro__
        for name, member in vars(kind).items()
        if isinstance(member, types.MemberDescriptorType) and hasattr(thing, name)
    ]
    inside = getattr(thing, "__dict__", {})
    return {
        **{name: getattr(thing, name) for name in slots},
        **(inside if isinstance(inside, dict) else {}),
    }


def named_parts(thing: object, place: str = "") -> list[tuple[str, Any]]:
    """Return the parts of a container or an object with their places, such as `[0]`, `['x']`, `.x`;
    an empty list for a leaf.

    Args:
        thing: the container, object or leaf.
        place: prefix of the places.
    """
    if isinstance(thing, (Tensor, *_WITHOUT_PARTS)):
        return []
    container = opened(thing)
    if container is not None:
        return [
            (f"{place}[{key!r}]", part)
            for key, part in zip(container.places, container.parts, strict=True)
        ]
    items = (
        thing.items()
        if isinstance(thing, dict)
        else enumerate(thing)
        if isinstance(thing, list)
        else ()
    )
    attributes = {} if isinstance(thing, dict) and thing.__dict__ is thing else _attributes(thing)
    return [
        *((f"{place}[{key!r}]", part) for key, part in items),
        *((f"{place}.{name}", part) for name, part in attributes.items()),
    ]


def fresh(batch: object) -> object:
    """Return a batch of new tensors over the same memory, so that changes to the tensor objects,
    such as requires_grad_, do not last.
    """
    try:
        return change_tensors(
            batch, lambda tensor: tensor.clone() if tensor.is_inference() else tensor.detach()
        )
    except InputError:  # pass an object on unchanged if it cannot be copied
        return batch


def copied(batch: object) -> object:
    """Return a copy of a batch, or the batch itself if it holds an object that cannot be copied."""
    try:
        return change_tensors(batch, Tensor.clone)
    except InputError:
        return batch


def tensors_of(thing: object) -> Iterator[Tensor]:
    """Yield the tensors inside an object, in order; enter an object only once, even if several
    paths lead to it.
    """
    return _tensors_of(thing, {})


def _tensors_of(thing: object, entered: dict[int, object]) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif not isinstance(thing, _WITHOUT_PARTS) and id(thing) not in entered:
        if opened(thing) is None:
            entered[id(thing)] = thing  # an object may refer to itself
        for _, part in named_parts(thing):
            yield from _tensors_of(part, entered)


def change_tensors(
    thing: object, change: Callable[[Tensor], Any], whole: Callable[[Any], Any] | None = None
) -> object:
    """Return an object with every tensor in it changed.

    Containers are rebuilt; other objects are copied only if a tensor in them changes.

    Args:
        thing: a tensor, a container, an object with tensors among its attributes, or anything else,
            which stays unchanged.
        change: returns another tensor, or the same one.
        whole: called with every object that is neither tensor nor container, before its attributes
            are changed.

    Raises:
        InputError: if an object holds tensors that change and cannot be copied.
    """
    if isinstance(thing, Tensor):
        return change(thing)
    if isinstance(thing, _WITHOUT_PARTS):
        return thing
    container = opened(thing)
    if container is not None:
        return container.remake([change_tensors(part, change, whole) for part in container.parts])
    return _with_changed(whole(thing) if whole else thing, change)


def _with_changed(thing: Any, change: Callable[[Tensor], Any]) -> object:
    """Copy an object as `copy.deepcopy` does, but share every part without tensors with the
    original.

    Raises:
        InputError: if the object cannot be copied.
    """
    entered: dict[int, object] = {}
    above: dict[int, set[int]] = {}
    waiting = [thing]
    while waiting:
        holder = waiting.pop()
        for _, part in named_parts(holder):
            if isinstance(part, _WITHOUT_PARTS):
                continue
            above.setdefault(id(part), set()).add(id(holder))
            if id(part) not in entered and part is not thing:
                entered[id(part)] = part
                waiting.append(part)
    changed = {key: change(part) for key, part in entered.items() if isinstance(part, Tensor)}
    for part in [*entered.values(), thing]:
        if isinstance(part, PackedSequence) and changed[id(part.batch_sizes)].device.type != "cpu":
            changed[id(part.batch_sizes)] = part.batch_sizes
    if all(changed[key] is entered[key] for key in changed):
        return thing
    leading, reached = set(changed), list(changed)
    while reached:
        new = above.get(reached.pop(), set()) - leading
        leading |= new
        reached += new
    shared = {key: part for key, part in entered.items() if key not in leading}
    try:
        copied: Any = copy.deepcopy(thing, {**shared, **changed})
    except Exception as error:
        raise InputError(
            f"a batch holds a {type(thing).__name__} with tensors in it, which cannot be copied to "
            f"move them: {type(error).__name__}: {error}. Give tensors, or tuples, dicts and "
            "dataclasses of them, from collate_fn."
        ) from error
    if isinstance(thing, dict) and thing.__dict__ is thing:
        copied.__dict__ = copied  # its items are its attributes
    return copied


def size_of(thing: object) -> int:
    """Return the size of an object in bytes: of its tensors and arrays, and for other objects what
    Python states.
    """
    if isinstance(thing, Tensor):
        return tensor_bytes(thing)
    container = None if isinstance(thing, _WITHOUT_PARTS) else opened(thing)
    if container is not None:
        return sum(map(size_of, container.parts))
    if isinstance(thing, np.ndarray | np.generic):
        return thing.nbytes
    own = getattr(thing, "nbytes", 0)
    return (own if isinstance(own, int) and own else sys.getsizeof(thing)) + sum(
        map(tensor_bytes, tensors_of(thing))
    )


# --- hashes ---------------------------------------------------------------------------------------


def digest_of(*things: object) -> str:
    """Return a hash of the contents of objects, equal in every process."""
    digest = hashlib.blake2b(digest_size=16)
    feed(digest, things)
    return digest.hexdigest()


def feed(digest: hashlib.blake2b, thing: object) -> None:
    """Update a hash with the names, shapes, types and bytes of an object.

    Tuples and lists are equivalent, and so are mappings. An object counts by the parts that pickle
    would store; one that cannot be pickled (a lock, a connection) counts by its type.

    Args:
        digest: the hash.
        thing: the object.
    """
    _Feeder(digest).feed(thing)


class _Feeder:
    """Update one hash; an object that occurs again is not hashed again, and one inside itself is
    marked as such.
    """

    def __init__(
        self, digest: hashlib.blake2b, known: dict[int, tuple[Any, bytes]] | None = None
    ) -> None:
        self._digest = digest
        self._known = {} if known is None else known

    def feed(self, thing: object) -> None:
        if isinstance(thing, Tensor):
            self._tensor(thing)
        elif isinstance(thing, np.ndarray):
            self._array(thing)
        elif isinstance(thing, np.generic):
            self._text(f"{thing.dtype}")
            self._digest.update(thing.tobytes())
        elif type(thing) is list or (isinstance(thing, tuple) and not hasattr(thing, "__dict__")):
            self._several("of", list(thing))
        elif isinstance(thing, set | frozenset):
            self._text(f"{len(thing)} in a set:")
            for element in sorted(self._alone(part) for part in thing):
                self._digest.update(element)
        elif isinstance(thing, Mapping) and not (
            isinstance(thing, dict) and getattr(thing, "__dict__", None)
        ):
            self._text(f"{len(thing)} by name:")
            for key in thing:
                self.feed(key)
                self.feed(thing[key])
        elif (text := _text_of(thing)) is not None:
            self._text(f"{text};")
        else:
            self._digest.update(self._object(thing))

    def _text(self, text: str) -> None:
        self._digest.update(text.encode(errors="surrogatepass"))

    def _several(self, what: str, parts: Sequence[Any]) -> None:
        self._text(f"{len(parts)} {what}:")
        for part in parts:
            self.feed(part)

    def _tensor(self, tensor: Tensor) -> None:
        self._text(
            f"{tensor.dtype}{tensor.layout}{list(tensor.shape) if not tensor.is_nested else 'nested'}"
        )
        if tensor.is_meta:
            return
        for part in dense_parts(tensor):
            self._text(f"{part.dtype}{list(part.shape)}")
            self._digest.update(_raw(part.cpu()).numpy().data)

    def _array(self, array: np.ndarray) -> None:
        self._text(f"{array.dtype}{array.shape}")
        if array.dtype.hasobject:
            self._several("objects", array.reshape(-1).tolist())
        else:
            self._digest.update(np.ascontiguousarray(array).tobytes())

    def _alone(self, thing: object) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        _Feeder(digest, self._known).feed(thing)
        return digest.digest()

    def _object(self, thing: object) -> bytes:
        if id(thing) not in self._known:
            self._known[id(thing)] = (thing, b"inside itself")
            digest = hashlib.blake2b(digest_size=16)
            _Feeder(digest, self._known)._several(type(thing).__qualname__, _said_of_itself(thing))
            self._known[id(thing)] = (thing, digest.digest())
        return self._known[id(thing)][1]


def _text_of(thing: object) -> str | None:
    """Return a text that identifies an object completely, or None if there is none."""
    if isinstance(thing, enum.Enum):
        return f"{type(thing).__qualname__}.{thing.name}"
    if isinstance(thing, type):
        return thing.__qualname__
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    if isinstance(thing, PurePath):
        return str(thing)
    if type(thing) in (
        str,
        bytes,
        int,
        float,
        bool,
        complex,
        type(None),
        torch.dtype,
        torch.device,
        range,
        slice,
    ):
        return repr(thing)
    return None


def _said_of_itself(thing: object) -> list[Any]:
    """Return the parts from which pickle would rebuild an object, or its attributes if it cannot be
    pickled.
    """
    if isinstance(thing, types.FunctionType):
        return [thing.__qualname__, thing.__defaults__, thing.__kwdefaults__, *_cells(thing)]
    if isinstance(thing, nn.Module):
        return [dict(thing.state_dict())]
    try:
        reduced = thing.__reduce_ex__(4)
    except Exception:  # a user's class may raise anything; it cannot be pickled
        return [_attributes(thing)]
    return (
        [reduced]
        if isinstance(reduced, str)
        else [list(part) if index > 2 and part else part for index, part in enumerate(reduced)]
    )


def _cells(function: types.FunctionType) -> list[Any]:
    """Return the values in a function's closure."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            cells.append(None)
    return cells
