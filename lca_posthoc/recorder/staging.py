"""What a model holds at one moment, copied into memory as the bytes of a safetensors file.

Format: <https://github.com/huggingface/safetensors#format>. The bytes are laid out here and not by `safetensors.torch.save_file`, which
takes seven times the CPU time for a network of 139 tensors, on a core that training could use (docs/performance.md).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def transient_names(model: nn.Module) -> frozenset[str]:
    """Buffers that are not persistent, which a checkpoint does not hold."""
    return frozenset(name for name, _ in model.named_buffers()) - frozenset(model.state_dict(keep_vars=True))


def refuse_flattened(model: nn.Module) -> None:
    """Some ways to share weights out leave every process a nameless part of them.

    Raises:
        InputError: where the model is sharded by `FullyShardedDataParallel` or DeepSpeed's ZeRO-3.
    """
    flattened = [type(each).__name__ for each in model.modules() if type(each).__name__ == "FullyShardedDataParallel"]
    flattened += ["DeepSpeed's ZeRO-3" for each in model.parameters() if hasattr(each, "ds_id")]
    if flattened:
        raise InputError(
            f"the model is sharded by {flattened[0]}, of which a process has a part without names. Shard it with "
            "torch.distributed.fsdp.fully_shard, whose weights are gathered, or save whole checkpoints and use lca import."
        )


def tensors_of(model: nn.Module, without: frozenset[str]) -> dict[str, Tensor]:
    """The model's parameters and all buffers but some, tied ones once, under their first name.

    What is sharded over processes (`torch.distributed.tensor.DTensor`) is gathered, which all of them have to ask for.
    """
    held = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: _whole(tensor) for name, tensor in held if name not in without}


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather().detach()


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies among the bytes, and on which device the model has it."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    start: int
    stop: int

    def view(self, data: Tensor, offset: int = 0) -> Tensor:
        return data[self.start - offset : self.stop - offset].view(self.dtype).view(self.shape)


class Layout:
    """Which tensors a file holds, and where: the largest numbers first, so that each is aligned, then by device and name.

    `every`, where it is not 1, is what the recorder was asked for, and stands in the files: gaps as long as it were asked for.

    Raises:
        InputError: where a tensor has no values in memory, or none that a file could hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor], every: int = 1) -> None:
        self.every = every
        self.places: dict[str, _Place] = {}
        self.bytes = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (-_itemsize(*item), str(item[1].device), item[0])):
            stop = self.bytes + tensor.numel() * tensor.element_size()
            self.places[name] = _Place(tensor.dtype, tensor.shape, tensor.device, self.bytes, stop)
            self.bytes = stop

    @property
    def half_precision(self) -> list[str]:
        """Tensors of fewer than 32 bits a number."""
        return [name for name, each in self.places.items() if each.dtype.is_floating_point and each.dtype.itemsize < 4]

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """A series holds one set of tensors.

        Raises:
            InputError: naming the first tensor that is another one than before.
        """
        for name in {**self.places, **tensors}:
            there, here = self.places.get(name), tensors.get(name)
            if _kind(there) != _kind(here):
                raise InputError(
                    f"tensor {name!r} of the model was {_described(there)} at the first step recorded and is {_described(here)}. "
                    "All iterates of a series hold the same tensors: record the changed model into another directory."
                )

    def header(self, step: int) -> bytes:
        """What stands before the tensors' bytes in the file of a step, padded so that they are aligned."""
        every = {} if self.every == 1 else {"every": str(self.every)}
        table: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(step), **every}}
        for name, each in self.places.items():
            table[name] = {
                "dtype": CODES[each.dtype],
                "shape": list(each.shape),
                "data_offsets": [each.start, each.stop],
            }
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def views(self, data: Tensor) -> dict[str, Tensor]:
        """The tensors as parts of the bytes of a whole file, (bytes,) uint8."""
        return {name: each.view(data) for name, each in self.places.items()}

    def runs(self) -> list[tuple[torch.device, dict[str, _Place]]]:
        """Neighbours that lie on one CUDA device and have numbers of one size."""
        found = []
        for (device, _), group in itertools.groupby(
            self.places.items(), key=lambda item: (item[1].device, item[1].dtype.itemsize)
        ):
            if device.type == "cuda":
                found.append((device, dict(group)))
        return found


def _kind(tensor: _Place | Tensor | None) -> object:
    return tensor if tensor is None else (tensor.dtype, tensor.shape, tensor.device)


def same_bytes(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether there are the same names, and under each a tensor of the same type, shape and bytes."""
    return some.keys() == others.keys() and all(_same(each, others[name]) for name, each in some.items())


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _described(tensor: _Place | Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _itemsize(name: str, tensor: Tensor) -> int:
    if tensor.layout != torch.strided or tensor.is_meta or nn.parameter.is_lazy(tensor):
        raise InputError(
            f"tensor {name!r} of the model has no values in memory to be saved. Run a batch through a lazily built model, or load its "
            "weights, before the first iterate is saved."
        )
    if name == "__metadata__" or any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise InputError(
            f"tensor {name!r} of the model has a name that safetensors cannot hold. Rename it in the model."
        )
    if tensor.dtype not in CODES:
        raise InputError(
            f"tensor {name!r} of the model is {tensor.dtype}, which safetensors cannot hold. Use another type."
        )
    return tensor.element_size()


class Staging:
    """Memory for one iterate on the host, page-locked where it comes from a CUDA device."""

    def __init__(self, layout: Layout) -> None:
        self.data = torch.empty(layout.bytes, dtype=torch.uint8, device="cpu", pin_memory=bool(layout.runs()))
        self.views = layout.views(self.data)
        self.copied: list[torch.cuda.Event] = []

    def wait(self) -> None:
        """Until the bytes have arrived."""
        for event in self.copied:
            event.synchronize()


class Stager:
    """Copies a model's tensors into staging memory.

    From a CUDA device without waiting: into a buffer on the device, in the order of the current stream, so that the optimiser
    may go on, and from there to the host on a stream of its own.
    """

    def __init__(self, layout: Layout) -> None:
        self._runs = [_Run(*each) for each in layout.runs()]
        on_device = {name for run in self._runs for name in run.views}
        self._others = [name for name in layout.places if name not in on_device]

    @torch.no_grad()
    def stage(self, tensors: Mapping[str, Tensor], staging: Staging) -> None:
        """Take the tensors as they are now; on CUDA, as they will be once the work that is queued has been done."""
        if self._others:
            _copy({name: staging.views[name] for name in self._others}, tensors)
        staging.copied = [run.stage(tensors, staging) for run in self._runs]


class _Run:
    """Tensors of one CUDA device that lie side by side in a file."""

    def __init__(self, device: torch.device, places: Mapping[str, _Place]) -> None:
        first, *_, last = [*places.values(), *places.values()]
        self._bytes = slice(first.start, last.stop)
        self._buffer = torch.empty(last.stop - first.start, dtype=torch.uint8, device=device)
        self.views = {name: each.view(self._buffer, first.start) for name, each in places.items()}
        self._stream, self._copied = torch.cuda.Stream(device), _event()  # type: ignore[no-untyped-call]

    def stage(self, tensors: Mapping[str, Tensor], staging: Staging) -> torch.cuda.Event:
        current = torch.cuda.current_stream(self._buffer.device)
        current.wait_event(self._copied)  # the iterate before has left the buffer
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
