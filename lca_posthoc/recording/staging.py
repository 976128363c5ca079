"""Copy a model's tensors at one moment into memory, as the bytes of a safetensors file.

Format: <https://github.com/huggingface/safetensors#format>. This module lays out the bytes itself,
because `safetensors.torch.save_file` takes seven times the CPU time for a network of 139 tensors,
on a core that training could use (docs/measurements/recording.md).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..checkpoints.trajectory import normalise
from ..errors import InputError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def refuse_flattened(model: nn.Module) -> None:
    """Reject a model whose sharding leaves each process a part of the weights without names.

    Raises:
        InputError: if the model is sharded by `FullyShardedDataParallel` or DeepSpeed's ZeRO-3.
    """
    flattened = [
        type(part).__name__
        for part in model.modules()
        if type(part).__name__ == "FullyShardedDataParallel"
    ]
    flattened += ["DeepSpeed's ZeRO-3" for part in model.parameters() if hasattr(part, "ds_id")]
    if flattened:
        raise InputError(
            f"the model is sharded by {flattened[0]}, which leaves each process a part of the weights "
            "without names. Shard it with torch.distributed.fsdp.fully_shard, whose weights can be "
            "gathered, or save whole checkpoints and use lca import."
        )


class Contents:
    """Select the tensors of a model that go into a file, and their names there.

    The file holds the model's whole state dict, with names cleaned of what wrappers add
    (`trajectory.normalise`): parameters and buffers, recognised by identity so that tied ones
    appear once, and entries added by hooks and `get_extra_state`. A parameter that a hook removes
    from the state dict is in the file too.

    Args:
        model: the module that is trained.
        frozen: False to leave out parameters without gradient.

    Raises:
        InputError: if two tensors would get the same name.
    """

    def __init__(self, model: nn.Module, frozen: bool = True) -> None:
        self._model = model
        self._untrained = {
            name: _mark(parameter)
            for name, parameter in model.named_parameters()
            if not frozen and not parameter.requires_grad
        }
        # id of each of the model's tensors → name in the file, from the last call of `tensors`
        self.names_by_id: dict[int, str] = {}
        self._settle()

    def _settle(self) -> None:
        parameters, buffers = (
            dict(self._model.named_parameters()),
            dict(self._model.named_buffers()),
        )
        own = {**parameters, **buffers}
        state: dict[str, object] = self._model.state_dict(keep_vars=True)
        in_state = {normalise(name) for name in state}
        first: dict[int, str] = {}
        for name, value in state.items():
            first.setdefault(id(value), name)
        # name in the model → name in the file; None if not written
        self._names: dict[str, str | None] = {}
        for name, tensor in own.items():
            hidden = name in parameters and normalise(name) not in in_state
            written = (
                None if name in self._untrained else first.get(id(tensor), name if hidden else None)
            )
            self._names[name] = None if written is None else normalise(written)
        self._buffers = {
            name: written for name in buffers if (written := self._names[name]) is not None
        }
        self.allocated = [
            written
            for name, tensor in own.items()
            if (written := self._names[name]) and tensor.is_floating_point()
        ]
        skipped = {id(tensor) for tensor in own.values()} | {id(None)}
        without = {normalise(name) for name in self._untrained}
        added = {name: state[name] for identity, name in first.items() if identity not in skipped}
        self._added = {
            name: normalise(name)
            for name, value in added.items()
            if _is_numbers(name, value) and normalise(name) not in without
        }
        self.unwritten = {
            name: "serialised state" if isinstance(value, Tensor) else type(value).__name__
            for name, value in added.items()
            if not _is_numbers(name, value)
        }
        _refuse_one_name_for_two(self._names, self._added)

    def tensors(self) -> dict[str, Tensor]:
        """Return the current tensors by their names in the file.

        Tensors sharded over processes (`torch.distributed.tensor.DTensor`) are gathered, so every
        process must call this.

        Raises:
            InputError: if a parameter is trained now that was frozen, and left out, when recording
                started.
        """
        own = self._own()
        if own.keys() != self._names.keys():  # for example a new buffer that is not persistent
            self._settle()
        for name in self._untrained.keys() & own.keys():
            if own[name].requires_grad:
                raise InputError(
                    f"parameter {name!r} was frozen at the first step recorded, so it is in no file, "
                    "and is trained now. All iterates of a series hold the same tensors: record from "
                    "the start with frozen=True, which writes frozen parameters as well."
                )
        present = {
            written: own[name] for name, written in self._names.items() if written is not None
        }
        self.names_by_id = {id(tensor): written for written, tensor in present.items()}
        tensors = {written: _whole(tensor) for written, tensor in present.items()}
        if self._added:
            state = self._model.state_dict(keep_vars=True)
            tensors |= {
                written: _whole(state[name])
                for name, written in self._added.items()
                if name in state
            }
        return tensors

    def moved_unwritten(self) -> list[str]:
        """Return the parameters that were left out as frozen but moved, as a teacher's moving
        average does.
        """
        own = self._own()
        return [
            name
            for name, mark in self._untrained.items()
            if name in own and _mark(own[name]) != mark
        ]

    def copied_buffers(self) -> dict[str, Tensor]:
        """Return copies of the current buffers by their names in the file."""
        own = self._own()
        return {
            written: _whole(own[name]).clone()
            for name, written in self._buffers.items()
            if name in own
        }

    def _own(self) -> dict[str, Tensor]:
        return dict(itertools.chain(self._model.named_parameters(), self._model.named_buffers()))


def _refuse_one_name_for_two(*names: Mapping[str, str | None]) -> None:
    origins: dict[str, str] = {}
    for name, written in itertools.chain.from_iterable(table.items() for table in names):
        if written is not None and origins.setdefault(written, name) != name:
            raise InputError(
                f"tensors {origins[written]!r} and {name!r} of the model both become {written!r} "
                "without the parts of names that wrappers add. Rename one of them in the model."
            )


def _is_numbers(name: str, value: object) -> bool:
    """Return whether an entry of a state dict is a tensor of numbers.

    A module may serialise state into a tensor of bytes, whose length may change.
    """
    return isinstance(value, Tensor) and not (
        name.endswith("_extra_state") and value.dtype == torch.uint8
    )


def _mark(tensor: Tensor) -> float:
    """Return a checksum of a tensor: the sum of numbers sampled evenly from it."""
    flat = _whole(tensor).detach().reshape(-1)
    return float(flat[:: max(1, len(flat) // 1024)].double().sum())


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather().detach()


@dataclass(frozen=True)
class _Place:
    """Locate a tensor among the bytes, and name the device that holds it."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    start: int
    stop: int

    def view(self, data: Tensor, offset: int = 0) -> Tensor:
        return data[self.start - offset : self.stop - offset].view(self.dtype).view(self.shape)


class Layout:
    """Lay out tensors in a file: the widest numbers first, so that each is aligned, then by device
    and name.

    Args:
        tensors: the tensors by name.
        every: argument of the recorder; unless 1, it is written into the files, so that a replay
            knows that gaps of that length are intended.
        bursts: argument of the recorder, written into the files; no segment runs across the gaps
            between bursts.

    Raises:
        InputError: if a tensor has no values in memory, or values that a file cannot hold.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        every: int = 1,
        bursts: tuple[int, int] | None = None,
    ) -> None:
        self.every, self.bursts = every, bursts
        self.places: dict[str, _Place] = {}
        self.bytes = 0
        for name, tensor in sorted(
            tensors.items(), key=lambda item: (-_itemsize(*item), str(item[1].device), item[0])
        ):
            stop = self.bytes + tensor.numel() * tensor.element_size()
            self.places[name] = _Place(tensor.dtype, tensor.shape, tensor.device, self.bytes, stop)
            self.bytes = stop

    @property
    def half_precision(self) -> list[str]:
        """Return the names of tensors with fewer than 32 bits per number."""
        return [
            name
            for name, place in self.places.items()
            if place.dtype.is_floating_point and place.dtype.itemsize < 4
        ]

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Reject tensors unlike those of the first step, because a series holds one set of tensors.

        Raises:
            InputError: naming the first tensor whose type, shape, device or presence changed.
        """
        for name in {**self.places, **tensors}:
            place, tensor = self.places.get(name), tensors.get(name)
            if _kind(place) != _kind(tensor):
                raise InputError(
                    f"tensor {name!r} of the model was {_described(place)} at the first step "
                    f"recorded and is {_described(tensor)}. All iterates of a series hold the same "
                    "tensors: record the changed model into another directory."
                )

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether tensors have the names, types, shapes and devices of this layout."""
        return self.places.keys() == tensors.keys() and all(
            _kind(place) == _kind(tensors[name]) for name, place in self.places.items()
        )

    def header(self, step: int, metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """Return the header of a step's file, padded so that the tensor data is aligned.

        Args:
            step: training step, stated in the metadata.
            metadata: further entries of the metadata.
        """
        stated = {} if self.every == 1 else {"every": str(self.every)}
        if self.bursts is not None:
            stated["bursts"] = "{}:{}".format(*self.bursts)
        table: dict[str, object] = {
            "__metadata__": {"format": "pt", "step": str(step), **stated, **metadata}
        }
        for name, place in self.places.items():
            table[name] = {
                "dtype": CODES[place.dtype],
                "shape": list(place.shape),
                "data_offsets": [place.start, place.stop],
            }
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def views(self, data: Tensor) -> dict[str, Tensor]:
        """Return the tensors as views of `data`, the bytes of all tensors of a file, (bytes,)
        uint8.
        """
        return {name: place.view(data) for name, place in self.places.items()}

    def runs(self) -> list[tuple[torch.device, dict[str, _Place]]]:
        """Return runs of neighbouring tensors on one CUDA device whose numbers have one size."""
        runs = []
        for (device, _), group in itertools.groupby(
            self.places.items(), key=lambda item: (item[1].device, item[1].dtype.itemsize)
        ):
            if device.type == "cuda":
                runs.append((device, dict(group)))
        return runs


def _kind(tensor: _Place | Tensor | None) -> object:
    return tensor if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


def same_bytes(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Return whether both have the same names, and under each name tensors with the same type,
    shape and bytes.

    Args:
        some: the first tensors by name.
        others: the second tensors by name.
    """
    return some.keys() == others.keys() and all(
        _same(tensor, others[name]) for name, tensor in some.items()
    )


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def _described(tensor: _Place | Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _itemsize(name: str, tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        what = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse"
        raise InputError(
            f"tensor {name!r} of the model is {what} "
            f"({tensor.dtype if tensor.is_quantized else tensor.layout}), which safetensors cannot "
            "hold. If it never changes, let the model build it and leave it out of the state "
            "dict: register_buffer(NAME, TENSOR, persistent=False). Else keep it as a dense tensor."
        )
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        raise InputError(
            f"tensor {name!r} of the model has no values in memory to save. Run a batch through a "
            "lazily built model, or load its weights, before you save the first iterate."
        )
    if name == "__metadata__" or any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise InputError(
            f"tensor {name!r} of the model has a name that safetensors cannot hold. Rename it in "
            "the model."
        )
    if tensor.dtype not in CODES:
        raise InputError(
            f"tensor {name!r} of the model is {tensor.dtype}, which safetensors cannot hold. Use "
            "another type."
        )
    return tensor.element_size()


class Staging:
    """Allocate host memory for one iterate, page-locked if it comes from a CUDA device."""

    def __init__(self, layout: Layout) -> None:
        self.data = torch.empty(
            layout.bytes, dtype=torch.uint8, device="cpu", pin_memory=bool(layout.runs())
        )
        self.views = layout.views(self.data)
        self.copied: list[torch.cuda.Event] = []

    def wait(self) -> None:
        """Wait until the bytes have arrived."""
        for event in self.copied:
            event.synchronize()


class Stager:
    """Copy a model's tensors into staging memory.

    Tensors on a CUDA device are copied asynchronously: into a buffer on the device, in the order of
    the current stream, so that the optimiser may continue, and from there to the host on another
    stream.
    """

    def __init__(self, layout: Layout) -> None:
        self._runs = [_Run(*run) for run in layout.runs()]
        on_device = {name for run in self._runs for name in run.views}
        self._others = [name for name in layout.places if name not in on_device]

    @torch.no_grad()
    def stage(self, tensors: Mapping[str, Tensor], staging: Staging) -> None:
        """Copy the current tensors; on CUDA, as they will be once the queued work is done.

        Args:
            tensors: the tensors by name, as in the layout.
            staging: memory to copy into.
        """
        if self._others:
            _copy({name: staging.views[name] for name in self._others}, tensors)
        staging.copied = [run.stage(tensors, staging) for run in self._runs]

    def wait(self) -> None:
        """Wait until the last copy has left the devices."""
        for run in self._runs:
            run.wait()


class _Run:
    """Copy tensors of one CUDA device that lie side by side in a file."""

    def __init__(self, device: torch.device, places: Mapping[str, _Place]) -> None:
        first, *_, last = [*places.values(), *places.values()]
        self._bytes = slice(first.start, last.stop)
        self._buffer = torch.empty(last.stop - first.start, dtype=torch.uint8, device=device)
        self.views = {name: place.view(self._buffer, first.start) for name, place in places.items()}
        self._stream, self._copied = torch.cuda.Stream(device), _event()  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._copied.synchronize()

    def stage(self, tensors: Mapping[str, Tensor], staging: Staging) -> torch.cuda.Event:
        current = torch.cuda.current_stream(self._buffer.device)
        current.wait_event(self._copied)  # wait until the previous iterate has left the buffer
        _copy(self.views, tensors)
        self._stream.wait_stream(current)
        self._copied = _event()
        with torch.cuda.stream(self._stream):
            staging.data[self._bytes].copy_(self._buffer, non_blocking=True)
            self._copied.record(self._stream)
        return self._copied


def _copy(views: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    torch._foreach_copy_(list(views.values()), [tensors[name] for name in views])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
